//! Looks at the strings of messages while they pass by.
//!
//! Text is searched in windows that begin at fixed offsets of a value, never
//! where a piece happens to end, so that chunking changes nothing.

use crate::mcp::{Sender, Values};

use super::{
    Found, Key, Kind, PLACE_BYTES, Severity, cut,
    matcher::{REACH, REACH_BACK},
    personal::{self, Class},
    seen::Seen,
    spans::{self, Span, WORK_PER_BYTE, WORK_PER_MESSAGE},
};

/// Of a value: what one window searches. Secrets and personal data belong to
/// the window in which they (for secrets: their keyword) begin.
const WINDOW: usize = 56 * 1024;
/// What a window sees after its own part and before it.
const AFTER: usize = REACH;
const BEFORE: usize = REACH_BACK;
/// Of the name of a value's member, which is part of what rules match.
const NAME_BYTES: usize = 64;
/// A buffer beyond this is given back when a message ends.
const KEPT_BYTES: usize = 4 * 1024;

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of string values searched of each message.
    pub message_bytes: u64,
    /// Findings of each message; classes of personal data count once.
    pub message_findings: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { message_bytes: 1 << 20, message_findings: 64 }
    }
}

/// Looks at one direction of a connection: the messages of its two sides pass
/// interleaved, so each side needs its own.
#[derive(Debug)]
pub struct Scanner {
    key: Key,
    limits: Limits,
    value: Value,
    /// Of the message that passes by.
    message: Message,
    ended: Vec<Found>,
    unscanned: u64,
    dropped: u64,
    seen: Seen,
    spans: Vec<Span>,
}

/// The value that passes by.
#[derive(Debug, Default)]
struct Value {
    open: bool,
    place: String,
    /// `name":"`, then the bytes of the value that are still needed.
    buffer: Vec<u8>,
    /// Where in the buffer the next window begins.
    from: usize,
    /// Where in the buffer the value begins: secrets before it are its name's.
    start: usize,
}

#[derive(Debug)]
struct Message {
    taken: u64,
    unscanned: u64,
    dropped: u64,
    /// What may still be spent on searching.
    work: u64,
    secrets: Vec<Found>,
    personal: Vec<Found>,
}

impl Scanner {
    pub fn new(key: Key, limits: Limits) -> Self {
        Self {
            key,
            limits,
            value: Value::default(),
            message: Message::new(),
            ended: Vec::new(),
            unscanned: 0,
            dropped: 0,
            seen: Seen::default(),
            spans: Vec::new(),
        }
    }

    /// What was found in the messages that have ended since the last call.
    pub fn take(&mut self) -> Vec<Found> {
        std::mem::take(&mut self.ended)
    }

    /// Bytes of string values of the message that ended last that nobody looked
    /// at: they were beyond [`Limits::message_bytes`], or searching what came
    /// before them took too long.
    pub fn unscanned(&self) -> u64 {
        self.unscanned
    }

    /// Findings of the message that ended last beyond [`Limits::message_findings`].
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// What is left to say when the connection is over: sightings of secrets
    /// that were reported before, with their count.
    pub fn finish(&mut self) -> Vec<Found> {
        self.seen.rest()
    }

    fn begin(&mut self, place: &str) {
        let value = &mut self.value;
        value.open = true;
        value.place.clear();
        value.place.push_str(cut(place, PLACE_BYTES));
        value.buffer.clear();
        // As it stands in the JSON text: rules ask for `name = "value"`.
        let name =
            place.rsplit('/').find(|token| token.bytes().any(|b| !b.is_ascii_digit())).unwrap_or_default();
        if !name.is_empty() {
            value.buffer.extend_from_slice(cut(name, NAME_BYTES).as_bytes());
            value.buffer.extend_from_slice(b"\":\"");
        }
        value.from = 0;
        value.start = value.buffer.len();
    }

    fn end(&mut self) {
        if self.value.open {
            let to = self.value.buffer.len();
            self.window(to);
            self.value.open = false;
        }
    }

