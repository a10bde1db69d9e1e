//! A rule that names a hash: the file that runs is held to it, not its path.

use anyhow::{Context, Result, ensure};
use mcp_sensor_tests::bed::{Bed, Tried};
use mcp_sensor_tests::events::Event;
use mcp_sensor_tests::network::Family;
use mcp_sensor_tests::peer::PORT;
use mcp_sensor_tests::policy::Policy;
use mcp_sensor_tests::run::Running;
use mcp_sensor_tests::sensor::{SOON, Sensor};
use mcp_sensor_tests::spec::must;
use sha2::{Digest, Sha256};
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const SERVER: &str = "hashed";

fn sha256(path: &Path) -> Result<String> {
    Ok(Sha256::digest(fs::read(path)?).iter().map(|b| format!("{b:02x}")).collect())
}

/// A server in `enforce` under `profile`, recognised by its file and hashes.
fn policy(profile: &str, exe: &Path, hashes: &[&str]) -> Policy {
    let entry = |hash: &&str| format!("{{exe: \"{}\", sha256: {hash}}}", exe.display());
    let entries: Vec<String> = hashes.iter().map(entry).collect();
    Policy::standard().server(SERVER, profile, "enforce", &format!("match: [{}]", entries.join(", ")))
}

fn connects(bed: &Bed, exe: &Path, kind: &str) -> Result<Tried> {
    let mut command = bed.command(exe)?;
    let to = Family::V4.allowed().to_string();
    command.args([kind, "--to", &to, "--port", &PORT.to_string()]);
    bed.try_out(command)
}

fn reaches(bed: &Bed, exe: &Path) -> Result<()> {
    let tried = connects(bed, exe, "tcp-connect")?;
    ensure!(tried.report.answered(), "{}", tried.report);
    Ok(())
}

/// Denied by every way out, without a frame.
fn is_held(bed: &Bed, sensor: &Sensor, exe: &Path) -> Result<()> {
    bed.frames()?;
    for kind in ["tcp-connect", "udp-sendto"] {
        let tried = connects(bed, exe, kind)?;
        ensure!(tried.report.errno() == Some(libc::EPERM), "{kind}: {}", tried.report);
        ensure!(tried.frames.is_empty(), "{kind}: {:?}", tried.frames);
    }
    sensor.events().wait_for("a denial", SOON, |e| {
        e.is_denial_of(SERVER)
            && e.text("reason") == "unverified"
            && e.number("dst.port") == Some(PORT.into())
    })?;
    Ok(())
}

/// Starts until the agent has hashed the file; each start is an instance.
fn reaches_soon(bed: &Bed, exe: &Path) -> Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let tried = connects(bed, exe, "tcp-connect")?;
        if tried.report.answered() {
            return Ok(());
        }
        ensure!(tried.report.errno() == Some(libc::EPERM) && tried.frames.is_empty(), "{}", tried.report);
        ensure!(Instant::now() < deadline, "not verified within {SOON:?}: {}", tried.report);
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn mismatch(sensor: &Sensor, found: &str) -> Result<Event> {
    sensor.events().wait_for("hash_mismatch", SOON, |e| {
        e.text("type") == "finding"
            && e.text("kind") == "hash_mismatch"
            && e.text("server") == SERVER
            && e.text("detail").contains(&format!("found {found}"))
    })
}

/// As installed: a temporary folder on a disk, the file root's own.
fn installed(bed: &Bed) -> Result<PathBuf> {
    let exe = bed.copy_of_attempt("hashed-server")?;
    fs::set_permissions(&exe, fs::Permissions::from_mode(0o755))?;
    Ok(exe)
}

/// Other content, the same program.
fn grown(exe: &Path) -> Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(exe)?;
    file.seek(SeekFrom::End(0))?;
    file.write_all(b"another version")?;
    Ok(())
}

