//! What is enforced outlives the sensor, whatever becomes of it, and one version
//! takes over from another without a gap.

use anyhow::{Context, Result, ensure};
use mcp_sensor_tests::bed::{Bed, LIMIT};
use mcp_sensor_tests::frame::{Frame, L4};
use mcp_sensor_tests::network::Family;
use mcp_sensor_tests::peer::{OTHER_PORT, PORT};
use mcp_sensor_tests::policy::{NONE, Policy, WIRE};
use mcp_sensor_tests::run::Running;
use mcp_sensor_tests::sensor::{SOON, Sensor, binary, other_binary};
use mcp_sensor_tests::spec::must;
use nix::sys::signal::Signal;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// As an operator runs it.
const STAYS: (&str, &str) = ("MCP_SENSOR_RELEASE_ON_EXIT", "false");

fn stays() -> Vec<(&'static str, PathBuf)> {
    vec![(STAYS.0, STAYS.1.into())]
}

fn attempt(name: &str, port: u16, rest: &[&str]) -> Vec<String> {
    let to = Family::V4.allowed().to_string();
    let all = [name, "--to", &to, "--port", &port.to_string(), "--"];
    all.iter().chain(rest).map(ToString::to_string).collect()
}

fn to_other_port(frame: &Frame) -> bool {
    match frame {
        Frame::Ip { l4, .. } => match l4 {
            L4::Tcp { dst, .. } | L4::Udp { dst, .. } => *dst == OTHER_PORT,
            // The kernel's own answer where an echo finds its socket closed.
            L4::Icmp(3) => false,
            _ => true,
        },
        _ => true,
    }
}

fn pid_max() -> Result<u32> {
    Ok(fs::read_to_string("/proc/sys/kernel/pid_max")?.trim().parse()?)
}

/// Killed, told to end, and replaced by one whose maps are laid out differently,
/// in turns, under servers that hammer.
fn hammered(rounds: usize) {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        sensor.kill()?;
        sensor.launch_in(&[], &stays())?;
        let denied =
            attempt("as-hammer", OTHER_PORT, &["tcp-connect", "udp-burst", "raw-udp", "kept", "kept"]);
        let denied = bed.start_until_ready(bed.labelled_attempt(&sensor, WIRE, &denied)?)?;
        let allowed = attempt("as-hammer", PORT, &["tcp-connect", "udp-sendto", "kept"]);
        let allowed = bed.start_until_ready(bed.labelled_attempt(&sensor, WIRE, &allowed)?)?;
        let (other, capacity) = (other_binary(), pid_max()?);
        for round in 0..rounds {
            if round % 3 == 2 {
                sensor.stop()?;
            } else {
                sensor.kill()?;
            }
            // Another size of the label map is another layout; so is another build.
            let size = (capacity + if round % 2 == 0 { 64 } else { 0 }).to_string();
            let mut environment = stays();
            if let Some(other) = other.as_ref().filter(|_| round % 2 == 0) {
                environment.push(("MCP_SENSOR_BIN", other.clone()));
            }
            sensor
                .launch_in(&["--label-capacity", &size], &environment)
                .with_context(|| format!("round {round}"))?;
            let through: Vec<Frame> = bed.frames()?.into_iter().filter(to_other_port).collect();
            ensure!(through.is_empty(), "round {round}: {} frames, {:?}", through.len(), through[0]);
        }
        let tried = bed.finish(allowed)?;
        ensure!(tried.report.answered(), "what is allowed: {}", tried.report);
        let seen = tried.frames.len();
        ensure!(!tried.frames.iter().any(to_other_port), "{:?}", tried.frames);
        let tried = bed.finish(denied)?;
        ensure!(tried.report.errno() == Some(libc::EPERM), "what is denied: {}", tried.report);
        ensure!(!tried.frames.iter().any(to_other_port), "{:?}", tried.frames);
        ensure!(seen > 0, "proves nothing: no frame of what is allowed");
        Ok(())
    });
}

#[test]
fn five_times_killed_and_replaced_nothing_gets_through_and_nothing_is_denied_wrongly() {
    hammered(5);
}

#[test]
#[ignore = "minutes"]
fn a_hundred_times_killed_and_replaced_nothing_gets_through_and_nothing_is_denied_wrongly() {
    hammered(100);
}

