use super::*;
use proptest::prelude::*;
use serde_json::json;

fn decision() -> pb::Decision {
    pb::Decision {
        verdict: pb::Verdict::WouldDeny.into(),
        reason: "no_rule".to_owned(),
        hook: "connect".to_owned(),
        count: 1,
        ..Default::default()
    }
}

fn connection(decision: pb::Decision) -> Event {
    Event {
        seq: 7,
        time_unix_ns: 1_700_000_000_000_000_012,
        sensor: "s".to_owned(),
        boot: "b".to_owned(),
        body: Some(Body::Connection(pb::Connection {
            decision: Some(decision),
            actor: Some(pb::Actor {
                server: "github".to_owned(),
                instance: "i1".to_owned(),
                pid: 12,
                uid: 0,
                client: Some(pb::Client { pid: 3, name: "claude".to_owned(), ..Default::default() }),
                ..Default::default()
            }),
            protocol: "tcp".to_owned(),
            direction: pb::Direction::Egress.into(),
            dst: Some(pb::Endpoint {
                ip: "2001:db8::1".to_owned(),
                port: 443,
                name: "api.example.com".to_owned(),
            }),
            ..Default::default()
        })),
    }
}

#[test]
fn a_connection_has_the_fields_of_the_contract() {
    let mut line = Vec::new();
    write_line(&connection(decision()), &mut line).unwrap();
    assert_eq!(line.pop(), Some(b'\n'));
    let value: serde_json::Value = serde_json::from_slice(&line).unwrap();
    assert_eq!(
        value,
        json!({
            "type": "connection", "time": "2023-11-14T22:13:20.000000012Z", "seq": 7,
            "sensor": "s", "boot": "b", "verdict": "would_deny", "reason": "no_rule", "rule": "",
            "hook": "connect", "count": 1, "server": "github", "instance": "i1", "pid": 12, "uid": 0,
            "client": {"pid": 3, "name": "claude"}, "protocol": "tcp", "direction": "egress",
            "dst": {"ip": "2001:db8::1", "port": 443, "name": "api.example.com"},
        })
    );
    assert_eq!(to_json(&connection(decision())), value);
}

#[test]
fn a_dns_verdict_has_the_fields_of_the_contract() {
    let body = pb::Dns {
        decision: Some(pb::Decision { reason: "name_no_rule".to_owned(), ..decision() }),
        actor: Some(pb::Actor { server: "github".to_owned(), pid: 12, ..Default::default() }),
        name: "evil.example".to_owned(),
        qtype: "TXT".to_owned(),
        resolver: Some(pb::Endpoint { ip: "10.0.0.2".to_owned(), port: 53, ..Default::default() }),
        protocol: "udp".to_owned(),
        ..Default::default()
    };
    let value = to_json(&Event { seq: 3, body: Some(Body::Dns(body)), ..Default::default() });
    assert_eq!(
        value,
        json!({
            "type": "dns", "time": "1970-01-01T00:00:00.000000000Z", "seq": 3, "sensor": "", "boot": "",
            "verdict": "would_deny", "reason": "name_no_rule", "rule": "", "hook": "connect", "count": 1,
            "server": "github", "instance": "", "pid": 12, "uid": 0,
            "name": "evil.example", "qtype": "TXT", "resolver": "10.0.0.2", "protocol": "udp",
        })
    );
}

#[test]
fn a_denied_hello_says_the_name_it_asked_for() {
    let mut event = connection(pb::Decision { reason: "sni".to_owned(), ..decision() });
    if let Some(Body::Connection(c)) = &mut event.body {
        c.sni = "evil.example".to_owned();
    }
    assert_eq!(to_json(&event)["sni"], "evil.example");
}

#[test]
fn a_repeat_says_what_it_repeats() {
    let value = to_json(&connection(pb::Decision { repeat: true, count: 40, ..decision() }));
    assert_eq!(
        (&value["type"], &value["of"], &value["count"]),
        (&json!("repeat"), &json!("connection"), &json!(40))
    );
}

#[test]
fn a_loss_has_the_fields_of_the_contract() {
    let loss = pb::Loss {
        r#where: "kernel".to_owned(),
        reason: "verdict_ring_full".to_owned(),
        count: 3,
        ..Default::default()
    };
    let value = to_json(&Event { body: Some(Body::Loss(loss)), ..Default::default() });
    assert_eq!(value["type"], "loss");
    assert_eq!(value["where"], "kernel");
    assert_eq!(value["reason"], "verdict_ring_full");
    assert_eq!(value["count"], 3);
}

