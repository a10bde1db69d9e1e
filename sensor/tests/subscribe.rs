//! What a collector gives back: subscriptions with cursors, queries, the fleet.

mod support;

use mcp_sensor::collect::Limits;
use mcp_sensor::collect::log::{Cursor, Settings};
use mcp_sensor::event::{Body, Event, pb};
use pb::events_client::EventsClient;
use std::collections::{BTreeMap, BTreeSet};
use std::process::Stdio;
use std::time::Duration;
use support::collector::{
    InProcess, LARGE, batches, beginning, channel, collect, event, events_client, feed, from, next, subscribe,
};
use support::{DEADLINE, denial};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::time::timeout;
use tonic::Code;
use tonic::transport::Endpoint;

type Key = (String, String, u64);

fn key(event: &Event) -> Key {
    (event.sensor.clone(), event.boot.clone(), event.seq)
}

fn list(name: &str) -> Vec<String> {
    vec![name.to_owned()]
}

/// Three sensors feed a collector that is killed again and again; a subscriber
/// keeps its last cursor, but not always in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cursor_outlives_a_killed_collector_nothing_is_missed_and_the_order_stays() {
    const ROUNDS: u64 = 5;
    const EACH: u64 = 2000;
    let dir = tempfile::tempdir().unwrap();
    let (store, listen) = (dir.path().join("events"), format!("unix:{}/c.sock", dir.path().display()));
    let mut got: Vec<Key> = Vec::new();
    let mut cursor: Option<Vec<u8>> = None;
    for round in 0..ROUNDS {
        let mut child = collect(&store, &listen, &[]).await;
        let seqs = round * EACH + 1..=(round + 1) * EACH;
        let fed = ["a", "b", "c"].map(|sensor| feed(&listen, sensor, "boot", batches(seqs.clone(), 100)));
        let mut stream = subscribe(&listen, cursor.as_deref().map_or_else(beginning, from)).await;
        let reading = async {
            let wanted = (3 * (round + 1) * EACH) as usize;
            let mut unique: BTreeSet<Key> = got.iter().cloned().collect();
            while unique.len() < wanted {
                let response = next(&mut stream).await;
                assert_eq!(response.missed, None);
                unique.extend(response.events.iter().map(key));
                got.extend(response.events.iter().map(key));
                // Now and then one is not kept: its events come again.
                if response.events.len() % 3 != 0 || cursor.is_none() {
                    cursor = Some(response.cursor);
                }
            }
        };
        let [a, b, c] = fed;
        tokio::join!(a, b, c, reading);
        child.kill().await.unwrap();
    }
    let mut seen = BTreeSet::new();
    let once: Vec<Key> = got.into_iter().filter(|k| seen.insert(k.clone())).collect();
    assert_eq!(once.len() as u64, 3 * ROUNDS * EACH);
    for sensor in ["a", "b", "c"] {
        let seqs = once.iter().filter(|(s, ..)| s == sensor).map(|(_, _, seq)| *seq);
        assert!(seqs.eq(1..=ROUNDS * EACH), "{sensor} is in order");
    }
}

#[tokio::test]
async fn a_subscription_begins_now_or_at_the_beginning_and_beats_when_nothing_passes() {
    let dir = tempfile::tempdir().unwrap();
    let collector = InProcess::start(dir.path(), "127.0.0.1:0", LARGE, Limits::default()).await;
    let address = collector.address.clone();
    feed(&address, "a", "b", batches(1..=10, 5)).await;
    let mut new = subscribe(&address, pb::SubscribeRequest::default()).await;
    let first = next(&mut new).await;
    assert_eq!((first.events.len(), first.remaining, first.missed), (0, 0, None));
    feed(&address, "a", "b", batches(11..=12, 5)).await;
    assert_eq!(next(&mut new).await.events.iter().map(|e| e.seq).collect::<Vec<_>>(), [11, 12]);

    let filter = Some(pb::EventFilter { types: list("finding"), ..Default::default() });
    let quiet = pb::SubscribeRequest { filter, heartbeat_seconds: 1, ..beginning() };
    let mut stream = subscribe(&address, quiet).await;
    let (first, second) = (next(&mut stream).await, next(&mut stream).await);
    assert!(first.events.is_empty() && second.events.is_empty());
    // Its cursor is behind all that did not pass.
    let mut later = subscribe(&address, from(&second.cursor)).await;
    assert_eq!(next(&mut later).await.events.len(), 0);
    feed(&address, "a", "b", batches(13..=13, 5)).await;
    assert_eq!(next(&mut later).await.events[0].seq, 13);
    drop((new, stream, later));
    collector.stop().await;
}

