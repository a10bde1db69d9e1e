//! Heads of requests and responses.

use httparse::{EMPTY_HEADER, Header, Request, Response, Status};

use super::body::Framing;

/// Of a head; more is no HTTP that an MCP server speaks.
pub(super) const HEAD_BYTES: usize = 64 * 1024;
const HEADERS: usize = 128;
/// Of texts that are kept.
const TEXT_BYTES: usize = 256;

/// What a body's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Json,
    Events,
    /// JSON or events, compressed.
    Encoded,
    Other,
}

/// What both kinds of heads say.
#[derive(Clone, Debug)]
pub(super) struct Common {
    pub(super) framing: Option<Framing>,
    pub(super) kind: Kind,
    /// Whole: it is hashed, never kept.
    pub(super) session: Option<Vec<u8>>,
}

#[derive(Clone, Debug)]
pub(super) struct RequestHead {
    pub(super) method: String,
    /// Path and query.
    pub(super) target: String,
    pub(super) host: String,
    pub(super) protocol_version: String,
    pub(super) mcp_method: String,
    pub(super) mcp_name: String,
    pub(super) common: Common,
}

#[derive(Clone, Debug)]
pub(super) struct ResponseHead {
    pub(super) status: u16,
    pub(super) common: Common,
}

/// Where a head ends: behind its blank line. `from`: what was looked at before.
pub(super) fn end(head: &[u8], from: usize) -> Option<usize> {
    let from = from.saturating_sub(2);
    memchr::memchr_iter(b'\n', &head[from..]).map(|at| from + at).find_map(|at| match head[at + 1..] {
        [b'\n', ..] => Some(at + 2),
        [b'\r', b'\n', ..] => Some(at + 3),
        _ => None,
    })
}

pub(super) fn request(head: &[u8]) -> Option<RequestHead> {
    let mut headers = [EMPTY_HEADER; HEADERS];
    let mut request = Request::new(&mut headers);
    let Ok(Status::Complete(_)) = request.parse(head) else { return None };
    let target = request.path?;
    let headers = &*request.headers;
    let framing = match length(headers)? {
        // RFC 9112 6.3: a request without either has no body.
        None => Some(Framing::Length(0)),
        framing => framing,
    };
    Some(RequestHead {
        method: cut(request.method?.as_bytes()),
        target: origin(target).to_owned(),
        host: text(headers, "host"),
        protocol_version: text(headers, "mcp-protocol-version"),
        mcp_method: text(headers, "mcp-method"),
        mcp_name: text(headers, "mcp-name"),
        common: Common { framing, kind: kind(headers, b"application/json"), session: session(headers) },
    })
}

pub(super) fn response(head: &[u8]) -> Option<ResponseHead> {
    let mut headers = [EMPTY_HEADER; HEADERS];
    let mut response = Response::new(&mut headers);
    let Ok(Status::Complete(_)) = response.parse(head) else { return None };
    let headers = &*response.headers;
    Some(ResponseHead {
        status: response.code?,
        common: Common { framing: length(headers)?, kind: kind(headers, b""), session: session(headers) },
    })
}

/// Path and query of a target, which a proxy is given with scheme and host.
pub(super) fn origin(target: &str) -> &str {
    match target.split_once("://") {
        Some((scheme, rest)) if scheme.bytes().all(|byte| byte.is_ascii_alphanumeric()) => {
            rest.find(['/', '?']).map_or("/", |at| &rest[at..])
        }
        _ => target,
    }
}

fn values<'a>(headers: &'a [Header], name: &'a str) -> impl Iterator<Item = &'a [u8]> {
    headers.iter().filter(move |header| header.name.eq_ignore_ascii_case(name)).map(|header| header.value)
}

fn text(headers: &[Header], name: &str) -> String {
    values(headers, name).next().map_or(String::new(), cut)
}

pub(super) fn cut(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(TEXT_BYTES)]);
    text[..text.floor_char_boundary(TEXT_BYTES)].to_owned()
}

fn session(headers: &[Header]) -> Option<Vec<u8>> {
    values(headers, "mcp-session-id").next().map(<[u8]>::to_vec)
}

/// RFC 9112 6.3. Outer `None`: nobody can tell; inner: the head does not say.
fn length(headers: &[Header]) -> Option<Option<Framing>> {
    if let Some(coding) = values(headers, "transfer-encoding").last() {
        let last = coding.rsplit(|byte| *byte == b',').next().unwrap_or_default();
        return last.trim_ascii().eq_ignore_ascii_case(b"chunked").then(|| Some(Framing::chunked()));
    }
    let mut lengths = values(headers, "content-length").flat_map(|value| value.split(|byte| *byte == b','));
    let Some(length) = lengths.next().map(<[u8]>::trim_ascii) else { return Some(None) };
    if lengths.any(|other| other.trim_ascii() != length) || !length.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let length = std::str::from_utf8(length).ok()?.parse().ok()?;
    Some(Some(Framing::Length(length)))
}

/// Servers read a body without a type as JSON; clients do not.
fn kind(headers: &[Header], default: &[u8]) -> Kind {
    let content = values(headers, "content-type").next().unwrap_or(default);
    let content = content.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    let kind = if content.eq_ignore_ascii_case(b"text/event-stream") {
        Kind::Events
    } else if content.eq_ignore_ascii_case(b"application/json") {
        Kind::Json
    } else {
        return Kind::Other;
    };
    let coded = values(headers, "content-encoding")
        .chain(values(headers, "transfer-encoding"))
        .flat_map(|value| value.split(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii)
        .any(|coding| !coding.eq_ignore_ascii_case(b"identity") && !coding.eq_ignore_ascii_case(b"chunked"));
    if coded { Kind::Encoded } else { kind }
}
