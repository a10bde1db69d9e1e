//! Sums by labels, bounded.

use super::{MAX_SERIES, OTHER};
use std::collections::BTreeMap;

/// Of durations, seconds: OpenTelemetry's for MCP.
pub(super) const BOUNDS: [f64; 14] =
    [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];

/// Units as OpenTelemetry writes them (UCUM).
pub(super) const BYTES: &str = "By";
pub(super) const SECONDS: &str = "s";

/// The values of a metric's labels, in their order; empty: not there.
type Values = Vec<String>;

#[derive(Debug)]
pub(super) struct Counter {
    /// As OpenTelemetry writes it; so are the labels.
    pub name: &'static str,
    pub unit: &'static str,
    pub help: &'static str,
    pub labels: &'static [&'static str],
    pub series: BTreeMap<Values, u64>,
}

#[derive(Debug)]
pub(super) struct Histogram {
    pub name: &'static str,
    pub help: &'static str,
    pub labels: &'static [&'static str],
    pub series: BTreeMap<Values, Distribution>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Distribution {
    /// One for each of [`BOUNDS`], inclusive, and one beyond.
    pub counts: [u64; BOUNDS.len() + 1],
    pub seconds: f64,
}

impl Distribution {
    pub(super) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

impl Counter {
    pub(super) fn new(
        name: &'static str,
        unit: &'static str,
        help: &'static str,
        labels: &'static [&'static str],
    ) -> Counter {
        Counter { name, unit, help, labels, series: BTreeMap::new() }
    }

    /// False: there are too many series, and it counts as `other`.
    pub(super) fn add(&mut self, values: &[&str], by: u64) -> bool {
        let (sum, fits) = entry(&mut self.series, self.labels, values);
        *sum = sum.saturating_add(by);
        fits
    }
}

impl Histogram {
    pub(super) fn new(name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Histogram {
        Histogram { name, help, labels, series: BTreeMap::new() }
    }

    /// As [`Counter::add`].
    pub(super) fn observe(&mut self, values: &[&str], ns: u64) -> bool {
        let (distribution, fits) = entry(&mut self.series, self.labels, values);
        let seconds = ns as f64 / 1e9;
        distribution.counts[BOUNDS.partition_point(|bound| *bound < seconds)] += 1;
        distribution.seconds += seconds;
        fits
    }
}

fn entry<'a, T: Default>(
    series: &'a mut BTreeMap<Values, T>,
    labels: &[&str],
    values: &[&str],
) -> (&'a mut T, bool) {
    debug_assert_eq!(labels.len(), values.len());
    let mut key: Values = values.iter().map(|v| (*v).to_owned()).collect();
    let fits = series.len() < MAX_SERIES || series.contains_key(&key);
    if !fits {
        key = vec![OTHER.to_owned(); labels.len()];
    }
    (series.entry(key).or_default(), fits)
}

/// Labels with their values, without those that are not there.
pub(super) fn present<'a>(
    labels: &'static [&'static str],
    values: &'a [String],
) -> impl Iterator<Item = (&'static str, &'a str)> {
    labels.iter().zip(values).filter(|(_, v)| !v.is_empty()).map(|(k, v)| (*k, v.as_str()))
}
