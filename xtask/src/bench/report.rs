//! The table: figures, ratios, and each budget with what was measured.

use std::{fmt::Write, fs};

use anyhow::{Context, Result};

use super::{Figures, Operation, Setting, programs::Cost, scale};
use crate::{step, step::say, workspace};

/// A limit of DESIGN.md, and the figure that is held against it.
struct Budget {
    what: &'static str,
    limit: &'static str,
    /// The measured text, and whether it is within the limit.
    measure: fn(&Table) -> Option<(String, bool)>,
}

const BUDGETS: &[Budget] = &[
    Budget {
        what: "TCP connect(), unlabelled, over no programs",
        limit: "≤ +3 %",
        measure: |table| table.more(Operation::TcpConnect, Setting::Unlabelled, 0.03),
    },
    Budget {
        what: "UDP connect(), unlabelled, over no programs",
        limit: "≤ +150 ns",
        measure: |table| table.added(Operation::UdpConnect, Setting::Unlabelled, 150.0),
    },
    Budget {
        what: "TCP connect(), unlabelled, against empty programs",
        limit: "≤ 1.5×",
        measure: |table| table.times(Operation::TcpConnect, Setting::Unlabelled, Setting::Empty, 1.5),
    },
    Budget {
        what: "UDP connect(), unlabelled, against empty programs",
        limit: "≤ 1.5×",
        measure: |table| table.times(Operation::UdpConnect, Setting::Unlabelled, Setting::Empty, 1.5),
    },
    Budget {
        what: "TCP connect(), labelled and allowed, over no programs",
        limit: "≤ +1 µs",
        measure: |table| table.added(Operation::TcpConnect, Setting::Labelled, 1000.0),
    },
    Budget {
        what: "UDP connect(), labelled and allowed, over no programs",
        limit: "≤ +1 µs",
        measure: |table| table.added(Operation::UdpConnect, Setting::Labelled, 1000.0),
    },
    Budget {
        what: "loopback TCP throughput, unlabelled, of no programs",
        limit: "≥ 98 %",
        measure: |table| table.share(Setting::Unlabelled, 0.98),
    },
    Budget {
        what: "loopback TCP throughput, labelled, of no programs",
        limit: "≥ 95 %",
        measure: |table| table.share(Setting::Labelled, 0.95),
    },
    Budget {
        what: "fork+exec, unlabelled, over no programs",
        limit: "≤ +2 %",
        measure: |table| table.more(Operation::ForkExec, Setting::Unlabelled, 0.02),
    },
    Budget {
        what: "start to enforcing",
        limit: "< 1 s",
        measure: |table| {
            let start = median(table.starts)?;
            Some((format!("{start:.2} s"), start < 1.0))
        },
    },
];

struct Table<'a> {
    figures: &'a Figures,
    starts: &'a [f64],
}

impl Table<'_> {
    fn figure(&self, operation: Operation, setting: Setting) -> Option<f64> {
        median(self.figures.get(&(operation, setting))?)
    }

    /// Pairs of the same round: what the machine did meanwhile cancels out.
    fn paired(&self, operation: Operation, a: Setting, b: Setting, of: fn(f64, f64) -> f64) -> Option<f64> {
        let (a, b) = (self.figures.get(&(operation, a))?, self.figures.get(&(operation, b))?);
        median(&a.iter().zip(b).map(|(a, b)| of(*a, *b)).collect::<Vec<_>>())
    }

    fn ratio(&self, operation: Operation, a: Setting, b: Setting) -> Option<f64> {
        self.paired(operation, a, b, |a, b| a / b)
    }

    fn more(&self, operation: Operation, setting: Setting, limit: f64) -> Option<(String, bool)> {
        let more = self.ratio(operation, setting, Setting::Nothing)? - 1.0;
        Some((format!("{:+.1} %", more * 100.0), more <= limit))
    }

    fn added(&self, operation: Operation, setting: Setting, limit: f64) -> Option<(String, bool)> {
        let added = self.paired(operation, setting, Setting::Nothing, |a, b| a - b)?;
        Some((format!("{added:+.0} ns"), added <= limit))
    }

    fn times(&self, operation: Operation, a: Setting, b: Setting, limit: f64) -> Option<(String, bool)> {
        let ratio = self.ratio(operation, a, b)?;
        Some((format!("{ratio:.2}×"), ratio <= limit))
    }

    fn share(&self, setting: Setting, limit: f64) -> Option<(String, bool)> {
        let share = self.ratio(Operation::TcpThroughput, setting, Setting::Nothing)?;
        Some((format!("{:.1} %", share * 100.0), share >= limit))
    }
}

