//! Keeps a stream to the collector, and the events moving over it.

use super::batch::{bundle, hello};
use super::codec::SealedCodec;
use super::connect::{AddressError, Heard, Target};
use super::order::{LookBack, Order};
use super::spool::{Limits, Owner, Spool, SpoolError};
use super::store::{Next, Store};
use super::window::Window;
use super::writer;
use crate::event::ledger::Unsafe;
use crate::event::{Bus, Subscriber, now, pb};
use crate::tls::{Certificate, Tls};
use pb::feed_response::Message;
use prost::bytes::Bytes;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::codec::CompressionEncoding;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Code, Request, Status, Streaming};

#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How long a batch waits to fill.
    pub linger: Duration,
    /// First and longest pause before connecting again.
    pub backoff: (Duration, Duration),
    /// To connect, and for the collector's greeting.
    pub connect: Duration,
    /// For the last acks when the sensor ends.
    pub drain: Duration,
    /// Until collectors before the one that is fed are asked whether they are
    /// back, and between two such questions.
    pub look_back: Duration,
    /// Whether batches are compressed; `None`: on the way to another host.
    pub compress: Option<bool>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            linger: Duration::from_millis(20),
            backoff: (Duration::from_millis(200), Duration::from_secs(10)),
            connect: Duration::from_secs(10),
            drain: Duration::from_secs(3),
            look_back: Duration::from_secs(300),
            compress: None,
        }
    }
}

/// A running feed.
#[derive(Clone)]
pub struct Feed {
    state: Arc<Mutex<pb::FeedState>>,
    tls: Option<Arc<Tls>>,
}

