//! The policy changes while servers run.

use anyhow::{Context, Result, ensure};
use mcp_sensor_tests::bed::{Bed, LIMIT};
use mcp_sensor_tests::frame::Frame;
use mcp_sensor_tests::network::Family;
use mcp_sensor_tests::peer::PORT;
use mcp_sensor_tests::policy::{AUDIT, NONE, Policy, WIRE};
use mcp_sensor_tests::run::Running;
use mcp_sensor_tests::sensor::{SOON, Sensor};
use mcp_sensor_tests::spec::must;
use std::fs;
use std::time::{Duration, Instant};

/// Retransmissions begin after 200 ms: longer than that.
const QUIET: Duration = Duration::from_millis(900);
const CHANGING: &str = "changing";

fn with_profile(profile: &str, mode: &str) -> Policy {
    Policy::standard().server(CHANGING, profile, mode, "")
}

fn arguments(name: &str, family: Family, rest: &[&str]) -> Vec<String> {
    let mut all = vec![
        name.to_string(),
        "--to".into(),
        family.allowed().to_string(),
        "--port".into(),
        PORT.to_string(),
    ];
    all.push("--".into());
    all.extend(rest.iter().map(|r| r.to_string()));
    all
}

fn starts_to_stream(bed: &Bed, sensor: &Sensor, family: Family, kind: &str) -> Result<Running> {
    let command = bed.labelled_attempt(sensor, CHANGING, &arguments("stream", family, &[kind]))?;
    let running = bed.start_until_ready(command)?;
    for _ in 0..20 {
        let sent = bed.sniffer.wait_for(SOON, |f| f.payload() > 500)?;
        ensure!(sent.is_some(), "it does not stream");
    }
    Ok(running)
}

/// No frame at all, from now until well after the first retransmission.
fn stays_silent(bed: &Bed) -> Result<()> {
    bed.frames()?;
    bed.sniffer.wait_for(QUIET, |_| false)?;
    let frames: Vec<Frame> = bed.frames()?;
    ensure!(frames.is_empty(), "{} frames, first {:?}", frames.len(), frames.first());
    Ok(())
}

fn tightened(family: Family, kind: &str) -> Result<()> {
    let bed = Bed::new()?;
    let sensor = Sensor::start(&bed, &with_profile("wire", "enforce"))?;
    let running = starts_to_stream(&bed, &sensor, family, kind)?;
    sensor.reload(&with_profile("none", "enforce"))?;
    stays_silent(&bed)?;
    sensor.events().wait_for("a denial", SOON, |e| e.is_denial_of(CHANGING))?;
    // Back again: the same socket goes on.
    sensor.reload(&with_profile("wire", "enforce"))?;
    if kind == "udp" {
        let sent = bed.sniffer.wait_for(SOON, |f| f.payload() > 500)?;
        ensure!(sent.is_some(), "allowed again, but nothing is sent");
    }
    drop(running);
    Ok(())
}

#[test]
fn tcp_v4_stream_stops_when_the_policy_is_tightened() {
    must(|| tightened(Family::V4, "tcp"));
}

#[test]
fn tcp_v6_stream_stops_when_the_policy_is_tightened() {
    must(|| tightened(Family::V6, "tcp"));
}

#[test]
fn udp_v4_stream_stops_when_the_policy_is_tightened() {
    must(|| tightened(Family::V4, "udp"));
}

#[test]
fn udp_v6_stream_stops_when_the_policy_is_tightened() {
    must(|| tightened(Family::V6, "udp"));
}

#[test]
fn a_loosened_policy_lets_the_next_connection_through() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &with_profile("none", "enforce"))?;
        let connect = || bed.labelled_attempt(&sensor, CHANGING, &arguments("tcp-connect", Family::V4, &[]));
        let tried = bed.try_out(connect()?)?;
        ensure!(tried.frames.is_empty() && tried.report.errno() == Some(libc::EPERM), "{}", tried.report);
        sensor.reload(&with_profile("wire", "enforce"))?;
        let tried = bed.try_out(connect()?)?;
        ensure!(tried.report.answered(), "{}", tried.report);
        Ok(())
    });
}

