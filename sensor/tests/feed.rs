//! Events on their way to the collector, and what a collector does with a
//! sensor that misbehaves.

mod support;

use mcp_sensor::collect::log::Settings as Keep;
use mcp_sensor::collect::{Archive, Collector, Listen};
use mcp_sensor::event::file::Rotation;
use mcp_sensor::event::{Body, Bus, Identity, Limits, pb};
use mcp_sensor::feed::{self, Feed, Settings, SpoolSettings, Target};
use pb::collector_client::CollectorClient;
use pb::{feed_request, feed_response};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use support::collector::{listening, program};
use support::{DEADLINE, denial};
use tokio::io::AsyncWriteExt;
use tokio::process::Child;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::Code;
use tonic::transport::Channel;

const ROTATION: Rotation = Rotation { max_bytes: 1 << 20, keep: 100 };

fn bus() -> Arc<Bus> {
    let identity = Identity { sensor: "host".to_owned(), boot: "boot-1".to_owned() };
    Bus::new(identity, Limits::default())
}

/// Quick to come back, so that the tests are quick.
fn settings() -> Settings {
    let backoff = (Duration::from_millis(10), Duration::from_millis(50));
    Settings { backoff, drain: DEADLINE, ..Settings::default() }
}

fn telemetry() -> Body {
    Body::Exec(pb::Exec { argv: vec!["git".to_owned(), "status".to_owned()], ..Default::default() })
}

/// Waits for a condition that another task or process brings about.
async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let waiting = async {
        let mut tick = tokio::time::interval(Duration::from_millis(2));
        while !condition() {
            tick.tick().await;
        }
    };
    timeout(DEADLINE, waiting).await.unwrap_or_else(|_| panic!("not reached: {what}"));
}

/// Every stored event, oldest first.
fn stored(dir: &Path) -> Vec<serde_json::Value> {
    let number = |p: &PathBuf| p.extension().and_then(|e| e.to_str()?.parse::<u32>().ok()).unwrap_or(0);
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.file_name().unwrap().to_str().unwrap().starts_with("events.ndjson"))
        .collect();
    files.sort_by_key(|p| std::cmp::Reverse(number(p)));
    let text: String = files.iter().map(|p| std::fs::read_to_string(p).unwrap()).collect();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// The files of lines follow the log: until they hold so many events.
async fn written(dir: &Path, events: usize) {
    let lines = || {
        let files = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
        let files = files.filter(|p| p.file_name().unwrap().to_str().unwrap().starts_with("events.ndjson"));
        files
            .map(|p| std::fs::read(p).unwrap_or_default().iter().filter(|b| **b == b'\n').count())
            .sum::<usize>()
    };
    until("every event is in the files", || lines() >= events).await;
}

fn seqs(events: &[serde_json::Value]) -> Vec<u64> {
    events.iter().map(|e| e["seq"].as_u64().unwrap()).collect()
}

