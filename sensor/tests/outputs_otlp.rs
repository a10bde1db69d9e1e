//! A collector's output by OTLP: what receivers took and what was told lost is
//! what the log holds, whatever they answer.

mod support;

use mcp_sensor::event::{Body, Event, pb};
use opentelemetry_proto::tonic::metrics::v1::{AggregationTemporality, Metric, metric};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use support::collector::{batches, event, feed};
use support::driver::installed;
use support::otlp::{Options, Receiver, Record, object, receive};
use support::outputs::Collector;
use support::receiver::{certificates, free_port};
use support::{DEADLINE, denial};
use tokio::time::timeout;
use tonic::transport::{Certificate, Identity, ServerTlsConfig};
use tonic::{Code, Status};

fn plain(receiver: &Receiver) -> Collector {
    Collector::new(&format!("otlp: {{endpoint: \"http://{}\"}}", receiver.address))
}

fn records(receiver: &Receiver) -> Vec<Record> {
    receiver.got.lock().unwrap().records.clone()
}

/// By id; two of one id are an error. What has no id is told by the collector.
fn by_id(records: Vec<Record>) -> (BTreeMap<String, Record>, Vec<Record>) {
    let (told, records): (Vec<_>, Vec<_>) = records.into_iter().partition(|r| r.id.is_empty());
    let mut map = BTreeMap::new();
    for record in records {
        let id = record.id.clone();
        assert!(map.insert(id.clone(), record).is_none(), "{id} came twice");
    }
    (map, told)
}

fn keys<T>(map: &BTreeMap<String, T>) -> BTreeSet<String> {
    map.keys().cloned().collect()
}

#[tokio::test]
async fn a_receiver_has_every_event_of_the_log_once_compressed_and_in_order() {
    let receiver = receive(Options::default()).await;
    let collector = plain(&receiver);
    let _child = collector.start().await;
    let mut all = batches(1..=1500, 100);
    all[3][7].body = Some(denial("time", 10));
    feed(&collector.address(), "a", "b1", all).await;
    feed(&collector.address(), "b", "b2", batches(1..=300, 100)).await;
    collector.until(|s| s.lag == 0 && s.delivered == 1800).await;
    let got = records(&receiver);
    let order: Vec<u64> =
        got.iter().filter(|r| r.id.starts_with("a/")).map(|r| r.id[5..].parse().unwrap()).collect();
    assert!(order.iter().copied().eq(1..=1500));
    let (got, told) = by_id(got);
    let lines = collector.lines();
    assert_eq!((keys(&got), told.len()), (keys(&lines), 0));
    for (id, line) in &lines {
        let record = &got[id];
        let word = |key: &str| record.attributes.get(key).cloned().unwrap_or_default();
        assert_eq!(word("service.instance.id"), line["sensor"]);
        assert_eq!(word("mcp_sensor.boot"), line["boot"]);
        assert_eq!(
            (word("mcp_sensor.type"), word("mcp_sensor.seq")),
            (line["type"].clone(), line["seq"].clone())
        );
        assert_eq!(word("process.command_args"), line["argv"]);
        assert_eq!(record.record.event_name, format!("mcp_sensor.{}", line["type"].as_str().unwrap()));
        assert_eq!(record.record.time_unix_nano, line["seq"].as_u64().unwrap() * 1_000_000_000);
    }
    let denied = &got["a/b1/308"];
    assert_eq!(
        (denied.record.severity_number, &denied.attributes["mcp_sensor.verdict"]),
        (13, &"deny".into())
    );
    let encodings = receiver.got.lock().unwrap().encodings.clone();
    assert!(encodings.iter().all(|e| e == "gzip"), "{encodings:?}");
}

