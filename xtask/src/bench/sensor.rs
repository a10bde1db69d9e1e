//! A running sensor, by the contract that others script against.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use serde_json::Value;

use super::attach::text;
use crate::{step, workspace};

const POLICY: &str = "\
version: 1
profiles:
  loopback:
    egress:
      - {to: [127.0.0.0/8, '::1/128'], ports: [1-65535], protocol: tcp}
      - {to: [127.0.0.0/8, '::1/128'], ports: [1-65535], protocol: udp}
servers:
  - {name: bench, profile: loopback, mode: enforce}
";

pub(crate) struct Sensor {
    child: Child,
    dir: PathBuf,
    pub(crate) start: Duration,
}

impl Sensor {
    pub(crate) fn start(cgroup: &Path) -> Result<Self> {
        Self::with(cgroup, POLICY, &[])
    }

    /// Under another policy; `more` are arguments of `run`.
    pub(crate) fn with(cgroup: &Path, policy_text: &str, more: &[&OsStr]) -> Result<Self> {
        let dir = workspace::target().join("bench").join(std::process::id().to_string());
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir)?;
        let policy = dir.join("policy.yaml");
        fs::write(&policy, policy_text)?;
        let log = dir.join("log");
        let since = Instant::now();
        let mut child = Command::new(workspace::sensor_binary(false))
            .args(["run", "--policy"])
            .arg(&policy)
            .arg("--control")
            .arg(dir.join("control.sock"))
            .arg("--state-dir")
            .arg(dir.join("state"))
            .arg("--cgroup")
            .arg(cgroup)
            .arg("--release-on-exit")
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?)
            .spawn()
            .context("cannot start mcp-sensor")?;
        let lines = BufReader::new(child.stdout.take().context("no pipe")?).lines();
        let (sender, receiver) = mpsc::channel();
        // Reads on to the end: a full pipe would stop the sensor.
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let mut sensor = Self { child, dir, start: Duration::ZERO };
        let end = since + Duration::from_secs(20);
        loop {
            match receiver.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) if line.trim() == "ready" => break,
                Ok(_) => {}
                Err(_) => bail!("mcp-sensor is not ready:\n{}", text(&log)),
            }
        }
        sensor.start = since.elapsed();
        Ok(sensor)
    }

    pub(crate) fn launch(&self, program: &Path) -> Command {
        let mut command = Command::new(workspace::sensor_binary(false));
        command
            .args(["exec", "--control"])
            .arg(self.dir.join("control.sock"))
            .args(["--server", "bench", "--"])
            .arg(program);
        command
    }

    /// As `status` tells it.
    pub(crate) fn status(&self) -> Result<Value> {
        let mut command = Command::new(workspace::sensor_binary(false));
        command.args(["status", "-o", "json", "--control"]).arg(self.dir.join("control.sock"));
        Ok(serde_json::from_str(&step::output(&mut command)?)?)
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    pub(crate) fn policy(&self) -> PathBuf {
        self.dir.join("policy.yaml")
    }

    /// Where the collector in its process keeps the events.
    pub(crate) fn events(&self) -> PathBuf {
        self.dir.join("state/events")
    }
}

impl Drop for Sensor {
    fn drop(&mut self) {
        let _ = kill(self.pid(), Signal::SIGTERM);
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
