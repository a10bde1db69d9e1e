//! An event as a document of the Elastic Common Schema.

pub mod record;

use super::rest::{Rest, file_name, is_address};
use crate::event::{Body, Event, json, pb};
use record::*;

/// The version of the schema.
pub const VERSION: &str = "9.4.0";

pub fn render(event: &Event) -> Record {
    let mut rest = Rest::of(event);
    rest.drop_all(&["time", "seq", "sensor", "boot"]);
    let mut record = Record {
        timestamp: Some(json::Time(event.time_unix_ns).to_string()),
        message: super::message(event),
        ecs: Some(Ecs { version: Some(VERSION) }),
        agent: Some(Agent {
            id: Some(event.sensor.clone()),
            ephemeral_id: Some(event.boot.clone()),
            r#type: Some("mcp-sensor"),
            ..Agent::default()
        }),
        host: Some(Host { id: Some(event.sensor.clone()), ..Host::default() }),
        ..Record::default()
    };
    let mut fields = EventFields {
        id: Some(super::unique_id(event)),
        sequence: Some(event.seq),
        kind: Some("event"),
        action: event.body.as_ref().map(json::kind_name),
        severity: Some(1),
        module: Some("mcp_sensor"),
        dataset: Some("mcp_sensor.events"),
        provider: Some("mcp-sensor"),
        ..EventFields::default()
    };
    if let Some(body) = &event.body {
        fill(body, &mut record, &mut fields, &mut rest);
        process(body, &mut record, &mut rest);
    }
    record.event = Some(fields);
    record.related = related(&record);
    record.mcp_sensor = rest.into_value();
    record
}

impl EventFields {
    fn is(&mut self, category: &'static str, types: &[&'static str]) {
        self.category = Some(vec![category]);
        self.r#type = Some(types.to_vec());
    }

    fn ended(&mut self, ok: bool) {
        self.outcome = Some(if ok { "success" } else { "failure" });
    }
}