#[test]
fn a_file_with_the_right_hash_runs_under_its_profile() {
    must(|| {
        let bed = Bed::new()?;
        let exe = installed(&bed)?;
        let hash = sha256(&exe)?;
        let sensor = Sensor::start(&bed, &policy("wire", &exe, &["00".repeat(32).as_str(), &hash]))?;
        reaches(&bed, &exe)?;
        let denials = sensor.events().denials_of(SERVER)?;
        ensure!(denials.is_empty(), "{denials:?}");
        let started = sensor.events().wait_for("an instance", SOON, |e| {
            e.text("type") == "instance_started" && e.text("server") == SERVER
        })?;
        ensure!(started.text("evidence").ends_with("sha256"), "evidence: {}", started.text("evidence"));
        // Its own profile still holds.
        sensor.reload(&policy("none", &exe, &[&hash]))?;
        let tried = connects(&bed, &exe, "tcp-connect")?;
        ensure!(tried.report.errno() == Some(libc::EPERM) && tried.frames.is_empty(), "{}", tried.report);
        sensor
            .events()
            .wait_for("a denial", SOON, |e| e.is_denial_of(SERVER) && e.text("reason") == "profile_none")?;
        Ok(())
    });
}

#[test]
fn a_file_with_a_wrong_hash_is_held_and_found() {
    must(|| {
        let bed = Bed::new()?;
        let exe = installed(&bed)?;
        let expected = "ab".repeat(32);
        let sensor = Sensor::start(&bed, &policy("wire", &exe, &[&expected]))?;
        let found = sha256(&exe)?;
        let event = mismatch(&sensor, &found)?;
        ensure!(event.text("detail").contains(&expected), "{}", event.0);
        is_held(&bed, &sensor, &exe)?;
        sensor.events().wait_for("a finding about the instance", SOON, |e| {
            e.text("kind") == "hash_mismatch" && e.text("instance").starts_with(SERVER)
        })?;
        sensor.events().wait_for("an instance that is not verified", SOON, |e| {
            e.text("type") == "instance_started" && e.text("evidence").contains("not verified")
        })?;
        // `unrestricted` is as good as any profile: both must allow.
        sensor.reload(&policy("unrestricted", &exe, &[&expected]))?;
        is_held(&bed, &sensor, &exe)?;
        let to = Family::V4.allowed().to_string();
        for kind in ["udplite-sendto", "ping-sendto"] {
            let mut command = bed.command(&exe)?;
            command.args([kind, "--to", &to, "--port", &PORT.to_string()]);
            let tried = bed.try_out(command)?;
            ensure!(tried.frames.is_empty() && !tried.report.answered(), "{kind}: {}", tried.report);
        }
        drop(sensor);
        reaches(&bed, &exe).context("proves nothing: without a sensor")
    });
}

#[test]
fn a_file_replaced_in_place_is_held_at_its_next_exec() {
    must(|| {
        let bed = Bed::new()?;
        let exe = installed(&bed)?;
        let sensor = Sensor::start(&bed, &policy("wire", &exe, &[&sha256(&exe)?]))?;
        reaches(&bed, &exe)?;
        grown(&exe)?;
        is_held(&bed, &sensor, &exe)?;
        mismatch(&sensor, &sha256(&exe)?)?;
        Ok(())
    });
}

#[test]
fn a_file_replaced_by_rename_is_held_at_its_next_exec() {
    must(|| {
        let bed = Bed::new()?;
        let exe = installed(&bed)?;
        let good = sha256(&exe)?;
        let sensor = Sensor::start(&bed, &policy("wire", &exe, &[&good]))?;
        reaches(&bed, &exe)?;
        let (other, kept) = (bed.copy_of_attempt("other")?, bed.folder.path().join("kept"));
        grown(&other)?;
        fs::rename(&exe, &kept)?;
        fs::rename(&other, &exe)?;
        is_held(&bed, &sensor, &exe)?;
        mismatch(&sensor, &sha256(&exe)?)?;
        // The good one again: its change time has moved, so it is hashed again.
        fs::rename(&kept, &exe)?;
        reaches_soon(&bed, &exe)
    });
}

#[test]
fn a_file_that_comes_after_the_policy_is_verified_shortly_after_its_first_exec() {
    must(|| {
        let bed = Bed::new()?;
        let exe = installed(&bed)?;
        let hash = sha256(&exe)?;
        let away = bed.folder.path().join("away");
        fs::rename(&exe, &away)?;
        let sensor = Sensor::start(&bed, &policy("wire", &exe, &[&hash]))?;
        fs::rename(&away, &exe)?;
        let tried = connects(&bed, &exe, "tcp-connect")?;
        ensure!(tried.frames.is_empty() || tried.report.answered(), "{}", tried.report);
        reaches_soon(&bed, &exe)?;
        let found = |e: &&Event| ["hash_mismatch", "unverifiable"].contains(&e.text("kind"));
        let findings: Vec<Event> = sensor.events().all()?.iter().filter(found).cloned().collect();
        ensure!(findings.is_empty(), "{findings:?}");
        Ok(())
    });
}

