//! An event as one of OCSF 1.8.0.

mod mcp;
pub mod record;

use super::rest::{Rest, file_name, is_address};
use crate::event::{Body, Event, json, pb};
use record::*;

/// The version of the schema.
pub const VERSION: &str = "1.8.0";

const PRODUCT: &str = "mcp-sensor";

pub fn render(event: &Event) -> Record {
    let mut rest = Rest::of(event);
    rest.drop_all(&["seq", "sensor", "boot"]);
    let mut record = Record {
        time: Some(milliseconds(event.time_unix_ns)),
        message: super::message(event),
        device: Some(Device {
            uid: Some(event.sensor.clone()),
            type_id: Some(UNKNOWN.0),
            r#type: Some(UNKNOWN.1),
            ..Device::default()
        }),
        ..Record::default()
    };
    record.severity(INFORMATIONAL);
    let mut product = product();
    match &event.body {
        Some(body) => fill(body, event, &mut record, &mut rest, &mut product),
        None => record.class(&BASE_EVENT, UNKNOWN),
    }
    record.metadata = Some(Metadata {
        version: Some(VERSION),
        product: Some(product),
        profiles: Some(profiles(&record)),
        uid: Some(super::unique_id(event)),
        sequence: Some(event.seq),
        event_code: event.body.as_ref().map(json::kind_name),
        log_provider: Some(PRODUCT),
    });
    record.unmapped = rest.into_value();
    record
}

fn product() -> Product {
    Product {
        name: Some(PRODUCT.to_owned()),
        vendor_name: Some(PRODUCT),
        version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        ..Product::default()
    }
}

/// Those that attributes of the record belong to.
fn profiles(record: &Record) -> Vec<&'static str> {
    let mut profiles = vec!["host"];
    let process = |a: &Actor| a.process.as_ref().is_some_and(|p| p.container.is_some());
    if record.process.as_ref().is_some_and(|p| p.container.is_some())
        || record.actor.as_ref().is_some_and(process)
        || record.evidences.iter().flatten().filter_map(|e| e.actor.as_ref()).any(process)
    {
        profiles.push("container");
    }
    if record.action_id.is_some() || record.policy.is_some() || record.is_alert.is_some() {
        profiles.push("security_control");
    }
    if record.message_context.is_some() {
        profiles.push("ai_operation");
    }
    profiles
}

impl Record {
    fn class(&mut self, class: &Class, activity: Captioned) {
        self.activity(class, activity.0, activity.1, activity.1);
    }

    /// An activity that the schema has no number for.
    fn class_other(&mut self, class: &Class, activity: &str) {
        self.activity(class, OTHER, activity, "Other");
    }

    fn activity(&mut self, class: &Class, id: u32, name: &str, caption: &str) {
        self.activity_id = Some(id);
        self.activity_name = Some(name.to_owned());
        self.category_uid = Some(class.category.0);
        self.category_name = Some(class.category.1);
        self.class_uid = Some(class.uid);
        self.class_name = Some(class.name);
        self.type_uid = Some(u64::from(class.uid) * 100 + u64::from(id));
        self.type_name = Some(format!("{}: {caption}", class.name));
    }

    fn severity(&mut self, severity: Captioned) {
        (self.severity_id, self.severity) = (Some(severity.0), Some(severity.1));
    }

    fn status(&mut self, status: Captioned) {
        (self.status_id, self.status) = (Some(status.0), Some(status.1.to_owned()));
    }

    fn control(&mut self, (action, disposition): Control) {
        (self.action_id, self.action) = (Some(action.0), Some(action.1));
        (self.disposition_id, self.disposition) = (Some(disposition.0), Some(disposition.1));
    }
}

