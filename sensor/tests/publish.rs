//! Collectors that keep nothing: what a sensor was told is stored is in the
//! stream, whichever collector it spoke to and whichever of them died.

mod support;

use mcp_sensor::event::{Body, Bus, Event, Identity, Limits, pb};
use mcp_sensor::feed;
use pb::collector_client::CollectorClient;
use pb::{feed_request, feed_response};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;
use support::collector::{batches, channel, event, events_client, feed, listening, program};
use support::nats::{self, Node};
use support::receiver::free_port;
use support::{DEADLINE, denial};
use tokio::process::{Child, Command};
use tokio::time::timeout;
use tonic::Code;

const CREATE: &str = "create: {replicas: 1, duplicate_window: 2m}";

fn file(dir: &Path, nodes: &[Node], more: &str) -> String {
    let path = dir.join("bus.yaml");
    let servers = nats::urls(nodes).join(", ");
    let nats = format!("{{servers: [{servers}], stream: EVENTS, {more}}}");
    std::fs::write(&path, format!("outputs:\n  - name: bus\n    nats: {nats}\n")).unwrap();
    path.to_str().unwrap().to_owned()
}

async fn publisher(file: &str) -> (Child, String) {
    let address = format!("127.0.0.1:{}", free_port());
    (publisher_at(&address, file).await, format!("http://{address}"))
}

async fn publisher_at(listen: &str, file: &str) -> Child {
    let mut command = program(listen);
    command.args(["--publish", file]);
    listening(command).await
}

/// What a collector says of a boot.
async fn committed(address: &str, sensor: &str, boot: &str) -> Result<u64, tonic::Status> {
    let (sensor, boot) = (sensor.to_owned(), boot.to_owned());
    let hello = feed_request::Message::Hello(pb::Hello { sensor, boot, ..Default::default() });
    let requests = tokio_stream::iter([pb::FeedRequest { message: Some(hello) }]);
    let mut client = CollectorClient::new(channel(address).await);
    let mut answers = timeout(DEADLINE, client.feed(requests)).await.unwrap()?.into_inner();
    match timeout(DEADLINE, answers.message()).await.unwrap()?.unwrap().message.unwrap() {
        feed_response::Message::HelloAck(ack) => Ok(ack.committed_seq),
        other => panic!("{other:?}"),
    }
}

/// A sensor that sends until everything is acknowledged, to one collector after
/// the other, from where the collector says; as a sensor does, it keeps only what
/// was not acknowledged.
async fn persistent(addresses: Vec<String>, sensor: &str, last: u64) -> u64 {
    let (mut acked, mut streams) = (0, 0);
    while acked < last {
        let address = &addresses[streams % addresses.len()];
        streams += 1;
        let hello = pb::Hello { sensor: sensor.to_owned(), boot: "b".to_owned(), ..Default::default() };
        let hello = feed_request::Message::Hello(hello);
        let of = |events: Vec<Event>| {
            feed_request::Message::Batch(pb::Batch {
                first_seq: events.first().map_or(0, |e| e.seq),
                last_seq: events.last().map_or(0, |e| e.seq),
                events,
            })
        };
        let messages = std::iter::once(hello).chain(batches(acked + 1..=last, 100).into_iter().map(of));
        let requests: Vec<_> = messages.map(|m| pb::FeedRequest { message: Some(m) }).collect();
        let Ok(endpoint) = tonic::transport::Endpoint::from_shared(address.clone()).unwrap().connect().await
        else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let mut client = CollectorClient::new(endpoint);
        let Ok(answers) = client.feed(tokio_stream::iter(requests)).await else { continue };
        let mut answers = answers.into_inner();
        while let Ok(Some(answer)) = answers.message().await {
            match answer.message.unwrap() {
                feed_response::Message::HelloAck(ack) => acked = acked.max(ack.committed_seq),
                feed_response::Message::Ack(ack) => acked = acked.max(ack.seq),
                feed_response::Message::Nack(nack) => assert!(nack.retry, "{nack:?}"),
                feed_response::Message::PolicyUpdate(update) => panic!("nobody gave it policies: {update:?}"),
            }
        }
    }
    acked
}

