//! The JSON form of an event: one flat object. Others script against it, so
//! names and types only ever get added to.
//!
//! Always there: `type`, `time` (RFC 3339, UTC, nanoseconds), `seq`, `sensor`,
//! `boot`. A connection verdict always has `verdict`, `reason`, `rule` (empty
//! if none decided), `server`, `instance`, `pid`, `uid`, `protocol`,
//! `dst.ip`, `dst.port`; a DNS verdict has `name`, `qtype` and `resolver` (an
//! address) in place of `dst`. A repeat of an earlier verdict is `type:"repeat"`
//! with `of` naming the type it repeats and `count` how often. Other fields are
//! left out when they are empty or unknown.

use super::{Body, Event, pb};
use serde::ser::{Serialize, SerializeMap, Serializer};
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

fn kind_name(body: &Body) -> &'static str {
    match body {
        Body::Connection(_) => "connection",
        Body::Socket(_) => "socket",
        Body::UnixConnection(_) => "unix_connection",
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
pub const TYPES: [&str; 21] = [
    "connection",
    "repeat",
    "socket",
    "unix_connection",
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

fn severity_name(severity: pb::Severity) -> &'static str {
    match severity {
        pb::Severity::Unspecified => "unknown",
        pb::Severity::Info => "info",
        pb::Severity::Low => "low",
        pb::Severity::Medium => "medium",
        pb::Severity::High => "high",
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
                self.number("last_seq", l.last_seq)
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
                self.number("generation", s.generation)
            }
            Body::Finding(f) => {
                self.always("kind", &f.kind)?;
                self.always("severity", severity_name(f.severity()))?;
                self.text("server", &f.server)?;
                self.text("instance", &f.instance)?;
                self.text("detail", &f.detail)
            }
            _ => self.actor(super::actor(body)),
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn decision() -> pb::Decision {
        pb::Decision {
            verdict: pb::Verdict::WouldDeny.into(),
            reason: "no_rule".to_owned(),
            hook: "connect".to_owned(),
            count: 1,
            ..Default::default()
        }
    }

    fn connection(decision: pb::Decision) -> Event {
        Event {
            seq: 7,
            time_unix_ns: 1_700_000_000_000_000_012,
            sensor: "s".to_owned(),
            boot: "b".to_owned(),
            body: Some(Body::Connection(pb::Connection {
                decision: Some(decision),
                actor: Some(pb::Actor {
                    server: "github".to_owned(),
                    instance: "i1".to_owned(),
                    pid: 12,
                    uid: 0,
                    client: Some(pb::Client { pid: 3, name: "claude".to_owned(), ..Default::default() }),
                    ..Default::default()
                }),
                protocol: "tcp".to_owned(),
                direction: pb::Direction::Egress.into(),
                dst: Some(pb::Endpoint {
                    ip: "2001:db8::1".to_owned(),
                    port: 443,
                    name: "api.example.com".to_owned(),
                }),
                ..Default::default()
            })),
        }
    }

    #[test]
    fn a_connection_has_the_fields_of_the_contract() {
        let mut line = Vec::new();
        write_line(&connection(decision()), &mut line).unwrap();
        assert_eq!(line.pop(), Some(b'\n'));
        let value: serde_json::Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(
            value,
            json!({
                "type": "connection", "time": "2023-11-14T22:13:20.000000012Z", "seq": 7,
                "sensor": "s", "boot": "b", "verdict": "would_deny", "reason": "no_rule", "rule": "",
                "hook": "connect", "count": 1, "server": "github", "instance": "i1", "pid": 12, "uid": 0,
                "client": {"pid": 3, "name": "claude"}, "protocol": "tcp", "direction": "egress",
                "dst": {"ip": "2001:db8::1", "port": 443, "name": "api.example.com"},
            })
        );
        assert_eq!(to_json(&connection(decision())), value);
    }

    #[test]
    fn a_dns_verdict_has_the_fields_of_the_contract() {
        let body = pb::Dns {
            decision: Some(pb::Decision { reason: "name_no_rule".to_owned(), ..decision() }),
            actor: Some(pb::Actor { server: "github".to_owned(), pid: 12, ..Default::default() }),
            name: "evil.example".to_owned(),
            qtype: "TXT".to_owned(),
            resolver: Some(pb::Endpoint { ip: "10.0.0.2".to_owned(), port: 53, ..Default::default() }),
            protocol: "udp".to_owned(),
            ..Default::default()
        };
        let value = to_json(&Event { seq: 3, body: Some(Body::Dns(body)), ..Default::default() });
        assert_eq!(
            value,
            json!({
                "type": "dns", "time": "1970-01-01T00:00:00.000000000Z", "seq": 3, "sensor": "", "boot": "",
                "verdict": "would_deny", "reason": "name_no_rule", "rule": "", "hook": "connect", "count": 1,
                "server": "github", "instance": "", "pid": 12, "uid": 0,
                "name": "evil.example", "qtype": "TXT", "resolver": "10.0.0.2", "protocol": "udp",
            })
        );
    }

    #[test]
    fn a_denied_hello_says_the_name_it_asked_for() {
        let mut event = connection(pb::Decision { reason: "sni".to_owned(), ..decision() });
        if let Some(Body::Connection(c)) = &mut event.body {
            c.sni = "evil.example".to_owned();
        }
        assert_eq!(to_json(&event)["sni"], "evil.example");
    }

    #[test]
    fn a_repeat_says_what_it_repeats() {
        let value = to_json(&connection(pb::Decision { repeat: true, count: 40, ..decision() }));
        assert_eq!(
            (&value["type"], &value["of"], &value["count"]),
            (&json!("repeat"), &json!("connection"), &json!(40))
        );
    }

    #[test]
    fn a_loss_has_the_fields_of_the_contract() {
        let loss = pb::Loss {
            r#where: "kernel".to_owned(),
            reason: "verdict_ring_full".to_owned(),
            count: 3,
            ..Default::default()
        };
        let value = to_json(&Event { body: Some(Body::Loss(loss)), ..Default::default() });
        assert_eq!(value["type"], "loss");
        assert_eq!(value["where"], "kernel");
        assert_eq!(value["reason"], "verdict_ring_full");
        assert_eq!(value["count"], 3);
    }

    proptest! {
        /// Whatever a server puts into its names: one line, which reads back.
        #[test]
        fn any_text_stays_within_one_line(text in any::<String>(), path in any::<String>(), time in any::<i64>()) {
            let actor = pb::Actor { comm: text.clone(), server: text.clone(), ..Default::default() };
            let body = pb::UnixConnection { actor: Some(actor), path: path.clone(), ..Default::default() };
            let event = Event { time_unix_ns: time, body: Some(Body::UnixConnection(body)), ..Default::default() };
            let mut line = Vec::new();
            write_line(&event, &mut line).unwrap();
            prop_assert_eq!(line.iter().position(|b| *b == b'\n'), Some(line.len() - 1));
            let value: serde_json::Value = serde_json::from_slice(&line).unwrap();
            prop_assert_eq!(value["path"].as_str(), Some(path.as_str()));
            prop_assert_eq!(value["server"].as_str(), Some(text.as_str()));
        }
    }

    #[test]
    fn any_time_has_a_form() {
        assert_eq!(Time(0).to_string(), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(Time(i64::MAX).to_string(), "2262-04-11T23:47:16.854775807Z");
        assert_eq!(Time(i64::MIN).to_string(), "1677-09-21T00:12:43.145224192Z");
    }
}
