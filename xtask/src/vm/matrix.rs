//! What each kernel said, as one table: claims down, kernels across.

use std::fmt;

use serde::Serialize;

use super::kernels::Expected;
use crate::tally::Tally;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    Ok,
    Failed,
    /// The kernel has not what it takes.
    Blank,
}

/// One boot.
#[derive(Debug, Serialize)]
pub(crate) struct Column {
    pub(crate) series: &'static str,
    /// As the kernel says; empty if it never came so far.
    pub(crate) release: String,
    pub(crate) seconds: u64,
    pub(crate) claims: Vec<(String, Outcome)>,
    /// Panics, warnings, hangs, claims that are missing.
    pub(crate) trouble: Vec<String>,
}

/// Lines by which a kernel complains.
const TROUBLE: &[&str] = &["Kernel panic", "BUG:", "WARNING: CPU", "Oops", "rcu_sched self-detected"];

impl Column {
    /// Reads what a machine said. A claim that was not made is as bad as one
    /// that failed, and so is a kernel that complains.
    pub(crate) fn read(series: &'static str, expected: Expected, claims: usize, log: &str) -> Column {
        let mut column =
            Column { series, release: String::new(), seconds: 0, claims: Vec::new(), trouble: Vec::new() };
        for line in log.lines().map(str::trim_end).filter_map(|line| line.strip_prefix("VM ")) {
            if let Some(release) = line.strip_prefix("kernel ") {
                release.clone_into(&mut column.release);
                continue;
            }
            let Some((claim, outcome)) = line.rsplit_once(' ') else { continue };
            let outcome = match outcome {
                "ok" => Outcome::Ok,
                "failed" => Outcome::Failed,
                "blank" if expected == Expected::All => Outcome::Failed,
                "blank" => Outcome::Blank,
                _ => continue,
            };
            column.claims.push((claim.to_owned(), outcome));
        }
        column.trouble = log
            .lines()
            .filter(|line| TROUBLE.iter().any(|trouble| line.contains(trouble)))
            .map(|line| line.trim_end().to_owned())
            .collect();
        let made = column.claims.len();
        match expected {
            Expected::All if made < claims => {
                column.trouble.push(format!("{} claims not made", claims - made));
            }
            Expected::Refusal if made == 0 => column.trouble.push("no claim made".to_owned()),
            _ => {}
        }
        column
    }

    fn outcome(&self, claim: &str) -> Outcome {
        self.claims.iter().find(|(name, _)| name == claim).map_or(Outcome::Blank, |(_, outcome)| *outcome)
    }

    pub(crate) fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        for (_, outcome) in &self.claims {
            match outcome {
                Outcome::Ok => tally.count(true),
                Outcome::Failed => tally.count(false),
                Outcome::Blank => {}
            }
        }
        self.trouble.iter().for_each(|_| tally.count(false));
        tally
    }
}

#[derive(Debug, Default, Serialize)]
pub(crate) struct Matrix {
    pub(crate) kernels: Vec<Column>,
}

impl Matrix {
    pub(crate) fn tally(&self) -> Tally {
        let mut sum = Tally::default();
        self.kernels.iter().for_each(|column| sum.add(column.tally()));
        sum
    }

    /// In the order in which they were first made.
    fn claims(&self) -> Vec<&str> {
        let mut claims: Vec<&str> = Vec::new();
        for (claim, _) in self.kernels.iter().rev().flat_map(|column| &column.claims) {
            if !claims.contains(&claim.as_str()) {
                claims.push(claim);
            }
        }
        claims
    }
}

impl fmt::Display for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const CELL: usize = 10;
        let claims = self.claims();
        let width = claims.iter().map(|claim| claim.len()).max().unwrap_or(0).max("seconds".len());
        let row = |f: &mut fmt::Formatter<'_>, name: &str, cells: Vec<&str>| {
            write!(f, "{name:width$}")?;
            cells.iter().try_for_each(|cell| write!(f, " {cell:>CELL$}"))?;
            writeln!(f)
        };
        row(f, "", self.kernels.iter().map(|k| k.series).collect())?;
        let releases = self.kernels.iter().map(|k| k.release.split('-').next().unwrap_or("")).collect();
        row(f, "", releases)?;
        for claim in claims {
            let cell = |column: &Column| match column.outcome(claim) {
                Outcome::Ok => "ok",
                Outcome::Failed => "FAILED",
                Outcome::Blank => "-",
            };
            row(f, claim, self.kernels.iter().map(cell).collect())?;
        }
        let seconds: Vec<_> = self.kernels.iter().map(|k| k.seconds.to_string()).collect();
        row(f, "seconds", seconds.iter().map(String::as_str).collect())?;
        for column in &self.kernels {
            for trouble in &column.trouble {
                writeln!(f, "{}: {trouble}", column.series)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(claims: usize, log: &str) -> (u64, u64) {
        let tally = Column::read("6.1", Expected::All, claims, log).tally();
        (tally.passed, tally.failed)
    }

    #[test]
    fn a_machine_that_says_nothing_fails() {
        assert_eq!(all(25, ""), (0, 1));
        assert_eq!(Column::read("5.10", Expected::Refusal, 25, "").tally().failed, 1);
    }

    #[test]
    fn a_kernel_panic_is_a_failure_beside_good_claims() {
        let log = "VM kernel 6.1.0-1-cloud-amd64\r\nVM one ok\r\nVM two ok\r\n";
        assert_eq!(all(2, log), (2, 0));
        assert_eq!(all(2, &format!("{log}[ 1.0] Kernel panic - not syncing\n")), (2, 1));
        assert_eq!(all(3, log), (2, 1));
    }

    #[test]
    fn a_blank_is_honest_only_where_it_is_expected() {
        let log = "VM kernel 5.10\nVM one ok\nVM two blank\n";
        assert_eq!(all(2, log), (1, 1));
        let old = Column::read("5.10", Expected::Refusal, 2, log);
        assert_eq!((old.tally().passed, old.tally().failed), (1, 0));
        let matrix = Matrix { kernels: vec![old] };
        let row = |name: &str| matrix.to_string().lines().find(|l| l.starts_with(name)).map(str::to_owned);
        assert!(row("two").is_some_and(|row| row.ends_with(" -")), "{matrix}");
    }
}
