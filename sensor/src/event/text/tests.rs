use super::*;

#[test]
fn a_denial_says_what_where_why_and_for_whom() {
    let event = Event {
        time_unix_ns: 1_700_000_000_123_456_789,
        body: Some(Body::Connection(pb::Connection {
            decision: Some(pb::Decision {
                verdict: pb::Verdict::Deny.into(),
                reason: "no_rule".to_owned(),
                count: 3,
                ..Default::default()
            }),
            actor: Some(pb::Actor {
                server: "fetch".to_owned(),
                pid: 42,
                user: "dev".to_owned(),
                client: Some(pb::Client { name: "claude-code".to_owned(), ..Default::default() }),
                ..Default::default()
            }),
            protocol: "tcp".to_owned(),
            dst: Some(pb::Endpoint {
                ip: "2001:db8::1".to_owned(),
                port: 443,
                name: "api.example.com".to_owned(),
            }),
            ..Default::default()
        })),
        ..Default::default()
    };
    let row = row(&event);
    assert_eq!(
        row.cells(),
        [
            "22:13:20.123",
            "DENY",
            "fetch",
            "tcp [2001:db8::1]:443 (api.example.com)  no_rule ×3  pid 42 (dev)  for claude-code"
        ]
    );
    assert_eq!(row.tone, Tone::Bad);
}

proptest::proptest! {
    #[test]
    fn nothing_that_moves_a_cursor_survives(text in proptest::prelude::any::<String>()) {
        proptest::prop_assert!(!escape(&text).chars().any(char::is_control));
    }
}

#[test]
fn an_address_of_a_hostile_sensor_cannot_drive_the_terminal() {
    let dst = Some(pb::Endpoint { ip: "10.0.\u{10}.1".to_owned(), port: 443, name: "a\u{1b}b".to_owned() });
    let connection = pb::Connection { dst, ..Default::default() };
    let event = Event { body: Some(Body::Connection(connection)), ..Default::default() };
    assert!(row(&event).cells().iter().all(|cell| !cell.chars().any(char::is_control)));
}

#[test]
fn a_denied_query_says_what_was_asked_of_whom() {
    let body = Body::Dns(pb::Dns {
        decision: Some(pb::Decision {
            verdict: pb::Verdict::Deny.into(),
            reason: "name_no_rule".to_owned(),
            suggestion: "{to: [evil.example]}".to_owned(),
            ..Default::default()
        }),
        name: "evil.example".to_owned(),
        qtype: "A".to_owned(),
        resolver: Some(pb::Endpoint { ip: "10.0.0.2".to_owned(), port: 53, ..Default::default() }),
        ..Default::default()
    });
    let row = row(&Event { body: Some(body), ..Default::default() });
    assert_eq!((row.what.as_str(), row.tone), ("DENY", Tone::Bad));
    assert_eq!(row.detail, "dns A evil.example of 10.0.0.2:53  name_no_rule  to allow: {to: [evil.example]}");
}

#[test]
fn a_long_command_is_cut_between_characters() {
    assert_eq!((cut("äöü", 3).as_str(), cut("äöü", 2).as_str()), ("äöü", "äö…"));
}

#[test]
fn text_of_a_server_cannot_drive_the_terminal() {
    assert_eq!(escape("a\x1b[2Jb\n\u{202e}"), "a\\u{1b}[2Jb\\u{a}\\u{202e}");
    assert_eq!(escape("größe"), "größe");
}

fn exchange(outcome: pb::Outcome) -> pb::Exchange {
    pb::Exchange {
        actor: Some(pb::Actor {
            server: "time".to_owned(),
            pid: 42,
            user: "dev".to_owned(),
            client: Some(pb::Client { name: "codex".to_owned(), ..Default::default() }),
            ..Default::default()
        }),
        method: "tools/call".to_owned(),
        id_hash: "1".to_owned(),
        request_bytes: 999,
        response_bytes: 2_097_152,
        duration_ns: 1_234_567,
        outcome: outcome.into(),
        error_code: -32602,
        ..Default::default()
    }
}

