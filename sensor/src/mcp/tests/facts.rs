//! What is read of a message is what `serde_json` reads of it.

use std::hash::Hasher;

use proptest::prelude::*;
use serde_json::Value;
use siphasher::sip::SipHasher13;

use super::super::json::{Lexer, Step};
use super::super::message::{Facts, Id, Params, ParamsMeta, Reply, Tools, Version, integer};
use super::super::reading::Reading;
use super::super::session::Session;
use super::super::stream::Around;
use super::*;

const KEY: [u8; 16] = [7; 16];

#[derive(Clone, Debug)]
enum Json {
    Scalar(String),
    Text(String),
    Array(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    /// `odd` says which characters are escaped and where blanks stand.
    fn write(&self, to: &mut String, odd: &mut dyn FnMut() -> u8) {
        if odd().is_multiple_of(8) {
            to.push_str(" \t\r\n ");
        }
        match self {
            Self::Scalar(scalar) => to.push_str(scalar),
            Self::Text(text) => quote(text, to, odd),
            Self::Array(items) => {
                to.push('[');
                for (index, item) in items.iter().enumerate() {
                    to.push_str(if index > 0 { "," } else { "" });
                    item.write(to, odd);
                }
                to.push(']');
            }
            Self::Object(members) => {
                to.push('{');
                for (index, (name, value)) in members.iter().enumerate() {
                    to.push_str(if index > 0 { " ," } else { "" });
                    quote(name, to, odd);
                    to.push_str(": ");
                    value.write(to, odd);
                }
                to.push('}');
            }
        }
    }
}

fn quote(text: &str, to: &mut String, odd: &mut dyn FnMut() -> u8) {
    to.push('"');
    for character in text.chars() {
        if odd().is_multiple_of(6) || character < ' ' || matches!(character, '"' | '\\') {
            for unit in character.encode_utf16(&mut [0; 2]) {
                to.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            to.push(character);
        }
    }
    to.push('"');
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        6 => prop::sample::select(vec![
            "jsonrpc", "id", "method", "params", "result", "error", "name", "uri", "cursor", "requestId",
            "progressToken", "protocolVersion", "capabilities", "clientInfo", "_meta", "version", "serverInfo",
            "isError", "resultType", "task", "tools", "nextCursor", "code",
            "io.modelcontextprotocol/protocolVersion", "io.modelcontextprotocol/clientInfo",
            "io.modelcontextprotocol/clientCapabilities", "io.modelcontextprotocol/serverInfo",
        ]).prop_map(str::to_owned),
        1 => "[a-zé~/\"😀]{0,4}",
    ]
}

fn json() -> impl Strategy<Value = Json> {
    let leaf = prop_oneof![
        prop::sample::select(vec![
            "null",
            "true",
            "false",
            "0",
            "-1",
            "1.0",
            "1e2",
            "1.5",
            "-0",
            "12345678901234567890"
        ])
        .prop_map(|scalar| Json::Scalar(scalar.to_owned())),
        prop::sample::select(vec!["2.0", "2025-06-18", "tools/list", "task", "1", ""])
            .prop_map(|text| Json::Text(text.to_owned())),
        "[a-zé€😀\"\\\\\u{1}/]{0,6}".prop_map(Json::Text),
    ];
    leaf.prop_recursive(4, 60, 8, |inner| {
        prop_oneof![
            1 => proptest::collection::vec(inner.clone(), 0..4).prop_map(Json::Array),
            3 => proptest::collection::vec((name(), inner), 0..8).prop_map(Json::Object),
        ]
    })
}

fn hashed(parts: &[&[u8]]) -> Id {
    let mut hasher = SipHasher13::new_with_key(&KEY);
    parts.iter().for_each(|part| hasher.write(part));
    Id::Of(hasher.finish())
}

fn id(value: Option<&Value>) -> Id {
    match value {
        None => Id::Absent,
        Some(Value::String(text)) => hashed(&[b"s", text.as_bytes()]),
        Some(Value::Number(number)) => match integer(&number.to_string()) {
            Some(integer) => hashed(&[b"i", &integer.to_le_bytes()]),
            None => {
                let Id::Of(text) = hashed(&[number.to_string().as_bytes()]) else { unreachable!() };
                hashed(&[b"n", &text.to_le_bytes()])
            }
        },
        Some(_) => Id::Null,
    }
}

fn text(value: &Value, name: &str) -> String {
    value[name].as_str().unwrap_or_default().to_owned()
}

fn version(value: &Value, number: bool) -> Version {
    match value {
        Value::String(text) => Version::Text(text.clone()),
        Value::Number(_) if number => Version::Other,
        _ => Version::Absent,
    }
}

fn info(value: &Value) -> Option<Implementation> {
    value.is_object().then(|| Implementation { name: text(value, "name"), version: text(value, "version") })
}

fn hash(value: &Value) -> Option<Option<[u8; 32]>> {
    value.is_object().then(|| Some(sha256(value)))
}

fn oracle(message: &Value) -> Facts {
    let params = &message["params"];
    let meta = &params["_meta"];
    let result = &message["result"];
    Facts {
        rpc: message["jsonrpc"] == "2.0",
        id: id(message.get("id")),
        method: message["method"].as_str().map(str::to_owned),
        params: Params {
            name: text(params, "name"),
            uri: text(params, "uri"),
            cursor: params["cursor"].is_string(),
            request: id(params.get("requestId")),
            progress: id(params.get("progressToken")),
            version: version(&params["protocolVersion"], true),
            client: info(&params["clientInfo"]),
            capabilities: hash(&params["capabilities"]),
            meta: ParamsMeta {
                progress: id(meta.get("progressToken")),
                version: version(&meta["io.modelcontextprotocol/protocolVersion"], false),
                client: info(&meta["io.modelcontextprotocol/clientInfo"]),
                capabilities: hash(&meta["io.modelcontextprotocol/clientCapabilities"]),
            },
        },
        result: message.get("result").map(|_| Reply {
            version: version(&result["protocolVersion"], false),
            server: info(&result["serverInfo"]),
            meta_server: info(&result["_meta"]["io.modelcontextprotocol/serverInfo"]),
            capabilities: result["capabilities"].is_object(),
            is_error: result["isError"] == true,
            kind: text(result, "resultType"),
            task: result["task"].is_object(),
            tools: result["tools"].as_array().map(|tools| Tools {
                tools: tools
                    .iter()
                    .filter(|tool| tool.is_object())
                    .map(|tool| ListedTool { name: text(tool, "name"), tool: tool.clone() })
                    .collect(),
                spent: 0,
                cut: tools.iter().any(|tool| !tool.is_object()),
            }),
            cursor: result["nextCursor"].is_string(),
        }),
        error: message.get("error").filter(|error| !error.is_null()).map(|error| {
            if error["code"].is_number() { integer(&error["code"].to_string()).unwrap_or(0) } else { 0 }
        }),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn are_those_of_serde_json(
        members in proptest::collection::vec((name(), json()), 0..8),
        odd in proptest::collection::vec(any::<u8>(), 1..40),
        chunk in 1..40_usize,
    ) {
        let mut odd = odd.iter().copied().cycle();
        let mut line = String::new();
        Json::Object(members).write(&mut line, &mut || odd.next().unwrap());
        let line = line.trim_ascii_start();
        let expected = oracle(&serde_json::from_str(line).unwrap());

        // Tools are kept while somebody waits for them.
        let mut session = Session::new(Limits::default());
        let asked = Facts { rpc: true, id: Id::Of(1), method: Some("tools/list".into()), ..Facts::default() };
        let mut out = Vec::new();
        session.deliver(Sender::Client, asked, 1, 0, &mut (), &mut out);
        let mut reading = Reading::new(&KEY);
        let mut lexer = Lexer::default();
        let mut step = Step::More;
        for chunk in line.as_bytes().chunks(chunk) {
            let mut around = Around { session: &mut session, values: &mut (), out: &mut out, at: 0 };
            step = lexer.feed(chunk, &mut reading.reader(Sender::Server, 0, &mut around));
        }
        prop_assert!(matches!(step, Step::Done(_)), "{step:?}");
        let mut facts = reading.facts;
        if let Some(tools) = facts.result.as_mut().and_then(|result| result.tools.as_mut()) {
            tools.spent = 0;
        }
        prop_assert_eq!(facts, expected);
    }

    /// The same texts are JSON.
    #[test]
    fn are_read_of_what_serde_json_takes_for_json(
        text in prop_oneof![
            r#"[\[\]{}:,"\\u0-9a-f.eE+ tr-]{0,16}"#,
            "-?[0-9]{0,3}(\\.[0-9]{0,2})?([eE][+-]?[0-9]{0,2})?",
            "(\"|\\\\|[a-fu0-9]|\t){0,10}".prop_map(|text| format!("\"{text}\"")),
        ],
    ) {
        let line = format!("[{text}]");
        let mut session = Session::new(Limits::default());
        let mut around = Around { session: &mut session, values: &mut (), out: &mut Vec::new(), at: 0 };
        let step = Lexer::default().feed(line.as_bytes(), &mut Reading::new(&KEY).reader(Sender::Server, 0, &mut around));
        // Half of a surrogate pair passes here, as in JavaScript and Python.
        let expected = match serde_json::from_str::<Value>(&line) {
            Ok(_) => true,
            Err(error) => error.to_string().contains("surrogate") || error.to_string().contains("hex escape")
                || error.to_string().contains("number out of range"),
        };
        if step == Step::Done(line.len()) {
            prop_assert!(expected, "{line}");
        } else {
            prop_assert!(serde_json::from_str::<Value>(&line).is_err(), "{line}: {step:?}");
        }
    }
}
