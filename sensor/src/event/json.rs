//! The JSON form of an event: one flat object. Others script against it, so
//! names and types only ever get added to.
//!
//! Always there: `type`, `time` (RFC 3339, UTC, nanoseconds), `seq`, `sensor`,
//! `boot`. A connection verdict always has `verdict`, `reason`, `rule` (empty
//! if none decided), `server`, `instance`, `pid`, `uid`, `protocol`,
//! `dst.ip`, `dst.port`; a DNS verdict has `name`, `qtype` and `resolver` (an
//! address) in place of `dst`. A `tool_call` always has `server`, `instance`,
//! `client` (null if unknown), `tool`, `method`, `outcome`, `request_bytes`,
//! `response_bytes`, `duration_ns`, `era`, `transport`, `connection`, `id_hash`,
//! and `error_code` where the outcome is `rpc_error`; what the two sides say of
//! themselves stands in `self_reported`. A `finding` has `kind`, `server`,
//! `severity`; an `uninspected` has `server`, `bytes`, `how`. A repeat of an earlier verdict is `type:"repeat"`
//! with `of` naming the type it repeats and `count` how often. Other fields are
//! left out when they are empty or unknown.

mod mcp;

pub(crate) use mcp::is_notification;
pub use mcp::{era_name, outcome_name, sender_name};

use super::{Body, Event, pb};
use serde::ser::{Serialize, SerializeMap, Serializer};
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};
use time::OffsetDateTime;

/// Writes the event as one line, newline included.
pub fn write_line(event: &Event, out: &mut impl Write) -> io::Result<()> {
    serde_json::to_writer(&mut *out, &Json(event))?;
    out.write_all(b"\n")
}

pub fn to_json(event: &Event) -> serde_json::Value {
    // Maps with string keys and plain numbers: cannot fail.
    serde_json::to_value(Json(event)).unwrap_or_default()
}

/// An event that serializes as described above.
pub struct Json<'a>(pub &'a Event);

/// Nanoseconds since 1970 as RFC 3339 in UTC, always nine digits of fraction.
pub struct Time(pub i64);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An i64 of nanoseconds ends in 2262, within what `time` covers.
        let t = OffsetDateTime::from_unix_timestamp_nanos(self.0.into()).map_err(|_| fmt::Error)?;
        let (year, month, day) = t.to_calendar_date();
        let (h, m, s, ns) = t.to_hms_nano();
        write!(f, "{year:04}-{:02}-{day:02}T{h:02}:{m:02}:{s:02}.{ns:09}Z", u8::from(month))
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// `type` of a body; a repeat says what it repeats in `of`.
pub fn type_name(body: &Body) -> &'static str {
    match super::decision(body) {
        Some(d) if d.repeat => "repeat",
        _ => kind_name(body),
    }
}

/// As [`type_name`], but a repeat is of the type that it repeats.
pub fn kind_name(body: &Body) -> &'static str {
    match body {
        Body::Connection(_) => "connection",
        Body::Socket(_) => "socket",
        Body::UnixConnection(_) => "unix_connection",
        Body::Access(_) => "access",
        Body::Dns(_) => "dns",
        Body::Exec(_) => "exec",
        Body::InstanceStarted(_) => "instance_started",
        Body::InstanceEnded(_) => "instance_ended",
        Body::Loss(_) => "loss",
        Body::PolicyChange(_) => "policy_change",
        Body::SensorState(_) => "sensor_state",
        Body::Finding(_) => "finding",
        Body::ToolCall(_) => "tool_call",
        Body::Prompt(_) => "prompt",
        Body::Resource(_) => "resource",
        Body::McpMessage(_) => "mcp_message",
        Body::ToolsListed(_) => "tools_listed",
        Body::Drift(_) => "drift",
        Body::Uninspected(_) => "uninspected",
        Body::Http(_) => "http",
        Body::ConnectionEnd(_) => "connection_end",
    }
}

/// Every `type` that [`type_name`] gives.
pub const TYPES: [&str; 22] = [
    "connection",
    "repeat",
    "socket",
    "unix_connection",
    "access",
    "dns",
    "exec",
    "instance_started",
    "instance_ended",
    "loss",
    "policy_change",
    "sensor_state",
    "finding",
    "tool_call",
    "prompt",
    "resource",
    "mcp_message",
    "tools_listed",
    "drift",
    "uninspected",
    "http",
    "connection_end",
];

pub fn verdict_name(verdict: pb::Verdict) -> &'static str {
    match verdict {
        pb::Verdict::Unspecified => "unknown",
        pb::Verdict::Allow => "allow",
        pb::Verdict::Deny => "deny",
        pb::Verdict::WouldDeny => "would_deny",
    }
}

