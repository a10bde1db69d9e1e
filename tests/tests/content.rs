//! Content leaves for the one server whose policy asks for it, redacted; of all
//! others not a word does.

use anyhow::{Context, Result, ensure};
use mcp_sensor_tests::bed::Bed;
use mcp_sensor_tests::drivers::found;
use mcp_sensor_tests::events::Event;
use mcp_sensor_tests::mcp::listening::Listener;
use mcp_sensor_tests::mcp::servers::{self, Server};
use mcp_sensor_tests::mcp::session::{PYTHON_1, PYTHON_2, Transport};
use mcp_sensor_tests::mcp::wire::{Link, Wire};
use mcp_sensor_tests::policy::Policy;
use mcp_sensor_tests::run::Running;
use mcp_sensor_tests::sensor::{SOON, Sensor, binary};
use mcp_sensor_tests::spec::{Claim, must, run};
use serde_json::json;
use std::path::Path;
use std::time::{Duration, Instant};

const MAX: usize = 2000;
const SESSION: Duration = Duration::from_secs(90);

/// Put together here, so that no scanner of source code takes them for real.
fn secrets() -> Vec<String> {
    [
        &["ghp", "_16C7e42F292c6912E7710c838347Ae178B4a"][..],
        &["xoxb", "-2345678901", "-2345678901234", "-AbCdEfGhIjKlMnOpQrStUvWx"],
        &["jane.doe.42", "@", "corp-mail.example.com"],
        &["4111", "1111", "1111", "1111"],
    ]
    .iter()
    .map(|pieces| pieces.concat())
    .collect()
}

fn rule(server: &Server, more: &str) -> String {
    let script = server.session.command[1].rsplit('/').next().unwrap_or_default();
    format!("match: [{{script: {script}}}]\n{more}")
}

fn start(bed: &Bed, server: &Server) -> Result<Wire> {
    let mut command = bed.command(&server.session.command[0])?;
    command.args(&server.session.command[1..]);
    let mut wire = Wire::start(command, Link::Pipes)?;
    wire.initialize()?;
    Ok(wire)
}

/// Secrets in values, in names of members, where content is cut, in an error.
fn talk(wire: &mut Wire, marker: &str) -> Result<()> {
    for secret in secrets() {
        wire.call("echo", json!({"text": format!("{marker} begin {secret} end")}))?;
        wire.call("echo", json!({"text": marker, secret.as_str(): secret}))?;
        for before in (MAX - 60..MAX).step_by(7) {
            wire.call("echo", json!({"text": format!("{marker} {} {secret}", "x".repeat(before))}))?;
        }
        wire.call("refuse", json!({"code": -32000, "why": format!("{marker} {secret}")}))?;
    }
    Ok(())
}

fn content(event: &Event) -> [&str; 2] {
    [event.text("request_content"), event.text("response_content")]
}

fn collect(bed: &Bed, address: &str, folder: &Path) -> Result<Running> {
    let mut command = bed.command(binary()?)?;
    command.args(["collect", "--quiet", "--listen", address, "--dir"]).arg(folder);
    Running::start(command)
}

