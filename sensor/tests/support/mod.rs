//! A stand-in for the agent, behind the real control service.

// Each test crate uses its part of this.
#![allow(dead_code, unreachable_pub)]

pub mod collector;
pub mod driver;
pub mod http2;
pub mod log;
pub mod nats;
pub mod otlp;
pub mod outputs;
pub mod receiver;
pub mod reflection;
pub mod tls;

use mcp_sensor::control::{self, Agent, ControlError, ControlSocket, Limits, Peer};
use mcp_sensor::event::{Body, Bus, Identity, pb};
use mcp_sensor::health::Health;
use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// For anything that must happen; a test that needs it all has failed.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Names that a [`FakeAgent`] knows.
pub const NAMES: usize = 1300;

pub struct FakeAgent {
    bus: Arc<Bus>,
    labelled: Mutex<HashSet<u32>>,
    modes: Mutex<Vec<(String, pb::Mode)>>,
    label_all: AtomicBool,
    pub health: tokio::sync::watch::Sender<mcp_sensor::health::State>,
}

impl FakeAgent {
    pub fn new() -> Arc<FakeAgent> {
        let identity = Identity { sensor: "host".to_owned(), boot: "boot-1".to_owned() };
        let bus = Bus::new(identity, mcp_sensor::event::Limits::default());
        Arc::new(FakeAgent {
            bus,
            labelled: Mutex::default(),
            modes: Mutex::default(),
            label_all: AtomicBool::new(false),
            health: tokio::sync::watch::Sender::default(),
        })
    }

    pub fn label(&self, pid: u32) {
        self.labelled.lock().unwrap().insert(pid);
    }

    /// Every caller is a labelled server from now on.
    pub fn label_all(&self) {
        self.label_all.store(true, Ordering::Relaxed);
    }

    pub fn bus_publish(&self, body: Body) -> u64 {
        self.bus.publish_now(body)
    }

    pub fn close(&self) {
        self.bus.close();
    }

    pub fn history(&self) -> Vec<Body> {
        self.bus.history(|_| true).iter().filter_map(|e| e.body.clone()).collect()
    }

    /// Readers of events at this moment.
    pub fn readers(&self) -> usize {
        self.bus.subscribers().len()
    }

    pub fn unlabel(&self, pid: u32) {
        self.labelled.lock().unwrap().remove(&pid);
    }
}

#[tonic::async_trait]
impl Agent for FakeAgent {
    fn bus(&self) -> &Arc<Bus> {
        &self.bus
    }

    fn health(&self) -> Health {
        self.health.subscribe()
    }

    fn is_labelled(&self, pid: u32) -> bool {
        self.label_all.load(Ordering::Relaxed) || self.labelled.lock().unwrap().contains(&pid)
    }

    async fn status(&self) -> Result<pb::StatusResponse, ControlError> {
        Ok(pb::StatusResponse { version: "1".to_owned(), servers: 1, ..Default::default() })
    }

    async fn servers(&self, server: Option<&str>) -> Result<Vec<pb::Server>, ControlError> {
        match server {
            None | Some("time") => Ok(vec![pb::Server { name: "time".to_owned(), ..Default::default() }]),
            Some(other) => Err(ControlError::NotFound(format!("no server {other}"))),
        }
    }

    async fn names(&self, server: Option<&str>) -> Result<Vec<pb::LearnedName>, ControlError> {
        if server.is_some_and(|s| s != "time") {
            return Err(ControlError::NotFound("no such server".to_owned()));
        }
        // Enough for more than one message.
        Ok((0..NAMES)
            .map(|i| pb::LearnedName {
                server: "time".to_owned(),
                name: format!("{i}.time.example\u{1b}"),
                address: "192.0.2.1".to_owned(),
                resolver: "10.0.0.2".to_owned(),
                netns: 1,
                ttl: 30,
                learned_unix_ns: 1,
                until_unix_ns: 2,
                expired: i % 2 == 0,
                rules: vec!["profiles.time.egress[0]".to_owned()],
            })
            .collect())
    }

    async fn tools(&self, server: Option<&str>) -> Result<Vec<pb::ServerTools>, ControlError> {
        if server.is_some_and(|s| s != "time") {
            return Err(ControlError::NotFound("no such server".to_owned()));
        }
        let tool = pb::Tool {
            name: "now\u{1b}".to_owned(),
            hash: "ab".repeat(32),
            description_hash: "cd".repeat(32),
            schema_hash: "ef".repeat(32),
        };
        Ok(vec![pb::ServerTools {
            server: "time".to_owned(),
            program: "mcp-server-time".to_owned(),
            seen_unix_ns: 3,
            lists: vec![pb::ToolList {
                era: pb::Era::Modern.into(),
                list_hash: "01".repeat(32),
                seen_unix_ns: 3,
                tools: vec![pb::ListedTool { tool: Some(tool), first_seen_unix_ns: 1, changed_unix_ns: 2 }],
                ..Default::default()
            }],
            ..Default::default()
        }])
    }

    async fn policy(&self) -> Result<pb::PolicyShowResponse, ControlError> {
        Ok(pb::PolicyShowResponse { text: "version: 1\n".to_owned(), ..Default::default() })
    }

    async fn reload(&self) -> Result<pb::PolicyReloadResponse, ControlError> {
        Err(ControlError::Invalid("policy.yaml:3:1: unknown key".to_owned()))
    }

    async fn set_mode(&self, server: &str, mode: pb::Mode) -> Result<pb::Mode, ControlError> {
        self.modes.lock().unwrap().push((server.to_owned(), mode));
        Ok(pb::Mode::Audit)
    }

    async fn launch(
        &self,
        caller: &Peer,
        server: &str,
        _argv: &[String],
    ) -> Result<pb::LaunchResponse, ControlError> {
        if server != "time" {
            return Err(ControlError::NotFound(format!("no server {server}")));
        }
        self.label(caller.pid);
        Ok(pb::LaunchResponse { instance: "i1".to_owned(), ..Default::default() })
    }
}

/// The control service of a [`FakeAgent`], on a socket of its own.
pub struct Control {
    pub agent: Arc<FakeAgent>,
    pub path: PathBuf,
    _dir: tempfile::TempDir,
    end: oneshot::Sender<()>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Control {
    pub fn start(limits: Limits) -> Control {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let agent = FakeAgent::new();
        let socket = ControlSocket::bind(&path, None).unwrap();
        let (end, ended) = oneshot::channel();
        let task = tokio::spawn(control::serve(socket, agent.clone(), limits, async move {
            let _ = ended.await;
        }));
        Control { agent, path, _dir: dir, end, task }
    }

    pub async fn stop(self) {
        let _ = self.end.send(());
        tokio::time::timeout(DEADLINE, self.task).await.unwrap().unwrap().unwrap();
        assert!(!self.path.exists(), "the socket goes with the service");
    }
}

/// A body that names `server` and holds `bytes` of text.
pub fn denial(server: &str, bytes: usize) -> Body {
    Body::Connection(pb::Connection {
        decision: Some(pb::Decision {
            verdict: pb::Verdict::Deny.into(),
            reason: "no_rule".to_owned(),
            suggestion: "x".repeat(bytes),
            ..Default::default()
        }),
        actor: Some(pb::Actor { server: server.to_owned(), ..Default::default() }),
        protocol: "tcp".to_owned(),
        ..Default::default()
    })
}
