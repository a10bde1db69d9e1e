//! The one place where events get their number and go to whoever reads them.
//!
//! Publishing takes a short lock and never waits for a reader: each reader has
//! a bounded buffer of its own. What a slow reader missed is told to it in its
//! own stream, as a Loss at the number of the last event it missed. A bounded
//! history serves readers that come later.

use super::buffer::{Buffer, Item, Lost};
use super::ledger::Ledger;
use super::{Body, Event, now, pb, weight};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use tokio::sync::Notify;

/// Who writes these events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Stable over restarts.
    pub sensor: String,
    /// This run.
    pub boot: String,
}

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Past events kept for readers, of each class (denials, telemetry).
    pub history: usize,
    /// Readers at one time.
    pub subscribers: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { history: 4096, subscribers: 64 }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("too many readers of events ({limit}); end one of them first")]
pub struct TooManySubscribers {
    pub limit: usize,
}

type Filter = dyn Fn(&Event) -> bool + Send + Sync;

/// Distributes events; share it as `Arc<Bus>`.
pub struct Bus {
    identity: Identity,
    limits: Limits,
    ledger: OnceLock<Arc<Ledger>>,
    state: Mutex<State>,
}

struct State {
    next_seq: u64,
    history: Buffer,
    subscribers: Vec<Weak<Shared>>,
    closed: bool,
}

struct Shared {
    name: String,
    capacity: usize,
    filter: Option<Box<Filter>>,
    buffer: Mutex<Queue>,
    ready: Notify,
}

struct Queue {
    buffer: Buffer,
    closed: bool,
}

/// A poisoned lock only means that a reader's filter panicked; the data under
/// it is whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus {
    pub fn new(identity: Identity, limits: Limits) -> Arc<Bus> {
        let state = State {
            next_seq: 1,
            history: Buffer::new(limits.history),
            subscribers: Vec::new(),
            closed: false,
        };
        Arc::new(Bus { identity, limits, ledger: OnceLock::new(), state: Mutex::new(state) })
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Notes each number there from now on. The first one stays.
    pub fn keep(&self, ledger: Arc<Ledger>) {
        let _ = self.ledger.set(ledger);
    }

    /// Every event up to this number is on a disk.
    pub fn safe(&self, seq: u64) {
        if let Some(ledger) = self.ledger.get() {
            ledger.safe(seq);
        }
    }

    /// Numbers and distributes an event; the number. Never blocks on a reader,
    /// may be called from any thread.
    pub fn publish(&self, time_unix_ns: i64, body: Body) -> u64 {
        let mut event = Event {
            seq: 0,
            time_unix_ns,
            sensor: self.identity.sensor.clone(),
            boot: self.identity.boot.clone(),
            body: Some(body),
        };
        let weight = weight(&event);
        let mut state = lock(&self.state);
        let seq = state.next_seq;
        state.next_seq += 1;
        event.seq = seq;
        if let Some(ledger) = self.ledger.get() {
            ledger.published(seq);
        }
        let event = Arc::new(event);
        state.subscribers.retain(|subscriber| {
            let Some(shared) = subscriber.upgrade() else { return false };
            if shared.filter.as_ref().is_none_or(|wants| wants(&event)) {
                lock(&shared.buffer).buffer.push(event.clone(), weight);
                shared.ready.notify_one();
            }
            true
        });
        state.history.push(event, weight);
        seq
    }

    /// [`Bus::publish`] with the time of now.
    pub fn publish_now(&self, body: Body) -> u64 {
        self.publish(now(), body)
    }

    /// A reader of everything from now on, with a buffer of `capacity` events
    /// of each class. `name` stands in its losses ("subscriber:NAME").
    pub fn subscribe(&self, name: &str, capacity: usize) -> Result<Subscriber, TooManySubscribers> {
        self.attach(&mut lock(&self.state), name, capacity, None)
    }

    /// The past events and a reader of those to come, with nothing between
    /// them lost or doubled; both only of what `filter` wants.
    pub fn subscribe_with_history(
        &self,
        name: &str,
        capacity: usize,
        filter: impl Fn(&Event) -> bool + Send + Sync + 'static,
    ) -> Result<(Vec<Arc<Event>>, Subscriber), TooManySubscribers> {
        let filter: Box<Filter> = Box::new(filter);
        let mut state = lock(&self.state);
        let events = state.history.iter().filter(|e| filter(e)).cloned().collect();
        let subscriber = self.attach(&mut state, name, capacity, Some(filter))?;
        Ok((events, subscriber))
    }

    fn attach(
        &self,
        state: &mut State,
        name: &str,
        capacity: usize,
        filter: Option<Box<Filter>>,
    ) -> Result<Subscriber, TooManySubscribers> {
        state.subscribers.retain(|s| s.strong_count() > 0);
        if state.subscribers.len() >= self.limits.subscribers {
            return Err(TooManySubscribers { limit: self.limits.subscribers });
        }
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            capacity,
            filter,
            buffer: Mutex::new(Queue { buffer: Buffer::new(capacity), closed: state.closed }),
            ready: Notify::new(),
        });
        state.subscribers.push(Arc::downgrade(&shared));
        Ok(Subscriber { shared, identity: self.identity.clone() })
    }

    /// Past events that `filter` wants, oldest first.
    pub fn history(&self, filter: impl Fn(&Event) -> bool) -> Vec<Arc<Event>> {
        lock(&self.state).history.iter().filter(|e| filter(e)).cloned().collect()
    }

    /// Events published so far; the number of the newest.
    pub fn last_seq(&self) -> u64 {
        lock(&self.state).next_seq - 1
    }

    /// Each reader, for `status`.
    pub fn subscribers(&self) -> Vec<pb::Subscriber> {
        let state = lock(&self.state);
        let report = |shared: Arc<Shared>| {
            let queue = lock(&shared.buffer);
            pb::Subscriber {
                name: shared.name.clone(),
                queued: queue.buffer.len() as u64,
                lost: queue.buffer.lost_total(),
                capacity: 2 * shared.capacity as u64,
            }
        };
        state.subscribers.iter().filter_map(Weak::upgrade).map(report).collect()
    }

    pub fn is_closed(&self) -> bool {
        lock(&self.state).closed
    }

    /// No more events: readers get what is left in their buffers, then the end.
    pub fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        for shared in state.subscribers.iter().filter_map(Weak::upgrade) {
            lock(&shared.buffer).closed = true;
            shared.ready.notify_one();
        }
    }
}

