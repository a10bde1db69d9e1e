//! Servers known by their cgroup: a systemd unit, a container.

use anyhow::{Result, ensure};
use mcp_sensor_tests::bed::{Bed, LIMIT};
use mcp_sensor_tests::network::Family;
use mcp_sensor_tests::peer::PORT;
use mcp_sensor_tests::policy::Policy;
use mcp_sensor_tests::run::Running;
use mcp_sensor_tests::sensor::{SOON, Sensor};
use mcp_sensor_tests::spec::must;
use std::fs;

const UNIT: &str = "mcp-test.service";
const SERVER: &str = "unit";

/// A shell moves itself into `below` of the unit and connects, by its own
/// socket call or by a program it execs.
fn moved(below: &str, connect: &str) -> Result<()> {
    let bed = Bed::new()?;
    let rule = format!("match: [{{unit: {UNIT}}}]");
    let sensor = Sensor::start(&bed, &Policy::standard().server(SERVER, "none", "enforce", &rule))?;
    let inside = bed.cgroup.path().join(UNIT).join(below);
    fs::create_dir_all(&inside)?;
    let script = |procs: &str| format!("echo $$ > {procs}/cgroup.procs || exit 9; {connect}");
    let run = |procs: &str| -> Result<()> {
        let mut command = bed.command("bash")?;
        command.arg("-c").arg(script(procs));
        Running::start(command)?.finish(LIMIT).map(drop)
    };

    // The same beside the unit reaches the peer, or the test proves nothing.
    let beside = bed.cgroup.path().join("other.service");
    fs::create_dir_all(&beside)?;
    run(&beside.display().to_string())?;
    ensure!(!bed.frames()?.is_empty(), "beside the unit it does not reach the peer");

    run(&inside.display().to_string())?;
    let frames = bed.frames()?;
    ensure!(frames.is_empty(), "{} frames from the unit, first {:?}", frames.len(), frames.first());
    sensor.events().wait_for("a denial", SOON, |e| e.is_denial_of(SERVER))?;
    let started = sensor.events().wait_for("an instance", SOON, |e| {
        e.text("type") == "instance_started" && e.text("server") == SERVER
    })?;
    ensure!(started.text("evidence").contains(UNIT), "evidence: {}", started.text("evidence"));
    drop(sensor);
    for dir in [inside, bed.cgroup.path().join(UNIT), beside] {
        let _ = fs::remove_dir(dir);
    }
    Ok(())
}

fn own_socket() -> String {
    format!("exec 3<>/dev/tcp/{}/{PORT}", Family::V4.allowed())
}

#[test]
fn a_process_moved_into_a_unit_is_held_without_an_exec() {
    must(|| moved("", &own_socket()));
}

#[test]
fn a_process_moved_below_a_unit_is_held() {
    must(|| moved("child/of/it", &own_socket()));
}

#[test]
fn a_program_started_in_a_unit_is_held() {
    must(|| moved("", &format!("bash -c '{}'", own_socket())));
}
