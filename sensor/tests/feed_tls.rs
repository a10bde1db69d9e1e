//! TLS between sensors and a collector: who is taken, who is refused, and that
//! both ends say why.

mod support;

use mcp_sensor::collect::{Archive, Collector, Listen};
use mcp_sensor::event::file::Rotation;
use mcp_sensor::event::{Body, Bus, Identity, Limits, pb};
use mcp_sensor::feed::{self, Feed, MAX_BATCH_BYTES, Settings, SpoolSettings, Target};
use mcp_sensor::tls::{Authority, Files, Pair, Subject, Tls, Validity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pb::collector_client::CollectorClient;
use pb::{feed_request, feed_response};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, RootCertStore};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use support::DEADLINE;
use support::log::Log;
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tonic::Code;

const ROTATION: Rotation = Rotation { max_bytes: 1 << 20, keep: 100 };
const SENSOR: &str = "web-1";

fn days(days: u32) -> Validity {
    Validity::days(days).unwrap()
}

/// A CA, and a folder with what it issued.
struct Fleet {
    dir: tempfile::TempDir,
    ca: Authority,
}

impl Fleet {
    fn new() -> Fleet {
        let fleet = Fleet { dir: tempfile::tempdir().unwrap(), ca: Authority::create(days(30)).unwrap() };
        std::fs::write(fleet.path("ca.pem"), fleet.ca.pair().certificate).unwrap();
        fleet
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, pair: &Pair) -> Files {
        let (certificate, key) = (self.path(&format!("{name}.pem")), self.path(&format!("{name}-key.pem")));
        std::fs::write(&certificate, &pair.certificate).unwrap();
        std::fs::write(&key, &pair.key).unwrap();
        Files { ca: self.path("ca.pem"), certificate, key }
    }

    fn sensor(&self, name: &str, validity: Validity) -> Arc<Tls> {
        let pair = self.ca.issue(&Subject::Sensor(name.to_owned()), validity).unwrap();
        Tls::open(self.write(&format!("sensor-{name}"), &pair)).unwrap()
    }

    fn collector(&self, hosts: &[&str], validity: Validity) -> Arc<Tls> {
        let hosts = hosts.iter().map(|h| (*h).to_owned()).collect();
        let pair = self.ca.issue(&Subject::Collector(hosts), validity).unwrap();
        Tls::open(self.write("collector", &pair)).unwrap()
    }
}

fn past() -> Validity {
    let now = OffsetDateTime::now_utc();
    Validity { not_before: now - time::Duration::days(3), not_after: now - time::Duration::days(1) }
}

fn future() -> Validity {
    let now = OffsetDateTime::now_utc();
    Validity { not_before: now + time::Duration::days(1), not_after: now + time::Duration::days(3) }
}

