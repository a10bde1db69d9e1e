//! A sensor of a test's own, on the test's cgroup subtree.

use crate::bed::Bed;
use crate::events::Events;
use crate::policy::Policy;
use crate::run::{Finished, Running};
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Emulated and loaded machines included.
const START: Duration = Duration::from_secs(30);
/// How late an event may come.
pub const SOON: Duration = Duration::from_secs(5);

/// Killed and unpinned on drop.
pub struct Sensor {
    folder: tempfile::TempDir,
    cgroup: PathBuf,
    process: Mutex<Option<Running>>,
    events: Mutex<Events>,
}

impl Sensor {
    pub fn start(bed: &Bed, policy: &Policy) -> Result<Sensor> {
        Sensor::start_with(bed, policy, &[])
    }

    pub fn start_with(bed: &Bed, policy: &Policy, arguments: &[&str]) -> Result<Sensor> {
        Sensor::start_on(bed.cgroup.path(), policy, arguments)
    }

    /// On a cgroup subtree without a bed.
    pub fn start_on(cgroup: &Path, policy: &Policy, arguments: &[&str]) -> Result<Sensor> {
        let folder = tempfile::Builder::new().prefix("mcp-sensor-test-").tempdir()?;
        let events = Mutex::new(Events::new(folder.path().join("events.ndjson")));
        let sensor = Sensor { folder, cgroup: cgroup.to_path_buf(), process: Mutex::new(None), events };
        fs::write(sensor.policy_path(), policy.yaml())?;
        sensor.launch(arguments)?;
        Ok(sensor)
    }

    /// Starts the process (again); returns when it says `ready`.
    pub fn launch(&self, arguments: &[&str]) -> Result<()> {
        self.launch_in(arguments, &[])
    }

    /// As [`Sensor::launch`], with more in its environment.
    pub fn launch_in(&self, arguments: &[&str], environment: &[(&str, PathBuf)]) -> Result<()> {
        let other =
            environment.iter().find(|(name, _)| *name == "MCP_SENSOR_BIN").map(|(_, path)| path.clone());
        let mut command = Command::new(other.map_or_else(binary, Ok)?);
        command.env("MCP_SENSOR_RELEASE_ON_EXIT", "true");
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        command.arg("run").arg("--policy").arg(self.policy_path());
        command.arg("--control").arg(self.control_path());
        command.arg("--state-dir").arg(self.folder.path().join("state"));
        command.arg("--events").arg(self.events_path());
        command.arg("--cgroup").arg(&self.cgroup);
        command.args(arguments);
        let mut process = Running::start(command)?;
        let deadline = Instant::now() + START;
        loop {
            match process.line(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line == "ready" => break,
                Ok(_) => {}
                Err(e) => {
                    let said = process.finish(Duration::from_secs(2));
                    let said = said.map_or_else(|e| e.to_string(), |f| f.stderr);
                    bail!("the sensor does not become ready: {e}\n{said}");
                }
            }
        }
        *self.process.lock().expect("sensor") = Some(process);
        Ok(())
    }

    pub fn policy_path(&self) -> PathBuf {
        self.folder.path().join("policy.yaml")
    }

    pub fn control_path(&self) -> PathBuf {
        self.folder.path().join("control.sock")
    }

    pub fn events_path(&self) -> PathBuf {
        self.folder.path().join("events.ndjson")
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where its maps and links are pinned.
    pub fn pins(&self) -> PathBuf {
        pins(&self.folder.path().join("state"))
    }

    pub fn events(&self) -> std::sync::MutexGuard<'_, Events> {
        self.events.lock().expect("events")
    }

    pub fn pid(&self) -> Option<u32> {
        self.process.lock().expect("sensor").as_ref().map(Running::pid)
    }

    pub fn is_alive(&self) -> Result<bool> {
        match self.process.lock().expect("sensor").as_mut() {
            Some(process) => Ok(!process.is_over()?),
            None => Ok(false),
        }
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&self) -> Result<()> {
        let process = self.process.lock().expect("sensor").take().context("no sensor runs")?;
        process.signal(Signal::SIGKILL)?;
        process.finish(Duration::from_secs(5))?;
        Ok(())
    }

    /// SIGTERM, and waits until it is gone.
    pub fn stop(&self) -> Result<()> {
        let process = self.process.lock().expect("sensor").take().context("no sensor runs")?;
        process.signal(Signal::SIGTERM)?;
        process.finish(Duration::from_secs(10))?;
        Ok(())
    }