/// A collector in this process.
struct Running {
    address: String,
    end: oneshot::Sender<()>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Running {
    async fn start(dir: &Path, listen: &str) -> Running {
        let keep = Keep { keep_bytes: 1 << 30, keep: Duration::ZERO };
        let archive = Archive::open(dir, keep, Some(ROTATION)).unwrap();
        let listen: Listen = listen.parse().unwrap();
        let collector = Collector::bind(&listen, archive, None).await.unwrap();
        let address = collector.address().unwrap();
        let (end, ended) = oneshot::channel();
        let task = tokio::spawn(collector.serve(async move {
            let _ = ended.await;
        }));
        Running { address, end, task }
    }

    async fn stop(self) {
        let _ = self.end.send(());
        timeout(DEADLINE, self.task).await.unwrap().unwrap().unwrap();
    }

    async fn channel(&self) -> Channel {
        Channel::from_shared(self.address.clone()).unwrap().connect().await.unwrap()
    }
}

/// With its spool below `dir`, of so many bytes.
fn spool(dir: &Path, bytes: u64) -> SpoolSettings {
    SpoolSettings { dir: dir.join("spool"), limits: feed::spool::Limits { bytes } }
}

fn target(address: &str) -> Target {
    Target::new(address, None, false).unwrap()
}

fn start_feed(bus: &Arc<Bus>, capacity: usize, address: &str, dir: &Path) -> (Feed, JoinHandle<()>) {
    let subscriber = bus.subscribe("collector", capacity).unwrap();
    feed::spawn(bus.clone(), subscriber, target(address), &spool(dir, 64 << 20), settings(), None).unwrap()
}

#[tokio::test]
async fn a_collector_that_restarts_stores_every_event_once() {
    let dir = tempfile::tempdir().unwrap();
    let (store, listen) = (dir.path().join("events"), format!("unix:{}/c.sock", dir.path().display()));
    let mut collector = Running::start(&store, &listen).await;
    let bus = bus();
    let (feed, task) = start_feed(&bus, 100_000, &collector.address, dir.path());
    let mut unfinished = 0;
    for round in 1..=4u64 {
        let until_seq = round * 5000;
        while bus.last_seq() < until_seq {
            bus.publish_now(telemetry());
        }
        if round < 4 {
            until("some of it is stored", || feed.state().acked_seq > until_seq - 5000).await;
            unfinished += u32::from(feed.state().acked_seq < until_seq);
            collector.stop().await;
            collector = Running::start(&store, &listen).await;
        }
    }
    bus.close();
    timeout(DEADLINE, task).await.unwrap().unwrap();
    assert_eq!(feed.state().acked_seq, 20_000);
    assert!(feed.state().reconnects >= 3);
    assert!(unfinished > 0, "batches were under way when it ended");
    collector.stop().await;
    let events = stored(&store);
    assert!(seqs(&events).into_iter().eq(1..=20_000), "each once and in order");
    assert!(events.iter().all(|e| e["sensor"] == "host" && e["boot"] == "boot-1"));
}

/// The real program, as a process that can be killed. Its files may grow to
/// `most` bytes; beyond that writes fail as on a full disk.
async fn collect(dir: &Path, listen: &str, most: u64) -> Child {
    let mut command = program(listen);
    command.arg("--dir").arg(dir);
    // SAFETY: both calls are async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            // EFBIG instead of a signal.
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            let limit = libc::rlimit { rlim_cur: most, rlim_max: libc::RLIM_INFINITY };
            match libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        })
    };
    listening(command).await
}

