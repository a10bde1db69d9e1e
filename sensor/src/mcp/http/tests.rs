use proptest::prelude::*;

use super::super::{Era, Limits, Outcome, Sender};
use super::*;

struct Host {
    server: HttpServer,
    connections: Vec<HttpConnection>,
    out: Vec<HttpOutput>,
}

impl Host {
    fn new() -> Self {
        let server = HttpServer::new([7; 16], Limits::default());
        Self { server, connections: vec![HttpConnection::new(), HttpConnection::new()], out: Vec::new() }
    }

    fn says(&mut self, connection: usize, sender: Sender, bytes: impl AsRef<[u8]>) -> &mut Self {
        let Self { server, connections, out } = self;
        connections[connection].bytes(sender, 0, bytes.as_ref(), server, &mut (), out);
        self
    }

    fn client(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        self.says(0, Sender::Client, bytes)
    }

    fn answers(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        self.says(0, Sender::Server, bytes)
    }

    fn close(&mut self) -> &mut Self {
        let Self { server, connections, out } = self;
        for connection in connections {
            connection.close(0, server, &mut (), out);
        }
        server.close(0, out);
        self
    }

    fn ends(&self) -> Vec<(Transport, &str, Outcome)> {
        let ends = self.out.iter().filter_map(|output| match output {
            HttpOutput::Mcp {
                transport,
                output: Output::Ended(exchange) | Output::Tools(exchange, _),
                ..
            } => Some((*transport, exchange.method.as_str(), exchange.outcome)),
            _ => None,
        });
        ends.collect()
    }

    fn exchanges(&self) -> Vec<&HttpExchange> {
        let exchanges = self.out.iter().filter_map(|output| match output {
            HttpOutput::Exchange(exchange) => Some(&**exchange),
            _ => None,
        });
        exchanges.collect()
    }

    fn unread(&self) -> Vec<(u64, &'static str)> {
        let unread = self.out.iter().filter_map(|output| match output {
            HttpOutput::Mcp { output: Output::Uninspected { bytes, how, .. }, .. } => Some((*bytes, *how)),
            _ => None,
        });
        unread.collect()
    }
}

const INITIALIZE: &str = r#"{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{},"clientInfo":{"name":"c","version":"1"}}}"#;
const INITIALIZED: &str = r#"{"jsonrpc":"2.0","id":0,"result":{"protocolVersion":"2025-06-18","capabilities":{},"serverInfo":{"name":"s","version":"2"}}}"#;
const CALL: &str = r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo"}}"#;
const RESULT: &str = r#"{"jsonrpc":"2.0","id":1,"result":{"content":[]}}"#;
const MODERN: &str = r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28"}}}"#;

fn post(path: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nHost: h:1\r\nContent-Type: application/json\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
    )
}

fn json(status: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json; charset=utf-8\r\n{headers}content-length: {length}\r\n\r\n{body}"
    )
}

fn chunked(pieces: &[&str]) -> String {
    let mut text = String::new();
    for piece in pieces {
        text += &format!("{:x};ext=1\r\n{piece}\r\n", piece.len());
    }
    text + "0\r\nTrailer: x\r\nOther: y\r\n\r\n"
}

fn stream(headers: &str, pieces: &[&str]) -> String {
    format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{headers}Transfer-Encoding: chunked\r\n\r\n{}",
        chunked(pieces)
    )
}

const SESSION: &str = "Mcp-Session-Id: abc\r\n";

#[test]
fn a_streamable_session_pairs_across_connections_and_event_streams() {
    let mut host = Host::new();
    host.client(post("/mcp?x=1", "", INITIALIZE)).answers(json("200 OK", SESSION, INITIALIZED));
    // The answer is an event in three lines of data, cut anywhere.
    host.says(
        1,
        Sender::Client,
        post("/mcp", &format!("{SESSION}MCP-Protocol-Version: 2025-06-18\r\n"), CALL),
    );
    host.says(
        1,
        Sender::Server,
        stream(
            "",
            &[
                ": hi\r\nid: 1\r\nevent: mess",
                "age\r\ndata: {\"jsonrpc\":\"2.0\",\ndata:\"id\":1,\rda",
                "ta: \"result\":{}}\r\n",
                "\r\n",
            ],
        ),
    );
    assert_eq!(
        host.ends(),
        [(Transport::Http, "initialize", Outcome::Ok), (Transport::Http, "tools/call", Outcome::Ok)]
    );
    let exchanges = host.exchanges();
    assert_eq!(exchanges.len(), 2);
    assert!(exchanges[0].session.is_some());
    assert_eq!(exchanges[0].session, exchanges[1].session);
    assert_eq!((exchanges[1].path.as_str(), exchanges[1].host.as_str()), ("/mcp", "h:1"));
    assert_eq!((exchanges[1].status, exchanges[1].protocol_version.as_str()), (200, "2025-06-18"));
    assert_eq!(exchanges[0].request_bytes, INITIALIZE.len() as u64);
    let recognised = |output: &&HttpOutput| {
        matches!(output, HttpOutput::Mcp { output: Output::Recognised(Era::Legacy), .. })
    };
    assert_eq!(host.out.iter().filter(recognised).count(), 1);
    // The parties were met on the other connection.
    let Some(HttpOutput::Mcp { output: Output::Ended(call), .. }) = host.out.iter().rev().nth(1) else {
        panic!("{:?}", host.out)
    };
    assert_eq!(call.parties.server.name, "s");
}

