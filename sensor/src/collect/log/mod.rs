//! The collector's store: an append-only log of what it took, in segments.
//!
//! Every event has a number that grows over all sensors and is never given
//! twice; a [`Cursor`] is one. Readers go at their own pace and hold nobody up:
//! what is too old goes, whoever still wants it, and they are told how many
//! events that were.
//!
//! `log/NUMBER.log` are the segments, named by the number of their first event,
//! `NUMBER.idx` say what is where in full ones, `state.json` holds what follows
//! from everything before the last segment.

mod cursor;
mod reader;
mod record;
mod segment;
mod shared;
mod state;
#[cfg(test)]
mod tests;

pub use cursor::{Cursor, CursorError};
pub use reader::{Next, Reader};
pub use record::{Header, Item, Items, Record};
pub(super) use state::replace;

use super::fleet::{Fleet, Heard, SharedFleet};
use super::positions::Origin;
use super::store::{StoreError, load, lock, replay};
use crate::event::{Event, now, pb};
use nix::fcntl::Flock;
use reader::ALWAYS;
use segment::Segment;
use shared::Shared;
use state::State;
use std::borrow::Borrow;
use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Largest segment, but for its last record.
const SEGMENT: u64 = 16 << 20;
/// A log is at least so many segments: what is given up at a time is a small
/// part of it.
const PARTS: u64 = 8;
/// Fewest bytes that an event takes, for a segment that cannot be read.
const SMALLEST: u64 = 12;

#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The oldest segments go when there are more bytes than this.
    pub keep_bytes: u64,
    /// They also go when everything in them is older; zero: not by age.
    pub keep: Duration,
}

impl Settings {
    fn segment(&self) -> u64 {
        SEGMENT.min(self.keep_bytes / PARTS)
    }

    fn keep_ms(&self) -> Option<u64> {
        u64::try_from(self.keep.as_millis()).ok().filter(|ms| *ms > 0)
    }
}

pub struct Log {
    settings: Settings,
    shared: Arc<Shared>,
    file: File,
    /// The last segment, with what is not committed yet; and without.
    active: Segment,
    committed: Segment,
    state: State,
    fleet: SharedFleet,
    /// Positions before what is not committed, and what that says of the fleet.
    undo: Vec<(Arc<Origin>, u64)>,
    heard: Vec<Heard>,
    /// After a failure the file could not be cut back.
    uncut: bool,
    buffer: Vec<u8>,
    _lock: Flock<File>,
}

/// A way to read the log, for those who have no part in writing it.
#[derive(Clone)]
pub struct Source {
    shared: Arc<Shared>,
}

fn now_ms() -> u64 {
    u64::try_from(now() / 1_000_000).unwrap_or(0)
}

/// A file that is no segment is not ours to remove.
fn set_aside(path: &Path) -> io::Result<()> {
    tracing::error!(path = %path.display(), "no segment of this log: it is set aside as .bad");
    fs::rename(path, path.with_extension("bad"))
}

fn new_id() -> io::Result<u64> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// What the segments on the disk are.
#[derive(Default)]
struct Found {
    id: Option<u64>,
    segments: VecDeque<Segment>,
    /// The next segment begins here at least.
    next: u64,
}

/// Makes each segment known and cuts what a crash left at the end of the last.
fn find(dir: &Path) -> io::Result<Found> {
    let mut bases: Vec<u64> = Vec::new();
    for entry in fs::read_dir(dir)? {
        bases.extend(entry?.file_name().to_str().and_then(segment::base));
    }
    bases.sort_unstable();
    let mut found = Found::default();
    for (n, base) in bases.iter().copied().enumerate() {
        let (path, last) = (segment::path(dir, base), n + 1 == bases.len());
        let length = fs::metadata(&path)?.len();
        if !last
            && found.id.is_some()
            && let Some(segment) = Segment::load_index(dir, base).filter(|_| base >= found.next)
        {
            found.next = segment.end;
            found.segments.push_back(segment);
            continue;
        }
        if length < record::HEADER as u64 && last {
            fs::remove_file(&path)?;
            continue;
        }
        let scanned = Segment::scan(dir, base)?;
        let ours = |id: u64| found.id.is_none_or(|of| of == id);
        let Some((segment, header, damage)) = scanned.filter(|(s, h, _)| ours(h.log) && s.base >= found.next)
        else {
            set_aside(&path)?;
            found.next = found.next.max(base.saturating_add(length / SMALLEST));
            continue;
        };
        found.id = Some(header.log);
        found.next = segment.end;
        if damage.inside > 0 {
            tracing::error!(path = %path.display(), bytes = damage.inside, "a part of the log is damaged; readers are told what is missing");
        }
        if last && damage.tail > 0 {
            tracing::warn!(path = %path.display(), bytes = damage.tail, "what a crash left unfinished is cut off; its sensors send it again");
            let file = File::options().write(true).open(&path)?;
            file.set_len(segment.bytes)?;
            file.sync_all()?;
        } else if !last {
            let mut whole = segment.clone();
            // Damage at its end is no record of the next one.
            whole.bytes = length;
            whole.save_index(dir)?;
        }
        found.segments.push_back(segment);
    }
    Ok(found)
}