fn numbers(messages: &[nats::Message], sensor: &str) -> Vec<u64> {
    let prefix = format!("{sensor}/b/");
    messages.iter().filter_map(|m| m.id.strip_prefix(&prefix)?.parse().ok()).collect()
}

#[tokio::test]
async fn what_one_collector_stored_every_other_knows_of_and_none_gives_back() {
    if nats::missing() {
        return;
    }
    let node = [nats::start("", |_| ()).await];
    let dir = tempfile::tempdir().unwrap();
    let file = file(dir.path(), &node, CREATE);
    let (_first, one) = publisher(&file).await;
    let (_second, other) = publisher(&file).await;
    feed(&one, "web-1.example", "b", batches(1..=1000, 100)).await;
    assert_eq!(committed(&one, "web-1.example", "b").await.unwrap(), 1000);
    // It is on its way to the other.
    let known = async { while committed(&other, "web-1.example", "b").await.unwrap() < 1000 {} };
    timeout(DEADLINE, known).await.expect("the other knows");
    assert_eq!(committed(&other, "web-1", "b").await.unwrap(), 0);
    // Again, as after an acknowledgement that was lost, and more of it.
    feed(&other, "web-1.example", "b", batches(901..=1100, 100)).await;
    let context = nats::jetstream(&node).await;
    assert_eq!(nats::wait(&context, "EVENTS", 1100).await, 1100);
    let messages = nats::messages(&context, "EVENTS").await;
    assert!(numbers(&messages, "web-1.example").into_iter().eq(1..=1100));
    let line: Value = serde_json::from_str(&messages[0].text).unwrap();
    assert_eq!((&line["type"], &line["sensor"]), (&"exec".into(), &"web-1.example".into()));
    assert_eq!(messages[0].subject, "mcp-sensor.events.exec");
    let mut reader = events_client(&one).await;
    let fleet = reader.fleet(pb::FleetRequest::default()).await.unwrap_err();
    let query = reader.query(pb::QueryRequest::default()).await.unwrap_err();
    let subscribe = reader.subscribe(pb::SubscribeRequest::default()).await.unwrap_err();
    for status in [fleet, query, subscribe] {
        assert_eq!(status.code(), Code::FailedPrecondition);
        let why = "this collector keeps nothing: read the stream EVENTS (subjects mcp-sensor.events.>)";
        assert_eq!(status.message(), why);
    }
}

