//! The control service over its socket, with the real client and with hostile
//! ones. The agent behind it is a stand-in.

mod support;

use hyper_util::rt::TokioIo;
use mcp_sensor::control::Limits;
use mcp_sensor::event::{Body, pb};
use mcp_sensor::grpc::Deadlines;
use pb::control_client::ControlClient;
use std::path::Path;
use std::time::Duration;
use support::http2::frame;
use support::{Control, DEADLINE, denial};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

async fn channel(path: &Path) -> Result<Channel, tonic::transport::Error> {
    let path = path.to_owned();
    Endpoint::from_static("http://control")
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
}

async fn client(control: &Control) -> ControlClient<Channel> {
    ControlClient::new(channel(&control.path).await.unwrap())
}

#[tokio::test]
async fn every_call_makes_its_round_trip() {
    let control = Control::start(Limits::default());
    control.agent.bus_publish(denial("time", 1));
    let mut c = client(&control).await;
    let status = c.status(pb::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.sensor.as_str(), status.boot.as_str(), status.events), ("host", "boot-1", 1));
    let all = c.servers(pb::ServersRequest::default()).await.unwrap().into_inner().servers;
    assert_eq!(all[0].name, "time");
    let missing = c.servers(pb::ServersRequest { server: "x".to_owned() }).await.unwrap_err();
    assert_eq!((missing.code(), missing.message()), (Code::NotFound, "no server x"));
    assert_eq!(c.policy_show(pb::PolicyShowRequest {}).await.unwrap().into_inner().text, "version: 1\n");
    let bad = c.policy_reload(pb::PolicyReloadRequest {}).await.unwrap_err();
    assert_eq!(bad.code(), Code::InvalidArgument);
    let mode = pb::SetModeRequest { server: "time".to_owned(), mode: pb::Mode::Enforce.into() };
    assert_eq!(c.set_mode(mode).await.unwrap().into_inner().previous(), pb::Mode::Audit);
    let none = c.set_mode(pb::SetModeRequest::default()).await.unwrap_err();
    assert_eq!(none.code(), Code::InvalidArgument);
    let unknown = pb::EventsRequest { types: vec!["conection".to_owned()], ..Default::default() };
    assert_eq!(c.events(unknown).await.unwrap_err().code(), Code::InvalidArgument);
    drop(c);
    control.stop().await;
}

#[tokio::test]
async fn a_labelled_caller_is_refused_at_accept_and_on_every_later_request() {
    let control = Control::start(Limits::default());
    let own = std::process::id();
    let mut before = client(&control).await;
    before.status(pb::StatusRequest {}).await.unwrap();
    let mut follow =
        before.events(pb::EventsRequest { follow: true, ..Default::default() }).await.unwrap().into_inner();
    let launch = pb::LaunchRequest { server: "time".to_owned(), argv: Vec::new() };
    assert_eq!(before.launch(launch).await.unwrap().into_inner().instance, "i1");
    // The connection is older than the label.
    assert_eq!(before.status(pb::StatusRequest {}).await.unwrap_err().code(), Code::PermissionDenied);
    // Its refusal was an event; the stream that was open ends instead of telling it.
    let ended = timeout(DEADLINE, follow.message()).await.unwrap();
    assert_eq!(ended.unwrap_err().code(), Code::PermissionDenied);
    let mut after = client(&control).await;
    assert_eq!(after.status(pb::StatusRequest {}).await.unwrap_err().code(), Code::PermissionDenied);
    let health = tonic_health::pb::health_client::HealthClient::new(channel(&control.path).await.unwrap())
        .check(tonic_health::pb::HealthCheckRequest::default())
        .await;
    assert_eq!(health.unwrap_err().code(), Code::PermissionDenied, "no service is exempt");
    // Refused when it connected: refused for good, also if the pid is unlabelled later.
    control.agent.unlabel(own);
    assert_eq!(after.status(pb::StatusRequest {}).await.unwrap_err().code(), Code::PermissionDenied);
    let findings = control.agent.history();
    assert!(findings.iter().any(|b| matches!(b, Body::Finding(f) if f.kind == "control_refused")));
    drop((before, after));
    control.stop().await;
}

