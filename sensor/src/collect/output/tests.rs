//! An output's way through the log, with receivers that do not do as they should.

use super::*;
use crate::collect::Origin;
use crate::collect::filter::Filter;
use crate::collect::log::{Log, Settings};
use crate::event::{Body, pb};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Takes nothing while it is told to be down.
#[derive(Clone, Default)]
struct Fake {
    down: Arc<AtomicBool>,
    got: Arc<Mutex<Vec<Event>>>,
    /// Numbers that it refuses.
    refuses: Vec<u64>,
    /// Answers once that what it had since the cursor was saved is lost.
    loses: Arc<AtomicBool>,
    batch: usize,
}

impl Output for Fake {
    fn name(&self) -> &str {
        "fake"
    }

    fn kind(&self) -> &'static str {
        "fake"
    }

    fn batch(&self) -> usize {
        self.batch
    }

    fn deliver(&mut self, batch: &Batch<'_>) -> io::Result<Delivered> {
        assert!(batch.from <= batch.next);
        if self.down.load(Ordering::Relaxed) {
            return Err(io::Error::other("down"));
        }
        if self.loses.swap(false, Ordering::Relaxed) {
            return Ok(Delivered::Back(io::Error::other("it broke")));
        }
        let refused = |e: &Event| self.refuses.contains(&e.seq);
        self.got.lock().unwrap().extend(batch.events.iter().filter(|e| !refused(e)).cloned());
        let places = (0..batch.events.len()).filter(|n| refused(&batch.events[*n]));
        Ok(Delivered::Taken(places.map(|event| Refused { event, reason: REFUSED }).collect()))
    }

    fn settle(&mut self) -> io::Result<Settled> {
        Ok(Settled::All(Value::Null))
    }
}

impl Fake {
    fn start(&self, dir: &Path, log: &Log, filter: Filter) -> (Progress, std::thread::JoinHandle<()>) {
        let place = Place::load(dir, "fake", &log.source()).unwrap();
        spawn(log, Ready { place, filter, output: Box::new(self.clone()), certificate: None }).unwrap()
    }

    fn take(&self) -> Vec<Event> {
        std::mem::take(&mut *self.got.lock().unwrap())
    }
}

const ALL: Settings = Settings { keep_bytes: 1 << 30, keep: Duration::ZERO };

/// A hundred events, from number `from` on.
fn put(log: &mut Log, from: u64) {
    let origin = Arc::new(Origin { sensor: "s".to_owned(), boot: "b".to_owned() });
    let events: Vec<Event> = (from..from + 100).map(|seq| Event { seq, ..Default::default() }).collect();
    log.append(&origin, &events).unwrap();
    log.commit().unwrap();
}

fn until(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn loss(event: &Event) -> Option<&pb::Loss> {
    match &event.body {
        Some(Body::Loss(loss)) => Some(loss),
        _ => None,
    }
}

#[test]
fn an_output_that_was_down_too_long_is_told_what_it_missed_and_a_restart_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let keep = Settings { keep_bytes: 16 << 10, keep: Duration::ZERO };
    let fake = Fake { batch: 1, ..Fake::default() };
    fake.down.store(true, Ordering::Relaxed);
    let mut log = Log::open(dir.path(), keep).unwrap();
    put(&mut log, 1);
    let (progress, thread) = fake.start(dir.path(), &log, Filter::default());
    until(|| progress.state().retries > 0);
    let state = progress.state();
    assert_eq!((state.error.as_str(), state.lag), ("down", 100));
    for n in 1..80 {
        put(&mut log, n * 100 + 1);
    }
    assert!(log.source().oldest() > 200, "more is gone than it has in its hands");
    fake.down.store(false, Ordering::Relaxed);
    drop(log);
    thread.join().unwrap();
    let state = progress.state();
    assert!(state.lost > 0 && state.error.is_empty() && state.lag == 0, "{state:?}");
    assert_eq!(state.lost_by_reason.into_iter().collect::<Vec<_>>(), [("retention".to_owned(), state.lost)]);
    assert!(state.delivered_unix_ns > 0);
    let (losses, rest): (Vec<_>, Vec<_>) = fake.take().into_iter().partition(|e| loss(e).is_some());
    assert_eq!((losses.len(), rest.len() as u64 + state.lost), (1, 8000));
    assert!(rest.is_sorted_by(|a, b| a.seq < b.seq));

    let mut log = Log::open(dir.path(), keep).unwrap();
    put(&mut log, 8001);
    let (_, thread) = fake.start(dir.path(), &log, Filter::default());
    drop(log);
    thread.join().unwrap();
    let seqs: Vec<u64> = fake.take().iter().map(|e| e.seq).collect();
    assert!(seqs.into_iter().eq(8001..=8100), "only what is new");
}

