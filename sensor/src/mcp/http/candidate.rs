//! The first bytes of one POST to a program that nobody declared, and of the
//! answer: is it MCP?

use super::super::recognise::is_version;
use super::super::session::Session;
use super::super::stream::{Around, Stream};
use super::super::{Era, Limits, Outcome, Output, Sender};
use super::body::End;
use super::head::{self, Kind};
use super::{HttpConnection, HttpOutput, HttpServer};

/// Of a request; what is not known by then is told by its head alone.
const REQUEST_BYTES: usize = sensor_common::listener::LOOK_BYTES as usize;

/// What an exchange is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// It is not known yet.
    More,
    /// Nothing that is certainly MCP.
    Other,
    Mcp(Era),
}

/// A request that is being read, and its answer.
#[derive(Debug, Default)]
pub struct Candidate {
    request: Vec<u8>,
    asked: Option<Box<Exchange>>,
}

#[derive(Debug)]
struct Exchange {
    era: Era,
    /// Whoever looks for MCP servers asks that of others, too.
    handshake: bool,
    connection: HttpConnection,
    server: HttpServer,
    read: usize,
}

impl Candidate {
    /// `position`: where in the request, or in the answer, these bytes stand;
    /// what comes before must have been given.
    pub fn bytes(&mut self, sender: Sender, position: usize, bytes: &[u8]) -> Said {
        match (sender, &mut self.asked) {
            (Sender::Client, None) => self.request(position, bytes),
            (Sender::Server, Some(exchange)) => exchange.answer(position, bytes),
            // The rest of a request; an answer before its request was whole.
            (Sender::Client, Some(_)) => Said::More,
            (Sender::Server, None) => Said::Other,
        }
    }

    fn request(&mut self, position: usize, bytes: &[u8]) -> Said {
        if self.request.len() != position {
            return Said::Other;
        }
        let room = REQUEST_BYTES - position;
        self.request.extend_from_slice(&bytes[..bytes.len().min(room)]);
        let (era, handshake) = match asked(&self.request) {
            Asked::Other => return Said::Other,
            Asked::More => return Said::More,
            Asked::Mcp(era) => (era, false),
            Asked::Handshake(era) => (era, true),
        };
        let mut connection = HttpConnection::new();
        let mut server = HttpServer::new([0; 16], Limits::default());
        let request = std::mem::take(&mut self.request);
        connection.bytes(Sender::Client, 0, &request, &mut server, &mut (), &mut Vec::new());
        self.asked = Some(Box::new(Exchange { era, handshake, connection, server, read: 0 }));
        Said::More
    }
}

impl Exchange {
    /// A handshake must have a result; of all else, that it is not refused tells
    /// enough, since answers may come over another connection.
    fn answer(&mut self, position: usize, bytes: &[u8]) -> Said {
        const STATUS: usize = "HTTP/1.1 ".len();
        if position == 0 {
            self.read = 0;
            match bytes.get(STATUS) {
                // Another follows.
                Some(b'1') => {}
                Some(b'2') if !self.handshake => return Said::Mcp(self.era),
                Some(b'2') => {}
                _ => return Said::Other,
            }
        }
        if self.read != position {
            return Said::Other;
        }
        self.read += bytes.len();
        let mut out = Vec::new();
        self.connection.bytes(Sender::Server, 0, bytes, &mut self.server, &mut (), &mut out);
        let outcome = out.iter().find_map(|output| match output {
            HttpOutput::Mcp { output: Output::Ended(exchange), .. } => Some(exchange.outcome),
            _ => None,
        });
        match outcome {
            None => Said::More,
            Some(Outcome::Ok) => Said::Mcp(self.era),
            Some(_) => Said::Other,
        }
    }
}

/// What a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    More,
    Other,
    /// Its client wants to know whether this is an MCP server.
    Handshake(Era),
    /// Its client goes on: there is one.
    Mcp(Era),
}

