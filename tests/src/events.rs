//! The sensor's NDJSON events, read while they are written.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Events kept for one test; more means that the sensor floods its reader.
const MAX_EVENTS: usize = 1 << 20;

#[derive(Clone, Debug)]
pub struct Event(pub Value);

impl Event {
    pub fn text(&self, key: &str) -> &str {
        self.field(key).and_then(Value::as_str).unwrap_or("")
    }

    pub fn number(&self, key: &str) -> Option<u64> {
        self.field(key).and_then(Value::as_u64)
    }

    /// `dst.ip` is the field `ip` of the object `dst`.
    fn field(&self, key: &str) -> Option<&Value> {
        key.split('.').try_fold(&self.0, |v, k| v.get(k))
    }

    /// Of a connection, a packet, a socket or a socket option.
    pub fn is_denial_of(&self, server: &str) -> bool {
        ["connection", "socket"].contains(&self.text("type"))
            && self.text("verdict") == "deny"
            && self.text("server") == server
    }
}

impl Event {
    /// Of a question or an answer.
    pub fn is_of_a_name(&self, server: &str, reason: &str) -> bool {
        self.text("type") == "dns" && self.text("server") == server && self.text("reason") == reason
    }
}

pub struct Events {
    path: PathBuf,
    offset: u64,
    partial: Vec<u8>,
    seen: Vec<Event>,
}

impl Events {
    pub fn new(path: PathBuf) -> Events {
        Events { path, offset: 0, partial: Vec::new(), seen: Vec::new() }
    }

    /// Everything so far.
    pub fn all(&mut self) -> Result<&[Event]> {
        self.read()?;
        Ok(&self.seen)
    }

    /// The first event that `wanted` accepts, old or new.
    pub fn wait_for(
        &mut self,
        what: &str,
        within: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Event> {
        let deadline = Instant::now() + within;
        let mut from = 0;
        loop {
            self.read()?;
            if let Some(event) = self.seen[from..].iter().find(|e| wanted(e)) {
                return Ok(event.clone());
            }
            from = self.seen.len();
            if Instant::now() > deadline {
                bail!("no event \"{what}\" within {within:?}; seen:\n{}", self.shown());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn denials_of(&mut self, server: &str) -> Result<Vec<Event>> {
        self.read()?;
        Ok(self.seen.iter().filter(|e| e.is_denial_of(server)).cloned().collect())
    }

    fn read(&mut self) -> Result<()> {
        let Ok(mut file) = File::open(&self.path) else { return Ok(()) };
        file.seek(SeekFrom::Start(self.offset))?;
        let mut bytes = Vec::new();
        self.offset += file.read_to_end(&mut bytes)? as u64;
        self.partial.extend(bytes);
        while let Some(end) = self.partial.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            let value = serde_json::from_slice(&line)
                .with_context(|| format!("not JSON: {}", String::from_utf8_lossy(&line)))?;
            self.seen.push(Event(value));
        }
        if self.seen.len() > MAX_EVENTS {
            bail!("more than {MAX_EVENTS} events");
        }
        Ok(())
    }

    fn shown(&self) -> String {
        let last = self.seen.len().saturating_sub(20);
        self.seen[last..].iter().map(|e| format!("  {}\n", e.0)).collect()
    }
}
