//! Messages of every size and in every order: what clients know of them is
//! what the sensor records.

use anyhow::{Context, Result, ensure};
use mcp_sensor_tests::bed::Bed;
use mcp_sensor_tests::mcp::events::shown;
use mcp_sensor_tests::mcp::log::{Call, Log};
use mcp_sensor_tests::mcp::servers::{self, Server};
use mcp_sensor_tests::mcp::session::{Driver, NODE_1, NODE_2, PYTHON_1, PYTHON_2};
use mcp_sensor_tests::mcp::speaker::Speaker;
use mcp_sensor_tests::mcp::wire::{Link, Wire};
use mcp_sensor_tests::policy::Policy;
use mcp_sensor_tests::sensor::{SOON, Sensor};
use mcp_sensor_tests::spec::must;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;

const SESSION: Duration = Duration::from_secs(300);

/// Drives the server with each driver; returns the log of each.
/// The echo server writes 50 MB in one call, which is recorded at once.
const LARGE_RING: [&str; 2] = ["--stdio-ring", "64"];

fn recorded(server: impl FnOnce(&Bed) -> Result<Server>, drivers: &[Driver]) -> Result<Vec<Log>> {
    let bed = Bed::new()?;
    let server = server(&bed)?;
    let sensor = Sensor::start_with(&bed, &server.declared(Policy::default()), &LARGE_RING)?;
    let one = |driver: &Driver| -> Result<Log> {
        let mark = sensor.mark()?;
        let log = driver.drive(&bed, &server.session, SESSION)?;
        sensor.knows(mark, server.name, &log)?;
        Ok(log)
    };
    drivers.iter().map(|d| one(d).with_context(|| format!("{d:?} and {}", server.name))).collect()
}

fn echo(bytes: usize) -> Value {
    json!({"tool": "echo", "arguments": {"bytes": bytes}})
}

/// From one byte on, around powers of two, both ways.
fn sizes(largest: usize) -> Value {
    let mut calls = Vec::new();
    for size in [1, 2, 4095, 8193, 65_535, 65_537, 1 << 20, 5 << 20, largest] {
        calls.push(echo(size));
        calls.push(json!({"tool": "echo", "arguments": {"text": "é".repeat(size / 2)}}));
    }
    json!([{"calls": calls}])
}

const LARGEST: usize = 50_000_000;

#[test]
fn messages_from_1_b_to_50_mb_of_a_python_server_are_recorded() {
    must(|| recorded(|bed| servers::echo_python(bed, sizes(LARGEST), &[]), &[PYTHON_2]).map(drop));
}

#[test]
fn messages_from_1_b_to_50_mb_of_a_node_server_are_recorded() {
    must(|| recorded(|bed| servers::echo_node(bed, sizes(LARGEST)), &[PYTHON_1]).map(drop));
}

#[test]
fn messages_to_node_clients_are_recorded() {
    must(|| {
        recorded(|bed| servers::echo_python(bed, sizes(2_000_000), &[]), &[NODE_1])?;
        recorded(|bed| servers::echo_node(bed, sizes(2_000_000)), &[NODE_2]).map(drop)
    });
}

/// The TypeScript SDKs copy what they have of a message for each piece more.
#[test]
#[ignore = "half a minute for each large message"]
fn messages_of_50_mb_to_node_clients_are_recorded() {
    must(|| recorded(|bed| servers::echo_node(bed, sizes(LARGEST)), &[NODE_1, NODE_2]).map(drop));
}

#[test]
fn fifty_calls_at_a_time_are_recorded() {
    must(|| {
        let calls = json!([
            {"tool": "echo", "arguments": {"bytes": 30_000, "delay": 0.05}, "times": 100},
            {"tool": "echo", "arguments": {"text": "at once"}, "times": 150},
            {"tool": "fail", "times": 50},
            {"tool": "refuse", "arguments": {"code": -32000}, "times": 50},
        ]);
        let phases = json!([{"concurrency": 50, "calls": calls}]);
        recorded(|bed| servers::echo_python(bed, phases.clone(), &[]), &[PYTHON_2, NODE_1])?;
        recorded(|bed| servers::echo_node(bed, phases), &[PYTHON_1, NODE_2]).map(drop)
    });
}

