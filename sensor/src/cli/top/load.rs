//! What each server did, from its events.

use crate::event::{Body, Event, decision, exchange, is_denial, pb, server};
use std::collections::{BTreeMap, VecDeque};

/// Servers that are kept apart; a policy declares fewer.
const MAX_SERVERS: usize = 4096;
/// Response times of one server, and how long one counts (nanoseconds).
const MAX_TIMES: usize = 1000;
const TIMES_LAST: i64 = 60_000_000_000;

/// One line of `top`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    pub server: String,
    pub mode: pb::Mode,
    pub instances: usize,
    /// Calls of tools, in this round.
    pub calls_per_second: f64,
    /// Of messages both ways, in this round.
    pub bytes_per_second: f64,
    /// Since the first round.
    pub calls: u64,
    pub errors: u64,
    pub denied: u64,
    /// Of calls that ended within the last minute.
    pub p50_ms: Option<f64>,
    pub p99_ms: Option<f64>,
}

#[derive(Debug, Default)]
pub(super) struct Loads {
    servers: BTreeMap<String, Load>,
    lost: u64,
}

#[derive(Debug, Default)]
struct Load {
    calls: u64,
    errors: u64,
    denied: u64,
    round_calls: u64,
    round_bytes: u64,
    /// When a call ended, and what it took: both nanoseconds.
    times: VecDeque<(i64, u64)>,
}

impl Loads {
    pub(super) fn event(&mut self, event: &Event) {
        let Some(body) = &event.body else { return };
        if let Body::Loss(loss) = body {
            self.lost += loss.count;
            return;
        }
        let name = server(body);
        if !self.servers.contains_key(name) {
            if self.servers.len() >= MAX_SERVERS {
                self.lost += 1;
                return;
            }
            self.servers.insert(name.to_owned(), Load::default());
        }
        let Some(load) = self.servers.get_mut(name) else { return };
        if let Some(decision) = decision(body).filter(|_| is_denial(body)) {
            load.denied += decision.count.max(1);
        }
        let Some(e) = exchange(body) else { return };
        load.round_bytes += e.request_bytes + e.response_bytes;
        if matches!(body, Body::ToolCall(_)) {
            load.calls += 1;
            load.round_calls += 1;
            let failed = matches!(
                e.outcome(),
                pb::Outcome::ToolError | pb::Outcome::RpcError | pb::Outcome::NoResponse
            );
            load.errors += u64::from(failed);
            if e.outcome() != pb::Outcome::NoResponse {
                load.times.push_back((event.time_unix_ns, e.duration_ns));
            }
            if load.times.len() > MAX_TIMES {
                load.times.pop_front();
            }
        }
    }

    /// Events that were not counted since the first round.
    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    /// Ends a round of so many seconds; the busiest first.
    pub(super) fn round(&mut self, declared: &[pb::Server], seconds: f64, now: i64) -> Vec<Row> {
        let mut rows: Vec<Row> = Vec::new();
        let per_second = |n: u64| if seconds > 0.0 { n as f64 / seconds } else { 0.0 };
        for s in declared {
            self.servers.entry(s.name.clone()).or_default();
        }
        for (name, load) in &mut self.servers {
            let known = declared.iter().find(|s| s.name == *name);
            while load.times.front().is_some_and(|(ended, _)| now.saturating_sub(*ended) > TIMES_LAST) {
                load.times.pop_front();
            }
            let mut times: Vec<u64> = load.times.iter().map(|(_, ns)| *ns).collect();
            times.sort_unstable();
            rows.push(Row {
                server: name.clone(),
                mode: known.map_or(pb::Mode::Unspecified, pb::Server::mode),
                instances: known.map_or(0, |s| s.instances.len()),
                calls_per_second: per_second(std::mem::take(&mut load.round_calls)),
                bytes_per_second: per_second(std::mem::take(&mut load.round_bytes)),
                calls: load.calls,
                errors: load.errors,
                denied: load.denied,
                p50_ms: quantile(&times, 50),
                p99_ms: quantile(&times, 99),
            });
        }
        rows.retain(|row| row.instances > 0 || row.calls > 0 || row.denied > 0);
        rows.sort_by(|a, b| {
            let busy = |row: &Row| (row.calls_per_second, row.bytes_per_second);
            let order = busy(b).partial_cmp(&busy(a)).unwrap_or(std::cmp::Ordering::Equal);
            order.then(b.denied.cmp(&a.denied)).then_with(|| a.server.cmp(&b.server))
        });
        rows
    }
}