proptest! {
    /// Whatever a server puts into its names: one line, which reads back.
    #[test]
    fn any_text_stays_within_one_line(text in any::<String>(), path in any::<String>(), time in any::<i64>()) {
        let actor = pb::Actor { comm: text.clone(), server: text.clone(), ..Default::default() };
        let body = pb::UnixConnection { actor: Some(actor), path: path.clone(), ..Default::default() };
        let event = Event { time_unix_ns: time, body: Some(Body::UnixConnection(body)), ..Default::default() };
        let mut line = Vec::new();
        write_line(&event, &mut line).unwrap();
        prop_assert_eq!(line.iter().position(|b| *b == b'\n'), Some(line.len() - 1));
        let value: serde_json::Value = serde_json::from_slice(&line).unwrap();
        prop_assert_eq!(value["path"].as_str(), Some(path.as_str()));
        prop_assert_eq!(value["server"].as_str(), Some(text.as_str()));
    }
}

#[test]
fn any_time_has_a_form() {
    assert_eq!(Time(0).to_string(), "1970-01-01T00:00:00.000000000Z");
    assert_eq!(Time(i64::MAX).to_string(), "2262-04-11T23:47:16.854775807Z");
    assert_eq!(Time(i64::MIN).to_string(), "1677-09-21T00:12:43.145224192Z");
}

fn actor() -> pb::Actor {
    pb::Actor {
        server: "time".to_owned(),
        instance: "i1".to_owned(),
        pid: 12,
        uid: 1000,
        client: Some(pb::Client { pid: 3, name: "claude".to_owned(), ..Default::default() }),
        ..Default::default()
    }
}

fn exchange() -> pb::Exchange {
    pb::Exchange {
        actor: Some(actor()),
        transport: "stdio".to_owned(),
        connection: 9,
        method: "tools/call".to_owned(),
        sender: pb::Sender::Client.into(),
        id_hash: "00ff".to_owned(),
        request_bytes: 100,
        response_bytes: 0,
        duration_ns: 5,
        outcome: pb::Outcome::Ok.into(),
        era: pb::Era::Modern.into(),
        protocol_version: "2026-07-28".to_owned(),
        client_info: Some(pb::Implementation { name: "c".to_owned(), ..Default::default() }),
        ..Default::default()
    }
}

fn of(body: Body) -> serde_json::Value {
    to_json(&Event { body: Some(body), ..Default::default() })
}

fn tool_call(exchange: pb::Exchange) -> serde_json::Value {
    of(Body::ToolCall(Box::new(pb::ToolCall { exchange: Some(exchange), tool: "now".to_owned() })))
}

#[test]
fn a_tool_call_has_the_fields_of_the_contract() {
    assert_eq!(
        tool_call(exchange()),
        json!({
            "type": "tool_call", "time": "1970-01-01T00:00:00.000000000Z", "seq": 0, "sensor": "", "boot": "",
            "server": "time", "instance": "i1", "pid": 12, "uid": 1000, "client": {"pid": 3, "name": "claude"},
            "tool": "now", "method": "tools/call", "sender": "client", "id_hash": "00ff", "transport": "stdio",
            "connection": 9, "era": "modern", "protocol_version": "2026-07-28",
            "self_reported": {"client_info": {"name": "c", "version": ""}},
            "outcome": "ok", "request_bytes": 100, "response_bytes": 0, "duration_ns": 5,
        })
    );
}

#[test]
fn a_tool_call_that_says_nothing_has_every_field_all_the_same() {
    let value = of(Body::ToolCall(Box::default()));
    let keys = [
        "server",
        "instance",
        "client",
        "tool",
        "method",
        "outcome",
        "request_bytes",
        "response_bytes",
        "duration_ns",
        "era",
        "transport",
        "connection",
        "id_hash",
    ];
    for key in keys {
        assert!(value.get(key).is_some(), "{key} in {value}");
    }
    assert!(value["client"].is_null());
    assert_eq!((&value["era"], &value["outcome"]), (&json!(""), &json!("unknown")));
}

#[test]
fn each_outcome_has_its_name_and_an_error_its_code() {
    let names = ["ok", "tool_error", "rpc_error", "cancelled", "no_response", "input_required", "task"]
        .iter()
        .zip(1..);
    for (name, number) in names {
        let value = tool_call(pb::Exchange { outcome: number, error_code: 0, ..exchange() });
        assert_eq!(value["outcome"], *name);
        assert_eq!(value.get("error_code").is_some(), *name == "rpc_error");
    }
    let failed = pb::Exchange { outcome: pb::Outcome::RpcError.into(), error_code: -32602, ..exchange() };
    assert_eq!(tool_call(failed)["error_code"], -32602);
}

