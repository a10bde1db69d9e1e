//! The collector's gRPC service.

use super::accept::{Bound, Remote, accept};
use super::archive::{Archive, Started};
use super::fleet::SharedFleet;
use super::metrics::{Kept, Metrics};
use super::policies::Policies;
use super::positions::Origin;
use super::publish::{Elsewhere, Publisher};
use super::query::{self, EventsServer};
use super::view::View;
use super::writer::{self, Ask, Command, Job};
use crate::control::{BindError, ControlSocket};
use crate::event::pb;
use crate::feed::{MAX_BATCH_BYTES, MAX_BATCH_EVENTS};
use crate::grpc::{reflection_v1, reflection_v1alpha};
use crate::health::{self, Health, State};
use crate::metrics::Page;
use crate::tls::Tls;
use pb::collector_server::{Collector as Service, CollectorServer};
use pb::{feed_request, feed_response};
use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::CompressionEncoding;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

/// Batches that a sensor may have under way.
const CREDIT: u32 = 16;
/// For a stream's Hello.
const HELLO: Duration = Duration::from_secs(10);
/// Connections that wait to be accepted. One more loses its first packet, and
/// a second by that; a fleet may come back in one instant.
const BACKLOG: u32 = 4096;
/// Longest name of a sensor or a boot.
const MAX_NAME: usize = 128;
/// That are as healthy as the log.
const SERVICES: [&str; 2] = ["mcp_sensor.v1.Collector", "mcp_sensor.v1.Events"];
/// How long open streams may go on after the signal to end.
const DRAIN: Duration = Duration::from_secs(2);
/// How long outputs may take for the rest after that.
const OUTPUTS: Duration = Duration::from_secs(10);

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    Tcp(String),
    Unix(std::path::PathBuf),
}

#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("address {0:?}: give HOST:PORT or unix:/PATH")]
    Address(String),
    #[error(transparent)]
    Unix(#[from] BindError),
    #[error("cannot listen on {address}: {source}")]
    Tcp { address: String, source: io::Error },
}

impl std::str::FromStr for Listen {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Listen, ListenError> {
        let bad = || ListenError::Address(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.starts_with('/') { Ok(Listen::Unix(path.into())) } else { Err(bad()) };
        }
        let address = text.strip_prefix("http://").unwrap_or(text);
        match address.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
                Ok(Listen::Tcp(address.to_owned()))
            }
            _ => Err(bad()),
        }
    }
}

/// A collector that listens already.
pub struct Collector {
    bound: Bound,
    tls: Option<Arc<Tls>>,
    commands: mpsc::Sender<Command>,
    writer: std::thread::JoinHandle<()>,
    outputs: Vec<std::thread::JoinHandle<()>>,
    fleet: SharedFleet,
    policies: Policies,
    readers: Readers,
    /// Of its log; `None`: it has none.
    kept: Option<Kept>,
    health: watch::Sender<State>,
}

/// What those get who want to read.
enum Readers {
    Log(Box<query::Service>),
    Elsewhere(Elsewhere),
}

impl Collector {
    pub async fn bind(listen: &Listen, archive: Archive, view: Option<View>) -> anyhow::Result<Collector> {
        let bound = bound(listen).await?;
        let fleet = archive.log.fleet();
        let Started { log, service, outputs: shown, threads: outputs } = archive.start()?;
        let kept = Some(Kept { source: log.source(), outputs: shown });
        let readers = Readers::Log(Box::new(service));
        let health = watch::Sender::default();
        let (commands, writer) = writer::spawn(log, view, health.clone())?;
        writer::tidy(&commands);
        writer::pulse(&commands, health.clone(), writer::PULSE);
        let policies = Policies::default();
        Ok(Collector { bound, tls: None, commands, writer, outputs, fleet, policies, readers, kept, health })
    }

    /// One that keeps nothing.
    pub async fn publishing(
        listen: &Listen,
        publisher: Publisher,
        view: Option<View>,
    ) -> anyhow::Result<Collector> {
        let bound = bound(listen).await?;
        let readers = Readers::Elsewhere(publisher.elsewhere());
        let health = watch::Sender::default();
        let (commands, writer) = publisher.spawn(view, health.clone())?;
        writer::pulse(&commands, health.clone(), writer::PULSE);
        let (outputs, fleet, policies) = (Vec::new(), SharedFleet::default(), Policies::default());
        Ok(Collector {
            bound,
            tls: None,
            commands,
            writer,
            outputs,
            fleet,
            policies,
            readers,
            kept: None,
            health,
        })
    }

