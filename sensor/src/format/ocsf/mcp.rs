//! What was said over a wire, and what is to be looked at.

use super::record::*;
use super::{actor, duration, file, milliseconds};
use crate::event::{Body, Event, json, pb};
use crate::format::rest::Rest;

/// A request and what became of it. Who sent it acts; who answers is the API.
pub fn exchange(body: &Body, record: &mut Record, rest: &mut Rest) {
    let none = pb::Exchange::default();
    let e = crate::event::exchange(body).unwrap_or(&none);
    match body {
        Body::ToolCall(_) => {
            record.class_other(&API_ACTIVITY, "Invoke");
            record.resources = rest.text("tool").map(|name| vec![named("tool", name)]);
        }
        Body::Prompt(_) => {
            record.class(&API_ACTIVITY, (2, "Read"));
            record.resources = rest.text("name").map(|name| vec![named("prompt", name)]);
        }
        Body::Resource(_) => {
            record.class(&API_ACTIVITY, (2, "Read"));
            let (scheme, host) =
                (rest.text("scheme").unwrap_or_default(), rest.text("host").unwrap_or_default());
            record.resources = Some(vec![Resource {
                uid: rest.text("path_hash"),
                ..named("resource", format!("{scheme}://{host}"))
            }]);
        }
        Body::ToolsListed(_) => {
            record.class(&API_ACTIVITY, (2, "Read"));
            let tools: Vec<Resource> = rest.objects("tools").into_iter().map(tool).collect();
            record.resources = (!tools.is_empty()).then_some(tools);
        }
        _ if json::is_notification(e) => record.class_other(&API_ACTIVITY, "Notify"),
        _ => record.class_other(&API_ACTIVITY, "Request"),
    }
    let outcome = e.outcome();
    match outcome {
        pb::Outcome::Ok => record.status(SUCCESS),
        pb::Outcome::ToolError | pb::Outcome::RpcError | pb::Outcome::Cancelled | pb::Outcome::NoResponse => {
            record.status(FAILURE);
        }
        pb::Outcome::InputRequired | pb::Outcome::Task => record.status((OTHER, json::outcome_name(outcome))),
        pb::Outcome::Unspecified => (),
    }
    record.status_detail = rest.text("outcome");
    record.count = rest.number("count");
    let code = rest.number("error_code");
    record.status_code = code.map(|c| c.to_string());
    duration(record, rest);
    sides(e.sender(), record, rest);
    if let Some(api) = &mut record.api {
        api.request = rest.text("id_hash").map(|uid| Request { uid: Some(uid) });
        api.response = code.map(|c| Response { code: Some(c) });
    }
}

