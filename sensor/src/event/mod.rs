//! Events inside the agent: what they are about, the bus that numbers and
//! distributes them, their JSON form and the file they may be written to.

mod buffer;
pub mod bus;
pub mod file;
pub mod json;
pub mod ledger;
pub mod ndjson;
pub mod text;

pub use bus::{Bus, Identity, Limits, Subscriber};
pub use mcp_sensor_proto::v1 as pb;
pub use mcp_sensor_proto::v1::Event;
pub use mcp_sensor_proto::v1::event::Body;

use prost::Message as _;
use std::time::{SystemTime, UNIX_EPOCH};

/// What may be dropped first when a reader is slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Denials, losses, findings and the sensor's own state.
    Essential,
    Telemetry,
}

/// The verdict of a body that is one.
pub fn decision(body: &Body) -> Option<&pb::Decision> {
    match body {
        Body::Connection(c) => c.decision.as_ref(),
        Body::Socket(s) => s.decision.as_ref(),
        Body::UnixConnection(u) => u.decision.as_ref(),
        Body::Access(a) => a.decision.as_ref(),
        Body::Dns(d) => d.decision.as_ref(),
        _ => None,
    }
}

/// The labelled process that a body is about.
pub fn actor(body: &Body) -> Option<&pb::Actor> {
    match body {
        Body::Connection(c) => c.actor.as_ref(),
        Body::Socket(s) => s.actor.as_ref(),
        Body::UnixConnection(u) => u.actor.as_ref(),
        Body::Access(a) => a.actor.as_ref(),
        Body::Dns(d) => d.actor.as_ref(),
        Body::Exec(e) => e.actor.as_ref(),
        Body::InstanceStarted(i) => i.actor.as_ref(),
        Body::InstanceEnded(i) => i.actor.as_ref(),
        Body::Drift(d) => d.actor.as_ref(),
        Body::Uninspected(u) => u.actor.as_ref(),
        Body::Http(h) => h.actor.as_ref(),
        Body::ConnectionEnd(c) => c.actor.as_ref(),
        Body::ToolCall(_)
        | Body::Prompt(_)
        | Body::Resource(_)
        | Body::McpMessage(_)
        | Body::ToolsListed(_) => exchange(body).and_then(|e| e.actor.as_ref()),
        Body::Loss(_) | Body::PolicyChange(_) | Body::SensorState(_) | Body::Finding(_) => None,
    }
}

/// The MCP request or notification that a body is about.
pub fn exchange(body: &Body) -> Option<&pb::Exchange> {
    match body {
        Body::ToolCall(t) => t.exchange.as_ref(),
        Body::Prompt(p) => p.exchange.as_ref(),
        Body::Resource(r) => r.exchange.as_ref(),
        Body::McpMessage(m) => m.exchange.as_ref(),
        Body::ToolsListed(t) => t.exchange.as_ref(),
        _ => None,
    }
}

/// The server that a body is about, empty if it is about none.
pub fn server(body: &Body) -> &str {
    match body {
        Body::PolicyChange(p) => &p.server,
        Body::Finding(f) => &f.server,
        _ => actor(body).map_or("", |a| &a.server),
    }
}

pub fn class(body: &Body) -> Class {
    match body {
        Body::Connection(_) | Body::Socket(_) | Body::UnixConnection(_) | Body::Access(_) | Body::Dns(_) => {
            let denial = |d: &pb::Decision| d.verdict() != pb::Verdict::Allow;
            if decision(body).is_none_or(denial) { Class::Essential } else { Class::Telemetry }
        }
        Body::Exec(_)
        | Body::InstanceStarted(_)
        | Body::InstanceEnded(_)
        | Body::ToolCall(_)
        | Body::Prompt(_)
        | Body::Resource(_)
        | Body::McpMessage(_)
        | Body::ToolsListed(_)
        | Body::Http(_)
        | Body::ConnectionEnd(_) => Class::Telemetry,
        Body::Loss(_)
        | Body::PolicyChange(_)
        | Body::SensorState(_)
        | Body::Finding(_)
        | Body::Drift(_)
        | Body::Uninspected(_) => Class::Essential,
    }
}

/// A denial, whether it was enforced or only would have been.
pub fn is_denial(body: &Body) -> bool {
    decision(body).is_some_and(|d| matches!(d.verdict(), pb::Verdict::Deny | pb::Verdict::WouldDeny))
}

/// UTC now, in the unit of [`Event::time_unix_ns`].
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// About what an event takes in memory, bytes. A server chooses how many
/// arguments it has, and short ones take far more than they spell.
pub fn weight(event: &Event) -> usize {
    /// What an allocator adds to some twenty strings.
    const STRINGS: usize = 400;
    const ARGUMENT: usize = 64;
    // A tool: its name and three hashes.
    let strings = match &event.body {
        Some(Body::Exec(e)) => e.argv.len(),
        Some(Body::InstanceStarted(i)) => i.argv.len(),
        Some(Body::ToolsListed(t)) => 4 * t.tools.len(),
        Some(Body::Drift(d)) => d.parts.len(),
        _ => 0,
    };
    let client = event.body.as_ref().and_then(actor).and_then(|a| a.client.as_ref());
    let arguments = strings + client.map_or(0, |c| c.argv.len());
    let boxed = event.body.as_ref().and_then(exchange).map_or(0, |_| size_of::<pb::ToolsListed>());
    size_of::<Event>() + boxed + event.encoded_len() + STRINGS + ARGUMENT * arguments
}

const _: () = assert!(size_of::<Event>() <= 704);
