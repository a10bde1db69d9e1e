//! Unix sockets of a labelled server: those that give power over the host are
//! refused, and with `unix: strict` all that no rule names.

use anyhow::{Result, ensure};
use mcp_sensor_tests::bed::{Bed, Tried};
use mcp_sensor_tests::policy::{AUDIT, NONE, OPEN, Policy};
use mcp_sensor_tests::run::Running;
use mcp_sensor_tests::sensor::{SOON, Sensor};
use mcp_sensor_tests::spec::{Claim, run};
use serde_json::Value;

/// In the list of sockets that give power; abstract names belong to a network
/// namespace, so this one disturbs nobody.
const POWER: &str = "@/org/freedesktop/mcp-sensor-test";
const STRICT: &str = "strict";

struct World {
    bed: Bed,
    sensor: Sensor,
}

fn name_in(bed: &Bed, name: &str) -> String {
    bed.folder.path().join(name).display().to_string()
}

impl World {
    /// `Err`: why this kernel cannot judge unix sockets at all.
    fn new() -> Result<std::result::Result<World, String>> {
        let bed = Bed::new()?;
        let body = format!("egress: []\nunix: [\"{}\", \"{POWER}\"]", name_in(&bed, "named.sock"));
        let policy =
            Policy::standard().profile("strict", &body).server(STRICT, "strict", "enforce", "unix: strict");
        let sensor = Sensor::start(&bed, &policy)?;
        let status = sensor.status()?;
        let hooks = status.get("hooks").and_then(Value::as_array).cloned().unwrap_or_default();
        // Those of cgroups, or those of BPF LSM: one of them judges.
        let unix = || hooks.iter().filter(|h| h["name"].as_str().is_some_and(|n| n.contains("unix")));
        match unix().find(|h| h["status"] == "attached").or_else(|| unix().next()) {
            Some(h) if h["status"] == "attached" => Ok(Ok(World { bed, sensor })),
            Some(h) => Ok(Err(format!("unix hooks: {h}"))),
            None => anyhow::bail!("status names no unix hook: {status}"),
        }
    }

    fn serve(&self, name: &str, kind: &str) -> Result<Running> {
        let all = ["unix-serve", "--", name, kind].map(String::from);
        self.bed.start_until_ready(self.bed.attempt(&all)?)
    }

    fn reach(&self, attempt: &str, server: Option<&str>, name: &str) -> Result<Tried> {
        let all = [attempt, "--", name].map(String::from);
        let command = match server {
            Some(server) => self.bed.labelled_attempt(&self.sensor, server, &all)?,
            None => self.bed.attempt(&all)?,
        };
        self.bed.try_out(command)
    }

    fn refuses(&self, attempt: &str, server: &str, name: &str, reason: &str) -> Result<()> {
        let tried = self.reach(attempt, Some(server), name)?;
        ensure!(tried.report.errno() == Some(libc::EPERM), "{server}: {name}: {}", tried.report);
        self.sensor.events().wait_for("a denial", SOON, |e| {
            e.text("type") == "unix_connection"
                && e.text("verdict") == "deny"
                && e.text("server") == server
                && e.text("path") == name
                && e.text("reason") == reason
        })?;
        Ok(())
    }

    fn lets(&self, attempt: &str, server: Option<&str>, name: &str) -> Result<()> {
        let tried = self.reach(attempt, server, name)?;
        ensure!(tried.report.answered(), "{server:?}: {name}: {}", tried.report);
        Ok(())
    }
}

fn with(test: impl FnOnce(&World) -> Result<()>) {
    run(|| match World::new()? {
        Ok(world) => test(&world).map(|()| Claim::Holds),
        Err(why) => Ok(Claim::Skipped(why)),
    });
}

fn power_is_refused(attempt: &str, kind: &str) {
    with(|w| {
        let _listener = w.serve(POWER, kind)?;
        w.refuses(attempt, NONE, POWER, "unix_path")?;
        w.lets(attempt, Some(STRICT), POWER)?;
        w.lets(attempt, Some(OPEN), POWER)?;
        w.lets(attempt, Some(AUDIT), POWER)?;
        w.lets(attempt, None, POWER)
    });
}