pub(crate) fn write(figures: &Figures, starts: &[f64], programs: &[Cost], rounds: usize) -> Result<String> {
    let table = Table { figures, starts };
    let mut text = String::from(
        "# Figures\n\nWritten by `cargo xtask bench`; do not edit. \
         Medians of interleaved rounds on one machine; in brackets the median ratio to \"no programs\" \
         of the same round. Absolute numbers say little on another machine, ratios more.\n\n",
    );
    writeln!(text, "{}; {rounds} rounds.\n", machine()?)?;
    let settings: Vec<_> = Setting::ALL
        .into_iter()
        .filter(|setting| figures.keys().any(|(_, there)| there == setting))
        .collect();
    write!(text, "| operation |")?;
    for setting in &settings {
        write!(text, " {} |", setting.name())?;
    }
    writeln!(text, "\n|---|{}", "---|".repeat(settings.len()))?;
    for operation in Operation::ALL {
        if !figures.keys().any(|(there, _)| *there == operation) {
            continue;
        }
        write!(text, "| {} |", title(operation))?;
        for &setting in &settings {
            let figure = table.figure(operation, setting).context("a setting without a figure")?;
            write!(text, " {}", shown(operation, figure))?;
            if setting != Setting::Nothing
                && let Some(ratio) = table.ratio(operation, setting, Setting::Nothing)
            {
                write!(text, " ({ratio:.2})")?;
            }
            text.push_str(" |");
        }
        text.push('\n');
    }
    text.push_str(
        "\n\"empty programs\": programs that say yes on the hooks that the sensor uses. \"address filter\": \
         what systemd's `IPAddressDeny=any`, `IPAddressAllow=localhost` does with each packet. \"nftables\": \
         `socket cgroupv2` with sets of allowed addresses, in and out. The sensor judges by the profile's \
         CIDR and port rules.\n",
    );
    text.push_str("\n## Budgets\n\n| what | budget | measured | |\n|---|---|---|---|\n");
    for Budget { what, limit, measure } in BUDGETS {
        if let Some((measured, ok)) = measure(&table) {
            writeln!(text, "| {what} | {limit} | {measured} | {} |", said(ok))?;
        }
    }
    if programs.is_empty() {
        return Ok(text);
    }
    write!(text, "\n{PROGRAMS}")?;
    text.push_str(
        "\nInstructions that the verifier walked at load; mean time of a run under the load \
         above (labelled), the kernel's own price of counting included.\n\n\
         | program | verified instructions | runs | ns a run |\n|---|---|---|---|\n",
    );
    for cost in programs {
        let verified = cost.verified.map_or_else(|| "?".to_owned(), |n| n.to_string());
        let mean = cost.nanoseconds.checked_div(cost.runs).map_or_else(|| "–".to_owned(), |n| n.to_string());
        writeln!(text, "| {} | {verified} | {} | {mean} |", cost.name, cost.runs)?;
    }
    Ok(text)
}

const SCALE: &str = "## At scale\n";
const PROGRAMS: &str = "## Programs\n";

/// The report with this section in place of the one it has, or before the
/// programs.
pub(crate) fn with_scale(text: &str, rows: &[scale::Row]) -> Result<String> {
    let programs = text.find(PROGRAMS).unwrap_or(text.len());
    let (before, after) = text.split_at(programs);
    let before = &before[..before.find(SCALE).unwrap_or(before.len())];
    let mut text = format!(
        "{}\n\n{SCALE}\n{}; each measured once. \"made\" are records in the kernel's rings, \"stored\" is on \
         disk (fdatasync), and what makes the load runs on the same CPUs.\n\n",
        before.trim_end(),
        machine()?
    );
    table(&mut text, rows)?;
    if !after.is_empty() {
        write!(text, "\n{after}")?;
    }
    Ok(text)
}

/// Limits, and what was measured.
pub(crate) fn table(text: &mut String, rows: &[scale::Row]) -> Result<()> {
    text.push_str("| what | budget | measured | |\n|---|---|---|---|\n");
    for scale::Row { what, limit, measured, ok } in rows {
        writeln!(text, "| {what} | {limit} | {measured} | {} |", said(*ok))?;
    }
    Ok(())
}

/// Prints a section, and puts it under its heading in docs/figures.md.
pub(crate) fn publish(heading: &str, section: &str, print_only: bool) -> Result<()> {
    println!("{section}");
    if !print_only {
        let path = workspace::root().join("docs/figures.md");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        fs::write(&path, with_section(&text, heading, section))
            .with_context(|| format!("cannot write {}", path.display()))?;
        say(format!("wrote {}", path.display()));
    }
    Ok(())
}