fn mixed() -> Vec<Event> {
    let finding = |severity: pb::Severity| {
        let finding =
            pb::Finding { severity: severity.into(), server: "time".to_owned(), ..Default::default() };
        Some(Body::Finding(finding))
    };
    let mut events: Vec<Event> = (1..=6).map(event).collect();
    events[1].body = Some(denial("time", 10));
    events[3].body = finding(pb::Severity::Low);
    events[5].body = finding(pb::Severity::High);
    events
}

#[tokio::test]
async fn filters_let_through_what_was_asked_for_in_both_calls() {
    let dir = tempfile::tempdir().unwrap();
    let collector = InProcess::start(dir.path(), "127.0.0.1:0", LARGE, Limits::default()).await;
    let address = collector.address.clone();
    feed(&address, "a", "b", vec![mixed()]).await;
    feed(&address, "other", "b", vec![mixed()]).await;
    let of_a = || pb::EventFilter { sensors: list("a"), ..Default::default() };
    let cases: [(pb::EventFilter, &[u64]); 6] = [
        (of_a(), &[1, 2, 3, 4, 5, 6]),
        (pb::EventFilter { types: list("connection"), ..of_a() }, &[2]),
        (pb::EventFilter { servers: list("time"), ..of_a() }, &[2, 4, 6]),
        (pb::EventFilter { verdicts: vec![pb::Verdict::Deny.into()], ..of_a() }, &[2]),
        (
            pb::EventFilter { min_severity: pb::Severity::Medium.into(), servers: list("time"), ..of_a() },
            &[2, 6],
        ),
        (pb::EventFilter { since_unix_ns: 3_000_000_000, until_unix_ns: 5_000_000_000, ..of_a() }, &[3, 4]),
    ];
    for (filter, expected) in cases {
        let query = pb::QueryRequest { filter: Some(filter.clone()), limit: 0 };
        let (events, _) = ask(&address, query).await;
        assert_eq!(events.iter().map(|e| e.seq).collect::<Vec<_>>(), expected, "{filter:?}");
        assert!(events.iter().all(|e| e.sensor == "a" && e.boot == "b"));
        let request = pb::SubscribeRequest { filter: Some(filter), ..beginning() };
        let mut stream = subscribe(&address, request).await;
        let mut seqs = Vec::new();
        while seqs.len() < expected.len() {
            seqs.extend(next(&mut stream).await.events.iter().map(|e| e.seq));
        }
        assert_eq!(seqs, expected);
    }
    let mut client = events_client(&address).await;
    let filter = Some(pb::EventFilter { types: list("nonsense"), ..Default::default() });
    let status = client.subscribe(pb::SubscribeRequest { filter, ..beginning() }).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    drop(client);
    collector.stop().await;
}

/// All that a query answers, and its last cursor.
async fn ask(address: &str, query: pb::QueryRequest) -> (Vec<Event>, Vec<u8>) {
    let mut stream = events_client(address).await.query(query).await.unwrap().into_inner();
    let (mut events, mut cursor) = (Vec::new(), Vec::new());
    while let Some(response) = timeout(DEADLINE, stream.message()).await.unwrap().unwrap() {
        assert_eq!(response.missed, None);
        events.extend(response.events);
        cursor = response.cursor;
    }
    (events, cursor)
}