fn replies_after(seconds: u64) {
    must(|| {
        let late = json!({"tool": "echo", "arguments": {"bytes": 10, "delay": seconds}});
        let phases = json!([{"concurrency": 2, "calls": [late, echo(1)]}]);
        let bed = Bed::new()?;
        let server = servers::echo_python(&bed, phases, &[])?;
        let sensor = Sensor::start(&bed, &server.declared(Policy::default()))?;
        let mark = sensor.mark()?;
        let log = PYTHON_2.drive(&bed, &server.session, SESSION)?;
        let events = sensor.knows(mark, server.name, &log)?;
        let (soon, late) = (events[0].number("duration_ns"), events[1].number("duration_ns"));
        let (soon, late) = (soon.unwrap_or(0), late.unwrap_or(0));
        let wanted = Duration::from_secs(seconds).as_nanos() as u64;
        ensure!((wanted..wanted + 1_000_000_000).contains(&late), "{late} ns is not {seconds} s");
        ensure!(soon < 1_000_000_000, "{soon} ns for an answer at once");
        Ok(())
    });
}

#[test]
fn replies_after_3_s_are_recorded() {
    replies_after(3);
}

#[test]
#[ignore = "minutes"]
fn replies_after_150_s_are_recorded() {
    replies_after(150);
}

/// Everything that a client and a server say to each other beside tools.
#[test]
fn what_servers_ask_prompts_resources_and_progress_are_recorded() {
    must(|| {
        let calls = json!([
            {"do": "tools"},
            {"tool": "ask", "arguments": {"what": "sampling"}},
            {"tool": "ask", "arguments": {"what": "elicitation"}},
            {"tool": "ask", "arguments": {"what": "roots"}},
            {"tool": "steps", "arguments": {"count": 7}, "progress": true},
            {"do": "prompt", "name": "greet"},
            {"do": "resource", "uri": "note://desk/one"},
            {"tool": "echo", "arguments": {"delay": 60}, "cancel_after": 0.3},
        ]);
        let bed = Bed::new()?;
        let server = servers::echo_python(&bed, json!([{"calls": calls}]), &[])?;
        let sensor = Sensor::start(&bed, &server.declared(Policy::default()))?;
        for driver in [PYTHON_1, PYTHON_2, NODE_1, NODE_2] {
            let mark = sensor.mark()?;
            let log = driver.drive(&bed, &server.session, SESSION)?;
            let events = sensor.knows(mark, server.name, &log).with_context(|| format!("{driver:?}"))?;
            let modern = log.asked("client", "initialize") == 0;
            let outcomes = |wanted: &str| events.iter().filter(|e| e.text("outcome") == wanted).count();
            ensure!(outcomes("cancelled") == 1, "{}", shown(&events));
            ensure!(outcomes("input_required") == if modern { 3 } else { 0 }, "{}", shown(&events));
            let steps: Vec<_> = events.iter().filter(|e| e.text("tool") == "steps").collect();
            ensure!(steps.iter().all(|e| e.number("progress") == Some(7)), "{}", shown(&events));
            let messages = sensor.since(mark, "mcp_message", server.name)?;
            for method in ["sampling/createMessage", "elicitation/create", "roots/list"] {
                let seen = messages
                    .iter()
                    .filter(|e| e.text("method") == method && e.text("sender") == "server")
                    .filter(|e| e.text("outcome") == "ok")
                    .count();
                ensure!(seen == log.asked("server", method), "{driver:?} {method}: {}", shown(&messages));
            }
            let names = sensor.since(mark, "prompt", server.name)?;
            ensure!(names.iter().all(|e| e.text("name") == "greet"), "{}", shown(&names));
            for event in sensor.since(mark, "resource", server.name)? {
                ensure!(event.text("scheme") == "note" && event.text("host") == "desk", "{}", event.0);
                ensure!(!event.0.to_string().contains("/one"), "a path in plain text: {}", event.0);
            }
        }
        Ok(())
    });
}

