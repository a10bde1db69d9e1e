//! Servers that are spoken to over HTTP: the sensor's list of calls, and of HTTP
//! exchanges, is the client's own. Needs PyPI and npm once.

use anyhow::{Context, Result, ensure};
use mcp_sensor_tests::bed::Bed;
use mcp_sensor_tests::drivers::found;
use mcp_sensor_tests::events::Event;
use mcp_sensor_tests::mcp::events::Mark;
use mcp_sensor_tests::mcp::listening::Listener;
use mcp_sensor_tests::mcp::log::{Exchanged, Log};
use mcp_sensor_tests::mcp::session::{Driver, NODE_1, NODE_2, PYTHON_1, PYTHON_2, Transport};
use mcp_sensor_tests::policy::Policy;
use mcp_sensor_tests::sensor::{SOON, Sensor};
use mcp_sensor_tests::spec::{Claim, run};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

const SESSION: Duration = Duration::from_secs(90);

fn everything_calls() -> Value {
    json!([
        {"do": "tools"},
        {"do": "prompt", "name": "simple-prompt"},
        {"do": "resource", "uri": "demo://resource/static/document/features.md"},
        {"tool": "echo", "arguments": {"message": ""}},
        {"tool": "echo", "arguments": {"message": "ünïcödé \u{1f980} \"quoted\"\\\n"}},
        {"tool": "echo", "arguments": {"message": "x".repeat(300_000)}},
        {"tool": "get-sum", "arguments": {"a": 1, "b": 2}},
        {"tool": "get-sum", "arguments": {"a": "one"}},
        {"tool": "no-such-tool"},
        {"tool": "get-tiny-image"},
        {"tool": "trigger-long-running-operation", "arguments": {"duration": 0.4, "steps": 4}, "progress": true},
    ])
}

fn programs() -> Option<Claim> {
    let missing = ["python3", "node", "npm"].into_iter().find(|p| found(p).is_none())?;
    Some(Claim::Skipped(format!("{missing} is not installed (ENOENT)")))
}

/// What is in `all` and not in `known`.
fn beyond(known: &[Exchanged], all: &[Exchanged]) -> Vec<Exchanged> {
    let mut left = known.to_vec();
    let mut missing = |e: &&Exchanged| match left.iter().position(|l| l == *e) {
        Some(at) => {
            left.swap_remove(at);
            false
        }
        None => true,
    };
    all.iter().filter(|e| missing(e)).cloned().collect()
}

/// What the sensor says of HTTP exchanges is what the client counted.
fn exchanges_are(sensor: &Sensor, mark: Mark, server: &str, log: &Log) -> Result<Vec<Event>> {
    let deadline = Instant::now() + SOON;
    while sensor.since(mark, "http", server)?.len() < log.exchanges.len() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    let events = sensor.since(mark, "http", server)?;
    let seen: Vec<_> = events
        .iter()
        .map(|e| Exchanged {
            method: e.text("method").to_owned(),
            status: e.number("status").unwrap_or(0),
            sent: e.number("request_bytes").unwrap_or(0),
            received: e.number("response_bytes").unwrap_or(0),
        })
        .collect();
    let asked = |e: &Exchanged| Exchanged { status: 0, received: 0, ..e.clone() };
    let began = |e: &Exchanged| Exchanged { received: 0, ..e.clone() };
    let requests: Vec<_> = seen.iter().map(asked).collect();
    let invented = beyond(&log.exchanges, &requests);
    ensure!(invented.is_empty(), "HTTP that the client knows nothing of: {invented:?}");
    let known = [
        beyond(&requests, &log.exchanges),
        beyond(&seen.iter().map(began).collect::<Vec<_>>(), &log.begun),
        beyond(&seen, &log.whole),
    ];
    ensure!(known.iter().all(Vec::is_empty), "HTTP that only the client knows of: {known:?}; all: {seen:?}");
    for event in &events {
        ensure!(
            event.text("direction") == "inbound" && event.text("peer.ip").contains("127.0.0.1"),
            "{}",
            event.0
        );
        ensure!(event.number("duration_ns").is_some_and(|d| d > 0), "{}", event.0);
    }
    Ok(events)
}

