//! MCP as it goes over a wire: bytes in, what was said out. Nothing here does
//! IO or reads a clock; every size has a limit, and what is beyond it is
//! reported, never dropped in silence.
//!
//! Sources: MCP 2024-11-05, 2025-03-26, 2025-06-18, 2025-11-25 and 2026-07-28;
//! JSON-RPC 2.0; RFC 8259 (JSON), RFC 6901 (JSON pointer).

mod connection;
pub mod http;
mod json;
mod message;
mod reading;
mod recognise;
mod session;
mod stream;
#[cfg(test)]
mod tests;
mod value;

pub use connection::{Connection, Limits};
pub use session::Counters;
pub use value::sha256;
pub mod inventory;

/// Which side sent a message. Values as in `sensor_common::stdio`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sender {
    Client,
    Server,
}

/// The protocol's two eras: with and without `initialize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Era {
    Legacy,
    Modern,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Ok,
    /// A result with `isError: true`.
    ToolError,
    /// A JSON-RPC error, and its code.
    RpcError(i64),
    /// The asker took it back, and nothing had been answered. A response that
    /// still comes is counted, not a second end.
    Cancelled,
    /// The connection ended, or the request was forgotten to stay within bounds.
    NoResponse,
    InputRequired,
    Task,
}

/// Self-reported name and version, cut at 256 bytes each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Implementation {
    pub name: String,
    pub version: String,
}

/// What both sides have said of themselves on a connection so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parties {
    pub era: Option<Era>,
    pub protocol_version: String,
    pub client: Implementation,
    pub server: Implementation,
    /// SHA-256 of the client's capabilities in canonical JSON.
    pub client_capabilities: Option<[u8; 32]>,
}

/// One request and what became of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Exchange {
    pub method: String,
    /// Who asked.
    pub sender: Sender,
    /// Keyed hash of the id with its type: 1 and "1" differ.
    pub id_hash: u64,
    /// `params.name` of tools/call and prompts/get.
    pub name: String,
    /// `params.uri` of resources/read.
    pub uri: String,
    /// Bytes of the JSON texts, without framing.
    pub request_bytes: u64,
    pub response_bytes: u64,
    /// When the last byte of the request, of the response was moved: nanoseconds
    /// of the clock that the caller passes.
    pub asked: i64,
    pub answered: i64,
    pub outcome: Outcome,
    pub progress: u64,
    pub parties: Parties,
}

/// A message that expects no answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Notification {
    pub method: String,
    pub sender: Sender,
    pub bytes: u64,
    pub at: i64,
    pub parties: Parties,
}

/// A tool as a server listed it. Held only until it is hashed and looked at.
#[derive(Clone, Debug, PartialEq)]
pub struct ListedTool {
    pub name: String,
    /// The whole object; fields that differ by era (`_meta`, …) included.
    pub tool: serde_json::Value,
}

/// One page, or several that followed each other, of tools/list.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolsPage {
    /// The request had no cursor: a list begins.
    pub first: bool,
    /// The response had no `nextCursor`: the list is whole.
    pub last: bool,
    pub tools: Vec<ListedTool>,
    /// Tools, or parts of them, beyond what is kept.
    pub cut: bool,
}

/// What the bytes of a connection come to.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// First of all: this is MCP. Once per connection.
    Recognised(Era),
    /// It is certainly something else. Once, and nothing follows.
    NotMcp,
    /// A request was read whole; its [`Exchange`] follows when it has ended.
    /// For those who act on the request itself.
    Asked {
        method: String,
        sender: Sender,
        name: String,
        id_hash: u64,
        at: i64,
    },
    Ended(Box<Exchange>),
    Notified(Box<Notification>),
    Tools(Box<Exchange>, ToolsPage),
    /// Bytes that were not read, and why.
    Uninspected {
        sender: Sender,
        bytes: u64,
        how: &'static str,
    },
}

/// Looks at string values while they pass by. Implemented by `inspect`; a
/// connection calls it for values below `params`, `result` and `error`.
pub trait Values {
    /// False: no piece is wanted of the bytes at hand. Costs nothing then.
    fn wanted(&self) -> bool {
        true
    }
    /// A piece of the value at `place` (a JSON pointer below the message's
    /// root); unescaped UTF-8, pieces in order. `last` ends the value.
    fn piece(&mut self, place: &str, piece: &str, last: bool);
    /// The message that the values belonged to has ended. An answer has the
    /// method and the name of what was asked. No method: it broke off, or
    /// nobody is known to have asked.
    fn message(&mut self, sender: Sender, method: &str, name: &str);
}

/// Nobody looks.
impl Values for () {
    fn wanted(&self) -> bool {
        false
    }
    fn piece(&mut self, _: &str, _: &str, _: bool) {}
    fn message(&mut self, _: Sender, _: &str, _: &str) {}
}