#[test]
fn audit_records_what_it_would_have_denied_and_denies_nothing() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        for name in ["tcp-connect", "udp-sendto", "udplite-sendto", "ping-sendto", "mptcp-connect"] {
            let tried =
                bed.try_out(bed.labelled_attempt(&sensor, AUDIT, &arguments(name, Family::V4, &[]))?)?;
            ensure!(tried.report.answered(), "{name}: {}", tried.report);
        }
        sensor.events().wait_for("would_deny", SOON, |e| {
            e.text("verdict") == "would_deny" && e.text("server") == AUDIT && e.text("dst.ip") == "10.77.1.2"
        })?;
        let denials = sensor.events().denials_of(AUDIT)?;
        ensure!(denials.is_empty(), "{denials:?}");
        Ok(())
    });
}

#[test]
fn enforce_after_audit_cuts_what_runs() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &with_profile("none", "audit"))?;
        let _running = starts_to_stream(&bed, &sensor, Family::V4, "tcp")?;
        sensor.reload(&with_profile("none", "enforce"))?;
        stays_silent(&bed)
    });
}

#[test]
fn the_mode_switches_by_command_while_the_server_runs() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &with_profile("none", "audit"))?;
        let _running = starts_to_stream(&bed, &sensor, Family::V6, "udp")?;
        let done = sensor.command(&["mode", "--server", CHANGING, "enforce"])?;
        ensure!(done.status.success(), "mode: {}", done.stderr);
        stays_silent(&bed)?;
        let done = sensor.command(&["mode", "--server", CHANGING, "audit"])?;
        ensure!(done.status.success(), "mode: {}", done.stderr);
        let sent = bed.sniffer.wait_for(SOON, |f| f.payload() > 500)?;
        ensure!(sent.is_some(), "audit again, but nothing is sent");
        Ok(())
    });
}

/// The sensor lives, says what is wrong, and the old policy is in force.
fn old_policy_stays(bed: &Bed, sensor: &Sensor, generation: u64) -> Result<String> {
    let deadline = Instant::now() + SOON;
    let error = loop {
        let status = sensor.status()?;
        let error = status.pointer("/policy/error").and_then(|e| e.as_str()).unwrap_or("").to_string();
        if !error.is_empty() {
            break error;
        }
        ensure!(Instant::now() < deadline, "status does not tell of the bad policy: {status}");
        std::thread::sleep(Duration::from_millis(20));
    };
    ensure!(sensor.generation()? == generation, "the generation has moved");
    ensure!(sensor.is_alive()?, "the sensor is dead");
    let connect = arguments("tcp-connect", Family::V4, &[]);
    let tried = bed.try_out(bed.labelled_attempt(sensor, NONE, &connect)?)?;
    ensure!(tried.frames.is_empty(), "{NONE}: {} {:?}", tried.report, tried.frames);
    let tried = bed.try_out(bed.labelled_attempt(sensor, WIRE, &connect)?)?;
    ensure!(tried.report.answered(), "{WIRE}: {}", tried.report);
    sensor.events().wait_for("policy_change ok:false", SOON, |e| {
        e.text("type") == "policy_change" && e.0.get("ok") == Some(&false.into())
    })?;
    Ok(error)
}

fn bad_file(text: &str, complaint: &str) -> Result<()> {
    let bed = Bed::new()?;
    let sensor = Sensor::start(&bed, &Policy::standard())?;
    let generation = sensor.generation()?;
    sensor.replace_policy(text)?;
    let error = old_policy_stays(&bed, &sensor, generation)?;
    ensure!(error.contains(complaint), "\"{error}\" does not say \"{complaint}\"");
    // A good file again is taken up.
    sensor.reload(&Policy::standard().server("one-more", "none", "enforce", ""))?;
    Ok(())
}

#[test]
fn malformed_yaml_keeps_the_old_policy() {
    must(|| bad_file("version: 1\nservers: [\n", ""));
}

