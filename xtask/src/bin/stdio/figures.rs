//! Medians, percentiles, and the table of budgets.

use crate::Report;

pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// The smallest value that `share` of all are not above; not a number: no value.
pub(crate) fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(at.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

/// Nanoseconds as people read them.
pub(crate) fn shown(nanoseconds: f64) -> String {
    match nanoseconds {
        n if n < 10_000.0 => format!("{n:.0} ns"),
        n if n < 1e6 => format!("{:.1} µs", n / 1e3),
        n if n < 1e9 => format!("{:.2} ms", n / 1e6),
        n if n.is_infinite() => "never".to_owned(),
        n => format!("{:.2} s", n / 1e9),
    }
}

/// A size as people read it.
pub(crate) fn size(bytes: usize) -> String {
    match bytes {
        n if n >= 1 << 20 => format!("{} MiB", n >> 20),
        n if n >= 1 << 10 => format!("{} KiB", n >> 10),
        n => format!("{n} B"),
    }
}

#[derive(Default)]
pub(crate) struct Budgets(Vec<String>);

impl Budgets {
    pub(crate) fn add(&mut self, what: &str, limit: &str, measured: &str, ok: bool) {
        let said = if ok { "ok" } else { "**missed**" };
        self.0.push(format!("| {what} | {limit} | {measured} | {said} |\n"));
    }

    pub(crate) fn table(&self, report: &Report) -> String {
        let back_end = report.capture.as_deref().unwrap_or("the sensor's own choice");
        let mut text = format!(
            "{} interleaved rounds; figures are medians of rounds, ratios medians of paired rounds. \
             Back end: {back_end}.\n\n",
            report.rounds
        );
        if !self.0.is_empty() {
            text += "| what | budget | measured | |\n|---|---|---|---|\n";
            text += &self.0.concat();
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&values, 0.5), 50.0);
        assert_eq!(percentile(&values, 0.99), 99.0);
        assert_eq!(percentile(&[7.0], 0.99), 7.0);
        assert!(percentile(&[], 0.99).is_nan());
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(median([4.0, 1.0, 2.0, 9.0]), 3.0);
    }
}