/// Two servers, and one more that keeps the sensor listening.
struct World {
    bed: Bed,
    sensor: Sensor,
    one: Speaker,
    other: Speaker,
    _awake: Wire,
}

const ONE: &str = "one";
const OTHER: &str = "other";

impl World {
    fn new() -> Result<World> {
        let bed = Bed::new()?;
        let (one, other) = (Speaker::new(&bed, ONE)?, Speaker::new(&bed, OTHER)?);
        let third = Speaker::new(&bed, "companion")?;
        let policy = third.declared(other.declared(one.declared(Policy::default())));
        let sensor = Sensor::start(&bed, &policy)?;
        let awake = Wire::companion(&bed, &sensor, &third)?;
        Ok(World { bed, sensor, one, other, _awake: awake })
    }

    fn wire(&self, server: &Speaker, link: Link) -> Result<Wire> {
        Wire::start(server.command(&self.bed, &[])?, link)
    }
}

/// The same bytes at the same time: each call belongs to its own instance.
#[test]
fn identical_messages_of_two_servers_are_not_mixed() {
    must(|| {
        let world = World::new()?;
        let sensor = &world.sensor;
        let mark = sensor.mark()?;
        let mut wires = Vec::new();
        for link in [Link::Pipes, Link::Pipes, Link::Sockets, Link::Sockets] {
            wires.push(world.wire(&world.one, link)?);
        }
        wires.iter_mut().try_for_each(Wire::initialize)?;
        for round in 0..50 {
            let mut asked = Vec::new();
            for wire in &mut wires {
                let (id, request) = wire.request_call("echo", json!({"bytes": round}));
                wire.send(&request)?;
                asked.push(id);
            }
            for (wire, id) in wires.iter_mut().zip(asked) {
                wire.answer_to(id)?;
            }
        }
        let logs: Vec<Log> = wires.into_iter().map(Wire::end).collect::<Result<_>>()?;
        let events = sensor.exactly(mark, "tool_call", ONE, 200)?;
        let instances: BTreeSet<&str> = events.iter().map(|e| e.text("instance")).collect();
        let connections: BTreeSet<_> = events.iter().map(|e| e.number("connection")).collect();
        ensure!(instances.len() == 4 && connections.len() == 4, "{instances:?} {connections:?}");
        for instance in instances {
            let own: Vec<Call> =
                events.iter().filter(|e| e.text("instance") == instance).map(Call::of_event).collect();
            ensure!(own == logs[0].calls, "{instance}: {own:?}");
        }
        Ok(())
    });
}

/// One server dies with half an answer written; the other goes on.
#[test]
fn a_kill_in_mid_message_invents_nothing_and_touches_nobody() {
    must(|| {
        let world = World::new()?;
        let sensor = &world.sensor;
        for link in [Link::Pipes, Link::Sockets] {
            let mark = sensor.mark()?;
            let mut dying = world.wire(&world.one, link)?;
            let mut other = world.wire(&world.other, link)?;
            dying.initialize()?;
            other.initialize()?;
            dying.call("echo", json!({"bytes": 5}))?;
            // More than the link holds: it blocks in the middle of its answer.
            let before = dying.received;
            dying.ask("tools/call", json!({"name": "echo", "arguments": {"bytes": 30_000_000}}))?;
            dying.take_bytes(before + 1)?;
            dying.signal(Signal::SIGKILL)?;
            other.call("echo", json!({"bytes": 6}))?;
            let gone = dying.end_of_killed()?;
            other.call("fail", json!({}))?;
            let log = other.end()?;
            ensure!(gone.calls.iter().filter(|c| c.outcome == "no_response").count() == 1, "{gone:?}");
            let events = sensor.exactly(mark, "tool_call", ONE, 2)?;
            let seen: Vec<Call> = events.iter().map(Call::of_event).collect();
            ensure!(seen[0] == gone.calls[0], "{seen:?}");
            ensure!(
                seen[1].outcome == "no_response" && seen[1].request_bytes == gone.calls[1].request_bytes,
                "{seen:?} is not {:?}",
                gone.calls
            );
            sensor.calls_are(mark, OTHER, &log.calls)?;
        }
        Ok(())
    });
}