#[test]
fn a_clean_end_leaves_what_is_enforced_and_tells_on_return_what_happened() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        sensor.kill()?;
        sensor.launch_in(&[], &stays())?;
        let command = attempt("as-hammer", OTHER_PORT, &["udp-burst"]);
        let server = bed.start_until_ready(bed.labelled_attempt(&sensor, WIRE, &command)?)?;
        let quiet = attempt("as-hammer", PORT, &[]);
        let quiet = bed.start_until_ready(bed.labelled_attempt(&sensor, NONE, &quiet)?)?;
        sensor.stop()?;
        // Long enough for more denials than one agent's last look missed.
        std::thread::sleep(Duration::from_millis(500));
        let tried = bed.finish(server)?;
        ensure!(tried.report.errno() == Some(libc::EPERM), "{}", tried.report);
        ensure!(tried.frames.is_empty(), "{} frames", tried.frames.len());
        sensor.launch_in(&[], &stays())?;
        let back = sensor.events().wait_for("what happened meanwhile", SOON, |e| {
            e.text("phase") == "started"
                && e.0.get("away").is_some_and(|a| !a["servers"].as_array().is_none_or(Vec::is_empty))
        })?;
        let servers = back.0["away"]["servers"].as_array().context("servers")?;
        ensure!(servers.len() == 1 && servers[0]["server"] == WIRE, "{servers:?}");
        ensure!(servers[0]["denied"].as_u64() > Some(100), "{servers:?}");
        bed.finish(quiet)?;
        Ok(())
    });
}

#[test]
fn a_start_that_was_interrupted_anywhere_hands_over_to_the_next() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        let denied = attempt("as-hammer", OTHER_PORT, &["tcp-connect", "udp-burst", "kept"]);
        let denied = bed.start_until_ready(bed.labelled_attempt(&sensor, WIRE, &denied)?)?;
        sensor.kill()?;
        let capacity = pid_max()?;
        for round in 0..12u32 {
            let mut command = Command::new(binary()?);
            command.args(["run", "--label-capacity", &(capacity + 64 * (round % 2)).to_string()]);
            command.arg("--policy").arg(sensor.policy_path()).arg("--control").arg(sensor.control_path());
            command
                .arg("--state-dir")
                .arg(sensor.folder().join("state"))
                .arg("--cgroup")
                .arg(bed.cgroup.path());
            let starting = Running::start(command)?;
            std::thread::sleep(Duration::from_millis(u64::from(round) * 60));
            starting.signal(Signal::SIGKILL)?;
            starting.finish(LIMIT)?;
        }
        sensor.launch(&[])?;
        let tried = bed.finish(denied)?;
        ensure!(tried.report.errno() == Some(libc::EPERM), "{}", tried.report);
        ensure!(tried.frames.is_empty(), "{} frames", tried.frames.len());
        let left: Vec<_> = fs::read_dir(sensor.pins())?.flatten().map(|e| e.file_name()).collect();
        ensure!(left.len() == 1, "{left:?}");
        ensure!(sensor.command(&["status", "--check"])?.status.code() == Some(0), "not ready");
        Ok(())
    });
}

#[test]
fn release_lets_go_and_refuses_while_a_sensor_runs() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        let state = sensor.folder().join("state").display().to_string();
        let release = |more: &[&str]| sensor.command(&[&["release", "--state-dir", &state], more].concat());
        let refused = release(&[])?;
        ensure!(refused.status.code() == Some(5) && refused.stderr.contains("--force"), "{}", refused.stderr);
        sensor.kill()?;
        ensure!(sensor.pins().exists(), "a killed sensor leaves its pins");
        let released = sensor.cli(&["release", "--state-dir", &state, "-o", "json"])?;
        ensure!(released["released"] == true && released["links"].as_u64() >= Some(15), "{released}");
        ensure!(!sensor.pins().exists(), "pins stay");
        let nothing = sensor.cli(&["release", "--state-dir", &state, "-o", "json"])?;
        ensure!(nothing["released"] == false, "{nothing}");
        let wrong = sensor.command(&["release", "--pins", "/tmp"])?;
        ensure!(wrong.status.code() == Some(2), "{:?} {}", wrong.status, wrong.stderr);
        Ok(())
    });
}

#[test]
fn two_sensors_do_not_share_a_state_directory() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        let mut second = Command::new(binary()?);
        second.arg("run").arg("--policy").arg(sensor.policy_path()).arg("--cgroup").arg(bed.cgroup.path());
        second.arg("--control").arg(sensor.folder().join("second.sock"));
        second.arg("--state-dir").arg(sensor.folder().join("state"));
        let done = Running::start(second)?.finish(LIMIT)?;
        ensure!(done.status.code() == Some(1) && done.stderr.contains("runs already"), "{}", done.stderr);
        ensure!(sensor.command(&["status", "--check"])?.status.code() == Some(0), "the first is not ready");
        Ok(())
    });
}
