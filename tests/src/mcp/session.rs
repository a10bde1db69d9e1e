//! A session of a real client with a server that it starts itself: what it is
//! told to do, and the log that it brings back.

use super::log::Log;
use crate::bed::Bed;
use crate::drivers::{found, installed};
use crate::run::Running;
use anyhow::{Result, ensure};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sdk {
    Python1,
    Python2,
    Node1,
    Node2,
}

/// A client. `auto`: asks for the newest era first; else it begins with
/// `initialize`. `sockets`: a loop that gives its children sockets, not pipes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Driver {
    pub sdk: Sdk,
    pub auto: bool,
    pub sockets: bool,
}

const fn driver(sdk: Sdk, auto: bool, sockets: bool) -> Driver {
    Driver { sdk, auto, sockets }
}

pub const PYTHON_1: Driver = driver(Sdk::Python1, false, false);
pub const PYTHON_2: Driver = driver(Sdk::Python2, true, false);
pub const NODE_1: Driver = driver(Sdk::Node1, false, true);
pub const NODE_2: Driver = driver(Sdk::Node2, true, true);
pub const ALL: [Driver; 7] = [
    PYTHON_1,
    driver(Sdk::Python2, false, false),
    PYTHON_2,
    driver(Sdk::Python2, true, true),
    NODE_1,
    driver(Sdk::Node2, false, true),
    NODE_2,
];

/// Over HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Streamable,
    /// HTTP+SSE, of 2024-11-05.
    Sse,
}

impl Transport {
    /// In the sensor's words.
    pub fn name(self) -> &'static str {
        match self {
            Transport::Streamable => "http",
            Transport::Sse => "sse",
        }
    }
}

/// What a driver is to do with a server.
#[derive(Clone, Debug)]
pub struct Session {
    pub command: Vec<String>,
    pub env: Vec<(String, String)>,
    /// In place of the command: where a server listens, and how it is spoken to.
    pub url: Option<(Transport, String)>,
    /// `[{"concurrency": N, "calls": [CALL…]}…]`, one phase after the other. A
    /// CALL is `{"tool", "arguments", "times", "cancel_after": seconds, "progress": true}`
    /// or `{"do": "tools"}`, `{"do": "prompt", "name", "arguments"}`,
    /// `{"do": "resource", "uri"}`, `{"do": "wait", "file"}` (until it is there).
    pub phases: Value,
}

impl Session {
    pub fn new(command: Vec<String>, phases: Value) -> Session {
        Session { command, env: Vec::new(), url: None, phases }
    }

    pub fn at(transport: Transport, url: String, phases: Value) -> Session {
        Session { command: Vec::new(), env: Vec::new(), url: Some((transport, url)), phases }
    }
}

/// A session that goes on.
pub struct Driven {
    pub running: Running,
    log: PathBuf,
    what: String,
}

impl Driver {
    pub fn start(&self, bed: &Bed, session: &Session) -> Result<Driven> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let file = |what: &str| bed.folder.path().join(format!("{number}.{what}"));
        let (log, spec) = (file("log"), file("session"));
        let env: Map<String, Value> = session.env.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
        let (python, sdk) = match self.sdk {
            Sdk::Python1 => (Some("mcp-v1"), 1),
            Sdk::Python2 => (Some("mcp-v2"), 2),
            Sdk::Node1 => (None, 1),
            Sdk::Node2 => (None, 2),
        };
        let mut spec_json = json!({
            "command": session.command, "env": env, "phases": session.phases, "log": log, "sdk": sdk,
            "mode": if self.auto { "auto" } else { "legacy" }, "uvloop": self.sockets,
        });
        if let Some((transport, url)) = &session.url {
            spec_json["transport"] = json!(transport.name());
            spec_json["url"] = json!(url);
        }
        let command = match python {
            Some(venv) => {
                let mut command = bed.command(installed(venv)?.join("bin/python"))?;
                command.arg(client("python_client.py"));
                command
            }
            None => {
                spec_json["modules"] = json!(installed("mcp-node")?);
                let mut command = bed.command(found("node").unwrap_or_else(|| "node".into()))?;
                command.arg(client("node_client.cjs"));
                command
            }
        };
        let mut command = command;
        std::fs::write(&spec, spec_json.to_string())?;
        command.arg(&spec);
        let running = Running::start(command)?;
        Ok(Driven { running, log, what: format!("{self:?} with {:?} {:?}", session.command, session.url) })
    }

    pub fn drive(&self, bed: &Bed, session: &Session, within: Duration) -> Result<Log> {
        self.start(bed, session)?.finish(within)
    }
}

impl Driven {
    pub fn finish(self, within: Duration) -> Result<Log> {
        let done = self.running.finish(within)?;
        ensure!(done.status.success(), "{}: {}\n{}", self.what, done.status, done.stderr);
        Log::read(&self.log)
    }
}

/// A script of `tests/clients`.
fn client(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("clients").join(name)
}
