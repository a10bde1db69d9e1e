//! Several collectors in order: whatever dies, every event is stored by one of
//! them.

mod support;

use mcp_sensor::event::{Body, Bus, Identity, Limits, pb};
use mcp_sensor::feed::{self, Collectors, Feed, Settings, SpoolSettings, Target};
use pb::collector_server::{Collector, CollectorServer};
use pb::{feed_request, feed_response};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::DEADLINE;
use support::collector::collect;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::codec::CompressionEncoding;
use tonic::{Request, Response, Status, Streaming};

fn quick() -> Settings {
    let backoff = (Duration::from_millis(10), Duration::from_millis(50));
    Settings { backoff, drain: DEADLINE, look_back: Duration::from_millis(20), ..Settings::default() }
}

fn start(dir: &Path, addresses: &[&str], settings: Settings) -> (Arc<Bus>, Feed, JoinHandle<()>) {
    let bus = Bus::new(Identity { sensor: "host".to_owned(), boot: "boot-1".to_owned() }, Limits::default());
    let subscriber = bus.subscribe("collector", 100_000).unwrap();
    let spool = SpoolSettings { dir: dir.join("spool"), limits: feed::spool::Limits { bytes: 64 << 20 } };
    let targets = addresses.iter().map(|a| Target::new(a, None, false).unwrap()).collect();
    let collectors = Collectors { targets, policy: None };
    let (feed, task) = feed::spawn(bus.clone(), subscriber, collectors, &spool, settings, None).unwrap();
    (bus, feed, task)
}

fn publish(bus: &Bus, until_seq: u64) {
    while bus.last_seq() < until_seq {
        bus.publish_now(Body::Exec(pb::Exec { argv: vec!["git".to_owned()], ..Default::default() }));
    }
}

async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let waiting = async {
        while !is() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(DEADLINE, waiting).await.unwrap_or_else(|_| panic!("not reached: {what}"));
}

fn stored(dir: &Path) -> Vec<u64> {
    let Ok(files) = std::fs::read_dir(dir) else { return Vec::new() };
    let files = files.map(|e| e.unwrap().path());
    let files = files.filter(|p| p.file_name().unwrap().to_str().unwrap().starts_with("events.ndjson"));
    let text: String = files.map(|p| std::fs::read_to_string(p).unwrap()).collect();
    // The last line may be under way.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let lines = whole.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
    lines.map(|e| e["seq"].as_u64().unwrap()).collect()
}

/// Listens at the same path again; the old socket of a killed one is in the way
/// of nobody.
struct Two {
    dir: tempfile::TempDir,
}

impl Two {
    fn address(&self, n: usize) -> String {
        format!("unix:{}/{n}.sock", self.dir.path().display())
    }

    fn store(&self, n: usize) -> std::path::PathBuf {
        self.dir.path().join(format!("events-{n}"))
    }

    async fn start(&self, n: usize) -> tokio::process::Child {
        collect(&self.store(n), &self.address(n), &[]).await
    }
}

#[tokio::test]
async fn collectors_are_killed_in_turn_and_every_event_is_at_one_of_them() {
    let two = Two { dir: tempfile::tempdir().unwrap() };
    let mut children = [two.start(0).await, two.start(1).await];
    let (first, second) = (two.address(0), two.address(1));
    let (bus, feed, task) = start(two.dir.path(), &[&first, &second], quick());
    let mut last = 0;
    for round in 0..6 {
        publish(&bus, last + 4000);
        until("some of it is acknowledged", || feed.state().acked_seq > last).await;
        last += 4000;
        // Batches are under way.
        let victim = round % 2;
        let child = &mut children[victim];
        child.kill().await.unwrap();
        publish(&bus, last + 500);
        last += 500;
        until("the other one is fed", || {
            let state = feed.state();
            state.connected && state.address == two.address(1 - victim)
        })
        .await;
        children[victim] = two.start(victim).await;
    }
    bus.close();
    timeout(DEADLINE, task).await.unwrap().unwrap();
    assert_eq!(feed.state().acked_seq, last);
    let all = || (0..2).flat_map(|n| stored(&two.store(n))).collect::<BTreeSet<u64>>();
    until("every event is stored", || all().len() as u64 == last).await;
    assert!(all().into_iter().eq(1..=last));
    for n in 0..2 {
        let one = stored(&two.store(n));
        assert_eq!(one.iter().collect::<BTreeSet<_>>().len(), one.len(), "collector {n} stored one twice");
        assert!(!one.is_empty(), "collector {n} was fed");
    }
}

