//! MCP over HTTP/1.1 in plain text: one TCP connection's bytes in, HTTP
//! exchanges and MCP messages out.
//!
//! Both transports: streamable HTTP (2025-03-26 on: POST to one endpoint, the
//! answer as JSON or as an event stream, `Mcp-Session-Id`) and HTTP+SSE
//! (2024-11-05: answers come over the event stream of another connection).
//! HTTP/1.1 after RFC 9112, event streams after WHATWG HTML section 9.2.

mod body;
mod candidate;
mod connection;
mod events;
mod exchange;
mod head;
mod server;
#[cfg(test)]
mod tests;

pub use candidate::{Candidate, Said};
pub use connection::HttpConnection;
pub use server::HttpServer;

use super::Output;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Streamable HTTP.
    Http,
    /// HTTP+SSE.
    Sse,
}

/// One HTTP request and its response. Texts are cut at 256 bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HttpExchange {
    pub method: String,
    /// Without query.
    pub path: String,
    pub host: String,
    /// 0: none came.
    pub status: u16,
    /// Keyed hash of the session: of `Mcp-Session-Id`, of an HTTP+SSE endpoint.
    pub session: Option<u64>,
    /// `MCP-Protocol-Version`, `Mcp-Method`, `Mcp-Name` of the request.
    pub protocol_version: String,
    pub mcp_method: String,
    pub mcp_name: String,
    /// Of the bodies, without chunks' framing.
    pub request_bytes: u64,
    pub response_bytes: u64,
    /// When the last byte of the request, of the response was moved.
    pub asked: i64,
    pub answered: i64,
}

#[derive(Clone, Debug, PartialEq)]
pub enum HttpOutput {
    /// This connection is not HTTP/1. Once, and nothing follows.
    NotHttp,
    /// The response is whole, or the connection over.
    Exchange(Box<HttpExchange>),
    /// `session` as in [`HttpExchange`]. Never [`Output::NotMcp`]: servers also
    /// serve other things.
    Mcp { transport: Transport, session: Option<u64>, output: Output },
}