#[test]
fn a_call_says_what_came_of_it_for_whom() {
    let call = pb::ToolCall { exchange: Some(exchange(pb::Outcome::Ok)), tool: "now\u{1b}".to_owned() };
    let line = row(&Event { body: Some(Body::ToolCall(Box::new(call))), ..Default::default() });
    assert_eq!(
        line.cells()[1..],
        ["call", "time", "now\\u{1b}  ok  1.23 ms  999 B → 2.1 MB  pid 42 (dev)  for codex"]
    );
    assert_eq!(line.tone, Tone::Plain);
    let call = pb::ToolCall { exchange: Some(exchange(pb::Outcome::RpcError)), tool: "now".to_owned() };
    let line = row(&Event { body: Some(Body::ToolCall(Box::new(call))), ..Default::default() });
    assert!(line.detail.starts_with("now  rpc_error -32602  "), "{}", line.detail);
    assert_eq!(line.tone, Tone::Bad);
}

#[test]
fn drift_shows_the_beginning_of_hashes_and_whole_versions() {
    let drift = |before: &str, after: &str| {
        let drift = pb::Drift {
            what: "tool_changed".to_owned(),
            tool: "now".to_owned(),
            parts: vec!["description".to_owned()],
            before: before.to_owned(),
            after: after.to_owned(),
            ..Default::default()
        };
        row(&Event { body: Some(Body::Drift(drift)), ..Default::default() }).detail
    };
    assert_eq!(
        drift(&"a".repeat(64), &"b".repeat(64)),
        "tool_changed  now  description  was aaaaaaaaaaaa…  is bbbbbbbbbbbb…"
    );
    assert!(drift("2026.10.24", "2026.11.1").contains("was 2026.10.24  is 2026.11.1"));
}

#[test]
fn sizes_and_times_are_short() {
    assert_eq!(
        [bytes(0), bytes(999), bytes(1000), bytes(u64::MAX)],
        ["0 B", "999 B", "1.0 kB", "18446744.1 TB"]
    );
    assert_eq!(
        [milliseconds(0), milliseconds(9_990_000), milliseconds(1_500_000_000)],
        ["0.00", "9.99", "1500"]
    );
}

proptest::proptest! {
    #[test]
    fn no_name_that_a_server_or_client_chose_reaches_the_terminal(text in proptest::prelude::any::<String>()) {
        let said = pb::Exchange { method: text.clone(), id_hash: text.clone(), ..exchange(pb::Outcome::Task) };
        let said = Some(said);
        let bodies = [
            Body::ToolCall(Box::new(pb::ToolCall { exchange: said.clone(), tool: text.clone() })),
            Body::Prompt(Box::new(pb::Prompt { exchange: said.clone(), name: text.clone() })),
            Body::Resource(Box::new(pb::Resource { exchange: said.clone(), scheme: text.clone(), host: text.clone(), ..Default::default() })),
            Body::McpMessage(Box::new(pb::McpMessage { exchange: said, count: 2 })),
            Body::ToolsListed(Box::new(pb::ToolsListed { list_hash: text.clone(), ..Default::default() })),
            Body::Drift(pb::Drift { tool: text.clone(), before: text.clone(), parts: vec![text.clone()], ..Default::default() }),
            Body::Uninspected(pb::Uninspected { how: text.clone(), ..Default::default() }),
            Body::Http(pb::HttpExchange { path: text.clone(), mcp_name: text.clone(), ..Default::default() }),
            Body::ConnectionEnd(pb::ConnectionEnd { protocol: text.clone(), outcome: text, ..Default::default() }),
        ];
        for body in bodies {
            let line = row(&Event { body: Some(body), ..Default::default() });
            proptest::prop_assert!(line.cells().iter().all(|cell| !cell.chars().any(char::is_control)));
        }
    }
}