/// The nearest rank, in milliseconds; `times` are sorted nanoseconds.
fn quantile(times: &[u64], percent: usize) -> Option<f64> {
    let rank = (times.len() * percent).div_ceil(100).max(1);
    times.get(rank - 1).map(|ns| *ns as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    fn call(server: &str, outcome: pb::Outcome, ms: u64, at: i64) -> Event {
        let exchange = pb::Exchange {
            actor: Some(pb::Actor { server: server.to_owned(), ..Default::default() }),
            request_bytes: 100,
            response_bytes: 900,
            duration_ns: ms * 1_000_000,
            outcome: outcome.into(),
            ..Default::default()
        };
        let call = pb::ToolCall { exchange: Some(exchange), tool: "t".to_owned() };
        Event { time_unix_ns: at, body: Some(Body::ToolCall(Box::new(call))), ..Default::default() }
    }

    fn declared(names: &[&str]) -> Vec<pb::Server> {
        let server = |name: &&str| pb::Server {
            name: (*name).to_owned(),
            mode: pb::Mode::Enforce.into(),
            instances: vec![pb::Instance::default()],
            ..Default::default()
        };
        names.iter().map(server).collect()
    }

    #[test]
    fn rates_are_of_the_round_and_sums_of_all() {
        let mut loads = Loads::default();
        for ms in 1..=100 {
            loads.event(&call("a", pb::Outcome::Ok, ms, SECOND));
        }
        loads.event(&call("b", pb::Outcome::ToolError, 1, SECOND));
        let rows = loads.round(&declared(&["a", "b", "idle"]), 2.0, SECOND);
        let names: Vec<&str> = rows.iter().map(|r| r.server.as_str()).collect();
        assert_eq!(names, ["a", "b", "idle"]);
        let a = &rows[0];
        assert_eq!((a.calls_per_second, a.bytes_per_second, a.calls), (50.0, 50_000.0, 100));
        assert_eq!((a.p50_ms, a.p99_ms, a.mode), (Some(50.0), Some(99.0), pb::Mode::Enforce));
        assert_eq!((rows[1].errors, rows[2].calls, rows[2].p50_ms), (1, 0, None));
        let rows = loads.round(&declared(&["a"]), 1.0, 2 * SECOND);
        assert_eq!((rows[0].calls_per_second, rows[0].calls), (0.0, 100));
        let later = loads.round(&declared(&["a"]), 1.0, 100 * SECOND);
        assert_eq!(later[0].p50_ms, None, "a minute later they say nothing of now");
    }

    #[test]
    fn denials_count_with_their_repeats() {
        let mut loads = Loads::default();
        for (count, repeat) in [(0, false), (40, true)] {
            let decision =
                pb::Decision { verdict: pb::Verdict::WouldDeny.into(), count, repeat, ..Default::default() };
            let actor = pb::Actor { server: "a".to_owned(), ..Default::default() };
            let body = pb::Connection { decision: Some(decision), actor: Some(actor), ..Default::default() };
            loads.event(&Event { body: Some(Body::Connection(body)), ..Default::default() });
        }
        assert_eq!(loads.round(&[], 1.0, 0)[0].denied, 41);
    }

    #[test]
    fn what_was_not_read_is_told_and_memory_is_bounded() {
        let mut loads = Loads::default();
        let loss = pb::Loss { count: 7, ..Default::default() };
        loads.event(&Event { body: Some(Body::Loss(loss)), ..Default::default() });
        for i in 0..MAX_SERVERS + 5 {
            loads.event(&call(&i.to_string(), pb::Outcome::Ok, 1, 0));
        }
        for _ in 0..2 * MAX_TIMES {
            loads.event(&call("0", pb::Outcome::Ok, 1, 0));
        }
        assert_eq!(loads.lost(), 12);
        assert_eq!((loads.servers.len(), loads.servers["0"].times.len()), (MAX_SERVERS, MAX_TIMES));
    }

    #[test]
    fn a_quantile_is_a_time_that_was_measured() {
        assert_eq!(quantile(&[], 50), None);
        assert_eq!((quantile(&[3_000_000], 50), quantile(&[3_000_000], 99)), (Some(3.0), Some(3.0)));
        assert_eq!(quantile(&[1_000_000, 2_000_000], 50), Some(1.0));
    }
}