/// A shell that tries until it is connected, in one process.
fn tries(bed: &Bed, exe: &Path) -> Result<Running> {
    let mut command = bed.command(exe)?;
    let place = format!("/dev/tcp/{}/{PORT}", Family::V4.allowed());
    command
        .arg("-c")
        .arg(format!("until true 3<>{place}; do sleep 0.02; done 2>/dev/null; echo connected; sleep 60"));
    Running::start(command)
}

fn shell(bed: &Bed) -> Result<PathBuf> {
    let exe = bed.folder.path().join("shell-server");
    fs::copy("/bin/bash", &exe)?;
    Ok(exe)
}

/// The instance itself, not only the next one.
#[test]
fn a_running_instance_is_let_out_when_its_file_is_verified() {
    must(|| {
        let bed = Bed::new()?;
        let exe = shell(&bed)?;
        let (hash, away) = (sha256(&exe)?, bed.folder.path().join("away"));
        fs::rename(&exe, &away)?;
        let sensor = Sensor::start(&bed, &policy("wire", &exe, &[&hash]))?;
        // A change time that the agent has not seen.
        fs::rename(&away, &exe)?;
        let mut running = tries(&bed, &exe)?;
        ensure!(running.line(SOON)? == "connected");
        sensor.events().wait_for("an instance that is not verified", SOON, |e| {
            e.text("type") == "instance_started" && e.text("evidence").contains("not verified")
        })?;
        Ok(())
    });
}

#[test]
fn a_policy_that_names_the_hash_lets_a_running_instance_out_and_back_in() {
    must(|| {
        let bed = Bed::new()?;
        let exe = shell(&bed)?;
        let (hash, wrong) = (sha256(&exe)?, "cd".repeat(32));
        let sensor = Sensor::start(&bed, &policy("wire", &exe, &[&wrong]))?;
        let mut running = tries(&bed, &exe)?;
        sensor.events().wait_for("a denial", SOON, |e| e.is_denial_of(SERVER))?;
        ensure!(bed.frames()?.is_empty(), "frames of a file that is not verified");
        sensor.reload(&policy("wire", &exe, &[&wrong, &hash]))?;
        ensure!(running.line(SOON)? == "connected");
        // A version that is taken back is held, also where it runs already.
        let streaming = installed(&bed)?;
        let hash = sha256(&streaming)?;
        sensor.reload(&policy("wire", &streaming, &[&hash]))?;
        let mut command = bed.command(&streaming)?;
        let to = Family::V4.allowed().to_string();
        command.args(["stream", "--to", &to, "--port", &PORT.to_string(), "--", "udp"]);
        let _running = bed.start_until_ready(command)?;
        ensure!(bed.sniffer.wait_for(SOON, |f| f.payload() > 500)?.is_some(), "it does not stream");
        sensor.reload(&policy("wire", &streaming, &[&wrong]))?;
        bed.frames()?;
        bed.sniffer.wait_for(Duration::from_millis(500), |_| false)?;
        ensure!(bed.frames()?.is_empty(), "frames of a version that was taken back");
        Ok(())
    });
}

#[test]
fn a_server_that_ran_before_the_sensor_is_verified_too() {
    must(|| {
        let bed = Bed::new()?;
        let exe = installed(&bed)?;
        let hash = sha256(&exe)?;
        let mut command = bed.command(&exe)?;
        let to = Family::V4.allowed().to_string();
        command.args(["stream", "--to", &to, "--port", &PORT.to_string(), "--", "udp"]);
        let _running = bed.start_until_ready(command)?;
        let streams = || -> Result<bool> { Ok(bed.sniffer.wait_for(SOON, |f| f.payload() > 500)?.is_some()) };
        ensure!(streams()?, "it does not stream");
        let sensor = Sensor::start(&bed, &policy("wire", &exe, &["ef".repeat(32).as_str()]))?;
        sensor.events().wait_for("a denial", SOON, |e| e.is_denial_of(SERVER))?;
        bed.frames()?;
        bed.sniffer.wait_for(Duration::from_millis(300), |_| false)?;
        ensure!(bed.frames()?.is_empty(), "frames of a file that is not verified");
        sensor.reload(&policy("wire", &exe, &[&hash]))?;
        ensure!(streams()?, "its hash is in the policy, but nothing is sent");
        Ok(())
    });
}

