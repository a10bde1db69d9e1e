//! Programs that outputs deliver to, and what they got.

use super::DEADLINE;
use super::collector::{self, events_client};
use mcp_sensor::event::pb;
use mcp_sensor::tls::{Authority, Subject, Validity};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};

/// Sensor, boot and number of an event.
pub type Key = (String, String, u64);

/// Prints why the test does nothing, unless the program is there.
pub fn missing(program: &str, package: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let there =
        std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]).any(|d| d.join(program).exists());
    if !there {
        println!("SKIP: {program} is not installed (Debian package {package})");
    }
    !there
}

/// A CA in `dir`, and `NAME.pem` and `NAME-key.pem` of a server on this host
/// (`server`) and of a client (`client`).
pub fn certificates(dir: &Path) {
    let days = Validity::days(1).unwrap();
    let ca = Authority::create(days).unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.join(name), text).unwrap();
    write("ca.pem", &ca.pair().certificate);
    let hosts = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    for (name, subject) in
        [("server", Subject::Collector(hosts)), ("client", Subject::Reader("siem".to_owned()))]
    {
        let pair = ca.issue(&subject, days).unwrap();
        write(&format!("{name}.pem"), &pair.certificate);
        write(&format!("{name}-key.pem"), &pair.key);
    }
}

/// A port of TCP and UDP that nobody has at this moment.
pub fn free_port() -> u16 {
    loop {
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        if std::net::UdpSocket::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

pub async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A collector of its own program, with these outputs.
pub struct Collecting {
    dir: PathBuf,
    child: Child,
    pub address: String,
}

impl Collecting {
    pub async fn start(dir: &Path, outputs: &str, more: &[&str]) -> Collecting {
        let file = dir.join("outputs.yaml");
        std::fs::write(&file, outputs).unwrap();
        let socket = format!("unix:{}", dir.join("c.sock").display());
        let _ = std::fs::remove_file(dir.join("c.sock"));
        let args = [&["--outputs", file.to_str().unwrap()], more].concat();
        let child = collector::collect(&dir.join("events"), &socket, &args).await;
        Collecting { dir: dir.to_owned(), child, address: socket }
    }

    pub async fn output(&self, name: &str) -> pb::OutputState {
        let fleet = events_client(&self.address).await.fleet(pb::FleetRequest::default()).await;
        let outputs = fleet.unwrap().into_inner().outputs;
        outputs.into_iter().find(|o| o.name == name).unwrap()
    }

    /// Until the output says so of itself.
    pub async fn wait(&self, name: &str, done: impl Fn(&pb::OutputState) -> bool) -> pb::OutputState {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let state = self.output(name).await;
            if done(&state) {
                return state;
            }
            assert!(Instant::now() < deadline, "{state:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// In order; true: it ended well.
    pub async fn stop(mut self) -> bool {
        let pid = nix::unistd::Pid::from_raw(self.child.id().unwrap() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        tokio::time::timeout(DEADLINE, self.child.wait()).await.unwrap().unwrap().success()
    }

    pub async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }

    /// What is in its files of lines.
    pub fn stored(&self) -> Vec<Key> {
        let text = std::fs::read_to_string(self.dir.join("events/events.ndjson")).unwrap();
        text.lines().map(|l| key(&serde_json::from_str(l).unwrap())).filter(|k| k.2 > 0).collect()
    }
}

/// Of an event in the native form.
pub fn key(value: &Value) -> Key {
    let text = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
    (text("sensor"), text("boot"), value["seq"].as_u64().unwrap_or(0))
}

/// What a receiver got: JSON at the end of each line of a file.
pub fn got(file: &Path) -> Vec<Value> {
    let text = String::from_utf8_lossy(&std::fs::read(file).unwrap_or_default()).into_owned();
    // The last line may be half there.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(|l| serde_json::from_str(&l[l.find('{').unwrap()..]).unwrap()).collect()
}

/// All of `wanted` came, each boot in order where what came again is left out;
/// and nothing else did.
pub fn assert_all(got: &[Value], wanted: &BTreeSet<Key>) {
    let mut seen = BTreeSet::new();
    let mut last: BTreeMap<(String, String), u64> = BTreeMap::new();
    for (sensor, boot, seq) in got.iter().map(key).filter(|k| k.2 > 0) {
        if seen.insert((sensor.clone(), boot.clone(), seq)) {
            let before = last.insert((sensor.clone(), boot), seq).unwrap_or(0);
            assert!(before < seq, "{sensor}: {seq} came after {before}");
        }
    }
    let missing: Vec<_> = wanted.difference(&seen).take(5).collect();
    assert!(missing.is_empty(), "{} of {} came, not {missing:?}", seen.len(), wanted.len());
    assert!(seen.is_subset(wanted));
}

/// A child that is killed with the test.
pub fn spawn(program: &str, args: &[&str]) -> Child {
    Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}"))
}