/// Batches of JSON-RPC, as 2025-03-26 had them: each call counts for itself.
#[test]
fn calls_in_a_batch_are_recorded_one_by_one() {
    must(|| {
        let world = World::new()?;
        let sensor = &world.sensor;
        let mark = sensor.mark()?;
        let mut wire = world.wire(&world.one, Link::Pipes)?;
        wire.initialize()?;
        let batch: Vec<Value> = [("echo", json!({"bytes": 3})), ("fail", json!({})), ("none", json!({}))]
            .into_iter()
            .map(|(tool, arguments)| wire.request_call(tool, arguments).1)
            .collect();
        wire.send(&Value::Array(batch))?;
        wire.answers(3)?;
        wire.call("echo", json!({"bytes": 4}))?;
        let log = wire.end()?;
        ensure!(log.calls.len() == 4, "{log:?}");
        sensor.calls_are(mark, ONE, &log.calls).map(drop)
    });
}

/// 0 is an id, and 1 is not "1".
#[test]
fn ids_have_types() {
    must(|| {
        let world = World::new()?;
        let sensor = &world.sensor;
        let mark = sensor.mark()?;
        let mut wire = world.wire(&world.one, Link::Pipes)?;
        wire.initialize()?;
        let ids = [json!(0), json!(7), json!("7"), json!(""), json!("a\"b"), json!(-3)];
        let calls: Vec<Value> = ids
            .iter()
            .enumerate()
            .map(|(n, id)| {
                let params = json!({"name": "echo", "arguments": {"bytes": n}});
                json!({"jsonrpc": "2.0", "id": id, "method": "tools/call", "params": params})
            })
            .collect();
        wire.send_together(&calls)?;
        wire.answers(calls.len())?;
        let log = wire.end()?;
        let events = sensor.calls_are(mark, ONE, &log.calls)?;
        let hashes: BTreeSet<_> = events.iter().map(|e| e.text("id_hash").to_owned()).collect();
        ensure!(hashes.len() == ids.len(), "{hashes:?}");
        Ok(())
    });
}

/// Bytes that are no message are counted; those around them are recorded.
#[test]
fn garbage_between_messages_is_counted() {
    must(|| {
        let world = World::new()?;
        let sensor = &world.sensor;
        let mark = sensor.mark()?;
        let mut wire = world.wire(&world.one, Link::Pipes)?;
        wire.initialize()?;
        wire.call("echo", json!({"bytes": 1}))?;
        wire.put(b"this is no JSON at all\n{\"half\": \n\n\xff\xfe\n")?;
        wire.call("fail", json!({}))?;
        let log = wire.end()?;
        let events = sensor.exactly(mark, "tool_call", ONE, 2)?;
        let seen: Vec<Call> = events.iter().map(Call::of_event).collect();
        ensure!(seen == log.calls, "{seen:?} is not {:?}", log.calls);
        sensor.events().wait_for("garbage", SOON, |e| {
            e.text("type") == "uninspected" && e.text("how") == "garbage" && e.text("sender") == "client"
        })?;
        Ok(())
    });
}

/// Neither arguments nor results are in the events.
#[test]
fn no_content_leaves_the_sensor() {
    must(|| {
        let secret = "Qx7-very-particular-words";
        let calls = json!([{"tool": "echo", "arguments": {"text": secret}}]);
        let bed = Bed::new()?;
        let server = servers::echo_python(&bed, json!([{"calls": calls}]), &[])?;
        let sensor = Sensor::start(&bed, &server.declared(Policy::default()))?;
        let mark = sensor.mark()?;
        let log = PYTHON_1.drive(&bed, &server.session, SESSION)?;
        sensor.knows(mark, server.name, &log)?;
        let written = std::fs::read_to_string(sensor.events_path())?;
        ensure!(!written.contains(secret), "content in the events");
        Ok(())
    });
}
