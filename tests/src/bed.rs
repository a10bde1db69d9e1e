//! One test's world: network, cgroup subtree, listeners, sniffer.

use crate::cgroup::Subtree;
use crate::frame::Frame;
use crate::network::{Network, enter};
use crate::peer::Peer;
use crate::report::Report;
use crate::run::{Running, built};
use crate::sensor::{Sensor, binary};
use crate::sniffer::Sniffer;
use anyhow::{Context, Result};
use std::ffi::OsStr;
use std::process::Command;
use std::time::Duration;

/// An attempt's own limit is 2 s a step; more means that it hangs.
pub const LIMIT: Duration = Duration::from_secs(20);

pub struct Bed {
    pub peer: Peer,
    pub sniffer: Sniffer,
    pub cgroup: Subtree,
    pub network: Network,
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
        Ok(Bed { peer, sniffer, cgroup, network })
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
        let done = Running::start(command)?.finish(LIMIT)?;
        let report = done.lines.iter().rev().find_map(|l| serde_json::from_str(l).ok());
        let report = report.with_context(|| {
            format!("{what} reports nothing: {} {:?} {}", done.status, done.lines, done.stderr)
        })?;
        Ok(Tried { report, frames: self.frames()? })
    }

    /// What reached the peer since the last call; bare RST apart.
    pub fn frames(&self) -> Result<Vec<Frame>> {
        let mut frames = self.sniffer.frames()?;
        frames.retain(|f| !f.is_bare_reset());
        Ok(frames)
    }
}