    /// TCP connections need TLS from now on, with a sensor's certificate. A unix
    /// socket stays as it is.
    #[must_use]
    pub fn secured(self, tls: Arc<Tls>) -> Collector {
        Collector { tls: Some(tls), ..self }
    }

    /// Sensors get the policies of this directory from now on. Needs a tokio
    /// runtime around it.
    pub fn with_policies(self, dir: &Path) -> io::Result<Collector> {
        Ok(Collector { policies: Policies::of(dir)?, ..self })
    }

    /// As `--collector` of a sensor takes it.
    pub fn address(&self) -> io::Result<String> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        Ok(match &self.bound {
            Bound::Tcp(listener) => format!("{scheme}://{}", listener.local_addr()?),
            Bound::Unix(_, socket) => format!("unix:{}", socket.path().display()),
        })
    }

    pub fn health(&self) -> Health {
        self.health.subscribe()
    }

    /// For `metrics::Server`; of the policies that it has at this moment.
    pub fn page(&self) -> Arc<dyn Page> {
        Arc::new(Metrics {
            kept: self.kept.clone(),
            fleet: self.fleet.clone(),
            policies: self.policies.clone(),
            health: self.health(),
            tls: self.tls.clone(),
        })
    }

    /// Whether others than this host can connect, and nobody asks who they are.
    pub fn is_exposed(&self) -> bool {
        match &self.bound {
            Bound::Tcp(_) if self.tls.is_some() => false,
            Bound::Tcp(listener) => listener.local_addr().is_ok_and(|a| !a.ip().is_loopback()),
            Bound::Unix(..) => false,
        }
    }

    /// Serves until `shutdown`; then everything that was taken is on disk.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) -> anyhow::Result<()> {
        let (reporter, health_service) = tonic_health::server::health_reporter();
        let telling = health::tell(reporter, SERVICES.to_vec(), self.health.subscribe()).await;
        let telling = AbortOnDrop(tokio::spawn(telling));
        let (end, ending) = watch::channel(false);
        let feeds = Feeds {
            commands: self.commands,
            fleet: self.fleet,
            policies: self.policies.clone(),
            ending: ending.clone(),
        };
        let feeds = CollectorServer::new(feeds)
            // A batch, its envelope, and room for a newer sensor's fields.
            .max_decoding_message_size(MAX_BATCH_BYTES + (64 << 10))
            .accept_compressed(CompressionEncoding::Gzip)
            .accept_compressed(CompressionEncoding::Zstd);
        let router = Server::builder()
            .max_concurrent_streams(8)
            .initial_stream_window_size(MAX_BATCH_BYTES as u32)
            .initial_connection_window_size(2 * MAX_BATCH_BYTES as u32)
            .http2_max_header_list_size(16 << 10)
            .http2_keepalive_interval(Some(Duration::from_secs(30)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            .add_service(feeds)
            .add_service(health_service.accept_compressed(CompressionEncoding::Gzip))
            .add_service(reflection_v1()?)
            .add_service(reflection_v1alpha()?);
        let router = match self.readers {
            Readers::Log(service) => {
                let events = EventsServer::new(service.until(ending.clone()).serving(self.policies))
                    .accept_compressed(CompressionEncoding::Gzip)
                    .send_compressed(CompressionEncoding::Gzip);
                router.add_service(events)
            }
            Readers::Elsewhere(elsewhere) => {
                router.add_service(EventsServer::new(elsewhere).accept_compressed(CompressionEncoding::Gzip))
            }
        };
        let (connections, incoming) = mpsc::channel(1);
        let watching = self.tls.clone().map(|tls| AbortOnDrop(tokio::spawn(tls.watch())));
        let accepting = accept(&self.bound, self.tls, connections);
        let mut serving =
            Box::pin(router.serve_with_incoming_shutdown(ReceiverStream::new(incoming), ended(ending)));
        tokio::select! {
            served = &mut serving => return Ok(served?),
            () = accepting => (),
            () = shutdown => (),
        }
        drop((watching, telling));
        // Streams end with UNAVAILABLE; sensors come back and send the rest again.
        let _ = end.send(true);
        let _ = tokio::time::timeout(DRAIN, serving).await;
        // It ends with the last stream that could send to it.
        if !crate::outputs::joined(vec![self.writer], DRAIN).await {
            tracing::warn!("a sensor's stream is still open; what was acknowledged is on disk");
        }
        if !crate::outputs::joined(self.outputs, OUTPUTS).await {
            tracing::warn!("an output is behind; it goes on with the next start");
        }
        Ok(())
    }
}

