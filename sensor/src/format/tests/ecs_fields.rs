//! Holds what is rendered to the field list of ECS.

use super::{all, kind, value};
use crate::format::ecs;
use serde_json::{Value, json};
use std::sync::LazyLock;

static FIELDS: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(include_str!("ecs-9.4.0/fields.json")).unwrap());

/// All that is wrong with a document; each begins with where.
pub fn problems(document: &Value) -> Vec<String> {
    let mut problems = Vec::new();
    for name in ["@timestamp", "ecs", "event"] {
        if document.get(name).is_none() {
            problems.push(format!("{name}: missing"));
        }
    }
    fields("", document, &mut problems);
    let event = &document["event"];
    for r#type in event["type"].as_array().into_iter().flatten() {
        let allowed = &FIELDS["event.category"]["allowed"];
        let of = |c: &Value| {
            allowed[c.as_str().unwrap_or_default()].as_array().is_some_and(|t| t.contains(r#type))
        };
        if !event["category"].as_array().is_some_and(|list| list.iter().any(of)) {
            problems.push(format!("event.type: {type} is of none of {}", event["category"]));
        }
    }
    problems
}

fn fields(at: &str, value: &Value, problems: &mut Vec<String>) {
    for (name, value) in value.as_object().unwrap() {
        let at = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
        let field = &FIELDS[&at];
        match value {
            _ if at == "mcp_sensor" => (),
            Value::Object(_) if field.is_null() => fields(&at, value, problems),
            _ if field.is_null() => problems.push(format!("{at}: no field of ECS")),
            Value::Array(list) if field["array"] == true => {
                list.iter().for_each(|v| one(&at, field, v, problems));
            }
            _ if field["array"] == true => problems.push(format!("{at}: not a list")),
            _ => one(&at, field, value, problems),
        }
    }
}

fn one(at: &str, field: &Value, value: &Value, problems: &mut Vec<String>) {
    let text = value.as_str();
    let right = match field["type"].as_str().unwrap() {
        "keyword" | "wildcard" | "match_only_text" | "constant_keyword" => text.is_some(),
        "long" => value.is_i64() || at == "event.sequence" && value.is_u64(),
        "boolean" => value.is_boolean(),
        "ip" => text.is_some_and(|t| t.parse::<std::net::IpAddr>().is_ok()),
        "date" => text.is_some_and(|t| {
            time::OffsetDateTime::parse(t, &time::format_description::well_known::Rfc3339).is_ok()
        }),
        _ => false,
    };
    if !right {
        problems.push(format!("{at}: not of type {}: {value}", field["type"]));
    }
    let allowed = field["allowed"].as_object().map(|a| a.keys().any(|k| Some(k.as_str()) == text));
    let expected = field["expected"].as_array().map(|e| e.contains(value));
    if allowed == Some(false) || expected == Some(false) {
        problems.push(format!("{at}: {value} is not allowed"));
    }
}

#[test]
fn an_event_of_every_type_is_valid() {
    for event in all() {
        let rendered = value(&ecs::render(&event));
        assert_eq!(problems(&rendered), Vec::<String>::new(), "{}: {rendered:#}", kind(&event));
        if event.body.is_some() {
            for name in ["kind", "category", "type", "action", "id"] {
                assert!(rendered["event"].get(name).is_some(), "{}: {name}", kind(&event));
            }
        }
    }
}

#[test]
fn a_wrong_document_is_found() {
    let event = all().remove(0);
    let wrong = |change: fn(&mut Value)| {
        let mut document = value(&ecs::render(&event));
        change(&mut document);
        problems(&document)
    };
    assert_eq!(wrong(|_| ()), Vec::<String>::new());
    assert_eq!(wrong(|d| d["event"]["verdict"] = json!("deny")), ["event.verdict: no field of ECS"]);
    assert_eq!(wrong(|d| d["mcp_sensor"]["verdict"] = json!("deny")), Vec::<String>::new());
    assert_eq!(wrong(|d| d["event"]["kind"] = json!("denial")), [r#"event.kind: "denial" is not allowed"#]);
    assert_eq!(wrong(|d| d["event"]["type"] = json!("start")).len(), 1);
    assert_eq!(wrong(|d| d["event"]["type"] = json!(["deletion"])).len(), 1);
    assert_eq!(wrong(|d| d["event"]["category"] = json!(["mcp"])).len(), 2);
    assert_eq!(wrong(|d| d["process"]["pid"] = json!("7")).len(), 1);
    assert_eq!(wrong(|d| d["destination"]["ip"] = json!("example.com")).len(), 1);
    assert_eq!(wrong(|d| d["@timestamp"] = json!(1_700_000_000)).len(), 1);
    assert_eq!(wrong(|d| d["network"]["direction"] = json!("out")).len(), 1);
}