#[tokio::test]
async fn a_query_gives_the_newest_of_many_and_a_subscription_goes_on_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let collector = InProcess::start(dir.path(), "127.0.0.1:0", LARGE, Limits::default()).await;
    let address = collector.address.clone();
    feed(&address, "a", "b", batches(1..=40_000, 500)).await;
    let (events, _) = ask(&address, pb::QueryRequest::default()).await;
    assert!(events.iter().map(|e| e.seq).eq(1..=40_000));
    let (events, cursor) = ask(&address, pb::QueryRequest { limit: 777, ..Default::default() }).await;
    assert!(events.iter().map(|e| e.seq).eq(39_224..=40_000));
    let mut stream = subscribe(&address, from(&cursor)).await;
    feed(&address, "a", "b", batches(40_001..=40_001, 1)).await;
    let mut response = next(&mut stream).await;
    while response.events.is_empty() {
        response = next(&mut stream).await;
    }
    assert_eq!(response.events[0].seq, 40_001);
    let since = Some(pb::EventFilter { since_unix_ns: 39_990 * 1_000_000_000, ..Default::default() });
    let (events, _) = ask(&address, pb::QueryRequest { filter: since, limit: 3 }).await;
    assert_eq!(events.iter().map(|e| e.seq).collect::<Vec<_>>(), [39_999, 40_000, 40_001]);
    let none = Some(pb::EventFilter { types: list("dns"), ..Default::default() });
    assert_eq!(ask(&address, pb::QueryRequest { filter: none, limit: 3 }).await.0, []);
    drop(stream);
    collector.stop().await;
}

#[tokio::test]
async fn who_comes_too_late_is_told_how_many_events_are_gone_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let few = Settings { keep_bytes: 512 << 10, keep: Duration::ZERO };
    let collector = InProcess::start(dir.path(), "127.0.0.1:0", few, Limits::default()).await;
    let address = collector.address.clone();
    feed(&address, "a", "b", batches(1..=100, 100)).await;
    let mut stream = subscribe(&address, beginning()).await;
    let mut response = next(&mut stream).await;
    while response.remaining > 0 {
        response = next(&mut stream).await;
    }
    drop(stream);
    feed(&address, "a", "b", batches(101..=60_000, 500)).await;
    let mut stream = subscribe(&address, from(&response.cursor)).await;
    let first = next(&mut stream).await;
    let missed = first.missed.expect("it is told");
    assert_eq!(missed.reason, "retention");
    let mut seqs: Vec<u64> = first.events.iter().map(|e| e.seq).collect();
    while seqs.last() != Some(&60_000) {
        let response = next(&mut stream).await;
        assert_eq!(response.missed, None);
        seqs.extend(response.events.iter().map(|e| e.seq));
    }
    assert!(seqs.into_iter().eq(100 + missed.count + 1..=60_000), "what is left, without a gap");
    drop(stream);
    collector.stop().await;
}

#[tokio::test]
async fn cursors_of_others_are_refused_with_a_reason() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let collector = InProcess::start(dir.path(), "127.0.0.1:0", LARGE, Limits::default()).await;
    let second = InProcess::start(other.path(), "127.0.0.1:0", LARGE, Limits::default()).await;
    let foreign = next(&mut subscribe(&second.address, beginning()).await).await.cursor;
    let mut client = events_client(&collector.address).await;
    for (cursor, code) in [
        (foreign, Code::FailedPrecondition),
        (b"nonsense".to_vec(), Code::InvalidArgument),
        (vec![1; 100_000], Code::InvalidArgument),
    ] {
        let status = client.subscribe(from(&cursor)).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(!status.message().is_empty());
    }
    drop(client);
    collector.stop().await;
    second.stop().await;
}