#[test]
fn an_unknown_key_keeps_the_old_policy() {
    must(|| bad_file("version: 1\nprofils: {}\n", "profils"));
}

#[test]
fn an_empty_file_keeps_the_old_policy() {
    must(|| bad_file("", ""));
}

#[test]
fn a_policy_file_that_vanishes_keeps_the_old_policy() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        let generation = sensor.generation()?;
        fs::remove_file(sensor.policy_path())?;
        sensor.hangup()?;
        let error = old_policy_stays(&bed, &sensor, generation)?;
        ensure!(error.contains("policy.yaml"), "\"{error}\" does not name the file");
        fs::write(sensor.policy_path(), with_profile("none", "enforce").yaml())?;
        let deadline = Instant::now() + SOON;
        while sensor.generation()? == generation {
            ensure!(Instant::now() < deadline, "the file is back, but not taken up by itself");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    });
}

#[test]
fn a_changed_file_is_taken_up_without_a_signal() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &with_profile("none", "enforce"))?;
        let generation = sensor.generation()?;
        fs::write(sensor.policy_path(), with_profile("wire", "enforce").yaml())?;
        let deadline = Instant::now() + SOON;
        while sensor.generation()? == generation {
            ensure!(Instant::now() < deadline, "not taken up");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    });
}

/// The labelled process lives through the change and is judged by the new
/// policy each time, never by none.
#[test]
fn a_hundred_reloads_open_no_gap() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &with_profile("none", "enforce"))?;
        let mut all = arguments("as-flood", Family::V4, &["udp-burst"]);
        all[2] = Family::V4.denied().to_string();
        let flood = bed.start_until_ready(bed.labelled_attempt(&sensor, CHANGING, &all)?)?;
        for round in 0..100 {
            let profile = if round % 2 == 0 { "wire" } else { "none" };
            sensor.reload(&with_profile(profile, "enforce"))?;
        }
        let tried = bed.finish(flood).context("flood")?;
        ensure!(tried.report.errno() == Some(libc::EPERM), "{}", tried.report);
        ensure!(tried.frames.is_empty(), "{} frames in the gaps", tried.frames.len());
        Ok(())
    });
}

#[test]
fn a_hundred_thousand_networks_are_compiled_and_switched() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        let mut nets: Vec<String> = (0..100_000u32)
            .map(|i| format!("{}.{}.{}.0/24", 20 + (i >> 16), i >> 8 & 255, i & 255))
            .collect();
        nets.push("10.77.1.0/24".into());
        let body = format!("egress: [{{to: [{}], ports: [{PORT}]}}]", nets.join(", "));
        let policy = Policy::standard().profile("many", &body).server("many", "many", "enforce", "");
        let before = Instant::now();
        let generation = sensor.generation()?;
        sensor.replace_policy(&policy.yaml())?;
        while sensor.generation()? == generation {
            ensure!(before.elapsed() < LIMIT, "not in force after {LIMIT:?}: {}", sensor.status()?);
            std::thread::sleep(Duration::from_millis(20));
        }
        eprintln!("100,000 networks in force after {:?}", before.elapsed());
        let mut connect = arguments("tcp-connect", Family::V4, &[]);
        let tried = bed.try_out(bed.labelled_attempt(&sensor, "many", &connect)?)?;
        ensure!(tried.report.answered(), "the last of them: {}", tried.report);
        connect[2] = "21.100.0.5".into();
        let tried = bed.try_out(bed.labelled_attempt(&sensor, "many", &connect)?)?;
        ensure!(tried.frames.iter().any(Frame::is_syn), "one of them: {} {:?}", tried.report, tried.frames);
        bed.frames()?;
        connect[2] = "24.100.0.5".into();
        let tried = bed.try_out(bed.labelled_attempt(&sensor, "many", &connect)?)?;
        ensure!(tried.report.errno() == Some(libc::EPERM), "none of them: {}", tried.report);
        Ok(())
    });
}
