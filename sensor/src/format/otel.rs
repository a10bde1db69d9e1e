//! An event as an OpenTelemetry log record. Attributes have the names of the
//! semantic conventions where there is one; everything else goes along as
//! `mcp_sensor.` and its native name, objects with a dot for each level.

use super::rest::Rest;
use crate::event::{Body, Event, json, pb};
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::common::v1::{
    AnyValue, ArrayValue, InstrumentationScope, KeyValue, KeyValueList,
};
use opentelemetry_proto::tonic::logs::v1::{LogRecord, ResourceLogs, ScopeLogs, SeverityNumber};
use opentelemetry_proto::tonic::resource::v1::Resource;
use serde_json::Value;

/// What the native form calls it, and the conventions.
pub const PROCESS: [(&str, &str); 7] = [
    ("pid", "process.pid"),
    ("exe", "process.executable.path"),
    ("argv", "process.command_args"),
    ("parent_pid", "process.parent_pid"),
    ("uid", "process.user.id"),
    ("user", "process.user.name"),
    ("container", "container.id"),
];
pub const VERDICT: [(&str, &str); 1] = [("rule", "security_rule.name")];
pub const CONNECTION: [(&str, &str); 2] =
    [("protocol", "network.transport"), ("sni", "tls.client.server_name")];
pub const DNS: [(&str, &str); 3] =
    [("name", "dns.question.name"), ("resolver", "network.peer.address"), ("protocol", "network.transport")];
pub const HTTP: [(&str, &str); 6] = [
    ("method", "http.request.method"),
    ("path", "url.path"),
    ("host", "server.address"),
    ("status", "http.response.status_code"),
    ("mcp_method", "mcp.method.name"),
    ("protocol_version", "mcp.protocol.version"),
];
pub const MESSAGE: [(&str, &str); 3] = [
    ("method", "mcp.method.name"),
    ("protocol_version", "mcp.protocol.version"),
    ("error_code", "rpc.response.status_code"),
];
pub const TOOL: [(&str, &str); 1] = [("tool", "gen_ai.tool.name")];
pub const PROMPT: [(&str, &str); 1] = [("name", "gen_ai.prompt.name")];
pub const RESOURCE: [(&str, &str); 2] = [("scheme", "url.scheme"), ("host", "url.domain")];
pub const FINDING: [(&str, &str); 3] =
    [("rule", "security_rule.name"), ("tool", "gen_ai.tool.name"), ("method", "mcp.method.name")];
pub const STATE: [(&str, &str); 1] = [("host", "host.name")];
/// Whole numbers in the native form, text in the conventions.
const AS_TEXT: [&str; 2] = ["uid", "error_code"];
/// Of our own.
const PREFIX: &str = "mcp_sensor";

/// Log records by the sensor they are of, in the order of `events`. `observed`:
/// now, UTC, nanoseconds since 1970.
pub fn resource_logs<'a>(events: impl IntoIterator<Item = &'a Event>, observed: i64) -> Vec<ResourceLogs> {
    let mut groups: Vec<((&str, &str), Vec<LogRecord>)> = Vec::new();
    for event in events {
        let origin = (event.sensor.as_str(), event.boot.as_str());
        let record = render(event, observed);
        match groups.last_mut().filter(|(of, _)| *of == origin) {
            Some((_, records)) => records.push(record),
            None => groups.push((origin, vec![record])),
        }
    }
    let logs = |((sensor, boot), log_records)| ResourceLogs {
        resource: Some(resource(sensor, boot)),
        scope_logs: vec![ScopeLogs { scope: Some(scope()), log_records, ..Default::default() }],
        ..Default::default()
    };
    groups.into_iter().map(logs).collect()
}

pub fn scope() -> InstrumentationScope {
    InstrumentationScope {
        name: "mcp-sensor".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..Default::default()
    }
}

/// A sensor is one on its host. What a collector itself tells is of no sensor.
fn resource(sensor: &str, boot: &str) -> Resource {
    let mut attributes = Attributes::default();
    attributes.text("service.name", "mcp-sensor");
    if !sensor.is_empty() {
        attributes.text("service.instance.id", sensor);
        attributes.text("host.id", sensor);
        if !boot.is_empty() {
            attributes.text("mcp_sensor.boot", boot);
        }
    }
    Resource { attributes: attributes.0, ..Default::default() }
}