#[test]
fn an_sse_session_pairs_posts_with_the_stream_of_another_connection() {
    let mut host = Host::new();
    host.client("GET /sse HTTP/1.1\r\nHost: h\r\nAccept: text/event-stream\r\n\r\n");
    host.answers("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\nevent: endpoint\r\ndata: /messages/?session_id=f00\r\n\r\n");
    let accepted = "HTTP/1.1 202 Accepted\r\ncontent-length: 8\r\n\r\nAccepted";
    for body in [INITIALIZE, CALL] {
        host.says(1, Sender::Client, post("/messages/?session_id=f00", "", body)).says(
            1,
            Sender::Server,
            accepted,
        );
    }
    host.answers(format!("event: message\r\ndata: {INITIALIZED}\r\n\r\n"));
    assert_eq!(host.ends(), [(Transport::Sse, "initialize", Outcome::Ok)]);
    assert_eq!(host.unread(), []);
    // The session lives by its stream.
    host.close();
    assert_eq!(host.ends()[1..], [(Transport::Sse, "tools/call", Outcome::NoResponse)]);
    assert_eq!(host.exchanges().len(), 3);
}

#[test]
fn a_modern_exchange_needs_no_session() {
    let mut host = Host::new();
    let head = "Mcp-Method: tools/call\r\nMcp-Name: echo\r\nMCP-Protocol-Version: 2026-07-28\r\n";
    host.client(post("/", head, MODERN)).answers(json("200 OK", "", RESULT));
    // Ids of exchanges without a session have nothing to do with each other.
    host.client(post("/", head, MODERN)).says(1, Sender::Client, post("/", head, MODERN));
    host.says(1, Sender::Server, json("200 OK", "", RESULT)).answers(json("200 OK", "", RESULT));
    assert_eq!(host.ends(), [(Transport::Http, "tools/call", Outcome::Ok); 3]);
    let exchange = host.exchanges()[0];
    assert_eq!((exchange.mcp_method.as_str(), exchange.mcp_name.as_str()), ("tools/call", "echo"));
}

#[test]
fn a_refused_request_ends_without_an_answer() {
    let mut host = Host::new();
    let refused = "HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\nContent-Type: text/plain\r\n\r\nno";
    host.client(post("/mcp", "", INITIALIZE)).answers(refused);
    host.client(post("/mcp", SESSION, CALL)).answers(refused);
    assert_eq!(
        host.ends(),
        [
            (Transport::Http, "initialize", Outcome::NoResponse),
            (Transport::Http, "tools/call", Outcome::NoResponse)
        ]
    );
    assert!(host.exchanges().iter().all(|exchange| exchange.status == 401));
}

#[test]
fn an_error_without_an_id_is_about_the_request_it_answers() {
    let mut host = Host::new();
    let error = r#"{"jsonrpc":"2.0","error":{"code":-32000,"message":"no session"},"id":null}"#;
    host.client(post("/mcp", "", MODERN)).answers(json("400 Bad Request", "", error));
    host.client(post("/mcp", SESSION, CALL)).answers(json("400 Bad Request", "", error));
    assert_eq!(host.ends(), [(Transport::Http, "tools/call", Outcome::RpcError(-32000)); 2]);
}

