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
use std::time::Instant;

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

/// Everything that the client knows is recorded, over every link given.
fn is_recorded(how: &[&str], links: &[Link], sizes: &[usize]) -> Result<()> {
    let world = World::new()?;
    let sensor = &world.sensor;
    for link in links {
        let mark = sensor.mark()?;
        let (log, _) = talk(world.wire(how, *link)?, sizes)?;
        ensure!(log.calls.len() == sizes.len() + 40, "proves nothing: {} calls", log.calls.len());
        sensor.knows(mark, SPEAKER, &log).with_context(|| format!("{how:?} over {link:?}"))?;
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

macro_rules! recorded {
    ($($name:ident: $how:literal, [$($link:ident),+];)+) => {$(
        #[test]
        fn $name() {
            must(|| {
                let how: Vec<&str> = $how.split(' ').collect();
                is_recorded(&how, &[$($link),+], &SIZES)
            });
        }
    )+};
}

recorded! {
    write_and_read_are_recorded: "--write write --read read", [Pipes, Sockets];
    writev_and_readv_are_recorded: "--write writev --read readv", [Pipes, Sockets];
    pwritev2_and_preadv2_are_recorded: "--write pwritev2 --read preadv2", [Pipes, Sockets];
    send_and_recv_are_recorded: "--write send --read recv", [Sockets];
    sendto_and_recvfrom_are_recorded: "--write sendto --read recvfrom", [Sockets];
    sendmsg_and_recvmsg_are_recorded: "--write sendmsg --read recvmsg", [Sockets];
    sendmmsg_and_recvmmsg_are_recorded: "--write sendmmsg --read recvmmsg --shape pieces", [Sockets];
    what_was_peeked_at_first_is_recorded_once: "--read peek", [Sockets];
    partial_writes_without_blocking_are_recorded: "--write nonblocking --read nonblocking", [Pipes, Sockets];
    several_pieces_of_one_message_are_recorded: "--write writev --shape pieces", [Pipes, Sockets];
    forty_messages_in_one_writev_are_recorded: "--write writev --shape together", [Pipes, Sockets];
    a_duplicated_wire_is_recorded: "--fds dup", [Pipes, Sockets];
    a_wire_moved_beyond_100_is_recorded: "--fds high", [Pipes, Sockets];
    a_wire_opened_anew_is_recorded: "--fds reopen", [Pipes];
    a_wire_passed_over_a_socket_is_recorded: "--fds passed", [Pipes, Sockets];
    a_child_that_inherited_the_wire_is_recorded: "--by child", [Pipes, Sockets];
    several_threads_are_recorded: "--by threads", [Pipes, Sockets];
}

#[test]
fn one_byte_for_each_write_is_recorded() {
    must(|| is_recorded(&["--shape", "bytes"], &[Pipes, Sockets], &[1, 300]));
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
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

/// Every byte that the server wrote is counted, and no answer is invented.
fn is_counted(how: &[&str], name: &str, links: &[Link]) -> Result<()> {
    let world = World::new()?;
    let sensor = &world.sensor;
    for link in links {
        let mark = sensor.mark()?;
        let (log, received) = talk(world.wire(how, *link)?, &SIZES)?;
        wait_for_unread(sensor, mark, name, "server", received)?;
        let events = sensor.exactly(mark, "tool_call", SPEAKER, log.calls.len())?;
        let answered: Vec<_> =
            events.iter().filter(|e| e.text("outcome") != "no_response").cloned().collect();
        ensure!(answered.is_empty(), "answers that nobody read: {}", shown(&answered));
        ensure!(
            events.iter().zip(&log.calls).all(|(e, c)| e.number("request_bytes") == Some(c.request_bytes))
        );
        let others = sensor.since(mark, "uninspected", SPEAKER)?;
        ensure!(others.iter().all(|e| e.text("how") == name), "{}", shown(&others));
    }
    Ok(())
}

#[test]
fn spliced_answers_are_counted() {
    must(|| is_counted(&["--write", "splice"], "splice", &[Pipes, Sockets]));
}

#[test]
fn vmspliced_answers_are_counted() {
    must(|| is_counted(&["--write", "vmsplice"], "vmsplice", &[Pipes]));
}

#[test]
fn answers_by_tee_are_counted() {
    must(|| is_counted(&["--write", "tee"], "tee", &[Pipes]));
}

#[test]
fn answers_by_sendfile_are_counted() {
    must(|| is_counted(&["--write", "sendfile"], "sendfile", &[Pipes, Sockets]));
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

/// By io_uring: recorded where functions of the kernel are watched, counted
/// where only system calls are.
fn is_recorded_or_counted(how: &[&str], links: &[Link]) -> Result<Claim> {
    let world = World::new()?;
    let sensor = &world.sensor;
    if let Err(e) = io_uring::IoUring::new(4) {
        return Ok(Claim::Skipped(format!("io_uring_setup: {e}")));
    }
    for link in links {
        let mark = sensor.mark()?;
        let mut wire = world.wire(how, *link)?;
        wire.initialize()?;
        for size in SIZES {
            wire.call("echo", json!({"bytes": size, "pad": "p".repeat(size)}))?;
        }
        let (received, sent) = (wire.received, wire.sent);
        let log = wire.end()?;
        if sensor.calls_are(mark, SPEAKER, &log.calls).is_ok() {
            continue;
        }
        if how.contains(&"--write") {
            wait_for_unread(sensor, mark, "io_uring", "server", received)?;
        } else {
            wait_for_unread(sensor, mark, "io_uring", "client", sent)?;
        }
        let calls = sensor.since(mark, "tool_call", SPEAKER)?;
        let invented: Vec<_> = calls.iter().filter(|e| e.text("outcome") != "no_response").cloned().collect();
        ensure!(invented.is_empty(), "invented: {}", shown(&invented));
    }
    Ok(Claim::Holds)
}

macro_rules! recorded_or_counted {
    ($($name:ident: $how:literal, [$($link:ident),+];)+) => {$(
        #[test]
        fn $name() {
            run(|| {
                let how: Vec<&str> = $how.split(' ').collect();
                is_recorded_or_counted(&how, &[$($link),+])
            });
        }
    )+};
}

recorded_or_counted! {
    writes_by_io_uring_are_recorded_or_counted: "--write uring-write", [Pipes, Sockets];
    vectors_by_io_uring_are_recorded_or_counted: "--write uring-writev", [Pipes, Sockets];
    sends_by_io_uring_are_recorded_or_counted: "--write uring-send", [Sockets];
    messages_by_io_uring_are_recorded_or_counted: "--write uring-sendmsg", [Sockets];
    reads_by_io_uring_are_recorded_or_counted: "--read uring-read", [Pipes, Sockets];
    vectors_read_by_io_uring_are_recorded_or_counted: "--read uring-readv", [Pipes, Sockets];
    receiving_by_io_uring_is_recorded_or_counted: "--read uring-recv", [Sockets];
    messages_received_by_io_uring_are_recorded_or_counted: "--read uring-recvmsg", [Sockets];
}
