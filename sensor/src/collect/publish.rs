//! A collector that keeps nothing: what sensors send goes into a stream of NATS
//! JetStream, and is acknowledged when the stream has it. Any number of these
//! stand beside each other; a sensor may come back to any of them.

use super::output::nats::{Bus, Shared};
use super::output::{Configured, Kind, Part, nats};
use super::positions::{Origin, Positions};
use super::view::View;
use super::writer::{Ask, Command, Job};
use crate::event::{Body, Event, is_denial, json, pb};
use crate::health::{self, State};
use pb::events_server::Events;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio_stream::Empty;
use tonic::{Request, Response, Status};

/// Batches that may wait; then sensors wait.
const WAITING: usize = 64;
/// Batches that are published at once.
const GROUP: usize = 16;
/// How long nobody asks for positions after that failed.
const PAUSE: Duration = Duration::from_secs(1);
/// For what is still on its way at the end.
const FLUSH: Duration = Duration::from_secs(1);

/// Where everything goes.
pub struct Publisher {
    name: String,
    bus: Bus,
    stream: String,
    subject: String,
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NoPublisher(&'static str);

impl Publisher {
    /// Of the only output of a file.
    pub fn new(mut outputs: Vec<Configured>) -> Result<Publisher, NoPublisher> {
        let no = |why| Err(NoPublisher(why));
        let (Some(output), true) = (outputs.pop(), outputs.is_empty()) else {
            return no("--publish needs a file with exactly one output");
        };
        let Kind::Nats(settings) = output.kind else {
            return no(
                "--publish needs an output of the kind `nats`: others do not say when an event is safe",
            );
        };
        if !output.filter.is_empty() {
            return no(
                "--publish needs an output without a filter: what it leaves out would be kept nowhere",
            );
        }
        let Some(stream) = settings.stream.clone() else {
            return no("--publish needs the name of the stream: give `stream`");
        };
        let subject = settings.subject.clone();
        Ok(Publisher { name: output.name, bus: Bus::new(*settings, output.format), stream, subject })
    }

    /// What those hear who want to read here.
    pub(super) fn elsewhere(&self) -> Elsewhere {
        let (stream, subject) = (&self.stream, &self.subject);
        Elsewhere {
            why: format!("this collector keeps nothing: read the stream {stream} (subjects {subject}.>)"),
        }
    }

    pub(super) fn spawn(
        self,
        view: Option<View>,
        health: watch::Sender<State>,
    ) -> io::Result<(mpsc::Sender<Command>, JoinHandle<()>)> {
        let (commands, mut waiting) = mpsc::channel(WAITING);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name(nats::KIND)
            .enable_all()
            .build()?;
        let shared = Shared::of(&self.stream, &self.subject);
        let (name, bus, positions) = (self.name, self.bus, Positions::default());
        let mut writer = Writer { name, bus, shared, positions, view, failed: None };
        let thread = std::thread::Builder::new().name("publish".to_owned()).spawn(move || {
            while let Some(first) = waiting.blocking_recv() {
                let mut jobs = Vec::new();
                let mut next = Some(first);
                while let Some(command) = next {
                    match command {
                        Command::Store(job) => jobs.push(job),
                        Command::Ask(ask) => runtime.block_on(writer.answer(ask)),
                        Command::Tidy => (),
                        Command::Ping(answer) => {
                            shows(&health, runtime.block_on(writer.answers()));
                            let _ = answer.send(());
                        }
                    }
                    next = if jobs.len() < GROUP { waiting.try_recv().ok() } else { None };
                }
                if jobs.is_empty() {
                    continue;
                }
                let published = runtime.block_on(writer.group(jobs));
                shows(&health, published.map_err(|e| e.to_string()));
            }
            runtime.block_on(writer.bus.flush(FLUSH));
        })?;
        Ok((commands, thread))
    }
}

/// Sensors may go elsewhere while it is not ready, so that no batch would tell
/// that it is again: it is asked, too.
fn shows(health: &watch::Sender<State>, published: Result<(), String>) {
    let failed = published.err().map(|why| format!("events cannot be published: {why}"));
    health::change(health, |state| state.not_ready = failed.into_iter().collect());
}

struct Writer {
    name: String,
    bus: Bus,
    shared: Shared,
    /// What this one stored itself.
    positions: Positions,
    view: Option<View>,
    /// When a position could not be read, and why.
    failed: Option<(Instant, String)>,
}

impl Writer {
    /// How far a boot is stored, by whomever. Servers that do not answer hold up a
    /// fleet that comes back once, not once for each sensor.
    async fn answer(&mut self, ask: Ask) {
        if ask.answer.is_closed() {
            return;
        }
        let shared = self.shared(&ask.origin).await;
        let own = self.positions.get(&ask.origin);
        let _ = ask.answer.send(shared.map(|seq| seq.max(own)));
    }

    /// How far the stream says that a boot is stored.
    async fn shared(&mut self, origin: &Origin) -> Result<u64, String> {
        if let Some((_, why)) = self.failed.as_ref().filter(|(at, _)| at.elapsed() < PAUSE) {
            return Err(why.clone());
        }
        let shared = self.shared.get(&mut self.bus, origin).await.map_err(|e| e.to_string());
        self.failed = shared.as_ref().err().map(|why| (Instant::now(), why.clone()));
        if let Err(error) = &shared {
            tracing::error!(error, "how far a sensor is stored cannot be read");
        }
        shared
    }

    /// Whether JetStream answers: of a boot that nobody has.
    async fn answers(&mut self) -> Result<(), String> {
        let nobody = Origin { sensor: String::new(), boot: String::new() };
        self.shared(&nobody).await.map(drop)
    }

    /// Stores a group and answers. Batches before the first that was not stored
    /// count.
    async fn group(&mut self, jobs: Vec<Job>) -> io::Result<()> {
        let (broken, jobs): (Vec<Job>, Vec<Job>) =
            jobs.into_iter().partition(|job| job.broken.load(Ordering::Relaxed));
        for job in broken {
            let _ = job.done.send(Err("a batch before it was not stored".to_owned()));
        }
        let (mut events, mut waiting) = (Vec::new(), Vec::new());
        for job in jobs {
            let last = job.events.last().map_or(0, |e| e.seq);
            let stored = self.positions.get(&job.origin);
            events.extend(job.events.into_iter().filter(|e| e.seq > stored));
            waiting.push((job.origin, job.broken, job.done, last, events.len()));
        }
        let mut part = Part::default();
        let mut published = self.bus.publish(&events, &mut part).await;
        if published.is_ok() {
            let told: Vec<Event> =
                part.refused.iter().filter_map(|r| Some(self.told(events.get(r.event)?, r.reason))).collect();
            published = self.bus.publish(&told, &mut Part::default()).await;
        }
        // Without the losses, nothing that was refused is accounted for.
        let taken = if published.is_err() && !part.refused.is_empty() { 0 } else { part.taken };
        if let Err(error) = &published {
            tracing::error!(%error, batches = waiting.len(), "not all events can be published");
        }
        for (origin, broken, done, last, end) in waiting {
            match &published {
                Err(error) if end > taken => {
                    broken.store(true, Ordering::Relaxed);
                    let _ = done.send(Err(error.to_string()));
                }
                _ => {
                    self.stored(&origin, last).await;
                    let _ = done.send(Ok(last));
                }
            }
        }
        if let Some(view) = &self.view {
            events.truncate(taken);
            view.show(events.into_iter().map(Arc::new).collect());
        }
        published
    }

    async fn stored(&mut self, origin: &Arc<Origin>, last: u64) {
        if last > self.positions.get(origin) {
            self.positions.set(origin, last);
            self.shared.put(&self.bus, origin, last).await;
        }
    }

    /// In the place of an event that the stream will never take, and with its
    /// number.
    fn told(&self, event: &Event, reason: &str) -> Event {
        tracing::error!(
            sensor = event.sensor,
            seq = event.seq,
            reason,
            "the stream will never take this event: it is lost"
        );
        let body = event.body.as_ref();
        let of = |body: &Body| pb::TypeCount { r#type: json::type_name(body).to_owned(), count: 1 };
        let loss = pb::Loss {
            r#where: format!("output:{}", self.name),
            reason: reason.to_owned(),
            count: 1,
            denials: body.is_some_and(is_denial).into(),
            first_seq: event.seq,
            last_seq: event.seq,
            types: body.map(of).into_iter().collect(),
        };
        Event { body: Some(Body::Loss(loss)), ..event.clone() }
    }
}

/// The service `Events` of a collector that has none to give.
#[derive(Clone)]
pub(super) struct Elsewhere {
    why: String,
}

impl Elsewhere {
    fn refuse<T>(&self) -> Result<T, Status> {
        Err(Status::failed_precondition(&self.why))
    }
}

#[tonic::async_trait]
impl Events for Elsewhere {
    type SubscribeStream = Empty<Result<pb::SubscribeResponse, Status>>;
    type QueryStream = Empty<Result<pb::QueryResponse, Status>>;

    async fn subscribe(
        &self,
        _: Request<pb::SubscribeRequest>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        self.refuse()
    }

    async fn query(&self, _: Request<pb::QueryRequest>) -> Result<Response<Self::QueryStream>, Status> {
        self.refuse()
    }

    async fn fleet(&self, _: Request<pb::FleetRequest>) -> Result<Response<pb::FleetResponse>, Status> {
        self.refuse()
    }
}