fn fill(body: &Body, event: &Event, record: &mut Record, rest: &mut Rest, product: &mut Product) {
    match body {
        Body::Connection(c) => {
            record.class(&NETWORK_ACTIVITY, (1, "Open"));
            decision(c.decision.as_ref(), record, rest);
            ends(c.direction(), record, rest);
            record.actor = Some(actor(rest));
        }
        Body::UnixConnection(u) => {
            record.class(&NETWORK_ACTIVITY, (1, "Open"));
            decision(u.decision.as_ref(), record, rest);
            record.src_endpoint = Some(service(rest));
            record.dst_endpoint =
                rest.text("path").map(|p| Endpoint { name: Some(p), ..Endpoint::default() });
            record.connection_info = Some(ConnectionInfo {
                direction_id: Some(4),
                direction: Some("Local"),
                ..ConnectionInfo::default()
            });
            record.actor = Some(actor(rest));
        }
        Body::ConnectionEnd(c) => {
            let activity = match c.outcome.as_str() {
                "closed" => (2, "Close"),
                "reset" => (3, "Reset"),
                _ => (4, "Fail"),
            };
            record.class(&NETWORK_ACTIVITY, activity);
            record.status(if activity.0 == 2 { SUCCESS } else { FAILURE });
            if c.outcome == "denied" {
                record.control(BLOCKED);
            }
            record.status_detail = rest.text("outcome");
            traffic(c.direction(), record, rest);
            ends(c.direction(), record, rest);
            duration(record, rest);
            if c.started_unix_ns != 0 {
                record.start_time = Some(milliseconds(c.started_unix_ns));
                record.end_time = record.time;
            }
            record.actor = Some(actor(rest));
        }
        Body::Dns(d) => {
            let answered = !d.address.is_empty() || ANSWERS.contains(&reason(d.decision.as_ref()));
            record.class(&DNS_ACTIVITY, if answered { (2, "Response") } else { (1, "Query") });
            decision(d.decision.as_ref(), record, rest);
            let qtype = rest.text("qtype");
            record.answers =
                rest.text("address").map(|a| vec![DnsAnswer { rdata: Some(a), r#type: qtype.clone() }]);
            record.query =
                Some(DnsQuery { hostname: Some(rest.text("name").unwrap_or_default()), r#type: qtype });
            record.src_endpoint = Some(service(rest));
            record.dst_endpoint = rest.text("resolver").map(|ip| located(ip, None, None));
            let mut info = connection_info(pb::Direction::Egress, rest);
            protocol_version(&mut info, record.dst_endpoint.as_ref());
            record.connection_info = Some(info);
            record.actor = Some(actor(rest));
        }
        Body::Socket(s) => {
            record.class(&KERNEL_ACTIVITY, (4, "Invoke"));
            decision(s.decision.as_ref(), record, rest);
            let call = if s.level.is_some() { "setsockopt" } else { "socket" };
            record.kernel = Some(Kernel::of_call(call));
            record.actor = Some(actor(rest));
        }
        Body::Access(a) => {
            record.class(&KERNEL_ACTIVITY, (4, "Invoke"));
            decision(a.decision.as_ref(), record, rest);
            let call = match a.operation.as_str() {
                "read" => "process_vm_readv",
                "attach" => "ptrace",
                "unlink" => "unlink",
                "rename" => "rename",
                "unmount" => "umount2",
                "cover" => "mount",
                _ if a.decision.as_ref().is_some_and(|d| d.hook == "kill") => "kill",
                _ => "bpf",
            };
            record.kernel = Some(Kernel::of_call(call));
            record.actor = Some(actor(rest));
        }
        Body::Http(h) => http(h.direction(), record, rest),
        Body::Exec(e) => {
            record.class(&PROCESS_ACTIVITY, (1, "Launch"));
            (record.launch_type_id, record.launch_type) = (Some(3), Some("Exec"));
            let mut actor = actor(rest);
            let mut process = actor.process.take().unwrap_or_default();
            process.user =
                Some(User { name: text_of(actor.user.as_ref()), uid: uid_of(actor.user.as_ref()) });
            // The arguments stay in the rest too: here nobody can tell where one ends.
            process.cmd_line = (!e.argv.is_empty()).then(|| e.argv.join(" "));
            record.process = Some(process);
            actor.process =
                rest.number("parent_pid").map(|pid| Process { pid: Some(pid), ..Process::default() });
            record.actor = Some(actor);
        }
        Body::InstanceStarted(_) => {
            record.class(&APPLICATION_LIFECYCLE, (3, "Start"));
            instance(record, rest);
        }
        Body::InstanceEnded(i) => {
            record.class(&APPLICATION_LIFECYCLE, (4, "Stop"));
            instance(record, rest);
            if i.started_unix_ns != 0 {
                record.start_time = Some(milliseconds(i.started_unix_ns));
                record.end_time = record.time;
            }
        }
        Body::Loss(l) => {
            record.class_other(&EVENT_LOG_ACTIVITY, "Lost");
            record.severity(if l.denials > 0 { HIGH } else { MEDIUM });
            record.status(FAILURE);
            record.status_detail = rest.text("reason");
            record.count = rest.number("count");
            record.log_provider = Some(PRODUCT);
        }
        Body::Uninspected(_) => {
            record.class_other(&EVENT_LOG_ACTIVITY, "Uninspected");
            record.severity(LOW);
            record.status(FAILURE);
            record.status_detail = rest.text("how");
            record.log_provider = Some(PRODUCT);
            record.actor = Some(actor(rest));
        }
        Body::PolicyChange(p) => policy_change(p, record, rest),
        Body::SensorState(s) => {
            match s.phase() {
                pb::SensorPhase::Started => record.class(&APPLICATION_LIFECYCLE, (3, "Start")),
                pb::SensorPhase::Stopping => record.class(&APPLICATION_LIFECYCLE, (4, "Stop")),
                pb::SensorPhase::Heartbeat => record.class_other(&APPLICATION_LIFECYCLE, "Heartbeat"),
                pb::SensorPhase::Unspecified => record.class(&APPLICATION_LIFECYCLE, UNKNOWN),
            }
            if !s.degraded.is_empty() {
                record.severity(LOW);
            }
            if let Some(version) = rest.text("version") {
                product.version = Some(version);
            }
            record.app = Some(Product { version: product.version.clone(), ..self::product() });
            if let Some(device) = &mut record.device {
                device.hostname = rest.text("host");
                device.os = Some(Os {
                    name: Some("Linux"),
                    type_id: Some(200),
                    r#type: Some("Linux"),
                    kernel_release: rest.text("kernel"),
                });
            }
            policy(record, rest);
        }
        Body::Finding(f) => mcp::finding(f, event, record, rest),
        Body::Drift(_) => mcp::drift(event, record, rest),
        Body::ToolCall(_)
        | Body::Prompt(_)
        | Body::Resource(_)
        | Body::McpMessage(_)
        | Body::ToolsListed(_) => mcp::exchange(body, record, rest),
    }
}

/// Reasons that are about an answer, whether or not it had an address.
const ANSWERS: [&str; 3] = ["rebinding", "answer_unread", "not_learned"];

fn reason(decision: Option<&pb::Decision>) -> &str {
    decision.map_or("", |d| &d.reason)
}

/// The verdict's word stays in the rest too: `would_deny` has no other.
fn decision(d: Option<&pb::Decision>, record: &mut Record, rest: &mut Rest) {
    let (status, control, severity) = match d.map_or(pb::Verdict::Unspecified, pb::Decision::verdict) {
        pb::Verdict::Allow => (SUCCESS, ALLOWED, INFORMATIONAL),
        pb::Verdict::WouldDeny => (SUCCESS, DETECTED, LOW),
        pb::Verdict::Deny => (FAILURE, BLOCKED, MEDIUM),
        pb::Verdict::Unspecified => (UNKNOWN, (UNKNOWN, UNKNOWN), INFORMATIONAL),
    };
    record.status(status);
    record.control(control);
    record.severity(severity);
    record.status_detail = rest.text("reason");
    record.count = rest.number("count");
    record.firewall_rule = rest.text("rule").map(|name| Named { name: Some(name), ..Named::default() });
    policy(record, rest);
}

fn policy(record: &mut Record, rest: &mut Rest) {
    record.policy =
        rest.text("policy").map(|hash| Policy { uid: Some(hash), version: rest.identifier("generation") });
}

/// The server's process, as the native form has it.
fn actor(rest: &mut Rest) -> Actor {
    let exe = rest.text("exe");
    let process = Process {
        pid: rest.number("pid"),
        name: rest.text("comm").or_else(|| exe.as_deref().map(file_name)),
        file: exe.map(file),
        container: rest.text("container").map(|id| Named { uid: Some(id), ..Named::default() }),
        ..Process::default()
    };
    Actor {
        app_name: rest.text("server"),
        app_uid: rest.text("instance"),
        process: Some(process),
        user: Some(User { name: rest.text("user"), uid: rest.identifier("uid") }),
    }
}

fn text_of(user: Option<&User>) -> Option<String> {
    user.and_then(|u| u.name.clone())
}

fn uid_of(user: Option<&User>) -> Option<String> {
    user.and_then(|u| u.uid.clone())
}

fn file(path: String) -> File {
    File { name: Some(file_name(&path)), path: Some(path), type_id: Some(1), r#type: Some("Regular File") }
}

/// The server as an end of a connection; its name stays for the actor.
fn service(rest: &Rest) -> Endpoint {
    let server = rest.look_at("server");
    let name = if server.is_empty() { "unknown" } else { server };
    Endpoint { svc_name: Some(name.to_owned()), ..Endpoint::default() }
}

fn located(ip: String, port: Option<i64>, hostname: Option<String>) -> Endpoint {
    let (ip, name) = if is_address(&ip) { (Some(ip), None) } else { (None, Some(ip)) };
    Endpoint {
        ip,
        name: name.filter(|n| !n.is_empty()),
        port: port.and_then(|p| u16::try_from(p).ok()),
        hostname,
        ..Endpoint::default()
    }
}

/// `dst`, `src` or `peer`; `None` if nothing is known of it.
fn endpoint(mut end: Rest) -> Option<Endpoint> {
    let (ip, name) = (end.text("ip"), end.text("name"));
    let port = end.number("port");
    (ip.is_some() || name.is_some()).then(|| located(ip.unwrap_or_default(), port, name))
}

/// Who began the connection is its source, so the server is the destination of
/// what comes in.
fn ends(direction: pb::Direction, record: &mut Record, rest: &mut Rest) {
    record.src_endpoint = endpoint(rest.object("src"));
    record.dst_endpoint = endpoint(rest.object("dst"));
    let mut info = connection_info(direction, rest);
    protocol_version(&mut info, record.dst_endpoint.as_ref().or(record.src_endpoint.as_ref()));
    record.connection_info = Some(info);
    let own =
        if direction == pb::Direction::Inbound { &mut record.dst_endpoint } else { &mut record.src_endpoint };
    own.get_or_insert_default().svc_name = service(rest).svc_name;
}

fn connection_info(direction: pb::Direction, rest: &mut Rest) -> ConnectionInfo {
    rest.drop_all(&["direction"]);
    let (id, name) = match direction {
        pb::Direction::Egress => (2, "Outbound"),
        pb::Direction::Inbound => (1, "Inbound"),
        pb::Direction::Unspecified => UNKNOWN,
    };
    let protocol = rest.text("protocol");
    let number = protocol.as_deref().and_then(|p| p.parse::<u8>().ok()).map(i64::from);
    ConnectionInfo {
        uid: rest.identifier("cookie"),
        direction_id: Some(id),
        direction: Some(name),
        protocol_name: protocol.filter(|_| number.is_none()),
        protocol_num: number,
        ..ConnectionInfo::default()
    }
}

fn protocol_version(info: &mut ConnectionInfo, end: Option<&Endpoint>) {
    let Some(ip) = end.and_then(|e| e.ip.as_deref()) else { return };
    let (id, name) = if ip.contains(':') {
        (6, "Internet Protocol version 6 (IPv6)")
    } else {
        (4, "Internet Protocol version 4 (IPv4)")
    };
    (info.protocol_ver_id, info.protocol_ver) = (Some(id), Some(name));
}

/// Out is what the source sent.
fn traffic(direction: pb::Direction, record: &mut Record, rest: &mut Rest) {
    let mut take = |key| rest.number(key);
    let (mut sent, mut received) =
        ((take("bytes_sent"), take("packets_sent")), (take("bytes_received"), take("packets_received")));
    if direction == pb::Direction::Inbound {
        std::mem::swap(&mut sent, &mut received);
    }
    let sum = |a: Option<i64>, b: Option<i64>| Some(a?.saturating_add(b?));
    record.traffic = Some(Traffic {
        bytes: sum(sent.0, received.0),
        bytes_in: received.0,
        bytes_out: sent.0,
        packets: sum(sent.1, received.1),
        packets_in: received.1,
        packets_out: sent.1,
    });
}

/// In milliseconds, as the schema has it; the rest keeps the nanoseconds.
fn duration(record: &mut Record, rest: &Rest) {
    record.duration = rest.look_at_number("duration_ns").map(|ns| ns / 1_000_000);
}

fn http(direction: pb::Direction, record: &mut Record, rest: &mut Rest) {
    let method = rest.text("method").unwrap_or_default();
    let activity = match method.as_str() {
        "CONNECT" => (1, "Connect"),
        "DELETE" => (2, "Delete"),
        "GET" => (3, "Get"),
        "HEAD" => (4, "Head"),
        "OPTIONS" => (5, "Options"),
        "POST" => (6, "Post"),
        "PUT" => (7, "Put"),
        "TRACE" => (8, "Trace"),
        "PATCH" => (9, "Patch"),
        _ => (OTHER, "Other"),
    };
    // The schema knows these methods only; any other is the name of the activity.
    let known = activity.0 != OTHER;
    if known {
        record.class(&HTTP_ACTIVITY, activity);
    } else {
        record.class_other(&HTTP_ACTIVITY, if method.is_empty() { "Other" } else { &method });
    }
    let headers: Vec<Header> = [
        ("Mcp-Method", "mcp_method"),
        ("Mcp-Name", "mcp_name"),
        ("MCP-Protocol-Version", "protocol_version"),
    ]
    .into_iter()
    .filter_map(|(name, key)| Some(Header { name: Some(name), value: Some(rest.text(key)?) }))
    .collect();
    let (host, path) = (rest.text("host"), rest.text("path"));
    let url = (host.is_some() || path.is_some())
        .then(|| Url { hostname: host, path: Some(path.unwrap_or_default()) });
    record.http_request = Some(HttpRequest {
        http_method: known.then_some(method),
        url,
        length: rest.number("request_bytes"),
        http_headers: (!headers.is_empty()).then_some(headers),
    });
    // 0: none was seen.
    if let Some(code) = rest.number("status").filter(|c| *c != 0) {
        record.status(if (100..400).contains(&code) { SUCCESS } else { FAILURE });
        record.status_code = Some(code.to_string());
        record.http_response = Some(HttpResponse { code: Some(code), length: rest.number("response_bytes") });
    }
    duration(record, rest);
    let peer = endpoint(rest.object("peer"));
    record.connection_info = Some(connection_info(direction, rest));
    (record.src_endpoint, record.dst_endpoint) = match direction {
        pb::Direction::Inbound => (peer, Some(service(rest))),
        _ => (Some(service(rest)), peer),
    };
    record.actor = Some(actor(rest));
}

fn instance(record: &mut Record, rest: &mut Rest) {
    let actor = actor(rest);
    record.status(SUCCESS);
    record.app = Some(Product {
        name: Some(actor.app_name.clone().unwrap_or_else(|| "unknown".to_owned())),
        uid: actor.app_uid.clone(),
        ..Product::default()
    });
    record.actor = Some(actor);
}

fn policy_change(p: &pb::PolicyChange, record: &mut Record, rest: &mut Rest) {
    record.class(&ENTITY_MANAGEMENT, (3, "Update"));
    rest.drop_all(&["ok"]);
    record.status(if p.ok { SUCCESS } else { FAILURE });
    if !p.ok {
        record.severity(MEDIUM);
    }
    record.status_detail = rest.text("error");
    record.entity = Some(ManagedEntity {
        name: Some(rest.text("path").unwrap_or_else(|| "policy".to_owned())),
        uid: rest.text("hash"),
        version: rest.identifier("generation"),
        type_id: Some(5),
        r#type: Some("Policy"),
    });
    if p.ok {
        record.entity_result = record.entity.clone();
    }
}

fn milliseconds(ns: i64) -> i64 {
    ns.div_euclid(1_000_000)
}
