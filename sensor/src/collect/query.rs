//! What a collector gives back: the service `Events`.

use super::accept::Remote;
use super::filter::Filter;
use super::fleet::SharedFleet;
use super::log::{Cursor, Next, Reader, Source};
use super::output::Progress;
use super::policies::Policies;
use crate::event::{Event, pb};
use pb::events_server::Events;
use prost::Message as _;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

pub(super) use pb::events_server::EventsServer;

/// A response ends with the record that brings it to this.
const EVENTS: usize = 512;
const BYTES: usize = 256 << 10;
/// Records that are looked at before anything else is done, so that a filter
/// that lets nothing pass does not hide a caller that has gone.
const RECORDS: usize = 64;
/// Responses that wait for the network.
const WAITING: usize = 2;
const HEARTBEAT: u32 = 15;
const LONGEST_HEARTBEAT: u32 = 300;

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Streams of `Subscribe`, and of `Query`, at one time.
    pub subscribers: usize,
    pub queries: usize,
    /// How long a caller may leave a response unread.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { subscribers: 64, queries: 8, stall: Duration::from_secs(60) }
    }
}

#[derive(Clone)]
pub(super) struct Service {
    source: Source,
    fleet: SharedFleet,
    outputs: Vec<Progress>,
    limits: Limits,
    subscribers: Arc<Semaphore>,
    queries: Arc<Semaphore>,
    ending: watch::Receiver<bool>,
    policies: Policies,
}

impl Service {
    pub(super) fn new(source: Source, fleet: SharedFleet, outputs: Vec<Progress>, limits: Limits) -> Service {
        let (subscribers, queries) = (Semaphore::new(limits.subscribers), Semaphore::new(limits.queries));
        let (subscribers, queries) = (Arc::new(subscribers), Arc::new(queries));
        let (ending, policies) = (watch::channel(false).1, Policies::default());
        Service { source, fleet, outputs, limits, subscribers, queries, ending, policies }
    }

    /// Tells of these as well.
    pub(super) fn serving(self, policies: Policies) -> Service {
        Service { policies, ..self }
    }

    /// Everything that there is to say; empty `sensors`: of all.
    pub(super) fn overview(&self, sensors: &[String]) -> pb::FleetResponse {
        let used = self.limits.subscribers - self.subscribers.available_permits();
        pb::FleetResponse {
            sensors: self.fleet.list(sensors),
            log: Some(pb::LogState { subscribers: used as u64, ..self.source.describe() }),
            outputs: self.outputs.iter().map(Progress::state).collect(),
            policies: self.policies.list(),
        }
    }

    /// Streams end with this.
    pub(super) fn until(mut self, ending: watch::Receiver<bool>) -> Service {
        self.ending = ending;
        self
    }

    fn outbox<T>(&self, place: OwnedSemaphorePermit) -> (Outbox<T>, Responses<T>) {
        let (to_client, receiver) = mpsc::channel(WAITING);
        let end = Arc::new(Mutex::new(None));
        let responses = Responses { receiver, end: end.clone(), _place: place };
        (Outbox { to_client, end, stall: self.limits.stall, ending: self.ending.clone() }, responses)
    }
}

/// A stream of responses, and at its end why it ended, also for a caller that
/// did not read.
pub(super) struct Responses<T> {
    receiver: mpsc::Receiver<T>,
    end: Arc<Mutex<Option<Status>>>,
    /// Held until the connection lets go of the stream, so that those who do not
    /// read are bounded as well.
    _place: OwnedSemaphorePermit,
}

impl<T> Stream for Responses<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.receiver.poll_recv(cx).map(|response| match response {
            Some(response) => Some(Ok(response)),
            None => self.end.lock().unwrap_or_else(PoisonError::into_inner).take().map(Err),
        })
    }
}

struct Outbox<T> {
    to_client: mpsc::Sender<T>,
    end: Arc<Mutex<Option<Status>>>,
    stall: Duration,
    ending: watch::Receiver<bool>,
}

/// The stream is over.
struct Gone;

impl<T> Outbox<T> {
    fn fail(&self, status: Status) -> Gone {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
        Gone
    }

    fn is_closed(&self) -> bool {
        self.to_client.is_closed() || *self.ending.borrow()
    }

    async fn send(&mut self, response: T) -> Result<(), Gone> {
        let sent = tokio::select! {
            biased;
            () = ended(&mut self.ending) => return Err(self.fail(ending())),
            sent = timeout(self.stall, self.to_client.send(response)) => sent,
        };
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Gone),
            Err(_) => {
                let why = format!(
                    "no response was read for {} s; come back with the last cursor",
                    self.stall.as_secs()
                );
                Err(self.fail(Status::resource_exhausted(why)))
            }
        }
    }
}

