//! What the collector has not acknowledged, on this host's disk: sealed batches
//! in segment files, oldest first.
//!
//! A batch is appended before it is sent and gone once its segment is
//! acknowledged. `write` makes it outlive the agent; `fdatasync`, once a second
//! while something waits, makes it outlive the host. Beyond its limit the spool
//! gives up telemetry of the oldest segments, then whole segments; what it gives
//! up, and what damage cost, stands as a `Loss` in the place of the events.

mod record;
mod segment;
mod thin;

pub use record::{HeaderError, Item, Owner, Reader, read_header};

use super::batch::Sealed;
use crate::event::ledger::Unsafe;
use crate::lock::exclusively;
use nix::fcntl::Flock;
use record::Meta;
use segment::{Damaged, Segment};
use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Batches that the disk did not take and that wait in memory, at most.
const WAITING: usize = 16;
/// An acknowledged segment that is being written is given back beyond this.
const KEPT: u64 = 256 << 10;

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Of all segments together.
    pub bytes: u64,
}

impl Limits {
    /// Of one segment: what is given up at one time.
    fn segment(self) -> u64 {
        (self.bytes / 16).clamp(16 << 10, 4 << 20)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    #[error("{}: another agent uses this spool", .0.display())]
    InUse(PathBuf),
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> SpoolError {
    let path = path.to_owned();
    move |source| SpoolError::Io { path, source }
}

/// What was found damaged, or had to go. For the log; the events are told in
/// their place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub files: Vec<String>,
    /// Files of which nothing could be read, not even whose they are.
    pub unreadable: u64,
}

/// What became of a batch that was appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    Stored,
    /// It, or one before it, is in memory only: the disk did not take it.
    Waiting,
}

/// Sums since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Given {
    pub evicted: u64,
    pub damaged: u64,
}

pub struct Spool {
    dir: PathBuf,
    limits: Limits,
    owner: Arc<Owner>,
    segments: VecDeque<Segment>,
    /// Into the last of them.
    writing: Option<File>,
    unsynced: bool,
    /// The segment and the offset that the next batch is read from.
    cursor: (u64, u64),
    reading: Option<(u64, File)>,
    /// Last number that was read.
    given_seq: u64,
    waiting: VecDeque<Sealed>,
    /// Last number that was given from there and is not acknowledged: no disk has it.
    in_flight: u64,
    next_number: u64,
    given: Given,
    /// Why the disk does not take batches; empty: it does.
    trouble: String,
    _lock: Flock<File>,
}