#[test]
fn pipelined_requests_have_their_own_responses() {
    let mut host = Host::new();
    host.client(
        "HEAD / HTTP/1.1\r\n\r\n".to_owned()
            + "GET /a HTTP/1.1\r\n\r\n"
            + &post("/mcp", "Expect: 100-continue\r\n", MODERN),
    );
    host.answers("HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nHTTP/1.1 304 Not Modified\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n");
    host.answers(json("200 OK", "", RESULT));
    let exchanges = host.exchanges();
    let seen: Vec<_> = exchanges.iter().map(|e| (e.method.as_str(), e.path.as_str(), e.status)).collect();
    assert_eq!(seen, [("HEAD", "/", 200), ("GET", "/a", 304), ("POST", "/mcp", 200)]);
    assert_eq!(host.ends().len(), 1);
}

#[test]
fn compressed_answers_are_counted_and_end_their_requests() {
    let mut host = Host::new();
    host.client(post("/mcp", "", MODERN)).answers(json("200 OK", "Content-Encoding: gzip\r\n", "xxxxx"));
    assert_eq!(host.unread(), [(5, "encoded")]);
    assert_eq!(host.ends(), [(Transport::Http, "tools/call", Outcome::NoResponse)]);
}

#[test]
fn other_things_that_a_server_serves_are_not_mcp() {
    let mut host = Host::new();
    host.client(post("/api", "", r#"{"a":1}"#)).answers(json("200 OK", "", "[1,2]"));
    host.client("GET /page HTTP/1.1\r\n\r\n")
        .answers("HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>");
    host.close();
    assert_eq!(host.out.len(), 2, "{:?}", host.out);
    assert_eq!(host.exchanges()[1].response_bytes, 3);
}

#[test]
fn what_is_not_http_is_said_to_be_so_once() {
    for bytes in ["\u{16}\u{3}\u{1}", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "hello world"] {
        let mut host = Host::new();
        host.client(bytes).client(bytes).answers("x").close();
        assert_eq!(host.out, [HttpOutput::NotHttp], "{bytes}");
    }
}

#[test]
fn an_upgraded_connection_is_uninspected() {
    let mut host = Host::new();
    host.client(post("/mcp", "", MODERN)).answers(json("200 OK", "", RESULT));
    host.client("GET /ws HTTP/1.1\r\nUpgrade: websocket\r\n\r\n")
        .answers("HTTP/1.1 101 Switching Protocols\r\n\r\nabc");
    host.client("defg").close();
    assert_eq!(host.unread(), [(4, "upgrade"), (3, "upgrade")]);
}

#[test]
fn behind_a_gap_in_a_body_the_next_request_is_read() {
    let mut host = Host::new();
    let request = post("/mcp", "", MODERN);
    let (before, rest) = request.split_at(request.len() - 100);
    host.client(before);
    let Host { server, connections, out } = &mut host;
    connections[0].gap(Sender::Client, 0, 50, server, &mut (), out);
    host.client(&rest[50..]).answers(json("400 Bad Request", "", "{}"));
    host.client(post("/mcp", "", MODERN)).answers(json("200 OK", "", RESULT));
    assert_eq!(host.ends(), [(Transport::Http, "tools/call", Outcome::Ok)]);
    assert_eq!(host.exchanges()[0].request_bytes, MODERN.len() as u64);
}

#[test]
fn behind_any_other_gap_reading_goes_on_with_the_next_head() {
    let mut host = Host::new();
    host.client(post("/mcp", "", MODERN)).answers(json("200 OK", "", RESULT));
    host.client(post("/mcp", "", MODERN)).answers("HTTP/1.1 200 OK\r\nConte");
    for sender in [Sender::Client, Sender::Server] {
        let Host { server, connections, out } = &mut host;
        connections[0].gap(sender, 0, 5, server, &mut (), out);
    }
    host.client("arguments").answers("HTTP?");
    host.client(post("/mcp", "", MODERN)).answers(json("200 OK", "", RESULT)).close();
    let outcomes: Vec<_> = host.ends().into_iter().map(|(_, _, outcome)| outcome).collect();
    assert_eq!(outcomes, [Outcome::Ok, Outcome::NoResponse, Outcome::Ok]);
    assert_eq!(host.unread(), [(9, "garbage"), (27, "garbage")]);
    let statuses: Vec<_> = host.exchanges().iter().map(|exchange| exchange.status).collect();
    assert_eq!(statuses, [200, 0, 200]);
}

#[test]
fn a_connection_met_in_the_middle_is_read_from_the_next_request_on() {
    let mut host = Host::new();
    for sender in [Sender::Client, Sender::Server] {
        let Host { server, connections, out } = &mut host;
        connections[0].gap(sender, 0, 0, server, &mut (), out);
    }
    host.client("rest of a body").answers(json("200 OK", "", RESULT));
    host.client(post("/mcp", "", MODERN)).answers(json("200 OK", "", RESULT)).close();
    assert_eq!(host.ends(), [(Transport::Http, "tools/call", Outcome::Ok)]);
    assert_eq!(
        host.exchanges().iter().map(|exchange| exchange.method.as_str()).collect::<Vec<_>>(),
        ["", "POST"]
    );
}

#[test]
fn requests_whose_responses_are_lost_are_bounded() {
    let mut host = Host::new();
    let Host { server, connections, out } = &mut host;
    connections[0].gap(Sender::Server, 0, 5, server, &mut (), out);
    for _ in 0..100 {
        host.client(post("/mcp", "", MODERN));
    }
    assert_eq!(host.ends().len(), 100 - 64);
    assert_eq!(host.close().ends().len(), 100);
}

#[test]
fn sessions_are_bounded() {
    let mut host = Host::new();
    for id in 0..1100 {
        host.client(post("/mcp", &format!("Mcp-Session-Id: {id}\r\n"), CALL));
        host.answers("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 0\r\n\r\n");
    }
    assert_eq!(host.server.ended_early(), 1100 - 1024);
    assert_eq!(host.close().ends().len(), 1100);
}

/// What one side says, to be read by people.
#[derive(Clone)]
struct Said(Sender, Vec<u8>);

impl std::fmt::Debug for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{:?}: {}", self.0, self.1.escape_ascii())
    }
}