/// A collector in this process.
struct Running {
    address: String,
    end: oneshot::Sender<()>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Running {
    async fn start(dir: &Path, tls: Option<Arc<Tls>>) -> Running {
        Running::on(dir, "127.0.0.1:0", tls).await
    }

    async fn on(dir: &Path, listen: &str, tls: Option<Arc<Tls>>) -> Running {
        let archive = Archive::open(&dir.join("events"), support::collector::LARGE, Some(ROTATION)).unwrap();
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

    fn socket(&self) -> SocketAddr {
        self.address.split_once("://").unwrap().1.parse().unwrap()
    }

    async fn stop(self) {
        let _ = self.end.send(());
        timeout(DEADLINE, self.task).await.unwrap().unwrap().unwrap();
    }
}

/// A sensor's part: its bus and its feed.
struct Sensor {
    bus: Arc<Bus>,
    feed: Feed,
    task: JoinHandle<()>,
}

impl Sensor {
    fn start(dir: &Path, address: &str, tls: Option<Arc<Tls>>) -> Sensor {
        Sensor::named(SENSOR, dir, address, tls)
    }

    fn named(name: &str, dir: &Path, address: &str, tls: Option<Arc<Tls>>) -> Sensor {
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

    fn publish(&self, events: u64) {
        for _ in 0..events {
            let argv = vec!["git".to_owned(), "status".to_owned()];
            self.bus.publish_now(Body::Exec(pb::Exec { argv, ..Default::default() }));
        }
    }

    /// Waits for a reason that it has no stream.
    async fn refused(&self, why: &str) {
        until(&format!("{why:?} in the state"), || self.feed.state().error.contains(why)).await;
        assert!(!self.feed.state().connected);
        assert_eq!(self.feed.state().acked_seq, 0);
    }

    async fn stored(&self, seq: u64) {
        until(&format!("{seq} is stored; {:?}", self.feed.state()), || self.feed.state().acked_seq >= seq)
            .await;
    }

    async fn stop(self) {
        self.bus.close();
        timeout(DEADLINE, self.task).await.unwrap().unwrap();
    }
}

/// Waits for a condition that another task brings about.
async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let waiting = async {
        let mut tick = tokio::time::interval(Duration::from_millis(2));
        while !condition() {
            tick.tick().await;
        }
    };
    timeout(DEADLINE, waiting).await.unwrap_or_else(|_| panic!("not reached: {what}"));
}

/// Sensor and number of every stored event, oldest first.
fn stored(dir: &Path) -> Vec<(String, u64)> {
    let text = std::fs::read_to_string(dir.join("events/events.ndjson")).unwrap_or_default();
    text.lines()
        .map(|line| {
            let event: serde_json::Value = serde_json::from_str(line).unwrap();
            (event["sensor"].as_str().unwrap().to_owned(), event["seq"].as_u64().unwrap())
        })
        .collect()
}

fn seqs(dir: &Path) -> Vec<u64> {
    stored(dir).into_iter().map(|(_, seq)| seq).collect()
}

/// A client of the test's own making.
fn client(
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

/// The alert that ends this client's connection.
async fn alert(config: ClientConfig, at: SocketAddr) -> rustls::AlertDescription {
    let stream = TcpStream::connect(at).await.unwrap();
    let name = ServerName::from(at.ip());
    let ended = async {
        let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
        stream.read_to_end(&mut Vec::new()).await?;
        Ok::<_, std::io::Error>(())
    };
    let error = timeout(DEADLINE, ended).await.unwrap().expect_err("it is refused");
    match error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::AlertReceived(alert)) => *alert,
        _ => panic!("{error:?}"),
    }
}

#[tokio::test]
async fn a_sensor_and_a_collector_of_one_ca_know_each_other() {
    let fleet = Fleet::new();
    let collector = Running::start(fleet.dir.path(), Some(fleet.collector(&["127.0.0.1"], days(1)))).await;
    assert!(collector.address.starts_with("https://127.0.0.1:"));
    let tls = fleet.sensor(SENSOR, days(1));
    let until = tls.state().certificate.not_after;
    let sensor = Sensor::start(fleet.dir.path(), &collector.address, Some(tls));
    sensor.publish(2000);
    sensor.stored(2000).await;
    let state = sensor.feed.state();
    let tls = state.tls.unwrap();
    assert_eq!((tls.id.as_str(), tls.error.as_str()), ("spiffe://mcp-sensor/sensor/web-1", ""));
    assert_eq!(tls.not_after_unix_ns, until * 1_000_000_000);
    sensor.stop().await;
    collector.stop().await;
    let expected: Vec<_> = (1..=2000).map(|seq| (SENSOR.to_owned(), seq)).collect();
    assert_eq!(stored(fleet.dir.path()), expected, "each once and in order");
}

#[tokio::test]
async fn a_sensor_by_another_name_is_refused_and_both_ends_say_why() {
    let log = Log::start();
    let fleet = Fleet::new();
    let collector = Running::start(fleet.dir.path(), Some(fleet.collector(&["127.0.0.1"], days(1)))).await;
    let sensor =
        Sensor::named("web-2", fleet.dir.path(), &collector.address, Some(fleet.sensor(SENSOR, days(1))));
    sensor.publish(1);
    let why = "this certificate is of spiffe://mcp-sensor/sensor/web-1, not of the sensor \"web-2\"";
    sensor.refused(why).await;
    assert!(log.has("the collector will refuse it"), "told before it tries");
    assert!(log.has("a sensor's stream ended"));
    collector.stop().await;
    assert!(stored(fleet.dir.path()).is_empty());
}

#[tokio::test]
async fn sensors_that_the_collector_cannot_verify_are_refused_and_both_ends_say_why() {
    let log = Log::start();
    let (fleet, other) = (Fleet::new(), Fleet::new());
    let collector = Running::start(fleet.dir.path(), Some(fleet.collector(&["127.0.0.1"], days(1)))).await;
    let stranger = other.ca.issue(&Subject::Sensor(SENSOR.to_owned()), days(1)).unwrap();
    let posing = fleet.ca.issue(&Subject::Collector(vec![SENSOR.to_owned()]), days(1)).unwrap();
    for (name, tls, sensor_says, collector_says) in [
        (
            "stranger",
            Tls::open(fleet.write("stranger", &stranger)).unwrap(),
            "not from a CA that the collector trusts",
            "not from the CA in --tls-ca",
        ),
        ("expired", fleet.sensor("expired", past()), "expired", "it has expired"),
        ("early", fleet.sensor("early", future()), "not valid yet", "not valid yet"),
        (
            "posing",
            Tls::open(fleet.write("posing", &posing)).unwrap(),
            "refused this sensor's certificate",
            "for another purpose",
        ),
    ] {
        let sensor = Sensor::named(name, fleet.dir.path(), &collector.address, Some(tls));
        sensor.publish(1);
        sensor.refused(sensor_says).await;
        until(collector_says, || log.has(collector_says)).await;
        sensor.task.abort();
    }
    collector.stop().await;
    assert!(stored(fleet.dir.path()).is_empty());
}

#[tokio::test]
async fn clients_without_a_certificate_or_with_an_old_tls_get_an_alert() {
    let log = Log::start();
    let fleet = Fleet::new();
    let collector = Running::start(fleet.dir.path(), Some(fleet.collector(&["127.0.0.1"], days(1)))).await;
    let pair = fleet.ca.issue(&Subject::Sensor(SENSOR.to_owned()), days(1)).unwrap();
    let none = alert(client(&fleet, None, &[&TLS13]), collector.socket()).await;
    assert_eq!(none, rustls::AlertDescription::CertificateRequired);
    let old = alert(client(&fleet, Some(&pair), &[&TLS12]), collector.socket()).await;
    assert_eq!(old, rustls::AlertDescription::ProtocolVersion);
    for said in ["it has no certificate", "it does not speak TLS 1.3"] {
        until(said, || log.has(said)).await;
    }
    collector.stop().await;
}

#[tokio::test]
async fn plain_and_tls_do_not_mix_and_both_ends_say_so() {
    let log = Log::start();
    let fleet = Fleet::new();
    let secured = Running::start(fleet.dir.path(), Some(fleet.collector(&["127.0.0.1"], days(1)))).await;
    let address = secured.address.replace("https", "http");
    let plain_sensor = Sensor::named("plain", fleet.dir.path(), &address, None);
    plain_sensor.refused("write https://").await;
    until("the collector's log", || log.has("it does not speak TLS")).await;
    plain_sensor.task.abort();
    secured.stop().await;

    let dir = tempfile::tempdir().unwrap();
    let plain = Running::start(dir.path(), None).await;
    let address = plain.address.replace("http", "https");
    let sensor = Sensor::start(fleet.dir.path(), &address, Some(fleet.sensor(SENSOR, days(1))));
    sensor.refused("does not speak TLS").await;
    sensor.task.abort();
    plain.stop().await;
}

#[tokio::test]
async fn a_sensor_refuses_a_collector_that_it_cannot_verify() {
    let (fleet, other) = (Fleet::new(), Fleet::new());
    let posing = fleet.ca.issue(&Subject::Sensor("127.0.0.1".to_owned()), days(1)).unwrap();
    let address = ["127.0.0.1"];
    for (tls, why) in [
        (other.collector(&address, days(1)), "it is not from the CA in --tls-ca"),
        (fleet.collector(&["192.0.2.1", "c.example"], days(1)), "not for 127.0.0.1"),
        (fleet.collector(&address, past()), "it has expired"),
        (fleet.collector(&address, future()), "not valid yet"),
        (Tls::open(fleet.write("posing", &posing)).unwrap(), "refused"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let collector = Running::start(dir.path(), Some(tls)).await;
        let sensor = Sensor::start(dir.path(), &collector.address, Some(fleet.sensor(SENSOR, days(1))));
        sensor.refused(why).await;
        assert!(sensor.feed.state().error.contains("collector"), "{}", sensor.feed.state().error);
        sensor.task.abort();
        collector.stop().await;
    }
}

/// A stream of one's own making, with a good certificate.
async fn raw_stream(
    fleet: &Fleet,
    at: SocketAddr,
    requests: Vec<pb::FeedRequest>,
) -> Result<Vec<String>, tonic::Status> {
    let pair = fleet.ca.issue(&Subject::Sensor(SENSOR.to_owned()), days(1)).unwrap();
    let connector = TlsConnector::from(Arc::new(client(fleet, Some(&pair), &[&TLS13])));
    let dial = tower::service_fn(move |_| {
        let connector = connector.clone();
        async move {
            let stream = TcpStream::connect(at).await?;
            let stream = connector.connect(ServerName::from(at.ip()), stream).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    });
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{at}"))
        .unwrap()
        .connect_with_connector(dial)
        .await
        .unwrap();
    let mut client = CollectorClient::new(channel);
    let mut answers = client.feed(tokio_stream::iter(requests)).await?.into_inner();
    let mut got = Vec::new();
    while let Some(answer) = timeout(DEADLINE, answers.message()).await.expect("an answer")? {
        got.push(match answer.message.unwrap() {
            feed_response::Message::HelloAck(ack) => format!("hello {}", ack.committed_seq),
            feed_response::Message::Ack(ack) => format!("ack {}", ack.seq),
            feed_response::Message::Nack(nack) => format!("nack {} {}", nack.first_seq, nack.retry),
            other => panic!("{other:?}"),
        });
    }
    Ok(got)
}

fn hello() -> pb::FeedRequest {
    let hello = pb::Hello { sensor: SENSOR.to_owned(), boot: "b".to_owned(), ..Default::default() };
    pb::FeedRequest { message: Some(feed_request::Message::Hello(hello)) }
}

fn batch(seqs: &[u64], bytes: usize) -> pb::FeedRequest {
    let body = || Body::Finding(pb::Finding { detail: "x".repeat(bytes), ..Default::default() });
    let event = |seq: &u64| pb::Event { seq: *seq, body: Some(body()), ..Default::default() };
    let events = seqs.iter().map(event).collect();
    let batch = pb::Batch { first_seq: seqs[0], last_seq: seqs[seqs.len() - 1], events };
    pb::FeedRequest { message: Some(feed_request::Message::Batch(batch)) }
}

#[tokio::test]
async fn a_replayed_batch_is_stored_once_and_an_oversized_one_is_refused() {
    let fleet = Fleet::new();
    let collector = Running::start(fleet.dir.path(), Some(fleet.collector(&["127.0.0.1"], days(1)))).await;
    let at = collector.socket();
    let replay = || vec![hello(), batch(&[1, 2], 10), batch(&[1, 2], 10), batch(&[1, 2], 10)];
    let got = raw_stream(&fleet, at, replay()).await.unwrap();
    assert_eq!(got, ["hello 0", "ack 2", "ack 2", "ack 2"]);
    // Over another connection too.
    let got = raw_stream(&fleet, at, replay()).await.unwrap();
    assert_eq!(got, ["hello 2", "ack 2", "ack 2", "ack 2"]);
    // Its stream ends with the batches before it acknowledged, and nothing of it is kept.
    let large = batch(&[3], MAX_BATCH_BYTES + (128 << 10));
    let got = raw_stream(&fleet, at, vec![hello(), large, batch(&[4], 10)]).await;
    match got {
        Ok(got) => assert_eq!(got, ["hello 2"]),
        Err(status) => {
            assert!(matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted), "{status}");
        }
    }
    collector.stop().await;
    assert_eq!(seqs(fleet.dir.path()), [1, 2]);
}

#[tokio::test]
async fn certificates_are_replaced_on_both_ends_without_losing_an_event() {
    let log = Log::start();
    let fleet = Fleet::new();
    let collector_tls = fleet.collector(&["127.0.0.1"], days(1));
    let sensor_tls = fleet.sensor(SENSOR, days(1));
    let collector = Running::start(fleet.dir.path(), Some(collector_tls)).await;
    let sensor = Sensor::start(fleet.dir.path(), &collector.address, Some(sensor_tls.clone()));
    sensor.publish(500);
    sensor.stored(500).await;

    // Half of a replacement: what was good before stays in use.
    let next = fleet.ca.issue(&Subject::Sensor(SENSOR.to_owned()), days(7)).unwrap();
    let files = sensor_tls.files().clone();
    std::fs::write(&files.certificate, &next.certificate).unwrap();
    sensor.publish(500);
    sensor.stored(1000).await;
    let at = collector.socket().to_string();
    collector.stop().await;
    // A second collector with a pair of a second CA; the sensor trusts both.
    let other = Fleet::new();
    let both = fleet.ca.pair().certificate + &other.ca.pair().certificate;
    std::fs::write(other.path("ca.pem"), &both).unwrap();
    let second = Running::on(fleet.dir.path(), &at, Some(other.collector(&["127.0.0.1"], days(1)))).await;
    sensor.publish(500);
    until("the sensor says that its files are of two pairs", || {
        sensor.feed.state().tls.is_some_and(|tls| tls.error.contains("two different pairs"))
    })
    .await;
    assert!(log.has("those from before stay in use"));
    // Now the rest of it: the key, and the CA.
    std::fs::write(&files.key, &next.key).unwrap();
    std::fs::write(&files.ca, &both).unwrap();
    sensor.stored(1500).await;
    let tls = sensor.feed.state().tls.unwrap();
    assert_eq!(tls.error, "");
    assert!(tls.not_after_unix_ns / 1_000_000_000 > days(6).not_after.unix_timestamp());
    sensor.stop().await;
    second.stop().await;
    assert!(seqs(fleet.dir.path()).into_iter().eq(1..=1500), "each once and in order");
}

#[tokio::test]
async fn a_collector_takes_up_a_new_ca_while_it_serves() {
    let (fleet, other) = (Fleet::new(), Fleet::new());
    let tls = fleet.collector(&["127.0.0.1"], days(1));
    let collector = Running::start(fleet.dir.path(), Some(tls.clone())).await;
    // A sensor of the second CA, which trusts the first one.
    let pair = other.ca.issue(&Subject::Sensor(SENSOR.to_owned()), days(1)).unwrap();
    let sensor = Sensor::start(
        fleet.dir.path(),
        &collector.address,
        Some(Tls::open(fleet.write("other", &pair)).unwrap()),
    );
    sensor.publish(10);
    sensor.refused("not from a CA that the collector trusts").await;
    // The collector and its address stay; a CA file of both is another file, put in its place.
    let both = fleet.ca.pair().certificate + &other.ca.pair().certificate;
    std::fs::write(fleet.path("ca.pem.new"), both).unwrap();
    std::fs::rename(fleet.path("ca.pem.new"), &tls.files().ca).unwrap();
    sensor.stored(10).await;
    sensor.stop().await;
    collector.stop().await;
    assert!(seqs(fleet.dir.path()).into_iter().eq(1..=10));
}

#[tokio::test]
async fn a_connection_ends_with_its_sensors_certificate() {
    let fleet = Fleet::new();
    let collector = Running::start(fleet.dir.path(), Some(fleet.collector(&["127.0.0.1"], days(1)))).await;
    let now = OffsetDateTime::now_utc();
    // Long enough to connect on a slow machine; if not, the refusal is the same.
    let soon =
        Validity { not_before: now - time::Duration::HOUR, not_after: now + time::Duration::seconds(4) };
    let tls = fleet.sensor(SENSOR, soon);
    let sensor = Sensor::start(fleet.dir.path(), &collector.address, Some(tls.clone()));
    sensor.publish(10);
    until("it has expired", || sensor.feed.state().error.contains("expired")).await;
    assert!(!sensor.feed.state().connected);
    sensor.publish(10);
    let next = fleet.ca.issue(&Subject::Sensor(SENSOR.to_owned()), days(1)).unwrap();
    std::fs::write(&tls.files().certificate, &next.certificate).unwrap();
    std::fs::write(&tls.files().key, &next.key).unwrap();
    sensor.stored(20).await;
    sensor.stop().await;
    collector.stop().await;
    assert!(seqs(fleet.dir.path()).into_iter().eq(1..=20), "each once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unfinished_handshakes_are_bounded_and_keep_no_sensor_out() {
    const HALF_OPEN: usize = 1500;
    // Both ends of each connection are in this process.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(1 << 16), hard).unwrap();
    let fleet = Fleet::new();
    let collector = Running::start(fleet.dir.path(), Some(fleet.collector(&["127.0.0.1"], days(1)))).await;
    let at = collector.socket();
    let mut half_open = Vec::new();
    for n in 0..HALF_OPEN {
        let mut stream = timeout(DEADLINE, TcpStream::connect(at)).await.unwrap().unwrap();
        if n % 2 == 0 {
            // The beginning of a ClientHello, and no more.
            let _ = stream.write_all(&[0x16, 3, 1, 2, 0, 1, 0]).await;
        }
        half_open.push(stream);
    }
    let sensor = Sensor::start(fleet.dir.path(), &collector.address, Some(fleet.sensor(SENSOR, days(1))));
    sensor.publish(10);
    sensor.stored(10).await;
    // The oldest ended for the newer ones.
    let mut byte = [0; 1];
    let ended = timeout(DEADLINE, half_open[0].read(&mut byte)).await.unwrap();
    assert!(!matches!(ended, Ok(1..)), "{ended:?}");
    sensor.stop().await;
    drop(half_open);
    collector.stop().await;
    assert!(seqs(fleet.dir.path()).into_iter().eq(1..=10));
}

/// Bytes of memory that this process has.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: 100,000 connections"]
async fn a_hundred_thousand_unfinished_handshakes_cost_bounded_memory() {
    const ALL: usize = 100_000;
    const OPEN: usize = 2000;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(1 << 16), hard).unwrap();
    let fleet = Fleet::new();
    let collector = Running::start(fleet.dir.path(), Some(fleet.collector(&["127.0.0.1"], days(1)))).await;
    let at = collector.socket();
    let mut half_open = std::collections::VecDeque::new();
    let mut before = 0;
    for n in 0..ALL {
        // An address of its own for each ten thousand: they have ports enough.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        let from = std::net::Ipv4Addr::new(127, 1, 0, 1 + (n / 10_000) as u8);
        socket.bind(SocketAddr::new(from.into(), 0)).unwrap();
        let mut stream = timeout(DEADLINE, socket.connect(at)).await.unwrap().unwrap();
        let _ = stream.write_all(&[0x16, 3, 1, 2, 0, 1, 0]).await;
        half_open.push_back(stream);
        if half_open.len() > OPEN {
            half_open.pop_front();
        }
        if n == ALL / 10 {
            before = resident();
        }
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 32 << 20, "{grown} bytes more after the first tenth");
    let sensor = Sensor::start(fleet.dir.path(), &collector.address, Some(fleet.sensor(SENSOR, days(1))));
    sensor.publish(10);
    sensor.stored(10).await;
    sensor.stop().await;
    drop(half_open);
    collector.stop().await;
    assert!(seqs(fleet.dir.path()).into_iter().eq(1..=10));
}

/// A sensor may send; reading what others sent takes another certificate.
#[tokio::test]
async fn only_a_readers_certificate_reads() {
    use pb::events_client::EventsClient;
    let fleet = Fleet::new();
    let collector = Running::start(fleet.dir.path(), Some(fleet.collector(&["127.0.0.1"], days(1)))).await;
    for (subject, code) in [
        (Subject::Sensor(SENSOR.to_owned()), Some(Code::PermissionDenied)),
        (Subject::Reader("siem".to_owned()), None),
    ] {
        let pair = fleet.ca.issue(&subject, days(1)).unwrap();
        let tls = Tls::open(fleet.write("client", &pair)).unwrap();
        let target = Target::new(&collector.address, Some(tls), false).unwrap();
        let mut client = EventsClient::new(target.open(Duration::from_secs(10)).await.unwrap());
        let asked = client.fleet(pb::FleetRequest::default()).await.err().map(|s| s.code());
        let query = client.query(pb::QueryRequest::default()).await.err().map(|s| s.code());
        let subscribed = client.subscribe(pb::SubscribeRequest::default()).await.err().map(|s| s.code());
        assert_eq!((asked, query, subscribed), (code, code, code), "{subject:?}");
    }
    collector.stop().await;
}
