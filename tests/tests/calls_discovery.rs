//! Servers that nobody declared are found by what they say; what is not MCP
//! is not.

use anyhow::{Context, Result, ensure};
use mcp_sensor_tests::bed::Bed;
use mcp_sensor_tests::drivers::{found, installed};
use mcp_sensor_tests::events::Event;
use mcp_sensor_tests::mcp::events::{Mark, shown};
use mcp_sensor_tests::mcp::log::{Call, Log};
use mcp_sensor_tests::mcp::servers::{self, Server};
use mcp_sensor_tests::mcp::session::{Driver, NODE_1, NODE_2, PYTHON_1, PYTHON_2};
use mcp_sensor_tests::mcp::wire::{Link, Wire};
use mcp_sensor_tests::network::Family;
use mcp_sensor_tests::peer::PORT;
use mcp_sensor_tests::policy::Policy;
use mcp_sensor_tests::run::Running;
use mcp_sensor_tests::sensor::{SOON, Sensor};
use mcp_sensor_tests::spec::{Claim, must, run};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const SESSION: Duration = Duration::from_secs(90);
const UNKNOWN: &str = "unknown";

fn findings(sensor: &Sensor, mark: Mark) -> Result<Vec<Event>> {
    let all = sensor.since(mark, "finding", UNKNOWN)?;
    Ok(all.into_iter().filter(|e| e.text("kind") == "unknown_server").collect())
}

/// An instance of `unknown` that is named `name`, and one finding that says so.
fn is_found(sensor: &Sensor, mark: Mark, name: &str) -> Result<()> {
    // Of `@scope/server`, a program of that package has the name alone.
    let name = name.rsplit('/').next().unwrap_or(name);
    let started = sensor.since(mark, "instance_started", UNKNOWN)?;
    ensure!(!started.is_empty(), "no instance of an unknown server");
    let other = started.iter().find(|e| !e.text("instance").contains(name));
    ensure!(other.is_none(), "an instance that is not {name}: {}", shown(&started));
    let findings = findings(sensor, mark)?;
    ensure!(findings.len() == 1, "{} findings: {}", findings.len(), shown(&findings));
    ensure!(findings[0].text("instance").contains(name), "{}", shown(&findings));
    ensure!(!findings[0].text("severity").is_empty(), "{}", findings[0].0);
    Ok(())
}

fn undeclared(server: impl FnOnce(&Bed) -> Result<Server>, drivers: &[Driver]) {
    run(|| {
        for program in ["python3", "node", "npm"] {
            if found(program).is_none() {
                return Ok(Claim::Skipped(format!("{program} is not installed (ENOENT)")));
            }
        }
        let bed = Bed::new()?;
        let server = server(&bed)?;
        for driver in drivers {
            let sensor = Sensor::start(&bed, &Policy::default())?;
            let mark = sensor.mark()?;
            let log = driver.drive(&bed, &server.session, SESSION)?;
            sensor.knows(mark, UNKNOWN, &log).with_context(|| format!("{driver:?}"))?;
            is_found(&sensor, mark, server.package).with_context(|| format!("{driver:?}"))?;
        }
        Ok(Claim::Holds)
    });
}

#[test]
fn an_undeclared_server_of_npm_is_found_by_its_package() {
    undeclared(|_| servers::everything(), &[PYTHON_1]);
}

#[test]
fn an_undeclared_server_on_the_python_sdk_2_is_found_by_its_package() {
    undeclared(|_| servers::time(), &[NODE_1]);
}

#[test]
fn an_undeclared_server_on_the_python_sdk_1_is_found_by_its_package() {
    undeclared(servers::sqlite, &[PYTHON_2]);
}

/// The client starts it once to ask for its era, and again for the session.
#[test]
fn a_server_that_is_probed_and_started_again_is_one_finding() {
    undeclared(|_| servers::time(), &[NODE_2]);
}

fn connects() -> Value {
    json!({"to": Family::V4.allowed(), "port": PORT})
}

