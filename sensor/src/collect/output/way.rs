//! The thread of an output: reads the log, hands on what passes the filter, and
//! keeps the cursor.

use super::{Batch, Delivered, Later, Output, Place, Progress, Ready, Refused, Settled};
use crate::collect::filter::Filter;
use crate::collect::log::{Log, Next, Reader, Source};
use crate::event::{Body, Event, is_denial, json, now, pb};
use prost::Message as _;
use std::collections::BTreeMap;
use std::io;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// First and longest pause after a failure.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// Longest pause that a receiver may ask for.
const LATER: Duration = Duration::from_secs(300);
/// The cursor is saved when it is this old: so much is delivered again, or
/// compared with what was, after a crash.
const SAVE: Duration = Duration::from_secs(1);
/// How long an output that fails is tried when the collector ends.
const END: Duration = Duration::from_secs(2);
/// How long it waits for events before it looks whether to save the cursor.
const IDLE: Duration = Duration::from_millis(500);
/// Bytes of events, as stored, that are handed on at once, and one record more.
const BYTES: usize = 1 << 20;
/// Records that are looked at before the lag is told and the cursor is saved,
/// also where nothing passes the filter.
const RECORDS: usize = 256;

/// Delivers from its place on until the log is closed and everything is
/// delivered, or the output fails at the end.
pub(in crate::collect) fn spawn(log: &Log, ready: Ready) -> io::Result<(Progress, JoinHandle<()>)> {
    let Ready { place, filter, output, certificate } = ready;
    let source = log.source();
    let progress = Progress::new(output.name(), output.kind(), certificate);
    let name = format!("out-{}", output.name());
    let (reader, at) = (source.reader(place.next), place.next);
    progress.update(|s| s.lag = source.end().saturating_sub(at));
    let shown = progress.clone();
    let way = Way {
        source,
        reader,
        at,
        place,
        filter,
        output,
        progress: shown,
        unsaved: false,
        saved: Instant::now(),
        ends: None,
        backed: 0,
    };
    let thread = std::thread::Builder::new().name(name).spawn(move || way.run())?;
    Ok((progress, thread))
}

struct Way {
    source: Source,
    reader: Reader,
    /// Up to here everything is delivered or left out.
    at: u64,
    place: Place,
    filter: Filter,
    output: Box<dyn Output>,
    progress: Progress,
    unsaved: bool,
    saved: Instant,
    /// When the end was first seen.
    ends: Option<Instant>,
    /// How often it went back since the cursor last moved.
    backed: u32,
}

/// The collector ends before the output takes what is left.
struct GivenUp;

/// Where a step leads.
#[derive(PartialEq, Eq)]
enum Step {
    On,
    /// The reader stands at the saved cursor again.
    Back,
}

/// What was read at once.
struct Read {
    events: Vec<Event>,
    next: u64,
    then: Option<Next>,
}

impl Way {
    fn run(mut self) {
        if self.go().is_err() {
            let waiting = self.lag();
            tracing::warn!(
                output = self.output.name(),
                waiting,
                "an output has not taken everything; it goes on with the next start"
            );
        }
    }

    fn go(&mut self) -> Result<(), GivenUp> {
        loop {
            let from = self.reader.offset();
            let read = self.read()?;
            if !read.events.is_empty() {
                let (log, next) = (self.source.cursor(0).log, read.next);
                if self.deliver(&Batch { log, from, next, events: &read.events })? == Step::Back {
                    continue;
                }
            } else if read.next > from {
                self.unsaved = true;
            }
            self.is_at(read.next);
            match read.then {
                Some(Next::Missed { count, reason }) => self.missed(read.next, count, reason)?,
                Some(Next::End) if self.at_end()? => {
                    self.progress.update(|s| s.lag = 0);
                    return Ok(());
                }
                _ if self.unsaved && self.saved.elapsed() >= SAVE => {
                    self.save(self.reader.offset(), false)?;
                }
                _ => (),
            }
            self.is_at(self.reader.offset());
        }
    }

    fn is_at(&mut self, at: u64) {
        self.at = at;
        let lag = self.lag();
        self.progress.update(|s| s.lag = lag);
    }

