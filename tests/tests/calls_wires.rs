//! Whatever call moves a server's bytes: what they said is recorded, or, where
//! no program can read them, how many they were.

use anyhow::{Context, Result, ensure};
use mcp_sensor_tests::bed::Bed;
use mcp_sensor_tests::mcp::events::{Mark, shown};
use mcp_sensor_tests::mcp::log::Log;
use mcp_sensor_tests::mcp::speaker::Speaker;
use mcp_sensor_tests::mcp::wire::{Link, Wire};
use mcp_sensor_tests::policy::Policy;
use mcp_sensor_tests::run::built;
use mcp_sensor_tests::sensor::{SOON, Sensor};
use mcp_sensor_tests::spec::{Claim, must, run};
use serde_json::json;
use std::time::{Duration, Instant};

use Link::{Pipes, Sockets};

/// The server that is talked to, and one more that keeps the sensor listening.
struct World {
    bed: Bed,
    sensor: Sensor,
    speaker: Speaker,
    _awake: Option<Wire>,
}

const SPEAKER: &str = "speaker";

impl World {
    fn new() -> Result<World> {
        World::with(true)
    }

    fn with(companion: bool) -> Result<World> {
        let bed = Bed::new()?;
        let (speaker, other) = (Speaker::new(&bed, SPEAKER)?, Speaker::new(&bed, "companion")?);
        let sensor = Sensor::start(&bed, &other.declared(speaker.declared(Policy::default())))?;
        let awake = if companion { Some(Wire::companion(&bed, &sensor, &other)?) } else { None };
        Ok(World { bed, sensor, speaker, _awake: awake })
    }

    fn wire(&self, how: &[&str], link: Link) -> Result<Wire> {
        Wire::start(self.speaker.command(&self.bed, how)?, link)
    }
}

/// Sizes around those that pipes, sockets and the sensor's own pieces have;
/// then forty requests in one piece.
fn talk(mut wire: Wire, sizes: &[usize]) -> Result<(Log, u64)> {
    wire.initialize()?;
    for size in sizes {
        wire.call("echo", json!({"bytes": size, "pad": "p".repeat(*size)}))?;
    }
    let tools = ["fail", "echo", "no-such-tool"];
    let many: Vec<_> = (0..40).map(|n| wire.request_call(tools[n % 3], json!({})).1).collect();
    wire.send_together(&many)?;
    wire.answers(many.len())?;
    let received = wire.received;
    Ok((wire.end()?, received))
}

const SIZES: [usize; 7] = [1, 255, 4096, 16_384, 65_536, 70_001, 300_000];

/// One way of moving bytes, and the links that it works over.
type Way = (&'static str, &'static [Link]);

const BOTH: &[Link] = &[Pipes, Sockets];

fn arguments(how: &str) -> Vec<&str> {
    how.split_whitespace().collect()
}

/// Everything that the client knows is recorded, in each of these ways.
fn are_recorded(ways: &[Way], sizes: &[usize]) -> Result<()> {
    let world = World::new()?;
    for (how, links) in ways {
        for link in *links {
            let mark = world.sensor.mark()?;
            let (log, _) = talk(world.wire(&arguments(how), *link)?, sizes)?;
            ensure!(log.calls.len() == sizes.len() + 40, "proves nothing: {} calls", log.calls.len());
            world.sensor.knows(mark, SPEAKER, &log).with_context(|| format!("{how} over {link:?}"))?;
        }
    }
    Ok(())
}

/// Whatever else the sensor has to do when there was none before.
#[test]
fn the_first_server_is_recorded_from_its_first_byte() {
    must(|| {
        for link in [Pipes, Sockets] {
            let world = World::with(false)?;
            let mark = world.sensor.mark()?;
            let (log, _) = talk(world.wire(&[], link)?, &SIZES)?;
            world.sensor.knows(mark, SPEAKER, &log).with_context(|| format!("{link:?}"))?;
        }
        Ok(())
    });
}

/// The label comes before the program does.
#[test]
fn a_server_that_was_launched_as_one_is_recorded() {
    must(|| {
        let world = World::new()?;
        let sensor = &world.sensor;
        for link in [Pipes, Sockets, Pipes, Sockets] {
            let mark = sensor.mark()?;
            let command = world.bed.labelled(sensor, SPEAKER, built("speak")?)?;
            let (log, _) = talk(Wire::start(command, link)?, &SIZES)?;
            sensor.knows(mark, SPEAKER, &log).with_context(|| format!("{link:?}"))?;
        }
        Ok(())
    });
}

