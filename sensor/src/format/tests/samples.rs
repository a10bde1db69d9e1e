//! An event of every type, filled by whoever asks.

use crate::event::{Body, Event, pb};

/// Where the values of fields come from.
pub trait Fill {
    fn text(&mut self) -> String;
    fn number(&mut self) -> u64;
    /// Below `n`.
    fn pick(&mut self, n: i32) -> i32;
    fn length(&mut self) -> usize;

    fn ip(&mut self) -> String {
        self.text()
    }

    fn yes(&mut self) -> bool {
        self.pick(2) == 1
    }

    fn small(&mut self) -> u32 {
        u32::try_from(self.number() % 1_000_000_000).unwrap()
    }

    fn texts(&mut self) -> Vec<String> {
        (0..self.length()).map(|_| self.text()).collect()
    }
}

pub fn event(seq: u64, time: i64, body: Option<Body>, f: &mut dyn Fill) -> Event {
    Event { seq, time_unix_ns: time, sensor: f.text(), boot: f.text(), body }
}

fn client(f: &mut dyn Fill) -> pb::Client {
    pb::Client { pid: f.small(), exe: f.text(), argv: f.texts(), name: f.text() }
}

fn actor(f: &mut dyn Fill) -> Option<pb::Actor> {
    Some(pb::Actor {
        server: f.text(),
        instance: f.text(),
        role: f.pick(3),
        pid: f.small(),
        uid: f.small(),
        user: f.text(),
        login_uid: f.yes().then(|| f.small()),
        comm: f.text(),
        exe: format!("/{}/{}", f.text(), f.text()),
        client: f.yes().then(|| client(f)),
        unit: f.text(),
        container: f.text(),
        netns: f.number(),
    })
}

fn decision(f: &mut dyn Fill) -> Option<pb::Decision> {
    Some(pb::Decision {
        verdict: f.pick(4),
        reason: f.text(),
        rule: f.text(),
        rule_line: f.small(),
        hook: f.text(),
        count: f.number(),
        repeat: f.yes(),
        suggestion: f.text(),
        generation: f.number(),
        policy: f.text(),
    })
}

fn endpoint(f: &mut dyn Fill) -> Option<pb::Endpoint> {
    Some(pb::Endpoint { ip: f.ip(), port: f.small() % 65_536, name: f.text() })
}

fn said(f: &mut dyn Fill) -> Option<pb::Implementation> {
    f.yes().then(|| pb::Implementation { name: f.text(), version: f.text() })
}

fn exchange(f: &mut dyn Fill) -> Option<pb::Exchange> {
    Some(pb::Exchange {
        actor: actor(f),
        transport: f.text(),
        connection: f.number(),
        method: f.text(),
        sender: f.pick(3),
        id_hash: if f.yes() { f.text() } else { String::new() },
        request_bytes: f.number(),
        response_bytes: f.number(),
        duration_ns: f.number(),
        outcome: f.pick(8),
        error_code: -i64::from(f.small()),
        era: f.pick(3),
        protocol_version: f.text(),
        client_info: said(f),
        server_info: said(f),
        session_hash: f.text(),
        progress: f.number(),
        request_content: f.text(),
        response_content: f.text(),
        unscanned_bytes: f.number(),
    })
}

fn tool(f: &mut dyn Fill) -> pb::Tool {
    pb::Tool { name: f.text(), hash: f.text(), description_hash: f.text(), schema_hash: f.text() }
}

fn hook(f: &mut dyn Fill) -> pb::Hook {
    pb::Hook { name: f.text(), status: f.pick(4), detail: f.text() }
}

fn time(f: &mut dyn Fill) -> i64 {
    i64::try_from(f.number() >> 1).unwrap()
}