    fn lag(&self) -> u64 {
        self.source.end().saturating_sub(self.at)
    }

    /// True: the log is closed and everything is delivered.
    fn at_end(&mut self) -> Result<bool, GivenUp> {
        let closed = self.reader.wait(Duration::ZERO);
        let last = closed && self.reader.remaining() == 0;
        if self.unsaved && (last || self.saved.elapsed() >= SAVE) {
            // Whoever goes back is not at the end any more.
            if self.save(self.reader.offset(), last)? == Step::Back {
                return Ok(false);
            }
        }
        if last {
            return Ok(true);
        }
        self.reader.wait(IDLE);
        Ok(false)
    }

    /// What the output likes to get at once, as far as it is there.
    fn read(&mut self) -> Result<Read, GivenUp> {
        let mut read = Read { events: Vec::new(), next: self.reader.offset(), then: None };
        let (mut bytes, mut records) = (0, 0);
        while read.events.len() < self.output.batch() && bytes < BYTES && records < RECORDS {
            match self.reader.read() {
                Ok(Next::Events(events, next)) => {
                    read.next = next;
                    records += 1;
                    let passing = events.into_iter().filter(|e| self.filter.passes(e));
                    read.events.extend(passing.inspect(|e| bytes += e.encoded_len()));
                }
                Ok(other) => {
                    read.then = Some(other);
                    break;
                }
                // What was read so far is delivered first; then it is tried again.
                Err(_) if !read.events.is_empty() => break,
                Err(error) => self.pause(&error, BACKOFF.1)?,
            }
        }
        Ok(read)
    }

    fn missed(&mut self, from: u64, count: u64, reason: &str) -> Result<(), GivenUp> {
        tracing::error!(output = self.output.name(), count, reason, "events are missing in an output");
        let loss = self.loss(reason, pb::Loss { count, ..Default::default() });
        let (log, next) = (self.source.cursor(0).log, self.reader.offset());
        // Who goes back comes to it again.
        if self.deliver(&Batch { log, from, next, events: &[loss] })? == Step::On {
            self.progress.lost(count, reason);
        }
        Ok(())
    }

    /// Until it is taken, and what is refused of it is told.
    fn deliver(&mut self, batch: &Batch<'_>) -> Result<Step, GivenUp> {
        let mut backoff = BACKOFF.0;
        let refused = loop {
            match self.output.deliver(batch) {
                Ok(Delivered::Taken(refused)) => break refused,
                Ok(Delivered::SaveFirst) => {
                    if self.save(batch.from, false)? == Step::Back {
                        return Ok(Step::Back);
                    }
                }
                Ok(Delivered::Back(error)) => return self.back(&error),
                Ok(Delivered::Partly(error)) => {
                    self.pause(&error, BACKOFF.0)?;
                    backoff = BACKOFF.0;
                }
                Err(error) => {
                    self.pause(&error, backoff)?;
                    backoff = (backoff * 2).min(BACKOFF.1);
                }
            }
        };
        self.unsaved = true;
        let taken = (batch.events.len() - refused.len()) as u64;
        // Else it may only seem so, as before it went back.
        let whole = self.backed == 0;
        self.progress.update(|s| {
            s.delivered += taken;
            if whole {
                s.error.clear();
            }
            if taken > 0 {
                s.delivered_unix_ns = now();
            }
        });
        self.refused(batch, &refused)
    }