fn wait_for_text(file: &Path, text: &str) -> Result<String> {
    let deadline = Instant::now() + SOON * 4;
    loop {
        let read = std::fs::read_to_string(file).unwrap_or_default();
        if read.contains(text) {
            return Ok(read);
        }
        ensure!(Instant::now() < deadline, "{} holds no {text}", file.display());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn content_leaves_redacted_for_the_server_that_asks_for_it_and_no_other() {
    must(|| {
        let bed = Bed::new()?;
        let asks = servers::echo_python(&bed, json!([]), &[])?;
        let silent = servers::echo_node(&bed, json!([]))?;
        let capture = format!("capture: {{content: redacted, max_bytes: {MAX}}}");
        let policy = Policy::default()
            .server(asks.name, "unrestricted", "audit", &rule(&asks, &capture))
            .server(silent.name, "unrestricted", "audit", &rule(&silent, ""));
        let folder = bed.folder.path().join("collected");
        let address = format!("unix:{}", bed.folder.path().join("collector.sock").display());
        let _collector = collect(&bed, &address, &folder)?;
        let sensor = Sensor::start_with(&bed, &policy, &["--collector", &address])?;
        let mark = sensor.mark()?;
        for (server, marker) in [(&asks, "flamingo"), (&silent, "pelican")] {
            let mut wire = start(&bed, server)?;
            talk(&mut wire, marker)?;
            let log = wire.end()?;
            sensor.knows(mark, server.name, &log).context(marker)?;
        }
        let calls = sensor.since(mark, "tool_call", asks.name)?;
        for event in &calls {
            for text in content(event) {
                ensure!(text.len() <= MAX, "{} bytes of content", text.len());
            }
            ensure!(content(event)[0].contains("flamingo"), "no request: {}", event.0);
            let answered = event.text("outcome") == "rpc_error" || content(event)[1].contains("flamingo");
            ensure!(answered, "no response: {}", event.0);
        }
        let redacted = calls.iter().filter(|e| content(e)[0].contains("[REDACTED:github-pat]")).count();
        ensure!(redacted >= 2, "nothing was redacted: {:?}", calls.iter().map(content).collect::<Vec<_>>());
        for event in sensor.since(mark, "tool_call", silent.name)? {
            ensure!(event.0.get("request_content").is_none(), "{}", event.0);
            ensure!(event.0.get("response_content").is_none(), "{}", event.0);
        }
        let kept = wait_for_text(&folder.join("events.ndjson"), "flamingo")?;
        let mut outputs =
            vec![("events file", std::fs::read_to_string(sensor.events_path())?), ("collector", kept)];
        for (what, arguments) in [
            ("events -o json", &["events", "-o", "json"][..]),
            ("events", &["events"]),
            ("calls", &["calls"]),
            ("status", &["status", "-o", "json"]),
        ] {
            outputs.push((what, sensor.command(arguments)?.lines.join("\n")));
        }
        ensure!(outputs[2].1.contains("flamingo"), "the control service tells no content");
        for (what, text) in &outputs {
            ensure!(!text.contains("pelican"), "{what} holds content that nobody asked for");
            for secret in secrets() {
                // Half of one is too much, too.
                let (head, tail) = secret.split_at(secret.len() / 2);
                for part in [head, tail] {
                    let line = text.lines().find(|l| l.contains(part));
                    ensure!(line.is_none(), "{what} holds {part}: {}", line.unwrap_or_default());
                }
            }
        }
        Ok(())
    });
}

/// Ids begin at the same number in every session.
#[test]
fn contents_of_sessions_at_once_are_not_mixed() {
    run(|| {
        if ["python3", "node", "npm"].into_iter().any(|p| found(p).is_none()) {
            return Ok(Claim::Skipped("python3, node or npm is not installed (ENOENT)".into()));
        }
        let bed = Bed::new()?;
        let listener = Listener::everything(&bed, "everything-content", Transport::Streamable)?;
        let more = format!("{}\ncapture: {{content: redacted, max_bytes: 4000}}", listener.rule());
        let sensor =
            Sensor::start(&bed, &Policy::default().server(listener.name, "unrestricted", "audit", &more))?;
        let _running = listener.start(&bed)?;
        let mark = sensor.mark()?;
        let session = |marker: &str| {
            let calls = json!([{"tool": "echo", "arguments": {"message": format!("{marker} {}", "x".repeat(500))}, "times": 60}]);
            listener.session(json!([{"concurrency": 8, "calls": calls}]))
        };
        let driven = [
            PYTHON_1.start(&bed, &session("heron"))?,
            PYTHON_2.start(&bed, &session("stork"))?,
            PYTHON_1.start(&bed, &session("crane"))?,
        ];
        for driven in driven {
            driven.finish(SESSION)?;
        }
        let calls = sensor.exactly(mark, "tool_call", listener.name, 3 * 60)?;
        for marker in ["heron", "stork", "crane"] {
            let own: Vec<_> = calls.iter().filter(|e| content(e)[0].contains(marker)).collect();
            ensure!(own.len() == 60, "{} of 60 requests of {marker}", own.len());
            for event in own {
                ensure!(content(event)[1].contains(marker), "another's response: {}", event.0);
                ensure!(event.text("session_hash") == calls_of(&calls, marker), "sessions: {}", event.0);
            }
        }
        Ok(Claim::Holds)
    });
}

fn calls_of<'a>(calls: &'a [Event], marker: &str) -> &'a str {
    calls.iter().find(|e| content(e)[0].contains(marker)).map_or("", |e| e.text("session_hash"))
}
