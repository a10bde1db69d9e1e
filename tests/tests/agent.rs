//! The agent under attack, overloaded, or dead.

use anyhow::{Result, ensure};
use mcp_sensor_tests::bed::{Bed, LIMIT, Tried};
use mcp_sensor_tests::network::Family;
use mcp_sensor_tests::peer::PORT;
use mcp_sensor_tests::policy::{NONE, OPEN, Policy, WIRE};
use mcp_sensor_tests::run::Running;
use mcp_sensor_tests::sensor::{SOON, Sensor, binary};
use mcp_sensor_tests::spec::must;
use nix::sys::signal::Signal;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const COPY: &str = "copy";

fn to(name: &str, address: std::net::IpAddr, rest: &[&str]) -> Vec<String> {
    let mut all =
        vec![name.to_string(), "--to".into(), address.to_string(), "--port".into(), PORT.to_string()];
    all.push("--".into());
    all.extend(rest.iter().map(|r| r.to_string()));
    all
}

fn denied(name: &str, rest: &[&str]) -> Vec<String> {
    to(name, Family::V4.denied(), rest)
}

fn with_copy(program: &Path) -> Policy {
    let rule = format!("match: [{{exe: \"{}\"}}]", program.display());
    Policy::standard().server(COPY, "none", "enforce", &rule)
}

#[test]
fn verdicts_go_on_after_kill_9() {
    must(|| {
        let bed = Bed::new()?;
        let program = bed.copy_of_attempt("server")?;
        let sensor = Sensor::start(&bed, &with_copy(&program))?;
        // One that is labelled already and tries later, one that floods throughout.
        let mut pause = denied("tcp-connect", &[]);
        pause.insert(1, "--pause".into());
        let mut waiting = bed.start_until_ready(bed.labelled_attempt(&sensor, NONE, &pause)?)?;
        let flood = bed.labelled_attempt(&sensor, NONE, &denied("as-flood", &["udp-burst"]))?;
        let flood = bed.start_until_ready(flood)?;
        sensor.kill()?;
        waiting.say("go")?;
        let tried = bed.finish(waiting)?;
        ensure!(tried.report.errno() == Some(libc::EPERM), "labelled before: {}", tried.report);
        ensure!(tried.frames.is_empty(), "labelled before: {:?}", tried.frames);
        // A new server is matched by the exec rule that stands in the kernel.
        let mut command = bed.command(&program)?;
        command.args(denied("udp-sendto", &[]));
        let tried = bed.try_out(command)?;
        ensure!(tried.report.errno() == Some(libc::EPERM), "started after: {}", tried.report);
        ensure!(tried.frames.is_empty(), "started after: {:?}", tried.frames);
        let tried = bed.finish(flood)?;
        ensure!(tried.report.errno() == Some(libc::EPERM), "flood: {}", tried.report);
        ensure!(tried.frames.is_empty(), "flood: {} frames", tried.frames.len());
        let tried = bed.try_out(bed.attempt(&denied("udp-sendto", &[]))?)?;
        ensure!(tried.report.answered(), "unlabelled, while the agent is dead: {}", tried.report);
        Ok(())
    });
}

#[test]
fn a_restart_after_kill_9_opens_no_gap_and_records_again() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        let flood = bed.labelled_attempt(&sensor, NONE, &denied("as-flood", &["udp-burst"]))?;
        let flood = bed.start_until_ready(flood)?;
        for _ in 0..3 {
            sensor.kill()?;
            sensor.launch(&[])?;
        }
        let tried = bed.finish(flood)?;
        ensure!(tried.frames.is_empty(), "{} frames around the restarts", tried.frames.len());
        let tried = bed.try_out(bed.labelled_attempt(&sensor, WIRE, &denied("tcp-connect", &[]))?)?;
        ensure!(tried.frames.is_empty(), "{:?}", tried.frames);
        sensor.events().wait_for("a denial after the restart", SOON, |e| e.is_denial_of(WIRE))?;
        Ok(())
    });
}

/// Writes over its own argv the words that make an unrestricted server, as npx
/// does with its own; then the agent starts anew and looks at what runs.
#[test]
fn a_server_that_renames_itself_keeps_its_label_over_a_restart() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        let rest = ["udp-sendto", "attempt", "x", "%mcp-unrestricted-server"];
        let command = bed.labelled_attempt(&sensor, NONE, &denied("as-renamed", &rest))?;
        let mut server = bed.start_until_ready(command)?;
        sensor.kill()?;
        sensor.launch(&[])?;
        server.say("go")?;
        let tried = bed.finish(server)?;
        ensure!(tried.frames.is_empty(), "{} {:?}", tried.report, tried.frames);
        Ok(())
    });
}