/// Brings `state` and `fleet` up to the end of the segments.
fn catch_up(
    dir: &Path,
    segments: &VecDeque<Segment>,
    state: &mut State,
    fleet: &mut Fleet,
) -> io::Result<()> {
    for segment in segments {
        if segment.end <= state.through {
            continue;
        }
        let bytes = fs::read(segment::path(dir, segment.base))?;
        for item in Items::new(&bytes, record::HEADER) {
            let Item::Record(record, _) = item else { continue };
            if record.head.offset < state.through {
                continue;
            }
            let (Some((sensor, boot)), Some(events)) = (record.origin(), record.events()) else { continue };
            let origin = Arc::new(Origin { sensor: sensor.to_owned(), boot: boot.to_owned() });
            if record.head.last_seq > state.positions.get(&origin) {
                state.positions.set(&origin, record.head.last_seq);
            }
            let at = i64::try_from(record.head.stored_unix_ms.saturating_mul(1_000_000)).unwrap_or(i64::MAX);
            fleet.hear(&Heard::of(&origin, &events, at));
            state.through = record.head.end();
        }
        state.through = state.through.max(segment.end);
    }
    Ok(())
}

impl Log {
    /// Of the collector whose directory this is; makes it (0700) if it is not
    /// there. How far boots are stored is taken over from NDJSON files that an
    /// earlier version left.
    pub fn open(dir: &Path, settings: Settings) -> Result<Log, StoreError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::Io { path, source }
        };
        let log = dir.join("log");
        DirBuilder::new().recursive(true).mode(0o700).create(&log).map_err(at(&log))?;
        let lock = lock(dir)?;
        let found = find(&log).map_err(at(&log))?;
        let (id, mut state, mut fleet) = match found.id {
            Some(id) => {
                let (state, fleet) = State::load(&log, id).map_err(at(&log))?.unwrap_or_default();
                (id, state, fleet)
            }
            None => {
                let mut state = State::default();
                load(&dir.join("positions.json"), &mut state.positions)?;
                let lines = dir.join("events.ndjson");
                if lines.exists() {
                    replay(&lines, 0, &mut state.positions)?;
                }
                (new_id().map_err(at(&log))?, state, Fleet::default())
            }
        };
        let mut segments = found.segments;
        catch_up(&log, &segments, &mut state, &mut fleet).map_err(at(&log))?;
        if found.id.is_none() {
            state.save(&log, id, &fleet).map_err(at(&log))?;
        }
        // No number is given twice, also where segments were taken away.
        let next = found.next.max(state.through);
        let last = segments.back().filter(|s| s.end == next);
        let (active, file) = match last {
            Some(last) => {
                let path = segment::path(&log, last.base);
                let file = File::options().read(true).write(true).open(&path).map_err(at(&path))?;
                (last.clone(), file)
            }
            None => {
                let header = Header { log: id, base: next, created_unix_ms: now_ms() };
                let file = Segment::create(&log, header).map_err(at(&log))?;
                segments.push_back(Segment::new(next));
                (Segment::new(next), file)
            }
        };
        let mut log = Log {
            settings,
            shared: Arc::new(Shared::new(id, log, segments)),
            file,
            committed: active.clone(),
            active,
            state,
            fleet: SharedFleet::new(fleet),
            undo: Vec::new(),
            heard: Vec::new(),
            uncut: false,
            buffer: Vec::new(),
            _lock: lock,
        };
        log.expire();
        Ok(log)
    }

    pub fn source(&self) -> Source {
        Source { shared: self.shared.clone() }
    }

    pub(super) fn fleet(&self) -> SharedFleet {
        self.fleet.clone()
    }

    /// The last event of a boot that is stored; 0: none.
    pub fn position(&self, origin: &Origin) -> u64 {
        self.state.positions.get(origin)
    }

    /// Writes the events that are not stored yet (in ascending order) and gives
    /// their number; they are the last ones of `events`. Stored, and seen by
    /// readers, only after [`Log::commit`]; on an error nothing since the last
    /// commit is.
    pub fn append<E: Borrow<Event>>(&mut self, origin: &Arc<Origin>, events: &[E]) -> io::Result<usize> {
        let written = self.try_append(origin, events);
        if written.is_err() {
            self.roll_back();
        }
        written
    }

    fn try_append<E: Borrow<Event>>(&mut self, origin: &Arc<Origin>, events: &[E]) -> io::Result<usize> {
        let stored = self.position(origin);
        let new = &events[events.partition_point(|e| e.borrow().seq <= stored)..];
        if new.is_empty() {
            return Ok(0);
        }
        if self.uncut {
            self.file.set_len(self.active.bytes)?;
            self.uncut = false;
        }
        let mut rest: Vec<&Event> = new.iter().map(Borrow::borrow).collect();
        while !rest.is_empty() {
            if !self.active.is_empty() && self.active.bytes >= self.settings.segment() {
                self.begin_next()?;
            }
            self.buffer.clear();
            let names = (origin.sensor.as_str(), origin.boot.as_str());
            let (head, taken) = record::write(&mut self.buffer, names, &rest, self.active.end, now_ms());
            let at = self.active.bytes;
            self.file.write_all_at(&self.buffer, at)?;
            self.active.add(&head, at, self.buffer.len() as u64);
            self.undo.push((origin.clone(), self.position(origin)));
            self.state.positions.set(origin, head.last_seq);
            self.heard.push(Heard::of(origin, &rest[..taken], now()));
            rest.drain(..taken);
        }
        Ok(new.len())
    }

    /// What was appended survives a crash from now on.
    pub fn commit(&mut self) -> io::Result<()> {
        if self.undo.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.file.sync_data() {
            self.roll_back();
            return Err(error);
        }
        self.undo.clear();
        self.state.through = self.active.end;
        self.committed.clone_from(&self.active);
        let heard = std::mem::take(&mut self.heard);
        self.fleet.with(|fleet| heard.iter().for_each(|h| fleet.hear(h)));
        self.shared.commit(&self.committed);
        Ok(())
    }

    /// A failed fdatasync may have dropped any of the pages (the kernel marks
    /// them clean): nothing since the last commit counts.
    fn roll_back(&mut self) {
        for (origin, seq) in self.undo.drain(..).rev() {
            self.state.positions.set(&origin, seq);
        }
        self.heard.clear();
        self.active.clone_from(&self.committed);
        // Records beyond the end would look like ones that go on from it.
        if let Err(error) = self.file.set_len(self.active.bytes) {
            tracing::error!(%error, "the log cannot be cut back; nothing is stored until it can");
            self.uncut = true;
        }
    }

    /// Ends the segment; the next record begins another.
    fn begin_next(&mut self) -> io::Result<()> {
        self.commit()?;
        self.committed.save_index(&self.shared.dir)?;
        let (dir, id) = (&self.shared.dir, self.shared.id);
        // Before segments go: what follows from them stays.
        self.fleet.with(|fleet| self.state.save(dir, id, fleet))?;
        let header = Header { log: id, base: self.committed.end, created_unix_ms: now_ms() };
        self.file = Segment::create(dir, header)?;
        self.active = Segment::new(header.base);
        self.committed = self.active.clone();
        self.shared.commit(&self.committed);
        self.expire();
        Ok(())
    }

    /// To be called now and then: lets go what is too old, though nothing comes.
    pub fn tidy(&mut self) {
        if let Some(keep) = self.settings.keep_ms()
            && self.undo.is_empty()
            && !self.active.is_empty()
            && self.active.first_unix_ms.saturating_add(keep / PARTS) < now_ms()
            && let Err(error) = self.begin_next()
        {
            tracing::warn!(%error, "no new segment of the log can be begun");
        }
        self.expire();
    }

    fn expire(&mut self) {
        let (most, keep, now) = (self.settings.keep_bytes, self.settings.keep_ms(), now_ms());
        let old = |s: &Segment| keep.is_some_and(|keep| s.last_unix_ms.saturating_add(keep) < now);
        for base in self.shared.expire(|s, bytes| bytes > most || old(s)) {
            if let Err(error) = Segment::remove(&self.shared.dir, base) {
                tracing::warn!(base, %error, "an old segment of the log stays on the disk");
            }
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl Source {
    /// From event `offset` on.
    pub fn reader(&self, offset: u64) -> Reader {
        Reader::new(self.shared.clone(), offset, ALWAYS)
    }

    /// Passes over parts of the log without events from `times.0` on and before
    /// `times.1`.
    pub fn reader_of(&self, offset: u64, times: (i64, i64)) -> Reader {
        Reader::new(self.shared.clone(), offset, times)
    }

    pub fn cursor(&self, offset: u64) -> Cursor {
        Cursor { log: self.shared.id, offset }
    }

    /// Numbers of the oldest event that is kept, and of the next to be stored.
    pub fn oldest(&self) -> u64 {
        self.shared.oldest()
    }

    pub fn end(&self) -> u64 {
        self.shared.end()
    }

    /// Tells when there is more.
    pub fn watch(&self) -> tokio::sync::watch::Receiver<u64> {
        self.shared.watch()
    }

    pub fn describe(&self) -> pb::LogState {
        self.shared.describe()
    }

    pub fn dir(&self) -> PathBuf {
        self.shared.dir.clone()
    }

    /// Numbers where parts of the log begin and end, the newest first.
    pub(super) fn parts_newest_first(&self, times: (i64, i64)) -> Vec<(u64, u64)> {
        self.shared.blocks_newest_first(times)
    }
}