/// Says `hello` only when it is waiting for it.
fn echo(bed: &Bed) -> Result<Wire> {
    let ready = bed.folder.path().join("ready");
    let _ = std::fs::remove_file(&ready);
    let file = ready.to_string_lossy().into_owned();
    let server = servers::echo_python(bed, json!([]), &["--pid-file", &file])?;
    let mut command = bed.command(&server.session.command[0])?;
    command.args(&server.session.command[1..]);
    let wire = Wire::start(command, Link::Pipes)?;
    let deadline = Instant::now() + SESSION;
    while !ready.exists() {
        ensure!(Instant::now() < deadline, "the server does not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(wire)
}

#[test]
fn an_unknown_server_is_held_to_the_profile_for_unknown_ones() {
    must(|| {
        let bed = Bed::new()?;
        let control = {
            let mut wire = echo(&bed)?;
            wire.initialize()?;
            wire.call("connect", connects())?;
            wire.end()?
        };
        ensure!(control.calls[0].outcome == "ok", "proves nothing: {control:?}");
        let sensor = Sensor::start(&bed, &Policy::default().unknown("none", "enforce"))?;
        let mark = sensor.mark()?;
        let mut wire = echo(&bed)?;
        wire.initialize()?;
        sensor.events().wait_for("the server", SOON, |e| {
            e.text("type") == "instance_started" && e.text("server") == UNKNOWN
        })?;
        bed.frames()?;
        wire.call("connect", connects())?;
        let log = wire.end()?;
        ensure!(log.calls[0].outcome == "tool_error", "it connects: {log:?}");
        let frames = bed.frames()?;
        ensure!(frames.is_empty(), "{frames:?}");
        sensor.events().wait_for("the denial", SOON, |e| e.is_denial_of(UNKNOWN))?;
        is_found(&sensor, mark, "-echo")
    });
}

/// From its first message to the first connection that is refused.
#[test]
fn an_unknown_server_is_contained_soon_after_its_first_message() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::default().unknown("none", "enforce"))?;
        let mut took = Vec::new();
        for _ in 0..20 {
            let mut wire = echo(&bed)?;
            let since = Instant::now();
            wire.ask(
                "initialize",
                json!({
                    "protocolVersion": "2025-06-18", "capabilities": {},
                    "clientInfo": {"name": "tests", "version": "1"},
                }),
            )?;
            loop {
                wire.call("connect", connects())?;
                if wire.last_outcome().as_deref() == Some("tool_error") {
                    break;
                }
                ensure!(since.elapsed() < SOON, "it still connects after {SOON:?}");
            }
            took.push(since.elapsed());
        }
        took.sort();
        println!("contained after: median {:?}, worst of {} {:?}", took[10], took.len(), took[19]);
        ensure!(took[19] < Duration::from_secs(2), "{took:?}");
        drop(sensor);
        Ok(())
    });
}

/// Calls before the sensor was there are not its business; all after are.
fn from_before(server: impl FnOnce(&Bed) -> Result<Server>, declared: bool, driver: Driver) {
    run(|| {
        if let Some(program) = ["python3", "node", "npm"].into_iter().find(|p| found(p).is_none()) {
            return Ok(Claim::Skipped(format!("{program} is not installed (ENOENT)")));
        }
        let bed = Bed::new()?;
        let mut server = server(&bed)?;
        let go = bed.folder.path().join("go");
        let calls = server.session.phases;
        let before = json!([{"do": "tools"}, {"do": "wait", "file": go}]);
        server.session.phases = json!([{"calls": before}, calls[0]]);
        let driven = driver.start(&bed, &server.session)?;
        wait_for_server(&bed, &server)?;
        let (policy, name) = if declared {
            (server.declared(Policy::default()), server.name)
        } else {
            (Policy::default(), UNKNOWN)
        };
        let sensor = Sensor::start(&bed, &policy)?;
        let mark = sensor.mark()?;
        std::fs::write(&go, "")?;
        let log: Log = driven.finish(SESSION)?;
        let events = sensor.calls_are(mark, name, &log.calls)?;
        ensure!(!events.is_empty(), "proves nothing: {log:?}");
        if !declared {
            is_found(&sensor, mark, server.package)?;
        }
        Ok(Claim::Holds)
    });
}