pub fn mode_name(mode: pb::Mode) -> &'static str {
    match mode {
        pb::Mode::Unspecified => "unknown",
        pb::Mode::Audit => "audit",
        pb::Mode::Enforce => "enforce",
    }
}

pub fn role_name(role: pb::Role) -> &'static str {
    match role {
        pb::Role::Unspecified => "",
        pb::Role::Server => "server",
        pb::Role::Launcher => "launcher",
    }
}

pub fn hook_status_name(status: pb::HookStatus) -> &'static str {
    match status {
        pb::HookStatus::Unspecified => "unknown",
        pb::HookStatus::Attached => "attached",
        pb::HookStatus::Fallback => "fallback",
        pb::HookStatus::NotEnforced => "not_enforced",
    }
}

fn direction_name(direction: pb::Direction) -> &'static str {
    match direction {
        pb::Direction::Unspecified => "",
        pb::Direction::Egress => "egress",
        pb::Direction::Inbound => "inbound",
    }
}

fn phase_name(phase: pb::SensorPhase) -> &'static str {
    match phase {
        pb::SensorPhase::Unspecified => "unknown",
        pb::SensorPhase::Started => "started",
        pb::SensorPhase::Stopping => "stopping",
        pb::SensorPhase::Heartbeat => "heartbeat",
    }
}

pub fn severity_name(severity: pb::Severity) -> &'static str {
    match severity {
        pb::Severity::Unspecified => "unknown",
        pb::Severity::Info => "info",
        pb::Severity::Low => "low",
        pb::Severity::Medium => "medium",
        pb::Severity::High => "high",
        pb::Severity::Critical => "critical",
    }
}

/// Writes fields; `text`, `number` and `flag` leave out what is empty.
struct Fields<M>(M);

impl<M: SerializeMap> Fields<M> {
    fn always(&mut self, key: &'static str, value: &(impl Serialize + ?Sized)) -> Result<(), M::Error> {
        self.0.serialize_entry(key, value)
    }

    fn text(&mut self, key: &'static str, value: &str) -> Result<(), M::Error> {
        if value.is_empty() { Ok(()) } else { self.always(key, value) }
    }

    fn number(&mut self, key: &'static str, value: u64) -> Result<(), M::Error> {
        if value == 0 { Ok(()) } else { self.always(key, &value) }
    }

    fn flag(&mut self, key: &'static str, value: bool) -> Result<(), M::Error> {
        if value { self.always(key, &true) } else { Ok(()) }
    }

    fn list(&mut self, key: &'static str, value: &[String]) -> Result<(), M::Error> {
        if value.is_empty() { Ok(()) } else { self.always(key, value) }
    }

    fn time(&mut self, key: &'static str, ns: i64) -> Result<(), M::Error> {
        if ns == 0 { Ok(()) } else { self.always(key, &Time(ns)) }
    }

    fn decision(&mut self, d: Option<&pb::Decision>) -> Result<(), M::Error> {
        let none = pb::Decision::default();
        let d = d.unwrap_or(&none);
        self.always("verdict", verdict_name(d.verdict()))?;
        self.always("reason", &d.reason)?;
        self.always("rule", &d.rule)?;
        self.number("rule_line", d.rule_line.into())?;
        self.text("hook", &d.hook)?;
        self.always("count", &d.count.max(1))?;
        self.text("suggestion", &d.suggestion)?;
        self.number("generation", d.generation)?;
        self.text("policy", &d.policy)
    }

    fn actor(&mut self, a: Option<&pb::Actor>) -> Result<(), M::Error> {
        let none = pb::Actor::default();
        let a = a.unwrap_or(&none);
        self.always("server", &a.server)?;
        self.always("instance", &a.instance)?;
        self.text("role", role_name(a.role()))?;
        self.always("pid", &a.pid)?;
        self.always("uid", &a.uid)?;
        self.text("user", &a.user)?;
        if let Some(login) = a.login_uid {
            self.always("login_uid", &login)?;
        }
        self.text("comm", &a.comm)?;
        self.text("exe", &a.exe)?;
        if let Some(client) = &a.client {
            self.always("client", &Client(client))?;
        }
        self.text("unit", &a.unit)?;
        self.text("container", &a.container)?;
        self.number("netns", a.netns)
    }

    fn endpoint(&mut self, key: &'static str, end: Option<&pb::Endpoint>) -> Result<(), M::Error> {
        let none = pb::Endpoint::default();
        self.always(key, &Endpoint(end.unwrap_or(&none)))
    }