impl Spool {
    /// Opens or makes `dir`. What runs of the agent before left there comes
    /// first. Damage is mended: whole batches stay, the rest is told.
    pub fn open(dir: &Path, limits: Limits, owner: Owner) -> Result<(Spool, Report), SpoolError> {
        use std::os::unix::fs::DirBuilderExt as _;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io_error(dir))?;
        let path = dir.join("lock");
        let file = File::create(&path).map_err(io_error(&path))?;
        let lock = exclusively(file).map_err(|errno| match errno {
            nix::Error::EWOULDBLOCK => SpoolError::InUse(dir.to_owned()),
            errno => SpoolError::Io { path, source: errno.into() },
        })?;
        let mut numbers = Vec::new();
        for entry in fs::read_dir(dir).map_err(io_error(dir))? {
            let name = entry.map_err(io_error(dir))?.file_name();
            let Some(name) = name.to_str() else { continue };
            if name.ends_with(".new") {
                // Not in force yet when the agent ended.
                let _ = fs::remove_file(dir.join(name));
            } else if let Some(number) = segment::number(name) {
                numbers.push(number);
            }
        }
        numbers.sort_unstable();
        let mut report = Report::default();
        let mut given = Given::default();
        let mut segments: VecDeque<Segment> = VecDeque::new();
        for (at, number) in numbers.iter().enumerate() {
            let (before, after) = (segments.back(), numbers.get(at + 1).copied());
            match segment::open(dir, *number, before, after)
                .map_err(io_error(&segment::path(dir, *number)))?
            {
                Ok(segment) => segments.push_back(segment),
                Err(Damaged { segment, lost, unreadable, why }) => {
                    report.files.push(format!("{}: {why}", segment::name(*number)));
                    given.damaged += lost;
                    report.unreadable += u64::from(unreadable);
                    segments.extend(segment);
                }
            }
        }
        let next_number = numbers.last().map_or(1, |n| n + 1);
        let cursor = (segments.front().map_or(next_number, |s| s.number), 0);
        let spool = Spool {
            dir: dir.to_owned(),
            limits,
            owner: Arc::new(owner),
            segments,
            writing: None,
            unsynced: false,
            cursor,
            reading: None,
            given_seq: 0,
            waiting: VecDeque::new(),
            in_flight: 0,
            next_number,
            given,
            trouble: String::new(),
            _lock: lock,
        };
        Ok((spool, report))
    }

    /// Takes a batch of this run. An error: neither the disk nor memory has
    /// room; it was not taken.
    pub fn append(&mut self, batch: Sealed) -> Result<Appended, Sealed> {
        let batch = match self.flush().and_then(|()| self.write(&batch)) {
            Ok(()) => {
                self.trouble.clear();
                return Ok(if self.in_flight == 0 { Appended::Stored } else { Appended::Waiting });
            }
            Err(error) => {
                if self.trouble.is_empty() {
                    tracing::error!(dir = %self.dir.display(), %error, "the spool cannot be written");
                }
                self.trouble = error.to_string();
                batch
            }
        };
        if self.waiting.len() >= WAITING {
            return Err(batch);
        }
        self.waiting.push_back(batch);
        Ok(Appended::Waiting)
    }

    /// What went with an earlier run is told in its stream, behind what is left
    /// of it.
    pub fn append_unsafe(&mut self, left: &Unsafe) -> io::Result<()> {
        let owner = Owner { sensor: left.identity.sensor.clone(), boot: left.identity.boot.clone() };
        let current = std::mem::replace(&mut self.owner, Arc::new(owner));
        let written = thin::seal([left.told()])
            .iter()
            .try_for_each(|batch| self.begin().and_then(|()| self.write(batch)));
        self.owner = current;
        // What follows is of this run.
        let synced = self.writing.take().map_or(Ok(()), |file| file.sync_data());
        written.and(synced)
    }

    /// What waits in memory goes to the disk, in order.
    fn flush(&mut self) -> io::Result<()> {
        while let Some(batch) = self.waiting.front().cloned() {
            self.write(&batch)?;
            self.waiting.pop_front();
        }
        Ok(())
    }

    fn write(&mut self, batch: &Sealed) -> io::Result<()> {
        let bytes = record::record(batch, Meta { sealed_unix_ms: segment::now_ms(), thinned: false });
        self.make_room(bytes.len() as u64);
        if self.try_write(batch, &bytes).is_ok() {
            return Ok(());
        }
        // A full disk: others' files or ours.
        self.evict();
        self.try_write(batch, &bytes)
    }

    fn try_write(&mut self, batch: &Sealed, bytes: &[u8]) -> io::Result<()> {
        let full = self.segments.back().is_some_and(|s| s.bytes >= self.limits.segment());
        if self.writing.is_none() || full {
            self.begin()?;
        }
        let (Some(file), Some(segment)) = (&self.writing, self.segments.back_mut()) else {
            return Err(io::Error::other("no segment"));
        };
        segment.append(file, batch, bytes)?;
        self.unsynced = true;
        Ok(())
    }

    fn begin(&mut self) -> io::Result<()> {
        if let Some(file) = self.writing.take() {
            file.sync_data()?;
        }
        let number = self.next_number;
        let (segment, file) = Segment::create(&self.dir, number, self.owner.clone())?;
        self.next_number += 1;
        self.segments.push_back(segment);
        self.writing = Some(file);
        Ok(())
    }

    /// Bytes on the disk.
    pub fn bytes(&self) -> u64 {
        self.segments.iter().map(|s| s.bytes).sum()
    }

    /// When the oldest of what is here was sealed; UTC, milliseconds since 1970.
    pub fn oldest_unix_ms(&self) -> Option<u64> {
        self.segments.iter().find(|s| s.batches > 0).map(|s| s.sealed_unix_ms)
    }

    pub fn given(&self) -> Given {
        self.given
    }

    /// Why the disk does not take batches; empty: it does.
    pub fn trouble(&self) -> &str {
        &self.trouble
    }

    fn make_room(&mut self, more: u64) {
        while self.bytes() + more > self.limits.bytes && self.evict() {}
    }

    /// Gives something up: telemetry of the oldest segment that has some, else
    /// the oldest segment but for its losses. False: there is nothing to give.
    /// The segment that is being sent and the one being written stay.
    fn evict(&mut self) -> bool {
        let last = self.segments.len().saturating_sub(1);
        let free = |at: usize, s: &Segment| at < last && s.number != self.cursor.0;
        let thin = self.segments.iter().enumerate().position(|(at, s)| free(at, s) && !s.thinned);
        let whole = self.segments.iter().enumerate().position(|(at, s)| free(at, s) && !s.is_told());
        let outcome = match (thin, whole) {
            (Some(at), _) => self.segments[at].thin(&self.dir),
            (None, Some(at)) => {
                let told = at.checked_sub(1).filter(|b| free(*b, &self.segments[*b]));
                let told = told.filter(|b| {
                    self.segments[*b].is_told() && self.segments[*b].owner == self.segments[at].owner
                });
                match told {
                    Some(before) => {
                        let earlier = self.segments[before].number;
                        let outcome = self.segments[at].give_up(&self.dir, Some(earlier));
                        if outcome.is_ok() {
                            self.segments.remove(before);
                        }
                        outcome
                    }
                    None => self.segments[at].give_up(&self.dir, None),
                }
            }
            (None, None) => return false,
        };
        match outcome {
            Ok(gone) => {
                self.given.evicted += gone;
                true
            }
            Err(error) => {
                tracing::error!(dir = %self.dir.display(), %error, "the spool cannot make room");
                false
            }
        }
    }

    /// Whose batch [`Spool::next_batch`] gives.
    pub fn next_owner(&mut self) -> Option<Arc<Owner>> {
        self.settle();
        match self.segments.iter().find(|s| s.number == self.cursor.0) {
            Some(segment) if self.cursor.1 < segment.bytes => Some(segment.owner.clone()),
            _ => (!self.waiting.is_empty()).then(|| self.owner.clone()),
        }
    }

    /// Moves the cursor to where there is something to read.
    fn settle(&mut self) {
        let (number, at) = self.cursor;
        let found = self.segments.iter().find(|s| {
            let from = if s.number == number { at.max(s.start) } else { s.start };
            s.number >= number && from < s.bytes
        });
        if let Some(s) = found {
            self.cursor = (s.number, if s.number == number { at.max(s.start) } else { s.start });
        } else if let Some(s) = self.segments.back() {
            self.cursor = if s.number >= number { (s.number, s.bytes) } else { (number, at) };
        }
    }

    /// The next batch that was not given yet. An error: it cannot be read now.
    pub fn next_batch(&mut self) -> io::Result<Option<Sealed>> {
        let mut mended = None;
        loop {
            self.settle();
            let (number, at) = self.cursor;
            let Some(position) = self.segments.iter().position(|s| s.number == number && at < s.bytes) else {
                let batch = self.waiting.pop_front();
                self.in_flight = batch.as_ref().map_or(self.in_flight, |b| b.last_seq);
                return Ok(batch);
            };
            if self.reading.as_ref().is_none_or(|(open, _)| *open != number) {
                self.reading = Some((number, File::open(segment::path(&self.dir, number))?));
            }
            let Some((_, file)) = &self.reading else { return Ok(None) };
            if let Some((batch, end)) = segment::read_at(file, at)? {
                self.cursor.1 = end;
                self.given_seq = batch.last_seq;
                return Ok(Some(batch));
            }
            if mended == Some(self.cursor) {
                return Err(io::Error::other("a segment cannot be read right after it was written"));
            }
            mended = Some(self.cursor);
            // The disk does not give back what it took.
            self.reading = None;
            // One of an earlier run is not written on.
            let written = position + 1 == self.segments.len() && self.writing.is_some();
            let segment = &mut self.segments[position];
            let before =
                if at <= segment.start { segment.first_seq.saturating_sub(1) } else { self.given_seq };
            let lost = segment.mend(&self.dir, at, before)?;
            tracing::error!(segment = %segment::name(number), lost, "a segment of the spool is damaged");
            self.given.damaged += lost;
            if written {
                self.writing = Some(segment::reopen(&self.dir, number)?);
            }
        }
    }

    /// Everything of this boot up to `seq` is stored by the collector.
    pub fn acked(&mut self, boot: &str, seq: u64) {
        if boot == self.owner.boot && seq >= self.in_flight {
            self.in_flight = 0;
        }
        while let Some(segment) = self.segments.front()
            && segment.owner.boot == boot
            && segment.last_seq <= seq
        {
            let last = self.segments.len() == 1 && self.writing.is_some();
            if last && segment.bytes < KEPT {
                return;
            }
            // Batches that were not read were not sent: nobody can have them.
            if self.cursor.0 == segment.number && self.cursor.1 < segment.bytes {
                return;
            }
            self.drop_front();
        }
    }

    fn drop_front(&mut self) {
        let Some(segment) = self.segments.pop_front() else { return };
        if self.segments.is_empty() {
            self.writing = None;
            self.unsynced = false;
        }
        if let Err(error) = fs::remove_file(segment::path(&self.dir, segment.number)) {
            tracing::warn!(segment = %segment::name(segment.number), %error, "an old segment stays");
        }
    }

    /// What must reach the disk to outlive the host; to be synced without
    /// holding the spool.
    pub fn unsynced(&mut self) -> Option<File> {
        if !std::mem::take(&mut self.unsynced) {
            return None;
        }
        self.writing.as_ref().and_then(|file| file.try_clone().ok())
    }

    /// At the end: nothing stays on the disk of what the collector has.
    pub fn close(&mut self, boot: &str, acked_seq: u64) {
        if self.segments.len() == 1
            && self.waiting.is_empty()
            && self.segments.front().is_some_and(|s| s.owner.boot == boot && s.last_seq <= acked_seq)
        {
            self.drop_front();
        }
        if let Some(file) = &self.writing {
            let _ = file.sync_data();
        }
    }
}

#[cfg(test)]
mod tests;
