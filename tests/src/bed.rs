//! One test's world: network, cgroup subtree, listeners, sniffer.

use crate::cgroup::Subtree;
use crate::frame::Frame;
use crate::network::{Network, enter};
use crate::peer::Peer;
use crate::report::{READY, Report};
use crate::run::{Running, built};
use crate::sensor::{Sensor, binary};
use crate::sniffer::Sniffer;
use anyhow::{Context, Result};
use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// An attempt's own limit is 2 s a step; more means that it hangs.
pub const LIMIT: Duration = Duration::from_secs(20);

pub struct Bed {
    pub peer: Peer,
    pub sniffer: Sniffer,
    pub cgroup: Subtree,
    pub network: Network,
    /// For copies of programs and whatever else a test writes.
    pub folder: tempfile::TempDir,
}

/// What came of one attempt.
#[derive(Debug)]
pub struct Tried {
    pub report: Report,
    /// What reached the peer meanwhile; bare RST apart.
    pub frames: Vec<Frame>,
}

impl Bed {
    pub fn new() -> Result<Bed> {
        Bed::with_network(Network::new()?)
    }

    pub fn with_network(network: Network) -> Result<Bed> {
        let cgroup = Subtree::new()?;
        let sniffer = Sniffer::new(&network)?;
        let peer = Peer::new(&network)?;
        // Interfaces that come up report the groups of their addresses.
        sniffer.settle(Duration::from_millis(30))?;
        sniffer.frames()?;
        let folder = tempfile::Builder::new().prefix("mcp-sensor-bed-").tempdir()?;
        Ok(Bed { peer, sniffer, cgroup, network, folder })
    }

    /// A copy of `attempt` that an `exe` rule can name.
    pub fn copy_of_attempt(&self, name: &str) -> Result<PathBuf> {
        use std::os::unix::fs::PermissionsExt;
        // Any user may run it.
        std::fs::set_permissions(self.folder.path(), std::fs::Permissions::from_mode(0o755))?;
        let path = self.folder.path().join(name);
        std::fs::copy(built("attempt")?, &path)?;
        Ok(path)
    }

    /// Starts a program that says when it is ready and waits for `go`.
    pub fn start_until_ready(&self, command: Command) -> Result<Running> {
        let mut running = Running::start(command)?;
        running.wait_for_line(READY, LIMIT)?;
        Ok(running)
    }

    /// The report of a program that was started before.
    pub fn finish(&self, running: Running) -> Result<Tried> {
        let done = running.finish(LIMIT)?;
        let report = done.lines.iter().rev().find_map(|l| serde_json::from_str(l).ok());
        let report = report.with_context(|| format!("no report: {:?} {}", done.lines, done.stderr))?;
        Ok(Tried { report, frames: self.frames()? })
    }

    /// A program in the test's cgroup and the server's namespace, without a label.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let mut command = Command::new(program);
        enter(&mut command, self.network.server.try_clone()?, Some(self.cgroup.entrance()?));
        Ok(command)
    }

    pub fn attempt(&self, arguments: &[String]) -> Result<Command> {
        let mut command = self.command(built("attempt")?)?;
        command.args(arguments);
        Ok(command)
    }

    /// A program as `server`, by `mcp-sensor exec`.
    pub fn labelled(&self, sensor: &Sensor, server: &str, program: impl AsRef<OsStr>) -> Result<Command> {
        let mut command = self.command(binary()?)?;
        command.arg("exec").arg("--control").arg(sensor.control_path());
        command.args(["--server", server, "--"]).arg(program);
        Ok(command)
    }

    pub fn labelled_attempt(&self, sensor: &Sensor, server: &str, arguments: &[String]) -> Result<Command> {
        let mut command = self.labelled(sensor, server, built("attempt")?)?;
        command.args(arguments);
        Ok(command)
    }

    /// Runs an attempt to its end and takes the frames that came of it.
    pub fn try_out(&self, command: Command) -> Result<Tried> {
        let what = format!("{command:?}");
        self.finish(Running::start(command)?).with_context(|| what)
    }

    /// What reached the peer since the last call; bare RST apart.
    pub fn frames(&self) -> Result<Vec<Frame>> {
        let mut frames = self.sniffer.frames()?;
        frames.retain(|f| !f.is_bare_reset());
        Ok(frames)
    }
}