#[tokio::test]
async fn a_collector_without_its_stream_is_not_ready_until_it_is_back() {
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::health_client::HealthClient;
    if nats::missing() {
        return;
    }
    let mut node = [nats::start("", |_| ()).await];
    let dir = tempfile::tempdir().unwrap();
    let (_child, address) = publisher(&file(dir.path(), &node, CREATE)).await;
    let mut health = HealthClient::new(channel(&address).await);
    let mut becomes = async |service: &str, wanted: ServingStatus| {
        let waiting = async {
            let request = || HealthCheckRequest { service: service.to_owned() };
            while health.check(request()).await.unwrap().into_inner().status() != wanted {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        timeout(DEADLINE, waiting).await.unwrap_or_else(|_| panic!("{service} does not become {wanted:?}"));
    };
    feed(&address, "s", "b", batches(1..=100, 100)).await;
    becomes("readiness", ServingStatus::Serving).await;
    node[0].kill().await;
    becomes("readiness", ServingStatus::NotServing).await;
    becomes("liveness", ServingStatus::Serving).await;
    node[0].start();
    becomes("readiness", ServingStatus::Serving).await;
    assert_eq!(committed(&address, "s", "b").await.unwrap(), 100);
}

#[tokio::test]
async fn collectors_and_a_server_killed_under_load_lose_nothing_that_was_acknowledged() {
    if nats::missing() {
        return;
    }
    let mut node = [nats::start("", |_| ()).await];
    let dir = tempfile::tempdir().unwrap();
    let file = file(dir.path(), &node, CREATE);
    let (mut first, one) = publisher(&file).await;
    let (second, other) = publisher(&file).await;
    const LAST: u64 = 6000;
    let sensors: Vec<_> = ["s1", "s2", "s3"]
        .into_iter()
        .enumerate()
        .map(|(n, sensor)| {
            let mut addresses = vec![one.clone(), other.clone()];
            addresses.rotate_left(n % 2);
            tokio::spawn(persistent(addresses, sensor, LAST))
        })
        .collect();
    let context = nats::jetstream(&node).await;
    nats::wait(&context, "EVENTS", 1000).await;
    first.kill().await.unwrap();
    nats::wait(&context, "EVENTS", 4000).await;
    node[0].kill().await;
    node[0].start();
    for sensor in sensors {
        assert_eq!(timeout(4 * DEADLINE, sensor).await.unwrap().unwrap(), LAST);
    }
    nats::wait(&context, "EVENTS", 3 * LAST).await;
    let messages = nats::messages(&context, "EVENTS").await;
    for sensor in ["s1", "s2", "s3"] {
        let numbers = numbers(&messages, sensor);
        let distinct: BTreeSet<u64> = numbers.iter().copied().collect();
        assert!(distinct.into_iter().eq(1..=LAST), "{sensor}");
        assert_eq!(
            numbers.len() as u64,
            LAST,
            "{sensor}: within its window the stream drops what comes twice"
        );
    }
    drop(second);
}

#[tokio::test]
async fn one_of_three_servers_killed_under_two_collectors_loses_nothing() {
    if nats::missing() {
        return;
    }
    let mut nodes = nats::cluster().await;
    let context = nats::jetstream(&nodes).await;
    nats::create(&context, nats::events(3)).await;
    let dir = tempfile::tempdir().unwrap();
    let file = file(dir.path(), &nodes, "create: {replicas: 3}");
    let ((_first, one), (_second, other)) = (publisher(&file).await, publisher(&file).await);
    const LAST: u64 = 5000;
    let sensors =
        ["s1", "s2"].map(|sensor| tokio::spawn(persistent(vec![one.clone(), other.clone()], sensor, LAST)));
    nats::wait(&context, "EVENTS", 1000).await;
    let leader = nats::leader(&context, "EVENTS").await;
    nodes[leader].kill().await;
    for sensor in sensors {
        assert_eq!(timeout(4 * DEADLINE, sensor).await.unwrap().unwrap(), LAST);
    }
    nats::wait(&context, "EVENTS", 2 * LAST).await;
    let messages = nats::messages(&context, "EVENTS").await;
    for sensor in ["s1", "s2"] {
        let distinct: BTreeSet<u64> = numbers(&messages, sensor).into_iter().collect();
        assert!(distinct.into_iter().eq(1..=LAST), "{sensor}");
    }
    assert_eq!(messages.len() as u64, 2 * LAST);
}

#[tokio::test]
async fn a_sensor_with_its_spool_goes_on_with_whichever_collector_comes_next() {
    if nats::missing() {
        return;
    }
    let mut node = [nats::start("", |_| ()).await];
    let dir = tempfile::tempdir().unwrap();
    let file = file(dir.path(), &node, CREATE);
    let listen = format!("unix:{}/c.sock", dir.path().display());
    let mut child = publisher_at(&listen, &file).await;
    let identity = Identity { sensor: "web-1".to_owned(), boot: "b".to_owned() };
    let bus = Bus::new(identity, Limits::default());
    let subscriber = bus.subscribe("collector", 100_000).unwrap();
    let spool = feed::SpoolSettings {
        dir: dir.path().join("spool"),
        limits: feed::spool::Limits { bytes: 64 << 20 },
    };
    let backoff = (Duration::from_millis(10), Duration::from_millis(50));
    let settings = feed::Settings { backoff, drain: 4 * DEADLINE, ..feed::Settings::default() };
    let target = feed::Target::new(&listen, None, false).unwrap();
    let (feed, task) = feed::spawn(bus.clone(), subscriber, target, &spool, settings, None).unwrap();
    let exec = || Body::Exec(pb::Exec { argv: vec!["git".to_owned()], ..Default::default() });
    let until = async |what: &str, is: &dyn Fn(&pb::FeedState) -> bool| {
        let waiting = async {
            while !is(&feed.state()) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(2 * DEADLINE, waiting).await.unwrap_or_else(|_| panic!("{what}: {:?}", feed.state()));
    };
    for round in 1..=4u64 {
        while bus.last_seq() < round * 2000 {
            bus.publish_now(exec());
        }
        until("some of it is stored", &|s| s.acked_seq > (round - 1) * 2000).await;
        if round == 2 {
            node[0].kill().await;
            while bus.last_seq() < round * 2000 + 500 {
                bus.publish_now(exec());
            }
            until("the sensor hears why", &|s| !s.error.is_empty()).await;
            node[0].start();
        } else if round < 4 {
            // Another, which knows nothing but the stream.
            child.kill().await.unwrap();
            child = publisher_at(&listen, &file).await;
        }
    }
    let last = bus.last_seq();
    bus.close();
    timeout(4 * DEADLINE, task).await.unwrap().unwrap();
    assert_eq!((feed.state().acked_seq, feed.state().rejected), (last, 0));
    let context = nats::jetstream(&node).await;
    assert_eq!(nats::wait(&context, "EVENTS", last).await, last);
    let numbers = numbers(&nats::messages(&context, "EVENTS").await, "web-1");
    assert!(numbers.iter().copied().collect::<BTreeSet<u64>>().into_iter().eq(1..=last));
}

#[tokio::test]
async fn an_event_too_large_for_the_bus_is_told_under_its_own_number() {
    if nats::missing() {
        return;
    }
    let node = [nats::start("max_payload: 4096\n", |_| ()).await];
    let dir = tempfile::tempdir().unwrap();
    let (_child, address) = publisher(&file(dir.path(), &node, CREATE)).await;
    let mut batch: Vec<Event> = (1..=10).map(event).collect();
    batch[4].body = Some(denial("time", 9000));
    feed(&address, "a", "b", vec![batch]).await;
    let context = nats::jetstream(&node).await;
    assert_eq!(nats::wait(&context, "EVENTS", 10).await, 10);
    let messages = nats::messages(&context, "EVENTS").await;
    let told: Vec<Value> =
        messages.iter().filter(|m| m.id == "a/b/5").map(|m| serde_json::from_str(&m.text).unwrap()).collect();
    let [told] = &told[..] else { panic!("{told:?}") };
    assert_eq!(
        (&told["type"], &told["reason"], &told["seq"]),
        (&"loss".into(), &"too_large".into(), &5.into())
    );
    assert_eq!((&told["denials"], &told["types"]["connection"]), (&1.into(), &1.into()));
}

#[tokio::test]
async fn without_a_stream_nothing_is_acknowledged_and_the_sensor_hears_why() {
    if nats::missing() {
        return;
    }
    let node = [nats::start("", |_| ()).await];
    let dir = tempfile::tempdir().unwrap();
    let (_child, address) = publisher(&file(dir.path(), &node, "subject: other")).await;
    let status = committed(&address, "a", "b").await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(
        status.message().contains("stream EVENTS-positions") && status.message().contains("give `create`"),
        "{status}"
    );
}

#[tokio::test]
async fn a_file_that_does_not_say_where_everything_is_safe_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bus.yaml");
    for (text, why) in [
        ("[{name: a, ndjson: {path: x}}]", "needs an output of the kind `nats`"),
        ("[{name: a, nats: {servers: [\"nats://a\"]}}]", "give `stream`"),
        (
            "[{name: a, filter: {types: [loss]}, nats: {servers: [\"nats://a\"], stream: A}}]",
            "without a filter",
        ),
        ("[{name: a, ndjson: {path: x}}, {name: b, ndjson: {path: y}}]", "exactly one output"),
    ] {
        std::fs::write(&path, format!("outputs: {text}\n")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_mcp-sensor"));
        let done = command.args(["collect", "--check", "--publish"]).arg(&path).output().await.unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(!done.status.success() && said.contains(why), "{text}: {said}");
    }
}

#[tokio::test]
async fn options_of_keeping_are_refused_where_nothing_is_kept() {
    for option in [
        &["--dir", "events"][..],
        &["--outputs", "outputs.yaml"],
        &["--keep-bytes", "8388608"],
        &["--keep-days", "1"],
        &["--keep", "1"],
        &["--max-bytes", "1048576"],
        &["--no-ndjson"],
    ] {
        let mut command = program("127.0.0.1:0");
        let output = command.args(["--publish", "bus.yaml"]).args(option).output().await.unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(&format!("--publish <FILE>' cannot be used with '{}", option[0])), "{said}");
    }
}