impl Feed {
    pub fn state(&self) -> pb::FeedState {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner).clone();
        pb::FeedState { tls: self.tls.as_deref().map(shown), ..state }
    }

    fn update(&self, change: impl FnOnce(&mut pb::FeedState)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Where a sensor keeps what is not acknowledged.
#[derive(Clone, Debug)]
pub struct SpoolSettings {
    pub dir: PathBuf,
    pub limits: Limits,
}

#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error("spool: {0}; give another directory with --spool")]
    Spool(#[from] SpoolError),
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}

/// Where events go, and where policies come from.
pub struct Collectors {
    /// In the order in which they are tried; never empty.
    pub targets: Vec<Target>,
    /// `None`: policies are not taken.
    pub policy: Option<PolicyLink>,
}

impl From<Target> for Collectors {
    fn from(target: Target) -> Collectors {
        Collectors { targets: vec![target], policy: None }
    }
}

/// To whoever puts policies in force.
pub struct PolicyLink {
    /// The last bundle that a collector offered, as it came.
    pub offers: watch::Sender<Vec<u8>>,
    /// What became of them.
    pub state: watch::Receiver<pb::BundleState>,
}

/// Starts spooling what `subscriber` gets and sending it to `target`. The task
/// ends when the bus is closed and everything is acknowledged, or the drain time
/// is over; what is left then is sent by the next run. `left`: what went with the
/// last one.
pub fn spawn(
    bus: Arc<Bus>,
    subscriber: Subscriber,
    collectors: impl Into<Collectors>,
    spool: &SpoolSettings,
    settings: Settings,
    left: Option<&Unsafe>,
) -> Result<(Feed, tokio::task::JoinHandle<()>), FeedError> {
    let Collectors { targets, policy } = collectors.into();
    let order = Order::new(targets.into_iter().map(|t| t.within(settings.connect)).collect());
    let identity = bus.identity();
    let owner = Owner { sensor: identity.sensor.clone(), boot: identity.boot.clone() };
    let (mut store, report) = Spool::open(&spool.dir, spool.limits, owner.clone())?;
    for file in &report.files {
        tracing::warn!(dir = %spool.dir.display(), %file, "the spool was damaged");
    }
    if report.unreadable > 0 {
        // How many events, and of which run, nobody knows.
        super::lost(&bus, "spool_unreadable", 0, 0, 0);
    }
    if let Some(left) = left {
        store.append_unsafe(left).map_err(|source| SpoolError::Io { path: spool.dir.clone(), source })?;
    }
    let store = Arc::new(Store::new(store));
    writer::spawn(store.clone(), bus.clone(), subscriber, settings.linger).map_err(FeedError::Thread)?;
    for target in order.all().filter(|target| target.is_exposed()) {
        tracing::warn!(
            collector = target.address(),
            "events are sent in the clear: whoever is on the way can read and change them"
        );
    }
    let tls = order.all().find_map(Target::tls).cloned();
    if let Some(state) = tls.as_ref().map(|tls| tls.state()) {
        warn_of_other_name(&state.certificate, &identity.sensor);
    }
    let watching = tls.as_ref().map(|tls| tokio::spawn(tls.clone().watch()));
    let addresses: Vec<String> = order.all().map(|target| target.address().to_owned()).collect();
    let state = pb::FeedState { address: addresses[0].clone(), addresses, ..Default::default() };
    let feed = Feed { state: Arc::new(Mutex::new(state)), tls };
    let task = Task {
        bus,
        order,
        settings,
        feed: feed.clone(),
        store,
        window: Window::new(),
        owner: Arc::new(owner),
        policy,
        reports: false,
    };
    let running = async move {
        task.run().await;
        if let Some(watching) = watching {
            watching.abort();
        }
    };
    Ok((feed, tokio::spawn(running)))
}

/// The collector will refuse it, but the sensor still enforces.
fn warn_of_other_name(certificate: &Certificate, sensor: &str) {
    let id = certificate.spiffe();
    match id.as_ref().map(|id| id.sensor()) {
        Ok(Some(name)) if name == sensor => {}
        Ok(_) => tracing::error!(certificate = %id.map_or(String::new(), |i| i.to_string()), sensor,
            "the certificate is not of this sensor: the collector will refuse it; issue one for it, or give its name with --sensor"),
        Err(error) => tracing::error!(%error, "the collector will refuse the certificate"),
    }
}

/// Why a stream ended.
enum End {
    /// Everything is delivered, or there is no more time for it.
    Done,
    /// What comes next is of another run of the sensor: it needs a stream of its own.
    Other,
    /// A collector that comes before this one is back.
    Better,
    /// Try again.
    Lost(String),
}

impl From<Status> for End {
    fn from(status: Status) -> End {
        End::Lost(match status.code() {
            Code::PermissionDenied => format!("the collector refused this sensor: {}", status.message()),
            code => format!("{code}: {}", status.message()),
        })
    }
}

struct Task {
    bus: Arc<Bus>,
    order: Order,
    settings: Settings,
    feed: Feed,
    store: Arc<Store>,
    window: Window,
    /// Of the batches in the window.
    owner: Arc<Owner>,
    policy: Option<PolicyLink>,
    /// This collector hears what became of policies.
    reports: bool,
}

impl Task {
    async fn run(mut self) {
        let (first, longest) = self.settings.backoff;
        let mut pause = first;
        loop {
            let (started, acked) = (Instant::now(), self.window.acked_seq());
            let why = match self.stream().await {
                End::Done => break,
                End::Other => {
                    pause = first;
                    continue;
                }
                End::Better => {
                    pause = first;
                    tracing::info!(
                        collector = self.order.current().address(),
                        "the collector before is back"
                    );
                    continue;
                }
                End::Lost(why) => why,
            };
            if self.window.acked_seq() > acked || started.elapsed() > longest {
                pause = first;
            }
            tracing::warn!(collector = %self.feed.state().address, error = %why, "no stream to the collector");
            self.feed.update(|s| {
                s.connected = false;
                s.error = why;
                s.reconnects += 1;
            });
            self.show();
            // Another may take them at once; the round as a whole has a pause.
            let all = self.order.next();
            let wait = if all { spread(pause) } else { spread(first.min(pause)) };
            tokio::select! {
                () = sleep(wait) => (),
                () = self.store.closing(), if self.store.closed().is_none() => (),
            }
            if self.is_over() {
                break;
            }
            // An ending sensor has only the drain time: it does not wait long.
            pause = match all {
                _ if self.store.closed().is_some() => first,
                true => (pause * 2).min(longest),
                false => pause,
            };
        }
        self.feed.update(|s| s.connected = false);
        let bytes = self.store.end(&self.owner.boot, self.window.acked_seq());
        if bytes > 0 || self.window.len() > 0 {
            tracing::warn!(bytes, "events are not delivered yet; they are in the spool for the next start");
        }
    }

    fn is_over(&self) -> bool {
        self.store.closed().is_some_and(|at| at.elapsed() >= self.settings.drain)
    }

    /// One stream, until it breaks or everything is delivered.
    async fn stream(&mut self) -> End {
        if self.window.len() == 0
            && let Some(owner) = self.store.next_owner()
            && owner != self.owner
        {
            self.owner = owner;
            self.window = Window::new();
        }
        let (requests, mut responses) = match timeout(self.settings.connect, self.connect()).await {
            Ok(Ok(streams)) => streams,
            Ok(Err(end)) => return end,
            Err(_) => return End::Lost("the collector does not answer".to_owned()),
        };
        let acked = self.window.acked_seq();
        self.store.acked(&self.owner.boot, acked);
        self.feed.update(|s| {
            s.connected = true;
            s.acked_seq = acked;
            s.error.clear();
        });
        tracing::info!(collector = %self.feed.state().address, boot = %self.owner.boot, acked, "feeding the collector");
        let mut looking = LookBack::new(&self.order, self.settings);
        let mut report: Option<Bytes> = None;
        loop {
            // Before looking: nothing comes after it.
            let drained = self.store.drained();
            let mut other = false;
            while self.window.has_room() && !other {
                match self.store.next(&self.owner) {
                    Ok(Next::Batch(batch)) => self.window.push(batch),
                    Ok(Next::Nothing) => break,
                    Ok(Next::Other) => other = true,
                    Err(error) => return End::Lost(format!("the spool cannot be read: {error}")),
                }
            }
            if self.window.len() == 0 && other {
                return End::Other;
            }
            if self.window.len() == 0 && drained && self.window.has_room() {
                return End::Done;
            }
            if let Some(bytes) = report.take() {
                report = requests.try_send(bytes).err().map(mpsc::error::TrySendError::into_inner);
            }
            while let Some(batch) = self.window.next() {
                // The channel holds a whole window. Should the stream be gone,
                // its end is read below.
                let _ = requests.try_send(batch.bytes);
            }
            self.show();
            tokio::select! {
                biased;
                response = responses.message() => match response {
                    Ok(Some(response)) => {
                        if let Some(end) = self.answer(response) {
                            return end;
                        }
                    }
                    Ok(None) => return End::Lost("the collector closed the stream".to_owned()),
                    Err(status) => return status.into(),
                },
                () = at(self.store.closed().map(|at| at + self.settings.drain)) => return End::Done,
                () = self.store.ready() => (),
                back = looking.back() => {
                    self.order.take(back);
                    return End::Better;
                }
                state = news(self.policy.as_mut()), if self.reports => report = Some(bundle(state)),
            }
        }
    }

    fn show(&self) {
        let spool = self.store.shown();
        self.feed.update(|s| {
            s.unacked_batches = self.window.len() as u64;
            s.spool = Some(spool);
        });
    }

    async fn connect(&mut self) -> Result<(mpsc::Sender<Bytes>, Streaming<pb::FeedResponse>), End> {
        let heard = Heard::default();
        // What TLS said is the cause of whatever came after it.
        self.greet(&heard).await.map_err(|end| heard.take().map_or(end, End::Lost))
    }

    async fn greet(
        &mut self,
        heard: &Heard,
    ) -> Result<(mpsc::Sender<Bytes>, Streaming<pb::FeedResponse>), End> {
        let lost = |error: &dyn std::error::Error| End::Lost(chain(error));
        let target = self.order.current();
        self.feed.update(|s| target.address().clone_into(&mut s.address));
        let channel = target.connect(heard).await.map_err(|e| lost(&e))?;
        let mut grpc = Grpc::new(channel);
        let compress = self.order.compresses(self.settings.compress);
        if compress {
            grpc = grpc.send_compressed(CompressionEncoding::Zstd);
        }
        grpc.ready().await.map_err(|e| lost(&e))?;
        let (requests, stream) = mpsc::channel(super::window::MOST + 2);
        // Of a run that is over nobody knows the next number, nor needs to.
        let current = self.owner.boot == self.bus.identity().boot;
        let next_seq = if current { self.bus.last_seq() + 1 } else { 0 };
        let greeting = hello(pb::Hello {
            sensor: self.owner.sensor.clone(),
            boot: self.owner.boot.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            oldest_seq: self.window.oldest().unwrap_or(next_seq),
            next_seq,
            bundle: self.policy.as_mut().map(|policy| policy.state.borrow_and_update().clone()),
        });
        let _ = requests.try_send(greeting);
        let path = PathAndQuery::from_static("/mcp_sensor.v1.Collector/Feed");
        let response = grpc.streaming(Request::new(ReceiverStream::new(stream)), path, SealedCodec).await;
        let response = match response {
            Err(status) if compress && status.code() == Code::Unimplemented => {
                // An older collector; the same one is asked again.
                self.order.without_compression();
                return Err(End::Other);
            }
            response => response?,
        };
        let mut responses = response.into_inner();
        match responses.message().await?.and_then(|r| r.message) {
            Some(Message::HelloAck(ack)) => {
                self.window.restart(ack.committed_seq, ack.credit);
                self.reports = ack.takes_reports;
            }
            other => return Err(End::Lost(format!("the collector did not greet: {other:?}"))),
        }
        Ok((requests, responses))
    }

    fn answer(&mut self, response: pb::FeedResponse) -> Option<End> {
        match response.message {
            Some(Message::Ack(ack)) => {
                self.window.ack(ack.seq);
                self.store.acked(&self.owner.boot, ack.seq);
                self.feed.update(|s| (s.acked_seq, s.last_ack_unix_ns) = (ack.seq, now()));
                None
            }
            Some(Message::Nack(nack)) if nack.retry => {
                Some(End::Lost(format!("the collector cannot store: {}", nack.reason)))
            }
            Some(Message::Nack(nack)) => {
                let batch = self.window.reject(nack.first_seq)?;
                tracing::error!(first_seq = batch.first_seq, reason = %nack.reason, "the collector rejected a batch");
                self.feed.update(|s| s.rejected += 1);
                super::lost(&self.bus, "rejected", batch.events as u64, batch.first_seq, batch.last_seq);
                None
            }
            Some(Message::PolicyUpdate(update)) => {
                if let Some(policy) = &self.policy {
                    policy.offers.send_replace(update.signed_bundle);
                }
                None
            }
            // From a newer collector; nothing that needs an answer.
            Some(Message::HelloAck(_)) | None => None,
        }
    }
}

/// The next change of what became of policies.
async fn news(policy: Option<&mut PolicyLink>) -> pb::BundleState {
    if let Some(policy) = policy
        && policy.state.changed().await.is_ok()
    {
        return policy.state.borrow_and_update().clone();
    }
    std::future::pending().await
}

fn shown(tls: &Tls) -> pb::TlsState {
    let state = tls.state();
    pb::TlsState {
        certificate: tls.files().certificate.display().to_string(),
        id: state.certificate.spiffe().map_or(String::new(), |id| id.to_string()),
        not_after_unix_ns: state.certificate.not_after.saturating_mul(1_000_000_000),
        error: state.error,
    }
}

/// Ends at `when`; never without one.
async fn at(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}

/// From half of it to one and a half, so that sensors that lost one collector do
/// not come back in one instant.
fn spread(pause: Duration) -> Duration {
    pause.mul_f64(0.5 + fastrand::f64())
}

/// tonic's transport errors say what happened only in their sources.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