/// Waits until a collector says that it is, or is not.
async fn healthy(listen: &str, service: &str, wanted: bool) {
    use tonic_health::pb::health_client::HealthClient;
    use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
    let channel =
        tonic::transport::Endpoint::from_shared(listen.to_owned()).unwrap().connect().await.unwrap();
    let mut client = HealthClient::new(channel);
    let asking = async {
        loop {
            let request = HealthCheckRequest { service: service.to_owned() };
            let status = client.check(request).await.unwrap().into_inner().status();
            if (status == ServingStatus::Serving) == wanted {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(DEADLINE, asking).await.unwrap_or_else(|_| panic!("{service} is not {wanted}"));
}

/// Lets the files of a running process grow without limit.
fn lift_limit(child: &Child) {
    let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    let pid = child.id().unwrap() as libc::pid_t;
    // SAFETY: one rlimit that lives through the call, none to fill in.
    let done = unsafe { libc::prlimit(pid, libc::RLIMIT_FSIZE, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

#[tokio::test]
async fn a_full_disk_holds_events_back_and_then_each_is_stored_once() {
    let dir = tempfile::tempdir().unwrap();
    let (store, listen) = (dir.path().join("events"), format!("unix:{}/c.sock", dir.path().display()));
    let child = collect(&store, &listen, 150_000).await;
    let bus = bus();
    let (feed, task) = start_feed(&bus, 100_000, &listen, dir.path());
    for _ in 0..10_000 {
        bus.publish_now(telemetry());
    }
    until("the disk is full", || feed.state().error.contains("cannot store")).await;
    healthy(&listen, "readiness", false).await;
    healthy(&listen, "mcp_sensor.v1.Collector", false).await;
    healthy(&listen, "liveness", true).await;
    let stuck = feed.state().acked_seq;
    assert!(stuck > 0 && stuck < 10_000, "{stuck}");
    lift_limit(&child);
    bus.close();
    timeout(DEADLINE, task).await.unwrap().unwrap();
    assert_eq!(feed.state().acked_seq, 10_000);
    healthy(&listen, "readiness", true).await;
    written(&store, 10_000).await;
    assert!(seqs(&stored(&store)).into_iter().eq(1..=10_000), "each once and in order");
}

#[tokio::test]
async fn a_collector_that_is_killed_loses_nothing_it_acknowledged_and_stores_nothing_twice() {
    let dir = tempfile::tempdir().unwrap();
    let (store, listen) = (dir.path().join("events"), format!("unix:{}/c.sock", dir.path().display()));
    let mut child = collect(&store, &listen, libc::RLIM_INFINITY).await;
    let bus = bus();
    let (feed, task) = start_feed(&bus, 100_000, &listen, dir.path());
    let mut unfinished = 0;
    for round in 1..=4u64 {
        let until_seq = round * 5000;
        while bus.last_seq() < until_seq {
            bus.publish_now(telemetry());
        }
        if round < 4 {
            until("some of it is stored", || feed.state().acked_seq > until_seq - 5000).await;
            unfinished += u32::from(feed.state().acked_seq < until_seq);
            child.kill().await.unwrap();
            child = collect(&store, &listen, libc::RLIM_INFINITY).await;
        }
    }
    bus.close();
    timeout(DEADLINE, task).await.unwrap().unwrap();
    written(&store, 20_000).await;
    child.kill().await.unwrap();
    assert!(unfinished > 0, "batches were under way when it was killed");
    assert!(seqs(&stored(&store)).into_iter().eq(1..=20_000), "each once and in order");
}

#[tokio::test]
async fn without_a_collector_telemetry_goes_first_and_the_loss_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (store, listen) = (dir.path().join("events"), format!("unix:{}/c.sock", dir.path().display()));
    let bus = bus();
    let subscriber = bus.subscribe("collector", 100_000).unwrap();
    let (feed, task) = feed::spawn(
        bus.clone(),
        subscriber,
        target(&listen),
        &spool(dir.path(), 256 << 10),
        settings(),
        None,
    )
    .unwrap();
    until("the feed has tried", || feed.state().reconnects > 0).await;
    for _ in 0..50 {
        bus.publish_now(denial("time", 10));
        for _ in 0..1000 {
            bus.publish_now(telemetry());
        }
        until("it was spooled", || bus.subscribers()[0].queued == 0).await;
    }
    let total = bus.last_seq();
    until("some of it had to go", || feed.state().spool.is_some_and(|s| s.evicted > 0)).await;
    let collector = Running::start(&store, &listen).await;
    bus.close();
    timeout(DEADLINE, task).await.unwrap().unwrap();
    collector.stop().await;
    let events = stored(&store);
    let count = |kind: &str| events.iter().filter(|e| e["type"] == kind).count() as u64;
    assert_eq!(count("connection"), 50, "no denial is lost to telemetry");
    let losses: Vec<_> = events.iter().filter(|e| e["type"] == "loss").collect();
    let lost: u64 = losses.iter().map(|e| e["count"].as_u64().unwrap()).sum();
    assert!(losses.iter().all(|e| e["where"] == "spool" && e["reason"] == "evicted"));
    assert!(losses.iter().all(|e| e["types"]["exec"] == e["count"]));
    assert_eq!(count("connection") + count("exec") + lost, total);
    assert!(seqs(&events).is_sorted_by(|a, b| a < b));
}

#[tokio::test]
async fn what_one_run_could_not_deliver_the_next_one_does() {
    let dir = tempfile::tempdir().unwrap();
    let (store, listen) = (dir.path().join("events"), format!("unix:{}/c.sock", dir.path().display()));
    let identity = |boot: &str| Identity { sensor: "host".to_owned(), boot: boot.to_owned() };
    for boot in ["boot-1", "boot-2"] {
        let bus = Bus::new(identity(boot), Limits::default());
        let subscriber = bus.subscribe("collector", 100_000).unwrap();
        let short = Settings { drain: Duration::from_millis(50), ..settings() };
        let (_, task) =
            feed::spawn(bus.clone(), subscriber, target(&listen), &spool(dir.path(), 64 << 20), short, None)
                .unwrap();
        for _ in 0..2000 {
            bus.publish_now(telemetry());
        }
        until("all of it was spooled", || bus.subscribers()[0].queued == 0).await;
        bus.close();
        timeout(DEADLINE, task).await.unwrap().unwrap();
    }
    let collector = Running::start(&store, &listen).await;
    let bus = Bus::new(identity("boot-3"), Limits::default());
    let (feed, task) = start_feed(&bus, 100, &listen, dir.path());
    bus.publish_now(telemetry());
    until("it came to its own events", || feed.state().acked_seq == 1).await;
    bus.close();
    timeout(DEADLINE, task).await.unwrap().unwrap();
    collector.stop().await;
    let boots: Vec<_> = stored(&store)
        .iter()
        .map(|e| (e["boot"].as_str().unwrap().to_owned(), e["seq"].as_u64().unwrap()))
        .collect();
    let expected: Vec<_> = [("boot-1", 2000), ("boot-2", 2000), ("boot-3", 1)]
        .into_iter()
        .flat_map(|(boot, most)| (1..=most).map(move |seq| (boot.to_owned(), seq)))
        .collect();
    assert_eq!(boots, expected);
    let left: Vec<_> =
        std::fs::read_dir(dir.path().join("spool")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["lock"]);
}

#[tokio::test]
async fn a_sensor_that_ends_without_a_collector_gives_up_after_the_drain_time() {
    let bus = bus();
    let subscriber = bus.subscribe("collector", 10).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let address = format!("unix:{}/nobody.sock", dir.path().display());
    let short = Settings { drain: Duration::from_millis(100), ..settings() };
    let (feed, task) =
        feed::spawn(bus.clone(), subscriber, target(&address), &spool(dir.path(), 1 << 20), short, None)
            .unwrap();
    bus.publish_now(telemetry());
    bus.close();
    timeout(DEADLINE, task).await.expect("it ends").unwrap();
    assert!(!feed.state().connected);
    assert!(!feed.state().error.is_empty());
}

fn hello(sensor: &str) -> pb::FeedRequest {
    let hello = pb::Hello { sensor: sensor.to_owned(), boot: "b".to_owned(), ..Default::default() };
    pb::FeedRequest { message: Some(feed_request::Message::Hello(hello)) }
}

fn batch(first_seq: u64, last_seq: u64, seqs: &[u64]) -> pb::FeedRequest {
    let event = |seq: &u64| pb::Event { seq: *seq, ..Default::default() };
    let batch = pb::Batch { first_seq, last_seq, events: seqs.iter().map(event).collect() };
    pb::FeedRequest { message: Some(feed_request::Message::Batch(batch)) }
}

#[tokio::test]
async fn malformed_streams_and_batches_are_refused_and_the_rest_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let collector = Running::start(dir.path(), "127.0.0.1:0").await;
    let channel = collector.channel().await;
    for bad in [batch(1, 1, &[1]), hello(""), hello("a b"), hello("x\n"), hello(&"x".repeat(1000))] {
        let mut client = CollectorClient::new(channel.clone());
        let mut answers = client.feed(tokio_stream::once(bad)).await.unwrap().into_inner();
        let status = timeout(DEADLINE, answers.message()).await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
    }
    let requests = vec![
        hello("s"),
        batch(1, 2, &[1, 2]),
        batch(3, 4, &[4, 3]),
        batch(3, 9, &[3, 4]),
        batch(0, 0, &[]),
        batch(1, 2, &[1, 2]),
        batch(5, 5, &[5]),
    ];
    let mut client = CollectorClient::new(channel);
    let mut answers = client.feed(tokio_stream::iter(requests)).await.unwrap().into_inner();
    let mut got = Vec::new();
    while let Some(answer) = timeout(DEADLINE, answers.message()).await.unwrap().unwrap() {
        got.push(match answer.message.unwrap() {
            feed_response::Message::HelloAck(ack) => format!("hello {}", ack.committed_seq),
            feed_response::Message::Ack(ack) => format!("ack {}", ack.seq),
            feed_response::Message::Nack(nack) => format!("nack {} {}", nack.first_seq, nack.retry),
            other => panic!("{other:?}"),
        });
    }
    let expected = ["hello 0", "ack 2", "nack 3 false", "nack 3 false", "nack 0 false", "ack 2", "ack 5"];
    assert_eq!(got, expected);
    collector.stop().await;
    assert_eq!(seqs(&stored(dir.path())), [1, 2, 5]);
}

#[tokio::test]
async fn garbage_on_the_collectors_port_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let collector = Running::start(dir.path(), "127.0.0.1:0").await;
    let port = collector.address.strip_prefix("http://").unwrap();
    for bytes in [b"GET / HTTP/1.1\r\n\r\n".as_slice(), &[0xff; 100_000]] {
        let mut socket = tokio::net::TcpStream::connect(port).await.unwrap();
        let _ = socket.write_all(bytes).await;
        let mut rest = Vec::new();
        let read = tokio::io::AsyncReadExt::read_to_end(&mut socket, &mut rest);
        let _ = timeout(DEADLINE, read).await.expect("it is closed");
    }
    let bus = bus();
    let (_, task) = start_feed(&bus, 100, &collector.address, dir.path());
    bus.publish_now(telemetry());
    bus.close();
    timeout(DEADLINE, task).await.unwrap().unwrap();
    collector.stop().await;
    assert_eq!(seqs(&stored(dir.path())), [1]);
}

#[tokio::test]
async fn health_and_both_reflections_answer_also_to_a_client_that_compresses() {
    use tonic_health::pb::health_client::HealthClient;
    use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
    let dir = tempfile::tempdir().unwrap();
    let collector = Running::start(dir.path(), "127.0.0.1:0").await;
    let channel = collector.channel().await;
    let service = "mcp_sensor.v1.Collector".to_owned();
    let answer = HealthClient::new(channel.clone())
        .send_compressed(tonic::codec::CompressionEncoding::Gzip)
        .check(HealthCheckRequest { service: service.clone() })
        .await
        .unwrap();
    assert_eq!(answer.into_inner().status(), ServingStatus::Serving);
    assert!(support::reflection::v1(channel.clone()).await.contains(&service));
    assert!(support::reflection::v1alpha(channel.clone()).await.contains(&service));
    drop(channel);
    collector.stop().await;
}

/// A figure, not a claim about every machine: run it with --release --ignored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn events_a_second_from_the_bus_to_the_collectors_disk() {
    const EVENTS: u64 = 1_000_000;
    let dir = tempfile::tempdir().unwrap();
    let (store, listen) = (dir.path().join("events"), format!("unix:{}/c.sock", dir.path().display()));
    let _child = collect(&store, &listen, libc::RLIM_INFINITY).await;
    let bus = bus();
    let (feed, task) = start_feed(&bus, 65_536, &listen, dir.path());
    until("connected", || feed.state().connected).await;
    let start = std::time::Instant::now();
    let publisher = bus.clone();
    tokio::task::spawn_blocking(move || {
        while publisher.last_seq() < EVENTS {
            // As fast as the way lets it, without losing any.
            if publisher.subscribers()[0].queued < 60_000 {
                for _ in 0..1000 {
                    publisher.publish_now(connection());
                }
            } else {
                std::thread::yield_now();
            }
        }
    })
    .await
    .unwrap();
    bus.close();
    timeout(10 * DEADLINE, task).await.unwrap().unwrap();
    let seconds = start.elapsed().as_secs_f64();
    assert_eq!(feed.state().acked_seq, EVENTS);
    println!("{:.0} events/s", EVENTS as f64 / seconds);
}

/// An allowed connection with everything that enrichment adds.
fn connection() -> Body {
    Body::Connection(pb::Connection {
        decision: Some(pb::Decision {
            verdict: pb::Verdict::Allow.into(),
            reason: "rule".to_owned(),
            rule: "profiles.github.egress[0]".to_owned(),
            rule_line: 12,
            hook: "connect".to_owned(),
            count: 1,
            generation: 3,
            policy: "0123456789abcdef0123456789abcdef".to_owned(),
            ..Default::default()
        }),
        actor: Some(pb::Actor {
            server: "github".to_owned(),
            instance: "github-17".to_owned(),
            role: pb::Role::Server.into(),
            pid: 4711,
            uid: 1000,
            user: "developer".to_owned(),
            login_uid: Some(1000),
            comm: "node".to_owned(),
            exe: "/usr/bin/node".to_owned(),
            client: Some(pb::Client {
                pid: 4700,
                exe: "/usr/bin/claude".to_owned(),
                argv: vec!["claude".to_owned()],
                name: "claude-code".to_owned(),
            }),
            netns: 4_026_531_840,
            ..Default::default()
        }),
        protocol: "tcp".to_owned(),
        direction: pb::Direction::Egress.into(),
        dst: Some(pb::Endpoint { ip: "140.82.121.6".to_owned(), port: 443, ..Default::default() }),
        src: Some(pb::Endpoint { ip: "10.0.0.5".to_owned(), port: 51_234, ..Default::default() }),
        cookie: 99,
        ..Default::default()
    })
}