pub fn render(event: &Event, observed: i64) -> LogRecord {
    let mut rest = Rest::of(event);
    rest.drop_all(&["time", "sensor", "boot"]);
    let mut attributes = Attributes::default();
    if event.seq > 0 {
        attributes.text("log.record.uid", &super::unique_id(event));
    }
    let kind = event.body.as_ref().map_or("unknown", json::kind_name);
    if let Some(body) = &event.body {
        fill(body, &mut attributes, &mut rest);
    }
    if let Some(rest) = rest.into_value() {
        attributes.flatten(PREFIX, rest);
    }
    let severity = event.body.as_ref().map_or(SeverityNumber::Info, severity);
    LogRecord {
        time_unix_nano: u64::try_from(event.time_unix_ns).unwrap_or(0),
        observed_time_unix_nano: u64::try_from(observed).unwrap_or(0),
        severity_number: severity.into(),
        severity_text: severity.as_str_name().trim_start_matches("SEVERITY_NUMBER_").to_owned(),
        body: super::message(event).map(|text| AnyValue { value: Some(Any::StringValue(text)) }),
        attributes: attributes.0,
        event_name: format!("{PREFIX}.{kind}"),
        ..Default::default()
    }
}

pub fn severity(body: &Body) -> SeverityNumber {
    if let Some(decision) = crate::event::decision(body) {
        return match decision.verdict() {
            pb::Verdict::Deny => SeverityNumber::Warn,
            pb::Verdict::WouldDeny => SeverityNumber::Info2,
            pb::Verdict::Allow | pb::Verdict::Unspecified => SeverityNumber::Info,
        };
    }
    match body {
        Body::Finding(f) => match f.severity() {
            pb::Severity::Critical => SeverityNumber::Fatal,
            pb::Severity::High => SeverityNumber::Error,
            pb::Severity::Medium => SeverityNumber::Warn,
            pb::Severity::Low => SeverityNumber::Info2,
            pb::Severity::Info | pb::Severity::Unspecified => SeverityNumber::Info,
        },
        Body::Loss(l) if l.denials > 0 => SeverityNumber::Error,
        Body::Loss(_) | Body::Drift(_) => SeverityNumber::Warn,
        Body::PolicyChange(p) if !p.ok => SeverityNumber::Warn,
        Body::SensorState(s) if !s.degraded.is_empty() => SeverityNumber::Info2,
        Body::Uninspected(_) => SeverityNumber::Info2,
        _ => SeverityNumber::Info,
    }
}

fn fill(body: &Body, to: &mut Attributes, rest: &mut Rest) {
    match body {
        Body::Connection(c) => {
            to.take(rest, &CONNECTION);
            ends(c.direction(), to, rest);
        }
        Body::ConnectionEnd(c) => {
            to.take(rest, &CONNECTION);
            ends(c.direction(), to, rest);
        }
        Body::Dns(_) => to.take(rest, &DNS),
        Body::Http(_) => {
            // 0: none was seen.
            if rest.look_at_number("status") == Some(0) {
                rest.drop_all(&["status"]);
            }
            to.take(rest, &HTTP);
            let mut peer = rest.object("peer");
            to.take(&mut peer, &[("ip", "network.peer.address"), ("port", "network.peer.port")]);
            rest.put_back("peer", peer);
        }
        Body::ToolCall(_) => {
            to.text("gen_ai.operation.name", "execute_tool");
            to.take(rest, &TOOL);
        }
        Body::Prompt(_) => to.take(rest, &PROMPT),
        Body::Resource(_) => to.take(rest, &RESOURCE),
        Body::Finding(_) => to.take(rest, &FINDING),
        Body::Drift(_) => to.take(rest, &TOOL),
        Body::SensorState(_) => to.take(rest, &STATE),
        Body::Socket(_)
        | Body::UnixConnection(_)
        | Body::Access(_)
        | Body::Exec(_)
        | Body::InstanceStarted(_)
        | Body::InstanceEnded(_)
        | Body::Loss(_)
        | Body::PolicyChange(_)
        | Body::McpMessage(_)
        | Body::ToolsListed(_)
        | Body::Uninspected(_) => (),
    }
    if let Some(exchange) = crate::event::exchange(body) {
        message(exchange, to, rest);
    }
    if crate::event::decision(body).is_some() {
        to.take(rest, &VERDICT);
    }
    to.take(rest, &PROCESS);
}