    /// Tells the receiver what it refused. What it refuses of that is counted.
    fn refused(&mut self, batch: &Batch<'_>, refused: &[Refused]) -> Result<Step, GivenUp> {
        let mut losses: BTreeMap<&str, (pb::Loss, BTreeMap<&str, u64>)> = BTreeMap::new();
        for refused in refused {
            let (loss, types) = losses.entry(refused.reason).or_default();
            loss.count += 1;
            let Some(body) = batch.events.get(refused.event).and_then(|e| e.body.as_ref()) else { continue };
            loss.denials += u64::from(is_denial(body));
            *types.entry(json::type_name(body)).or_default() += 1;
        }
        let losses = losses.into_iter().map(|(reason, (loss, types))| {
            let of = |(name, count): (&str, u64)| pb::TypeCount { r#type: name.to_owned(), count };
            (reason, pb::Loss { types: types.into_iter().map(of).collect(), ..loss })
        });
        let losses: Vec<(&str, pb::Loss)> = losses.collect();
        // A loss that is refused is not told again: that would have no end.
        if !losses.is_empty() && !batch.events.iter().all(|e| self.is_own_loss(e)) {
            let told: Vec<Event> = losses.iter().map(|(reason, l)| self.loss(reason, l.clone())).collect();
            let told = Batch { log: batch.log, from: batch.next, next: batch.next, events: &told };
            if self.deliver(&told)? == Step::Back {
                return Ok(Step::Back);
            }
        }
        for (reason, loss) in losses {
            tracing::error!(
                output = self.output.name(),
                count = loss.count,
                reason,
                "the receiver will never take these events: they are lost to it"
            );
            self.progress.lost(loss.count, reason);
        }
        Ok(Step::On)
    }

    fn r#where(&self) -> String {
        format!("output:{}", self.output.name())
    }

    /// In the place of events that the output does not get.
    fn loss(&self, reason: &str, loss: pb::Loss) -> Event {
        let loss = pb::Loss { r#where: self.r#where(), reason: reason.to_owned(), ..loss };
        Event { time_unix_ns: now(), body: Some(Body::Loss(loss)), ..Default::default() }
    }

    fn is_own_loss(&self, event: &Event) -> bool {
        event.seq == 0 && matches!(&event.body, Some(Body::Loss(l)) if l.r#where == self.r#where())
    }

    /// `next`: up to where everything was delivered.
    fn save(&mut self, next: u64, last: bool) -> Result<Step, GivenUp> {
        let mut backoff = BACKOFF.0;
        loop {
            let settled = if last { self.output.finish() } else { self.output.settle() };
            let saved = match settled {
                Ok(Settled::All(state)) => self.keep(next, next, state),
                Ok(Settled::Upto(safe, state)) => self.keep(safe.min(next), next, state),
                Ok(Settled::Back(error)) => return self.back(&error),
                Err(error) => Err(error),
            };
            match saved {
                Ok(()) => return Ok(Step::On),
                Err(error) => {
                    self.pause(&error, backoff)?;
                    backoff = (backoff * 2).min(BACKOFF.1);
                }
            }
        }
    }

    fn keep(&mut self, safe: u64, next: u64, state: serde_json::Value) -> io::Result<()> {
        let before = self.place.next;
        // What is on its way moves no cursor.
        if safe != before || safe == next {
            self.place.save(self.source.cursor(safe), state)?;
        }
        if self.place.next > before && self.backed > 0 {
            self.backed = 0;
            self.progress.update(|s| s.error.clear());
        }
        (self.unsaved, self.saved) = (safe < next, Instant::now());
        Ok(())
    }

    fn back(&mut self, error: &io::Error) -> Result<Step, GivenUp> {
        let backoff = (BACKOFF.0 * 2u32.pow(self.backed.min(10))).min(BACKOFF.1);
        self.backed += 1;
        self.reader = self.source.reader(self.place.next);
        (self.at, self.unsaved) = (self.place.next, false);
        self.pause(error, backoff)?;
        Ok(Step::Back)
    }

    fn pause(&mut self, error: &io::Error, time: Duration) -> Result<(), GivenUp> {
        let lag = self.lag();
        let first = self.progress.update(|s| {
            let first = s.error.is_empty();
            s.error = error.to_string();
            s.retries += 1;
            s.lag = lag;
            first
        });
        if first {
            tracing::error!(output = self.output.name(), %error, "an output takes nothing; it is tried again");
        }
        let asked = error.get_ref().and_then(|e| e.downcast_ref::<Later>()).map_or(time, |l| l.after);
        let until = Instant::now() + time.max(asked.min(LATER));
        loop {
            let closed = self.reader.wait(Duration::ZERO);
            if closed && self.ends.get_or_insert_with(Instant::now).elapsed() > END {
                return Err(GivenUp);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(IDLE));
        }
    }
}