/// One reader. Dropping it ends the subscription.
pub struct Subscriber {
    shared: Arc<Shared>,
    identity: Identity,
}

impl Subscriber {
    /// Waits for events and appends at most `max` of them to `out`, in order of
    /// their numbers. False: closed, and nothing is left. Cancel-safe.
    pub async fn recv(&mut self, out: &mut Vec<Arc<Event>>, max: usize) -> bool {
        loop {
            // Before looking: nothing comes after it.
            let closed = lock(&self.shared.buffer).closed;
            if self.try_recv(out, max) > 0 {
                return true;
            }
            if closed {
                return false;
            }
            // notify_one() keeps a permit, so a publish since try_recv wakes this.
            self.shared.ready.notified().await;
        }
    }

    /// Whether the bus is closed; there may be more in the buffer.
    pub fn is_closed(&self) -> bool {
        lock(&self.shared.buffer).closed
    }

    /// What is there now; how many.
    pub fn try_recv(&mut self, out: &mut Vec<Arc<Event>>, max: usize) -> usize {
        let mut queue = lock(&self.shared.buffer);
        let mut taken = 0;
        while taken < max
            && let Some(item) = queue.buffer.pop()
        {
            out.push(match item {
                Item::Event(event) => event,
                Item::Lost(lost) => Arc::new(self.loss(lost)),
            });
            taken += 1;
        }
        taken
    }