#[tokio::test]
async fn events_are_filtered_and_followed_in_order() {
    let control = Control::start(Limits::default());
    control.agent.bus_publish(denial("time", 1));
    control.agent.bus_publish(denial("other", 1));
    control.agent.bus_publish(Body::Loss(pb::Loss::default()));
    let mut c = client(&control).await;
    let request = pb::EventsRequest { server: "time".to_owned(), follow: true, ..Default::default() };
    let mut stream = c.events(request).await.unwrap().into_inner();
    let mut seqs = Vec::new();
    let first = timeout(DEADLINE, stream.message()).await.unwrap().unwrap().unwrap();
    seqs.extend(first.events.iter().map(|e| e.seq));
    control.agent.bus_publish(denial("other", 1));
    control.agent.bus_publish(denial("time", 1));
    let next = timeout(DEADLINE, stream.message()).await.unwrap().unwrap().unwrap();
    seqs.extend(next.events.iter().map(|e| e.seq));
    assert_eq!(seqs, [1, 5]);
    let verdicts = vec![pb::Verdict::Allow.into()];
    let none = c.events(pb::EventsRequest { verdicts, ..Default::default() }).await.unwrap();
    assert!(none.into_inner().message().await.unwrap().is_none());
    let newest = c.events(pb::EventsRequest { limit: 2, ..Default::default() }).await.unwrap();
    let newest = newest.into_inner().message().await.unwrap().unwrap();
    assert_eq!(newest.events.iter().map(|e| e.seq).collect::<Vec<_>>(), [4, 5]);
    drop((c, stream));
    control.stop().await;
}

#[tokio::test]
async fn a_followed_stream_ends_in_order_when_the_service_ends() {
    let control = Control::start(Limits::default());
    let mut c = client(&control).await;
    let follow = pb::EventsRequest { follow: true, ..Default::default() };
    let mut stream = c.events(follow).await.unwrap().into_inner();
    control.agent.bus_publish(denial("time", 1));
    let stopping = tokio::spawn(control.stop());
    let last = timeout(DEADLINE, stream.message()).await.unwrap().unwrap();
    assert_eq!(last.unwrap().events[0].seq, 1, "what was published before is delivered");
    assert!(timeout(DEADLINE, stream.message()).await.unwrap().unwrap().is_none(), "an end, no error");
    drop((c, stream));
    stopping.await.unwrap();
}

#[tokio::test]
async fn a_client_that_stops_reading_is_cut_off_and_costs_nobody_an_event() {
    let deadlines = Deadlines { stall: Duration::from_millis(300), ..Deadlines::default() };
    let control = Control::start(Limits { deadlines, ..Limits::default() });
    // A whole HTTP/2 client that greets, asks to follow, and reads no byte more.
    let mut raw = stuck_follower(&control.path).await;
    let mut good = client(&control).await;
    let follow = pb::EventsRequest { follow: true, ..Default::default() };
    let mut stream = good.events(follow).await.unwrap().into_inner();
    // Large enough to fill every window and buffer of the stuck one.
    let total = 2000u64;
    let publisher = control.agent.clone();
    let publishing = tokio::task::spawn_blocking(move || {
        for _ in 0..total {
            publisher.bus_publish(denial("time", 2000));
        }
    });
    let mut got = 0;
    while got < total {
        let message = timeout(DEADLINE, stream.message()).await.unwrap().unwrap().unwrap();
        for event in &message.events {
            got += 1;
            assert_eq!(event.seq, got, "the reader that reads misses nothing");
        }
    }
    publishing.await.unwrap();
    // The stuck one's reader goes away with its connection.
    let gone = async {
        while control.agent.readers() > 1 {
            control.agent.bus_publish(denial("time", 2000));
            timeout(DEADLINE, stream.message()).await.unwrap().unwrap().unwrap();
        }
    };
    timeout(DEADLINE, gone).await.expect("the stuck client was cut off");
    let _ = raw.shutdown().await;
    drop((good, stream));
    control.stop().await;
}

