//! Outputs to a real HTTP server, which refuses, delays, breaks off and dies.

mod support;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;
use support::collector::{batches, feed};
use support::receiver::{
    Collecting, Key, assert_all, certificates, free_port, got, key, missing, spawn, until,
};
use tokio::process::Child;

struct Server {
    port: u16,
    file: PathBuf,
    seed: u64,
    more: Vec<String>,
    child: Option<Child>,
}

impl Server {
    /// `more`: as `webhook.py` takes it after the seed.
    async fn start(dir: &Path, more: &[&str]) -> Server {
        let more = more.iter().map(|m| (*m).to_owned()).collect();
        let mut server = Server { port: free_port(), file: dir.join("got"), seed: 1, more, child: None };
        server.run().await;
        server
    }

    async fn run(&mut self) {
        let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/programs/webhook.py");
        let (port, seed) = (self.port.to_string(), self.seed.to_string());
        let mut args = vec![program, &port, self.file.to_str().unwrap(), &seed];
        args.extend(self.more.iter().map(String::as_str));
        let mut child = spawn("python3", &args);
        self.seed += 1;
        let address = ("127.0.0.1", self.port);
        until("the server listens", || {
            assert!(child.try_wait().unwrap().is_none(), "webhook.py ended");
            std::net::TcpStream::connect(address).is_ok()
        })
        .await;
        self.child = Some(child);
    }

    async fn kill(&mut self) {
        self.child.take().unwrap().kill().await.unwrap();
    }

    fn has(&self, wanted: &BTreeSet<Key>) -> bool {
        got(&self.file).iter().map(key).collect::<BTreeSet<Key>>().is_superset(wanted)
    }
}

fn keys(seqs: impl IntoIterator<Item = u64>) -> BTreeSet<Key> {
    seqs.into_iter().map(|seq| ("web-1".to_owned(), "b1".to_owned(), seq)).collect()
}

async fn send(collecting: &Collecting, seqs: std::ops::RangeInclusive<u64>) {
    feed(&collecting.address, "web-1", "b1", batches(seqs, 100)).await;
}

#[tokio::test]
async fn what_a_receiver_has_and_what_it_was_told_is_lost_is_everything() {
    if missing("python3", "python3") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path(), &["faults"]).await;
    let outputs = format!(
        "outputs:\n  - name: hook\n    webhook: {{url: 'http://127.0.0.1:{}/in', timeout: 150ms, max_bytes: 8192}}\n",
        server.port
    );
    let mut collecting = Collecting::start(dir.path(), &outputs, &[]).await;
    for round in 0..3u64 {
        let killing = async {
            tokio::time::sleep(Duration::from_millis(40 * round)).await;
            server.kill().await;
        };
        tokio::join!(send(&collecting, round * 200 + 1..=round * 200 + 200), killing);
        server.run().await;
        if round == 1 {
            collecting.kill().await;
            collecting = Collecting::start(dir.path(), &outputs, &[]).await;
        }
    }
    let bad = |seq: u64| seq.is_multiple_of(97);
    let wanted = keys((1..=600).filter(|n| !bad(*n)));
    until("what it takes is there", || server.has(&wanted)).await;
    let state = collecting.wait("hook", |s| s.lag == 0 && s.error.is_empty()).await;
    let lost: u64 = state.lost_by_reason.values().sum();
    assert_eq!(lost, state.lost);
    assert!(state.lost_by_reason.keys().all(|r| ["refused", "too_large"].contains(&r.as_str())));
    // The loss of the last one is told after it.
    let told = || -> u64 {
        let values = got(&server.file);
        let losses = values.iter().filter(|v| v["type"] == "loss" && v["where"] == "output:hook");
        losses.map(|v| v["count"].as_u64().unwrap()).sum()
    };
    let all_bad = (1..=600).filter(|n| bad(*n)).count() as u64;
    // A receiver or a collector that was killed may hear of one again.
    until("the losses are told", || told() >= all_bad).await;
    assert!(lost <= all_bad);
    assert_all(&got(&server.file), &wanted);
}

#[tokio::test]
async fn over_tls_with_a_secret_and_compressed_arrays_each_event_comes_once() {
    if missing("python3", "python3") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    std::fs::write(dir.path().join("token"), "Bearer hunter2\n").unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (cert, private, ca) = (path("server.pem"), path("server-key.pem"), path("ca.pem"));
    let mut server = Server::start(dir.path(), &["well", &cert, &private, &ca, "Bearer hunter2"]).await;
    let outputs = format!(
        "outputs:
  - name: hook
    filter: {{types: [exec]}}
    webhook:
      url: https://localhost:{}/in?source=mcp
      ca: ca.pem
      cert: client.pem
      key: client-key.pem
      headers: {{Authorization: 'file:token', X-Source: mcp}}
      body: array
      gzip: true
",
        server.port
    );
    let collecting = Collecting::start(dir.path(), &outputs, &[]).await;
    send(&collecting, 1..=2000).await;
    let wanted = keys(1..=2000);
    until("everything is there", || server.has(&wanted)).await;
    assert_eq!(got(&server.file).len(), 2000);
    // A secret that changes is taken up; until then nothing is lost.
    server.kill().await;
    let last = server.more.len() - 1;
    server.more[last] = "Bearer swordfish".to_owned();
    server.run().await;
    send(&collecting, 2001..=2100).await;
    let state = collecting.wait("hook", |s| s.error.contains("401")).await;
    assert!(state.error.contains("who are you?") && !state.error.contains("hunter2"), "{}", state.error);
    std::fs::write(dir.path().join("token"), "Bearer swordfish\n").unwrap();
    let wanted = keys(1..=2100);
    until("the rest is there", || server.has(&wanted)).await;
    assert_all(&got(&server.file), &wanted);
    assert!(collecting.stop().await);
}