#[tokio::test]
async fn the_first_is_fed_again_when_it_is_back() {
    let two = Two { dir: tempfile::tempdir().unwrap() };
    let _second = two.start(1).await;
    let (first, second) = (two.address(0), two.address(1));
    let (bus, feed, task) = start(two.dir.path(), &[&first, &second], quick());
    publish(&bus, 100);
    until("the second takes them", || feed.state().acked_seq == 100).await;
    assert_eq!(feed.state().address, second);
    let _first = two.start(0).await;
    until("the first is fed again", || feed.state().connected && feed.state().address == first).await;
    publish(&bus, 200);
    bus.close();
    timeout(DEADLINE, task).await.unwrap().unwrap();
    until("each has its part", || {
        stored(&two.store(0)).into_iter().eq(101..=200) && stored(&two.store(1)).into_iter().eq(1..=100)
    })
    .await;
}

/// Counts events, and says how they were encoded.
#[derive(Default)]
struct Seen {
    events: AtomicU64,
    encoding: Mutex<String>,
}

struct Stub(Arc<Seen>);

#[tonic::async_trait]
impl Collector for Stub {
    type FeedStream = ReceiverStream<Result<pb::FeedResponse, Status>>;

    async fn feed(
        &self,
        request: Request<Streaming<pb::FeedRequest>>,
    ) -> Result<Response<Self::FeedStream>, Status> {
        let encoding = request.metadata().get("grpc-encoding").map(|e| e.to_str().unwrap().to_owned());
        *self.0.encoding.lock().unwrap() = encoding.unwrap_or_default();
        let mut requests = request.into_inner();
        let (answers, stream) = tokio::sync::mpsc::channel(4);
        let seen = self.0.clone();
        tokio::spawn(async move {
            while let Some(Ok(request)) = requests.next().await {
                let message = match request.message {
                    Some(feed_request::Message::Hello(_)) => {
                        feed_response::Message::HelloAck(pb::HelloAck { credit: 4, ..Default::default() })
                    }
                    Some(feed_request::Message::Batch(batch)) => {
                        seen.events.fetch_add(batch.events.len() as u64, Ordering::Relaxed);
                        feed_response::Message::Ack(pb::Ack { seq: batch.last_seq })
                    }
                    other => panic!("an old collector does not know {other:?}"),
                };
                let _ = answers.send(Ok(pb::FeedResponse { message: Some(message) })).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// What a collector gets that knows compression, or does not, as older ones.
async fn fed(knows: bool) -> (u64, String) {
    let dir = tempfile::tempdir().unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let seen = Arc::new(Seen::default());
    let service = CollectorServer::new(Stub(seen.clone()));
    let service = if knows { service.accept_compressed(CompressionEncoding::Zstd) } else { service };
    let serving = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming(TcpListenerStream::new(listener));
    let serving = tokio::spawn(serving);
    let (bus, feed, task) = start(dir.path(), &[&address], Settings { compress: Some(true), ..quick() });
    publish(&bus, 2000);
    bus.close();
    timeout(DEADLINE, task).await.unwrap().unwrap();
    assert_eq!((feed.state().acked_seq, feed.state().reconnects), (2000, 0));
    serving.abort();
    let encoding = seen.encoding.lock().unwrap().clone();
    (seen.events.load(Ordering::Relaxed), encoding)
}

#[tokio::test]
async fn batches_are_compressed_where_the_collector_knows_it() {
    assert_eq!(fed(true).await, (2000, "zstd".to_owned()));
    assert_eq!(fed(false).await, (2000, String::new()));
}
