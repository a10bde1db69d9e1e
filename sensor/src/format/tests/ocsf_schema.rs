//! Holds what is rendered to the schema of OCSF 1.8.0.

use super::{all, kind, value};
use crate::event::{Body, Event, pb};
use crate::format::ocsf;
use regex::bytes::{Regex, RegexBuilder};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex};

static SCHEMA: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(include_str!("ocsf-1.8.0/schema.json")).unwrap());

/// Of types by their names.
static PATTERNS: LazyLock<Mutex<HashMap<String, Regex>>> = LazyLock::new(Mutex::default);

/// All that is wrong with an event; each begins with where.
pub fn problems(event: &Value) -> Vec<String> {
    let Some(uid) = event["class_uid"].as_u64() else { return vec!["class_uid: missing".to_owned()] };
    let classes = SCHEMA["classes"].as_object().unwrap();
    let Some(class) = classes.values().find(|c| c["uid"] == uid) else {
        return vec![format!("class_uid: no class {uid}")];
    };
    let mut check = Check { profiles: strings(&event["metadata"]["profiles"]), problems: Vec::new() };
    for profile in &check.profiles {
        if !strings(&class["profiles"]).contains(profile) {
            check.problems.push(format!("metadata.profiles: not of the class: {profile}"));
        }
    }
    let id = event["activity_id"].as_u64().unwrap_or(u64::MAX);
    if event["type_uid"] != uid * 100 + id {
        check.problems.push("type_uid: is not class_uid * 100 + activity_id".to_owned());
    }
    check.object("", class, event);
    check.problems
}

fn strings(list: &Value) -> Vec<&str> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

struct Check<'a> {
    profiles: Vec<&'a str>,
    problems: Vec<String>,
}

impl Check<'_> {
    /// An attribute that only profiles have is one where such a profile is applied.
    fn applies(&self, attribute: &Value) -> bool {
        let of = strings(&attribute["profiles"]);
        of.is_empty() || of.iter().any(|p| self.profiles.contains(p))
    }

    fn object(&mut self, at: &str, schema: &Value, value: &Value) {
        let Some(fields) = value.as_object() else {
            return self.problems.push(format!("{at}: not an object"));
        };
        let attributes = schema["attributes"].as_object().unwrap();
        for (name, attribute) in attributes {
            if attribute["requirement"] == "required" && self.applies(attribute) && !fields.contains_key(name)
            {
                self.problems.push(format!("{at}{name}: missing"));
            }
        }
        for (name, value) in fields {
            let at = format!("{at}{name}");
            let wrong = match attributes.get(name) {
                None => "unknown attribute",
                Some(a) if !self.applies(a) => "its profile is not applied",
                Some(a) if a["deprecated"] == true => "deprecated",
                Some(a) => {
                    self.attribute(&at, a, value, fields);
                    continue;
                }
            };
            self.problems.push(format!("{at}: {wrong}"));
        }
        if let Some(names) = schema["constraints"]["at_least_one"].as_array()
            && !strings(&json!(names)).iter().any(|n| fields.contains_key(*n))
        {
            self.problems.push(format!("{at}: has none of {names:?}"));
        }
        if let Some(names) = schema["constraints"]["just_one"].as_array()
            && strings(&json!(names)).iter().filter(|n| fields.contains_key(**n)).count() != 1
        {
            self.problems.push(format!("{at}: has not just one of {names:?}"));
        }
    }

    fn attribute(&mut self, at: &str, schema: &Value, value: &Value, beside: &Map<String, Value>) {
        match value {
            Value::Array(list) if schema["is_array"] == true => {
                for (i, item) in list.iter().enumerate() {
                    self.one(&format!("{at}[{i}]"), schema, item, beside);
                }
            }
            _ if schema["is_array"] == true => self.problems.push(format!("{at}: not a list")),
            _ => self.one(at, schema, value, beside),
        }
    }

    fn one(&mut self, at: &str, schema: &Value, value: &Value, beside: &Map<String, Value>) {
        if let Some(object) = schema["object_type"].as_str() {
            // `object` is one without attributes: anything may be in it.
            return match (object, &SCHEMA["objects"][object]) {
                ("object", _) if value.is_object() => (),
                (_, Value::Null) => self.problems.push(format!("{at}: {object} is not in the test data")),
                (_, schema) => self.object(&format!("{at}."), schema, value),
            };
        }
        if let Some(problem) = mistyped(schema["type"].as_str().unwrap(), value) {
            return self.problems.push(format!("{at}: {problem}"));
        }
        let Some(captions) = schema["enum"].as_object() else { return };
        let key = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let Some(caption) = captions.get(&key) else {
            return self.problems.push(format!("{at}: no value {key} in the enumeration"));
        };
        if let Some(sibling) = schema["sibling"].as_str() {
            match beside.get(sibling) {
                None => self.problems.push(format!("{at}: without {sibling}")),
                // What the schema has no number for has the source's own name.
                Some(name) if key != "99" && name != caption => {
                    self.problems.push(format!("{at}: {key} is {caption}, not {name}"));
                }
                Some(_) => (),
            }
        }
    }
}

