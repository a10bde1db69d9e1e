//! Numbers about the collector, for Prometheus (`collect --metrics`): what came
//! in, what is kept, and how each output does.

use super::fleet::SharedFleet;
use super::log::Source;
use super::output::Progress;
use super::policies::Policies;
use crate::event::pb;
use crate::health::{Health, State};
use crate::metrics::{Page, open_metrics};
use crate::tls::Tls;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use std::fmt;
use std::sync::Arc;

/// Sensors that have a series of their own: those known for longest.
const MAX_SENSORS: usize = 2000;

/// Of one collector.
pub(super) struct Metrics {
    pub kept: Option<Kept>,
    pub fleet: SharedFleet,
    pub policies: Policies,
    pub health: Health,
    /// Whose certificate's end is told.
    pub tls: Option<Arc<Tls>>,
}

/// Its log, and what hands on from there.
#[derive(Clone)]
pub(super) struct Kept {
    pub source: Source,
    pub outputs: Vec<Progress>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Page for Metrics {
    fn scrape(self: Arc<Self>) -> String {
        open_metrics(Box::new(Scrape(self)))
    }

    fn health(&self) -> State {
        self.health.borrow().clone()
    }
}

#[derive(Debug)]
struct Scrape(Arc<Metrics>);

/// A family of series with the prefix of the collector.
struct Family<'a> {
    name: &'static str,
    help: &'static str,
    unit: Option<&'a Unit>,
}

type Label = [(&'static str, String); 1];

fn family<'a>(name: &'static str, help: &'static str, unit: Option<&'a Unit>) -> Family<'a> {
    Family { name, help, unit }
}

impl Family<'_> {
    fn one(&self, to: &mut DescriptorEncoder<'_>, metric: &impl EncodeMetric) -> fmt::Result {
        let kind = metric.metric_type();
        let name = format!("mcp_sensor_collector_{}", self.name);
        metric.encode(to.encode_descriptor(&name, self.help, self.unit, kind)?)
    }

    /// One for each; a family without any is left out.
    fn each<L: EncodeLabelSet, M: EncodeMetric>(
        &self,
        to: &mut DescriptorEncoder<'_>,
        kind: MetricType,
        series: impl IntoIterator<Item = (L, M)>,
    ) -> fmt::Result {
        let mut series = series.into_iter().peekable();
        if series.peek().is_none() {
            return Ok(());
        }
        let name = format!("mcp_sensor_collector_{}", self.name);
        let mut family = to.encode_descriptor(&name, self.help, self.unit, kind)?;
        for (labels, metric) in series {
            metric.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

fn seconds(unix_ns: i64) -> ConstGauge<f64> {
    ConstGauge::new(unix_ns as f64 / 1e9)
}

fn gauge(value: u64) -> ConstGauge<i64> {
    ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX))
}

impl Collector for Scrape {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        let to = &mut to;
        let Metrics { kept, fleet, policies, health, tls } = &*self.0;
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        family("build", "Which collector this is", None).info(to, &version)?;
        if let Some(tls) = tls {
            let end = ConstGauge::new(tls.state().certificate.not_after);
            let help = "When the collector's certificate ends";
            family("certificate_expiry_timestamp", help, Some(&Unit::Seconds)).one(to, &end)?;
        }
        let ready = health.borrow().is_ready();
        family("ready", "Whether it takes events", None).one(to, &gauge(ready.into()))?;
        let refused = policies.list().iter().filter(|p| !p.error.is_empty()).count();
        family("policies_refused", "Files of --policies that are no policy bundle", None)
            .one(to, &gauge(refused as u64))?;
        let refusing = fleet.with(|fleet| fleet.refusing());
        let help = "Sensors that refused the policy they were given";
        family("sensors_refusing_policy", help, None).one(to, &gauge(refusing as u64))?;
        if let Some(kept) = kept {
            encode_log(&kept.source, to)?;
        }
        let sensors = fleet.with(|fleet| fleet.summary(MAX_SENSORS));
        family("sensors", "Sensors that are known", None).one(to, &gauge(sensors.known as u64))?;
        family("sensors_connected", "Sensors with a stream", None)
            .one(to, &gauge(sensors.connected as u64))?;
        family("sensors_unlisted", "Sensors without a series of their own", None)
            .one(to, &gauge((sensors.known - sensors.newest.len()) as u64))?;
        let heard = sensors.newest.into_iter().filter(|(_, newest)| *newest > 0);
        family("sensor_last_event_timestamp", "Time of a sensor's newest event", Some(&Unit::Seconds)).each(
            to,
            MetricType::Gauge,
            heard.map(|(sensor, newest)| ([("sensor", sensor)], seconds(newest))),
        )?;
        let outputs: Vec<&Progress> = kept.iter().flat_map(|kept| &kept.outputs).collect();
        let states: Vec<pb::OutputState> = outputs.iter().map(|o| o.state()).collect();
        encode_outputs(&states, to)?;
        let ends = outputs.iter().zip(&states).filter_map(|(output, state)| {
            Some(([("output", state.name.clone())], ConstGauge::new(output.certificate_end()?)))
        });
        let help = "When an output's own certificate ends";
        family("output_certificate_expiry_timestamp", help, Some(&Unit::Seconds)).each(
            to,
            MetricType::Gauge,
            ends,
        )
    }
}

impl Family<'_> {
    fn info(&self, to: &mut DescriptorEncoder<'_>, labels: &impl EncodeLabelSet) -> fmt::Result {
        let name = format!("mcp_sensor_collector_{}", self.name);
        to.encode_descriptor(&name, self.help, None, MetricType::Info)?.encode_info(labels)
    }
}

