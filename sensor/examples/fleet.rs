//! What `cargo xtask bench feed` loads collectors and their outputs with: a fleet
//! in one process, and receivers that throw away what they get.

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};
use mcp_sensor::event::{Body, Bus, Identity, Limits, Subscriber, pb};
use mcp_sensor::feed::{self, BACKLOG, Feed, Settings, SpoolSettings, Target};
use mcp_sensor::tls::{Authority, Files, Pair, Subject, Tls, Validity};
use opentelemetry_proto::tonic::collector::logs::v1::logs_service_server::{LogsService, LogsServiceServer};
use opentelemetry_proto::tonic::collector::logs::v1::{ExportLogsServiceRequest, ExportLogsServiceResponse};
use serde_json::json;
use std::collections::HashMap;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::codec::CompressionEncoding;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

#[derive(Parser)]
enum Role {
    /// Sensors with a bus, a spool, sealed batches and a stream each. Prints what
    /// came of it, as one JSON object
    Feed(Fleet),
    /// Receives until it is killed; says `listening on ADDR` first
    #[command(subcommand)]
    Receive(Receiver),
}

#[derive(clap::Args)]
struct Fleet {
    /// https://HOST:PORT, or unix:/PATH
    #[arg(long)]
    collector: String,
    /// `certs init` made it; for https://
    #[arg(long)]
    ca: Option<PathBuf>,
    /// Where spools and certificates are put, best in memory
    #[arg(long)]
    dir: PathBuf,
    #[arg(long)]
    sensors: usize,
    /// Of all of them together
    #[arg(long)]
    per_second: u64,
    /// Events that one sensor has at once
    #[arg(long, default_value_t = 50)]
    burst: u64,
    #[arg(long)]
    seconds: u64,
}

#[derive(Subcommand)]
enum Receiver {
    /// Log records over gRPC
    Otlp,
    /// POST over HTTP/1.1
    Webhook,
    /// Whatever comes, over TCP
    Tcp,
}

#[tokio::main]
async fn main() -> Result<()> {
    match Role::parse() {
        Role::Feed(fleet) => fleet.run().await,
        Role::Receive(Receiver::Otlp) => otlp().await,
        Role::Receive(Receiver::Webhook) => each_connection(post),
        Role::Receive(Receiver::Tcp) => {
            each_connection(|mut stream| io::copy(&mut stream, &mut io::sink()).map(drop))
        }
    }
}

/// For everything to be acknowledged after the last was published.
const PATIENCE: Duration = Duration::from_secs(120);
/// One sensor of so many has its acknowledgements timed.
const TIMED: usize = 10;
/// How exactly.
const LOOK: Duration = Duration::from_millis(2);
const TICK: Duration = Duration::from_millis(5);

struct Sensor {
    bus: Arc<Bus>,
    feed: Feed,
    task: JoinHandle<()>,
}

impl Fleet {
    fn tls(&self, name: &str, authority: Option<&Authority>) -> Result<Option<Arc<Tls>>> {
        let Some(authority) = authority else { return Ok(None) };
        let Pair { certificate, key } =
            authority.issue(&Subject::Sensor(name.to_owned()), Validity::days(1)?)?;
        let path = |end: &str| self.dir.join(format!("{name}{end}.pem"));
        let ca = self.ca.as_deref().context("no CA")?.join("ca.pem");
        let files = Files { ca, certificate: path(""), key: path("-key") };
        fs::write(&files.certificate, certificate)?;
        fs::write(&files.key, key)?;
        Ok(Some(Tls::open(files)?))
    }

    fn start(&self, number: usize, authority: Option<&Authority>) -> Result<Sensor> {
        let name = format!("fleet-{number}");
        let identity = Identity { sensor: name.clone(), boot: "boot-1".to_owned() };
        // Nobody reads its history.
        let bus = Bus::new(identity, Limits { history: 1, ..Limits::default() });
        let subscriber: Subscriber = bus.subscribe("collector", BACKLOG)?;
        let target = Target::new(&self.collector, self.tls(&name, authority)?, false)?;
        let spool =
            SpoolSettings { dir: self.dir.join(&name), limits: feed::spool::Limits { bytes: 256 << 20 } };
        let (feed, task) = feed::spawn(bus.clone(), subscriber, target, &spool, Settings::default(), None)?;
        Ok(Sensor { bus, feed, task })
    }