fn fill(body: &Body, record: &mut Record, event: &mut EventFields, rest: &mut Rest) {
    match body {
        Body::Connection(c) => {
            event.is("network", &["connection"]);
            decision(c.decision.as_ref(), record, event, rest);
            ends(c.direction(), record, rest);
        }
        Body::UnixConnection(u) => {
            event.is("network", &["connection"]);
            decision(u.decision.as_ref(), record, event, rest);
            record.destination = rest.text("path").map(|p| End { address: Some(p), ..End::default() });
        }
        Body::Access(a) => {
            event.is("intrusion_detection", &["info"]);
            decision(a.decision.as_ref(), record, event, rest);
        }
        Body::ConnectionEnd(c) => {
            let denied: &[&str] = if c.outcome == "denied" { &["denied"] } else { &[] };
            event.is("network", &[&["connection", "end"], denied].concat());
            event.ended(c.outcome == "closed");
            event.reason = rest.text("outcome");
            event.duration = rest.number("duration_ns");
            event.start = rest.text("started");
            ends(c.direction(), record, rest);
            traffic(c.direction(), record, rest);
        }
        Body::Dns(d) => {
            event.is("network", &["protocol"]);
            decision(d.decision.as_ref(), record, event, rest);
            let question = Question { name: rest.text("name"), r#type: rest.text("qtype") };
            let address = if is_address(&d.address) { rest.text("address") } else { None };
            record.dns = Some(Dns {
                r#type: Some(if address.is_some() { "answer" } else { "query" }),
                question: Some(question),
                resolved_ip: address.map(|a| vec![a]),
            });
            record.destination = rest.text("resolver").map(|ip| located(Some(ip), None, None));
            record.network = Some(network(pb::Direction::Egress, record.destination.as_ref(), rest));
        }
        Body::Socket(s) => {
            event.is("network", &["access"]);
            decision(s.decision.as_ref(), record, event, rest);
        }
        Body::Http(h) => {
            event.is("web", &["access"]);
            http(h.direction(), record, event, rest);
        }
        Body::Exec(e) => {
            event.is("process", &["start"]);
            record.process = Some(Process {
                command_line: (!e.argv.is_empty()).then(|| e.argv.join(" ")),
                args: rest.strings("argv"),
                args_count: Some(e.argv.len()),
                parent: rest.number("parent_pid").map(|pid| Pid { pid: Some(pid) }),
                ..Process::default()
            });
        }
        Body::InstanceStarted(i) => {
            event.is("process", &["start"]);
            record.process = Some(Process {
                args: rest.strings("argv"),
                args_count: Some(i.argv.len()),
                ..Process::default()
            });
        }
        Body::InstanceEnded(_) => {
            event.is("process", &["end"]);
            event.start = rest.text("started");
        }
        Body::Loss(l) => {
            event.is("host", &["info"]);
            event.kind = Some("pipeline_error");
            event.severity = Some(if l.denials > 0 { 4 } else { 3 });
            event.reason = rest.text("reason");
        }
        Body::Uninspected(_) => {
            event.is("api", &["info"]);
            event.kind = Some("pipeline_error");
            event.severity = Some(2);
            event.reason = rest.text("how");
        }
        Body::PolicyChange(p) => {
            event.is("configuration", &["change"]);
            rest.drop_all(&["ok"]);
            event.ended(p.ok);
            event.severity = Some(if p.ok { 1 } else { 3 });
            record.error =
                rest.text("error").map(|m| ErrorFields { message: Some(m), ..ErrorFields::default() });
        }
        Body::SensorState(s) => sensor_state(s, record, event, rest),
        Body::Finding(f) => {
            event.is("intrusion_detection", &["info"]);
            event.kind = Some("alert");
            event.severity = Some(i64::from(f.severity));
            event.code = Some(f.kind.clone()).filter(|k| !k.is_empty());
            event.reason = rest.text("detail");
            record.rule = rest.text("rule").map(|name| Rule { name: Some(name) });
            record.gen_ai = rest.text("tool").map(|t| gen_ai(t, None));
        }
        Body::Drift(d) => {
            event.is("configuration", &["change"]);
            event.kind = Some("alert");
            event.severity = Some(3);
            event.code = Some(d.what.clone()).filter(|w| !w.is_empty());
            record.gen_ai = rest.text("tool").map(|t| gen_ai(t, None));
        }
        Body::ToolCall(_) => {
            exchange(body, record, event, rest);
            record.gen_ai = Some(gen_ai(rest.text("tool").unwrap_or_default(), Some("execute_tool")));
        }
        Body::Resource(_) => {
            exchange(body, record, event, rest);
            record.url =
                Some(Url { scheme: rest.text("scheme"), domain: rest.text("host"), ..Url::default() });
        }
        Body::Prompt(_) | Body::McpMessage(_) | Body::ToolsListed(_) => exchange(body, record, event, rest),
    }
}

/// The verdict's word stays: no field has `would_deny`.
fn decision(d: Option<&pb::Decision>, record: &mut Record, event: &mut EventFields, rest: &mut Rest) {
    let types = event.r#type.get_or_insert_default();
    match d.map_or(pb::Verdict::Unspecified, pb::Decision::verdict) {
        pb::Verdict::Allow => {
            types.push("allowed");
            event.ended(true);
        }
        pb::Verdict::WouldDeny => {
            types.push("allowed");
            event.severity = Some(2);
            event.ended(true);
        }
        pb::Verdict::Deny => {
            types.push("denied");
            event.severity = Some(3);
            event.ended(false);
        }
        pb::Verdict::Unspecified => event.outcome = Some("unknown"),
    }
    event.reason = rest.text("reason");
    record.rule = rest.text("rule").map(|name| Rule { name: Some(name) });
}

/// The server's process and what it belongs to. Server and instance stay under
/// their own names too: people look for them there.
fn process(body: &Body, record: &mut Record, rest: &mut Rest) {
    let server = crate::event::server(body);
    if !server.is_empty() {
        let instance = rest.look_at("instance");
        record.service = Some(Service {
            name: Some(server.to_owned()),
            r#type: Some("mcp"),
            node: (!instance.is_empty()).then(|| Node { name: Some(instance.to_owned()) }),
        });
    }
    if crate::event::actor(body).is_none() {
        return;
    }
    let process = record.process.get_or_insert_default();
    process.pid = rest.number("pid");
    process.executable = rest.text("exe");
    process.name = rest.text("comm").or_else(|| process.executable.as_deref().map(file_name));
    record.user = Some(User { id: rest.identifier("uid"), name: rest.text("user") });
    record.container = rest.text("container").map(|id| Id { id: Some(id) });
}

fn located(ip: Option<String>, port: Option<i64>, domain: Option<String>) -> End {
    let valid = ip.as_deref().is_some_and(is_address);
    End {
        address: ip.clone().or_else(|| domain.clone()),
        ip: ip.filter(|_| valid),
        port,
        domain,
        ..End::default()
    }
}

/// `dst`, `src` or `peer`; `None` if nothing is known of it.
fn end(mut end: Rest) -> Option<End> {
    let (ip, name) = (end.text("ip"), end.text("name"));
    let port = end.number("port").filter(|p| (0..=65_535).contains(p));
    (ip.is_some() || name.is_some()).then(|| located(ip, port, name))
}

fn ends(direction: pb::Direction, record: &mut Record, rest: &mut Rest) {
    record.source = end(rest.object("src"));
    record.destination = end(rest.object("dst"));
    let known = record.destination.as_ref().or(record.source.as_ref());
    record.network = Some(network(direction, known, rest));
}

fn network(direction: pb::Direction, end: Option<&End>, rest: &mut Rest) -> Network {
    rest.drop_all(&["direction"]);
    let protocol = rest.text("protocol");
    let numbered = protocol.as_deref().is_some_and(|p| p.parse::<u8>().is_ok());
    let ip = end.and_then(|e| e.ip.as_deref());
    Network {
        direction: match direction {
            pb::Direction::Egress => Some("egress"),
            pb::Direction::Inbound => Some("ingress"),
            pb::Direction::Unspecified => None,
        },
        transport: protocol.clone().filter(|_| !numbered),
        iana_number: protocol.filter(|_| numbered),
        r#type: ip.map(|ip| if ip.contains(':') { "ipv6" } else { "ipv4" }),
        ..Network::default()
    }
}

fn traffic(direction: pb::Direction, record: &mut Record, rest: &mut Rest) {
    let mut take = |key| rest.number(key);
    let (mut sent, mut received) =
        ((take("bytes_sent"), take("packets_sent")), (take("bytes_received"), take("packets_received")));
    if direction == pb::Direction::Inbound {
        std::mem::swap(&mut sent, &mut received);
    }
    let source = record.source.get_or_insert_default();
    (source.bytes, source.packets) = sent;
    let destination = record.destination.get_or_insert_default();
    (destination.bytes, destination.packets) = received;
    let sum = |a: Option<i64>, b: Option<i64>| Some(a?.saturating_add(b?));
    let network = record.network.get_or_insert_default();
    (network.bytes, network.packets) = (sum(sent.0, received.0), sum(sent.1, received.1));
}

fn http(direction: pb::Direction, record: &mut Record, event: &mut EventFields, rest: &mut Rest) {
    // 0: none was seen.
    let status = rest.number("status").filter(|c| *c != 0);
    if let Some(code) = status {
        event.ended((100..400).contains(&code));
    }
    record.http = Some(Http {
        request: Some(HttpRequest { method: rest.text("method"), bytes: rest.number("request_bytes") }),
        response: Some(HttpResponse { status_code: status, bytes: rest.number("response_bytes") }),
    });
    record.url = Some(Url { domain: rest.text("host"), path: rest.text("path"), ..Url::default() });
    event.duration = rest.number("duration_ns");
    let peer = end(rest.object("peer"));
    record.network = Some(network(direction, peer.as_ref(), rest));
    match direction {
        pb::Direction::Inbound => record.source = peer,
        _ => record.destination = peer,
    }
}

fn exchange(body: &Body, record: &mut Record, event: &mut EventFields, rest: &mut Rest) {
    let outcome = crate::event::exchange(body).map_or(pb::Outcome::Unspecified, pb::Exchange::outcome);
    event.is("api", &[if matches!(body, Body::McpMessage(_)) { "info" } else { "access" }]);
    event.outcome = match outcome {
        pb::Outcome::Ok => Some("success"),
        pb::Outcome::ToolError | pb::Outcome::RpcError | pb::Outcome::Cancelled | pb::Outcome::NoResponse => {
            Some("failure")
        }
        pb::Outcome::InputRequired | pb::Outcome::Task | pb::Outcome::Unspecified => Some("unknown"),
    };
    event.duration = rest.number("duration_ns");
    record.error =
        rest.identifier("error_code").map(|code| ErrorFields { code: Some(code), ..ErrorFields::default() });
}

fn gen_ai(tool: String, operation: Option<&str>) -> GenAi {
    GenAi {
        operation: operation.map(|name| Name { name: Some(name.to_owned()) }),
        tool: Some(Name { name: Some(tool) }),
    }
}

fn sensor_state(s: &pb::SensorState, record: &mut Record, event: &mut EventFields, rest: &mut Rest) {
    let phase = match s.phase() {
        pb::SensorPhase::Started => "start",
        pb::SensorPhase::Stopping => "end",
        pb::SensorPhase::Heartbeat | pb::SensorPhase::Unspecified => "info",
    };
    event.is("host", &[phase]);
    if phase == "info" {
        event.kind = Some("state");
    }
    if !s.degraded.is_empty() {
        event.severity = Some(2);
    }
    if let Some(agent) = &mut record.agent {
        agent.version = rest.text("version");
    }
    if let Some(host) = &mut record.host {
        host.hostname = rest.text("host");
        host.os = Some(Os { r#type: Some("linux"), kernel: rest.text("kernel") });
    }
}

/// What people search by, whichever end or side it was.
fn related(record: &Record) -> Option<Related> {
    let ends = [&record.source, &record.destination];
    let mut ip: Vec<String> = ends.iter().filter_map(|e| e.as_ref()?.ip.clone()).collect();
    ip.extend(record.dns.iter().flat_map(|d| d.resolved_ip.clone().unwrap_or_default()));
    let mut hosts: Vec<String> = ends.iter().filter_map(|e| e.as_ref()?.domain.clone()).collect();
    hosts.extend(record.url.iter().filter_map(|u| u.domain.clone()));
    hosts.extend(record.dns.iter().filter_map(|d| d.question.as_ref()?.name.clone()));
    let user: Vec<String> = record.user.iter().filter_map(|u| u.name.clone()).collect();
    let some = |list: Vec<String>| (!list.is_empty()).then_some(list);
    let related = Related { ip: some(ip), hosts: some(hosts), user: some(user) };
    (related.ip.is_some() || related.hosts.is_some() || related.user.is_some()).then_some(related)
}
