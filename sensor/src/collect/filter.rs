//! Which events somebody asked for.

use crate::event::{Body, Event, decision, json, pb, server};

/// Entries of one list of a filter.
const MAX_ENTRIES: usize = 1024;

/// The default lets everything pass.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    wanted: pb::EventFilter,
}

impl Filter {
    pub(super) fn new(wanted: pb::EventFilter) -> Result<Filter, String> {
        if let Some(unknown) = wanted.types.iter().find(|t| !json::TYPES.contains(&t.as_str())) {
            return Err(format!("no event type {unknown:?}; there are {}", json::TYPES.join(", ")));
        }
        let known = |v: &i32| pb::Verdict::try_from(*v).is_ok_and(|v| v != pb::Verdict::Unspecified);
        if !wanted.verdicts.iter().all(known) {
            return Err("a verdict of the filter is unknown".to_owned());
        }
        if pb::Severity::try_from(wanted.min_severity).is_err() {
            return Err("min_severity is unknown".to_owned());
        }
        let longest = [wanted.types.len(), wanted.servers.len(), wanted.verdicts.len(), wanted.sensors.len()];
        if longest.into_iter().any(|n| n > MAX_ENTRIES) {
            return Err(format!("a list of the filter has more than {MAX_ENTRIES} entries"));
        }
        Ok(Filter { wanted })
    }

    /// It leaves nothing out.
    pub(super) fn is_empty(&self) -> bool {
        self.wanted == pb::EventFilter::default()
    }

    /// From the first, before the second.
    pub(super) fn times(&self) -> (i64, i64) {
        let w = &self.wanted;
        let since = if w.since_unix_ns == 0 { i64::MIN } else { w.since_unix_ns };
        (since, if w.until_unix_ns == 0 { i64::MAX } else { w.until_unix_ns })
    }

    pub(super) fn passes(&self, event: &Event) -> bool {
        let w = &self.wanted;
        let (since, until) = self.times();
        let there = event.time_unix_ns >= since
            && event.time_unix_ns < until
            && (w.sensors.is_empty() || w.sensors.contains(&event.sensor));
        let Some(body) = &event.body else {
            // Of a newer sensor: only who asks for nothing special gets it.
            return there && w.types.is_empty() && w.servers.is_empty() && w.verdicts.is_empty();
        };
        let low = matches!(body, Body::Finding(f) if f.severity < w.min_severity);
        !low && there
            && (w.servers.is_empty() || w.servers.iter().any(|s| s == server(body)))
            && (w.verdicts.is_empty() || decision(body).is_some_and(|d| w.verdicts.contains(&d.verdict)))
            && (w.types.is_empty() || w.types.iter().any(|t| t == json::type_name(body)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(severity: pb::Severity) -> Event {
        let finding = pb::Finding { severity: severity.into(), server: "a".to_owned(), ..Default::default() };
        Event {
            time_unix_ns: 50,
            sensor: "h".to_owned(),
            body: Some(Body::Finding(finding)),
            ..Default::default()
        }
    }

    fn denial(server: &str) -> Event {
        let actor = pb::Actor { server: server.to_owned(), ..Default::default() };
        let decision = pb::Decision { verdict: pb::Verdict::Deny.into(), ..Default::default() };
        let body = pb::Connection { actor: Some(actor), decision: Some(decision), ..Default::default() };
        Event { time_unix_ns: 60, body: Some(Body::Connection(body)), ..Default::default() }
    }

    fn passes(wanted: pb::EventFilter, event: &Event) -> bool {
        Filter::new(wanted).unwrap().passes(event)
    }

    #[test]
    fn each_part_of_a_filter_must_pass() {
        let (finding, denial) = (finding(pb::Severity::Low), denial("b"));
        let all = pb::EventFilter::default;
        let list = |s: &str| vec![s.to_owned()];
        assert!(passes(all(), &finding) && passes(all(), &denial));
        for (wanted, of_finding, of_denial) in [
            (pb::EventFilter { types: list("finding"), ..all() }, true, false),
            (pb::EventFilter { servers: list("b"), ..all() }, false, true),
            (pb::EventFilter { sensors: list("h"), ..all() }, true, false),
            (pb::EventFilter { verdicts: vec![pb::Verdict::Deny.into()], ..all() }, false, true),
            (pb::EventFilter { verdicts: vec![pb::Verdict::Allow.into()], ..all() }, false, false),
            (pb::EventFilter { since_unix_ns: 51, ..all() }, false, true),
            (pb::EventFilter { until_unix_ns: 60, ..all() }, true, false),
            (pb::EventFilter { min_severity: pb::Severity::Medium.into(), ..all() }, false, true),
            (pb::EventFilter { min_severity: pb::Severity::Low.into(), ..all() }, true, true),
        ] {
            let got = (passes(wanted.clone(), &finding), passes(wanted.clone(), &denial));
            assert_eq!(got, (of_finding, of_denial), "{wanted:?}");
        }
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let all = pb::EventFilter::default;
        assert!(Filter::new(pb::EventFilter { types: vec!["nonsense".to_owned()], ..all() }).is_err());
        assert!(Filter::new(pb::EventFilter { verdicts: vec![99], ..all() }).is_err());
        assert!(Filter::new(pb::EventFilter { min_severity: 99, ..all() }).is_err());
        assert!(Filter::new(pb::EventFilter { sensors: vec![String::new(); 2000], ..all() }).is_err());
    }
}
