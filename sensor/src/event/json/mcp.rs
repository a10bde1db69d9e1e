//! JSON of what was said over a wire, and of the connections it went over.

use super::{Fields, direction_name};
use crate::event::pb;
use serde::ser::{Serialize, SerializeMap, Serializer};

/// Empty: not known.
pub fn era_name(era: pb::Era) -> &'static str {
    match era {
        pb::Era::Unspecified => "",
        pb::Era::Legacy => "legacy",
        pb::Era::Modern => "modern",
    }
}

pub fn outcome_name(outcome: pb::Outcome) -> &'static str {
    match outcome {
        pb::Outcome::Unspecified => "unknown",
        pb::Outcome::Ok => "ok",
        pb::Outcome::ToolError => "tool_error",
        pb::Outcome::RpcError => "rpc_error",
        pb::Outcome::Cancelled => "cancelled",
        pb::Outcome::NoResponse => "no_response",
        pb::Outcome::InputRequired => "input_required",
        pb::Outcome::Task => "task",
    }
}

/// Empty: not known.
pub fn sender_name(sender: pb::Sender) -> &'static str {
    match sender {
        pb::Sender::Unspecified => "",
        pb::Sender::Client => "client",
        pb::Sender::Server => "server",
    }
}

impl<M: SerializeMap> Fields<M> {
    fn exchange(&mut self, e: Option<&pb::Exchange>) -> Result<(), M::Error> {
        let none = pb::Exchange::default();
        let e = e.unwrap_or(&none);
        self.said(e)?;
        self.answered(e)?;
        self.content(e)
    }

    /// Who said what on which connection.
    fn said(&mut self, e: &pb::Exchange) -> Result<(), M::Error> {
        self.actor(e.actor.as_ref())?;
        if e.actor.as_ref().is_none_or(|a| a.client.is_none()) {
            self.always("client", &())?;
        }
        self.always("transport", &e.transport)?;
        self.always("connection", &e.connection)?;
        self.always("method", &e.method)?;
        self.text("sender", sender_name(e.sender()))?;
        self.always("id_hash", &e.id_hash)?;
        self.always("era", era_name(e.era()))?;
        self.text("protocol_version", &e.protocol_version)?;
        let said = SelfReported { client: e.client_info.as_ref(), server: e.server_info.as_ref() };
        if !said.is_empty() {
            self.always("self_reported", &said)?;
        }
        self.text("session_hash", &e.session_hash)?;
        self.always("request_bytes", &e.request_bytes)
    }

    fn answered(&mut self, e: &pb::Exchange) -> Result<(), M::Error> {
        self.always("outcome", outcome_name(e.outcome()))?;
        if e.outcome() == pb::Outcome::RpcError {
            self.always("error_code", &e.error_code)?;
        }
        self.always("response_bytes", &e.response_bytes)?;
        self.always("duration_ns", &e.duration_ns)?;
        self.number("progress", e.progress)
    }

    fn content(&mut self, e: &pb::Exchange) -> Result<(), M::Error> {
        self.text("request_content", &e.request_content)?;
        self.text("response_content", &e.response_content)?;
        self.number("unscanned_bytes", e.unscanned_bytes)
    }

    pub(super) fn tool_call(&mut self, t: &pb::ToolCall) -> Result<(), M::Error> {
        self.always("tool", &t.tool)?;
        self.exchange(t.exchange.as_ref())
    }

    pub(super) fn prompt(&mut self, p: &pb::Prompt) -> Result<(), M::Error> {
        self.always("name", &p.name)?;
        self.exchange(p.exchange.as_ref())
    }

    pub(super) fn resource(&mut self, r: &pb::Resource) -> Result<(), M::Error> {
        self.always("scheme", &r.scheme)?;
        self.always("host", &r.host)?;
        self.text("path_hash", &r.path_hash)?;
        self.exchange(r.exchange.as_ref())
    }

    pub(super) fn mcp_message(&mut self, m: &pb::McpMessage) -> Result<(), M::Error> {
        self.always("count", &m.count.max(1))?;
        match &m.exchange {
            Some(e) if is_notification(e) => {
                self.said(e)?;
                self.content(e)
            }
            other => self.exchange(other.as_ref()),
        }
    }

