//! What is so at the moment of a scrape, beside the sums that events make.

use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;
use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Gauge,
    Counter,
}

/// One metric with its series.
#[derive(Clone, Debug)]
pub struct Family {
    /// As Prometheus has it, without unit and `_total`.
    pub name: &'static str,
    pub help: &'static str,
    pub unit: Option<Unit>,
    pub kind: Kind,
    pub series: Vec<(Vec<(&'static str, String)>, f64)>,
}

impl Family {
    pub fn gauge(name: &'static str, help: &'static str) -> Family {
        Family { name, help, unit: None, kind: Kind::Gauge, series: Vec::new() }
    }

    pub fn counter(name: &'static str, help: &'static str) -> Family {
        Family { kind: Kind::Counter, ..Family::gauge(name, help) }
    }

    #[must_use]
    pub fn unit(self, unit: Unit) -> Family {
        Family { unit: Some(unit), ..self }
    }

    #[must_use]
    pub fn is(self, value: f64) -> Family {
        self.with(Vec::new(), value)
    }

    #[must_use]
    pub fn with(mut self, labels: Vec<(&'static str, String)>, value: f64) -> Family {
        self.series.push((labels, value));
        self
    }

    pub(super) fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Gauge => MetricType::Gauge,
            Kind::Counter => MetricType::Counter,
        };
        let mut family = encoder.encode_descriptor(self.name, self.help, self.unit.as_ref(), kind)?;
        for (labels, value) in &self.series {
            if labels.is_empty() {
                self.encode_value(&mut family, value)?;
            } else {
                self.encode_value(&mut family.encode_family(labels)?, value)?;
            }
        }
        Ok(())
    }

    fn encode_value(&self, encoder: &mut MetricEncoder<'_>, value: &f64) -> fmt::Result {
        match self.kind {
            Kind::Gauge => encoder.encode_gauge(value),
            Kind::Counter => encoder.encode_counter::<NoLabelSet, _, u64>(value, None),
        }
    }
}

/// Exact up to 2^53, as Prometheus' own numbers are.
pub fn number(value: u64) -> f64 {
    value as f64
}

pub fn seconds(unix_ns: i64) -> f64 {
    unix_ns as f64 / 1e9
}

/// 1: yes.
pub fn flag(value: bool) -> f64 {
    f64::from(u8::from(value))
}
