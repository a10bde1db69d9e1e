//! A collector, sensors that feed it, and those who read from it.

use super::DEADLINE;
use mcp_sensor::collect::log::Settings;
use mcp_sensor::collect::{Archive, Collector, Limits, Listen};
use mcp_sensor::event::file::Rotation;
use mcp_sensor::event::{Body, Event, pb};
use pb::collector_client::CollectorClient;
use pb::events_client::EventsClient;
use pb::{feed_request, feed_response};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

pub const LARGE: Settings = Settings { keep_bytes: 1 << 30, keep: Duration::ZERO };

/// In this process.
pub struct InProcess {
    pub address: String,
    end: oneshot::Sender<()>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl InProcess {
    pub async fn start(dir: &Path, listen: &str, settings: Settings, limits: Limits) -> InProcess {
        let rotation = Rotation { max_bytes: 1 << 20, keep: 100 };
        let mut archive = Archive::open(dir, settings, Some(rotation)).unwrap();
        archive.limits = limits;
        let listen: Listen = listen.parse().unwrap();
        let collector = Collector::bind(&listen, archive, None).await.unwrap();
        let address = collector.address().unwrap();
        let (end, ended) = oneshot::channel();
        let task = tokio::spawn(collector.serve(async move {
            let _ = ended.await;
        }));
        InProcess { address, end, task }
    }

    pub async fn stop(self) {
        let _ = self.end.send(());
        timeout(DEADLINE, self.task).await.unwrap().unwrap().unwrap();
    }
}

/// The real program, as a process that can be killed.
pub async fn collect(dir: &Path, listen: &str, more: &[&str]) -> Child {
    let mut command = program(listen);
    command.arg("--dir").arg(dir).args(more);
    listening(command).await
}

/// `collect`, without where its events go.
pub fn program(listen: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mcp-sensor"));
    command.args(["collect", "--quiet", "--log", "error", "--listen", listen]);
    command
}

/// Starts it and waits until it listens.
pub async fn listening(mut command: Command) -> Child {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let line = timeout(DEADLINE, lines.next_line()).await.unwrap().unwrap().expect("a line on stderr");
    assert!(line.starts_with("listening on "), "{line}");
    // A full pipe would stop it.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    child
}

pub async fn channel(address: &str) -> Channel {
    let mut tick = tokio::time::interval(Duration::from_millis(5));
    let connecting = async {
        loop {
            tick.tick().await;
            if let Ok(channel) = Endpoint::from_shared(address.to_owned()).unwrap().connect().await {
                return channel;
            }
        }
    };
    timeout(DEADLINE, connecting).await.expect("a collector answers")
}

/// Sends batches of one boot and returns when all of them are acknowledged.
pub async fn feed(address: &str, sensor: &str, boot: &str, batches: Vec<Vec<Event>>) {
    let last = batches.last().and_then(|b| b.last()).map_or(0, |e| e.seq);
    let hello = pb::Hello {
        sensor: sensor.to_owned(),
        boot: boot.to_owned(),
        version: "1.2.3".to_owned(),
        next_seq: last + 1,
        ..Default::default()
    };
    let batch = |events: Vec<Event>| pb::Batch {
        first_seq: events.first().map_or(0, |e| e.seq),
        last_seq: events.last().map_or(0, |e| e.seq),
        events,
    };
    let hello = std::iter::once(feed_request::Message::Hello(hello));
    let messages = hello.chain(batches.into_iter().map(|b| feed_request::Message::Batch(batch(b))));
    let requests: Vec<_> = messages.map(|m| pb::FeedRequest { message: Some(m) }).collect();
    let mut client = CollectorClient::new(channel(address).await);
    let mut answers = client.feed(tokio_stream::iter(requests)).await.unwrap().into_inner();
    let mut acked = 0;
    while let Some(answer) = timeout(DEADLINE, answers.message()).await.unwrap().unwrap() {
        match answer.message.unwrap() {
            feed_response::Message::HelloAck(_) | feed_response::Message::PolicyUpdate(_) => (),
            feed_response::Message::Ack(ack) => acked = ack.seq,
            feed_response::Message::Nack(nack) => panic!("{nack:?}"),
        }
    }
    assert_eq!(acked, last);
}

/// An event of a program's start, a second apart from the one before.
pub fn event(seq: u64) -> Event {
    let exec = pb::Exec { argv: vec!["git".to_owned()], ..Default::default() };
    Event {
        seq,
        time_unix_ns: seq as i64 * 1_000_000_000,
        body: Some(Body::Exec(exec)),
        ..Default::default()
    }
}

pub fn batches(seqs: std::ops::RangeInclusive<u64>, each: usize) -> Vec<Vec<Event>> {
    let events: Vec<Event> = seqs.map(event).collect();
    events.chunks(each).map(<[Event]>::to_vec).collect()
}

pub async fn events_client(address: &str) -> EventsClient<Channel> {
    EventsClient::new(channel(address).await).max_decoding_message_size(64 << 20)
}

pub async fn subscribe(address: &str, request: pb::SubscribeRequest) -> Streaming<pb::SubscribeResponse> {
    events_client(address).await.subscribe(request).await.unwrap().into_inner()
}

pub fn beginning() -> pb::SubscribeRequest {
    pb::SubscribeRequest { start: pb::Start::Beginning.into(), ..Default::default() }
}

pub fn from(cursor: &[u8]) -> pb::SubscribeRequest {
    pb::SubscribeRequest { cursor: cursor.to_vec(), ..Default::default() }
}

pub async fn next(stream: &mut Streaming<pb::SubscribeResponse>) -> pb::SubscribeResponse {
    timeout(DEADLINE, stream.message()).await.expect("a response").unwrap().expect("no end")
}