    pub(super) fn tools_listed(&mut self, t: &pb::ToolsListed) -> Result<(), M::Error> {
        self.exchange(t.exchange.as_ref())?;
        self.always("tools", &t.tools.iter().map(Tool).collect::<Vec<_>>())?;
        self.always("list_hash", &t.list_hash)?;
        self.text("capabilities_hash", &t.capabilities_hash)?;
        self.flag("incomplete", t.incomplete)
    }

    pub(super) fn drift(&mut self, d: &pb::Drift) -> Result<(), M::Error> {
        self.actor(d.actor.as_ref())?;
        self.always("what", &d.what)?;
        self.text("tool", &d.tool)?;
        self.list("parts", &d.parts)?;
        self.text("before", &d.before)?;
        self.text("after", &d.after)?;
        self.time("since", d.since_unix_ns)
    }

    pub(super) fn uninspected(&mut self, u: &pb::Uninspected) -> Result<(), M::Error> {
        self.actor(u.actor.as_ref())?;
        self.always("bytes", &u.bytes)?;
        self.always("how", &u.how)?;
        self.text("sender", sender_name(u.sender()))?;
        self.number("connection", u.connection)
    }

    pub(super) fn http(&mut self, h: &pb::HttpExchange) -> Result<(), M::Error> {
        self.actor(h.actor.as_ref())?;
        self.text("direction", direction_name(h.direction()))?;
        self.always("method", &h.method)?;
        self.always("path", &h.path)?;
        self.text("host", &h.host)?;
        self.always("status", &h.status)?;
        self.text("mcp_method", &h.mcp_method)?;
        self.text("mcp_name", &h.mcp_name)?;
        self.text("protocol_version", &h.protocol_version)?;
        self.text("session_hash", &h.session_hash)?;
        self.always("request_bytes", &h.request_bytes)?;
        self.always("response_bytes", &h.response_bytes)?;
        self.always("duration_ns", &h.duration_ns)?;
        if h.peer.is_some() {
            self.endpoint("peer", h.peer.as_ref())?;
        }
        self.number("cookie", h.cookie)
    }

    pub(super) fn connection_end(&mut self, c: &pb::ConnectionEnd) -> Result<(), M::Error> {
        self.actor(c.actor.as_ref())?;
        self.always("protocol", &c.protocol)?;
        self.text("direction", direction_name(c.direction()))?;
        self.endpoint("dst", c.dst.as_ref())?;
        if c.src.is_some() {
            self.endpoint("src", c.src.as_ref())?;
        }
        self.number("cookie", c.cookie)?;
        self.time("started", c.started_unix_ns)?;
        self.always("duration_ns", &c.duration_ns)?;
        self.always("bytes_sent", &c.bytes_sent)?;
        self.always("bytes_received", &c.bytes_received)?;
        self.always("packets_sent", &c.packets_sent)?;
        self.always("packets_received", &c.packets_received)?;
        self.always("outcome", &c.outcome)
    }
}

/// Nobody waits for an answer: it has no id and no outcome.
pub(crate) fn is_notification(e: &pb::Exchange) -> bool {
    e.id_hash.is_empty() && e.outcome() == pb::Outcome::Unspecified
}

/// What both sides say of themselves: set apart, so that nobody takes it for
/// an identity.
struct SelfReported<'a> {
    client: Option<&'a pb::Implementation>,
    server: Option<&'a pb::Implementation>,
}

impl SelfReported<'_> {
    fn is_empty(&self) -> bool {
        self.client.is_none() && self.server.is_none()
    }
}

impl Serialize for SelfReported<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut fields = Fields(s.serialize_map(None)?);
        for (key, said) in [("client_info", self.client), ("server_info", self.server)] {
            if let Some(said) = said {
                fields.always(key, &Implementation(said))?;
            }
        }
        fields.0.end()
    }
}

struct Implementation<'a>(&'a pb::Implementation);

impl Serialize for Implementation<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut fields = Fields(s.serialize_map(None)?);
        fields.always("name", &self.0.name)?;
        fields.always("version", &self.0.version)?;
        fields.0.end()
    }
}

struct Tool<'a>(&'a pb::Tool);

impl Serialize for Tool<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut fields = Fields(s.serialize_map(None)?);
        fields.always("name", &self.0.name)?;
        fields.always("hash", &self.0.hash)?;
        fields.always("description_hash", &self.0.description_hash)?;
        fields.always("schema_hash", &self.0.schema_hash)?;
        fields.0.end()
    }
}
