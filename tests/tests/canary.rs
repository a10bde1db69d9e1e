//! The sensor's proof that servers are held, and what it says when they are not.

use anyhow::{Result, ensure};
use mcp_sensor_tests::bed::Bed;
use mcp_sensor_tests::link::{detach, pinned};
use mcp_sensor_tests::policy::{NONE, Policy};
use mcp_sensor_tests::sensor::Sensor;
use mcp_sensor_tests::spec::must;
use std::time::{Duration, Instant};

/// Loaded machines included; the canary flies every second here.
const SOON: Duration = Duration::from_secs(30);
const EVERY_SECOND: [&str; 2] = ["--canary-interval", "1"];

fn started(bed: &Bed, arguments: &[&str]) -> Result<Sensor> {
    Sensor::start_with(bed, &Policy::standard(), arguments)
}

#[test]
fn a_start_is_proven_and_the_canary_is_no_event() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = started(&bed, &EVERY_SECOND)?;
        // A server in another namespace than the sensor's.
        let command = bed.labelled_attempt(&sensor, NONE, &["udp-sendto".into(), "--pause".into()])?;
        let _server = bed.start_until_ready(command)?;
        let state = sensor.events().wait_for("the start", SOON, |e| e.text("phase") == "started")?;
        ensure!(!state.text("proven").is_empty(), "{}", state.0);
        ensure!(state.number("enforced") == Some(3) && state.number("audited") == Some(1), "{}", state.0);
        std::thread::sleep(Duration::from_millis(2500));
        let healthy = sensor.command(&["status", "--check"])?;
        ensure!(healthy.status.code() == Some(0), "{:?} {}", healthy.lines, healthy.stderr);
        let tasks = sensor.labelled_tasks()?;
        ensure!(tasks == 1, "{tasks} labelled tasks");
        for event in sensor.events().all()? {
            let about =
                ["connection", "socket", "exec", "instance_started", "instance_ended", "connection_end"];
            let of = event.text("server");
            ensure!(!about.contains(&event.text("type")) || of == NONE, "{}", event.0);
            ensure!(event.text("severity") != "critical", "{}", event.0);
        }
        Ok(())
    });
}

/// Of the hooks alone: where one of sendmsg is gone, the packet hook gives the
/// same answer, and only `hook_detached` tells.
fn is_told(hook: &str, what: &str) {
    must(|| {
        let bed = Bed::new()?;
        let sensor = started(&bed, &EVERY_SECOND)?;
        detach(&pinned(&sensor.pins(), hook)?)?;
        let finding = sensor.events().wait_for("the alarm", SOON, |e| e.text("kind") == "not_enforced")?;
        ensure!(finding.text("severity") == "critical", "{}", finding.0);
        ensure!(finding.text("detail").contains(what), "{}", finding.0);
        sensor.events().wait_for("the hook", SOON, |e| {
            e.text("kind") == "hook_detached" && e.text("detail").contains(&format!("`{hook}`"))
        })?;
        let deadline = Instant::now() + SOON;
        loop {
            let checked = sensor.command(&["status", "--check"])?;
            if checked.status.code() == Some(9) && checked.lines.iter().any(|l| l.contains(what)) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "status says {:?}", checked.lines);
            std::thread::sleep(Duration::from_millis(50));
        }
    });
}

#[test]
fn a_packet_hook_that_is_gone_is_an_alarm() {
    is_told("egress", "a packet over IPv4");
}

#[test]
fn a_connect_hook_that_is_gone_is_an_alarm() {
    is_told("connect4", "a TCP connect over IPv4");
}
