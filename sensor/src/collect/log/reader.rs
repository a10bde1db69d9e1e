//! Reads the log from a number on, at its own pace.

use super::Log;
use super::record::{Item, Items};
use super::segment;
use super::shared::{DAMAGED, Located, Shared, Times};
use crate::event::Event;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

pub const ALWAYS: Times = (i64::MIN, i64::MAX);

pub struct Reader {
    shared: Arc<Shared>,
    times: Times,
    /// Number of the next event.
    offset: u64,
    file: Option<(u64, File)>,
    span: Vec<u8>,
    /// Of the span: its segment, where it begins there, how much of it was
    /// read, and the number after its last event.
    base: u64,
    at: u64,
    used: usize,
    end: u64,
}

/// What [`Reader::read`] finds.
#[derive(Debug)]
pub enum Next {
    /// Of one sensor and boot, in ascending order; the next one is this.
    Events(Vec<Event>, u64),
    /// So many events that were stored cannot be given any more.
    Missed { count: u64, reason: &'static str },
    /// All that is stored was given.
    End,
}

impl Log {
    /// From event `offset` on, as far as it lies in blocks with events of
    /// `times`.
    pub fn reader(&self, offset: u64) -> Reader {
        Reader::new(self.shared.clone(), offset, ALWAYS)
    }
}

impl Reader {
    pub(super) fn new(shared: Arc<Shared>, offset: u64, times: Times) -> Reader {
        let none = (0, 0, 0, 0);
        let (base, at, used, end) = none;
        Reader { shared, times, offset, file: None, span: Vec::new(), base, at, used, end }
    }

    /// Number of the next event.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// How many events there are after this, missed ones included.
    pub fn remaining(&self) -> u64 {
        self.shared.end().saturating_sub(self.offset)
    }

    /// Until there is more, or the writer has ended (true), or the time is over.
    pub fn wait(&self, time: Duration) -> bool {
        self.shared.wait(self.offset, time)
    }

    /// An error: the disk does not answer now; the same is tried again.
    pub fn read(&mut self) -> io::Result<Next> {
        loop {
            if let Some(next) = self.rest_of_span() {
                return Ok(next);
            }
            let at = (self.base, self.at + self.used as u64);
            match self.shared.locate(self.offset, Some(at), self.times) {
                Located::End(offset) => {
                    // Blocks of other times were passed over.
                    self.offset = self.offset.max(offset);
                    return Ok(Next::End);
                }
                Located::Missed { count, reason } => return Ok(self.missed(count, reason)),
                Located::Span { base, at, until, offset, end } => {
                    self.offset = offset;
                    match self.load(base, at, until) {
                        Ok(()) => self.end = end,
                        // Its time was over meanwhile.
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {
                            if self.shared.oldest() <= base {
                                return Err(error);
                            }
                        }
                        Err(error) if unreadable(&error) => {
                            tracing::error!(base, at, %error, "a part of the log cannot be read");
                            return Ok(self.missed(end - self.offset, DAMAGED));
                        }
                        Err(error) => return Err(error),
                    }
                }
            }
        }
    }

    fn missed(&mut self, count: u64, reason: &'static str) -> Next {
        self.offset += count;
        Next::Missed { count, reason }
    }

    fn load(&mut self, base: u64, at: u64, until: u64) -> io::Result<()> {
        self.span.clear();
        (self.base, self.at, self.used, self.end) = (base, at, 0, 0);
        if self.file.as_ref().is_none_or(|(open, _)| *open != base) {
            self.file = Some((base, File::open(segment::path(&self.shared.dir, base))?));
        }
        let Some((_, file)) = &self.file else { return Ok(()) };
        self.span.resize((until - at) as usize, 0);
        let read = file.read_exact_at(&mut self.span, at);
        if read.is_err() {
            self.span.clear();
        }
        read
    }

    /// `None`: the span has nothing more.
    fn rest_of_span(&mut self) -> Option<Next> {
        while self.used < self.span.len() {
            let rest = &self.span[self.used..];
            let (record, length) = match Items::new(rest, 0).next() {
                Some(Item::Record(record, length)) => (record, length),
                // What it held is told by the number of the next record.
                Some(Item::Damage(length)) => {
                    self.used += length;
                    continue;
                }
                None => break,
            };
            let head = record.head;
            if head.end() <= self.offset || head.end() > self.end {
                self.used += length;
                continue;
            }
            if head.offset > self.offset {
                return Some(self.missed(head.offset - self.offset, DAMAGED));
            }
            let Some(mut events) = record.events() else {
                self.used += length;
                continue;
            };
            self.used += length;
            events.drain(..(self.offset - head.offset) as usize);
            self.offset = head.end();
            return Some(Next::Events(events, self.offset));
        }
        let short = self.end.saturating_sub(self.offset);
        self.end = 0;
        (short > 0).then(|| self.missed(short, DAMAGED))
    }
}

/// The disk says that it will not give this back.
fn unreadable(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::UnexpectedEof || error.raw_os_error() == Some(libc::EIO)
}
