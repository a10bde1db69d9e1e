//! Policies from the collector, on a real kernel: what is signed is enforced,
//! together with the host's own; what is not changes nothing.

use anyhow::{Context, Result, ensure};
use mcp_sensor_tests::bed::Bed;
use mcp_sensor_tests::network::Family;
use mcp_sensor_tests::peer::PORT;
use mcp_sensor_tests::policy::Policy;
use mcp_sensor_tests::run::Running;
use mcp_sensor_tests::sensor::{Sensor, binary};
use mcp_sensor_tests::spec::must;
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

const SERVER: &str = "governed";
/// Loaded machines included.
const PATIENCE: Duration = Duration::from_secs(60);

struct World {
    collector: Option<Running>,
    sensor: Sensor,
    bed: Bed,
}

impl World {
    fn new(own: &Policy) -> Result<World> {
        let bed = Bed::new()?;
        let sensor = Sensor::start_on(bed.cgroup.path(), own, &[])?;
        sensor.stop()?;
        let mut world = World { collector: None, sensor, bed };
        fs::create_dir(world.path("policies"))?;
        for key in ["key.pem", "other.pem"] {
            world.signer(&["keygen", "-o", key])?;
        }
        world.start_collector()?;
        world.start_agent()?;
        Ok(world)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.sensor.folder().join(name)
    }

    fn listen(&self) -> String {
        format!("unix:{}", self.path("c.sock").display())
    }

    fn start_collector(&mut self) -> Result<()> {
        let mut command = Command::new(binary()?);
        command.args(["collect", "--quiet", "--log", "error", "--listen", &self.listen(), "--dir"]);
        command.arg(self.path("collected")).arg("--policies").arg(self.path("policies"));
        self.collector = Some(Running::start(command)?);
        Ok(())
    }

    fn end_collector(&mut self) -> Result<()> {
        let collector = self.collector.take().context("no collector")?;
        collector.signal(nix::sys::signal::Signal::SIGTERM)?;
        collector.finish(PATIENCE)?;
        Ok(())
    }

    fn start_agent(&self) -> Result<()> {
        let key = self.path("key.pem.pub");
        let key = key.to_str().context("a path of ours")?;
        self.sensor.launch(&["--collector", &self.listen(), "--policy-key", key, "--group", "web"])
    }

    fn signer(&self, arguments: &[&str]) -> Result<()> {
        let mut command = Command::new(binary()?);
        command.arg("policy").args(arguments).current_dir(self.sensor.folder());
        let done = Running::start(command)?.finish(PATIENCE)?;
        ensure!(done.status.success(), "{arguments:?}: {}", done.stderr);
        Ok(())
    }

    /// Into the collector's directory, in one step.
    fn publish(&self, policy: &Policy, version: u64, key: &str, more: &[&str]) -> Result<()> {
        fs::write(self.path("fleet.yaml"), policy.yaml())?;
        let version = version.to_string();
        let arguments = ["sign", "--key", key, "--version", &version, "-o", "signed", "fleet.yaml"];
        self.signer(&[&arguments[..], more].concat())?;
        Ok(fs::rename(self.path("signed"), self.path("policies/fleet.bundle"))?)
    }

    fn until(&self, what: &str, is: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.sensor.status()?;
            if is(&status["policy"]["bundle"]) {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "not reached: {what}; {status}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn in_force(&self, version: u64) -> Result<()> {
        self.until(&format!("version {version}"), |b| b["version"] == version && b["kind"] == "").map(drop)
    }

    fn refused(&self, kind: &str, still: u64) -> Result<()> {
        self.until(kind, |b| b["kind"] == kind && b["version"] == still)?;
        let mut events = self.sensor.events();
        events.wait_for(kind, PATIENCE, |e| e.text("type") == "finding" && e.text("kind") == kind)?;
        Ok(())
    }

    fn reaches(&self) -> Result<bool> {
        let to = Family::V4.allowed().to_string();
        let arguments = ["tcp-connect", "--to", &to, "--port", &PORT.to_string()].map(str::to_owned);
        let command = self.bed.labelled_attempt(&self.sensor, SERVER, &arguments)?;
        Ok(self.bed.try_out(command)?.report.answered())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if self.collector.is_some()
            && let Err(error) = self.end_collector()
        {
            eprintln!("collector: {error:#}");
        }
    }
}

fn governed(profile: &str) -> Policy {
    let wire = format!("egress: [{{to: [10.77.1.0/24], ports: [{PORT}]}}]\n");
    Policy::default().profile("wire", &wire).server(SERVER, profile, "enforce", "")
}

#[test]
fn a_signed_policy_is_enforced_with_the_hosts_own_and_outlives_both_ends() {
    must(|| {
        let mut world = World::new(&governed("wire"))?;
        ensure!(world.reaches()?, "the host's own policy allows it");
        world.publish(&governed("none"), 5, "key.pem", &["--group", "web"])?;
        world.in_force(5)?;
        ensure!(!world.reaches()?, "the bundle denies it");
        world.publish(&governed("wire"), 6, "key.pem", &[])?;
        world.in_force(6)?;
        ensure!(world.reaches()?, "both allow it");
        world.sensor.reload(&governed("none"))?;
        ensure!(!world.reaches()?, "the host denies it");
        world.sensor.reload(&governed("wire"))?;
        world.publish(&governed("none"), 7, "key.pem", &[])?;
        world.in_force(7)?;
        world.end_collector()?;
        world.sensor.kill()?;
        world.start_agent()?;
        world.in_force(7)?;
        ensure!(!world.reaches()?, "the last bundle is in force before any collector is there");
        Ok(())
    });
}

#[test]
fn what_is_not_to_be_believed_changes_nothing_and_is_told() {
    must(|| {
        let world = World::new(&governed("wire"))?;
        world.publish(&governed("none"), 5, "key.pem", &[])?;
        world.in_force(5)?;
        world.publish(&governed("wire"), 6, "other.pem", &[])?;
        world.refused("policy_bundle_signature", 5)?;
        ensure!(!world.reaches()?, "a stranger's signature opened it");
        world.publish(&governed("wire"), 4, "key.pem", &[])?;
        world
            .until("a rollback is refused", |b| b["kind"] == "policy_bundle_rollback" && b["version"] == 5)?;
        ensure!(!world.reaches()?, "an older version opened it");
        let other = Policy::default().server(
            "other",
            "none",
            "enforce",
            &format!("match: [{{argv: [only-by-exec-{SERVER}]}}]"),
        );
        world.publish(&other, 6, "key.pem", &[])?;
        world.until("what does not go together", |b| {
            b["kind"] == "policy_bundle_invalid" && b["version"] == 5
        })?;
        world.publish(&governed("wire"), 4, "key.pem", &["--allow-rollback"])?;
        world.in_force(4)?;
        ensure!(world.reaches()?, "a rollback that is signed as one");
        let mut fleet = Command::new(binary()?);
        fleet.args(["fleet", "-o", "json", "--collector", &world.listen()]);
        let done = Running::start(fleet)?.finish(PATIENCE)?;
        let fleet: Value = serde_json::from_str(&done.lines.join("\n"))?;
        ensure!(fleet["sensors"][0]["bundle"]["version"] == 4, "{fleet}");
        Ok(())
    });
}
