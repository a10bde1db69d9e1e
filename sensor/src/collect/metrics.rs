//! What `collect --metrics` shows.

use super::query::Service;
use crate::event::pb;
use crate::health::{Health, State};
use crate::metrics::gauge::{Family, flag, number};
use crate::metrics::{Page, families_text};
use prometheus_client::registry::Unit;
use std::sync::Arc;

/// Of one collector.
pub(super) struct Metrics {
    pub events: Service,
    pub health: Health,
}

impl Page for Metrics {
    fn scrape(self: Arc<Self>) -> String {
        families_text(families(&self.events.overview(&[]), &self.health.borrow()))
    }

    fn health(&self) -> State {
        self.health.borrow().clone()
    }
}

fn families(fleet: &pb::FleetResponse, health: &State) -> Vec<Family> {
    let count =
        |is: fn(&pb::FleetSensor) -> bool| number(fleet.sensors.iter().filter(|s| is(s)).count() as u64);
    let log = fleet.log.unwrap_or_default();
    let refused = fleet.policies.iter().filter(|p| !p.error.is_empty()).count() as u64;
    let refusing = |s: &pb::FleetSensor| s.bundle.as_ref().is_some_and(|b| !b.kind.is_empty());
    let mut lag = Family::gauge("mcp_sensor_collector_output_lag", "Events that wait for an output");
    let mut lost = Family::counter(
        "mcp_sensor_collector_output_lost",
        "Events that were gone before an output took them",
    );
    for output in &fleet.outputs {
        lag = lag.with(vec![("output", output.name.clone())], number(output.lag));
        lost = lost.with(vec![("output", output.name.clone())], number(output.lost));
    }
    vec![
        Family::gauge("mcp_sensor_collector_ready", "Whether the log takes events")
            .is(flag(health.is_ready())),
        Family::gauge("mcp_sensor_collector_sensors", "Sensors, by whether they are connected")
            .with(vec![("connected", "true".to_owned())], count(|s| s.connected))
            .with(vec![("connected", "false".to_owned())], count(|s| !s.connected)),
        Family::gauge(
            "mcp_sensor_collector_sensors_refusing_policy",
            "Sensors that refused the policy they were given",
        )
        .is(count(refusing)),
        Family::gauge(
            "mcp_sensor_collector_policies_refused",
            "Files of --policies that are no policy bundle",
        )
        .is(number(refused)),
        Family::gauge("mcp_sensor_collector_log", "What the log holds")
            .unit(Unit::Bytes)
            .is(number(log.bytes)),
        Family::counter("mcp_sensor_collector_events", "Events that were stored").is(number(log.next)),
        lag,
        lost,
    ]
}

#[cfg(test)]
pub(crate) fn of_nothing() -> String {
    families_text(families(&pb::FleetResponse::default(), &State::default()))
}