    fn body(&mut self, body: &Body) -> Result<(), M::Error> {
        match body {
            Body::Connection(c) => {
                self.decision(c.decision.as_ref())?;
                self.actor(c.actor.as_ref())?;
                self.always("protocol", &c.protocol)?;
                self.text("direction", direction_name(c.direction()))?;
                self.endpoint("dst", c.dst.as_ref())?;
                if c.src.is_some() {
                    self.endpoint("src", c.src.as_ref())?;
                }
                self.text("sni", &c.sni)?;
                self.number("cookie", c.cookie)
            }
            Body::Socket(s) => {
                self.decision(s.decision.as_ref())?;
                self.actor(s.actor.as_ref())?;
                self.text("family", &s.family)?;
                self.text("socket_type", &s.r#type)?;
                self.always("protocol", &s.protocol)?;
                if let Some(level) = s.level {
                    self.always("level", &level)?;
                }
                if let Some(option) = s.option {
                    self.always("option", &option)?;
                }
                Ok(())
            }
            Body::UnixConnection(u) => {
                self.decision(u.decision.as_ref())?;
                self.actor(u.actor.as_ref())?;
                self.always("path", &u.path)
            }
            Body::Access(a) => {
                self.decision(a.decision.as_ref())?;
                self.actor(a.actor.as_ref())?;
                self.always("operation", &a.operation)?;
                self.number("target_pid", a.target_pid.into())
            }
            Body::Dns(d) => {
                self.decision(d.decision.as_ref())?;
                self.actor(d.actor.as_ref())?;
                self.always("name", &d.name)?;
                self.always("qtype", &d.qtype)?;
                self.always("resolver", d.resolver.as_ref().map_or("", |r| &r.ip))?;
                self.always("protocol", &d.protocol)?;
                self.text("address", &d.address)?;
                self.number("cookie", d.cookie)
            }
            Body::Exec(e) => {
                self.actor(e.actor.as_ref())?;
                self.number("parent_pid", e.parent_pid.into())?;
                self.always("argv", &e.argv)?;
                self.flag("argv_truncated", e.argv_truncated)?;
                self.flag("role_changed", e.role_changed)?;
                self.flag("new_instance", e.new_instance)
            }
            Body::InstanceStarted(i) => {
                self.actor(i.actor.as_ref())?;
                self.list("argv", &i.argv)?;
                self.text("evidence", &i.evidence)?;
                self.flag("adopted", i.adopted)?;
                self.always("mode", mode_name(i.mode()))?;
                self.text("profile", &i.profile)
            }
            Body::InstanceEnded(i) => {
                self.actor(i.actor.as_ref())?;
                self.time("started", i.started_unix_ns)?;
                self.always("allowed", &i.allowed)?;
                self.always("denied", &i.denied)?;
                self.always("would_denied", &i.would_denied)
            }
            Body::Loss(l) => {
                self.always("where", &l.r#where)?;
                self.always("reason", &l.reason)?;
                self.always("count", &l.count)?;
                self.number("denials", l.denials)?;
                self.number("first_seq", l.first_seq)?;
                self.number("last_seq", l.last_seq)?;
                if l.types.is_empty() {
                    return Ok(());
                }
                let types: BTreeMap<&str, u64> =
                    l.types.iter().map(|t| (t.r#type.as_str(), t.count)).collect();
                self.always("types", &types)
            }
            Body::PolicyChange(p) => {
                self.always("ok", &p.ok)?;
                self.text("hash", &p.hash)?;
                self.number("generation", p.generation)?;
                self.text("path", &p.path)?;
                self.text("error", &p.error)?;
                self.text("trigger", &p.trigger)?;
                self.text("server", &p.server)?;
                if p.mode() != pb::Mode::Unspecified {
                    self.always("mode", mode_name(p.mode()))?;
                }
                self.number("bundle_version", p.bundle_version)?;
                self.list("warnings", &p.warnings)
            }
            Body::SensorState(s) => {
                self.always("phase", phase_name(s.phase()))?;
                self.text("version", &s.version)?;
                self.text("kernel", &s.kernel)?;
                self.text("host", &s.host)?;
                self.always("hooks", &s.hooks.iter().map(Hook).collect::<Vec<_>>())?;
                self.always("degraded", &s.degraded)?;
                self.text("policy", &s.policy)?;
                self.number("generation", s.generation)?;
                self.number("bundle_version", s.bundle_version)?;
                self.text("bundle", &s.bundle)?;
                self.number("enforced", s.enforced.into())?;
                self.number("audited", s.audited.into())?;
                self.list("not_ready", &s.not_ready)?;
                if !s.losses.is_empty() {
                    self.always("losses", &s.losses.iter().map(LossOf).collect::<Vec<_>>())?;
                }
                if s.proven_unix_ns != 0 {
                    self.always("proven", &Time(s.proven_unix_ns))?;
                    self.number("proven_namespaces", s.proven_namespaces.into())?;
                }
                match &s.away {
                    Some(away) => self.always("away", &AwayOf(away)),
                    None => Ok(()),
                }
            }
            Body::Finding(f) => {
                self.always("kind", &f.kind)?;
                self.always("severity", severity_name(f.severity()))?;
                self.always("server", &f.server)?;
                self.text("instance", &f.instance)?;
                self.text("detail", &f.detail)?;
                self.text("tool", &f.tool)?;
                self.text("method", &f.method)?;
                self.text("place", &f.place)?;
                self.text("rule", &f.rule)?;
                self.number("length", f.length)?;
                self.text("value_hash", &f.value_hash)?;
                self.text("action", &f.action)?;
                self.number("contained_after_ns", f.contained_after_ns)?;
                self.text("transport", &f.transport)?;
                self.number("port", f.port.into())
            }
            Body::ToolCall(t) => self.tool_call(t),
            Body::Prompt(p) => self.prompt(p),
            Body::Resource(r) => self.resource(r),
            Body::McpMessage(m) => self.mcp_message(m),
            Body::ToolsListed(t) => self.tools_listed(t),
            Body::Drift(d) => self.drift(d),
            Body::Uninspected(u) => self.uninspected(u),
            Body::Http(h) => self.http(h),
            Body::ConnectionEnd(c) => self.connection_end(c),
        }
    }
}

impl Serialize for Json<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let event = self.0;
        let mut fields = Fields(s.serialize_map(None)?);
        let kind = event.body.as_ref().map_or("unknown", type_name);
        fields.always("type", kind)?;
        fields.always("time", &Time(event.time_unix_ns))?;
        fields.always("seq", &event.seq)?;
        fields.always("sensor", &event.sensor)?;
        fields.always("boot", &event.boot)?;
        if let Some(body) = &event.body {
            if kind == "repeat" {
                fields.always("of", kind_name(body))?;
            }
            fields.body(body)?;
        }
        fields.0.end()
    }
}

struct Client<'a>(&'a pb::Client);

impl Serialize for Client<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut fields = Fields(s.serialize_map(None)?);
        fields.always("pid", &self.0.pid)?;
        fields.text("name", &self.0.name)?;
        fields.text("exe", &self.0.exe)?;
        fields.list("argv", &self.0.argv)?;
        fields.0.end()
    }
}

