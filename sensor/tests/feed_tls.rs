//! TLS between sensors and a collector: who is taken, who is refused, and that
//! both ends say why.

mod support;

use mcp_sensor::event::{Body, pb};
use mcp_sensor::feed::{MAX_BATCH_BYTES, Target};
use mcp_sensor::tls::{Subject, Tls, Validity};
use pb::collector_client::CollectorClient;
use pb::{feed_request, feed_response};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use rustls::version::{TLS12, TLS13};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use support::DEADLINE;
use support::log::Log;
use support::tls::{Fleet, Running, SENSOR, Sensor, client, days, seqs, stored, until};
use time::OffsetDateTime;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tonic::Code;

fn past() -> Validity {
    let now = OffsetDateTime::now_utc();
    Validity { not_before: now - time::Duration::days(3), not_after: now - time::Duration::days(1) }
}

fn future() -> Validity {
    let now = OffsetDateTime::now_utc();
    Validity { not_before: now + time::Duration::days(1), not_after: now + time::Duration::days(3) }
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