#[tokio::test]
async fn of_a_batch_that_is_refused_only_the_events_that_are_bad_are_lost() {
    let bad = |record: &Record| ["/13", "/257", "/258"].iter().any(|end| record.id.ends_with(end));
    let answer = move |records: &[Record]| {
        if records.iter().any(bad) { Err(Status::invalid_argument("bad record")) } else { Ok(0) }
    };
    let receiver = receive(Options { answer: Box::new(answer), ..Options::default() }).await;
    let collector = plain(&receiver);
    let _child = collector.start().await;
    feed(&collector.address(), "a", "b", batches(1..=1000, 500)).await;
    let state = collector.until(|s| s.lost == 3 && s.lag == 0).await;
    assert_eq!(state.lost_by_reason.get("refused"), Some(&3), "{state:?}");
    let until_told = async {
        while records(&receiver).iter().filter(|r| r.id.is_empty()).count() == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(DEADLINE, until_told).await.unwrap();
    let (got, told) = by_id(records(&receiver));
    let mut expected = keys(&collector.lines());
    for id in ["a/b/13", "a/b/257", "a/b/258"] {
        assert!(expected.remove(id));
    }
    assert_eq!(keys(&got), expected);
    let count: i64 = told.iter().map(|r| r.attributes["mcp_sensor.count"].as_i64().unwrap()).sum();
    assert_eq!(count, 3, "{told:?}");
    assert_eq!(told[0].attributes["mcp_sensor.where"], "output:bus");
    let execs = told.iter().map(|r| r.attributes["mcp_sensor.types.exec"].as_i64().unwrap()).sum::<i64>();
    assert_eq!(execs, 3);
}

#[tokio::test]
async fn what_is_rejected_of_a_request_is_counted_and_not_sent_again() {
    let mut first = true;
    let answer = move |_: &[Record]| Ok(if std::mem::take(&mut first) { 2 } else { 0 });
    let receiver = receive(Options { answer: Box::new(answer), ..Options::default() }).await;
    let collector = plain(&receiver);
    let _child = collector.start().await;
    feed(&collector.address(), "a", "b", batches(1..=100, 100)).await;
    let state = collector.until(|s| s.lost == 2 && s.lag == 0 && s.delivered == 99).await;
    assert_eq!(state.lost_by_reason.get("refused"), Some(&2), "{state:?}");
    let (got, told) = by_id(records(&receiver));
    assert_eq!((got.len(), told.len()), (100, 1), "each was sent once, and a loss");
    assert_eq!(told[0].attributes["mcp_sensor.count"], 2);
}

#[tokio::test]
async fn a_receiver_that_is_busy_is_asked_again_and_one_that_is_strict_about_us_loses_nothing() {
    let mut answers = vec![
        Status::unavailable("starting"),
        Status::unauthenticated("no token"),
        Status::new(Code::Aborted, "again"),
        Status::deadline_exceeded("slow"),
        Status::permission_denied("not yet"),
    ];
    let answer = move |_: &[Record]| answers.pop().map_or(Ok(0), Err);
    let receiver = receive(Options { answer: Box::new(answer), ..Options::default() }).await;
    let collector = plain(&receiver);
    let _child = collector.start().await;
    feed(&collector.address(), "a", "b", batches(1..=300, 100)).await;
    let state = collector.until(|s| s.lag == 0 && s.delivered == 300).await;
    assert_eq!((state.lost, state.retries, state.error.as_str()), (0, 5, ""));
    let (got, told) = by_id(records(&receiver));
    assert_eq!((keys(&got), told.len()), (keys(&collector.lines()), 0));
}

#[tokio::test]
async fn a_receiver_that_takes_no_gzip_gets_none() {
    let receiver = receive(Options { gzip: false, ..Options::default() }).await;
    let collector = plain(&receiver);
    let _child = collector.start().await;
    feed(&collector.address(), "a", "b", batches(1..=300, 100)).await;
    let state = collector.until(|s| s.lag == 0 && s.delivered == 300).await;
    assert_eq!(state.lost, 0);
    assert_eq!(keys(&by_id(records(&receiver)).0), keys(&collector.lines()));
}

#[tokio::test]
async fn a_receiver_and_a_collector_that_go_in_mid_stream_lose_nothing() {
    let receiver = receive(Options::default()).await;
    let collector = plain(&receiver);
    let mut child = collector.start().await;
    feed(&collector.address(), "a", "b", batches(1..=3000, 100)).await;
    child.kill().await.unwrap();
    let mut child = collector.start().await;
    feed(&collector.address(), "a", "b", batches(3001..=3500, 100)).await;
    collector.until(|s| s.lag == 0 && s.delivered >= 500).await;
    let before = receiver.got.clone();
    drop(receiver);
    // What was under way when it went may still have been taken.
    let mut next = 3501;
    while collector.until(|s| s.lag == 0 || !s.error.is_empty()).await.error.is_empty() {
        assert!(next < 10_000, "the receiver does not go");
        feed(&collector.address(), "a", "b", batches(next..=next + 99, 100)).await;
        next += 100;
    }
    child.kill().await.unwrap();
    let receiver = receive(Options::default()).await;
    collector.write(&format!("otlp: {{endpoint: \"http://{}\", compression: none}}", receiver.address));
    let _child = collector.start().await;
    collector.until(|s| s.lag == 0 && s.delivered > 0).await;
    let mut got: BTreeSet<String> = records(&receiver).into_iter().map(|r| r.id).collect();
    got.extend(before.lock().unwrap().records.iter().map(|r| r.id.clone()));
    assert_eq!(got, keys(&collector.lines()));
    assert!(receiver.got.lock().unwrap().encodings.iter().all(String::is_empty));
}

#[tokio::test]
async fn both_ends_show_a_certificate_and_a_header_has_a_secret_from_a_file() {
    let files = tempfile::tempdir().unwrap();
    certificates(files.path());
    let at = |name: &str| files.path().join(name).display().to_string();
    let read = |name: &str| std::fs::read_to_string(files.path().join(name)).unwrap();
    std::fs::write(files.path().join("token"), "Bearer s3cret\n").unwrap();
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(read("server.pem"), read("server-key.pem")))
        .client_ca_root(Certificate::from_pem(read("ca.pem")));
    let receiver = receive(Options { tls: Some(tls), ..Options::default() }).await;
    let endpoint = format!("endpoint: \"https://localhost:{}\"", receiver.address.port());
    let headers = format!("headers: {{Authorization: \"file:{}\"}}", at("token"));
    let collector = Collector::new(&format!("otlp: {{{endpoint}, {headers}, ca: {}}}", at("ca.pem")));
    let mut child = collector.start().await;
    feed(&collector.address(), "a", "b", batches(1..=50, 50)).await;
    let state = collector.until(|s| !s.error.is_empty()).await;
    assert_eq!((state.delivered, records(&receiver).len()), (0, 0), "no certificate: {state:?}");
    child.kill().await.unwrap();
    let pair = format!("cert: {}, key: {}", at("client.pem"), at("client-key.pem"));
    collector.write(&format!("otlp: {{{endpoint}, {headers}, ca: {}, {pair}}}", at("ca.pem")));
    let _child = collector.start().await;
    collector.until(|s| s.lag == 0 && s.delivered == 50).await;
    assert_eq!(by_id(records(&receiver)).0.len(), 50);
    assert!(receiver.got.lock().unwrap().authorization.iter().all(|a| a == "Bearer s3cret"));
}