#[test]
fn every_call_that_reads_or_writes_is_recorded() {
    must(|| {
        let ways: [Way; 3] = [
            ("--write write --read read", BOTH),
            ("--write writev --read readv", BOTH),
            ("--write pwritev2 --read preadv2", BOTH),
        ];
        are_recorded(&ways, &SIZES)
    });
}

#[test]
fn every_call_that_sends_or_receives_is_recorded() {
    must(|| {
        let ways: [Way; 4] = [
            ("--write send --read recv", &[Sockets]),
            ("--write sendto --read recvfrom", &[Sockets]),
            ("--write sendmsg --read recvmsg", &[Sockets]),
            ("--write sendmmsg --read recvmmsg --shape pieces", &[Sockets]),
        ];
        are_recorded(&ways, &SIZES)
    });
}

#[test]
fn what_was_peeked_at_first_is_recorded_once() {
    must(|| are_recorded(&[("--read peek", &[Sockets])], &SIZES));
}

/// Partly written, in several pieces, forty messages in one call.
#[test]
fn however_messages_are_cut_they_are_recorded() {
    must(|| {
        let ways: [Way; 3] = [
            ("--write nonblocking --read nonblocking", BOTH),
            ("--write writev --shape pieces", BOTH),
            ("--write writev --shape together", BOTH),
        ];
        are_recorded(&ways, &SIZES)
    });
}

#[test]
fn one_byte_for_each_write_is_recorded() {
    must(|| are_recorded(&[("--shape bytes", BOTH)], &[1, 300]));
}

/// Duplicated, moved beyond 100, opened anew, passed over a socket.
#[test]
fn wherever_its_descriptors_are_a_wire_is_recorded() {
    must(|| {
        let ways: [Way; 4] =
            [("--fds dup", BOTH), ("--fds high", BOTH), ("--fds reopen", &[Pipes]), ("--fds passed", BOTH)];
        are_recorded(&ways, &SIZES)
    });
}

#[test]
fn children_and_threads_that_write_are_recorded() {
    must(|| are_recorded(&[("--by child", BOTH), ("--by threads", BOTH)], &SIZES));
}

/// The bytes of a kind that the sensor says it did not read.
fn unread(sensor: &Sensor, mark: Mark, how: &str, sender: &str) -> Result<u64> {
    let events = sensor.since(mark, "uninspected", SPEAKER)?;
    let wanted = events.iter().filter(|e| e.text("how") == how && e.text("sender") == sender);
    Ok(wanted.filter_map(|e| e.number("bytes")).sum())
}

