//! Where events go on to from the log. Each output goes at its own pace behind a
//! cursor of its own on the disk, and tries again until it takes them.

use super::log::{Cursor, Log, Next, Reader, Source, replace};
use crate::event::{Body, Event, now, pb};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// First and longest pause after a failure.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// The cursor is saved when it is this old: so much is delivered again, or
/// compared with what was, after a crash.
const SAVE: Duration = Duration::from_secs(1);
/// How long an output that fails is tried when the collector ends.
const END: Duration = Duration::from_secs(2);
/// How long it waits for events before it looks whether to save the cursor.
const IDLE: Duration = Duration::from_millis(500);

/// What became of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    All,
    /// None of them; first the cursor before them must be safe.
    SaveFirst,
}

pub trait Output: Send {
    /// In file names, metrics and losses.
    fn name(&self) -> &'static str;

    /// All of the events, or an error; then the same come again.
    fn deliver(&mut self, events: &[Event]) -> io::Result<Delivered>;

    /// What was delivered must be safe when this returns. The answer is kept
    /// with the cursor, for the next start.
    fn settle(&mut self) -> io::Result<Value>;
}

/// How an output does.
#[derive(Clone)]
pub struct Progress {
    state: Arc<Mutex<pb::OutputState>>,
}

impl Progress {
    pub fn state(&self) -> pb::OutputState {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn update(&self, change: impl FnOnce(&mut pb::OutputState)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    log: String,
    next: u64,
    output: Value,
}

/// What an earlier run left of an output's way.
pub struct Place {
    path: PathBuf,
    /// Number of the next event.
    pub(super) next: u64,
    /// As [`Output::settle`] answered; `None`: it begins anew.
    pub output: Option<Value>,
}

impl Place {
    /// Of the output called `name`, in the collector's directory.
    pub fn load(dir: &Path, name: &str, source: &Source) -> io::Result<Place> {
        let dir = dir.join("outputs");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        let path = dir.join(format!("{name}.json"));
        let log = format!("{:016x}", source.cursor(0).log);
        let saved = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice::<Saved>(&bytes).ok().filter(|s| s.log == log),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Ok(match saved {
            Some(saved) => Place { path, next: saved.next.min(source.end()), output: Some(saved.output) },
            None => Place { path, next: source.oldest(), output: None },
        })
    }

    pub(super) fn save(&self, cursor: Cursor, output: Value) -> io::Result<()> {
        let saved = Saved { log: format!("{:016x}", cursor.log), next: cursor.offset, output };
        let dir = self.path.parent().unwrap_or(Path::new("."));
        replace(dir, &self.path, &serde_json::to_vec(&saved)?)
    }
}

/// Delivers from `place` on until the log is closed and everything is delivered,
/// or the output fails at the end.
pub fn spawn(log: &Log, place: Place, output: Box<dyn Output>) -> io::Result<(Progress, JoinHandle<()>)> {
    let source = log.source();
    let state = pb::OutputState { name: output.name().to_owned(), ..Default::default() };
    let progress = Progress { state: Arc::new(Mutex::new(state)) };
    let name = format!("out-{}", output.name());
    let reader = source.reader(place.next);
    let shown = progress.clone();
    let way = Way {
        source,
        reader,
        place,
        output,
        progress: shown,
        unsaved: false,
        saved: Instant::now(),
        ends: None,
    };
    let thread = std::thread::Builder::new().name(name).spawn(move || way.run())?;
    Ok((progress, thread))
}

struct Way {
    source: Source,
    reader: Reader,
    place: Place,
    output: Box<dyn Output>,
    progress: Progress,
    unsaved: bool,
    saved: Instant,
    /// When the end was first seen.
    ends: Option<Instant>,
}

/// The collector ends before the output takes what is left.
struct GivenUp;

impl Way {
    fn run(mut self) {
        if self.go().is_err() {
            let waiting = self.reader.remaining();
            tracing::warn!(
                output = self.output.name(),
                waiting,
                "an output has not taken everything; it goes on with the next start"
            );
        }
    }

    fn go(&mut self) -> Result<(), GivenUp> {
        loop {
            let before = self.reader.offset();
            let next = match self.reader.read() {
                Ok(next) => next,
                Err(error) => {
                    self.pause(&error, BACKOFF.1)?;
                    continue;
                }
            };
            match next {
                Next::Events(events, _) => self.deliver(&events, before)?,
                Next::Missed { count, reason } => {
                    tracing::error!(
                        output = self.output.name(),
                        count,
                        reason,
                        "events are missing in an output"
                    );
                    self.progress.update(|s| s.lost += count);
                    self.deliver(&[missing(self.output.name(), count, reason)], before)?;
                }
                Next::End => {
                    let closed = self.reader.wait(Duration::ZERO);
                    if self.unsaved && (closed || self.saved.elapsed() >= SAVE) {
                        self.save(self.reader.offset())?;
                    }
                    if closed && self.reader.remaining() == 0 {
                        return Ok(());
                    }
                    self.reader.wait(IDLE);
                }
            }
            let lag = self.reader.remaining();
            self.progress.update(|s| s.lag = lag);
        }
    }

    /// `before`: where the cursor is as long as these are not delivered.
    fn deliver(&mut self, events: &[Event], before: u64) -> Result<(), GivenUp> {
        let mut backoff = BACKOFF.0;
        loop {
            match self.output.deliver(events) {
                Ok(Delivered::All) => break,
                Ok(Delivered::SaveFirst) => self.save(before)?,
                Err(error) => {
                    self.pause(&error, backoff)?;
                    backoff = (backoff * 2).min(BACKOFF.1);
                }
            }
        }
        self.unsaved = true;
        self.progress.update(|s| {
            s.delivered += events.len() as u64;
            s.error.clear();
        });
        if self.saved.elapsed() >= SAVE {
            self.save(self.reader.offset())?;
        }
        Ok(())
    }

    fn save(&mut self, next: u64) -> Result<(), GivenUp> {
        let mut backoff = BACKOFF.0;
        loop {
            let cursor = self.source.cursor(next);
            match self.output.settle().and_then(|state| self.place.save(cursor, state)) {
                Ok(()) => break,
                Err(error) => {
                    self.pause(&error, backoff)?;
                    backoff = (backoff * 2).min(BACKOFF.1);
                }
            }
        }
        (self.unsaved, self.saved) = (false, Instant::now());
        Ok(())
    }

    fn pause(&mut self, error: &io::Error, time: Duration) -> Result<(), GivenUp> {
        let lag = self.reader.remaining();
        let mut first = false;
        self.progress.update(|s| {
            first = s.error.is_empty();
            s.error = error.to_string();
            s.retries += 1;
            s.lag = lag;
        });
        if first {
            tracing::error!(output = self.output.name(), %error, "an output takes nothing; it is tried again");
        }
        if self.reader.wait(Duration::ZERO) && self.ends.get_or_insert_with(Instant::now).elapsed() > END {
            return Err(GivenUp);
        }
        std::thread::sleep(time);
        Ok(())
    }
}

/// In the place of events that were gone before the output could take them.
fn missing(name: &str, count: u64, reason: &str) -> Event {
    let (r#where, reason) = (format!("output:{name}"), reason.to_owned());
    let loss = pb::Loss { r#where, reason, count, ..Default::default() };
    Event { time_unix_ns: now(), body: Some(Body::Loss(loss)), ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collect::Origin;
    use crate::collect::log::Settings;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Takes nothing while it is told to be down.
    struct Fake {
        down: Arc<AtomicBool>,
        got: Arc<Mutex<Vec<Event>>>,
    }

    impl Output for Fake {
        fn name(&self) -> &'static str {
            "fake"
        }

        fn deliver(&mut self, events: &[Event]) -> io::Result<Delivered> {
            if self.down.load(Ordering::Relaxed) {
                return Err(io::Error::other("down"));
            }
            self.got.lock().unwrap().extend_from_slice(events);
            Ok(Delivered::All)
        }

        fn settle(&mut self) -> io::Result<Value> {
            Ok(Value::Null)
        }
    }

    #[test]
    fn an_output_that_was_down_too_long_is_told_what_it_missed_and_a_restart_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let keep = Settings { keep_bytes: 16 << 10, keep: Duration::ZERO };
        let origin = Arc::new(Origin { sensor: "s".to_owned(), boot: "b".to_owned() });
        let (down, got) = (Arc::new(AtomicBool::new(true)), Arc::new(Mutex::new(Vec::new())));
        let mut log = Log::open(dir.path(), keep).unwrap();
        let start = |log: &Log| {
            let place = Place::load(dir.path(), "fake", &log.source()).unwrap();
            spawn(log, place, Box::new(Fake { down: down.clone(), got: got.clone() })).unwrap()
        };
        let put = |log: &mut Log, from: u64| {
            let events: Vec<Event> =
                (from..from + 100).map(|seq| Event { seq, ..Default::default() }).collect();
            log.append(&origin, &events).unwrap();
            log.commit().unwrap();
        };
        put(&mut log, 1);
        let (progress, thread) = start(&log);
        let deadline = Instant::now() + Duration::from_secs(60);
        while progress.state().retries == 0 {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        assert_eq!(progress.state().error, "down");
        for n in 1..80 {
            put(&mut log, n * 100 + 1);
        }
        assert!(log.source().oldest() > 200, "more is gone than it has in its hands");
        down.store(false, Ordering::Relaxed);
        drop(log);
        thread.join().unwrap();
        let state = progress.state();
        assert!(state.lost > 0 && state.error.is_empty() && state.lag == 0, "{state:?}");
        let is_loss = |e: &Event| matches!(&e.body, Some(Body::Loss(l)) if l.count > 0);
        let events = std::mem::take(&mut *got.lock().unwrap());
        let (losses, rest): (Vec<_>, Vec<_>) = events.into_iter().partition(is_loss);
        assert_eq!((losses.len(), rest.len() as u64 + state.lost), (1, 8000));
        assert!(rest.is_sorted_by(|a, b| a.seq < b.seq));

        let mut log = Log::open(dir.path(), keep).unwrap();
        put(&mut log, 8001);
        let (_, thread) = start(&log);
        drop(log);
        thread.join().unwrap();
        let seqs: Vec<u64> = got.lock().unwrap().iter().map(|e| e.seq).collect();
        assert!(seqs.into_iter().eq(8001..=8100), "only what is new");
    }
}