async fn ended(ending: &mut watch::Receiver<bool>) {
    // An error: the sender is gone, which is the end too.
    let _ = ending.wait_for(|end| *end).await;
}

fn ending() -> Status {
    Status::unavailable("the collector is ending; come back with the last cursor")
}

/// Reads the log for one caller.
struct Search {
    reader: Reader,
    filter: Filter,
    /// Found behind events that had to go first.
    carried: Option<pb::Missed>,
    /// Where the search ends.
    until: u64,
}

#[derive(Default)]
struct Found {
    events: Vec<Event>,
    missed: Option<pb::Missed>,
    /// All that is stored was looked at.
    all: bool,
}

impl Search {
    fn new(source: &Source, filter: Filter, offset: u64, until: u64) -> Search {
        let reader = source.reader_of(offset, filter.times());
        Search { reader, filter, carried: None, until }
    }

    /// Number of the event after all that was found.
    fn offset(&self) -> u64 {
        self.reader.offset() - self.carried.as_ref().map_or(0, |m| m.count)
    }

    /// The next events that pass, a response full of them at most.
    fn step(&mut self) -> io::Result<Found> {
        let mut found = Found { missed: self.carried.take(), ..Found::default() };
        let mut bytes = 0;
        for _ in 0..RECORDS {
            if self.reader.offset() >= self.until {
                found.all = true;
                break;
            }
            match self.reader.read()? {
                Next::Events(events, _) => {
                    for event in events {
                        if self.filter.passes(&event) {
                            bytes += event.encoded_len();
                            found.events.push(event);
                        }
                    }
                }
                Next::Missed { count, reason } => {
                    let more = pb::Missed { count, reason: reason.to_owned() };
                    match &mut found.missed {
                        Some(missed) if found.events.is_empty() && missed.reason == more.reason => {
                            missed.count += count;
                        }
                        None if found.events.is_empty() => found.missed = Some(more),
                        _ => {
                            self.carried = Some(more);
                            break;
                        }
                    }
                }
                Next::End => {
                    found.all = true;
                    break;
                }
            }
            if found.events.len() >= EVENTS || bytes >= BYTES {
                break;
            }
        }
        Ok(found)
    }

    /// The same on a thread that may wait for the disk.
    async fn next(mut self) -> Result<(Search, Found), Status> {
        let step = tokio::task::spawn_blocking(move || {
            let found = self.step();
            (self, found)
        });
        let (search, found) = step.await.map_err(|_| ending())?;
        let found = found.map_err(|error| {
            tracing::error!(%error, "the log cannot be read");
            Status::unavailable(format!("the log cannot be read now: {error}"))
        })?;
        Ok((search, found))
    }
}

/// A sensor may send, it may not read what others sent.
fn may_read<T>(request: &Request<T>) -> Result<(), Status> {
    let from = request.extensions().get::<Remote>().unwrap_or(&Remote::UNIX);
    from.may_read().map_err(Status::permission_denied)
}

async fn subscribe(
    source: Source,
    mut search: Search,
    heartbeat: Duration,
    mut outbox: Outbox<pb::SubscribeResponse>,
) -> Result<(), Gone> {
    let mut grown = source.watch();
    // The first response comes at once: with it the caller has a cursor.
    let mut due = Instant::now();
    loop {
        grown.mark_unchanged();
        let found;
        (search, found) = search.next().await.map_err(|status| outbox.fail(status))?;
        if !found.events.is_empty() || found.missed.is_some() || due <= Instant::now() || outbox.is_closed() {
            let remaining = source.end().saturating_sub(search.offset());
            let cursor = source.cursor(search.offset()).to_bytes();
            let (events, missed) = (found.events, found.missed);
            outbox.send(pb::SubscribeResponse { events, cursor, missed, remaining }).await?;
            due = Instant::now() + heartbeat;
        }
        if !found.all {
            continue;
        }
        tokio::select! {
            _ = grown.changed() => (),
            () = sleep_until(due) => (),
            () = outbox.to_client.closed() => return Err(Gone),
            () = ended(&mut outbox.ending) => return Err(outbox.fail(ending())),
        }
    }
}

/// Where the newest `limit` events that pass begin, and how many that pass come
/// before them from there on. Reads from the end, a part of the log at a time.
fn newest(source: &Source, filter: &Filter, limit: u64, gone: impl Fn() -> bool) -> io::Result<(u64, u64)> {
    let mut passing = 0;
    for (begin, end) in source.parts_newest_first(filter.times()) {
        let mut reader = source.reader(begin);
        while reader.offset() < end {
            match reader.read()? {
                Next::Events(events, _) => {
                    passing += events.iter().filter(|e| filter.passes(e)).count() as u64;
                }
                Next::Missed { .. } => (),
                Next::End => break,
            }
        }
        if passing >= limit || gone() {
            return Ok((begin, passing.saturating_sub(limit)));
        }
    }
    Ok((source.oldest(), 0))
}

