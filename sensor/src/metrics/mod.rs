//! Numbers about what servers do: for Prometheus (`run --metrics`) and for an
//! OpenTelemetry collector (`run --otlp`). A reader of the bus like any other:
//! events do not wait for it, and what it missed is in `mcp_sensor.losses`.
//!
//! Names and attributes follow OpenTelemetry's semantic conventions for MCP where
//! there are any. Names that a server or client chose (tools, methods) are
//! bounded: beyond the limits they count as `other`.

pub mod gauge;
mod otlp;
pub mod present;
mod prometheus;
mod series;
#[cfg(test)]
mod tests;

pub use otlp::{Endpoint, EndpointError, export};
pub use prometheus::{Page, Server, open_metrics, parse_address};

use crate::event::json::{is_notification, outcome_name, severity_name, type_name, verdict_name};
use crate::event::{Body, Event, Subscriber, decision, exchange, is_denial, pb, server};
use crate::health::Health;
use crate::tls::Tls;
use series::{Counter, Histogram};
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// (server, tool) pairs that have a series of their own.
pub const MAX_TOOLS: usize = 2000;
/// Series of one metric.
pub const MAX_SERIES: usize = 10_000;
/// What counts as one beyond a limit.
pub const OTHER: &str = "other";
/// OpenTelemetry's word for an error that is not one of a known few.
const OTHER_ERROR: &str = "_OTHER";

/// Events taken from the bus at once.
const BATCH: usize = 1024;

/// Of requests, all eras; a method that is none of these counts as `other`.
const METHODS: [&str; 23] = [
    "completion/complete",
    "elicitation/create",
    "initialize",
    "logging/setLevel",
    "ping",
    "prompts/get",
    "prompts/list",
    "resources/list",
    "resources/read",
    "resources/subscribe",
    "resources/templates/list",
    "resources/unsubscribe",
    "roots/list",
    "sampling/createMessage",
    "server/discover",
    "subscriptions/listen",
    "tasks/cancel",
    "tasks/get",
    "tasks/list",
    "tasks/result",
    "tasks/update",
    "tools/call",
    "tools/list",
];

/// JSON-RPC 2.0 and MCP, all eras.
const ERROR_CODES: [i64; 10] =
    [-32700, -32600, -32601, -32602, -32603, -32002, -32042, -32020, -32021, -32022];

/// Share it as `Arc<Metrics>`.
pub struct Metrics {
    /// UTC, nanoseconds since 1970: when all sums began.
    started: i64,
    sums: Mutex<Sums>,
    certificate: OnceLock<Arc<Tls>>,
    health: OnceLock<Health>,
    present: OnceLock<Box<dyn Fn() -> Vec<gauge::Family> + Send + Sync>>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").field("started", &self.started).finish_non_exhaustive()
    }
}

/// When the certificate ends that this sensor shows to its collector: seconds
/// since 1970.
const CERTIFICATE: (&str, &str) =
    ("mcp_sensor.certificate.expiry_timestamp", "When the sensor's certificate ends");

#[derive(Debug)]
struct Sums {
    /// (server, tool) pairs that were seen first.
    tools: HashSet<(String, String)>,
    duration: Histogram,
    calls: Counter,
    size: Counter,
    denials: Counter,
    findings: Counter,
    drift: Counter,
    uninspected: Counter,
    events: Counter,
    losses: Counter,
    overflow: Counter,
}

impl Metrics {
    /// `started`: UTC, nanoseconds since 1970.
    pub fn new(started: i64) -> Arc<Metrics> {
        Arc::new(Metrics {
            started,
            sums: Mutex::new(Sums::new()),
            certificate: OnceLock::new(),
            health: OnceLock::new(),
            present: OnceLock::new(),
        })
    }

    /// The end of this one is told from now on. One is enough: sensors have one.
    pub fn certificate(&self, tls: Arc<Tls>) {
        let _ = self.certificate.set(tls);
    }

    /// Shown with every scrape from now on.
    pub fn present(&self, families: impl Fn() -> Vec<gauge::Family> + Send + Sync + 'static) {
        let _ = self.present.set(Box::new(families));
    }

    /// `/healthz` and `/readyz` answer by this; before, that it is starting.
    pub fn healthy(&self, health: Health) {
        let _ = self.health.set(health);
    }

    fn certificate_end(&self) -> Option<i64> {
        self.certificate.get().map(|tls| tls.state().certificate.not_after)
    }

    /// A poisoned lock only means that a thread panicked between two sums.
    fn sums(&self) -> MutexGuard<'_, Sums> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn observe(&self, body: &Body) {
        self.sums().observe(body);
    }

    /// Counts what `subscriber` gets, until the bus closes.
    pub async fn follow(self: Arc<Metrics>, mut subscriber: Subscriber) {
        let mut events: Vec<Arc<Event>> = Vec::with_capacity(BATCH);
        while subscriber.recv(&mut events, BATCH).await {
            let mut sums = self.sums();
            events.iter().filter_map(|e| e.body.as_ref()).for_each(|body| sums.observe(body));
            drop(sums);
            events.clear();
        }
    }
}

