//! What each kernel's verifier needed for each program, held against
//! `docs/verifier.md` and against half of the kernel's limit.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::PathBuf};

use anyhow::{Context, Result};

use crate::{step::say, tally::Tally, workspace};

/// Half of BPF_COMPLEXITY_LIMIT_INSNS (linux/bpf_verifier.h): what is beyond
/// has no room for the next kernel.
const MOST: u64 = 500_000;
/// A program that needs this much more than what is written down is told.
const GROWN: f64 = 1.1;

const HEAD: &str = "\
# What the verifier needs

Instructions that each kernel's verifier looked at before it took a program, from `cargo xtask vm --veristat`, which
writes this file. Every boot is compared with it, and a program beyond 500,000 (half of what the kernel allows) fails.
Names are cut to 15 bytes, as the kernel keeps them.

";

/// Instructions by program, then by series.
#[derive(Default)]
pub(crate) struct Verified(BTreeMap<String, BTreeMap<String, u64>>);

impl Verified {
    /// Lines of `attempt verified`, after `VERIFIED `.
    pub(crate) fn read(&mut self, series: &str, log: &str) {
        for line in log.lines().filter_map(|line| line.trim_end().strip_prefix("VERIFIED ")) {
            let Some((name, count)) = line.split_once(' ') else { continue };
            let Ok(count) = count.parse::<u64>() else { continue };
            let most = self.0.entry(name.to_owned()).or_default().entry(series.to_owned()).or_default();
            *most = count.max(*most);
        }
    }

    fn parse(text: &str) -> Verified {
        let mut verified = Verified::default();
        let mut rows = text.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"));
        let series: Vec<_> =
            rows.next().unwrap_or_default().split(" | ").skip(1).map(str::to_owned).collect();
        for row in rows {
            let mut cells = row.split(" | ");
            let name = cells.next().unwrap_or_default().trim_matches('`').to_owned();
            for (series, cell) in series.iter().zip(cells) {
                if let Ok(count) = cell.replace(',', "").parse() {
                    verified.0.entry(name.clone()).or_default().insert(series.clone(), count);
                }
            }
        }
        verified
    }

    fn text(&self) -> String {
        let mut series: Vec<&String> = self.0.values().flat_map(BTreeMap::keys).collect();
        series.sort_by_key(|name| name.split('.').map(|n| n.parse().unwrap_or(u64::MAX)).collect::<Vec<_>>());
        series.dedup();
        let mut text = format!("{HEAD}| program |");
        for name in &series {
            let _ = write!(text, " {name} |");
        }
        let _ = write!(text, "\n|---|{}\n", "---:|".repeat(series.len()));
        for (program, counts) in &self.0 {
            let _ = write!(text, "| `{program}` |");
            for name in &series {
                let cell = counts.get(*name).map_or("–".to_owned(), |count| thousands(*count));
                let _ = write!(text, " {cell} |");
            }
            text.push('\n');
        }
        text
    }
}

fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn file() -> PathBuf {
    workspace::root().join("docs/verifier.md")
}

/// One claim for each program and kernel. With `write` the new figures are
/// written down, those of kernels that were not booted stay.
pub(crate) fn judge(verified: &Verified, write: bool) -> Result<Tally> {
    let mut known = Verified::parse(&fs::read_to_string(file()).unwrap_or_default());
    let mut tally = Tally::default();
    for (program, counts) in &verified.0 {
        for (series, count) in counts {
            tally.count(*count <= MOST);
            if *count > MOST {
                eprintln!("{program} on {series}: {count} instructions for the verifier, {MOST} at most");
            }
            let before = known.0.get(program).and_then(|counts| counts.get(series));
            if let Some(before) = before.filter(|before| *count as f64 > **before as f64 * GROWN) {
                say(format!("{program} on {series}: {count} instructions for the verifier, {before} before"));
            }
        }
    }
    if write {
        for (program, counts) in &verified.0 {
            known.0.entry(program.clone()).or_default().extend(counts.clone());
        }
        // What no kernel has any more.
        let booted: Vec<&String> = verified.0.values().flat_map(BTreeMap::keys).collect();
        known.0.retain(|name, counts| {
            verified.0.contains_key(name) || !counts.keys().any(|series| booted.contains(&series))
        });
        fs::write(file(), known.text()).with_context(|| format!("cannot write {}", file().display()))?;
        say(format!("wrote {}", file().display()));
    }
    Ok(tally)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(log: &str) -> Verified {
        let mut verified = Verified::default();
        verified.read("6.12", log);
        verified.read("6.1", "VERIFIED egress 7\n");
        verified
    }

    #[test]
    fn what_is_written_is_read_again() {
        let verified = read("VERIFIED egress 12345\r\nVERIFIED exec 9\nVERIFIED egress 12\n");
        let text = verified.text();
        assert!(text.contains("| `egress` | 7 | 12,345 |\n| `exec` | – | 9 |"), "{text}");
        assert_eq!(Verified::parse(&text).0, verified.0);
    }

    #[test]
    fn a_program_beyond_half_of_the_limit_fails() {
        let tally = judge(&read("VERIFIED egress 500000\nVERIFIED exec 500001\n"), false).unwrap();
        assert_eq!((tally.passed, tally.failed), (2, 1));
    }
}