/// `bytes`: all of the request that was seen, from its first on.
fn asked(bytes: &[u8]) -> Asked {
    let full = bytes.len() >= REQUEST_BYTES;
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const INITIALIZE: &str = r#"{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{},"clientInfo":{"name":"c","version":"1"}}}"#;
    const INITIALIZED: &str = r#"{"jsonrpc":"2.0","id":0,"result":{"protocolVersion":"2025-06-18","capabilities":{},"serverInfo":{"name":"s","version":"2"}}}"#;
    const DISCOVER: &str = r#"{"jsonrpc":"2.0","id":"d","method":"server/discover","params":{}}"#;
    const LIST: &str = r#"{"jsonrpc":"2.0","id":5,"method":"tools/list"}"#;
    const PING: &str = r#"{"jsonrpc":"2.0","id":5,"method":"ping"}"#;
    const REFUSED: &str = r#"{"jsonrpc":"2.0","id":0,"error":{"code":-32601,"message":"no"}}"#;

    fn post(headers: &str, body: &str) -> String {
        let length = body.len();
        format!("POST /mcp HTTP/1.1\r\nHost: h\r\n{headers}Content-Length: {length}\r\n\r\n{body}")
    }

    fn answer(status: &str, body: &str) -> String {
        let length = body.len();
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        )
    }

    fn read(candidate: &mut Candidate, sender: Sender, bytes: &[u8], size: usize) -> Said {
        let mut position = 0;
        for piece in bytes.chunks(size) {
            match candidate.bytes(sender, position, piece) {
                Said::More => position += piece.len(),
                said => return said,
            }
        }
        Said::More
    }

    fn said(request: &str, answer: &str) -> Said {
        let mut candidate = Candidate::default();
        match read(&mut candidate, Sender::Client, request.as_bytes(), usize::MAX) {
            Said::More => read(&mut candidate, Sender::Server, answer.as_bytes(), usize::MAX),
            said => said,
        }
    }

    #[test]
    fn a_handshake_is_known_by_its_result() {
        let (initialize, ok) = (post("", INITIALIZE), answer("200 OK", INITIALIZED));
        assert_eq!(said(&initialize, &ok), Said::Mcp(Era::Legacy));
        let event = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nMcp-Session-Id: a\r\n\r\nevent: message\ndata: {INITIALIZED}\n\n"
        );
        assert_eq!(said(&initialize, &event), Said::Mcp(Era::Legacy));
        assert_eq!(said(&initialize, &format!("HTTP/1.1 100 Continue\r\n\r\n{ok}")), Said::Mcp(Era::Legacy));
        let discovered = answer("200 OK", &INITIALIZED.replace("\"id\":0", "\"id\":\"d\""));
        assert_eq!(said(&post("", DISCOVER), &discovered), Said::Mcp(Era::Modern));
    }

    #[test]
    fn a_handshake_that_is_refused_is_none() {
        let initialize = post("", INITIALIZE);
        for refusal in
            [answer("200 OK", REFUSED), answer("404 Not Found", INITIALIZED), answer("400 Bad", "")]
        {
            assert_eq!(said(&initialize, &refusal), Said::Other, "{refusal}");
        }
        // What answers everything with something.
        assert_ne!(said(&initialize, &answer("200 OK", "{}")), Said::Mcp(Era::Legacy));
        assert_eq!(said(&initialize, "SSH-2.0-x"), Said::Other);
    }

    #[test]
    fn a_client_that_goes_on_tells_by_its_body_or_its_head() {
        let accepted = "HTTP/1.1 202 Accepted\r\n\r\n";
        for (request, era) in [
            (post("", LIST), Era::Legacy),
            (post("MCP-Protocol-Version: 2025-06-18\r\n", PING), Era::Legacy),
            (post("Mcp-Session-Id: 7\r\n", PING), Era::Legacy),
            (post("Mcp-Method: tools/call\r\n", PING), Era::Modern),
            (post("mcp-protocol-version: 2026-07-28\r\nContent-Encoding: gzip\r\n", "?"), Era::Modern),
            // Too long to be read to its end.
            (post("Mcp-Method: tools/call\r\n", &format!("[{}", "7,".repeat(9000))), Era::Modern),
        ] {
            assert_eq!(said(&request, accepted), Said::Mcp(era), "{request}");
            assert_eq!(said(&request, "HTTP/1.1 404 Not Found\r\n\r\n"), Said::Other, "{request}");
        }
    }

    #[test]
    fn other_requests_are_not_mcp() {
        for request in [
            post("", r#"{"jsonrpc":"2.0","id":1,"method":"eth_call","params":[]}"#),
            post("", r#"{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"rootUri":null}}"#),
            post("", PING),
            post("", r#"{"query":"{ me { name } }"}"#),
            post("", "a=b"),
            post("Content-Type: application/x-www-form-urlencoded\r\n", LIST),
            post("MCP-Protocol-Version: 1\r\n", "{}"),
            LIST.to_owned() + &"\n".repeat(REQUEST_BYTES),
            post("", INITIALIZE).replace("POST", "PUT"),
            post("", &"x".repeat(2 * REQUEST_BYTES)),
            "POST ".to_owned() + &"/".repeat(2 * REQUEST_BYTES),
        ] {
            assert_eq!(said(&request, &answer("200 OK", INITIALIZED)), Said::Other, "{request}");
        }
    }

    #[test]
    fn a_gap_ends_the_look() {
        let request = post("", LIST);
        let mut candidate = Candidate::default();
        assert_eq!(candidate.bytes(Sender::Client, 0, &request.as_bytes()[..30]), Said::More);
        assert_eq!(candidate.bytes(Sender::Client, 40, &request.as_bytes()[40..]), Said::Other);
        // An answer before the request was read.
        assert_eq!(Candidate::default().bytes(Sender::Server, 0, b"HTTP/1.1 200 OK"), Said::Other);
    }

    proptest! {
        #[test]
        fn any_chunking_says_the_same(
            body in prop_oneof![Just(INITIALIZE), Just(LIST), Just(PING), Just(REFUSED), Just("[")],
            headers in prop_oneof![Just(""), Just("Mcp-Method: a\r\n"), Just("Transfer-Encoding: chunked\r\n")],
            reply in prop_oneof![Just(INITIALIZED), Just(REFUSED), Just("{}")],
            sizes in (1..300_usize, 12..300_usize),
        ) {
            let (request, reply) = (post(headers, body), answer("200 OK", reply));
            let mut candidate = Candidate::default();
            let cut = match read(&mut candidate, Sender::Client, request.as_bytes(), sizes.0) {
                Said::More => read(&mut candidate, Sender::Server, reply.as_bytes(), sizes.1),
                said => said,
            };
            prop_assert_eq!(cut, said(&request, &reply));
        }

        #[test]
        fn any_bytes_are_read(pieces in proptest::collection::vec((any::<bool>(), 0..3_usize, any::<Vec<u8>>()), 0..20)) {
            let mut candidate = Candidate::default();
            let mut positions = [0; 2];
            for (client, skip, bytes) in pieces {
                let sender = if client { Sender::Client } else { Sender::Server };
                let position = &mut positions[usize::from(client)];
                let _ = candidate.bytes(sender, *position + skip, &bytes);
                *position += bytes.len();
            }
        }
    }
}