/// One that never reads, one that is slow, and one that reads as it should.
#[tokio::test]
async fn who_does_not_read_slows_nobody_and_is_ended_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { subscribers: 3, stall: Duration::from_secs(2), ..Limits::default() };
    let collector = InProcess::start(dir.path(), "127.0.0.1:0", LARGE, limits).await;
    let address = collector.address.clone();
    // Little of what it does not read is on its way.
    let narrow = Endpoint::from_shared(address.clone()).unwrap();
    let narrow = narrow.initial_stream_window_size(65_535).initial_connection_window_size(65_535);
    let mut dead =
        EventsClient::connect(narrow).await.unwrap().subscribe(beginning()).await.unwrap().into_inner();
    let wide = Endpoint::from_shared(address.clone()).unwrap();
    let wide = wide.initial_stream_window_size(16 << 20).initial_connection_window_size(16 << 20);
    let mut good =
        EventsClient::connect(wide).await.unwrap().subscribe(beginning()).await.unwrap().into_inner();
    let reading = async {
        let mut last = 0;
        while last < 50_000 {
            last = next(&mut good).await.events.last().map_or(last, |e| e.seq);
        }
    };
    tokio::join!(feed(&address, "a", "b", batches(1..=50_000, 500)), reading);
    // The dead one reads at last, and little at a time: what was on its way, and
    // why it ended.
    let (mut cursor, mut reads) = (Vec::new(), 0);
    let status = loop {
        if reads % 4 == 0 {
            tokio::time::sleep(2 * limits.stall).await;
        }
        reads += 1;
        match timeout(DEADLINE, dead.message()).await.expect("it is ended") {
            Ok(response) => cursor = response.expect("no end without a status").cursor,
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    // With its last cursor it comes back and misses nothing.
    let mut again = subscribe(&address, from(&cursor)).await;
    let mut seqs = Vec::new();
    while seqs.last() != Some(&50_000) {
        seqs.extend(next(&mut again).await.events.iter().map(|e| e.seq));
    }
    assert!(seqs.windows(2).all(|w| w[1] == w[0] + 1));
    drop((dead, good, again));
    collector.stop().await;
}

#[tokio::test]
async fn there_are_no_more_subscribers_than_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { subscribers: 2, ..Limits::default() };
    let collector = InProcess::start(dir.path(), "127.0.0.1:0", LARGE, limits).await;
    let mut client = EventsClient::new(channel(&collector.address).await);
    let first = client.subscribe(beginning()).await.unwrap();
    let _second = client.subscribe(beginning()).await.unwrap();
    let status = client.subscribe(beginning()).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    drop(first);
    let freed = async {
        while client.subscribe(beginning()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(DEADLINE, freed).await.expect("a place is free again");
    drop((client, _second));
    collector.stop().await;
}

#[tokio::test]
async fn the_fleet_is_known_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let collector = InProcess::start(dir.path(), "127.0.0.1:0", LARGE, Limits::default()).await;
    let mut told = batches(1..=3, 3);
    told[0][0].body = Some(Body::SensorState(pb::SensorState {
        version: "1.2.3".to_owned(),
        host: "box".to_owned(),
        policy: "abc".to_owned(),
        ..Default::default()
    }));
    let loss = pb::Loss { count: 7, denials: 2, ..Default::default() };
    told[0][2].body = Some(Body::Loss(loss));
    feed(&collector.address, "a", "boot-1", told).await;
    feed(&collector.address, "a", "boot-2", batches(1..=1, 1)).await;
    feed(&collector.address, "z", "boot-1", batches(1..=5, 1)).await;
    let check = |fleet: pb::FleetResponse| {
        let by_name: BTreeMap<_, _> = fleet.sensors.iter().map(|s| (s.sensor.as_str(), s)).collect();
        let (a, z) = (by_name["a"], by_name["z"]);
        assert_eq!((a.boot.as_str(), a.boots, a.committed_seq), ("boot-2", 2, 1));
        assert_eq!((a.version.as_str(), a.host.as_str(), a.policy.as_str()), ("1.2.3", "box", "abc"));
        assert_eq!((a.lost, a.lost_denials, a.newest_unix_ns), (7, 2, 3_000_000_000));
        assert!(a.first_seen_unix_ns > 0 && a.first_seen_unix_ns <= a.last_seen_unix_ns);
        assert_eq!((z.boots, z.committed_seq, z.connected), (1, 5, false));
        assert_eq!(fleet.log.unwrap().next, 9);
        assert_eq!(fleet.outputs[0].name, "ndjson");
    };
    let fleet = |address: String| async move {
        let mut client = events_client(&address).await;
        client.fleet(pb::FleetRequest::default()).await.unwrap().into_inner()
    };
    check(fleet(collector.address.clone()).await);
    collector.stop().await;
    let collector = InProcess::start(dir.path(), "127.0.0.1:0", LARGE, Limits::default()).await;
    check(fleet(collector.address.clone()).await);
    collector.stop().await;
}

fn program(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mcp-sensor"));
    command.args(args).env_remove("MCP_SENSOR_OUTPUT").env_remove("MCP_SENSOR_COLLECTOR");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

async fn printed(args: &[&str]) -> String {
    let output = timeout(DEADLINE, program(args).output()).await.unwrap().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn seq(line: &str) -> u64 {
    serde_json::from_str::<serde_json::Value>(line).unwrap()["seq"].as_u64().unwrap()
}

#[tokio::test]
async fn the_command_line_reads_a_collector_and_follows_it_from_a_file_with_a_cursor() {
    let dir = tempfile::tempdir().unwrap();
    let collector = InProcess::start(&dir.path().join("c"), "127.0.0.1:0", LARGE, Limits::default()).await;
    let address = collector.address.clone();
    feed(&address, "a", "b", batches(1..=20, 20)).await;
    feed(&address, "z", "b", batches(1..=2, 2)).await;
    let args = ["events", "--collector", &address, "--sensor", "a", "-n", "3", "-o", "json"];
    let lines = printed(&args).await;
    assert_eq!(lines.lines().map(seq).collect::<Vec<_>>(), [18, 19, 20]);
    let table = printed(&["events", "--collector", &address]).await;
    assert_eq!(table.lines().count(), 1 + 22);

    let file = dir.path().join("cursor");
    let follow = ["events", "--collector", &address, "--sensor", "a", "-f", "-o", "json", "--cursor-file"];
    let follow: Vec<&str> = follow.into_iter().chain([file.to_str().unwrap()]).collect();
    for (first, last) in [(1, 20), (21, 25)] {
        if first > 1 {
            feed(&address, "a", "b", batches(first..=last, 5)).await;
        }
        let mut child = program(&follow).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for expected in first..=last {
            let line = timeout(DEADLINE, lines.next_line()).await.unwrap().unwrap().unwrap();
            assert_eq!(seq(&line), expected);
        }
        // It is kept after the events are printed.
        let end = if first == 1 { 22 } else { 27 };
        let kept = async {
            loop {
                let text = std::fs::read_to_string(&file).unwrap_or_default();
                let bytes =
                    (0..text.trim().len() / 2).map(|n| u8::from_str_radix(&text[2 * n..2 * n + 2], 16));
                if Cursor::read(&bytes.collect::<Result<Vec<_>, _>>().unwrap()).is_ok_and(|c| c.offset == end)
                {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(DEADLINE, kept).await.expect("the cursor is kept");
        child.kill().await.unwrap();
    }

    let fleet: serde_json::Value =
        serde_json::from_str(&printed(&["fleet", "--collector", &address, "-o", "json"]).await).unwrap();
    assert_eq!(fleet["sensors"][0]["sensor"], "a");
    assert_eq!(fleet["sensors"][1]["committed_seq"], 2);
    assert_eq!(fleet["log"]["next"], 27);
    assert!(printed(&["fleet", "--collector", &address]).await.contains("1.2.3"));
    for (args, code) in [
        (["events", "--collector", "127.0.0.1:1", "-o", "json"], 4),
        (["fleet", "--collector", "ftp://x", "-o", "json"], 2),
    ] {
        let output = timeout(DEADLINE, program(&args).output()).await.unwrap().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stderr));
    }
    collector.stop().await;
}