    /// Writes a new policy as an editor does (rename over) and asks for a
    /// reload; the policy is in force when the generation has moved.
    pub fn reload(&self, policy: &Policy) -> Result<()> {
        let before = self.generation()?;
        self.replace_policy(&policy.yaml())?;
        let deadline = Instant::now() + SOON;
        while self.generation()? == before {
            ensure!(Instant::now() < deadline, "the new policy is not in force within {SOON:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    pub fn replace_policy(&self, text: &str) -> Result<()> {
        let new = self.folder.path().join("policy.new");
        fs::write(&new, text)?;
        fs::rename(&new, self.policy_path())?;
        self.hangup()
    }

    pub fn hangup(&self) -> Result<()> {
        self.process.lock().expect("sensor").as_ref().context("no sensor runs")?.signal(Signal::SIGHUP)
    }

    pub fn generation(&self) -> Result<u64> {
        let status = self.status()?;
        number(&status, &["policy", "generation"])
            .with_context(|| format!("status has no policy.generation: {status}"))
    }

    /// Tasks that carry a label.
    pub fn labelled_tasks(&self) -> Result<u64> {
        let status = self.status()?;
        number(&status, &["labelled_tasks"])
            .with_context(|| format!("status has no labelled_tasks: {status}"))
    }

    pub fn status(&self) -> Result<Value> {
        self.cli(&["status", "-o", "json"])
    }

    /// Runs the command line client with `-o json` output.
    pub fn cli(&self, arguments: &[&str]) -> Result<Value> {
        let done = self.command(arguments)?;
        ensure!(done.status.success(), "mcp-sensor {arguments:?}: {}\n{}", done.status, done.stderr);
        let text = done.lines.join("\n");
        serde_json::from_str(&text).with_context(|| format!("mcp-sensor {arguments:?} says no JSON: {text}"))
    }

    pub fn command(&self, arguments: &[&str]) -> Result<Finished> {
        let mut command = Command::new(binary()?);
        command.args(arguments).env("MCP_SENSOR_CONTROL", self.control_path());
        Running::start(command)?.finish(Duration::from_secs(20))
    }
}

impl Drop for Sensor {
    fn drop(&mut self) {
        if let Some(process) = self.process.lock().expect("sensor").take() {
            let _ = process.signal(Signal::SIGTERM);
            if let Err(e) = process.finish(Duration::from_secs(5)) {
                eprintln!("sensor: {e:#}");
            }
        }
        // A sensor that was killed leaves its pins, as it should.
        let pins = pins(&self.folder.path().join("state"));
        if pins.exists()
            && let Err(e) = fs::remove_dir_all(&pins)
        {
            eprintln!("{} stays behind: {e}", pins.display());
        }
    }
}

/// Where a sensor with this state directory pins.
fn pins(state: &Path) -> PathBuf {
    use sha2::{Digest, Sha256};
    use std::os::unix::ffi::OsStrExt;
    let path = fs::canonicalize(state).unwrap_or_else(|_| state.to_owned());
    let digest = Sha256::digest(path.as_os_str().as_bytes());
    let name: String = digest[..8].iter().map(|b| format!("{b:02x}")).collect();
    Path::new("/sys/fs/bpf/mcp_sensor").join(name)
}

/// Large numbers may stand as text in JSON.
pub fn number(value: &Value, path: &[&str]) -> Option<u64> {
    let value = path.iter().try_fold(value, |v, key| v.get(key))?;
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

/// `MCP_SENSOR_BIN`, or what `cargo xtask build` made.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("MCP_SENSOR_BIN") {
        return Ok(path.into());
    }
    let path = target()?.join("release/mcp-sensor");
    ensure!(path.exists(), "{} is missing: run `cargo xtask build`, or set MCP_SENSOR_BIN", path.display());
    Ok(path)
}

/// A build whose maps are laid out differently (`cargo xtask build --other-layout`):
/// `MCP_SENSOR_OTHER_BIN`, or none.
pub fn other_binary() -> Option<PathBuf> {
    std::env::var_os("MCP_SENSOR_OTHER_BIN").map(PathBuf::from)
}

/// The workspace's `target`.
pub fn target() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("CARGO_TARGET_DIR") {
        return Ok(path.into());
    }
    Ok(Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("workspace")?.join("target"))
}