async fn bound(listen: &Listen) -> anyhow::Result<Bound> {
    Ok(match listen {
        Listen::Tcp(address) => {
            let tcp = |source| ListenError::Tcp { address: address.clone(), source };
            Bound::Tcp(listen_tcp(address).await.map_err(tcp)?)
        }
        Listen::Unix(path) => {
            let socket = ControlSocket::bind(path, None).map_err(ListenError::from)?;
            Bound::Unix(UnixListener::from_std(socket.listener()?)?, socket)
        }
    })
}

async fn listen_tcp(address: &str) -> io::Result<TcpListener> {
    let mut last = io::Error::new(io::ErrorKind::InvalidInput, "no address of that name");
    for address in tokio::net::lookup_host(address).await? {
        let listen = || {
            let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
            // As the standard library does: a restart needs the port at once.
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            socket.listen(BACKLOG)
        };
        match listen() {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error,
        }
    }
    Err(last)
}

pub(super) struct AbortOnDrop(pub(super) tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn ended(mut ending: watch::Receiver<bool>) {
    // An error: the sender is gone, which is the end too.
    let _ = ending.wait_for(|end| *end).await;
}

struct Feeds {
    commands: mpsc::Sender<Command>,
    fleet: SharedFleet,
    policies: Policies,
    ending: watch::Receiver<bool>,
}

#[tonic::async_trait]
impl Service for Feeds {
    type FeedStream = ReceiverStream<Result<pb::FeedResponse, Status>>;

    async fn feed(
        &self,
        request: Request<Streaming<pb::FeedRequest>>,
    ) -> Result<Response<Self::FeedStream>, Status> {
        let from = request.extensions().get::<Remote>().cloned().unwrap_or(Remote::UNIX);
        let mut requests = request.into_inner();
        let (to_sensor, responses) = mpsc::channel(CREDIT as usize);
        let (commands, ending) = (self.commands.clone(), self.ending.clone());
        let (fleet, policies) = (self.fleet.clone(), self.policies.clone());
        tokio::spawn(async move {
            let ended = tokio::select! {
                ended = stream(&mut requests, &to_sensor, (&commands, &fleet, &policies), &from) => ended,
                () = ended(ending) => Err(Status::unavailable("the collector is ending")),
                () = to_sensor.closed() => Ok(()),
            };
            match ended {
                Ok(()) => tracing::info!(%from, "a sensor's stream ended"),
                Err(status) => {
                    tracing::warn!(%from, %status, "a sensor's stream ended");
                    let _ = to_sensor.send(Err(status)).await;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(responses)))
    }
}

type ToSensor = mpsc::Sender<Result<pb::FeedResponse, Status>>;

fn answer(message: feed_response::Message) -> Result<pb::FeedResponse, Status> {
    Ok(pb::FeedResponse { message: Some(message) })
}

/// A batch on its way to the disk.
struct Waiting {
    first_seq: u64,
    done: oneshot::Receiver<Result<u64, String>>,
}

async fn stream(
    requests: &mut Streaming<pb::FeedRequest>,
    to_sensor: &ToSensor,
    (commands, fleet, policies): (&mpsc::Sender<Command>, &SharedFleet, &Policies),
    from: &Remote,
) -> Result<(), Status> {
    let ending = || Status::unavailable("the collector is ending");
    let hello = greet(requests).await?;
    let origin = Arc::new(Origin { sensor: hello.sensor.clone(), boot: hello.boot.clone() });
    from.may_be(&origin.sensor).map_err(Status::permission_denied)?;
    let (reply, answered) = oneshot::channel();
    let ask = Ask { origin: origin.clone(), answer: reply };
    commands.send(Command::Ask(ask)).await.map_err(|_| ending())?;
    let committed_seq = answered.await.map_err(|_| ending())?.map_err(Status::unavailable)?;
    tracing::info!(%from, sensor = %origin.sensor, boot = %origin.boot, committed_seq, "a sensor is connected");
    let _connected = fleet.connected(&hello, committed_seq);
    let ack = pb::HelloAck { committed_seq, credit: CREDIT, takes_reports: true };
    if to_sensor.send(answer(feed_response::Message::HelloAck(ack))).await.is_err() {
        return Ok(());
    }
    let (waiting, done) = mpsc::channel(CREDIT as usize);
    // Acks of what was taken still go out when the sensor sends no more.
    let feeding = async {
        let sensor = (&origin, fleet);
        let (taken, ()) =
            tokio::join!(batches(requests, sensor, commands, waiting), acknowledge(done, to_sensor));
        taken
    };
    let serving = async {
        if let Some(sensor) = &hello.bundle {
            let send = |update| {
                let message = answer(feed_response::Message::PolicyUpdate(update));
                async move { to_sensor.send(message).await.is_ok() }
            };
            policies.serve(sensor, send).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        taken = feeding => taken,
        () = serving => Ok(()),
    }
}

/// The Hello that every stream begins with.
async fn greet(requests: &mut Streaming<pb::FeedRequest>) -> Result<pb::Hello, Status> {
    let first = tokio::time::timeout(HELLO, requests.message())
        .await
        .map_err(|_| Status::deadline_exceeded("no hello"))??;
    let Some(feed_request::Message::Hello(hello)) = first.and_then(|r| r.message) else {
        return Err(Status::invalid_argument("a stream begins with hello"));
    };
    for (what, name) in [("sensor", &hello.sensor), ("boot", &hello.boot)] {
        let good = !name.is_empty() && name.len() <= MAX_NAME && name.chars().all(|c| c.is_ascii_graphic());
        if !good {
            let why = format!("{what} must be 1 to {MAX_NAME} printable ASCII characters without spaces");
            return Err(Status::invalid_argument(why));
        }
    }
    Ok(hello)
}

async fn batches(
    requests: &mut Streaming<pb::FeedRequest>,
    (origin, fleet): (&Arc<Origin>, &SharedFleet),
    commands: &mpsc::Sender<Command>,
    waiting: mpsc::Sender<Waiting>,
) -> Result<(), Status> {
    let broken = Arc::new(AtomicBool::new(false));
    loop {
        // A connection that breaks is no error: the sensor comes back.
        let Ok(Some(request)) = requests.message().await else { return Ok(()) };
        let mut batch = match request.message {
            Some(feed_request::Message::Batch(batch)) => batch,
            Some(feed_request::Message::Bundle(state)) => {
                let new = fleet.bundle(&origin.sensor, &state);
                if new && !state.kind.is_empty() {
                    tracing::warn!(sensor = %origin.sensor, kind = %state.kind, error = %state.error,
                        "a sensor refused a policy");
                }
                continue;
            }
            _ => return Err(Status::invalid_argument("expected a batch")),
        };
        let (reply, done) = oneshot::channel();
        let wait = Waiting { first_seq: batch.first_seq, done };
        match check(&batch) {
            Err(why) => drop(reply.send(Err(format!("{MALFORMED}{why}")))),
            Ok(()) => {
                for event in &mut batch.events {
                    event.sensor.clone_from(&origin.sensor);
                    event.boot.clone_from(&origin.boot);
                }
                let job =
                    Job { origin: origin.clone(), events: batch.events, broken: broken.clone(), done: reply };
                if commands.send(Command::Store(job)).await.is_err() {
                    return Err(Status::unavailable("the collector is ending"));
                }
            }
        }
        if waiting.send(wait).await.is_err() {
            return Ok(());
        }
    }
}

/// Marks what will never be taken.
const MALFORMED: &str = "malformed batch: ";

fn check(batch: &pb::Batch) -> Result<(), &'static str> {
    let (Some(first), Some(last)) = (batch.events.first(), batch.events.last()) else {
        return Err("no events");
    };
    if batch.events.len() > MAX_BATCH_EVENTS {
        return Err("too many events");
    }
    if first.seq == 0 || first.seq != batch.first_seq || last.seq != batch.last_seq {
        return Err("its numbers are not those of its events");
    }
    if !batch.events.is_sorted_by(|a, b| a.seq < b.seq) {
        return Err("its events are not in order");
    }
    Ok(())
}

/// Answers batches in their order. A batch that is not stored ends this: the
/// sensor must not take a later ack for it.
async fn acknowledge(mut waiting: mpsc::Receiver<Waiting>, to_sensor: &ToSensor) {
    while let Some(batch) = waiting.recv().await {
        let message = match batch.done.await {
            Ok(Ok(seq)) => feed_response::Message::Ack(pb::Ack { seq }),
            Ok(Err(reason)) => {
                let retry = !reason.starts_with(MALFORMED);
                feed_response::Message::Nack(pb::Nack { first_seq: batch.first_seq, reason, retry })
            }
            Err(_) => return,
        };
        let ends = matches!(&message, feed_response::Message::Nack(nack) if nack.retry);
        if to_sensor.send(answer(message)).await.is_err() || ends {
            return;
        }
    }
}