    fn loss(&self, lost: Lost) -> Event {
        Event {
            seq: lost.last_seq,
            time_unix_ns: now(),
            sensor: self.identity.sensor.clone(),
            boot: self.identity.boot.clone(),
            body: Some(Body::Loss(pb::Loss {
                r#where: format!("subscriber:{}", self.shared.name),
                reason: "slow_consumer".to_owned(),
                count: lost.count,
                denials: lost.denials,
                first_seq: lost.first_seq,
                last_seq: lost.last_seq,
                ..Default::default()
            })),
        }
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Events waiting.
    pub fn queued(&self) -> usize {
        lock(&self.shared.buffer).buffer.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bus(limits: Limits) -> Arc<Bus> {
        Bus::new(Identity { sensor: "s".to_owned(), boot: "b".to_owned() }, limits)
    }

    fn telemetry() -> Body {
        Body::Exec(pb::Exec::default())
    }

    fn denial() -> Body {
        let decision = pb::Decision { verdict: pb::Verdict::Deny.into(), ..Default::default() };
        Body::Connection(pb::Connection { decision: Some(decision), ..Default::default() })
    }

    #[tokio::test]
    async fn a_reader_that_stops_slows_nobody_and_is_told_what_it_missed() {
        let bus = bus(Limits::default());
        let mut slow = bus.subscribe("slow", 10).unwrap();
        let mut fast = bus.subscribe("fast", 1000).unwrap();
        bus.publish(1, denial());
        for _ in 0..99 {
            bus.publish(1, telemetry());
        }
        bus.close();
        let mut got = Vec::new();
        while fast.recv(&mut got, 7).await {}
        assert_eq!(got.iter().map(|e| e.seq).collect::<Vec<_>>(), (1..=100).collect::<Vec<_>>());
        got.clear();
        while slow.recv(&mut got, 7).await {}
        assert_eq!(got.len(), 12, "the denial, the loss, the last ten");
        assert_eq!(got[0].seq, 1);
        let Some(Body::Loss(loss)) = &got[1].body else { panic!("{:?}", got[1]) };
        assert_eq!((loss.r#where.as_str(), loss.count, loss.last_seq), ("subscriber:slow", 89, 90));
        assert_eq!(got[1].seq, 90);
        assert_eq!(got[2].seq, 91);
    }

    #[tokio::test]
    async fn numbers_from_many_threads_have_no_gap_and_arrive_in_order() {
        const THREADS: u64 = 4;
        const EACH: u64 = 2000;
        let bus = bus(Limits::default());
        let mut reader = bus.subscribe("r", (THREADS * EACH) as usize).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| (0..EACH).map(|_| bus.publish(1, telemetry())).max());
            }
        });
        bus.close();
        let mut got = Vec::new();
        while reader.recv(&mut got, 512).await {}
        assert!(got.iter().map(|e| e.seq).eq(1..=THREADS * EACH));
        assert_eq!(bus.last_seq(), THREADS * EACH);
    }

    #[tokio::test]
    async fn a_waiting_reader_wakes_for_an_event() {
        let bus = bus(Limits::default());
        let mut reader = bus.subscribe("r", 4).unwrap();
        let waiting = tokio::spawn(async move {
            let mut got = Vec::new();
            assert!(reader.recv(&mut got, 1).await);
            got
        });
        tokio::task::yield_now().await;
        bus.publish(5, telemetry());
        assert_eq!(waiting.await.unwrap()[0].time_unix_ns, 5);
    }

    #[tokio::test]
    async fn history_and_what_follows_meet_without_gap_or_double() {
        let bus = bus(Limits { history: 3, subscribers: 2 });
        for _ in 0..5 {
            bus.publish(1, telemetry());
        }
        bus.publish(1, denial());
        let (past, mut reader) = bus.subscribe_with_history("r", 8, |_| true).unwrap();
        assert_eq!(past.iter().map(|e| e.seq).collect::<Vec<_>>(), [3, 4, 5, 6]);
        bus.publish(1, telemetry());
        let mut next = Vec::new();
        assert!(reader.recv(&mut next, 8).await);
        assert_eq!(next[0].seq, 7);
    }

    #[test]
    fn readers_are_limited_and_a_dropped_one_makes_room() {
        let bus = bus(Limits { history: 1, subscribers: 1 });
        let first = bus.subscribe("a", 1).unwrap();
        assert!(bus.subscribe("b", 1).is_err());
        drop(first);
        assert!(bus.subscribe("b", 1).is_ok());
    }
}