/// The report with the section under this heading in place of the one it has, or
/// at its end.
fn with_section(text: &str, heading: &str, section: &str) -> String {
    let (before, after) = match text.find(heading) {
        None => (text, ""),
        Some(at) => {
            let rest = &text[at + heading.len()..];
            (&text[..at], rest.find("\n## ").map_or("", |next| &rest[next + 1..]))
        }
    };
    let section = format!("{}\n\n{heading}\n{}\n", before.trim_end(), section.trim());
    if after.is_empty() { section } else { format!("{section}\n{after}") }
}

const fn said(ok: bool) -> &'static str {
    if ok { "ok" } else { "**missed**" }
}

const fn title(operation: Operation) -> &'static str {
    match operation {
        Operation::Names => "names",
        Operation::Stdio => "stdio",
        Operation::Feed => "feed",
        Operation::TcpConnect => "TCP connect(), loopback",
        Operation::UdpConnect => "UDP connect()",
        Operation::UdpSendto => "UDP sendto(), loopback",
        Operation::TcpThroughput => "TCP throughput, loopback",
        Operation::ForkExec => "fork+exec+wait",
        Operation::Scale => "scale",
    }
}

fn shown(operation: Operation, figure: f64) -> String {
    match operation {
        Operation::TcpThroughput => format!("{:.2} GB/s", figure / 1e9),
        _ if figure < 10_000.0 => format!("{figure:.0} ns"),
        _ => format!("{:.1} µs", figure / 1000.0),
    }
}

/// The kernel and the CPUs of this machine.
pub(crate) fn machine() -> Result<String> {
    let kernel = step::output(std::process::Command::new("uname").args(["-sr"]))?;
    let cpus = std::thread::available_parallelism()?;
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("unknown CPU", |rest| rest.trim_start_matches(['\t', ' ', ':']));
    Ok(format!("{kernel}, {} ({cpus} CPUs)", model.trim()))
}

pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_pair_figures_of_the_same_round() {
        let mut figures = Figures::new();
        figures.insert((Operation::TcpConnect, Setting::Nothing), vec![100.0, 200.0, 400.0]);
        figures.insert((Operation::TcpConnect, Setting::Unlabelled), vec![110.0, 202.0, 404.0]);
        let table = Table { figures: &figures, starts: &[] };
        let (text, ok) = table.more(Operation::TcpConnect, Setting::Unlabelled, 0.03).unwrap();
        assert_eq!((text.as_str(), ok), ("+1.0 %", true));
    }

    #[test]
    fn a_missed_budget_is_said() {
        let mut figures = Figures::new();
        figures.insert((Operation::TcpThroughput, Setting::Nothing), vec![10e9]);
        figures.insert((Operation::TcpThroughput, Setting::Labelled), vec![9e9]);
        for setting in Setting::ALL {
            figures.entry((Operation::TcpThroughput, setting)).or_insert_with(|| vec![10e9]);
        }
        let text = write(&figures, &[1.5], &[], 1).unwrap();
        assert!(text.contains("| ≥ 95 % | 90.0 % | **missed** |"), "{text}");
        assert!(text.contains("| < 1 s | 1.50 s | **missed** |"), "{text}");
    }

    #[test]
    fn figures_at_scale_replace_those_before_and_nothing_else() {
        let row =
            |measured: &str| scale::Row { what: "w", limit: "l", measured: measured.to_owned(), ok: true };
        let text = "# Figures\n\n## Budgets\n\n| b |\n\n## Programs\n\n| p |\n";
        let once = with_scale(text, &[row("first")]).unwrap();
        let twice = with_scale(&once, &[row("second")]).unwrap();
        assert_eq!(twice, with_scale(text, &[row("second")]).unwrap());
        assert!(twice.starts_with("# Figures\n\n## Budgets\n\n| b |\n\n## At scale\n"), "{twice}");
        assert!(twice.ends_with("| w | l | second | ok |\n\n## Programs\n\n| p |\n"), "{twice}");
    }

    #[test]
    fn the_section_is_replaced_and_nothing_else() {
        const HEADING: &str = "## Names\n";
        let text = "# Figures\n\n| a |\n\n## Programs\n\n| p |\n";
        let once = with_section(text, HEADING, "first\n");
        assert_eq!(once, format!("{text}\n{HEADING}\nfirst\n"));
        assert_eq!(with_section(&once, HEADING, "second"), format!("{text}\n{HEADING}\nsecond\n"));
        let between = format!("# Figures\n\n{HEADING}\nold\n\n## Programs\n\n| p |\n");
        assert_eq!(
            with_section(&between, HEADING, "new"),
            format!("# Figures\n\n{HEADING}\nnew\n\n## Programs\n\n| p |\n")
        );
    }
}