fn named(r#type: &'static str, name: String) -> Resource {
    Resource { name: Some(name), r#type: Some(r#type), ..Resource::default() }
}

fn tool(mut tool: Rest) -> Resource {
    let name = tool.text("name").unwrap_or_default();
    Resource { uid: tool.text("hash"), data: tool.into_value(), ..named("tool", name) }
}

/// Both sides of the wire. The schema asks for an actor and a source; a client
/// that is not known is called so.
fn sides(sender: pb::Sender, record: &mut Record, rest: &mut Rest) {
    let client_name = {
        let client = rest.object("client");
        let name = client.look_at("name").to_owned();
        rest.put_back("client", client);
        if name.is_empty() { "unknown".to_owned() } else { name }
    };
    let server = actor_of_server(sender, record, rest);
    let client = Named { name: Some(client_name.clone()), uid: None };
    record.message_context = Some(MessageContext {
        uid: rest.text("session_hash"),
        ai_role_id: Some(3),
        ai_role: Some("Tool"),
        application: Some(client),
        service: Some(Named { name: server.name.clone(), uid: server.uid.clone() }),
    });
    let client_end = Endpoint { svc_name: Some(client_name.clone()), ..Endpoint::default() };
    let server_end =
        Endpoint { svc_name: server.name.clone(), instance_uid: server.uid.clone(), ..Endpoint::default() };
    let answers = if sender == pb::Sender::Server {
        (record.src_endpoint, record.dst_endpoint) = (Some(server_end), Some(client_end));
        Named { name: Some(client_name), uid: None }
    } else {
        (record.src_endpoint, record.dst_endpoint) = (Some(client_end), Some(server_end));
        record.actor = Some(client_actor(client_name, rest));
        server
    };
    record.api = Some(Api {
        operation: Some(rest.text("method").unwrap_or_default()),
        version: rest.text("protocol_version"),
        service: Some(answers),
        ..Api::default()
    });
}

/// The server's name and instance; it acts if it is the sender.
fn actor_of_server(sender: pb::Sender, record: &mut Record, rest: &mut Rest) -> Named {
    let (name, uid) = if sender == pb::Sender::Server {
        let server = actor(rest);
        let found = (server.app_name.clone(), server.app_uid.clone());
        record.actor = Some(server);
        found
    } else {
        (rest.text("server"), rest.text("instance"))
    };
    Named { name: Some(name.unwrap_or_else(|| "unknown".to_owned())), uid }
}

fn client_actor(name: String, rest: &mut Rest) -> Actor {
    let mut client = rest.object("client");
    let exe = client.text("exe");
    let argv = client.strings("argv");
    client.drop_all(&["name"]);
    let process = client.number("pid").map(|pid| Process {
        pid: Some(pid),
        file: exe.map(file),
        cmd_line: argv.map(|a| a.join(" ")),
        ..Process::default()
    });
    Actor { app_name: Some(name), process, ..Actor::default() }
}

pub fn finding(f: &pb::Finding, event: &Event, record: &mut Record, rest: &mut Rest) {
    record.class(&DETECTION_FINDING, (1, "Create"));
    record.status(NEW);
    record.is_alert = Some(true);
    record.control(match f.action.as_str() {
        "prevented" => BLOCKED,
        "contained" => ISOLATED,
        _ => ALERT,
    });
    record.severity(match f.severity() {
        pb::Severity::Unspecified => UNKNOWN,
        pb::Severity::Info => INFORMATIONAL,
        pb::Severity::Low => LOW,
        pb::Severity::Medium => MEDIUM,
        pb::Severity::High => HIGH,
        pb::Severity::Critical => CRITICAL,
    });
    rest.drop_all(&["severity"]);
    let kind = rest.text("kind");
    let rule = rest.text("rule");
    record.resources = rest.text("tool").map(|name| vec![named("tool", name)]);
    record.finding_info = Some(FindingInfo {
        desc: rest.text("detail"),
        analytic: rule.map(|name| Analytic { name: Some(name), type_id: Some(1), r#type: Some("Rule") }),
        ..info(kind, event)
    });
    let actor = Actor { app_name: rest.text("server"), app_uid: rest.text("instance"), ..Actor::default() };
    evidence(
        record,
        Evidence {
            actor: (actor.app_name.is_some() || actor.app_uid.is_some()).then_some(actor),
            api: rest.text("method").map(|m| Api { operation: Some(m), ..Api::default() }),
            data: rest.split(&["place", "length", "value_hash"]).and_then(Rest::into_value),
        },
    );
}

pub fn drift(event: &Event, record: &mut Record, rest: &mut Rest) {
    record.class(&DETECTION_FINDING, (1, "Create"));
    record.status(NEW);
    record.is_alert = Some(true);
    record.control(ALERT);
    record.severity(MEDIUM);
    record.resources = rest.text("tool").map(|name| vec![named("tool", name)]);
    record.finding_info = Some(info(rest.text("what"), event));
    evidence(
        record,
        Evidence {
            actor: Some(actor(rest)),
            data: rest.split(&["before", "after", "since", "parts"]).and_then(Rest::into_value),
            ..Evidence::default()
        },
    );
}

fn info(kind: Option<String>, event: &Event) -> FindingInfo {
    FindingInfo {
        uid: Some(crate::format::unique_id(event)),
        title: crate::format::message(event),
        types: kind.map(|k| vec![k]),
        created_time: Some(milliseconds(event.time_unix_ns)),
        ..FindingInfo::default()
    }
}

fn evidence(record: &mut Record, evidence: Evidence) {
    let something = evidence.actor.is_some() || evidence.api.is_some() || evidence.data.is_some();
    record.evidences = something.then(|| vec![evidence]);
}
