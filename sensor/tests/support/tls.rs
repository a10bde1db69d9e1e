//! A CA and what it issues, a collector in this process and sensors that feed it
//! over TLS.

use super::DEADLINE;
use mcp_sensor::collect::{Archive, Collector, Listen};
use mcp_sensor::event::file::Rotation;
use mcp_sensor::event::{Body, Bus, Identity, Limits, pb};
use mcp_sensor::feed::{self, Feed, Settings, SpoolSettings, Target};
use mcp_sensor::tls::{Authority, Files, Pair, Subject, Tls, Validity};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

const ROTATION: Rotation = Rotation { max_bytes: 1 << 20, keep: 100 };
pub const SENSOR: &str = "web-1";

pub fn days(days: u32) -> Validity {
    Validity::days(days).unwrap()
}

/// A CA, and a folder with what it issued.
pub struct Fleet {
    pub dir: tempfile::TempDir,
    pub ca: Authority,
}

impl Fleet {
    pub fn new() -> Fleet {
        let fleet = Fleet { dir: tempfile::tempdir().unwrap(), ca: Authority::create(days(30)).unwrap() };
        std::fs::write(fleet.path("ca.pem"), fleet.ca.pair().certificate).unwrap();
        fleet
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, pair: &Pair) -> Files {
        let (certificate, key) = (self.path(&format!("{name}.pem")), self.path(&format!("{name}-key.pem")));
        std::fs::write(&certificate, &pair.certificate).unwrap();
        std::fs::write(&key, &pair.key).unwrap();
        Files { ca: self.path("ca.pem"), certificate, key }
    }

    pub fn sensor(&self, name: &str, validity: Validity) -> Arc<Tls> {
        let pair = self.ca.issue(&Subject::Sensor(name.to_owned()), validity).unwrap();
        Tls::open(self.write(&format!("sensor-{name}"), &pair)).unwrap()
    }

    pub fn collector(&self, hosts: &[&str], validity: Validity) -> Arc<Tls> {
        let hosts = hosts.iter().map(|h| (*h).to_owned()).collect();
        let pair = self.ca.issue(&Subject::Collector(hosts), validity).unwrap();
        Tls::open(self.write("collector", &pair)).unwrap()
    }
}

/// A collector in this process.
pub struct Running {
    pub address: String,
    end: oneshot::Sender<()>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Running {
    pub async fn start(dir: &Path, tls: Option<Arc<Tls>>) -> Running {
        Running::on(dir, "127.0.0.1:0", tls).await
    }

    pub async fn on(dir: &Path, listen: &str, tls: Option<Arc<Tls>>) -> Running {
        let archive = Archive::open(&dir.join("events"), super::collector::LARGE, Some(ROTATION)).unwrap();
        let listen: Listen = listen.parse().unwrap();
        let collector = Collector::bind(&listen, archive, None).await.unwrap();
        let collector = match tls {
            Some(tls) => collector.secured(tls),
            None => collector,
        };
        let address = collector.address().unwrap();
        let (end, ended) = oneshot::channel();
        let task = tokio::spawn(collector.serve(async move {
            let _ = ended.await;
        }));
        Running { address, end, task }
    }

    pub fn socket(&self) -> SocketAddr {
        self.address.split_once("://").unwrap().1.parse().unwrap()
    }

    pub async fn stop(self) {
        let _ = self.end.send(());
        timeout(DEADLINE, self.task).await.unwrap().unwrap().unwrap();
    }
}

/// A sensor's part: its bus and its feed.
pub struct Sensor {
    pub bus: Arc<Bus>,
    pub feed: Feed,
    pub task: JoinHandle<()>,
}

impl Sensor {
    pub fn start(dir: &Path, address: &str, tls: Option<Arc<Tls>>) -> Sensor {
        Sensor::named(SENSOR, dir, address, tls)
    }

    pub fn named(name: &str, dir: &Path, address: &str, tls: Option<Arc<Tls>>) -> Sensor {
        let identity = Identity { sensor: name.to_owned(), boot: "boot-1".to_owned() };
        let bus = Bus::new(identity, Limits::default());
        let subscriber = bus.subscribe("collector", 100_000).unwrap();
        let backoff = (Duration::from_millis(10), Duration::from_millis(50));
        let settings = Settings { backoff, drain: DEADLINE, ..Settings::default() };
        let spool = SpoolSettings {
            dir: dir.join(format!("spool-{name}")),
            limits: feed::spool::Limits { bytes: 64 << 20 },
        };
        let target = Target::new(address, tls, false).unwrap();
        let (feed, task) = feed::spawn(bus.clone(), subscriber, target, &spool, settings, None).unwrap();
        Sensor { bus, feed, task }
    }

    pub fn publish(&self, events: u64) {
        for _ in 0..events {
            let argv = vec!["git".to_owned(), "status".to_owned()];
            self.bus.publish_now(Body::Exec(pb::Exec { argv, ..Default::default() }));
        }
    }

    /// Waits for a reason that it has no stream.
    pub async fn refused(&self, why: &str) {
        until(&format!("{why:?} in the state"), || self.feed.state().error.contains(why)).await;
        assert!(!self.feed.state().connected);
        assert_eq!(self.feed.state().acked_seq, 0);
    }

    pub async fn stored(&self, seq: u64) {
        until(&format!("{seq} is stored; {:?}", self.feed.state()), || self.feed.state().acked_seq >= seq)
            .await;
    }

    pub async fn stop(self) {
        self.bus.close();
        timeout(DEADLINE, self.task).await.unwrap().unwrap();
    }
}

/// Waits for a condition that another task brings about.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let waiting = async {
        let mut tick = tokio::time::interval(Duration::from_millis(2));
        while !condition() {
            tick.tick().await;
        }
    };
    timeout(DEADLINE, waiting).await.unwrap_or_else(|_| panic!("not reached: {what}"));
}

/// Sensor and number of every stored event, oldest first.
pub fn stored(dir: &Path) -> Vec<(String, u64)> {
    let text = std::fs::read_to_string(dir.join("events/events.ndjson")).unwrap_or_default();
    text.lines()
        .map(|line| {
            let event: serde_json::Value = serde_json::from_str(line).unwrap();
            (event["sensor"].as_str().unwrap().to_owned(), event["seq"].as_u64().unwrap())
        })
        .collect()
}

pub fn seqs(dir: &Path) -> Vec<u64> {
    stored(dir).into_iter().map(|(_, seq)| seq).collect()
}

/// A client of the test's own making.
pub fn client(
    fleet: &Fleet,
    pair: Option<&Pair>,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    let ca = fleet.ca.pair().certificate;
    roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match pair {
        None => builder.with_no_client_auth(),
        Some(pair) => builder
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_slice(pair.certificate.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap(),
            )
            .unwrap(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}
