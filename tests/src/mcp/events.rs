//! What the sensor says was called, held against what a client knows of itself.

use super::log::{Asked, Call, Log};
use crate::events::Event;
use crate::sensor::{SOON, Sensor};
use anyhow::{Result, bail, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::time::{Duration, Instant};

/// How long nothing more may come before the list is taken to be whole.
const QUIET: Duration = Duration::from_millis(300);

impl Call {
    pub fn of_event(event: &Event) -> Call {
        let outcome = match event.text("outcome") {
            "rpc_error" => format!("rpc_error {}", event.0["error_code"]),
            other => other.to_owned(),
        };
        Call {
            tool: event.text("tool").to_owned(),
            outcome,
            request_bytes: event.number("request_bytes").unwrap_or(u64::MAX),
            response_bytes: event.number("response_bytes").unwrap_or(u64::MAX),
        }
    }
}

/// Whose events: rules hold on the whole host, where others may run the same
/// server; with `client`, only instances that this process started.
#[derive(Clone, Copy, Debug)]
pub struct Of<'a> {
    pub server: &'a str,
    pub client: Option<u64>,
}

impl<'a> From<&'a str> for Of<'a> {
    fn from(server: &'a str) -> Of<'a> {
        Of { server, client: None }
    }
}

/// A place in the sensor's list of events.
#[derive(Clone, Copy, Debug)]
pub struct Mark(usize);

impl Sensor {
    pub fn mark(&self) -> Result<Mark> {
        Ok(Mark(self.events().all()?.len()))
    }

    /// Events of a kind and a server since the mark.
    pub fn since<'a>(&self, mark: Mark, kind: &str, of: impl Into<Of<'a>>) -> Result<Vec<Event>> {
        let of = of.into();
        let mut events = self.events();
        let events = &events.all()?[mark.0..];
        let started = |e: &&Event| e.text("type") == "instance_started" && e.text("server") == of.server;
        let own: BTreeSet<&str> = events
            .iter()
            .filter(started)
            .filter(|e| of.client.is_none_or(|pid| e.number("client.pid") == Some(pid)))
            .map(|e| e.text("instance"))
            .collect();
        let wanted = |e: &&Event| {
            e.text("type") == kind
                && e.text("server") == of.server
                && (of.client.is_none() || own.contains(e.text("instance")))
        };
        Ok(events.iter().filter(wanted).cloned().collect())
    }

    /// Waits until there are `count` of them, and that no more come.
    pub fn exactly<'a>(
        &self,
        mark: Mark,
        kind: &str,
        of: impl Into<Of<'a>>,
        count: usize,
    ) -> Result<Vec<Event>> {
        let of = of.into();
        let deadline = Instant::now() + SOON;
        while self.since(mark, kind, of)?.len() < count && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(QUIET);
        let found = self.since(mark, kind, of)?;
        if found.len() != count {
            let (found_count, all) = (found.len(), self.summary(mark)?);
            bail!("{found_count} `{kind}` events of {of:?}, not {count} (all: {all}): {}", shown(&found));
        }
        Ok(found)
    }

    /// How many events of each kind and server there were since the mark.
    pub fn summary(&self, mark: Mark) -> Result<String> {
        let mut counts = BTreeMap::new();
        for event in &self.events().all()?[mark.0..] {
            let how =
                [event.text("method"), event.text("how"), event.text("reason"), event.text("kind")].concat();
            *counts
                .entry(format!("{} {how} of {}", event.text("type"), event.text("server")))
                .or_insert(0) += 1;
        }
        Ok(counts.iter().map(|(what, n)| format!("{n} {what}")).collect::<Vec<_>>().join(", "))
    }

    /// The sensor's list of calls is the client's own: tool, order, count,
    /// outcome and sizes; nothing missing, nothing invented, nothing unread.
    pub fn knows<'a>(&self, mark: Mark, of: impl Into<Of<'a>>, log: &Log) -> Result<Vec<Event>> {
        let of = of.into();
        let events = self.calls_are(mark, of, &log.calls)?;
        self.requests_are(mark, of, log)?;
        Ok(events)
    }

    /// Every request of either side is in the events of its kind.
    pub fn requests_are<'a>(&self, mark: Mark, of: impl Into<Of<'a>>, log: &Log) -> Result<()> {
        let seen = self.requests(mark, of.into())?;
        ensure!(seen == log.requests, "requests: the sensor {seen:?}, the client {:?}", log.requests);
        Ok(())
    }

    fn requests(&self, mark: Mark, of: Of<'_>) -> Result<BTreeMap<Asked, usize>> {
        let mut seen = BTreeMap::new();
        for kind in ["tool_call", "tools_listed", "prompt", "resource", "mcp_message"] {
            // A notification has no outcome.
            let asked = |e: &Event| !e.text("outcome").is_empty();
            for event in self.since(mark, kind, of)?.into_iter().filter(asked) {
                let sender = if event.text("sender") == "client" { "client" } else { "server" };
                *seen.entry((sender, event.text("method").to_owned())).or_insert(0) += 1;
            }
        }
        Ok(seen)
    }

    /// The same over HTTP, where what a server asks may be under way when the
    /// client leaves, and over several connections at once nobody knows the order.
    pub fn knows_over_http(&self, mark: Mark, server: &str, log: &Log, in_order: bool) -> Result<Vec<Event>> {
        let events = self.compare(mark, server.into(), &log.calls, in_order)?;
        let mut seen = self.requests(mark, server.into())?;
        for (asked, count) in seen.iter_mut().filter(|(asked, _)| asked.0 == "server") {
            *count = (*count).min(log.asked("server", &asked.1));
        }
        seen.retain(|_, count| *count > 0);
        ensure!(seen == log.requests, "requests: the sensor {seen:?}, the client {:?}", log.requests);
        Ok(events)
    }

    pub fn calls_are<'a>(&self, mark: Mark, of: impl Into<Of<'a>>, calls: &[Call]) -> Result<Vec<Event>> {
        self.compare(mark, of.into(), calls, true)
    }

    fn compare(&self, mark: Mark, of: Of<'_>, calls: &[Call], in_order: bool) -> Result<Vec<Event>> {
        let deadline = Instant::now() + SOON;
        while self.since(mark, "tool_call", of)?.len() < calls.len() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(QUIET);
        let events = self.since(mark, "tool_call", of)?;
        let unread = self.since(mark, "uninspected", of)?;
        let (mut answered, others) = split(calls.iter().cloned());
        let (mut seen, other_seen) = split(events.iter().map(Call::of_event));
        if !in_order {
            answered.sort();
            seen.sort();
        }
        let also = format!("; all: {}; unread: {}", self.summary(mark)?, shown(&unread));
        same("answered calls", &answered, &seen).map_err(|e| anyhow::anyhow!("{e:#}{also}"))?;
        same("calls without an answer", &others, &other_seen).map_err(|e| anyhow::anyhow!("{e:#}{also}"))?;
        ensure!(unread.is_empty(), "unread bytes where none should be: {}", shown(&unread));
        Ok(events)
    }
}

