//! Syslog: RFC 5424 over TLS (RFC 5425), TCP, UDP (RFC 5426) and unix sockets.
//!
//! No receiver of syslog acknowledges anything. What was sent over a connection
//! counts as safe when the other end's kernel has it and the connection is still
//! whole some time later (`resend`); when it breaks, everything after that is sent
//! again. At the end the connection is closed in order: a receiver that answers
//! with its own end has read everything.

mod config;
mod link;
mod message;

pub(super) use config::check;
pub use config::{Address, Framing, Raw, Settings};

use super::{Batch, Delivered, Output, Place, Refused, Settled, TOO_LARGE};
use crate::format::{self, Format};
use link::{Link, Sent};
use serde_json::Value;
use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

pub const KIND: &str = "syslog";

/// Events that are handed on at once.
const BATCH: usize = 256;
/// How long a receiver may leave everything unread before it is told.
const STALL: Duration = Duration::from_secs(5);
/// For the receiver's end of a connection, when the collector ends.
const CLOSE: Duration = Duration::from_secs(3);
/// What is sent within this time is one mark.
const MARK: Duration = Duration::from_millis(50);

pub struct Syslog {
    name: String,
    format: Format,
    settings: Settings,
    link: Option<Link>,
    /// What is not known to be safe, oldest first.
    marks: VecDeque<Mark>,
    /// Everything before this is.
    safe: u64,
    begun: Option<Begun>,
    text: Vec<u8>,
    message: Vec<u8>,
}

/// A batch of which a part was sent.
struct Begun {
    /// The cursor after all of it.
    next: u64,
    /// How many events were sent or are refused.
    events: usize,
    refused: Vec<Refused>,
}

/// How far the log was sent at some time.
struct Mark {
    made: Instant,
    next: u64,
    /// The position on the wire after it, when all of it is there.
    wire: Option<u64>,
    /// When the other end's kernel was seen to have it.
    taken: Option<Instant>,
}

impl Syslog {
    pub fn open(name: &str, format: Format, settings: Settings, place: &Place) -> Syslog {
        Syslog {
            name: name.to_owned(),
            format,
            settings,
            link: None,
            marks: VecDeque::new(),
            safe: place.next,
            begun: None,
            text: Vec::new(),
            message: Vec::new(),
        }
    }

    fn encode(&mut self, event: &crate::event::Event) -> io::Result<()> {
        self.text.clear();
        format::write_line(self.format, event, &mut self.text)?;
        let text = self.text.trim_ascii_end();
        self.message.clear();
        message::write(&mut self.message, event, self.settings.facility, &self.settings.app_name, text);
        Ok(())
    }

    fn send(&mut self, batch: &Batch<'_>) -> io::Result<Vec<Refused>> {
        let mut link = match self.link.take() {
            Some(link) => link,
            None => Link::connect(&self.settings)?,
        };
        link.check()?;
        if !link.flush(STALL)? {
            self.link = Some(link);
            return Err(unread());
        }
        let begun = self.begun.take().filter(|b| b.next == batch.next);
        let (sent, mut refused) = begun.map_or((0, Vec::new()), |b| (b.events, b.refused));
        for (event, said) in batch.events.iter().enumerate().skip(sent) {
            self.encode(said)?;
            let outcome = match self.message.len() as u64 > self.settings.max_bytes {
                true => Sent::TooLarge,
                false => link.send(&self.message, self.settings.framing, STALL)?,
            };
            match outcome {
                Sent::Taken => (),
                Sent::TooLarge => refused.push(Refused { event, reason: TOO_LARGE }),
                Sent::Full => {
                    self.begun = Some(Begun { next: batch.next, events: event, refused });
                    self.link = Some(link);
                    return Err(unread());
                }
            }
        }
        // What is left in our hands goes out before the next batch, or when it is settled.
        link.flush(STALL)?;
        self.link = Some(link);
        Ok(refused)
    }

    fn mark(&mut self, next: u64) {
        let now = Instant::now();
        match self.marks.back_mut() {
            Some(last) if last.wire.is_none() && now - last.made < MARK => last.next = next,
            _ => self.marks.push_back(Mark { made: now, next, wire: None, taken: None }),
        }
    }

    /// Looks how far the receiver is.
    fn look(&mut self, patience: Duration) -> io::Result<()> {
        let Some(link) = &mut self.link else { return Ok(()) };
        link.check()?;
        let flushed = link.flush(patience)?;
        let (written, taken) = (link.written(), link.taken()?);
        let now = Instant::now();
        for mark in &mut self.marks {
            if flushed && mark.wire.is_none() {
                mark.wire = Some(written);
            }
            if mark.wire.is_some_and(|at| at <= taken) {
                mark.taken.get_or_insert(now);
            }
        }
        while let Some(mark) = self.marks.front()
            && mark.taken.is_some_and(|at| now - at >= self.settings.resend)
        {
            self.safe = mark.next;
            self.marks.pop_front();
        }
        Ok(())
    }

    fn settled(&self) -> Settled {
        if self.marks.is_empty() { Settled::All(Value::Null) } else { Settled::Upto(self.safe, Value::Null) }
    }

    /// The connection is gone, and with it perhaps what was sent: then this is no
    /// error of one batch.
    fn broken(&mut self, error: io::Error) -> Result<io::Error, io::Error> {
        self.link = None;
        self.begun = None;
        let unsafe_events = !self.marks.is_empty();
        self.marks.clear();
        if unsafe_events { Ok(error) } else { Err(error) }
    }

    fn fail(&self, error: &io::Error) -> io::Error {
        io::Error::new(error.kind(), format!("{}: {error}", self.settings.address))
    }
}

fn unread() -> io::Error {
    io::Error::new(io::ErrorKind::WouldBlock, "the receiver does not read")
}

impl Output for Syslog {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> &'static str {
        KIND
    }

    fn batch(&self) -> usize {
        BATCH
    }

    fn deliver(&mut self, batch: &Batch<'_>) -> io::Result<Delivered> {
        match self.send(batch) {
            Ok(refused) => {
                self.mark(batch.next);
                Ok(Delivered::Taken(refused))
            }
            // It is whole: the rest follows.
            Err(error) if self.link.is_some() => Err(self.fail(&error)),
            Err(error) => {
                let error = self.fail(&error);
                self.broken(error).map(Delivered::Back)
            }
        }
    }

    fn settle(&mut self) -> io::Result<Settled> {
        match self.look(Duration::ZERO) {
            Ok(()) => Ok(self.settled()),
            Err(error) => {
                let error = self.fail(&error);
                self.broken(error).map(Settled::Back)
            }
        }
    }

    fn finish(&mut self) -> io::Result<Settled> {
        if let Err(error) = self.look(STALL) {
            let error = self.fail(&error);
            return self.broken(error).map(Settled::Back);
        }
        if let Some(link) = self.link.take()
            && link.close(CLOSE)
        {
            self.marks.clear();
        }
        Ok(self.settled())
    }
}

#[cfg(test)]
mod tests;
