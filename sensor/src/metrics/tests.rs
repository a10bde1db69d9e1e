use super::*;
use crate::event::{Bus, Identity, Limits};
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use opentelemetry_proto::tonic::metrics::v1::number_data_point;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{mpsc, watch};

const DEADLINE: Duration = Duration::from_secs(30);

fn identity() -> Identity {
    Identity { sensor: "host".to_owned(), boot: "b".to_owned() }
}

fn call(server: &str, tool: &str, outcome: pb::Outcome, ms: u64) -> Body {
    let exchange = pb::Exchange {
        actor: Some(pb::Actor { server: server.to_owned(), ..Default::default() }),
        method: "tools/call".to_owned(),
        sender: pb::Sender::Client.into(),
        id_hash: "1".to_owned(),
        request_bytes: 100,
        response_bytes: 1000,
        duration_ns: ms * 1_000_000,
        outcome: outcome.into(),
        error_code: -32602,
        ..Default::default()
    };
    Body::ToolCall(Box::new(pb::ToolCall { exchange: Some(exchange), tool: tool.to_owned() }))
}

fn message(method: &str, sender: pb::Sender, id: &str, outcome: pb::Outcome) -> Body {
    let exchange = pb::Exchange {
        actor: Some(pb::Actor { server: "time".to_owned(), ..Default::default() }),
        method: method.to_owned(),
        sender: sender.into(),
        id_hash: id.to_owned(),
        outcome: outcome.into(),
        ..Default::default()
    };
    Body::McpMessage(Box::new(pb::McpMessage { exchange: Some(exchange), count: 1 }))
}

/// The value of the line that begins so.
fn value(text: &str, line: &str) -> Option<f64> {
    text.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(' ')?.parse().ok())
}

