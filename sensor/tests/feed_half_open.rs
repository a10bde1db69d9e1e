//! Whoever begins handshakes or streams and never finishes them costs a collector
//! bounded memory and keeps no sensor out.

mod support;

use mcp_sensor::tls::Subject;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustls::pki_types::ServerName;
use rustls::version::TLS13;
use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use support::DEADLINE;
use support::http2::frame;
use support::tls::{Fleet, Running, SENSOR, Sensor, client, days, seqs};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Both ends of each connection are in this process.
fn raise_file_limit() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(1 << 16), hard).unwrap();
}

/// Bytes of memory that this process has.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unfinished_handshakes_are_bounded_and_keep_no_sensor_out() {
    const HALF_OPEN: usize = 1500;
    raise_file_limit();
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: 100,000 connections"]
async fn a_hundred_thousand_unfinished_handshakes_cost_bounded_memory() {
    const ALL: usize = 100_000;
    const OPEN: usize = 2000;
    raise_file_limit();
    let fleet = Fleet::new();
    let collector = Running::start(fleet.dir.path(), Some(fleet.collector(&["127.0.0.1"], days(1)))).await;
    let at = collector.socket();
    let mut half_open = VecDeque::new();
    let mut before = 0;
    for n in 0..ALL {
        // An address of its own for each ten thousand: they have ports enough.
        let socket = TcpSocket::new_v4().unwrap();
        let from = Ipv4Addr::new(127, 1, 0, 1 + (n / 10_000) as u8);
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

// RFC 9113, sections 6.2 to 6.8 and 7.
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const END_HEADERS: u8 = 4;
const ACK: u8 = 1;
const REFUSED_STREAM: u32 = 7;
const ENHANCE_YOUR_CALM: u32 = 11;

/// Header fields of a call to Feed, none of them remembered (RFC 7541, 6.2.2).
fn call() -> Vec<u8> {
    // POST, https.
    let mut block = vec![0x83, 0x87];
    let fields: [(&[u8], &str); 3] =
        [(&[4], "/mcp_sensor.v1.Collector/Feed"), (&[1], "collector"), (&[0x0f, 16], "application/grpc")];
    for (name, value) in fields {
        block.extend(name);
        block.push(value.len() as u8);
        block.extend(value.as_bytes());
    }
    block
}

/// How streams of a client that asks nobody were answered.
#[derive(Debug, Default)]
struct Answers {
    refused: usize,
    /// Streams that the end of their connection ended, and why.
    ended: usize,
    calm: usize,
    /// Each with a status of gRPC.
    answered: usize,
}

/// A client that opens streams however many the server allows.
struct Greedy {
    to: WriteHalf<TlsStream<TcpStream>>,
    reading: JoinHandle<Answers>,
    next: u32,
}

impl Greedy {
    async fn connect(fleet: &Fleet, at: SocketAddr) -> Greedy {
        let pair = fleet.ca.issue(&Subject::Sensor("greedy".to_owned()), days(1)).unwrap();
        let connector = TlsConnector::from(Arc::new(client(fleet, Some(&pair), &[&TLS13])));
        let stream = TcpStream::connect(at).await.unwrap();
        let stream = connector.connect(ServerName::from(at.ip()), stream).await.unwrap();
        let (from, mut to) = split(stream);
        to.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        to.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
        to.write_all(&frame(SETTINGS, ACK, 0, &[])).await.unwrap();
        Greedy { to, reading: tokio::spawn(read(from)), next: 1 }
    }

    /// False: the server has ended the connection.
    async fn open(&mut self) -> bool {
        let opened = self.to.write_all(&frame(HEADERS, END_HEADERS, self.next, &call())).await;
        self.next += 2;
        opened.is_ok()
    }
}

/// Until the connection ends.
async fn read(mut from: ReadHalf<TlsStream<TcpStream>>) -> Answers {
    let mut answers = Answers::default();
    let mut head = [0; 9];
    while from.read_exact(&mut head).await.is_ok() {
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; length];
        if from.read_exact(&mut payload).await.is_err() {
            break;
        }
        let number = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
        match head[3] {
            RST_STREAM if number(0) == REFUSED_STREAM => answers.refused += 1,
            GOAWAY if number(4) == ENHANCE_YOUR_CALM => answers.calm += 1,
            // Trailers, or nothing but them: the end of the stream.
            HEADERS if head[4] & 1 == 1 => answers.answered += 1,
            _ => (),
        }
    }
    answers
}

/// `all` streams over `connections` at a time, none of them ever finished; a
/// sensor feeds the collector meanwhile. What became of them, `patience` after the
/// last.
async fn open_streams(all: usize, connections: usize, patience: Duration) -> Answers {
    let fleet = Fleet::new();
    let collector = Running::start(fleet.dir.path(), Some(fleet.collector(&["127.0.0.1"], days(1)))).await;
    let sensor = Sensor::start(fleet.dir.path(), &collector.address, Some(fleet.sensor(SENSOR, days(1))));
    sensor.publish(10);
    sensor.stored(10).await;
    let mut greedy = Vec::new();
    for _ in 0..connections {
        greedy.push(Greedy::connect(&fleet, collector.socket()).await);
    }
    let mut sum = Answers::default();
    let mut before = 0;
    for n in 0..all {
        let at = n % connections;
        if !timeout(DEADLINE, greedy[at].open()).await.expect("the collector reads") {
            let again = Greedy::connect(&fleet, collector.socket()).await;
            let ended = std::mem::replace(&mut greedy[at], again);
            add(&mut sum, ended).await;
        }
        if n == all / 10 {
            before = resident();
            sensor.publish(10);
            sensor.stored(20).await;
        }
    }
    sensor.publish(10);
    sensor.stored(30).await;
    let grown = resident().saturating_sub(before);
    assert!(grown < 32 << 20, "{grown} bytes more after the first tenth");
    tokio::time::sleep(patience).await;
    for ended in greedy {
        add(&mut sum, ended).await;
    }
    sensor.stop().await;
    collector.stop().await;
    assert!(seqs(fleet.dir.path()).into_iter().eq(1..=30));
    sum
}

async fn add(sum: &mut Answers, mut greedy: Greedy) {
    let opened = (greedy.next as usize - 1) / 2;
    let _ = greedy.to.shutdown().await;
    let answers = timeout(DEADLINE, greedy.reading).await.expect("the connection ends").unwrap();
    sum.refused += answers.refused;
    sum.answered += answers.answered;
    sum.calm += answers.calm;
    sum.ended += opened.saturating_sub(answers.refused + answers.answered);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_are_never_finished_are_refused_and_keep_no_sensor_out() {
    let answers = open_streams(1000, 4, Duration::ZERO).await;
    assert!(answers.refused > 0, "{answers:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: 100,000 streams"]
async fn a_hundred_thousand_unfinished_streams_cost_bounded_memory() {
    // Nothing stays open for ever: who is taken and says no Hello in ten seconds hears so.
    let answers = open_streams(100_000, 10, Duration::from_secs(11)).await;
    eprintln!("{answers:?}");
    assert!(answers.refused > 0 && answers.answered > 0, "{answers:?}");
}