/// The word of the transport and of the outcome stay: no attribute says as much.
fn message(exchange: &pb::Exchange, to: &mut Attributes, rest: &mut Rest) {
    match exchange.transport.as_str() {
        "stdio" => to.text("network.transport", "pipe"),
        "http" | "sse" => {
            to.text("network.transport", "tcp");
            to.text("network.protocol.name", "http");
        }
        _ => (),
    }
    match exchange.outcome() {
        pb::Outcome::RpcError => to.text("error.type", &exchange.error_code.to_string()),
        failed @ (pb::Outcome::ToolError | pb::Outcome::Cancelled | pb::Outcome::NoResponse) => {
            to.text("error.type", json::outcome_name(failed));
        }
        pb::Outcome::Ok | pb::Outcome::InputRequired | pb::Outcome::Task | pb::Outcome::Unspecified => (),
    }
    to.take(rest, &MESSAGE);
}

/// The peer is the other end, whoever began; the server's name is that of the
/// end which was connected to.
fn ends(direction: pb::Direction, to: &mut Attributes, rest: &mut Rest) {
    const PEER: [(&str, &str); 2] = [("ip", "network.peer.address"), ("port", "network.peer.port")];
    const LOCAL: [(&str, &str); 2] = [("ip", "network.local.address"), ("port", "network.local.port")];
    let (dst, src) = match direction {
        pb::Direction::Inbound => (&LOCAL, &PEER),
        pb::Direction::Egress | pb::Direction::Unspecified => (&PEER, &LOCAL),
    };
    for (key, names) in [("dst", dst), ("src", src)] {
        let mut end = rest.object(key);
        if key == "dst" {
            to.take(&mut end, &[("name", "server.address")]);
        }
        to.take(&mut end, names);
        rest.put_back(key, end);
    }
}

#[derive(Default)]
struct Attributes(Vec<KeyValue>);

impl Attributes {
    fn add(&mut self, key: String, value: Any) {
        let value = Some(AnyValue { value: Some(value) });
        self.0.push(KeyValue { key, value, ..Default::default() });
    }

    fn text(&mut self, key: &str, text: &str) {
        self.add(key.to_owned(), Any::StringValue(text.to_owned()));
    }

    /// Fields that the conventions have a name for.
    fn take(&mut self, rest: &mut Rest, names: &[(&str, &str)]) {
        for (native, name) in names {
            match rest.take(native) {
                Some(Value::Number(number)) if AS_TEXT.contains(native) => {
                    self.text(name, &number.to_string());
                }
                Some(value) => self.flatten(name, value),
                None => (),
            }
        }
    }

    fn flatten(&mut self, key: &str, value: Value) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    self.flatten(&format!("{key}.{name}"), value);
                }
            }
            Value::Null => (),
            Value::String(text) if text.is_empty() => (),
            Value::Array(items) if items.is_empty() => (),
            value => self.add(key.to_owned(), any(value)),
        }
    }
}

/// Numbers are signed here: what does not fit is text.
fn any(value: Value) -> Any {
    let wrap = |value| AnyValue { value: Some(any(value)) };
    match value {
        Value::Null => Any::StringValue(String::new()),
        Value::Bool(yes) => Any::BoolValue(yes),
        Value::Number(number) => match number.as_i64() {
            Some(number) => Any::IntValue(number),
            None => Any::StringValue(number.to_string()),
        },
        Value::String(text) => Any::StringValue(text),
        Value::Array(items) => Any::ArrayValue(ArrayValue { values: items.into_iter().map(wrap).collect() }),
        Value::Object(fields) => {
            let field = |(key, value)| KeyValue { key, value: Some(wrap(value)), ..Default::default() };
            Any::KvlistValue(KeyValueList { values: fields.into_iter().map(field).collect() })
        }
    }
}