async fn query(
    source: Source,
    filter: Filter,
    limit: u64,
    mut outbox: Outbox<pb::QueryResponse>,
) -> Result<(), Gone> {
    let until = source.end();
    let (mut from, mut skip) = (source.oldest(), 0);
    if limit > 0 {
        let (source, filter, to_client) = (source.clone(), filter.clone(), outbox.to_client.clone());
        let found =
            tokio::task::spawn_blocking(move || newest(&source, &filter, limit, || to_client.is_closed()));
        (from, skip) = match found.await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => return Err(outbox.fail(Status::unavailable(error.to_string()))),
            Err(_) => return Err(outbox.fail(ending())),
        };
    }
    let mut search = Search::new(&source, filter, from, until);
    let mut first = true;
    loop {
        let mut found;
        (search, found) = search.next().await.map_err(|status| outbox.fail(status))?;
        let before = skip.min(found.events.len() as u64);
        found.events.drain(..before as usize);
        skip -= before;
        let all = found.all && search.carried.is_none();
        if !found.events.is_empty() || found.missed.is_some() || (all && first) || outbox.is_closed() {
            let cursor = source.cursor(search.offset()).to_bytes();
            outbox.send(pb::QueryResponse { events: found.events, cursor, missed: found.missed }).await?;
            first = false;
        }
        if all {
            return Ok(());
        }
    }
}

fn filter(wanted: Option<pb::EventFilter>) -> Result<Filter, Status> {
    Filter::new(wanted.unwrap_or_default()).map_err(Status::invalid_argument)
}

#[tonic::async_trait]
impl Events for Service {
    type SubscribeStream = Responses<pb::SubscribeResponse>;

    async fn subscribe(
        &self,
        request: Request<pb::SubscribeRequest>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        may_read(&request)?;
        let request = request.into_inner();
        let start = request.start();
        let filter = filter(request.filter)?;
        let heartbeat = match request.heartbeat_seconds {
            0 => HEARTBEAT,
            seconds => seconds.min(LONGEST_HEARTBEAT),
        };
        let end = self.source.end();
        let (mut offset, mut ahead) = (end, 0);
        if !request.cursor.is_empty() {
            let cursor =
                Cursor::read(&request.cursor).map_err(|e| Status::invalid_argument(e.to_string()))?;
            if cursor.log != self.source.cursor(0).log {
                let why = "the cursor is of another log: subscribe again without it";
                return Err(Status::failed_precondition(why));
            }
            // The disk has lost what was committed.
            ahead = cursor.offset.saturating_sub(end);
            offset = cursor.offset.min(end);
        } else if start == pb::Start::Beginning {
            offset = self.source.oldest();
        }
        let place = self.subscribers.clone().try_acquire_owned().map_err(|_| {
            let limit = self.limits.subscribers;
            Status::resource_exhausted(format!("{limit} subscribers are the limit, and there are so many"))
        })?;
        let search = Search::new(&self.source, filter, offset, u64::MAX);
        let (outbox, responses) = self.outbox(place);
        let source = self.source.clone();
        tokio::spawn(async move {
            let mut outbox = outbox;
            if ahead > 0 {
                let missed = Some(pb::Missed { count: ahead, reason: "damaged".to_owned() });
                let cursor = source.cursor(offset).to_bytes();
                let response = pb::SubscribeResponse { missed, cursor, ..Default::default() };
                if outbox.send(response).await.is_err() {
                    return;
                }
            }
            let _ = subscribe(source, search, Duration::from_secs(heartbeat.into()), outbox).await;
        });
        Ok(Response::new(responses))
    }

    type QueryStream = Responses<pb::QueryResponse>;

    async fn query(&self, request: Request<pb::QueryRequest>) -> Result<Response<Self::QueryStream>, Status> {
        may_read(&request)?;
        let request = request.into_inner();
        let filter = filter(request.filter)?;
        let place = self.queries.clone().try_acquire_owned().map_err(|_| {
            let limit = self.limits.queries;
            Status::resource_exhausted(format!("{limit} queries are the limit, and there are so many"))
        })?;
        let (outbox, responses) = self.outbox(place);
        tokio::spawn(query(self.source.clone(), filter, request.limit, outbox));
        Ok(Response::new(responses))
    }

    async fn fleet(&self, request: Request<pb::FleetRequest>) -> Result<Response<pb::FleetResponse>, Status> {
        may_read(&request)?;
        Ok(Response::new(self.overview(&request.get_ref().sensors)))
    }
}