impl Sums {
    fn new() -> Sums {
        let count = Counter::new;
        Sums {
            tools: HashSet::new(),
            duration: Histogram::new(
                "mcp.server.operation.duration",
                "From the last byte of a request to the last byte of its response",
                &["server", "mcp.method.name", "gen_ai.tool.name", "error.type"],
            ),
            calls: count(
                "mcp_sensor.tool_calls",
                "{call}",
                "Calls of tools that have ended",
                &["server", "tool", "outcome"],
            ),
            size: count(
                "mcp_sensor.tool_call.size",
                series::BYTES,
                "JSON of calls of tools",
                &["server", "message"],
            ),
            denials: count(
                "mcp_sensor.denials",
                "{denial}",
                "Denials, and what would have been denied in audit",
                &["server", "verdict"],
            ),
            findings: count(
                "mcp_sensor.findings",
                "{finding}",
                "What a person should look at",
                &["server", "kind", "severity"],
            ),
            drift: count(
                "mcp_sensor.drift",
                "{change}",
                "Tools, versions and files that are not what they were",
                &["server", "what"],
            ),
            uninspected: count(
                "mcp_sensor.uninspected",
                series::BYTES,
                "What moved over wires of servers unread",
                &["server", "how"],
            ),
            events: count("mcp_sensor.events", "{event}", "Events of every type", &["type"]),
            losses: count(
                "mcp_sensor.losses",
                "{event}",
                "What was not recorded or not delivered",
                &["where", "reason"],
            ),
            overflow: count(
                "mcp_sensor.metrics.overflow",
                "{measurement}",
                "Measurements with names beyond the limits, which count as `other`",
                &["metric"],
            ),
        }
    }

    fn counters(&self) -> [&Counter; 9] {
        [
            &self.calls,
            &self.size,
            &self.denials,
            &self.findings,
            &self.drift,
            &self.uninspected,
            &self.events,
            &self.losses,
            &self.overflow,
        ]
    }

    fn observe(&mut self, body: &Body) {
        let server = server(body);
        self.add(|s| &mut s.events, &[type_name(body)], 1);
        match body {
            Body::ToolCall(t) => self.tool_call(server, t),
            Body::Finding(f) => {
                self.add(|s| &mut s.findings, &[server, &f.kind, severity_name(f.severity())], 1);
            }
            Body::Drift(d) => self.add(|s| &mut s.drift, &[server, &d.what], 1),
            Body::Uninspected(u) => self.add(|s| &mut s.uninspected, &[server, &u.how], u.bytes),
            Body::Loss(l) => {
                // Of "subscriber:NAME" the name is different each time.
                let place = l.r#where.split(':').next().unwrap_or_default();
                self.add(|s| &mut s.losses, &[place, &l.reason], l.count);
            }
            _ => (),
        }
        if let Some(d) = decision(body).filter(|_| is_denial(body)) {
            self.add(|s| &mut s.denials, &[server, verdict_name(d.verdict())], d.count.max(1));
        }
        if let Some(e) = exchange(body).filter(|e| !is_notification(e) && e.sender() != pb::Sender::Server) {
            let tool = if let Body::ToolCall(t) = body { self.admit(server, &t.tool) } else { "" };
            let labels = [server, method(&e.method), tool, &error_type(e)];
            if !self.duration.observe(&labels, e.duration_ns) {
                self.overflow.add(&[self.duration.name], 1);
            }
        }
    }

    fn tool_call(&mut self, server: &str, call: &pb::ToolCall) {
        let none = pb::Exchange::default();
        let e = call.exchange.as_ref().unwrap_or(&none);
        let tool = self.admit(server, &call.tool);
        if tool == OTHER && call.tool != OTHER {
            self.overflow.add(&[self.calls.name], 1);
        }
        self.add(|s| &mut s.calls, &[server, tool, outcome_name(e.outcome())], 1);
        self.add(|s| &mut s.size, &[server, "request"], e.request_bytes);
        self.add(|s| &mut s.size, &[server, "response"], e.response_bytes);
    }

    /// The tool's own name, if there is room for it.
    fn admit<'a>(&mut self, server: &str, tool: &'a str) -> &'a str {
        if tool.is_empty() {
            return OTHER;
        }
        let pair = (server.to_owned(), tool.to_owned());
        if self.tools.len() < MAX_TOOLS {
            self.tools.insert(pair);
            return tool;
        }
        if self.tools.contains(&pair) { tool } else { OTHER }
    }

    fn add(&mut self, counter: impl Fn(&mut Sums) -> &mut Counter, labels: &[&str], by: u64) {
        let counter = counter(self);
        let (name, fits) = (counter.name, counter.add(labels, by));
        if !fits {
            self.overflow.add(&[name], 1);
        }
    }
}

fn method(name: &str) -> &str {
    if METHODS.contains(&name) { name } else { OTHER }
}

/// Empty: none.
fn error_type(e: &pb::Exchange) -> String {
    match e.outcome() {
        pb::Outcome::Ok | pb::Outcome::InputRequired | pb::Outcome::Task | pb::Outcome::Unspecified => {
            String::new()
        }
        pb::Outcome::RpcError if ERROR_CODES.contains(&e.error_code) => e.error_code.to_string(),
        pb::Outcome::RpcError => OTHER_ERROR.to_owned(),
        pb::Outcome::ToolError | pb::Outcome::Cancelled | pb::Outcome::NoResponse => {
            outcome_name(e.outcome()).to_owned()
        }
    }
}
