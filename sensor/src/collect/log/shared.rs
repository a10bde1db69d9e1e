//! What readers see of the log: segments and how far they are committed. The
//! writer changes it only after the disk has what it says.

use super::segment::Segment;
use crate::event::pb;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

pub(super) struct Shared {
    pub id: u64,
    pub dir: PathBuf,
    state: Mutex<State>,
    grown: Condvar,
    end: watch::Sender<u64>,
}

struct State {
    segments: VecDeque<Segment>,
    closed: bool,
}

/// Where the next events are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Located {
    /// Records from `at` up to `until` of this segment; the first of them that
    /// matters holds event `offset`, the last ends before `end`.
    Span { base: u64, at: u64, until: u64, offset: u64, end: u64 },
    /// Events that are not there any more.
    Missed { count: u64, reason: &'static str },
    /// Nothing is stored after this.
    End(u64),
}

pub(super) const RETENTION: &str = "retention";
pub(super) const DAMAGED: &str = "damaged";

/// Times that a reader wants: from, and before.
pub(super) type Times = (i64, i64);

impl Shared {
    pub(super) fn new(id: u64, dir: PathBuf, segments: VecDeque<Segment>) -> Shared {
        let end = segments.back().map_or(0, |s| s.end);
        let state = State { segments, closed: false };
        Shared { id, dir, state: Mutex::new(state), grown: Condvar::new(), end: watch::Sender::new(end) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last segment is now this, or this comes after it.
    pub(super) fn commit(&self, segment: &Segment) {
        let mut state = self.state();
        match state.segments.back_mut() {
            Some(last) if last.base == segment.base => last.clone_from(segment),
            _ => state.segments.push_back(segment.clone()),
        }
        drop(state);
        self.end.send_replace(segment.end);
        self.grown.notify_all();
    }

    pub(super) fn close(&self) {
        self.state().closed = true;
        self.grown.notify_all();
    }

    /// Takes the oldest segments out as long as `gone` says so of the oldest and
    /// the bytes of all. The last one stays.
    pub(super) fn expire(&self, gone: impl Fn(&Segment, u64) -> bool) -> Vec<u64> {
        let mut state = self.state();
        let mut bytes: u64 = state.segments.iter().map(|s| s.bytes).sum();
        let mut expired = Vec::new();
        while state.segments.len() > 1 && state.segments.front().is_some_and(|s| gone(s, bytes)) {
            if let Some(segment) = state.segments.pop_front() {
                bytes -= segment.bytes;
                expired.push(segment.base);
            }
        }
        expired
    }

    pub(super) fn oldest(&self) -> u64 {
        self.state().segments.front().map_or(0, |s| s.base)
    }

    pub(super) fn end(&self) -> u64 {
        *self.end.borrow()
    }

    pub(super) fn watch(&self) -> watch::Receiver<u64> {
        self.end.subscribe()
    }

    /// Until there is more than `seen`, the writer has ended (true), or the time
    /// is over.
    pub(super) fn wait(&self, seen: u64, time: Duration) -> bool {
        let waiting = |s: &mut State| !s.closed && s.segments.back().is_none_or(|last| last.end <= seen);
        let state = self.grown.wait_timeout_while(self.state(), time, waiting);
        state.unwrap_or_else(PoisonError::into_inner).0.closed
    }

    pub(super) fn describe(&self) -> pb::LogState {
        let state = self.state();
        let first_ms = state.segments.iter().find(|s| !s.is_empty()).map_or(0, |s| s.first_unix_ms);
        pb::LogState {
            bytes: state.segments.iter().map(|s| s.bytes).sum(),
            segments: state.segments.len() as u64,
            oldest: state.segments.front().map_or(0, |s| s.base),
            next: state.segments.back().map_or(0, |s| s.end),
            oldest_unix_ns: i64::try_from(first_ms.saturating_mul(1_000_000)).unwrap_or(i64::MAX),
            subscribers: 0,
        }
    }

    /// Where event `offset` is, or the next one within `times` that is kept.
    /// `at`: position of a record of a segment at or before it, if known.
    pub(super) fn locate(&self, mut offset: u64, at: Option<(u64, u64)>, times: Times) -> Located {
        let state = self.state();
        let mut n = state.segments.partition_point(|s| s.end <= offset);
        loop {
            let Some(segment) = state.segments.get(n) else { return Located::End(offset) };
            if segment.base > offset {
                let reason = if n == 0 { RETENTION } else { DAMAGED };
                return Located::Missed { count: segment.base - offset, reason };
            }
            if segment.is_empty() {
                n += 1;
                continue;
            }
            let first = segment.blocks.partition_point(|b| b.offset <= offset).saturating_sub(1);
            for block in first..segment.blocks.len() {
                let found = segment.blocks[block];
                let (until, end) = segment.end_of(block);
                if offset >= end {
                    continue;
                }
                if found.newest < times.0 || found.oldest >= times.1 {
                    offset = end;
                    continue;
                }
                let known = at.filter(|(base, at)| *base == segment.base && (found.at..until).contains(at));
                let at = known.map_or(found.at, |(_, at)| at);
                return Located::Span { base: segment.base, at, until, offset, end };
            }
            offset = offset.max(segment.end);
            n += 1;
        }
    }

    /// Events `offset`s of blocks from the newest to the oldest, within `times`:
    /// where each begins and ends.
    pub(super) fn blocks_newest_first(&self, times: Times) -> Vec<(u64, u64)> {
        let state = self.state();
        let mut found = Vec::new();
        for segment in state.segments.iter().rev() {
            for n in (0..segment.blocks.len()).rev() {
                let block = segment.blocks[n];
                if block.newest >= times.0 && block.oldest < times.1 {
                    found.push((block.offset, segment.end_of(n).1));
                }
            }
        }
        found
    }
}
