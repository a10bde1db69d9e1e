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
    // One that the client gave up before an answer may never have been sent.
    let answered: Vec<_> = log.begun.iter().map(asked).collect();
    let known = [
        beyond(&requests, &answered),
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

/// One driver after the other against one server.
fn recorded(bed: &Bed, listener: &Listener, drivers: &[Driver], calls: &Value) -> Result<()> {
    let sensor = Sensor::start(bed, &listener.declared(Policy::default()))?;
    let _running = listener.start(bed)?;
    let mut sessions = BTreeSet::new();
    let mut named = 0;
    let many = json!([{"tool": "echo", "arguments": {"message": "again"}, "times": 100}]);
    let all = [
        (json!([{"calls": calls}]), true),
        (json!([{"calls": [{"do": "tools"}]}, {"concurrency": 20, "calls": many}]), false),
    ];
    for driver in drivers {
        for (phases, in_order) in &all {
            let session = compare(bed, &sensor, listener, *driver, phases, *in_order)
                .with_context(|| format!("{driver:?}, in order: {in_order}"))?;
            named += usize::from(session.is_some());
            sessions.extend(session);
        }
    }
    ensure!(sessions.len() == named, "{named} sessions: {sessions:?}");
    Ok(())
}

/// The session, if it has a name.
fn compare(
    bed: &Bed,
    sensor: &Sensor,
    listener: &Listener,
    driver: Driver,
    phases: &Value,
    in_order: bool,
) -> Result<Option<String>> {
    let mark = sensor.mark()?;
    let log = driver.drive(bed, &listener.session(phases.clone()), SESSION)?;
    ensure!(!log.calls.is_empty() && log.asked("client", "tools/list") > 0, "proves nothing: {log:?}");
    let name = listener.name;
    let events = sensor.knows_over_http(mark, name, &log, in_order)?;
    exchanges_are(sensor, mark, name, &log)?;
    let progress: u64 = events.iter().filter_map(|e| e.number("progress")).sum();
    ensure!(progress == log.progress as u64, "{progress} of {} progress notifications", log.progress);
    let lists = sensor.exactly(mark, "tools_listed", name, log.asked("client", "tools/list"))?;
    let session = events[0].text("session_hash");
    // The stream's address names the older transport's.
    let named = log.named || listener.transport == Transport::Sse;
    let era = if log.asked("client", "initialize") > 0 { "legacy" } else { "modern" };
    for event in events.iter().chain(&lists) {
        ensure!(event.text("transport") == listener.transport.name(), "{}", event.0);
        ensure!(event.text("era") == era, "not {era}: {}", event.0);
        let version = event.text("protocol_version");
        ensure!(version == log.protocol_version, "not {}: {}", log.protocol_version, event.0);
        ensure!(session.is_empty() != named, "named: {named}: {}", event.0);
        ensure!(event.text("session_hash") == session, "two sessions: {}", event.0);
    }
    Ok(named.then(|| session.to_owned()))
}

fn everything(name: &'static str, transport: Transport, drivers: &[Driver]) {
    run(|| {
        if let Some(skipped) = programs() {
            return Ok(skipped);
        }
        let bed = Bed::new()?;
        let listener = Listener::everything(&bed, name, transport)?;
        recorded(&bed, &listener, drivers, &everything_calls())?;
        Ok(Claim::Holds)
    });
}

fn python(name: &'static str, venv: &str, arguments: &[&str], drivers: &[Driver]) {
    run(|| {
        if let Some(skipped) = programs() {
            return Ok(skipped);
        }
        let bed = Bed::new()?;
        let listener = Listener::python_sdk(&bed, name, venv, arguments)?;
        let calls = json!([
            {"do": "tools"},
            {"tool": "echo", "arguments": {"message": "ünïcödé \u{1f980}"}},
            {"tool": "echo", "arguments": {"message": "x".repeat(100_000)}},
            {"tool": "add", "arguments": {"a": 1, "b": 2}},
            {"tool": "add", "arguments": {"a": "one"}},
            {"tool": "fail"},
            {"tool": "no-such-tool"},
        ]);
        recorded(&bed, &listener, drivers, &calls)?;
        Ok(Claim::Holds)
    });
}

macro_rules! claims {
    ($($name:ident: $claim:expr;)+) => {
        $(#[test]
        fn $name() { $claim; })+
    };
}

claims! {
    python_clients_over_streamable_http_are_recorded:
        everything("everything-http-py", Transport::Streamable, &[PYTHON_1, PYTHON_2]);
    node_clients_over_streamable_http_are_recorded:
        everything("everything-http-js", Transport::Streamable, &[NODE_1, NODE_2]);
    python_clients_over_http_and_sse_are_recorded:
        everything("everything-sse-py", Transport::Sse, &[PYTHON_1, PYTHON_2]);
    node_clients_over_http_and_sse_are_recorded:
        everything("everything-sse-js", Transport::Sse, &[NODE_1, NODE_2]);
    a_server_on_the_python_sdk_1_is_recorded:
        python("sdk-1", "mcp-v1", &[], &[PYTHON_1, PYTHON_2, NODE_1]);
    a_server_on_the_python_sdk_1_without_sessions_is_recorded:
        python("sdk-1-stateless", "mcp-v1", &["--stateless"], &[PYTHON_1, NODE_2]);
    a_server_on_the_python_sdk_2_is_recorded:
        python("sdk-2", "mcp-v2", &[], &[PYTHON_1, PYTHON_2, NODE_2]);
    a_server_on_the_python_sdk_2_without_sessions_is_recorded:
        python("sdk-2-stateless", "mcp-v2", &["--stateless", "--json"], &[PYTHON_2, NODE_1]);
}