fn loss(f: &mut dyn Fill) -> pb::Loss {
    pb::Loss {
        r#where: f.text(),
        reason: f.text(),
        count: f.number(),
        denials: f.number(),
        first_seq: f.number(),
        last_seq: f.number(),
        types: (0..f.length()).map(|_| pb::TypeCount { r#type: f.text(), count: f.number() }).collect(),
    }
}

/// One of each type; `None` is a type that this version does not know.
pub fn bodies(f: &mut dyn Fill) -> Vec<Option<Body>> {
    let verdicts = verdicts(f);
    let said = messages(f);
    let own = of_the_sensor(f);
    verdicts.into_iter().chain(programs(f)).chain(said).chain(own).map(Some).chain([None]).collect()
}

fn verdicts(f: &mut dyn Fill) -> Vec<Body> {
    vec![
        Body::Connection(pb::Connection {
            decision: decision(f),
            actor: actor(f),
            protocol: f.text(),
            direction: f.pick(3),
            dst: endpoint(f),
            src: f.yes().then(|| endpoint(f)).flatten(),
            cookie: f.number(),
            sni: f.text(),
        }),
        Body::Socket(pb::Socket {
            decision: decision(f),
            actor: actor(f),
            family: f.text(),
            r#type: f.text(),
            protocol: f.text(),
            level: f.yes().then(|| f.small()),
            option: f.yes().then(|| f.small()),
        }),
        Body::UnixConnection(pb::UnixConnection { decision: decision(f), actor: actor(f), path: f.text() }),
        Body::Access(pb::Access {
            decision: decision(f),
            actor: actor(f),
            operation: f.text(),
            target_pid: f.small(),
        }),
        Body::Dns(pb::Dns {
            decision: decision(f),
            actor: actor(f),
            name: f.text(),
            qtype: f.text(),
            // The native form has its address only.
            resolver: Some(pb::Endpoint { ip: f.ip(), ..Default::default() }),
            protocol: f.text(),
            address: if f.yes() { f.ip() } else { String::new() },
            cookie: f.number(),
        }),
    ]
}

fn programs(f: &mut dyn Fill) -> Vec<Body> {
    vec![
        Body::Exec(pb::Exec {
            actor: actor(f),
            parent_pid: f.small(),
            argv: f.texts(),
            argv_truncated: f.yes(),
            role_changed: f.yes(),
            new_instance: f.yes(),
        }),
        Body::InstanceStarted(pb::InstanceStarted {
            actor: actor(f),
            argv: f.texts(),
            evidence: f.text(),
            adopted: f.yes(),
            mode: f.pick(3),
            profile: f.text(),
        }),
        Body::InstanceEnded(pb::InstanceEnded {
            actor: actor(f),
            started_unix_ns: time(f),
            allowed: f.number(),
            denied: f.number(),
            would_denied: f.number(),
        }),
        Body::Http(pb::HttpExchange {
            actor: actor(f),
            direction: f.pick(3),
            method: ["GET", "POST", "DELETE", "PROPFIND"][usize::try_from(f.pick(4)).unwrap()].to_owned(),
            path: f.text(),
            host: f.text(),
            status: if f.yes() { 200 + f.small() % 400 } else { 0 },
            mcp_method: f.text(),
            mcp_name: f.text(),
            protocol_version: f.text(),
            session_hash: f.text(),
            request_bytes: f.number(),
            response_bytes: f.number(),
            duration_ns: f.number(),
            peer: f.yes().then(|| endpoint(f)).flatten(),
            cookie: f.number(),
        }),
        Body::ConnectionEnd(pb::ConnectionEnd {
            actor: actor(f),
            protocol: ["tcp", "udp", "132"][usize::try_from(f.pick(3)).unwrap()].to_owned(),
            direction: f.pick(3),
            dst: endpoint(f),
            src: f.yes().then(|| endpoint(f)).flatten(),
            cookie: f.number(),
            started_unix_ns: time(f),
            duration_ns: f.number(),
            bytes_sent: f.number(),
            bytes_received: f.number(),
            packets_sent: f.number(),
            packets_received: f.number(),
            outcome: ["closed", "reset", "no_answer", "denied"][usize::try_from(f.pick(4)).unwrap()]
                .to_owned(),
        }),
    ]
}

fn messages(f: &mut dyn Fill) -> Vec<Body> {
    vec![
        Body::ToolCall(Box::new(pb::ToolCall { exchange: exchange(f), tool: f.text() })),
        Body::Prompt(Box::new(pb::Prompt { exchange: exchange(f), name: f.text() })),
        Body::Resource(Box::new(pb::Resource {
            exchange: exchange(f),
            scheme: f.text(),
            host: f.text(),
            path_hash: f.text(),
        })),
        Body::McpMessage(Box::new(pb::McpMessage { exchange: exchange(f), count: f.number() })),
        Body::ToolsListed(Box::new(pb::ToolsListed {
            exchange: exchange(f),
            tools: (0..f.length()).map(|_| tool(f)).collect(),
            list_hash: f.text(),
            capabilities_hash: f.text(),
            incomplete: f.yes(),
        })),
        Body::Drift(pb::Drift {
            actor: actor(f),
            what: f.text(),
            tool: f.text(),
            before: f.text(),
            after: f.text(),
            since_unix_ns: time(f),
            parts: f.texts(),
        }),
        Body::Uninspected(pb::Uninspected {
            actor: actor(f),
            connection: f.number(),
            sender: f.pick(3),
            bytes: f.number(),
            how: f.text(),
        }),
    ]
}

fn of_the_sensor(f: &mut dyn Fill) -> Vec<Body> {
    vec![
        Body::Finding(pb::Finding {
            kind: f.text(),
            severity: f.pick(5),
            server: f.text(),
            instance: f.text(),
            detail: f.text(),
            place: f.text(),
            method: f.text(),
            length: f.number(),
            value_hash: f.text(),
            rule: f.text(),
            tool: f.text(),
            action: ["", "reported", "contained", "prevented"][usize::try_from(f.pick(4)).unwrap()]
                .to_owned(),
            contained_after_ns: f.number(),
            transport: f.text(),
            port: f.small() % 65_536,
        }),
        Body::Loss(loss(f)),
        Body::PolicyChange(pb::PolicyChange {
            ok: f.yes(),
            hash: f.text(),
            generation: f.number(),
            path: f.text(),
            error: f.text(),
            trigger: f.text(),
            server: f.text(),
            mode: f.pick(3),
            warnings: f.texts(),
            bundle_version: f.number(),
        }),
        Body::SensorState(pb::SensorState {
            phase: f.pick(4),
            version: f.text(),
            kernel: f.text(),
            host: f.text(),
            hooks: (0..f.length()).map(|_| hook(f)).collect(),
            degraded: f.texts(),
            policy: f.text(),
            generation: f.number(),
            bundle_version: f.number(),
            bundle: f.text(),
            enforced: f.number() as u32,
            audited: f.number() as u32,
            not_ready: f.texts(),
            losses: (0..f.length()).map(|_| loss(f)).collect(),
            proven_unix_ns: f.number() as i64,
            proven_namespaces: f.number() as u32,
            away: Some(pb::Away {
                since_unix_ns: f.number() as i64,
                servers: (0..f.length())
                    .map(|_| pb::AwayServer {
                        server: f.text(),
                        denied: f.number(),
                        would_denied: f.number(),
                    })
                    .collect(),
            }),
        }),
    ]
}