fn encode_log(source: &Source, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let log = source.describe();
    family("events_stored", "Events that this log ever stored", None)
        .one(to, &ConstCounter::new(log.next))?;
    family("log", "Of the log on the disk", Some(&Unit::Bytes)).one(to, &gauge(log.bytes))?;
    if log.oldest_unix_ns > 0 {
        family("log_oldest_timestamp", "When the oldest event was stored", Some(&Unit::Seconds))
            .one(to, &seconds(log.oldest_unix_ns))?;
    }
    Ok(())
}

fn encode_outputs(states: &[pb::OutputState], to: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let label = |s: &pb::OutputState| -> Label { [("output", s.name.clone())] };
    let delivered = states.iter().map(|s| (label(s), ConstCounter::new(s.delivered)));
    let help = "Events that an output took, again included";
    family("output_delivered_events", help, None).each(to, MetricType::Counter, delivered)?;
    let retries = states.iter().map(|s| (label(s), ConstCounter::new(s.retries)));
    let help = "How often an output was tried again";
    family("output_retries", help, None).each(to, MetricType::Counter, retries)?;
    let lost = states.iter().flat_map(|s| {
        let mut reasons: Vec<_> = s.lost_by_reason.iter().collect();
        reasons.sort();
        let of = |(reason, count): (&String, &u64)| {
            ([("output", s.name.clone()), ("reason", reason.clone())], ConstCounter::new(*count))
        };
        reasons.into_iter().map(of).collect::<Vec<_>>()
    });
    let help = "Events that an output does not get";
    family("output_lost_events", help, None).each(to, MetricType::Counter, lost)?;
    let lag = states.iter().map(|s| (label(s), gauge(s.lag)));
    let help = "Events of the log that an output has not come to";
    family("output_lag_events", help, None).each(to, MetricType::Gauge, lag)?;
    let fails = states.iter().map(|s| (label(s), gauge(u64::from(!s.error.is_empty()))));
    family("output_failing", "1: an output takes nothing", None).each(to, MetricType::Gauge, fails)?;
    let delivered = states.iter().filter(|s| s.delivered_unix_ns > 0);
    let delivered = delivered.map(|s| (label(s), seconds(s.delivered_unix_ns)));
    let help = "When an output last took events";
    family("output_last_delivery_timestamp", help, Some(&Unit::Seconds)).each(
        to,
        MetricType::Gauge,
        delivered,
    )
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::collect::Origin;
    use crate::collect::log::{Log, Settings};
    use crate::event::{Event, now};
    use crate::tls::{Authority, Subject, Validity};
    use std::time::Duration;

    /// With a value for each metric that there is.
    pub(crate) fn every_metric() -> String {
        let dir = tempfile::tempdir().unwrap();
        let keep = Settings { keep_bytes: 1 << 20, keep: Duration::ZERO };
        let mut log = Log::open(dir.path(), keep).unwrap();
        let origin = Arc::new(Origin { sensor: "web-1".to_owned(), boot: "b".to_owned() });
        let event = Event { seq: 1, time_unix_ns: 1_500_000_000, ..Default::default() };
        log.append(&origin, &[event]).unwrap();
        log.commit().unwrap();
        let certificate = dir.path().join("siem.pem");
        let days = Validity::days(1).unwrap();
        let pair = Authority::create(days).unwrap().issue(&Subject::Reader("siem".to_owned()), days).unwrap();
        std::fs::write(&certificate, pair.certificate).unwrap();
        let progress = Progress::new("siem", "syslog", Some(certificate));
        progress.lost(3, "refused");
        progress.update(|s| {
            (s.delivered, s.lag, s.retries, s.delivered_unix_ns) = (9, 4, 2, 2_000_000_000);
            s.error = "down".to_owned();
        });
        let metrics = Metrics {
            kept: Some(Kept { source: log.source(), outputs: vec![progress] }),
            fleet: log.fleet(),
            policies: Policies::default(),
            health: crate::health::always(State::default()),
            tls: Some(crate::tls::tests::sensor("s")),
        };
        Arc::new(metrics).scrape()
    }

    #[test]
    fn the_end_of_an_outputs_own_certificate_is_told() {
        let text = every_metric();
        let name = "mcp_sensor_collector_output_certificate_expiry_timestamp_seconds{output=\"siem\"} ";
        let end: i64 = text.lines().find_map(|l| l.strip_prefix(name)).expect(&text).parse().unwrap();
        let left = end - now() / 1_000_000_000;
        assert!((86_000..=86_400).contains(&left), "{left}");
        let none = Progress::new("siem", "syslog", Some("/nowhere".into()));
        assert_eq!((none.certificate_end(), Progress::new("a", "b", None).certificate_end()), (None, None));
    }

    #[test]
    fn the_collector_says_how_it_and_each_output_does() {
        let text = every_metric();
        for line in [
            concat!("mcp_sensor_collector_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
            "mcp_sensor_collector_ready 1",
            "mcp_sensor_collector_policies_refused 0",
            "mcp_sensor_collector_sensors_refusing_policy 0",
            "mcp_sensor_collector_events_stored_total 1",
            "mcp_sensor_collector_sensors 1",
            "mcp_sensor_collector_sensors_connected 0",
            "mcp_sensor_collector_sensor_last_event_timestamp_seconds{sensor=\"web-1\"} 1.5",
            "mcp_sensor_collector_output_delivered_events_total{output=\"siem\"} 9",
            "mcp_sensor_collector_output_lost_events_total{output=\"siem\",reason=\"refused\"} 3",
            "mcp_sensor_collector_output_lag_events{output=\"siem\"} 4",
            "mcp_sensor_collector_output_failing{output=\"siem\"} 1",
            "mcp_sensor_collector_output_retries_total{output=\"siem\"} 2",
            "mcp_sensor_collector_output_last_delivery_timestamp_seconds{output=\"siem\"} 2.0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
    }
}
