//! What test runners report, read from their output.

use std::fmt;

/// A line by which a test that cannot run here says so; it goes on to say why.
pub(crate) const SKIP: &str = "SKIP: ";

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
    /// Tests that said so themselves; their runner counts them as passed.
    said: u64,
    /// Why tests were skipped, one line each.
    pub(crate) reasons: Vec<String>,
}

impl Tally {
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.reasons.extend(other.reasons);
    }

    pub(crate) fn count(&mut self, passed: bool) {
        if passed { self.passed += 1 } else { self.failed += 1 }
    }

    pub(crate) fn skip(&mut self, reason: impl Into<String>) {
        self.skipped += 1;
        self.reasons.push(reason.into());
    }

    /// Moves the tests that said they were skipped to where they belong, once
    /// the runner is done: it reports after they spoke.
    pub(crate) fn close(mut self) -> Self {
        self.passed = self.passed.saturating_sub(self.said);
        self.skipped += self.said;
        self.said = 0;
        self
    }

    /// Takes in one line of a runner; `cargo test` and nextest are known.
    pub(crate) fn read(&mut self, line: &str) {
        if let Some(counts) = line.strip_prefix("test result: ") {
            let counts = counts.split_once(". ").map_or("", |(_, counts)| counts);
            for (number, word) in counts.split(';').filter_map(pair) {
                match word {
                    "passed" => self.passed += number,
                    "failed" => self.failed += number,
                    "ignored" => self.skipped += number,
                    _ => {}
                }
            }
        } else if let Some((_, counts)) =
            line.split_once(" tests run: ").filter(|_| line.contains("Summary ["))
        {
            let counts = counts.replace(['(', ')'], ",");
            for (number, word) in counts.split(',').filter_map(pair) {
                match word {
                    "passed" => self.passed += number,
                    "failed" | "timed" => self.failed += number,
                    "skipped" => self.skipped += number,
                    _ => {}
                }
            }
        } else if let Some(reason) = line.trim_start().strip_prefix(SKIP) {
            self.reasons.push(reason.trim().to_owned());
            self.said += 1;
        }
    }
}

fn pair(text: &str) -> Option<(u64, &str)> {
    let mut words = text.split_whitespace();
    Some((words.next()?.parse().ok()?, words.next()?))
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(lines: &[&str]) -> (u64, u64, u64) {
        let mut tally = Tally::default();
        lines.iter().for_each(|line| tally.read(line));
        let tally = tally.close();
        (tally.passed, tally.failed, tally.skipped)
    }

    #[test]
    fn libtest_lines_add_up() {
        assert_eq!(
            tally(&[
                "running 4 tests",
                "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
                "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 7 filtered out; finished in 0.00s",
            ]),
            (5, 1, 1)
        );
    }

    #[test]
    fn nextest_summary_is_read() {
        assert_eq!(
            tally(&[
                "     Summary [   0.014s] 7 tests run: 5 passed (1 slow), 1 failed, 1 timed out, 3 skipped"
            ]),
            (5, 2, 3)
        );
    }

    #[test]
    fn skip_line_moves_one_test_from_passed_to_skipped() {
        assert_eq!(
            tally(&[
                "SKIP: vsock: EAFNOSUPPORT",
                "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            ]),
            (2, 0, 1)
        );
    }
}