    async fn run(&self) -> Result<()> {
        fs::create_dir_all(&self.dir)?;
        let authority = match &self.ca {
            Some(dir) => Some(Authority::open(
                &fs::read_to_string(dir.join("ca.pem"))?,
                &fs::read_to_string(dir.join("ca-key.pem"))?,
            )?),
            None => None,
        };
        let sensors: Vec<Sensor> =
            (0..self.sensors).map(|n| self.start(n, authority.as_ref())).collect::<Result<_>>()?;
        let deadline = Instant::now() + PATIENCE;
        while !sensors.iter().all(|s| s.feed.state().connected) {
            ensure!(Instant::now() < deadline, "not all sensors are connected");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let acks = Arc::new(Acks::default());
        let timed: Vec<Feed> = sensors.iter().step_by(TIMED).map(|s| s.feed.clone()).collect();
        let timing = tokio::spawn(acks.clone().watch(timed));
        let from = Instant::now();
        let buses: Vec<Arc<Bus>> = sensors.iter().map(|s| s.bus.clone()).collect();
        let (rate, burst, time) = (self.per_second, self.burst, Duration::from_secs(self.seconds));
        let published = {
            let acks = acks.clone();
            tokio::task::spawn_blocking(move || publish(&buses, rate, burst, time, &acks)).await?
        };
        let made = from.elapsed();
        let deadline = Instant::now() + PATIENCE;
        while !sensors.iter().all(|s| s.feed.state().acked_seq >= s.bus.last_seq()) {
            ensure!(Instant::now() < deadline, "not everything is acknowledged");
            tokio::time::sleep(LOOK).await;
        }
        let done = from.elapsed();
        timing.abort();
        let mut delays = lock(&acks.milliseconds).clone();
        delays.sort_by(f64::total_cmp);
        let at = |share: f64| delays.get((delays.len() as f64 * share) as usize).copied();
        let lost: u64 = sensors.iter().flat_map(|s| s.bus.subscribers()).map(|s| s.lost).sum();
        let reconnects: u64 = sensors.iter().map(|s| s.feed.state().reconnects).sum();
        let numbered: u64 = sensors.iter().map(|s| s.bus.last_seq()).sum();
        println!(
            "{}",
            json!({
                "published": published, "numbered": numbered, "lost": lost, "reconnects": reconnects,
                "made_seconds": made.as_secs_f64(), "acked_seconds": done.as_secs_f64(),
                "ack_p50_ms": at(0.5), "ack_p99_ms": at(0.99), "timed": delays.len(),
            })
        );
        for sensor in sensors {
            sensor.bus.close();
            sensor.task.await?;
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long it takes from publishing until the collector has it on its disk.
#[derive(Default)]
struct Acks {
    /// Which of those timed, up to which number, since when.
    waiting: Mutex<Vec<(usize, u64, Instant)>>,
    milliseconds: Mutex<Vec<f64>>,
}

impl Acks {
    async fn watch(self: Arc<Acks>, timed: Vec<Feed>) {
        loop {
            tokio::time::sleep(LOOK).await;
            let mut acked = HashMap::new();
            let now = Instant::now();
            lock(&self.waiting).retain(|(sensor, seq, since)| {
                let acked = *acked.entry(*sensor).or_insert_with(|| timed[*sensor].state().acked_seq);
                if acked >= *seq {
                    lock(&self.milliseconds).push(now.duration_since(*since).as_secs_f64() * 1000.0);
                }
                acked < *seq
            });
        }
    }
}

/// Bursts of one sensor after the other, as many as keep to the rate; how many
/// events those were.
fn publish(buses: &[Arc<Bus>], rate: u64, burst: u64, time: Duration, acks: &Acks) -> u64 {
    let (from, mut published) = (Instant::now(), 0);
    let mut next = (0..buses.len()).cycle();
    while from.elapsed() < time {
        let due = (from.elapsed().as_secs_f64() * rate as f64) as u64;
        while published + burst <= due {
            let Some(sensor) = next.next() else { return published };
            let since = Instant::now();
            let last = (0..burst).fold(None, |_, _| Some(buses[sensor].publish_now(connection())));
            published += burst;
            if let Some(last) = last.filter(|_| sensor % TIMED == 0) {
                lock(&acks.waiting).push((sensor / TIMED, last, since));
            }
        }
        std::thread::sleep(TICK);
    }
    published
}

/// As a sensor sees one.
fn connection() -> Body {
    let endpoint = |ip: &str, port| Some(pb::Endpoint { ip: ip.to_owned(), port, ..Default::default() });
    Body::Connection(pb::Connection {
        decision: Some(pb::Decision {
            verdict: pb::Verdict::Allow.into(),
            reason: "rule".to_owned(),
            rule: "profiles.github.egress[0]".to_owned(),
            rule_line: 5,
            hook: "connect".to_owned(),
            generation: 1,
            policy: "5a".repeat(32),
            ..Default::default()
        }),
        actor: Some(pb::Actor {
            server: "github".to_owned(),
            instance: "github-12".to_owned(),
            role: pb::Role::Server.into(),
            pid: 4242,
            uid: 1000,
            user: "dev".to_owned(),
            comm: "node".to_owned(),
            exe: "/usr/bin/node".to_owned(),
            netns: 1,
            ..Default::default()
        }),
        protocol: "tcp".to_owned(),
        direction: pb::Direction::Egress.into(),
        dst: endpoint("203.0.113.7", 443),
        src: endpoint("192.0.2.5", 40_000),
        cookie: 77,
        ..Default::default()
    })
}

struct Blind;

#[tonic::async_trait]
impl LogsService for Blind {
    async fn export(
        &self,
        _: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        Ok(Response::new(ExportLogsServiceResponse::default()))
    }
}

async fn otlp() -> Result<()> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("listening on {}", listener.local_addr()?);
    let service = LogsServiceServer::new(Blind).accept_compressed(CompressionEncoding::Gzip);
    Ok(Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener)).await?)
}

fn each_connection(serve: fn(TcpStream) -> io::Result<()>) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("listening on {}", listener.local_addr()?);
    for stream in listener.incoming() {
        let stream = stream?;
        std::thread::spawn(move || serve(stream));
    }
    Ok(())
}

/// Requests with a `Content-Length`, one after the other.
fn post(stream: TcpStream) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let line = line.trim_end().to_ascii_lowercase();
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().map_err(io::Error::other)?;
            }
            if line.is_empty() {
                break;
            }
        }
        io::copy(&mut reader.by_ref().take(length), &mut io::sink())?;
        reader.get_mut().write_all(b"HTTP/1.1 204 No Content\r\n\r\n")?;
    }
}