    /// Searches what begins before `to`, and forgets what is no longer needed.
    fn window(&mut self, to: usize) {
        let Self { value, message, spans, key, limits, .. } = self;
        let bytes = (to - value.from) as u64;
        message.work += bytes * WORK_PER_BYTE;
        if let Err(rest) = spans::secrets(&value.buffer, value.from, to, &mut message.work, spans) {
            message.unscanned += rest as u64;
        }
        for span in spans.iter().filter(|span| span.start >= value.start) {
            let text = &value.buffer[span.start..span.end];
            message.secret(span, &value.place, text.len(), key.hash(text), limits.message_findings);
        }
        personal::find(&value.buffer, value.from.max(value.start), to, |class, start, end| {
            message.personal(class, &value.place, &value.buffer[start..end], key);
        });
        let kept = to.saturating_sub(BEFORE);
        value.buffer.drain(..kept);
        value.from = to - kept;
        value.start = value.start.saturating_sub(kept);
    }
}

impl Message {
    const fn new() -> Self {
        Self {
            taken: 0,
            unscanned: 0,
            dropped: 0,
            work: WORK_PER_MESSAGE,
            secrets: Vec::new(),
            personal: Vec::new(),
        }
    }

    fn secret(&mut self, span: &Span, place: &str, length: usize, value_hash: [u8; 16], limit: usize) {
        if let Some(found) =
            self.secrets.iter_mut().find(|f| f.rule == span.rule && f.value_hash == value_hash)
        {
            found.count += 1;
        } else if self.secrets.len() >= limit {
            self.dropped += 1;
        } else {
            self.secrets.push(Found {
                kind: Kind::Secret,
                rule: span.rule,
                severity: if span.generic { Severity::Low } else { Severity::High },
                place: place.to_owned(),
                length: length as u64,
                value_hash,
                count: 1,
            });
        }
    }

    fn personal(&mut self, class: Class, place: &str, text: &[u8], key: &Key) {
        if let Some(found) = self.personal.iter_mut().find(|f| f.rule == class.name()) {
            found.count += 1;
            return;
        }
        self.personal.push(Found {
            kind: Kind::PersonalData,
            rule: class.name(),
            severity: Severity::Low,
            place: place.to_owned(),
            length: text.len() as u64,
            value_hash: key.hash(text),
            count: 1,
        });
    }
}

impl Values for Scanner {
    fn piece(&mut self, place: &str, piece: &str, last: bool) {
        // A value that never ended: bytes of it were lost.
        if self.value.open && self.value.place != cut(place, PLACE_BYTES) {
            self.end();
        }
        if !self.value.open {
            self.begin(place);
        }
        let left = self.limits.message_bytes.saturating_sub(self.message.taken);
        let (taken, beyond) =
            piece.split_at(piece.floor_char_boundary(usize::try_from(left).unwrap_or(usize::MAX)));
        self.message.unscanned += beyond.len() as u64;
        self.message.taken += if beyond.is_empty() { taken.len() as u64 } else { left };
        let mut rest = taken.as_bytes();
        loop {
            let room = (self.value.from + WINDOW + AFTER).saturating_sub(self.value.buffer.len());
            let (fits, after) = rest.split_at(room.min(rest.len()));
            self.value.buffer.extend_from_slice(fits);
            rest = after;
            if rest.is_empty() {
                break;
            }
            let to = self.value.from + WINDOW;
            self.window(to);
        }
        if last {
            self.end();
        }
    }

    fn message(&mut self, _: Sender, _: &str, _: &str) {
        self.end();
        self.value.buffer.shrink_to(KEPT_BYTES);
        self.value.place.shrink_to(PLACE_BYTES);
        let message = std::mem::replace(&mut self.message, Message::new());
        self.unscanned = message.unscanned;
        self.dropped = message.dropped;
        for found in message.secrets {
            self.seen.see(found, &mut self.ended);
        }
        self.ended.extend(message.personal);
    }
}
