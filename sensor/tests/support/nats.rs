//! nats-server with JetStream, as processes that can be killed.

use super::DEADLINE;
use super::receiver::free_port;
use async_nats::jetstream::stream::{Config, Stream};
use async_nats::jetstream::{self, Context};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// Debian has it where only root's PATH goes.
fn program() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]);
    places.map(|dir| dir.join("nats-server")).find(|p| p.is_file()).expect("nats-server")
}

/// Says why, where there is no server on this host.
pub fn missing() -> bool {
    super::receiver::missing("nats-server", "nats-server")
}

pub struct Node {
    pub port: u16,
    dir: tempfile::TempDir,
    child: Option<Child>,
}

impl Node {
    /// Not started. `config`: more of its configuration; `DIR` stands for a folder
    /// of its own.
    fn new(name: &str, port: u16, config: &str) -> Node {
        let dir = tempfile::tempdir().unwrap();
        let mut text = String::new();
        writeln!(text, "server_name: {name}\nlisten: 127.0.0.1:{port}").unwrap();
        writeln!(text, "jetstream {{ store_dir: \"{}\" }}", dir.path().join("store").display()).unwrap();
        text.push_str(&config.replace("DIR", dir.path().to_str().unwrap()));
        std::fs::write(dir.path().join("nats.conf"), text).unwrap();
        Node { port, dir, child: None }
    }

    pub fn put(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    pub fn start(&mut self) {
        let log = std::fs::File::create(self.dir.path().join("log")).unwrap();
        let child = Command::new(program())
            .arg("-c")
            .arg(self.dir.path().join("nats.conf"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    pub async fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().await.unwrap();
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.as_mut().is_none_or(|child| child.try_wait().unwrap().is_some())
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

/// One server, listening. `prepare` may put files beside its configuration.
pub async fn start(config: &str, prepare: impl Fn(&Node)) -> Node {
    for _ in 0..5 {
        let mut node = Node::new("one", free_port(), config);
        prepare(&node);
        node.start();
        if listening(&mut node).await {
            return node;
        }
    }
    panic!("nats-server does not listen");
}

async fn listening(node: &mut Node) -> bool {
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    for _ in 0..3000 {
        tick.tick().await;
        if tokio::net::TcpStream::connect(("127.0.0.1", node.port)).await.is_ok() {
            return true;
        }
        if node.has_ended() {
            println!("{}", node.log());
            return false;
        }
    }
    false
}

/// Three that know each other.
pub async fn cluster() -> Vec<Node> {
    let ports: Vec<(u16, u16)> = (0..3).map(|_| (free_port(), free_port())).collect();
    let routes: Vec<String> = ports.iter().map(|(_, route)| format!("nats://127.0.0.1:{route}")).collect();
    let routes = routes.join(", ");
    let mut nodes: Vec<Node> = ports
        .iter()
        .enumerate()
        .map(|(n, (port, route))| {
            let config = format!("cluster {{ name: c, listen: 127.0.0.1:{route}, routes: [{routes}] }}\n");
            Node::new(&format!("n{n}"), *port, &config)
        })
        .collect();
    for node in &mut nodes {
        node.start();
    }
    for node in &mut nodes {
        assert!(listening(node).await, "{}", node.log());
    }
    nodes
}

pub fn urls(nodes: &[Node]) -> Vec<String> {
    nodes.iter().map(|node| format!("nats://127.0.0.1:{}", node.port)).collect()
}

/// A connection that goes on with whichever server is there.
pub async fn jetstream(nodes: &[Node]) -> Context {
    let options = async_nats::ConnectOptions::new()
        .retry_on_initial_connect()
        .request_timeout(Some(Duration::from_secs(2)));
    let client = options.connect(urls(nodes)).await.unwrap();
    jetstream::new(client)
}

pub fn events(replicas: usize) -> Config {
    Config {
        name: "EVENTS".to_owned(),
        subjects: vec!["mcp-sensor.events.>".to_owned()],
        num_replicas: replicas,
        duplicate_window: Duration::from_secs(120),
        ..Default::default()
    }
}

/// Until it works: servers of a cluster have to find each other first.
pub async fn create(context: &Context, config: Config) -> Stream {
    let creating = async {
        loop {
            match context.create_stream(config.clone()).await {
                Ok(stream) => return stream,
                Err(error) => {
                    println!("no stream yet: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    };
    timeout(DEADLINE, creating).await.expect("a stream")
}

/// Messages that the stream has, once it has so many.
pub async fn wait(context: &Context, stream: &str, messages: u64) -> u64 {
    let mut seen = 0;
    let waiting = async {
        loop {
            if let Ok(stream) = context.get_stream(stream).await {
                seen = stream.cached_info().state.messages;
                if seen >= messages {
                    return;
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let in_time = timeout(4 * DEADLINE, waiting).await.is_ok();
    assert!(in_time, "{seen} of {messages} messages");
    seen
}

/// Which of a cluster leads the stream.
pub async fn leader(context: &Context, stream: &str) -> usize {
    let stream = context.get_stream(stream).await.unwrap();
    let leader = stream.cached_info().cluster.as_ref().and_then(|c| c.leader.clone()).unwrap();
    leader.trim_start_matches('n').parse().unwrap()
}

pub struct Message {
    pub subject: String,
    pub id: String,
    pub text: String,
}

/// All that the stream holds, oldest first.
pub async fn messages(context: &Context, stream: &str) -> Vec<Message> {
    let stream = context.get_stream(stream).await.unwrap();
    let state = &stream.cached_info().state;
    let mut messages = Vec::new();
    for sequence in state.first_sequence..=state.last_sequence {
        let message = stream.get_raw_message(sequence).await.unwrap();
        let id = message.headers.get("Nats-Msg-Id").map(|id| id.as_str().to_owned()).unwrap_or_default();
        let text = String::from_utf8(message.payload.to_vec()).unwrap();
        messages.push(Message { subject: message.subject.to_string(), id, text });
    }
    messages
}