fn wait_for_unread(sensor: &Sensor, mark: Mark, how: &str, sender: &str, bytes: u64) -> Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let said = unread(sensor, mark, how, sender)?;
        if said == bytes {
            return Ok(());
        }
        let all = sensor.since(mark, "uninspected", SPEAKER)?;
        ensure!(
            said < bytes && Instant::now() < deadline,
            "{said} bytes unread by {how}, not {bytes}: {}",
            shown(&all)
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Every byte that the server wrote is counted, and no answer is invented.
#[test]
fn answers_that_no_program_can_read_are_counted() {
    must(|| {
        let world = World::new()?;
        let sensor = &world.sensor;
        let ways: [Way; 4] =
            [("splice", BOTH), ("vmsplice", &[Pipes]), ("tee", &[Pipes]), ("sendfile", BOTH)];
        for (name, links) in ways {
            for link in links {
                let mark = sensor.mark()?;
                let (log, received) = talk(world.wire(&["--write", name], *link)?, &SIZES)?;
                wait_for_unread(sensor, mark, name, "server", received)?;
                let events = sensor.exactly(mark, "tool_call", SPEAKER, log.calls.len())?;
                let answered: Vec<_> =
                    events.iter().filter(|e| e.text("outcome") != "no_response").cloned().collect();
                ensure!(answered.is_empty(), "answers that nobody read: {}", shown(&answered));
                let asked: Vec<u64> = events.iter().filter_map(|e| e.number("request_bytes")).collect();
                let known: Vec<u64> = log.calls.iter().map(|c| c.request_bytes).collect();
                ensure!(asked == known, "{name} over {link:?}: requests of {asked:?} bytes, not {known:?}");
                let others = sensor.since(mark, "uninspected", SPEAKER)?;
                ensure!(others.iter().all(|e| e.text("how") == name), "{}", shown(&others));
            }
        }
        Ok(())
    });
}

/// What the server took off its input without reading it.
#[test]
fn spliced_requests_are_counted() {
    must(|| {
        let world = World::new()?;
        let sensor = &world.sensor;
        for link in [Pipes, Sockets] {
            let mark = sensor.mark()?;
            let mut wire = world.wire(&["--read", "splice"], link)?;
            wire.initialize()?;
            let mut sent = 0;
            for size in SIZES {
                wire.call("echo", json!({"pad": "p".repeat(size)}))?;
            }
            sent += wire.sent;
            wire.end()?;
            wait_for_unread(sensor, mark, "splice", "client", sent)?;
            let invented = sensor.since(mark, "tool_call", SPEAKER)?;
            ensure!(invented.is_empty(), "calls that nobody read: {}", shown(&invented));
        }
        Ok(())
    });
}

/// Only every third answer is spliced: the others are recorded again after it,
/// and nothing is made of what was torn.
#[test]
fn a_stream_recovers_after_bytes_that_nobody_read() {
    must(|| {
        let world = World::new()?;
        let sensor = &world.sensor;
        for link in [Pipes, Sockets] {
            let mark = sensor.mark()?;
            let how = ["--write", "splice", "--every", "30"];
            let mut wire = world.wire(&how, link)?;
            wire.initialize()?;
            // `initialize` was answer 1; number 30 is spliced.
            for number in 2..=59 {
                wire.call("echo", json!({"bytes": number}))?;
            }
            let log = wire.end()?;
            let events = sensor.exactly(mark, "tool_call", SPEAKER, log.calls.len())?;
            let seen: Vec<_> = events.iter().map(mcp_sensor_tests::mcp::log::Call::of_event).collect();
            let lost: Vec<_> = seen.iter().filter(|c| !c.is_answered()).collect();
            // The gap, and at most the message whose beginning cannot be told.
            ensure!((1..=2).contains(&lost.len()), "without an answer: {lost:?}");
            let invented: Vec<_> =
                seen.iter().filter(|c| c.is_answered() && !log.calls.contains(c)).collect();
            ensure!(invented.is_empty(), "invented: {invented:?}");
            ensure!(seen.iter().any(|c| Some(c) == log.calls.last()), "it does not recover");
        }
        Ok(())
    });
}

/// Whether the sensor tells of bytes by io_uring that it did not read. It has
/// heard of all of them when the instance's end is told.
fn is_counted(sensor: &Sensor, mark: Mark, sender: &str) -> Result<bool> {
    let deadline = Instant::now() + SOON;
    while sensor.since(mark, "instance_ended", SPEAKER)?.is_empty() {
        if unread(sensor, mark, "io_uring", sender)? > 0 {
            return Ok(true);
        }
        ensure!(Instant::now() < deadline, "no end of the instance within {SOON:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(unread(sensor, mark, "io_uring", sender)? > 0)
}

/// By io_uring: recorded where functions of the kernel are watched, counted
/// where only system calls are.
fn are_recorded_or_counted(ways: &[Way], sender: &str) -> Result<Claim> {
    let world = World::new()?;
    let sensor = &world.sensor;
    if let Err(e) = io_uring::IoUring::new(4) {
        return Ok(Claim::Skipped(format!("io_uring_setup: {e}")));
    }
    for (how, links) in ways {
        for link in *links {
            let mark = sensor.mark()?;
            let mut wire = world.wire(&arguments(how), *link)?;
            wire.initialize()?;
            for size in SIZES {
                wire.call("echo", json!({"bytes": size, "pad": "p".repeat(size)}))?;
            }
            let moved = if sender == "server" { wire.received } else { wire.sent };
            let log = wire.end()?;
            if !is_counted(sensor, mark, sender)? {
                sensor
                    .calls_are(mark, SPEAKER, &log.calls)
                    .with_context(|| format!("{how} over {link:?}"))?;
                continue;
            }
            wait_for_unread(sensor, mark, "io_uring", sender, moved)
                .with_context(|| format!("{how} over {link:?}"))?;
            let calls = sensor.since(mark, "tool_call", SPEAKER)?;
            let invented: Vec<_> =
                calls.iter().filter(|e| e.text("outcome") != "no_response").cloned().collect();
            ensure!(invented.is_empty(), "invented: {}", shown(&invented));
        }
    }
    Ok(Claim::Holds)
}

#[test]
fn writes_by_io_uring_are_recorded_or_counted() {
    run(|| {
        let ways: [Way; 4] = [
            ("--write uring-write", BOTH),
            ("--write uring-writev", BOTH),
            ("--write uring-send", &[Sockets]),
            ("--write uring-sendmsg", &[Sockets]),
        ];
        are_recorded_or_counted(&ways, "server")
    });
}

#[test]
fn reads_by_io_uring_are_recorded_or_counted() {
    run(|| {
        let ways: [Way; 4] = [
            ("--read uring-read", BOTH),
            ("--read uring-readv", BOTH),
            ("--read uring-recv", &[Sockets]),
            ("--read uring-recvmsg", &[Sockets]),
        ];
        are_recorded_or_counted(&ways, "client")
    });
}