/// No thread group id of today is below 64: no label has a place.
#[test]
fn a_label_without_a_place_denies_the_whole_tree_and_is_counted() {
    must(|| {
        let bed = Bed::new()?;
        let program = bed.copy_of_attempt("server")?;
        let rule = format!("match: [{{exe: \"{}\"}}]", program.display());
        let policy = Policy::standard().server(COPY, "wire", "enforce", &rule);
        let sensor = Sensor::start_with(&bed, &policy, &["--label-capacity", "64"])?;
        let crowd = |address| to("as-crowd", address, &["udp-burst", "300"]);
        for address in [Family::V4.allowed(), Family::V4.denied()] {
            let mut command = bed.command(&program)?;
            command.args(crowd(address));
            let tried = bed.try_out(command)?;
            ensure!(tried.report.errno() == Some(libc::EPERM), "to {address}: {}", tried.report);
            ensure!(tried.frames.is_empty(), "{} frames, first {:?}", tried.frames.len(), tried.frames[0]);
        }
        sensor.events().wait_for("labels without a place", SOON, |e| {
            e.text("type") == "loss" && e.text("reason") == "label_overflow" && e.number("count") > Some(100)
        })?;
        let tried = bed.try_out(bed.attempt(&denied("udp-sendto", &[]))?)?;
        ensure!(tried.report.answered(), "unlabelled, while the map is full: {}", tried.report);

        let tried = bed.try_out(bed.attempt(&crowd(Family::V4.denied()))?)?;
        ensure!(tried.frames.len() >= 300, "proves nothing: unlabelled, {} frames", tried.frames.len());
        Ok(())
    });
}

#[test]
fn a_server_at_the_control_socket_is_refused() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        let control = sensor.control_path();
        let client = |server: Option<&str>, arguments: &[&str]| -> Result<Option<i32>> {
            let mut command = match server {
                Some(server) => bed.labelled(&sensor, server, binary()?)?,
                None => bed.command(binary()?)?,
            };
            command.args(arguments).env("MCP_SENSOR_CONTROL", &control);
            Ok(Running::start(command)?.finish(LIMIT)?.status.code())
        };
        const REFUSED: Option<i32> = Some(5);
        let calls: [&[&str]; 4] =
            [&["status"], &["servers"], &["policy", "show"], &["mode", "--server", NONE, "audit"]];
        for call in calls {
            for server in [NONE, WIRE, OPEN] {
                let code = client(Some(server), call)?;
                ensure!(code == REFUSED, "{server}: {call:?} ends with {code:?}");
            }
        }
        for call in &calls[..3] {
            ensure!(client(None, call)? == Some(0), "proves nothing: unlabelled, {call:?} fails");
        }
        Ok(())
    });
}

/// The label is looked up per request, not only when the connection is made.
#[test]
fn a_control_connection_from_before_the_label_is_refused() {
    must(|| {
        let bed = Bed::new()?;
        let heir = bed.copy_of_attempt("heir")?;
        let sensor = Sensor::start(&bed, &with_copy(&heir))?;
        let control = sensor.control_path();
        let ask = |program: &Path| -> Result<Tried> {
            let mut all = vec!["control-then-exec".into(), "--program".into(), program.display().to_string()];
            all.extend(["--".into(), "control-ask-inherited".into(), control.display().to_string()]);
            let mut running = bed.start_until_ready(bed.attempt(&all)?)?;
            running.say("go")?;
            bed.finish(running)
        };
        let tried = ask(&heir)?;
        ensure!(!tried.report.answered(), "a server was answered");
        let tried = ask(&bed.copy_of_attempt("nobody")?)?;
        ensure!(tried.report.answered(), "proves nothing: unlabelled, {}", tried.report);
        Ok(())
    });
}

#[test]
fn a_server_cannot_launch_itself_as_another() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        let launch = |first: &str| -> Result<(Vec<_>, Option<i32>)> {
            let mut command = bed.labelled(&sensor, first, binary()?)?;
            command.arg("exec").arg("--control").arg(sensor.control_path());
            command.args(["--server", OPEN, "--"]).arg(mcp_sensor_tests::run::built("attempt")?);
            command.args(denied("udp-sendto", &[]));
            let done = Running::start(command)?.finish(LIMIT)?;
            Ok((bed.frames()?, done.status.code()))
        };
        let (frames, code) = launch(NONE)?;
        ensure!(frames.is_empty() && code != Some(0), "exit {code:?}, {frames:?}");
        Ok(())
    });
}

