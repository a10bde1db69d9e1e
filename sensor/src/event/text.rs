//! An event as one line for a person.

mod mcp;

pub use mcp::{bytes, milliseconds};

use super::json::{Time, mode_name, verdict_name};
use super::{Body, Event, actor, decision, pb};
use std::fmt::Write;

/// How a line is to be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    Plain,
    Good,
    Bad,
    Warning,
}

/// Cells of one line. Text that a server chose is escaped: it cannot move the
/// cursor or forge a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub time: String,
    pub what: String,
    pub server: String,
    pub detail: String,
    pub tone: Tone,
}

pub const HEADINGS: [&str; 4] = ["TIME", "WHAT", "SERVER", "DETAIL"];

impl Row {
    pub fn cells(&self) -> [&str; 4] {
        [&self.time, &self.what, &self.server, &self.detail]
    }
}

/// Characters of a command line that are shown; JSON has all that is recorded.
const MAX_COMMAND: usize = 120;

fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Control characters, line breaks and direction marks become visible.
pub fn escape(text: &str) -> String {
    let plain = |c: char| {
        !c.is_control()
            && !matches!(c, '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if text.chars().all(plain) {
        return text.to_owned();
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if plain(c) { out.push(c) } else { out.extend(c.escape_unicode()) }
    }
    out
}

/// As [`escape`], for text of several lines.
pub fn escape_lines(text: &str) -> String {
    text.split('\n').map(escape).collect::<Vec<_>>().join("\n")
}

pub fn row(event: &Event) -> Row {
    let mut row = Row {
        // Without the date: 12:34:56.789.
        time: Time(event.time_unix_ns).to_string()[11..23].to_owned(),
        what: String::new(),
        server: event.body.as_ref().map(super::server).map(escape).unwrap_or_default(),
        detail: String::new(),
        tone: Tone::Plain,
    };
    if let Some(body) = &event.body {
        describe(body, &mut row);
    }
    // Whatever a field held: a sensor may be as hostile as a server.
    row.what = escape(&row.what);
    row.detail = escape(&row.detail);
    row
}

fn describe(body: &Body, row: &mut Row) {
    if let Some(decision) = decision(body) {
        verdict(body, decision, row);
        return;
    }
    match body {
        Body::Exec(e) => {
            row.what = "exec".to_owned();
            row.detail = cut(&escape(&e.argv.join(" ")), MAX_COMMAND);
            who(body, &mut row.detail);
        }
        Body::InstanceStarted(i) => {
            row.what = "started".to_owned();
            row.detail = format!("{}, {}", mode_name(i.mode()), escape(&i.profile));
            push(&mut row.detail, "by ", &i.evidence);
            who(body, &mut row.detail);
        }
        Body::InstanceEnded(i) => {
            row.what = "ended".to_owned();
            row.detail =
                format!("{} allowed, {} denied, {} would be denied", i.allowed, i.denied, i.would_denied);
        }
        Body::Loss(l) => {
            row.what = "LOSS".to_owned();
            row.tone = Tone::Bad;
            row.detail = format!("{} × {} ({})", l.count, escape(&l.reason), escape(&l.r#where));
        }
        Body::PolicyChange(p) => {
            row.what = "policy".to_owned();
            row.tone = if p.ok { Tone::Plain } else { Tone::Bad };
            row.detail = match (p.ok, p.server.is_empty()) {
                (false, _) => format!("refused: {}", escape(&p.error)),
                (true, true) => format!("generation {} in force", p.generation),
                (true, false) => format!("mode {}", mode_name(p.mode())),
            };
        }
        Body::SensorState(s) => {
            row.what = "sensor".to_owned();
            row.detail = match s.phase() {
                pb::SensorPhase::Started => "started".to_owned(),
                pb::SensorPhase::Stopping => "stopping".to_owned(),
                pb::SensorPhase::Heartbeat | pb::SensorPhase::Unspecified => "alive".to_owned(),
            };
            if !s.degraded.is_empty() {
                row.tone = Tone::Warning;
                push(&mut row.detail, "degraded: ", &s.degraded.join("; "));
            }
        }
        Body::Finding(f) => {
            row.what = "FINDING".to_owned();
            row.tone = Tone::Warning;
            row.detail = escape(&f.kind);
            push(&mut row.detail, "rule ", &f.rule);
            push(&mut row.detail, "tool ", &f.tool);
            push(&mut row.detail, "in ", &f.method);
            push(&mut row.detail, "at ", &f.place);
            push(&mut row.detail, "", &f.detail);
            push(&mut row.detail, "", &f.action);
        }
        Body::Connection(_) | Body::Socket(_) | Body::UnixConnection(_) | Body::Access(_) | Body::Dns(_) => {}
        Body::ToolCall(t) => mcp::call("call", &escape(&t.tool), t.exchange.as_ref(), body, row),
        Body::Prompt(p) => mcp::call("prompt", &escape(&p.name), p.exchange.as_ref(), body, row),
        Body::Resource(r) => {
            let what = format!("{}://{}", escape(&r.scheme), escape(&r.host));
            mcp::call("resource", &what, r.exchange.as_ref(), body, row);
        }
        Body::McpMessage(m) => mcp::message(m, body, row),
        Body::ToolsListed(t) => mcp::tools_listed(t, body, row),
        Body::Drift(d) => mcp::drift(d, body, row),
        Body::Uninspected(u) => mcp::uninspected(u, body, row),
        Body::Http(h) => mcp::http(h, body, row),
        Body::ConnectionEnd(c) => mcp::connection_end(c, body, row),
    }
}

fn verdict(body: &Body, decision: &pb::Decision, row: &mut Row) {
    (row.what, row.tone) = match decision.verdict() {
        pb::Verdict::Allow => ("allow".to_owned(), Tone::Good),
        pb::Verdict::Deny => ("DENY".to_owned(), Tone::Bad),
        pb::Verdict::WouldDeny => ("would deny".to_owned(), Tone::Warning),
        pb::Verdict::Unspecified => (verdict_name(pb::Verdict::Unspecified).to_owned(), Tone::Plain),
    };
    row.detail = match body {
        Body::Connection(c) => {
            let end = |e: Option<&pb::Endpoint>| e.map_or_else(String::new, endpoint);
            let mut text = match c.direction() {
                pb::Direction::Inbound => {
                    format!("{} {} from {}", c.protocol, end(c.dst.as_ref()), end(c.src.as_ref()))
                }
                _ => format!("{} {}", c.protocol, end(c.dst.as_ref())),
            };
            push(&mut text, "asked for ", &c.sni);
            text
        }
        Body::Socket(s) => {
            let mut text = format!("socket {} {} {}", s.family, s.r#type, s.protocol);
            if let (Some(level), Some(option)) = (s.level, s.option) {
                let _ = write!(text, " option {level}/{option}");
            }
            text
        }
        Body::UnixConnection(u) => format!("unix {}", escape(&u.path)),
        Body::Access(a) => {
            let mut text = format!("{} {}", decision.hook, escape(&a.operation));
            if a.target_pid != 0 {
                let _ = write!(text, " of process {}", a.target_pid);
            }
            text
        }
        Body::Dns(d) => {
            let name = if d.name.is_empty() { "?" } else { &d.name };
            let mut text = format!("dns {} {}", d.qtype, escape(name));
            if let Some(resolver) = &d.resolver {
                let _ = write!(text, " of {}", endpoint(resolver));
            }
            push(&mut text, "→ ", &d.address);
            text
        }
        _ => String::new(),
    };
    // A rule that allows says it all; with any other reason the rule is only
    // where to look.
    let plain = matches!(decision.reason.as_str(), "rule" | "name") && !decision.rule.is_empty();
    if !plain {
        push(&mut row.detail, "", &decision.reason);
    }
    push(&mut row.detail, "", &decision.rule);
    if decision.count > 1 {
        let _ = write!(row.detail, " ×{}", decision.count);
    }
    who(body, &mut row.detail);
    push(&mut row.detail, "to allow: ", &decision.suggestion);
}

fn endpoint(end: &pb::Endpoint) -> String {
    let mut text = if end.ip.contains(':') {
        format!("[{}]:{}", end.ip, end.port)
    } else {
        format!("{}:{}", end.ip, end.port)
    };
    if !end.name.is_empty() {
        let _ = write!(text, " ({})", escape(&end.name));
    }
    text
}

fn who(body: &Body, out: &mut String) {
    let Some(actor) = actor(body) else { return };
    let user = if actor.user.is_empty() { actor.uid.to_string() } else { escape(&actor.user) };
    let _ = write!(out, "  pid {} ({user})", actor.pid);
    if let Some(client) = &actor.client {
        push(out, "for ", &client.name);
    }
}

fn push(out: &mut String, before: &str, text: &str) {
    if !text.is_empty() {
        let _ = write!(out, "  {before}{}", escape(text));
    }
}

#[cfg(test)]
mod tests;