struct Endpoint<'a>(&'a pb::Endpoint);

impl Serialize for Endpoint<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut fields = Fields(s.serialize_map(None)?);
        fields.always("ip", &self.0.ip)?;
        fields.always("port", &self.0.port)?;
        fields.text("name", &self.0.name)?;
        fields.0.end()
    }
}

/// A hook as in `sensor_state`, `status` and `doctor`.
pub struct Hook<'a>(pub &'a pb::Hook);

impl Serialize for Hook<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut fields = Fields(s.serialize_map(None)?);
        fields.always("name", &self.0.name)?;
        fields.always("status", hook_status_name(self.0.status()))?;
        fields.text("detail", &self.0.detail)?;
        fields.0.end()
    }
}

struct LossOf<'a>(&'a pb::Loss);

impl Serialize for LossOf<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut fields = Fields(s.serialize_map(None)?);
        fields.always("where", &self.0.r#where)?;
        fields.always("reason", &self.0.reason)?;
        fields.always("count", &self.0.count)?;
        fields.0.end()
    }
}

struct AwayOf<'a>(&'a pb::Away);

impl Serialize for AwayOf<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut fields = Fields(s.serialize_map(None)?);
        fields.always("since", &Time(self.0.since_unix_ns))?;
        fields.always("servers", &self.0.servers.iter().map(AwayServerOf).collect::<Vec<_>>())?;
        fields.0.end()
    }
}

struct AwayServerOf<'a>(&'a pb::AwayServer);

impl Serialize for AwayServerOf<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut fields = Fields(s.serialize_map(None)?);
        fields.always("server", &self.0.server)?;
        fields.always("denied", &self.0.denied)?;
        fields.always("would_denied", &self.0.would_denied)?;
        fields.0.end()
    }
}

#[cfg(test)]
mod tests;