fn call(seq: u64) -> Event {
    let exchange = pb::Exchange {
        actor: Some(pb::Actor { server: "time".to_owned(), ..Default::default() }),
        method: "tools/call".to_owned(),
        sender: pb::Sender::Client.into(),
        id_hash: "1".to_owned(),
        outcome: pb::Outcome::Ok.into(),
        duration_ns: 30_000_000,
        ..Default::default()
    };
    let call = pb::ToolCall { exchange: Some(exchange), tool: "now".to_owned() };
    Event { body: Some(Body::ToolCall(Box::new(call))), ..event(seq) }
}

/// Start, and count or sum, of the only series of a metric.
fn series(metrics: &[Metric], name: &str) -> Option<(u64, u64)> {
    let found = metrics.iter().find(|m| m.name == name)?;
    match found.data.as_ref().unwrap() {
        metric::Data::Histogram(h) => {
            assert_eq!(h.aggregation_temporality, i32::from(AggregationTemporality::Cumulative));
            assert_eq!(object(&h.data_points[0].attributes)["gen_ai.tool.name"], "now");
            Some((h.data_points[0].start_time_unix_nano, h.data_points[0].count))
        }
        metric::Data::Sum(s) => {
            assert!(s.is_monotonic);
            let point = &s.data_points[0];
            let Some(opentelemetry_proto::tonic::metrics::v1::number_data_point::Value::AsInt(sum)) =
                point.value
            else {
                panic!("{point:?}")
            };
            Some((point.start_time_unix_nano, u64::try_from(sum).unwrap()))
        }
        other => panic!("{other:?}"),
    }
}