/// Answered calls in order; the others sorted, and without the size of an
/// answer that no longer counts.
fn split(calls: impl Iterator<Item = Call>) -> (Vec<Call>, Vec<Call>) {
    let (answered, mut others): (Vec<_>, Vec<_>) = calls.partition(Call::is_answered);
    others.iter_mut().for_each(|c| c.response_bytes = 0);
    others.sort();
    (answered, others)
}

/// Says where two lists differ first, and by how many.
fn same<T: PartialEq + Debug>(what: &str, expected: &[T], seen: &[T]) -> Result<()> {
    if expected == seen {
        return Ok(());
    }
    let at = expected.iter().zip(seen).take_while(|(a, b)| a == b).count();
    bail!(
        "{what}: the client knows of {}, the sensor of {}; from number {at} on, client: {:?}, sensor: {:?}",
        expected.len(),
        seen.len(),
        &expected[at..expected.len().min(at + 4)],
        &seen[at..seen.len().min(at + 4)]
    )
}

/// What matters of some events.
pub fn shown(events: &[Event]) -> String {
    const KEYS: [&str; 14] = [
        "type",
        "server",
        "instance",
        "kind",
        "method",
        "tool",
        "outcome",
        "error_code",
        "request_bytes",
        "response_bytes",
        "sender",
        "how",
        "bytes",
        "detail",
    ];
    let one = |e: &Event| {
        let fields = KEYS.iter().filter_map(|k| Some(format!("{k}={}", e.0.get(*k)?)));
        format!("\n  {}", fields.collect::<Vec<_>>().join(" "))
    };
    let rest = if events.len() > 8 { format!("\n  and {} more", events.len() - 8) } else { String::new() };
    events.iter().take(8).map(one).chain([rest]).collect()
}
