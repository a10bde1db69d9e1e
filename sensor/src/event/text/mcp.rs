//! Rows of what was said over a wire, and of the connections it went over.

use super::{Row, Tone, cut, endpoint, escape, push, who};
use crate::event::json::{Time, is_notification, outcome_name, sender_name};
use crate::event::{Body, pb};
use std::fmt::Write;

/// Characters of a hash that are shown.
const SHORT_HASH: usize = 12;
/// Characters of a name that a server or client chose.
const MAX_NAME: usize = 80;

/// "512 B", "1.5 kB": powers of 1000.
pub fn bytes(count: u64) -> String {
    const UNITS: [(&str, u64); 4] =
        [("TB", 1_000_000_000_000), ("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1000)];
    match UNITS.iter().find(|(_, size)| count >= *size) {
        Some((unit, size)) => format!("{:.1} {unit}", count as f64 / *size as f64),
        None => format!("{count} B"),
    }
}

/// "1.5", "1500": milliseconds, with fraction where it matters.
pub fn milliseconds(ns: u64) -> String {
    let ms = ns as f64 / 1e6;
    if ms < 10.0 { format!("{ms:.2}") } else { format!("{ms:.0}") }
}

fn tone(e: &pb::Exchange) -> Tone {
    match e.outcome() {
        pb::Outcome::ToolError | pb::Outcome::RpcError => Tone::Bad,
        pb::Outcome::Cancelled | pb::Outcome::NoResponse => Tone::Warning,
        _ => Tone::Plain,
    }
}

/// Outcome, time and sizes of a request; the size of a notification.
fn measures(e: &pb::Exchange, out: &mut String) {
    if is_notification(e) {
        let _ = write!(out, "  {}", bytes(e.request_bytes));
        return;
    }
    let _ = write!(out, "  {}", outcome_name(e.outcome()));
    if e.outcome() == pb::Outcome::RpcError {
        let _ = write!(out, " {}", e.error_code);
    }
    let _ = write!(
        out,
        "  {} ms  {} → {}",
        milliseconds(e.duration_ns),
        bytes(e.request_bytes),
        bytes(e.response_bytes)
    );
}

pub(super) fn call(what: &str, name: &str, e: Option<&pb::Exchange>, body: &Body, row: &mut Row) {
    let none = pb::Exchange::default();
    let e = e.unwrap_or(&none);
    what.clone_into(&mut row.what);
    row.tone = tone(e);
    row.detail = cut(name, MAX_NAME);
    measures(e, &mut row.detail);
    who(body, &mut row.detail);
}

pub(super) fn message(m: &pb::McpMessage, body: &Body, row: &mut Row) {
    let none = pb::Exchange::default();
    let e = m.exchange.as_ref().unwrap_or(&none);
    row.what = "message".to_owned();
    row.tone = tone(e);
    row.detail = cut(&escape(&e.method), MAX_NAME);
    push(&mut row.detail, "from ", sender_name(e.sender()));
    if m.count > 1 {
        let _ = write!(row.detail, " ×{}", m.count);
    }
    measures(e, &mut row.detail);
    who(body, &mut row.detail);
}

pub(super) fn tools_listed(t: &pb::ToolsListed, body: &Body, row: &mut Row) {
    row.what = "tools".to_owned();
    let partly = if t.incomplete { " (not the whole list)" } else { "" };
    row.detail = format!("{} tools{partly}", t.tools.len());
    push(&mut row.detail, "list ", &cut(&t.list_hash, SHORT_HASH));
    who(body, &mut row.detail);
}

pub(super) fn drift(d: &pb::Drift, body: &Body, row: &mut Row) {
    row.what = "DRIFT".to_owned();
    row.tone = Tone::Warning;
    row.detail = escape(&d.what);
    push(&mut row.detail, "", &cut(&escape(&d.tool), MAX_NAME));
    push(&mut row.detail, "", &d.parts.join(", "));
    push(&mut row.detail, "was ", &short(&d.before));
    push(&mut row.detail, "is ", &short(&d.after));
    if d.since_unix_ns != 0 {
        let seen = Time(d.since_unix_ns).to_string();
        push(&mut row.detail, "last seen ", &seen[..19]);
    }
    who(body, &mut row.detail);
}

/// A hash is cut; a version is not.
fn short(text: &str) -> String {
    let hash = text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
    cut(text, if hash { SHORT_HASH } else { MAX_NAME })
}

pub(super) fn uninspected(u: &pb::Uninspected, body: &Body, row: &mut Row) {
    row.what = "UNREAD".to_owned();
    row.tone = Tone::Warning;
    row.detail = bytes(u.bytes);
    push(&mut row.detail, "from ", sender_name(u.sender()));
    push(&mut row.detail, "", &u.how);
    who(body, &mut row.detail);
}

pub(super) fn http(h: &pb::HttpExchange, body: &Body, row: &mut Row) {
    row.what = "http".to_owned();
    row.tone = if h.status >= 400 { Tone::Warning } else { Tone::Plain };
    row.detail = format!("{} {}{}", escape(&h.method), escape(&h.host), escape(&h.path));
    row.detail = cut(&row.detail, 2 * MAX_NAME);
    let _ = write!(row.detail, "  {}", h.status);
    push(&mut row.detail, "", &h.mcp_method);
    push(&mut row.detail, "", &h.mcp_name);
    let _ = write!(
        row.detail,
        "  {} ms  {} → {}",
        milliseconds(h.duration_ns),
        bytes(h.request_bytes),
        bytes(h.response_bytes)
    );
    if let Some(peer) = &h.peer {
        let before = if h.direction() == pb::Direction::Inbound { "from " } else { "" };
        push(&mut row.detail, before, &endpoint(peer));
    }
    who(body, &mut row.detail);
}

pub(super) fn connection_end(c: &pb::ConnectionEnd, body: &Body, row: &mut Row) {
    row.what = "closed".to_owned();
    let end = |e: Option<&pb::Endpoint>| e.map_or_else(String::new, endpoint);
    row.detail = match c.direction() {
        pb::Direction::Inbound => {
            format!("{} {} from {}", escape(&c.protocol), end(c.dst.as_ref()), end(c.src.as_ref()))
        }
        _ => format!("{} {}", escape(&c.protocol), end(c.dst.as_ref())),
    };
    push(&mut row.detail, "", &c.outcome);
    let _ = write!(
        row.detail,
        "  {} ms  {} sent, {} received",
        milliseconds(c.duration_ns),
        bytes(c.bytes_sent),
        bytes(c.bytes_received)
    );
    who(body, &mut row.detail);
}
