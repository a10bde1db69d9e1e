mod docs;
mod ecs_fields;
mod ocsf_schema;
mod otel;
mod samples;

use super::*;
use crate::event::{Body, pb};
use proptest::prelude::*;
use samples::Fill;

/// Every value once, so that it is seen where it went. What is picked is `pick`
/// everywhere.
struct Marked {
    next: u64,
    pick: i32,
}

impl Marked {
    fn next(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

impl Fill for Marked {
    fn text(&mut self) -> String {
        format!("text-{:05}", self.next())
    }

    fn number(&mut self) -> u64 {
        // As nanoseconds and milliseconds no two are alike.
        self.next() * 7_000_003
    }

    fn pick(&mut self, n: i32) -> i32 {
        self.pick % n
    }

    fn length(&mut self) -> usize {
        2
    }

    fn ip(&mut self) -> String {
        let n = self.next();
        if n.is_multiple_of(2) {
            format!("2001:db8::{n:x}")
        } else {
            format!("10.1.{}.{}", n / 250 % 250, n % 250)
        }
    }
}

/// Nothing is known.
struct Nothing;

impl Fill for Nothing {
    fn text(&mut self) -> String {
        String::new()
    }

    fn number(&mut self) -> u64 {
        0
    }

    fn pick(&mut self, _: i32) -> i32 {
        0
    }

    fn length(&mut self) -> usize {
        0
    }
}

/// Every type with every value of its enumerations, then with nothing in it.
fn all() -> Vec<Event> {
    let mut events: Vec<Event> = Vec::new();
    for pick in 0..8 {
        let mut fill = Marked { next: 100, pick };
        for body in samples::bodies(&mut fill) {
            let seq = fill.next();
            events.push(samples::event(seq, 1_700_000_000_123_456_789, body, &mut fill));
        }
    }
    events.extend(samples::bodies(&mut Nothing).into_iter().map(|body| Event { body, ..Default::default() }));
    let empty = samples::bodies(&mut Nothing).into_iter().flatten().map(|body| emptied(&body));
    events.extend(empty.map(|body| Event { body: Some(body), ..Default::default() }));
    events
}

/// As a sensor would send it that knows no field of this type.
fn emptied(body: &Body) -> Body {
    match body {
        Body::Connection(_) => Body::Connection(Default::default()),
        Body::Socket(_) => Body::Socket(Default::default()),
        Body::UnixConnection(_) => Body::UnixConnection(Default::default()),
        Body::Access(_) => Body::Access(Default::default()),
        Body::Exec(_) => Body::Exec(Default::default()),
        Body::InstanceStarted(_) => Body::InstanceStarted(Default::default()),
        Body::InstanceEnded(_) => Body::InstanceEnded(Default::default()),
        Body::Loss(_) => Body::Loss(Default::default()),
        Body::PolicyChange(_) => Body::PolicyChange(Default::default()),
        Body::SensorState(_) => Body::SensorState(Default::default()),
        Body::Finding(_) => Body::Finding(Default::default()),
        Body::Dns(_) => Body::Dns(Default::default()),
        Body::ToolCall(_) => Body::ToolCall(Default::default()),
        Body::Prompt(_) => Body::Prompt(Default::default()),
        Body::Resource(_) => Body::Resource(Default::default()),
        Body::McpMessage(_) => Body::McpMessage(Default::default()),
        Body::ToolsListed(_) => Body::ToolsListed(Default::default()),
        Body::Drift(_) => Body::Drift(Default::default()),
        Body::Uninspected(_) => Body::Uninspected(Default::default()),
        Body::Http(_) => Body::Http(Default::default()),
        Body::ConnectionEnd(_) => Body::ConnectionEnd(Default::default()),
    }
}

fn kind(event: &Event) -> &'static str {
    event.body.as_ref().map_or("unknown", json::kind_name)
}

fn value(record: &impl Serialize) -> Value {
    serde_json::to_value(record).unwrap()
}

#[test]
fn the_samples_have_every_type() {
    let events = all();
    for r#type in json::TYPES {
        assert!(events.iter().any(|e| e.body.as_ref().map(json::type_name) == Some(r#type)), "{type}");
    }
}

fn leaves(value: &Value, out: &mut Vec<String>) {
    match value {
        Value::String(text) if !text.is_empty() => out.push(text.clone()),
        Value::Number(number) if number.as_f64() != Some(0.0) => out.push(number.to_string()),
        Value::Array(list) => list.iter().for_each(|v| leaves(v, out)),
        Value::Object(map) => map.values().for_each(|v| leaves(v, out)),
        _ => (),
    }
}

/// Text may have become a part of other text, a number a name.
fn assert_has_all(event: &Event, mut rendered: Value, words: &[&str]) {
    rendered.as_object_mut().unwrap().remove("message");
    if let Some(info) = rendered.get_mut("finding_info").and_then(Value::as_object_mut) {
        info.remove("title");
    }
    let mut native = json::to_json(event);
    for word in words {
        native.as_object_mut().unwrap().remove(*word);
    }
    let (mut wanted, mut found) = (Vec::new(), Vec::new());
    leaves(&native, &mut wanted);
    leaves(&rendered, &mut found);
    for leaf in wanted {
        let is_text = leaf.starts_with("text-");
        let has = |f: &String| if is_text { f.contains(&leaf) } else { *f == leaf };
        assert!(found.iter().any(has), "{}: {leaf} of {native} is not in {rendered}", kind(event));
    }
}

#[test]
fn nothing_of_an_event_is_lost() {
    for event in all() {
        // These are words that the schemas have numbers or words of their own for.
        assert_has_all(
            &event,
            value(&ocsf::render(&event)),
            &["seq", "direction", "severity", "boot", "sensor"],
        );
        let unknown = event.body.is_none();
        let words: &[&str] = if unknown { &["type", "direction"] } else { &["direction", "severity"] };
        assert_has_all(&event, value(&ecs::render(&event)), words);
    }
}

#[test]
fn numbers_are_numbers_and_times_are_the_schemas() {
    let event = Event {
        seq: u64::MAX,
        time_unix_ns: 1_700_000_000_123_456_789,
        sensor: "host-1".to_owned(),
        boot: "b2".to_owned(),
        body: Some(Body::Loss(pb::Loss { count: u64::MAX, ..Default::default() })),
    };
    let ocsf = value(&ocsf::render(&event));
    assert_eq!(ocsf["time"], 1_700_000_000_123_i64);
    assert_eq!(ocsf["metadata"]["uid"], "host-1/b2/18446744073709551615");
    assert_eq!(ocsf["metadata"]["sequence"], u64::MAX);
    assert_eq!(ocsf["metadata"]["version"], "1.8.0");
    assert_eq!(ocsf["count"], i64::MAX);
    let ecs = value(&ecs::render(&event));
    assert_eq!(ecs["@timestamp"], "2023-11-14T22:13:20.123456789Z");
    assert_eq!(ecs["event"]["id"], ocsf["metadata"]["uid"]);
    assert_eq!(ecs["mcp_sensor"]["count"], u64::MAX);
}

#[test]
fn time_before_1970_rounds_down() {
    let event = Event { time_unix_ns: -1, ..Default::default() };
    assert_eq!(ocsf::render(&event).time, Some(-1));
}

#[test]
fn a_list_too_long_for_a_line_is_cut_and_says_so() {
    let tool = |n| pb::Tool { name: format!("tool-{n}"), hash: "0".repeat(64), ..Default::default() };
    let body = pb::ToolsListed { tools: (0..512).map(tool).collect(), ..Default::default() };
    let event = Event { body: Some(Body::ToolsListed(Box::new(body))), seq: 3, ..Default::default() };
    for format in [Format::Ocsf, Format::Ecs] {
        let mut line = Vec::new();
        write_line(format, &event, &mut line).unwrap();
        let value: Value = serde_json::from_slice(&line).unwrap();
        let (tools, mark) = match format {
            Format::Ocsf => (&value["resources"], &value["metadata"]["is_truncated"]),
            _ => (&value["mcp_sensor"]["tools"], &value["mcp_sensor"]["truncated"]),
        };
        assert_eq!(*mark, true);
        assert_eq!(tools.as_array().unwrap().len(), 256);
        assert_eq!(tools[255]["name"], "tool-255");
        if format == Format::Ocsf {
            assert_eq!(ocsf_schema::problems(&value), Vec::<String>::new());
        }
    }
}

#[test]
fn what_an_event_is_known_by_is_never_cut() {
    let id = |c: &str| c.repeat(36);
    let argv = vec!["\u{1}".repeat(4096); 600];
    let client = Some(pb::Client { argv: argv.clone(), ..Default::default() });
    let body =
        pb::Exec { argv, actor: Some(pb::Actor { client, ..Default::default() }), ..Default::default() };
    let event = Event {
        seq: u64::MAX,
        sensor: id("s"),
        boot: id("b"),
        body: Some(Body::Exec(body)),
        ..Default::default()
    };
    for (format, at) in [(Format::Ocsf, "/metadata/uid"), (Format::Ecs, "/event/id")] {
        let mut line = Vec::new();
        write_line(format, &event, &mut line).unwrap();
        assert!(line.len() < MAX_LINE / 4, "the last cut has room to spare: {}", line.len());
        let value: Value = serde_json::from_slice(&line).unwrap();
        let known_by = format!("{}/{}/18446744073709551615", id("s"), id("b"));
        assert_eq!(value.pointer(at).unwrap(), &known_by);
    }
}

/// Whatever proptest thinks of, used again and again.
#[derive(Debug)]
struct Arbitrary {
    texts: Vec<String>,
    numbers: Vec<u64>,
    next: usize,
    spent: usize,
}

impl Arbitrary {
    fn next(&mut self) -> usize {
        self.next += 1;
        self.next
    }
}

impl Fill for Arbitrary {
    fn text(&mut self) -> String {
        let n = self.next() % self.texts.len();
        // Long texts in long lists would take the test minutes.
        let text = if self.spent > 512 << 10 { String::new() } else { self.texts[n].clone() };
        self.spent += text.len();
        text
    }

    fn number(&mut self) -> u64 {
        let n = self.next() % self.numbers.len();
        self.numbers[n]
    }

    fn pick(&mut self, n: i32) -> i32 {
        i32::try_from(self.number() % u64::try_from(n).unwrap()).unwrap()
    }

    fn length(&mut self) -> usize {
        usize::try_from(self.number() % 700).unwrap() / (1 + self.spent / (64 << 10))
    }
}

fn texts() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => any::<String>(),
        1 => (any::<char>(), 0..20_000_usize).prop_map(|(c, n)| c.to_string().repeat(n)),
        1 => Just("\u{1}".repeat(3000)),
        1 => Just("\"\\".repeat(3000)),
        1 => Just("10.0.0.1".to_owned()),
        1 => Just("::ffff:10.0.0.1%eth0".to_owned()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever an event holds: one line of JSON, bounded, valid OCSF and ECS.
    #[test]
    fn any_event_is_one_bounded_line_of_both_schemas(
        texts in proptest::collection::vec(texts(), 1..9),
        numbers in proptest::collection::vec(any::<u64>(), 1..9),
        time in any::<i64>(),
        seq in any::<u64>(),
        strange in any::<i32>(),
    ) {
        let mut fill = Arbitrary { texts, numbers, next: 0, spent: 0 };
        for mut body in samples::bodies(&mut fill) {
            fill.spent = 0;
            if let Some(Body::Finding(f)) = &mut body {
                f.severity = strange;
            }
            let event = samples::event(seq, time, body, &mut fill);
            for format in [Format::Ocsf, Format::Ecs] {
                let mut line = Vec::new();
                write_line(format, &event, &mut line).unwrap();
                prop_assert_eq!(line.iter().position(|b| *b == b'\n'), Some(line.len() - 1));
                prop_assert!(line.len() - 1 <= MAX_LINE, "{:?} {}: {} bytes", format, kind(&event), line.len());
                let value: Value = serde_json::from_slice(&line).unwrap();
                let problems = match format {
                    Format::Ecs => ecs_fields::problems(&value),
                    _ => ocsf_schema::problems(&value),
                };
                prop_assert!(problems.is_empty(), "{:?} {}: {:?}", format, kind(&event), problems);
            }
        }
    }
}
