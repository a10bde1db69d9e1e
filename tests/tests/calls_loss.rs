//! What the sensor could not read it says, byte for byte, and goes on.

use anyhow::{Result, ensure};
use mcp_sensor_tests::bed::Bed;
use mcp_sensor_tests::events::Event;
use mcp_sensor_tests::mcp::events::{Mark, shown};
use mcp_sensor_tests::mcp::log::Call;
use mcp_sensor_tests::mcp::speaker::Speaker;
use mcp_sensor_tests::mcp::wire::{Link, Wire};
use mcp_sensor_tests::policy::Policy;
use mcp_sensor_tests::sensor::{SOON, Sensor};
use mcp_sensor_tests::spec::must;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::time::{Duration, Instant};

/// Bytes of one answer, and how many: more than any buffer of the sensor's.
const ANSWER: usize = 64 * 1024;
const ANSWERS: usize = 3200;

/// Continues the agent whatever becomes of the test.
struct Stopped(Pid);

impl Stopped {
    fn new(sensor: &Sensor) -> Result<Stopped> {
        let pid = Pid::from_raw(sensor.pid().map_or(0, |p| p as i32));
        kill(pid, Signal::SIGSTOP)?;
        Ok(Stopped(pid))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

fn sum(events: &[Event], sender: &str) -> u64 {
    events.iter().filter(|e| e.text("sender") == sender).filter_map(|e| e.number("bytes")).sum()
}

#[test]
fn bytes_written_while_nobody_reads_are_accounted_for() {
    must(|| {
        let bed = Bed::new()?;
        let (speaker, other) = (Speaker::new(&bed, "flood")?, Speaker::new(&bed, "companion")?);
        let sensor = Sensor::start(&bed, &other.declared(speaker.declared(Policy::default())))?;
        let _awake = Wire::companion(&bed, &sensor, &other)?;
        let mark = sensor.mark()?;
        let mut wire = Wire::start(speaker.command(&bed, &[])?, Link::Pipes)?;
        wire.initialize()?;
        for _ in 0..10 {
            wire.call("echo", json!({"bytes": 100}))?;
        }
        let stopped = Stopped::new(&sensor)?;
        for _ in 0..ANSWERS {
            wire.call("echo", json!({"bytes": ANSWER}))?;
        }
        drop(stopped);
        // The stream recovers: from some call on, all are recorded.
        let mut recovered = 0;
        while recovered < 20 {
            wire.call("echo", json!({"bytes": 200 + recovered}))?;
            recovered += 1;
            std::thread::sleep(Duration::from_millis(50));
        }
        let (sent, received) = (wire.sent, wire.received);
        let log = wire.end()?;
        // Those whose answer was lost are told when the connection has ended.
        let last = &log.calls[log.calls.len() - 10..];
        let calls = recorded_until(&sensor, mark, speaker.name, last)?;
        let answered: Vec<Call> = calls.iter().filter(|c| c.is_answered()).cloned().collect();
        let unread = sensor.since(mark, "uninspected", speaker.name)?;
        let lost: Vec<Event> = unread.iter().filter(|e| e.text("how") == "lost").cloned().collect();
        ensure!(sum(&lost, "server") > 0, "proves nothing: nothing was lost of {received} bytes");
        ensure!(calls.len() <= log.calls.len(), "{} calls of {}", calls.len(), log.calls.len());
        is_part_of(&calls, &log.calls)?;
        let others = sensor.since(mark, "mcp_message", speaker.name)?;
        let sum_of = |key: &str| -> u64 {
            let sizes = others.iter().filter_map(|e| e.number(key)).filter(|n| *n > 0);
            sizes.map(|n| n + 1).sum()
        };
        let answered: u64 = answered.iter().map(|c| c.response_bytes + 1).sum();
        let asked: u64 = calls.iter().map(|c| c.request_bytes + 1).sum();
        is_whole("server", received, answered + sum_of("response_bytes"), &unread)?;
        is_whole("client", sent, asked + sum_of("request_bytes"), &unread)?;
        let losses: u64 = sensor
            .events()
            .all()?
            .iter()
            .filter(|e| e.text("type") == "loss" && e.text("where") == "kernel")
            .filter_map(|e| e.number("count"))
            .sum();
        ensure!(losses > 0, "no loss is told");
        Ok(())
    });
}

/// Everything that the sensor says of calls, when it has caught up with `last`.
fn recorded_until(sensor: &Sensor, mark: Mark, server: &str, last: &[Call]) -> Result<Vec<Call>> {
    let deadline = Instant::now() + 6 * SOON;
    loop {
        let calls: Vec<Call> = sensor.since(mark, "tool_call", server)?.iter().map(Call::of_event).collect();
        let answered: Vec<Call> = calls.iter().filter(|c| c.is_answered()).cloned().collect();
        if answered.ends_with(last) {
            std::thread::sleep(Duration::from_secs(1));
            return Ok(sensor.since(mark, "tool_call", server)?.iter().map(Call::of_event).collect());
        }
        ensure!(Instant::now() < deadline, "it does not recover; its last is {:?}", answered.last());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Each byte stands in a message that was recorded, newline included, or in a
/// number of bytes that were not read; only the newline that ends one of these
/// may be in neither.
fn is_whole(sender: &str, moved: u64, recorded: u64, unread: &[Event]) -> Result<()> {
    let accounted = recorded + sum(unread, sender);
    let slack = unread.iter().filter(|e| e.text("sender") == sender).count() as u64;
    ensure!(
        accounted <= moved && moved - accounted <= slack,
        "{moved} bytes from the {sender}, accounted for {accounted}: {}",
        shown(unread)
    );
    Ok(())
}

/// Every recorded answer is one of the client's, in its order.
fn is_part_of(calls: &[Call], known: &[Call]) -> Result<()> {
    let mut known = known.iter();
    for call in calls.iter().filter(|c| c.is_answered()) {
        ensure!(known.any(|k| k == call), "invented, or out of order: {call:?}");
    }
    Ok(())
}