/// One driver after the other against one server; `named`: it gives sessions
/// a name.
fn recorded(
    listener: &Listener,
    transport: Transport,
    named: bool,
    bed: &Bed,
    drivers: &[Driver],
    calls: &Value,
) -> Result<()> {
    let sensor = Sensor::start(bed, &listener.declared(Policy::default()))?;
    let _running = listener.start(bed)?;
    let mut sessions = BTreeSet::new();
    for driver in drivers {
        let phases = json!([{"calls": calls}]);
        let events = compare(bed, &sensor, listener, transport, *driver, phases, true, named);
        let events = events.with_context(|| format!("{driver:?}"))?;
        sessions.extend(events.iter().map(|e| e.text("session_hash").to_owned()));
        let many = json!([{"tool": "echo", "arguments": {"message": "again"}, "times": 100}]);
        let phases = json!([{"calls": [{"do": "tools"}]}, {"concurrency": 20, "calls": many}]);
        let events = compare(bed, &sensor, listener, transport, *driver, phases, false, named);
        let events = events.with_context(|| format!("{driver:?}, many at once"))?;
        sessions.extend(events.iter().map(|e| e.text("session_hash").to_owned()));
    }
    let expected = if named { 2 * drivers.len() } else { 1 };
    ensure!(sessions.len() == expected, "{} sessions, not {expected}: {sessions:?}", sessions.len());
    Ok(())
}

#[allow(clippy::too_many_arguments, reason = "a row of a table")]
fn compare(
    bed: &Bed,
    sensor: &Sensor,
    listener: &Listener,
    transport: Transport,
    driver: Driver,
    phases: Value,
    in_order: bool,
    named: bool,
) -> Result<Vec<Event>> {
    let mark = sensor.mark()?;
    let log = driver.drive(bed, &listener.session(phases), SESSION)?;
    ensure!(!log.calls.is_empty() && log.asked("client", "tools/list") > 0, "proves nothing: {log:?}");
    let name = listener.name;
    let events = sensor.knows_over_http(mark, name, &log, in_order)?;
    exchanges_are(sensor, mark, name, &log)?;
    let progress: u64 = events.iter().filter_map(|e| e.number("progress")).sum();
    ensure!(progress == log.progress as u64, "{progress} of {} progress notifications", log.progress);
    let lists = sensor.exactly(mark, "tools_listed", name, log.asked("client", "tools/list"))?;
    for event in events.iter().chain(&lists) {
        ensure!(event.text("transport") == transport.name(), "{}", event.0);
        ensure!(
            event.text("protocol_version") == log.protocol_version,
            "{}: {}",
            log.protocol_version,
            event.0
        );
        ensure!(event.text("session_hash").is_empty() != named, "{}", event.0);
        ensure!(event.text("session_hash") == events[0].text("session_hash"), "two sessions: {}", event.0);
    }
    Ok(events)
}

fn everything(name: &'static str, transport: Transport, drivers: &[Driver]) {
    run(|| {
        if let Some(skipped) = programs() {
            return Ok(skipped);
        }
        let bed = Bed::new()?;
        let listener = Listener::everything(&bed, name, transport)?;
        recorded(&listener, transport, true, &bed, drivers, &everything_calls())?;
        Ok(Claim::Holds)
    });
}

#[test]
fn python_clients_over_streamable_http_are_recorded() {
    everything("everything-http-py", Transport::Streamable, &[PYTHON_1, PYTHON_2]);
}

#[test]
fn node_clients_over_streamable_http_are_recorded() {
    everything("everything-http-js", Transport::Streamable, &[NODE_1, NODE_2]);
}

#[test]
fn python_clients_over_http_and_sse_are_recorded() {
    everything("everything-sse-py", Transport::Sse, &[PYTHON_1, PYTHON_2]);
}

#[test]
fn node_clients_over_http_and_sse_are_recorded() {
    everything("everything-sse-js", Transport::Sse, &[NODE_1, NODE_2]);
}
