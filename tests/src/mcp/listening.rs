//! Servers that listen for HTTP, in the server's namespace.

use super::servers::{node_package, own};
use super::session::{Session, Transport};
use crate::bed::Bed;
use crate::drivers::{found, installed};
use crate::policy::Policy;
use crate::run::Running;
use crate::sensor::SOON;
use anyhow::{Result, ensure};
use serde_json::Value;
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Each test has a namespace of its own.
pub const PORT: u16 = 3901;
/// An interpreter starts on a machine that runs other tests as well.
const START: Duration = Duration::from_secs(60);

/// A script that only one test's policy knows, and how it is run.
pub struct Listener {
    /// Its name in the policy.
    pub name: &'static str,
    pub script: PathBuf,
    interpreter: PathBuf,
    arguments: Vec<String>,
    pub transport: Transport,
}

impl Listener {
    pub fn everything(bed: &Bed, name: &'static str, transport: Transport) -> Result<Listener> {
        let index = node_package("@modelcontextprotocol/server-everything")?.join("dist/index.js");
        let script = unique(bed, "everything.mjs");
        std::fs::write(&script, format!("import {index:?};\n"))?;
        let how = match transport {
            Transport::Streamable => "streamableHttp",
            Transport::Sse => "sse",
        };
        let interpreter = found("node").unwrap_or_else(|| "node".into());
        Ok(Listener { name, script, interpreter, arguments: vec![how.into()], transport })
    }

    /// `listens.py` of `tests/servers`, on the Python SDK of `venv`.
    pub fn python_sdk(bed: &Bed, name: &'static str, venv: &str, arguments: &[&str]) -> Result<Listener> {
        let interpreter = installed(venv)?.join("bin/python");
        Listener::python(bed, name, "listens.py", interpreter, arguments)
    }

    /// `file` of `tests/servers`, without any package.
    pub fn plain(bed: &Bed, name: &'static str, file: &str, arguments: &[&str]) -> Result<Listener> {
        let interpreter = found("python3").unwrap_or_else(|| "python3".into());
        Listener::python(bed, name, file, interpreter, arguments)
    }

    fn python(
        bed: &Bed,
        name: &'static str,
        file: &str,
        interpreter: PathBuf,
        arguments: &[&str],
    ) -> Result<Listener> {
        let script = unique(bed, file);
        std::fs::copy(own(file), &script)?;
        let arguments = arguments.iter().map(|a| (*a).to_owned()).collect();
        Ok(Listener { name, script, interpreter, arguments, transport: Transport::Streamable })
    }

    /// The rule that knows it.
    pub fn rule(&self) -> String {
        let name = self.script.file_name().unwrap_or_default().to_string_lossy();
        format!("match: [{{script: {name}}}]")
    }

    /// Recorded, never denied.
    pub fn declared(&self, policy: Policy) -> Policy {
        policy.server(self.name, "unrestricted", "audit", &self.rule())
    }

    pub fn command(&self, bed: &Bed) -> Result<Command> {
        let mut command = bed.command(&self.interpreter)?;
        command.arg(&self.script).args(&self.arguments).env("PORT", PORT.to_string());
        Ok(command)
    }

    /// Starts it and waits until it takes connections.
    pub fn start(&self, bed: &Bed) -> Result<Running> {
        let mut running = Running::start(self.command(bed)?)?;
        let deadline = Instant::now() + START;
        loop {
            let open =
                bed.network.server.within(|| Ok(TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).is_ok()));
            if open? {
                return Ok(running);
            }
            ensure!(!running.is_over()?, "{:?} ended", self.script);
            ensure!(Instant::now() < deadline, "{:?} does not listen within {START:?}", self.script);
            std::thread::sleep(SOON / 100);
        }
    }

    pub fn session(&self, phases: Value) -> Session {
        let path = match self.transport {
            Transport::Streamable => "mcp",
            Transport::Sse => "sse",
        };
        Session::at(self.transport, format!("http://127.0.0.1:{PORT}/{path}"), phases)
    }
}

/// A name in the test's folder that no other test's policy knows.
fn unique(bed: &Bed, file: &str) -> PathBuf {
    let folder: &Path = bed.folder.path();
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    folder.join(format!("{name}-{file}"))
}
