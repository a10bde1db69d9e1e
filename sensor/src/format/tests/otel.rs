//! Log records of OpenTelemetry.

use super::{Arbitrary, all, kind, samples, texts};
use crate::event::{Body, Event, pb};
use crate::format::otel;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::logs::v1::LogRecord;
use proptest::prelude::*;
use serde_json::{Map, Value};

const DOCS: &str = include_str!("../../../../docs/formats.md");

fn to_json(value: &AnyValue) -> Value {
    match value.value.as_ref().expect("no attribute is empty") {
        Any::StringValue(text) => text.clone().into(),
        Any::BoolValue(yes) => (*yes).into(),
        Any::IntValue(number) => (*number).into(),
        Any::ArrayValue(list) => list.values.iter().map(to_json).collect(),
        Any::KvlistValue(fields) => Value::Object(object(&fields.values)),
        other => panic!("{other:?}"),
    }
}

fn object(fields: &[KeyValue]) -> Map<String, Value> {
    let map: Map<String, Value> =
        fields.iter().map(|f| (f.key.clone(), to_json(f.value.as_ref().unwrap()))).collect();
    assert_eq!(map.len(), fields.len(), "each key once: {fields:?}");
    map
}

/// Everything of a record but its text, which says things again.
fn rendered(event: &Event) -> (LogRecord, Map<String, Value>) {
    let record = otel::render(event, 7);
    let mut map = object(&record.attributes);
    let resource = &otel::resource_logs([event], 7)[0];
    map.extend(object(&resource.resource.as_ref().unwrap().attributes));
    (record, map)
}

#[test]
fn nothing_of_an_event_is_lost() {
    for event in all() {
        let (record, map) = rendered(&event);
        super::assert_has_all(&event, Value::Object(map), &["time"]);
        assert_eq!(record.time_unix_nano, u64::try_from(event.time_unix_ns).unwrap());
        assert_eq!(record.event_name, format!("mcp_sensor.{}", kind(&event)));
    }
}

fn exchange() -> pb::Exchange {
    pb::Exchange {
        actor: Some(pb::Actor { server: "github".to_owned(), pid: 7, uid: 1000, ..Default::default() }),
        transport: "stdio".to_owned(),
        method: "tools/call".to_owned(),
        protocol_version: "2025-11-25".to_owned(),
        outcome: pb::Outcome::RpcError.into(),
        error_code: -32602,
        ..Default::default()
    }
}

fn event(body: Body) -> Event {
    Event { seq: 3, sensor: "web-1".to_owned(), boot: "b".to_owned(), time_unix_ns: 5, body: Some(body) }
}

#[test]
fn a_call_has_the_names_of_the_conventions() {
    let call = pb::ToolCall { tool: "create_issue".to_owned(), exchange: Some(exchange()) };
    let (record, map) = rendered(&event(Body::ToolCall(Box::new(call))));
    for (key, value) in [
        ("log.record.uid", "web-1/b/3".into()),
        ("service.instance.id", "web-1".into()),
        ("host.id", "web-1".into()),
        ("mcp.method.name", "tools/call".into()),
        ("mcp.protocol.version", "2025-11-25".into()),
        ("gen_ai.tool.name", "create_issue".into()),
        ("gen_ai.operation.name", "execute_tool".into()),
        ("network.transport", "pipe".into()),
        ("error.type", "-32602".into()),
        ("rpc.response.status_code", "-32602".into()),
        ("process.pid", 7.into()),
        ("process.user.id", "1000".into()),
        ("mcp_sensor.server", "github".into()),
        ("mcp_sensor.outcome", "rpc_error".into()),
    ] {
        assert_eq!(map.get(key), Some::<&Value>(&value), "{key} in {map:?}");
    }
    assert_eq!((record.severity_number, record.severity_text.as_str()), (9, "INFO"));
    assert_eq!((record.time_unix_nano, record.observed_time_unix_nano), (5, 7));
}