#[test]
fn connect_to_a_socket_of_power_is_denied_unless_named() {
    power_is_refused("unix-connect", "stream");
}

#[test]
fn seqpacket_connect_to_a_socket_of_power_is_denied_unless_named() {
    power_is_refused("unix-seqpacket", "seqpacket");
}

#[test]
fn datagram_to_a_socket_of_power_is_denied_unless_named() {
    power_is_refused("unix-sendto", "dgram");
}

#[test]
fn strict_denies_what_no_rule_names_and_default_does_not() {
    with(|w| {
        let (named, other) = (name_in(&w.bed, "named.sock"), name_in(&w.bed, "other.sock"));
        let _one = w.serve(&named, "stream")?;
        let _two = w.serve(&other, "stream")?;
        w.lets("unix-connect", Some(STRICT), &named)?;
        w.refuses("unix-connect", STRICT, &other, "unix_strict")?;
        w.lets("unix-connect", Some(NONE), &other)?;
        w.lets("unix-connect", None, &other)
    });
}

#[test]
fn a_server_under_none_may_connect_to_a_socket_it_bound_itself() {
    with(|w| w.lets("unix-own", Some(NONE), &name_in(&w.bed, "own.sock")));
}

/// In the list in full, not as a prefix.
const EXACT: &str = "@ISCSIADM_ABSTRACT_NAMESPACE";

#[test]
fn an_abstract_name_of_power_is_denied_whatever_lies_behind_it() {
    with(|w| {
        let _listener = w.serve(EXACT, "stream")?;
        w.refuses("unix-connect", NONE, EXACT, "unix_path")?;
        let tried = w.reach("unix-unterminated", Some(NONE), EXACT)?;
        ensure!(tried.report.errno() == Some(libc::EPERM), "{}", tried.report);
        w.lets("unix-unterminated", None, EXACT)
    });
}

/// `/run` is a folder of the test's own here, in a mount namespace of its own.
#[test]
fn a_path_of_power_without_its_nul_is_denied() {
    const DOCKER: &str = "/run/docker.sock";
    with(|w| {
        let world = Private::new(w)?;
        let tried = world.reach("unix-unterminated", Some(NONE), DOCKER)?;
        ensure!(tried.report.errno() == Some(libc::EPERM), "{}", tried.report);
        let tried = world.reach("unix-connect", Some(NONE), DOCKER)?;
        ensure!(tried.report.errno() == Some(libc::EPERM), "{}", tried.report);
        let tried = world.reach("unix-unterminated", None, DOCKER)?;
        ensure!(tried.report.answered(), "proves nothing: unlabelled, {}", tried.report);
        Ok(())
    });
}

/// A listener at `/run/docker.sock` that only this test can see.
struct Private<'a> {
    world: &'a World,
    _listener: Running,
    mounts: std::fs::File,
}

impl Private<'_> {
    fn new(world: &World) -> Result<Private<'_>> {
        let all = ["unix-serve", "--", "/run/docker.sock", "stream"].map(String::from);
        let mut command = world.bed.attempt(&all)?;
        mcp_sensor_tests::drivers::with_empty_folder(&mut command, c"/run");
        let listener = world.bed.start_until_ready(command)?;
        let mounts = std::fs::File::open(format!("/proc/{}/ns/mnt", listener.pid()))?;
        Ok(Private { world, _listener: listener, mounts })
    }

    fn reach(&self, attempt: &str, server: Option<&str>, name: &str) -> Result<Tried> {
        use std::os::unix::process::CommandExt;
        let all = [attempt, "--", name].map(String::from);
        let World { bed, sensor } = self.world;
        let mut command = match server {
            Some(server) => bed.labelled_attempt(sensor, server, &all)?,
            None => bed.attempt(&all)?,
        };
        let mounts = self.mounts.try_clone()?;
        let hook = move || Ok(nix::sched::setns(&mounts, nix::sched::CloneFlags::CLONE_NEWNS)?);
        // SAFETY: between fork and exec one system call on a descriptor of the closure's.
        unsafe { command.pre_exec(hook) };
        bed.try_out(command)
    }
}