/// The newest metrics, once the number of calls is this.
async fn metrics(receiver: &Receiver, calls: u64) -> (Vec<Metric>, Value) {
    let waiting = async {
        loop {
            let newest = receiver.got.lock().unwrap().metrics.last().cloned();
            if let Some(newest) = newest {
                let resource = &newest.resource_metrics[0];
                let metrics = resource.scope_metrics[0].metrics.clone();
                let of = resource.resource.as_ref().unwrap();
                if series(&metrics, "mcp.server.operation.duration").is_some_and(|(_, n)| n == calls) {
                    return (metrics, Value::Object(object(&of.attributes)));
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(DEADLINE, waiting).await.expect("metrics")
}

#[tokio::test]
async fn metrics_are_cumulative_since_a_start_that_they_name() {
    let receiver = receive(Options::default()).await;
    let collector =
        Collector::new(&format!("otlp: {{endpoint: \"http://{}\", metrics: 1s}}", receiver.address));
    let mut child = collector.start().await;
    feed(&collector.address(), "a", "b", vec![(1..=20).map(call).collect()]).await;
    let (first, resource) = metrics(&receiver, 20).await;
    assert_eq!(resource["service.name"], "mcp-sensor-collector");
    feed(&collector.address(), "a", "b", vec![(21..=25).map(call).collect()]).await;
    let (second, _) = metrics(&receiver, 25).await;
    let start = |m: &[Metric]| series(m, "mcp.server.operation.duration").unwrap().0;
    assert_eq!(start(&first), start(&second));
    assert_eq!(series(&second, "mcp_sensor.tool_calls").unwrap(), (start(&first), 25));
    // Told to end, it sends them once more.
    let before = receiver.got.lock().unwrap().metrics.len();
    let pid = nix::unistd::Pid::from_raw(child.id().unwrap().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    timeout(DEADLINE, child.wait()).await.unwrap().unwrap();
    assert!(receiver.got.lock().unwrap().metrics.len() > before);
    receiver.got.lock().unwrap().metrics.clear();
    let _child = collector.start().await;
    feed(&collector.address(), "a", "b", vec![(26..=30).map(call).collect()]).await;
    let (third, _) = metrics(&receiver, 5).await;
    assert!(start(&third) > start(&first), "sums begin anew, and say so");
}

/// rotel, which hands on to `receiver`.
fn rotel(
    program: &std::path::Path,
    port: u16,
    receiver: &Receiver,
    dir: &std::path::Path,
) -> tokio::process::Child {
    let log = std::fs::File::create(dir.join("rotel.log")).unwrap();
    tokio::process::Command::new(program)
        .arg("start")
        .args(["--otlp-grpc-endpoint", &format!("127.0.0.1:{port}")])
        .args(["--otlp-http-endpoint", &format!("127.0.0.1:{}", free_port())])
        .args(["--exporter", "otlp", "--otlp-exporter-endpoint", &format!("http://{}", receiver.address)])
        .arg("--pid-file")
        .arg(dir.join("rotel.pid"))
        .stdin(std::process::Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn rotel_takes_every_event_and_hands_it_on_with_its_attributes() {
    let Some(venv) = installed("rotel") else { return };
    let found = glob::glob(&format!("{}/lib/python3*/site-packages/rotel/rotel-agent", venv.display()));
    let program = found.unwrap().next().expect("rotel's program").unwrap();
    let (receiver, dir, port) =
        (receive(Options::default()).await, tempfile::tempdir().unwrap(), free_port());
    let collector = Collector::new(&format!("otlp: {{endpoint: \"http://127.0.0.1:{port}\"}}"));
    let _child = collector.start().await;
    let mut all = batches(1..=1000, 100);
    all[3][7].body = Some(denial("time", 10));
    feed(&collector.address(), "a", "b", all).await;
    // Nobody listens there yet.
    let state = collector.until(|s| !s.error.is_empty()).await;
    assert_eq!((state.delivered, state.lost), (0, 0), "{state:?}");
    let _rotel = rotel(&program, port, &receiver, dir.path());
    feed(&collector.address(), "a", "b", batches(1001..=1500, 100)).await;
    let state = collector.until(|s| s.lag == 0 && s.delivered == 1500).await;
    assert_eq!((state.lost, state.error.as_str()), (0, ""));
    let arriving = async {
        while records(&receiver).len() < 1500 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let log = || std::fs::read_to_string(dir.path().join("rotel.log")).unwrap();
    assert!(timeout(2 * DEADLINE, arriving).await.is_ok(), "{}: {}", records(&receiver).len(), log());
    let (got, told) = by_id(records(&receiver));
    assert_eq!((keys(&got), told.len()), (keys(&collector.lines()), 0));
    let denied = &got["a/b/308"];
    assert_eq!(
        (denied.record.severity_number, &denied.attributes["mcp_sensor.verdict"]),
        (13, &"deny".into())
    );
}