/// Speaks just enough HTTP/2 (RFC 9113) to call Events with `follow`, with
/// windows so large that only the socket's buffer stops the server.
async fn stuck_follower(path: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(path).await.unwrap();
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    // SETTINGS_INITIAL_WINDOW_SIZE = 2^31 - 1, and as much for the connection.
    bytes.extend(frame(4, 0, 0, &[0, 4, 0x7f, 0xff, 0xff, 0xff]));
    bytes.extend(frame(8, 0, 0, &[0x7f, 0xf0, 0, 0]));
    let mut headers = Vec::new();
    for (name, value) in [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/mcp_sensor.v1.Control/Events"),
        (":authority", "control"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ] {
        // Literal without indexing, nothing compressed (RFC 7541 6.2.2).
        headers.push(0);
        for text in [name, value] {
            headers.push(text.len() as u8);
            headers.extend(text.as_bytes());
        }
    }
    bytes.extend(frame(1, 4, 1, &headers));
    // One gRPC message, EventsRequest { follow: true }; END_STREAM.
    bytes.extend(frame(0, 1, 1, &[0, 0, 0, 0, 2, 0x08, 0x01]));
    stream.write_all(&bytes).await.unwrap();
    // The server's SETTINGS: it is served.
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.unwrap();
    assert_eq!(head[3], 4);
    stream
}

#[tokio::test]
async fn garbage_and_silence_are_cut_off_and_harm_nobody() {
    let deadlines = Deadlines { greeting: Duration::from_millis(200), ..Deadlines::default() };
    let control = Control::start(Limits { deadlines, ..Limits::default() });
    let mut good = client(&control).await;
    let mut sockets = Vec::new();
    let oversized = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), &[0xff; 4096]].concat();
    let garbage: [&[u8]; 5] = [b"", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HT", &[0; 4096], &oversized];
    for bytes in garbage {
        let mut socket = UnixStream::connect(&control.path).await.unwrap();
        // It may be closed already while this is written.
        let _ = socket.write_all(bytes).await;
        sockets.push(socket);
    }
    for mut socket in sockets {
        let mut rest = Vec::new();
        // Closed or reset, but not kept.
        let _ = timeout(DEADLINE, socket.read_to_end(&mut rest)).await.expect("the connection was ended");
    }
    good.status(pb::StatusRequest {}).await.unwrap();
    let huge = pb::LaunchRequest { server: "x".repeat(1 << 20), argv: Vec::new() };
    assert_eq!(good.launch(huge).await.unwrap_err().code(), Code::OutOfRange);
    good.status(pb::StatusRequest {}).await.unwrap();
    drop(good);
    control.stop().await;
}

#[tokio::test]
async fn connections_beyond_the_limit_are_closed_and_come_again_when_one_ends() {
    let control = Control::start(Limits { connections: 2, ..Limits::default() });
    let mut first = client(&control).await;
    let mut second = client(&control).await;
    first.status(pb::StatusRequest {}).await.unwrap();
    second.status(pb::StatusRequest {}).await.unwrap();
    let mut third = UnixStream::connect(&control.path).await.unwrap();
    let mut rest = Vec::new();
    let _ = timeout(DEADLINE, third.read_to_end(&mut rest)).await.expect("closed at once");
    assert!(rest.is_empty());
    drop(first);
    let again = async {
        loop {
            if let Ok(channel) = channel(&control.path).await
                && ControlClient::new(channel).status(pb::StatusRequest {}).await.is_ok()
            {
                return;
            }
        }
    };
    timeout(DEADLINE, again).await.expect("the place is free again");
    drop(second);
    control.stop().await;
}