#[test]
fn calls_are_counted_by_server_tool_and_outcome_with_their_duration() {
    let metrics = Metrics::new(1);
    for (outcome, ms) in [(pb::Outcome::Ok, 15), (pb::Outcome::Ok, 20), (pb::Outcome::RpcError, 400_000)] {
        metrics.observe(&call("time", "now", outcome, ms));
    }
    let text = metrics.text();
    let of = |line: &str| value(&text, line);
    assert_eq!(of(r#"mcp_sensor_tool_calls_total{server="time",tool="now",outcome="ok"}"#), Some(2.0));
    assert_eq!(of(r#"mcp_sensor_tool_calls_total{server="time",tool="now",outcome="rpc_error"}"#), Some(1.0));
    assert_eq!(
        of(r#"mcp_sensor_tool_call_size_bytes_total{server="time",message="response"}"#),
        Some(3000.0)
    );
    assert_eq!(of(r#"mcp_sensor_events_total{type="tool_call"}"#), Some(3.0));
    let ok = r#"server="time",mcp_method_name="tools/call",gen_ai_tool_name="now""#;
    let bucket = |le: &str| {
        value(&text, &format!(r#"mcp_server_operation_duration_seconds_bucket{{le="{le}",{ok}}}"#))
    };
    assert_eq!(
        (bucket("0.01"), bucket("0.02"), bucket("300.0"), bucket("+Inf")),
        (Some(0.0), Some(2.0), Some(2.0), Some(2.0)),
        "{text}"
    );
    let failed = format!(r#"{{{ok},error_type="-32602"}}"#);
    assert_eq!(of(&format!("mcp_server_operation_duration_seconds_count{failed}")), Some(1.0));
    assert_eq!(of(&format!("mcp_server_operation_duration_seconds_sum{failed}")), Some(400.0));
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn only_requests_of_the_client_are_operations() {
    let metrics = Metrics::new(1);
    metrics.observe(&message("tools/list", pb::Sender::Client, "1", pb::Outcome::Ok));
    metrics.observe(&message("tools/evil", pb::Sender::Client, "2", pb::Outcome::RpcError));
    metrics.observe(&message("roots/list", pb::Sender::Server, "3", pb::Outcome::Ok));
    metrics.observe(&message("notifications/initialized", pb::Sender::Client, "", pb::Outcome::Unspecified));
    let text = metrics.text();
    let methods: Vec<&str> = text
        .lines()
        .filter_map(|l| {
            l.strip_prefix("mcp_server_operation_duration_seconds_count{server=\"time\",mcp_method_name=\"")
        })
        .map(|l| l.split('"').next().unwrap())
        .collect();
    assert_eq!(methods, ["other", "tools/list"]);
    assert!(text.contains(r#"error_type="_OTHER""#), "code 0 is none of the known");
}

#[test]
fn denials_losses_findings_and_what_was_unread_are_counted() {
    let metrics = Metrics::new(1);
    let actor = || Some(pb::Actor { server: "time".to_owned(), ..Default::default() });
    let denied = |count, repeat| {
        let decision =
            pb::Decision { verdict: pb::Verdict::Deny.into(), count, repeat, ..Default::default() };
        Body::Connection(pb::Connection { decision: Some(decision), actor: actor(), ..Default::default() })
    };
    metrics.observe(&denied(0, false));
    metrics.observe(&denied(41, true));
    for name in ["events-1-1", "events-2-2"] {
        metrics.observe(&Body::Loss(pb::Loss {
            r#where: format!("subscriber:{name}"),
            reason: "slow_consumer".to_owned(),
            count: 5,
            ..Default::default()
        }));
    }
    metrics.observe(&Body::Finding(pb::Finding {
        kind: "secret".to_owned(),
        server: "time".to_owned(),
        severity: pb::Severity::High.into(),
        ..Default::default()
    }));
    metrics.observe(&Body::Uninspected(pb::Uninspected {
        actor: actor(),
        bytes: 4096,
        how: "splice".to_owned(),
        ..Default::default()
    }));
    metrics.observe(&Body::Drift(pb::Drift {
        actor: actor(),
        what: "tool_changed".to_owned(),
        ..Default::default()
    }));
    let text = metrics.text();
    for (line, expected) in [
        (r#"mcp_sensor_denials_total{server="time",verdict="deny"}"#, 42.0),
        (r#"mcp_sensor_losses_total{where="subscriber",reason="slow_consumer"}"#, 10.0),
        (r#"mcp_sensor_findings_total{server="time",kind="secret",severity="high"}"#, 1.0),
        (r#"mcp_sensor_uninspected_bytes_total{server="time",how="splice"}"#, 4096.0),
        (r#"mcp_sensor_drift_total{server="time",what="tool_changed"}"#, 1.0),
        (r#"mcp_sensor_events_total{type="repeat"}"#, 1.0),
    ] {
        assert_eq!(value(&text, line), Some(expected), "{line}\n{text}");
    }
}

#[test]
fn ever_new_names_of_tools_count_as_other() {
    let metrics = Metrics::new(1);
    for i in 0..MAX_TOOLS + 50 {
        metrics.observe(&call("time", &format!("t{i}"), pb::Outcome::Ok, 1));
    }
    metrics.observe(&call("time", "t0", pb::Outcome::Ok, 1));
    let text = metrics.text();
    let series = text.lines().filter(|l| l.starts_with("mcp_sensor_tool_calls_total{")).count();
    assert_eq!(series, MAX_TOOLS + 1);
    let of = |line: &str| value(&text, line);
    assert_eq!(of(r#"mcp_sensor_tool_calls_total{server="time",tool="other",outcome="ok"}"#), Some(50.0));
    assert_eq!(of(r#"mcp_sensor_tool_calls_total{server="time",tool="t0",outcome="ok"}"#), Some(2.0));
    assert_eq!(of(r#"mcp_sensor_metrics_overflow_total{metric="mcp_sensor.tool_calls"}"#), Some(50.0));
}

#[test]
fn series_of_one_metric_are_bounded_whatever_its_labels() {
    let mut counter = Counter::new("n", "1", "h", &["a", "b"]);
    let fits = (0..MAX_SERIES + 7).filter(|i| counter.add(&[&i.to_string(), ""], 1)).count();
    assert_eq!((fits, counter.series.len()), (MAX_SERIES, MAX_SERIES + 1));
    assert_eq!(counter.series[&vec![OTHER.to_owned(); 2]], 7);
    assert!(counter.add(&["0", ""], 1), "a known one goes on");
}

#[test]
fn a_tools_name_forges_no_line() {
    let metrics = Metrics::new(1);
    metrics.observe(&call("time", "a\"} 9\nforged_total 1\n# \\", pb::Outcome::Ok, 1));
    let text = metrics.text();
    assert!(!text.lines().any(|l| l.starts_with("forged_total")), "{text}");
    assert!(text.contains(r#"tool="a\"} 9\nforged_total 1\n# \\""#), "{text}");
}

#[test]
fn an_address_without_a_host_is_loopback() {
    let of = |text: &str| parse_address(text).map(|a| a.to_string());
    assert_eq!(of("9464").as_deref(), Ok("127.0.0.1:9464"));
    assert_eq!(of(":9464").as_deref(), Ok("127.0.0.1:9464"));
    assert_eq!(of("localhost:1").as_deref(), Ok("127.0.0.1:1"));
    assert_eq!(of("0.0.0.0:9464").as_deref(), Ok("0.0.0.0:9464"));
    assert_eq!(of("[::1]:9464").as_deref(), Ok("[::1]:9464"));
    for bad in ["", "host:1", "70000", "1.2.3.4", "http://127.0.0.1:1"] {
        assert!(of(bad).is_err(), "{bad}");
    }
}

#[test]
fn an_endpoint_needs_a_scheme_and_a_host() {
    for good in ["http://127.0.0.1:4317", "http://[::1]:4317"] {
        assert!(good.parse::<Endpoint>().is_ok(), "{good}");
    }
    for bad in ["", "127.0.0.1:4317", "grpc://x:1", "http://", "http://a b"] {
        assert!(bad.parse::<Endpoint>().is_err(), "{bad}");
    }
}

async fn get(address: std::net::SocketAddr, request: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn prometheus_gets_what_the_bus_carried() {
    let bus = Bus::new(identity(), Limits::default());
    let metrics = Metrics::new(1);
    let server = Server::bind("127.0.0.1:0".parse().unwrap(), metrics.clone()).unwrap();
    let address = server.address().unwrap();
    let serving = tokio::spawn(server.serve());
    let following = tokio::spawn(metrics.follow(bus.subscribe("metrics", 100).unwrap()));
    bus.publish_now(call("time", "now", pb::Outcome::Ok, 1));
    bus.close();
    tokio::time::timeout(DEADLINE, following).await.unwrap().unwrap();
    let answer = get(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n"));
    assert_eq!(
        value(&answer, r#"mcp_sensor_tool_calls_total{server="time",tool="now",outcome="ok"}"#),
        Some(1.0)
    );
    for (request, status) in [
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
        ("POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", "405"),
        ("nonsense\r\n\r\n", "400"),
    ] {
        let answer = get(address, request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{request}{answer}");
    }
    serving.abort();
}

struct Collector(mpsc::UnboundedSender<ExportMetricsServiceRequest>);

#[tonic::async_trait]
impl MetricsService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportMetricsServiceRequest>,
    ) -> Result<tonic::Response<ExportMetricsServiceResponse>, tonic::Status> {
        self.0.send(request.into_inner()).unwrap();
        Ok(tonic::Response::new(ExportMetricsServiceResponse::default()))
    }
}

#[tokio::test]
async fn an_opentelemetry_collector_gets_the_same_sums_at_the_end() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (sender, mut received) = mpsc::unbounded_channel();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let collector = tonic::transport::Server::builder()
        .add_service(MetricsServiceServer::new(Collector(sender)))
        .serve_with_incoming(incoming);
    let collecting = tokio::spawn(collector);
    let metrics = Metrics::new(7);
    metrics.observe(&call("time", "now", pb::Outcome::ToolError, 1500));
    let (end, ending) = watch::channel(false);
    let exporting = tokio::spawn(export(metrics, identity(), url.parse().unwrap(), ending));
    end.send(true).unwrap();
    let request = tokio::time::timeout(DEADLINE, received.recv()).await.unwrap().unwrap();
    tokio::time::timeout(DEADLINE, exporting).await.unwrap().unwrap();
    let scope = &request.resource_metrics[0].scope_metrics[0];
    let metric = |name: &str| scope.metrics.iter().find(|m| m.name == name).unwrap();
    let duration = metric("mcp.server.operation.duration");
    assert_eq!(duration.unit, "s");
    let Some(Data::Histogram(histogram)) = &duration.data else { panic!("{duration:?}") };
    let point = &histogram.data_points[0];
    assert_eq!((point.count, point.sum, point.start_time_unix_nano), (1, Some(1.5), 7));
    assert_eq!(point.bucket_counts.len(), point.explicit_bounds.len() + 1);
    // 1 s < 1.5 s <= 2 s.
    assert_eq!(point.bucket_counts.iter().position(|n| *n == 1), Some(7));
    let keys: Vec<&str> = point.attributes.iter().map(|a| a.key.as_str()).collect();
    assert_eq!(keys, ["server", "mcp.method.name", "gen_ai.tool.name", "error.type"]);
    let Some(Data::Sum(calls)) = &metric("mcp_sensor.tool_calls").data else { panic!() };
    assert!(calls.is_monotonic && calls.data_points.len() == 1);
    assert!(scope.metrics.iter().all(|m| m.name != "mcp_sensor.losses"), "nothing was lost");
    collecting.abort();
}

#[test]
fn the_end_of_the_certificate_is_a_gauge_under_both_names() {
    let (metrics, tls) = (Metrics::new(1), crate::tls::tests::sensor("s"));
    assert!(!metrics.text().contains("certificate"), "without TLS there is none");
    metrics.certificate(tls.clone());
    let end = tls.state().certificate.not_after;
    let text = metrics.text();
    let shown = value(&text, "mcp_sensor_certificate_expiry_timestamp_seconds");
    assert_eq!(shown, Some(end as f64), "{text}");
    let request = metrics.request("mcp-sensor", &identity().sensor, 1);
    let sent = &request.resource_metrics[0].scope_metrics[0].metrics;
    let gauge = sent.iter().find(|m| m.name == CERTIFICATE.0).unwrap();
    let Some(Data::Gauge(gauge)) = &gauge.data else { panic!("{gauge:?}") };
    assert_eq!(gauge.data_points[0].value, Some(number_data_point::Value::AsInt(end)));
}

#[test]
fn every_metric_is_documented_under_both_names() {
    let text = include_str!("../../../docs/events.md");
    let metrics = Metrics::new(1);
    metrics.certificate(crate::tls::tests::sensor("s"));
    let exposed = metrics.text();
    let sums = metrics.sums();
    let names = sums.counters().map(|c| c.name);
    for name in names.iter().chain([&sums.duration.name, &CERTIFICATE.0]) {
        assert!(text.contains(&format!("`{name}`")), "{name}");
    }
    for line in exposed.lines().filter_map(|l| l.strip_prefix("# TYPE ")) {
        let name = match line.split_once(' ') {
            Some((name, "counter")) => format!("`{name}_total`"),
            Some((name, _)) => format!("`{name}`"),
            None => panic!("{line}"),
        };
        assert!(text.contains(&name), "{name}");
    }
}

/// What the dashboard and the alerts ask for is there.
#[test]
fn what_is_deployed_names_metrics_and_events_that_exist() {
    let metrics = Metrics::new(1);
    metrics.certificate(crate::tls::tests::sensor("s"));
    let filling = crate::kernel::gauges::Filling { name: "x".to_owned(), used: 1, capacity: 2 };
    let present = present::Present {
        policy: Some(present::InForce::default()),
        rings: vec![filling.clone()],
        tables: vec![filling],
        run_times: Some(vec![crate::kernel::gauges::RunTime { hook: "egress", runs: 1, nanoseconds: 1 }]),
        feed: Some(pb::FeedState {
            last_ack_unix_ns: 1,
            spool: Some(pb::SpoolState { oldest_unix_ns: 1, ..Default::default() }),
            ..Default::default()
        }),
        ..Default::default()
    };
    metrics.present(move || present.families());
    let text = metrics.text() + &crate::collect::every_metric();
    let exposed: std::collections::BTreeSet<String> = text
        .lines()
        .filter_map(|l| l.strip_prefix("# TYPE ")?.split_once(' '))
        .flat_map(|(name, kind)| match kind {
            "counter" => vec![format!("{name}_total")],
            "info" => vec![format!("{name}_info")],
            "histogram" => ["bucket", "sum", "count"].map(|part| format!("{name}_{part}")).to_vec(),
            _ => vec![name.to_owned()],
        })
        .collect();
    let listed: Vec<&str> = include_str!("../../../deploy/prometheus/metrics.txt").lines().collect();
    assert!(listed.is_sorted_by(|a, b| a < b));
    for name in &listed {
        assert!(exposed.contains(*name), "{name} is not exposed");
    }
    let name = regex::Regex::new("mcp_(?:sensor|server)_[a-z_]+").unwrap();
    let kind = regex::Regex::new("type=\\\\?\"([a-z_]+)\\\\?\"").unwrap();
    for text in [
        include_str!("../../../deploy/prometheus/alerts.yaml"),
        include_str!("../../../deploy/grafana/mcp-sensor.json"),
    ] {
        for found in name.find_iter(text) {
            assert!(listed.contains(&found.as_str()), "{} is not listed", found.as_str());
        }
        for found in kind.captures_iter(text) {
            assert!(crate::event::json::TYPES.contains(&&found[1]), "no event has the type {}", &found[1]);
        }
    }
}