#[test]
fn a_denied_connection_warns_and_names_its_peer_and_rule() {
    let end =
        |ip: &str, port, name: &str| Some(pb::Endpoint { ip: ip.to_owned(), port, name: name.to_owned() });
    let decision = pb::Decision {
        verdict: pb::Verdict::Deny.into(),
        rule: "profiles.github.egress[0]".to_owned(),
        ..Default::default()
    };
    let mut connection = pb::Connection {
        decision: Some(decision),
        protocol: "tcp".to_owned(),
        direction: pb::Direction::Egress.into(),
        dst: end("192.0.2.7", 443, "api.example"),
        src: end("10.0.0.1", 40000, ""),
        ..Default::default()
    };
    let (record, map) = rendered(&event(Body::Connection(connection.clone())));
    assert_eq!((record.severity_number, record.severity_text.as_str()), (13, "WARN"));
    let expect = |map: &Map<String, Value>, pairs: &[(&str, Value)]| {
        for (key, value) in pairs {
            assert_eq!(map.get(*key), Some(value), "{key} in {map:?}");
        }
    };
    expect(
        &map,
        &[
            ("network.peer.address", "192.0.2.7".into()),
            ("network.peer.port", 443.into()),
            ("network.local.address", "10.0.0.1".into()),
            ("server.address", "api.example".into()),
            ("network.transport", "tcp".into()),
            ("security_rule.name", "profiles.github.egress[0]".into()),
            ("mcp_sensor.verdict", "deny".into()),
        ],
    );
    connection.direction = pb::Direction::Inbound.into();
    let (_, map) = rendered(&event(Body::Connection(connection)));
    expect(&map, &[("network.peer.address", "10.0.0.1".into()), ("network.local.port", 443.into())]);
}

#[test]
fn records_are_grouped_by_sensor_in_their_order() {
    let event = |sensor: &str, seq| Event { sensor: sensor.to_owned(), seq, ..Default::default() };
    let events = [event("a", 1), event("a", 2), event("b", 1), event("a", 3)];
    let logs = otel::resource_logs(&events, 0);
    let lengths: Vec<usize> = logs.iter().map(|l| l.scope_logs[0].log_records.len()).collect();
    assert_eq!(lengths, [2, 1, 1]);
}

fn table() -> String {
    let rows: [(&str, &[(&str, &str)]); 10] = [
        ("where there is an actor", &otel::PROCESS),
        ("verdicts", &otel::VERDICT),
        ("`connection`, `connection_end`", &otel::CONNECTION),
        ("`dns`", &otel::DNS),
        ("`http`", &otel::HTTP),
        ("messages", &otel::MESSAGE),
        ("`tool_call`, `drift`", &otel::TOOL),
        ("`prompt`", &otel::PROMPT),
        ("`resource`", &otel::RESOURCE),
        ("`finding`", &otel::FINDING),
    ];
    let mut table = "| event | native | OpenTelemetry |\n|---|---|---|\n".to_owned();
    for (of, names) in rows.into_iter().chain([("`sensor_state`", otel::STATE.as_slice())]) {
        let list = |pick: fn(&(&str, &str)) -> String| names.iter().map(pick).collect::<Vec<_>>().join(", ");
        let (native, name) = (list(|n| format!("`{}`", n.0)), list(|n| format!("`{}`", n.1)));
        table.push_str(&format!("| {of} | {native} | {name} |\n"));
    }
    table
}

#[test]
fn the_documented_attributes_are_true() {
    let table = table();
    assert!(DOCS.contains(&table), "docs/formats.md should hold:\n\n{table}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever an event holds: each key once, no attribute empty.
    #[test]
    fn any_event_is_a_log_record(
        texts in proptest::collection::vec(texts(), 1..9),
        numbers in proptest::collection::vec(any::<u64>(), 1..9),
        time in any::<i64>(),
        seq in any::<u64>(),
    ) {
        let mut fill = Arbitrary { texts, numbers, next: 0, spent: 0 };
        for body in samples::bodies(&mut fill) {
            fill.spent = 0;
            let event = samples::event(seq, time, body, &mut fill);
            let (record, map) = rendered(&event);
            prop_assert!(map.values().all(|v| *v != ""), "{map:?}");
            prop_assert_eq!(map.contains_key("log.record.uid"), seq > 0);
            prop_assert!((1..=24).contains(&record.severity_number));
        }
    }
}