#[test]
fn a_notification_has_no_outcome() {
    let said = pb::Exchange {
        id_hash: String::new(),
        outcome: pb::Outcome::Unspecified.into(),
        method: "notifications/progress".to_owned(),
        ..exchange()
    };
    let value = of(Body::McpMessage(Box::new(pb::McpMessage { exchange: Some(said), count: 0 })));
    assert_eq!((&value["method"], &value["count"]), (&json!("notifications/progress"), &json!(1)));
    assert!(value.get("outcome").is_none() && value.get("duration_ns").is_none());
    let value = of(Body::McpMessage(Box::new(pb::McpMessage { exchange: Some(exchange()), count: 0 })));
    assert_eq!(value["outcome"], "ok");
}

#[test]
fn a_finding_says_where_and_what_was_done() {
    let finding = pb::Finding {
        kind: "secret".to_owned(),
        severity: pb::Severity::High.into(),
        place: "/params/arguments/token".to_owned(),
        method: "tools/call".to_owned(),
        tool: "fetch".to_owned(),
        rule: "github-pat".to_owned(),
        length: 40,
        value_hash: "ab".to_owned(),
        ..Default::default()
    };
    let value = of(Body::Finding(finding));
    assert_eq!(
        value,
        json!({
            "type": "finding", "time": "1970-01-01T00:00:00.000000000Z", "seq": 0, "sensor": "", "boot": "",
            "kind": "secret", "severity": "high", "server": "", "tool": "fetch", "method": "tools/call",
            "place": "/params/arguments/token", "rule": "github-pat", "length": 40, "value_hash": "ab",
        })
    );
}

#[test]
fn what_moved_unread_says_how_much_and_how() {
    let unread = pb::Uninspected {
        actor: Some(actor()),
        connection: 9,
        sender: pb::Sender::Server.into(),
        bytes: 65536,
        how: "splice".to_owned(),
    };
    let value = of(Body::Uninspected(unread));
    assert_eq!(value["type"], "uninspected");
    assert_eq!(
        (&value["bytes"], &value["how"], &value["sender"]),
        (&json!(65536), &json!("splice"), &json!("server"))
    );
    assert_eq!(value["server"], "time");
}

#[test]
fn a_list_of_tools_has_a_hash_for_each() {
    let tool = pb::Tool {
        name: "now".to_owned(),
        hash: "h".to_owned(),
        description_hash: "d".to_owned(),
        schema_hash: "s".to_owned(),
    };
    let listed = pb::ToolsListed {
        exchange: Some(pb::Exchange { method: "tools/list".to_owned(), ..exchange() }),
        tools: vec![tool],
        list_hash: "l".to_owned(),
        incomplete: true,
        ..Default::default()
    };
    let value = of(Body::ToolsListed(Box::new(listed)));
    assert_eq!(
        value["tools"],
        json!([{"name": "now", "hash": "h", "description_hash": "d", "schema_hash": "s"}])
    );
    assert_eq!((&value["list_hash"], &value["incomplete"]), (&json!("l"), &json!(true)));
}

#[test]
fn drift_says_from_what_to_what() {
    let drift = pb::Drift {
        actor: Some(actor()),
        what: "tool_changed".to_owned(),
        tool: "now".to_owned(),
        before: "a".to_owned(),
        after: "b".to_owned(),
        since_unix_ns: 1,
        parts: vec!["description".to_owned()],
    };
    let value = of(Body::Drift(drift));
    assert_eq!(value["type"], "drift");
    assert_eq!(
        (&value["what"], &value["parts"], &value["since"]),
        (&json!("tool_changed"), &json!(["description"]), &json!("1970-01-01T00:00:00.000000001Z"))
    );
}

#[test]
fn http_and_the_end_of_a_connection_have_their_ends() {
    let peer = pb::Endpoint { ip: "127.0.0.1".to_owned(), port: 5, ..Default::default() };
    let http = pb::HttpExchange {
        direction: pb::Direction::Inbound.into(),
        method: "POST".to_owned(),
        path: "/mcp".to_owned(),
        status: 401,
        peer: Some(peer.clone()),
        ..Default::default()
    };
    let value = of(Body::Http(http));
    assert_eq!(
        (&value["type"], &value["direction"], &value["status"]),
        (&json!("http"), &json!("inbound"), &json!(401))
    );
    assert_eq!(value["peer"], json!({"ip": "127.0.0.1", "port": 5}));
    let end = pb::ConnectionEnd {
        protocol: "tcp".to_owned(),
        dst: Some(peer),
        bytes_sent: 7,
        outcome: "closed".to_owned(),
        ..Default::default()
    };
    let value = of(Body::ConnectionEnd(end));
    assert_eq!((&value["type"], &value["bytes_sent"]), (&json!("connection_end"), &json!(7)));
    assert_eq!((&value["bytes_received"], &value["outcome"]), (&json!(0), &json!("closed")));
}

#[test]
fn every_type_is_documented() {
    let text = include_str!("../../../../docs/events.md");
    for name in TYPES {
        assert!(text.contains(&format!("`{name}`")), "{name}");
    }
}