#[test]
fn what_is_refused_is_told_to_the_receiver_and_holds_up_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake { batch: 150, refuses: vec![7, 8, 250], ..Fake::default() };
    let mut log = Log::open(dir.path(), ALL).unwrap();
    (0..4).for_each(|n| put(&mut log, n * 100 + 1));
    let (progress, thread) = fake.start(dir.path(), &log, Filter::default());
    drop(log);
    thread.join().unwrap();
    let state = progress.state();
    assert_eq!((state.lost, state.lost_by_reason["refused"], state.lag), (3, 3, 0));
    let got = fake.take();
    let losses: Vec<_> = got.iter().filter_map(loss).map(|l| (l.r#where.as_str(), l.count)).collect();
    assert_eq!(losses, [("output:fake", 2), ("output:fake", 1)]);
    let seqs: Vec<u64> = got.iter().filter(|e| e.seq > 0).map(|e| e.seq).collect();
    assert!(seqs.into_iter().eq((1..=400).filter(|n| ![7, 8, 250].contains(n))));
}

#[test]
fn a_receiver_that_refuses_even_the_losses_is_not_told_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake { batch: 1, refuses: (0..=100).collect(), ..Fake::default() };
    let mut log = Log::open(dir.path(), ALL).unwrap();
    put(&mut log, 1);
    let (progress, thread) = fake.start(dir.path(), &log, Filter::default());
    drop(log);
    thread.join().unwrap();
    assert_eq!((progress.state().lost, fake.take().len()), (101, 0));
}

#[test]
fn an_output_that_lost_its_connection_gets_again_what_was_not_safe() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake { batch: 1, ..Fake::default() };
    let mut log = Log::open(dir.path(), ALL).unwrap();
    put(&mut log, 1);
    let (progress, thread) = fake.start(dir.path(), &log, Filter::default());
    until(|| progress.state().delivered == 100);
    fake.loses.store(true, Ordering::Relaxed);
    put(&mut log, 101);
    until(|| progress.state().delivered >= 200 && progress.state().retries == 1);
    drop(log);
    thread.join().unwrap();
    let seqs: Vec<u64> = fake.take().iter().map(|e| e.seq).collect();
    // The cursor was saved before or after the first hundred.
    let again = seqs.clone().into_iter().eq((1..=100).chain(1..=200));
    assert!(again || seqs.into_iter().eq(1..=200));
}

#[test]
fn a_filter_lets_the_cursor_pass_over_what_it_leaves_out() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake { batch: 1000, ..Fake::default() };
    let filter = || {
        Filter::new(pb::EventFilter { sensors: vec!["another".to_owned()], ..Default::default() }).unwrap()
    };
    let mut log = Log::open(dir.path(), ALL).unwrap();
    put(&mut log, 1);
    let (progress, thread) = fake.start(dir.path(), &log, filter());
    drop(log);
    thread.join().unwrap();
    assert_eq!((fake.take().len(), progress.state().lag), (0, 0));
    let log = Log::open(dir.path(), ALL).unwrap();
    assert_eq!(Place::load(dir.path(), "fake", &log.source()).unwrap().next, 100);
}