#[tokio::test]
async fn health_and_both_reflections_answer() {
    use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
    let control = Control::start(Limits::default());
    let channel = channel(&control.path).await.unwrap();
    let service = "mcp_sensor.v1.Control".to_owned();
    let answer = tonic_health::pb::health_client::HealthClient::new(channel.clone())
        .check(HealthCheckRequest { service: service.clone() })
        .await
        .unwrap();
    assert_eq!(answer.into_inner().status(), ServingStatus::Serving);
    assert!(support::reflection::v1(channel.clone()).await.contains(&service));
    assert!(support::reflection::v1alpha(channel.clone()).await.contains(&service));
    drop(channel);
    control.stop().await;
}

#[tokio::test]
async fn health_follows_the_agent_and_is_the_exit_code_of_status() {
    use mcp_sensor::health::State;
    use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
    let control = Control::start(Limits::default());
    let channel = channel(&control.path).await.unwrap();
    let asked = |service: &'static str| {
        let mut client = tonic_health::pb::health_client::HealthClient::new(channel.clone());
        async move {
            let request = HealthCheckRequest { service: service.to_owned() };
            client.check(request).await.unwrap().into_inner().status()
        }
    };
    let until = async |service: &'static str, wanted| {
        let waiting = async {
            while asked(service).await != wanted {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(DEADLINE, waiting).await.unwrap_or_else(|_| panic!("{service}: {wanted:?}"));
    };
    let check = async || {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_mcp-sensor"));
        let done =
            command.args(["status", "--check", "--control"]).arg(&control.path).output().await.unwrap();
        (done.status.code(), String::from_utf8(done.stdout).unwrap())
    };
    assert_eq!(check().await, (Some(0), String::new()));
    let why = "the hook `egress` is not attached any more";
    control.agent.health.send_replace(State { not_ready: vec![why.to_owned()], ..State::default() });
    for service in ["", "readiness", "mcp_sensor.v1.Control"] {
        until(service, ServingStatus::NotServing).await;
    }
    until("liveness", ServingStatus::Serving).await;
    assert_eq!(check().await, (Some(9), format!("{why}\n")));
    control.agent.health.send_replace(State { not_live: vec!["it hangs".to_owned()], ..State::default() });
    until("liveness", ServingStatus::NotServing).await;
    control.agent.health.send_replace(State::default());
    for service in ["", "readiness", "liveness", "mcp_sensor.v1.Control"] {
        until(service, ServingStatus::Serving).await;
    }
    drop(channel);
    control.stop().await;
}

/// Answer of an HTTP server to one GET: status and body.
async fn get(address: std::net::SocketAddr, path: &str) -> (u16, String) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
    let mut text = String::new();
    timeout(DEADLINE, stream.read_to_string(&mut text)).await.unwrap().unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

#[tokio::test]
async fn probes_over_http_say_why() {
    use mcp_sensor::health::State;
    use mcp_sensor::metrics::{Metrics, Server};
    let metrics = Metrics::new(1);
    let server = Server::bind("127.0.0.1:0".parse().unwrap(), metrics.clone()).unwrap();
    let address = server.address().unwrap();
    let serving = tokio::spawn(server.serve());
    assert_eq!(get(address, "/readyz").await, (503, "it is starting\n".to_owned()));
    assert_eq!(get(address, "/healthz").await.0, 200);
    let state = tokio::sync::watch::Sender::new(State::default());
    metrics.healthy(state.subscribe());
    assert_eq!(get(address, "/readyz").await, (200, "ok\n".to_owned()));
    state.send_replace(State { not_ready: vec!["no policy".to_owned()], ..State::default() });
    assert_eq!(get(address, "/readyz").await, (503, "no policy\n".to_owned()));
    assert_eq!(get(address, "/healthz").await.0, 200, "a restart would not help");
    state.send_replace(State { not_live: vec!["it hangs".to_owned()], ..State::default() });
    assert_eq!(get(address, "/healthz").await, (503, "it hangs\n".to_owned()));
    serving.abort();
}
