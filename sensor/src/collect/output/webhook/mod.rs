//! POST to a URL: events as lines or as an array of JSON. What is answered with
//! 2xx is taken; where the receiver will never take a request, its events are
//! sent in ever smaller parts until those at fault are found.

mod answer;
mod client;
mod config;

pub(super) use config::check;
pub use config::{Body, Place, Raw, Settings, Text};

use super::{Batch, Delivered, Later, Output, REFUSED, Refused, Settled, TOO_LARGE};
use crate::event::{Event, now};
use crate::format::{self, Format};
use answer::Answer;
use client::{Client, Response};
use flate2::Compression;
use flate2::write::GzEncoder;
use hyper::body::Bytes;
use serde_json::Value;
use std::io::{self, Write as _};
use std::ops::Range;

pub const KIND: &str = "webhook";

/// Events that are handed on at once.
const BATCH: usize = 512;

pub struct Webhook {
    name: String,
    format: Format,
    settings: Settings,
    client: Client,
    begun: Option<Begun>,
}

/// A batch that is under way, over several requests and tries.
struct Begun {
    from: u64,
    next: u64,
    /// Each event as JSON.
    lines: Vec<Vec<u8>>,
    /// What is to be sent, the next part last.
    parts: Vec<Range<usize>>,
    refused: Vec<Refused>,
}

impl Begun {
    fn new(batch: &Batch<'_>, format: Format, most: usize) -> io::Result<Begun> {
        let mut lines = Vec::with_capacity(batch.events.len());
        for event in batch.events {
            lines.push(line(format, event)?);
        }
        let mut begun =
            Begun { from: batch.from, next: batch.next, lines, parts: Vec::new(), refused: Vec::new() };
        begun.cut(most);
        Ok(begun)
    }

    /// Into parts that are not too large for one request.
    fn cut(&mut self, most: usize) {
        let (mut start, mut bytes) = (0, 0);
        for (at, line) in self.lines.iter().enumerate() {
            // A separator each, and two brackets.
            let length = line.len() + 1;
            if length + 2 > most {
                self.refused.push(Refused { event: at, reason: TOO_LARGE });
            }
            if length + 2 > most || bytes + length + 2 > most {
                self.parts.push(start..at);
                bytes = 0;
                start = if length + 2 > most { at + 1 } else { at };
            }
            if length + 2 <= most {
                bytes += length;
            }
        }
        self.parts.push(start..self.lines.len());
        self.parts.retain(|part| !part.is_empty());
        self.parts.reverse();
    }

    /// The receiver will never take this part.
    fn refuse(&mut self, part: Range<usize>, reason: &'static str) {
        if part.len() == 1 {
            self.refused.push(Refused { event: part.start, reason });
            return;
        }
        let middle = part.start + part.len() / 2;
        self.parts.push(middle..part.end);
        self.parts.push(part.start..middle);
    }

    fn body(&self, part: Range<usize>, body: Body, gzip: bool) -> io::Result<Bytes> {
        let mut text = Vec::new();
        let (start, separator, end): (&[u8], &[u8], &[u8]) = match body {
            Body::Ndjson => (b"", b"\n", b"\n"),
            Body::Array => (b"[", b",", b"]"),
        };
        text.extend_from_slice(start);
        text.extend_from_slice(&self.lines[part].join(separator));
        text.extend_from_slice(end);
        if gzip {
            let mut packed = GzEncoder::new(Vec::with_capacity(text.len() / 4), Compression::fast());
            packed.write_all(&text)?;
            text = packed.finish()?;
        }
        Ok(text.into())
    }

    /// The same for the same events: log and numbers, and of a part which.
    fn key(&self, log: u64, part: &Range<usize>) -> String {
        let whole = format!("{log:016x}-{}-{}", self.from, self.next);
        if *part == (0..self.lines.len()) { whole } else { format!("{whole}-{}-{}", part.start, part.end) }
    }
}

fn line(format: Format, event: &Event) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    format::write_line(format, event, &mut line)?;
    line.truncate(line.trim_ascii_end().len());
    Ok(line)
}

impl Webhook {
    pub fn open(name: &str, format: Format, settings: Settings) -> io::Result<Webhook> {
        Ok(Webhook { name: name.to_owned(), format, settings, client: Client::new()?, begun: None })
    }

    /// An error: why it stopped, and whether the receiver answered before that.
    fn go_on(&mut self, log: u64, begun: &mut Begun) -> Result<(), (io::Error, bool)> {
        let mut answers = false;
        while let Some(part) = begun.parts.pop() {
            let key = begun.key(log, &part);
            let body = begun.body(part.clone(), self.settings.body, self.settings.gzip);
            let answered = body.and_then(|body| self.client.post(&self.settings, &key, &body));
            let answered = answered.and_then(|response| match answer::of(response.status) {
                Answer::Retry => Err(retry(&response)),
                other => Ok((other, response)),
            });
            answers |= answered.is_ok();
            match answered {
                Ok((Answer::Taken | Answer::Retry, _)) => (),
                Ok((answer @ (Answer::Refused | Answer::TooLarge), response)) => {
                    let reason = if answer == Answer::TooLarge { TOO_LARGE } else { REFUSED };
                    if part.len() == 1 {
                        let (status, said) = (response.status, answer::excerpt(&response.body));
                        tracing::warn!(output = self.name, %status, said, "the receiver refuses an event");
                    }
                    begun.refuse(part, reason);
                }
                Err(error) => {
                    begun.parts.push(part);
                    return Err((error, answers));
                }
            }
        }
        Ok(())
    }
}

/// Why it takes nothing now, and when it wants to be asked again.
fn retry(response: &Response) -> io::Error {
    let mut why = format!("the receiver answers {}", response.status);
    match &response.location {
        Some(place) if response.status.is_redirection() => {
            why.push_str(&format!(": it redirects to {}", answer::excerpt(place.as_bytes())));
        }
        _ => {
            let said = answer::excerpt(&response.body);
            if !said.is_empty() {
                why.push_str(&format!(": {said}"));
            }
        }
    }
    let after = response.retry_after.as_deref();
    match after.and_then(|value| answer::retry_after(value, now() / 1_000_000_000)) {
        Some(after) => Later { why, after }.into(),
        None => io::Error::other(why),
    }
}

impl Output for Webhook {
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
        let same =
            |b: &Begun| (b.from, b.next, b.lines.len()) == (batch.from, batch.next, batch.events.len());
        let mut begun = match self.begun.take().filter(same) {
            Some(begun) => begun,
            None => Begun::new(batch, self.format, self.settings.max_bytes)?,
        };
        match self.go_on(batch.log, &mut begun) {
            Ok(()) => {
                begun.refused.sort_by_key(|r| r.event);
                Ok(Delivered::Taken(begun.refused))
            }
            Err((error, answers)) => {
                self.begun = Some(begun);
                if answers { Ok(Delivered::Partly(error)) } else { Err(error) }
            }
        }
    }

    /// What was answered is the receiver's.
    fn settle(&mut self) -> io::Result<Settled> {
        Ok(Settled::All(Value::Null))
    }
}

#[cfg(test)]
mod tests;
