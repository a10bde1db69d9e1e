use super::*;

mod any_chunking;
mod facts;
mod hostile;
mod pairing;
mod recognition;

/// What a whole conversation comes to, and the values that were shown.
struct Talk {
    connection: Connection,
    out: Vec<Output>,
    shown: Shown,
    at: i64,
}

#[derive(Default)]
struct Shown {
    values: Vec<(String, String)>,
    open: String,
    messages: Vec<(Sender, String, String)>,
}

impl Values for Shown {
    fn piece(&mut self, place: &str, piece: &str, last: bool) {
        self.open.push_str(piece);
        if last {
            self.values.push((place.to_owned(), std::mem::take(&mut self.open)));
        }
    }

    fn message(&mut self, sender: Sender, method: &str, name: &str) {
        self.open.clear();
        self.messages.push((sender, method.to_owned(), name.to_owned()));
    }
}

impl Talk {
    fn new(candidate: bool) -> Self {
        let limits = Limits { candidate, ..Limits::default() };
        Self { connection: Connection::new([7; 16], limits), out: Vec::new(), shown: Shown::default(), at: 0 }
    }

    fn says(&mut self, sender: Sender, bytes: impl AsRef<[u8]>) -> &mut Self {
        self.at += 10;
        self.connection.bytes(sender, self.at, bytes.as_ref(), &mut self.shown, &mut self.out);
        self
    }

    fn client(&mut self, line: &str) -> &mut Self {
        self.says(Sender::Client, format!("{line}\n"))
    }

    fn server(&mut self, line: &str) -> &mut Self {
        self.says(Sender::Server, format!("{line}\n"))
    }

    fn close(&mut self) -> &mut Self {
        self.connection.close(self.at + 1, &mut self.shown, &mut self.out);
        self
    }

    fn ends(&self) -> Vec<(&str, &str, Outcome)> {
        self.out
            .iter()
            .filter_map(|output| match output {
                Output::Ended(exchange) | Output::Tools(exchange, _) => {
                    Some((exchange.method.as_str(), exchange.name.as_str(), exchange.outcome))
                }
                _ => None,
            })
            .collect()
    }
}

const INITIALIZE: &str = r#"{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{"roots":{}},"clientInfo":{"name":"c","version":"1"}}}"#;
const INITIALIZED: &str = r#"{"result":{"protocolVersion":"2025-06-18","capabilities":{},"serverInfo":{"name":"s","version":"2"}},"jsonrpc":"2.0","id":0}"#;

const CALL: &str = r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","arguments":{"a":["x\u00e9"]}}}"#;
const FAILED: &str =
    r#"{"result":{"content":[{"type":"text","text":"hi"}],"isError":true},"jsonrpc":"2.0","id":1}"#;

#[test]
fn a_legacy_session_pairs_its_call_and_knows_both_parties() {
    let mut talk = Talk::new(true);
    talk.client(INITIALIZE).server(INITIALIZED);
    talk.client(r#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#);
    talk.client(CALL);
    talk.server(FAILED);
    talk.close();
    assert_eq!(talk.out[0], Output::Recognised(Era::Legacy));
    assert_eq!(talk.ends(), [("initialize", "", Outcome::Ok), ("tools/call", "echo", Outcome::ToolError)]);
    let Some(Output::Ended(call)) = talk.out.last() else { panic!("{:?}", talk.out) };
    assert_eq!(call.parties.server, Implementation { name: "s".into(), version: "2".into() });
    assert_eq!(call.parties.client, Implementation { name: "c".into(), version: "1".into() });
    assert_eq!((call.request_bytes, call.response_bytes), (CALL.len() as u64, FAILED.len() as u64));
    assert!(talk.shown.values.contains(&("/params/arguments/a/0".into(), "xé".into())));
    assert!(talk.shown.values.contains(&("/result/content/0/text".into(), "hi".into())));
    assert_eq!(talk.shown.messages.last(), Some(&(Sender::Server, "tools/call".into(), "echo".into())));
}
