//! The first bytes of one POST to a program that nobody declared: is it MCP?

use super::super::recognise::is_version;
use super::super::session::Session;
use super::super::stream::{Around, Stream};
use super::super::{Era, Limits, Output, Sender};
use super::body::End;
use super::head::{self, Kind};

/// Of a request; what is not known by then is told by its head alone.
pub const REQUEST_BYTES: usize = sensor_common::listener::LOOK_BYTES as usize;

/// What a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// It is not known yet.
    More,
    /// Nothing that is certainly MCP.
    Other,
    /// Its client wants to know whether this is an MCP server.
    Handshake(Era),
    /// Its client goes on: there is one.
    Mcp(Era),
}

/// `bytes`: all of the request that was seen, from its first on.
pub fn asked(bytes: &[u8]) -> Asked {
    let bytes = &bytes[..bytes.len().min(REQUEST_BYTES)];
    let full = bytes.len() == REQUEST_BYTES;
    let Some(end) = head::end(bytes, 0) else {
        return if full { Asked::Other } else { Asked::More };
    };
    let Some(head) = head::request(&bytes[..end]) else { return Asked::Other };
    if head.method != "POST" {
        return Asked::Other;
    }
    let by_head = || by_head(&head);
    let (Kind::Json, Some(mut framing)) = (head.common.kind, head.common.framing) else { return by_head() };
    let mut session = Session::new(Limits { candidate: true, ..Limits::default() });
    let mut stream = Stream::new(Sender::Client, &[0; 16]);
    let mut out = Vec::new();
    let mut around = Around { session: &mut session, values: &mut (), out: &mut out, at: 0 };
    let mut rest = &bytes[end..];
    let whole = loop {
        if framing.is_over() {
            break true;
        }
        if rest.is_empty() {
            break false;
        }
        let (data, used, end) = framing.take(rest);
        stream.body(data, &mut around);
        rest = &rest[used..];
        match end {
            End::No => {}
            End::Yes => break true,
            End::Broken => return Asked::Other,
        }
    };
    if whole {
        stream.end(&mut around);
    }
    let era = out.iter().find_map(|output| match output {
        Output::Recognised(era) => Some(*era),
        _ => None,
    });
    if let Some(era) = era {
        let method = out.iter().find_map(|output| match output {
            Output::Asked { method, .. } => Some(method.as_str()),
            _ => None,
        });
        return told(era, method);
    }
    match (whole || full, session.dismissed()) {
        (_, true) => Asked::Other,
        (true, _) => by_head(),
        (false, _) => Asked::More,
    }
}

fn told(era: Era, method: Option<&str>) -> Asked {
    match method {
        Some("initialize" | "server/discover") => Asked::Handshake(era),
        _ => Asked::Mcp(era),
    }
}

/// Headers that no other protocol has.
fn by_head(head: &head::RequestHead) -> Asked {
    let version = is_version(&head.protocol_version).then_some(head.protocol_version.as_str());
    if !head.mcp_method.is_empty() {
        told(Era::Modern, Some(&head.mcp_method))
    } else if version.is_some_and(|version| version >= "2026") {
        Asked::Mcp(Era::Modern)
    } else if version.is_some() || head.common.session.is_some() {
        Asked::Mcp(Era::Legacy)
    } else {
        Asked::Other
    }
}