#[test]
fn a_killed_agent_leaves_verified_files_verified_and_others_held() {
    must(|| {
        let bed = Bed::new()?;
        let exe = installed(&bed)?;
        let hash = sha256(&exe)?;
        let sensor = Sensor::start(&bed, &policy("wire", &exe, &[&hash]))?;
        reaches(&bed, &exe)?;
        sensor.kill()?;
        reaches(&bed, &exe)?;
        grown(&exe)?;
        bed.frames()?;
        let tried = connects(&bed, &exe, "tcp-connect")?;
        ensure!(tried.report.errno() == Some(libc::EPERM) && tried.frames.is_empty(), "{}", tried.report);
        sensor.launch(&[])?;
        is_held(&bed, &sensor, &exe)
    });
}

#[test]
fn a_file_that_is_open_for_writing_is_not_verified() {
    must(|| {
        let bed = Bed::new()?;
        let exe = installed(&bed)?;
        let hash = sha256(&exe)?;
        let writer = fs::OpenOptions::new().write(true).open(&exe)?;
        let sensor = Sensor::start(&bed, &policy("wire", &exe, &[&hash]))?;
        sensor.events().wait_for("unverifiable", SOON, |e| {
            e.text("kind") == "unverifiable" && e.text("detail").contains("open for writing")
        })?;
        drop(writer);
        // No more said than that: the next exec asks again.
        reaches_soon(&bed, &exe)
    });
}

/// What the kernel executes of a script is its interpreter: that is hashed.
#[test]
fn the_hash_of_an_interpreter_holds_for_its_scripts() {
    must(|| {
        let bed = Bed::new()?;
        let (exe, script) = (shell(&bed)?, bed.folder.path().join("script"));
        let place = format!("/dev/tcp/{}/{PORT}", Family::V4.allowed());
        fs::write(&script, format!("#!{}\ntrue 3<>{place} && echo connected\n", exe.display()))?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        let said = || Ok::<_, anyhow::Error>(Running::start(bed.command(&script)?)?.finish(SOON)?.lines);
        let sensor = Sensor::start(&bed, &policy("wire", &exe, &[&sha256(&exe)?]))?;
        ensure!(said()? == ["connected"]);
        sensor.reload(&policy("wire", &exe, &[&sha256(&script)?]))?;
        bed.frames()?;
        ensure!(said()?.is_empty() && bed.frames()?.is_empty(), "the script's hash is not the interpreter's");
        Ok(())
    });
}

/// What `unknown` allows as well is allowed.
#[test]
fn a_file_that_is_not_verified_may_do_what_both_profiles_allow() {
    must(|| {
        let bed = Bed::new()?;
        let exe = installed(&bed)?;
        let text = policy("wire", &exe, &["ab".repeat(32).as_str()]).yaml();
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        for (unknown, mode, server_mode, allowed) in [
            ("wire", "audit", "enforce", true),
            ("wire", "enforce", "enforce", true),
            ("none", "audit", "audit", true),
            ("none", "enforce", "audit", false),
            ("none", "audit", "enforce", false),
        ] {
            let text = text
                .replace(
                    "unknown: {profile: none, mode: audit}",
                    &format!("unknown: {{profile: {unknown}, mode: {mode}}}"),
                )
                .replace(
                    &format!("name: {SERVER}\n    profile: wire\n    mode: enforce"),
                    &format!("name: {SERVER}\n    profile: wire\n    mode: {server_mode}"),
                );
            let generation = sensor.generation()?;
            sensor.replace_policy(&text)?;
            let deadline = Instant::now() + SOON;
            while sensor.generation()? == generation {
                ensure!(Instant::now() < deadline, "not in force");
                std::thread::sleep(Duration::from_millis(5));
            }
            bed.frames()?;
            let tried = connects(&bed, &exe, "tcp-connect")?;
            let case = format!("unknown {unknown} {mode}, server {server_mode}: {}", tried.report);
            ensure!(tried.report.answered() == allowed, "{case}");
            ensure!(allowed || tried.frames.is_empty(), "{case}");
        }
        Ok(())
    });
}