/// Until its process is up and has been asked something.
fn wait_for_server(bed: &Bed, server: &Server) -> Result<()> {
    let deadline = Instant::now() + SESSION;
    let wanted = Path::new(&server.session.command[0]).file_name().context("a program")?.to_owned();
    let runs = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&*wanted.to_string_lossy())
    };
    while !bed.cgroup.processes()?.iter().any(runs) {
        ensure!(Instant::now() < deadline, "{wanted:?} does not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    // It reads its list of tools meanwhile; how far it is does not matter.
    std::thread::sleep(Duration::from_millis(1500));
    Ok(())
}

#[test]
fn an_undeclared_server_that_ran_before_the_sensor_is_found() {
    from_before(|_| servers::everything(), false, NODE_1);
}

/// The SDK moved its wire away from descriptors 0 and 1.
#[test]
fn an_undeclared_server_with_a_moved_wire_that_ran_before_is_found() {
    from_before(|_| servers::time(), false, PYTHON_2);
}

#[test]
fn a_declared_server_that_ran_before_the_sensor_is_recorded() {
    from_before(servers::git, true, PYTHON_1);
}

/// Not one event calls it a server.
fn is_not_mcp(start: impl FnOnce(&Bed) -> Result<Option<Command>>) {
    run(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::default().unknown("none", "enforce"))?;
        let mark = sensor.mark()?;
        let Some(command) = start(&bed)? else {
            return Ok(Claim::Skipped("python3, node or npm is not installed (ENOENT)".into()));
        };
        let done = Running::start(command)?.finish(SESSION)?;
        ensure!(done.lines.iter().any(|l| l.starts_with("spoke")), "{:?} {}", done.lines, done.stderr);
        // What comes after is found: the sensor looks, and has looked.
        let mut wire = echo(&bed)?;
        wire.initialize()?;
        wire.call("echo", json!({}))?;
        wire.end()?;
        sensor.exactly(mark, "tool_call", UNKNOWN, 1)?;
        is_found(&sensor, mark, "-echo").map(|()| Claim::Holds)
    });
}

fn spoken(bed: &Bed, kind: &str, program: PathBuf, arguments: &[&str]) -> Result<Command> {
    let client = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/other.py");
    let mut command = bed.command(found("python3").context("python3")?)?;
    command.arg(client).arg(kind).arg(program).args(arguments);
    Ok(command)
}

#[test]
fn a_language_server_is_no_mcp_server() {
    is_not_mcp(|bed| {
        if found("python3").is_none() {
            return Ok(None);
        }
        Ok(Some(spoken(bed, "lsp", installed("not-mcp")?.join("bin/pylsp"), &[])?))
    });
}

#[test]
fn a_debug_adapter_is_no_mcp_server() {
    is_not_mcp(|bed| {
        if found("python3").is_none() {
            return Ok(None);
        }
        let python = installed("not-mcp")?.join("bin/python");
        Ok(Some(spoken(bed, "dap", python, &["-m", "debugpy.adapter"])?))
    });
}

/// Newline JSON-RPC that begins with `initialize`, and names its client.
#[test]
fn an_acp_agent_is_no_mcp_server() {
    is_not_mcp(|bed| {
        let Some(node) = found("node").filter(|_| found("npm").is_some()) else { return Ok(None) };
        let (agent, modules) = (servers::own("acp.mjs"), installed("acp")?);
        let arguments = [agent.to_string_lossy(), modules.to_string_lossy()];
        Ok(Some(spoken(bed, "acp", node, &[&arguments[0], &arguments[1]])?))
    });
}

#[test]
#[ignore = "404 MB"]
fn codex_app_server_is_no_mcp_server() {
    is_not_mcp(|bed| {
        if found("npm").is_none() {
            return Ok(None);
        }
        let codex = installed("codex")?.join("node_modules/.bin/codex");
        let mut command = spoken(bed, "codex", codex, &["app-server"])?;
        command.env("HOME", bed.folder.path()).env("CODEX_HOME", bed.folder.path());
        Ok(Some(command))
    });
}

/// JSON lines that pass through filters, one of them a JSON-RPC `initialize`.
#[test]
fn shell_pipelines_are_no_mcp_servers() {
    is_not_mcp(|bed| {
        let line = r#"{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"rootUri":null}}"#;
        let script = format!(
            "for i in 1 2 3; do printf '%s\\n' '{line}' | cat | grep -F initialize | tee /dev/null | wc -l; done; \
             yes '{{\"a\": [1, 2]}}' | head -n 20000 | sort | uniq -c | tail -n 1; echo spoke"
        );
        let mut command = bed.command("sh")?;
        command.arg("-c").arg(script);
        Ok(Some(command))
    });
}

/// Each instance's calls are its own, whoever declared it.
#[test]
fn two_unknown_servers_are_two_instances() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::default())?;
        let mark = sensor.mark()?;
        let (mut one, mut other) = (echo(&bed)?, echo(&bed)?);
        for wire in [&mut one, &mut other] {
            wire.initialize()?;
            wire.call("fail", json!({}))?;
        }
        let logs = [one.end()?, other.end()?];
        let events = sensor.exactly(mark, "tool_call", UNKNOWN, 2)?;
        let calls: Vec<Call> = events.iter().map(Call::of_event).collect();
        ensure!(calls.iter().zip(&logs).all(|(c, l)| *c == l.calls[0]), "{calls:?}");
        ensure!(events[0].text("instance") != events[1].text("instance"), "{}", shown(&events));
        Ok(())
    });
}