fn mistyped(name: &str, value: &Value) -> Option<String> {
    let r#type = &SCHEMA["types"][name];
    let base = r#type["type"].as_str().unwrap_or(name);
    let right = match base {
        "string_t" => value.is_string(),
        "integer_t" => value.is_i64() || value.is_u64(),
        "long_t" => value.is_i64(),
        "boolean_t" => value.is_boolean(),
        "float_t" => value.is_number(),
        "json_t" => true,
        other => return Some(format!("type {other} is not in the test data")),
    };
    if !right {
        return Some(format!("not of type {name}: {value}"));
    }
    if let (Some(text), Some(most)) = (value.as_str(), r#type["max_len"].as_u64())
        && text.len() as u64 > most
    {
        return Some(format!("longer than {most}"));
    }
    if let (Some(text), Some(pattern)) = (value.as_str(), r#type["regex"].as_str()) {
        let mut patterns = PATTERNS.lock().unwrap();
        let pattern = patterns
            .entry(name.to_owned())
            .or_insert_with(|| RegexBuilder::new(pattern).unicode(false).build().unwrap());
        if !pattern.is_match(text.as_bytes()) {
            return Some(format!("not a {name}: {text}"));
        }
    }
    if let (Some(number), Some([least, most])) =
        (value.as_i64(), r#type["range"].as_array().map(Vec::as_slice))
        && !(least.as_i64().unwrap()..=most.as_i64().unwrap()).contains(&number)
    {
        return Some(format!("not a {name}: {number}"));
    }
    None
}

#[test]
fn an_event_of_every_type_is_valid() {
    for event in all() {
        let rendered = value(&ocsf::render(&event));
        assert_eq!(problems(&rendered), Vec::<String>::new(), "{}: {rendered:#}", kind(&event));
    }
}

fn denied() -> Value {
    let mut connection = pb::Connection {
        decision: Some(pb::Decision { rule: "r".to_owned(), policy: "p".to_owned(), ..Default::default() }),
        actor: Some(pb::Actor { server: "github".to_owned(), pid: 7, ..Default::default() }),
        protocol: "tcp".to_owned(),
        dst: Some(pb::Endpoint { ip: "192.0.2.1".to_owned(), port: 443, name: "example.com".to_owned() }),
        ..Default::default()
    };
    connection.decision.as_mut().unwrap().set_verdict(pb::Verdict::Deny);
    connection.set_direction(pb::Direction::Egress);
    value(&ocsf::render(&Event { body: Some(Body::Connection(connection)), ..Default::default() }))
}

/// What is found where `change` was made, and nothing else.
fn found(change: impl FnOnce(&mut Value)) -> Vec<String> {
    let mut event = denied();
    assert_eq!(problems(&event), Vec::<String>::new());
    change(&mut event);
    problems(&event)
}

fn without(at: &str, name: &str) -> Vec<String> {
    found(|event| {
        let object = event.pointer_mut(at).unwrap().as_object_mut().unwrap();
        assert!(object.remove(name).is_some());
    })
}

#[test]
fn a_missing_attribute_is_found() {
    assert_eq!(without("", "time"), ["time: missing"]);
    assert_eq!(without("", "metadata")[0], "metadata: missing");
    assert_eq!(without("/metadata", "product"), ["metadata.product: missing"]);
    assert_eq!(without("/connection_info", "direction_id"), ["connection_info.direction_id: missing"]);
    assert_eq!(without("", "class_uid"), ["class_uid: missing"]);
    assert_eq!(
        found(|e| {
            let e = e.as_object_mut().unwrap();
            e.remove("src_endpoint");
            e.remove("dst_endpoint");
        }),
        [r#": has none of [String("dst_endpoint"), String("src_endpoint")]"#]
    );
}

#[test]
fn a_wrong_value_of_an_enumeration_is_found() {
    assert_eq!(found(|e| e["status_id"] = json!(7)), ["status_id: no value 7 in the enumeration"]);
    assert_eq!(found(|e| e["severity"] = json!("High")), [r#"severity_id: 3 is "Medium", not "High""#]);
    assert_eq!(without("", "severity"), ["severity_id: without severity"]);
    assert_eq!(found(|e| e["class_uid"] = json!(4999)), ["class_uid: no class 4999"]);
    let wrong = found(|e| e["type_uid"] = json!(400_102));
    assert_eq!(wrong[0], "type_uid: is not class_uid * 100 + activity_id");
    assert_eq!(wrong.len(), 2, "{wrong:?}");
    assert_eq!(found(|e| e["category_uid"] = json!(1)), ["category_uid: no value 1 in the enumeration"]);
}

#[test]
fn an_unknown_attribute_is_found() {
    assert_eq!(found(|e| e["verdict"] = json!("deny")), ["verdict: unknown attribute"]);
    assert_eq!(found(|e| e["actor"]["server"] = json!("x")), ["actor.server: unknown attribute"]);
    assert_eq!(found(|e| e["unmapped"]["server"] = json!("x")), Vec::<String>::new());
}

#[test]
fn a_wrong_type_is_found() {
    let wrong = |change: fn(&mut Value)| found(change).len();
    assert_eq!(wrong(|e| e["time"] = json!("2023-11-14T22:13:20Z")), 1);
    assert_eq!(wrong(|e| e["time"] = json!(1.5)), 1);
    assert_eq!(wrong(|e| e["count"] = json!("1")), 1);
    assert_eq!(wrong(|e| e["dst_endpoint"]["ip"] = json!("example.com")), 1);
    assert_eq!(wrong(|e| e["dst_endpoint"]["port"] = json!(65_536)), 1);
    assert_eq!(wrong(|e| e["actor"] = json!([])), 1);
    let one = found(|e| e["metadata"]["profiles"] = json!("host"));
    assert!(one.contains(&"metadata.profiles: not a list".to_owned()), "{one:?}");
}

#[test]
fn an_attribute_of_a_profile_that_is_not_applied_is_found() {
    let found = found(|e| e["metadata"]["profiles"] = json!(["host", "incident"]));
    assert!(found.contains(&"action_id: its profile is not applied".to_owned()), "{found:?}");
    assert!(found.contains(&"metadata.profiles: not of the class: incident".to_owned()), "{found:?}");
}