fn conversation() -> impl Strategy<Value = Vec<Said>> {
    let session = prop_oneof![Just(""), Just(SESSION), Just("Content-Encoding: gzip\r\n")];
    let body = prop_oneof![Just(INITIALIZE), Just(CALL), Just(MODERN), Just("{\"a\""), Just("")];
    let request = prop_oneof![
        6 => (prop_oneof![Just("/mcp"), Just("/m?s=1")], session.clone(), body)
            .prop_map(|(path, headers, body)| post(path, headers, body)),
        1 => Just("GET /sse HTTP/1.1\nHost: x\n\n".to_owned()),
        1 => Just(format!("DELETE /mcp HTTP/1.1\r\n{SESSION}\r\n")),
        1 => Just(format!("POST /mcp HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{}", chunked(&[&CALL[..9], &CALL[9..]]))),
        1 => "[A-Z]{1,3} [ -~\r\n]{0,12}".prop_map(|text| text),
    ];
    let answer = prop_oneof![Just(INITIALIZED), Just(RESULT), Just("[1]"), Just("")];
    let events = "(data|event|id|)(:| :|: |)(endpoint|message|/m\\?s=1|\\{\"jsonrpc\":\"2.0\"|,\"id\":1,\"result\":\\{\\}\\}|)(\r\n|\n|\r|\n\n)";
    let response = prop_oneof![
        6 => (prop_oneof![Just("200 OK"), Just("401 No"), Just("202 Accepted")], session, answer)
            .prop_map(|(status, headers, body)| json(status, headers, body)),
        3 => proptest::collection::vec(events, 1..8).prop_map(|events| {
            let events: Vec<_> = events.iter().map(String::as_str).collect();
            stream("", &events)
        }),
        1 => Just("HTTP/1.1 204 None\r\n\r\n".to_owned()),
        1 => Just("HTTP/1.1 100 Continue\r\n\r\n".to_owned()),
        1 => Just("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: {}\n\n".to_owned()),
        1 => "HTTP/1.1 [ -~\r\n]{0,12}".prop_map(|text| text),
    ];
    let said = prop_oneof![
        request.prop_map(|text| Said(Sender::Client, text.into_bytes())),
        response.prop_map(|text| Said(Sender::Server, text.into_bytes())),
    ];
    proptest::collection::vec(said, 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn any_chunking_gives_the_same(
        conversation in conversation(),
        sizes in proptest::collection::vec(prop_oneof![1..4_usize, 1..200_usize], 1..20),
    ) {
        let mut whole = Host::new();
        for Said(sender, bytes) in &conversation {
            whole.says(0, *sender, bytes);
        }
        let mut cut = Host::new();
        let mut sizes = sizes.iter().cycle();
        for Said(sender, bytes) in &conversation {
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let (now, later) = rest.split_at((*sizes.next().unwrap()).min(rest.len()));
                cut.says(0, *sender, now);
                rest = later;
            }
        }
        prop_assert_eq!(&whole.close().out, &cut.close().out);
    }
}