#[test]
fn a_flood_of_denials_does_not_hide_anothers_single_one() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        // Another destination port each time: no two are repeats of each other.
        let mut floods = Vec::new();
        for _ in 0..2 {
            let rest = ["udp-burst", "spread"];
            let command = bed.labelled_attempt(&sensor, NONE, &denied("as-flood", &rest))?;
            floods.push(bed.start_until_ready(command)?);
        }
        sensor.events().wait_for("the flood", SOON, |e| e.is_denial_of(NONE))?;
        for round in 0..5 {
            let mut once = denied("tcp-connect", &[]);
            once[4] = (9000 + round).to_string();
            let tried = bed.try_out(bed.labelled_attempt(&sensor, WIRE, &once)?)?;
            ensure!(tried.frames.is_empty(), "{:?}", tried.frames);
            sensor.events().wait_for("the single denial", SOON, |e| {
                e.is_denial_of(WIRE) && e.number("dst.port") == Some(9000 + round)
            })?;
        }
        for flood in floods {
            let tried = bed.finish(flood)?;
            ensure!(tried.frames.is_empty(), "{} frames", tried.frames.len());
        }
        sensor.events().wait_for("what the flood lost", SOON + SOON, |e| {
            e.text("type") == "loss" && e.number("count") > Some(0)
        })?;
        ensure!(sensor.is_alive()?, "the sensor is dead");
        Ok(())
    });
}

#[test]
fn repeats_of_one_denial_are_counted_not_sent() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        let command = bed.labelled_attempt(&sensor, NONE, &denied("as-flood", &["udp-burst"]))?;
        let flood = bed.start_until_ready(command)?;
        sensor.events().wait_for("the repeats", SOON + SOON, |e| {
            e.text("type") == "repeat" && e.text("server") == NONE && e.number("count") > Some(100)
        })?;
        bed.finish(flood)?;
        let first = sensor.events().denials_of(NONE)?;
        ensure!(first.len() <= 3, "{} events for one denial", first.len());
        Ok(())
    });
}

/// Still answers and still records.
fn works(bed: &Bed, sensor: &Sensor, port: u16) -> Result<()> {
    ensure!(sensor.is_alive()?, "the sensor is dead");
    sensor.status()?;
    let mut once = denied("tcp-connect", &[]);
    once[4] = port.to_string();
    bed.try_out(bed.labelled_attempt(sensor, NONE, &once)?)?;
    sensor
        .events()
        .wait_for("a denial", SOON, |e| e.is_denial_of(NONE) && e.number("dst.port") == Some(port.into()))?;
    Ok(())
}

#[test]
fn garbage_at_the_control_socket_harms_nothing() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        let mut noise = Vec::new();
        let mut state = 0x2545_f491_4f6c_dd1du64;
        for _ in 0..8192 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            noise.extend(state.to_le_bytes());
        }
        let mut held = Vec::new();
        for round in 0..64 {
            let mut stream = UnixStream::connect(sensor.control_path())?;
            stream.set_write_timeout(Some(Duration::from_secs(1)))?;
            let start = noise.len() / 64 * round;
            if round % 2 == 0 {
                let _ = stream.write_all(preface);
            }
            // A peer that hangs up in the middle is an answer, too.
            let _ = stream.write_all(&noise[start..]);
            if round % 3 == 0 {
                held.push(stream);
            }
        }
        works(&bed, &sensor, 9100)
    });
}

#[test]
fn clients_that_stop_reading_hold_up_nobody() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        let mut stopped = Vec::new();
        for _ in 0..4 {
            let mut command = Command::new(binary()?);
            command
                .args(["events", "--follow", "-o", "json"])
                .env("MCP_SENSOR_CONTROL", sensor.control_path());
            let client = Running::start(command)?;
            client.signal(Signal::SIGSTOP)?;
            stopped.push(client);
        }
        let flood = bed.labelled_attempt(&sensor, NONE, &denied("as-flood", &["udp-burst", "spread"]))?;
        let flood = bed.start_until_ready(flood)?;
        let until = Instant::now() + Duration::from_secs(3);
        let mut round = 0;
        while Instant::now() < until {
            let mut once = denied("tcp-connect", &[]);
            once[4] = (9200 + round).to_string();
            bed.try_out(bed.labelled_attempt(&sensor, WIRE, &once)?)?;
            sensor.events().wait_for("a denial in time", SOON, |e| {
                e.is_denial_of(WIRE) && e.number("dst.port") == Some(9200 + round)
            })?;
            round += 1;
        }
        bed.finish(flood)?;
        for client in stopped {
            client.signal(Signal::SIGCONT)?;
            client.signal(Signal::SIGTERM)?;
        }
        works(&bed, &sensor, 9300)
    });
}

/// Whoever has no label may ask, also where the label map is too small for it.
#[test]
fn status_answers_the_unlabelled_while_labels_have_no_place() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start_with(&bed, &Policy::standard(), &["--label-capacity", "64"])?;
        sensor.status().map(drop)
    });
}

/// What is to be executed may be what an `argv` rule looks for.
#[test]
fn exec_launches_a_command_that_a_rule_matches() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        let mut all = to("tcp-connect", Family::V4.denied(), &[]);
        all.push(mcp_sensor_tests::policy::OPEN_ARGUMENT.into());
        let tried = bed.try_out(bed.labelled_attempt(&sensor, OPEN, &all)?)?;
        ensure!(tried.report.answered(), "{}", tried.report);
        Ok(())
    });
}
