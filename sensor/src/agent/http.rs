//! What servers say over HTTP, in plain text, from their own TCP sockets.

use super::core::Core;
use super::places::Places;
use super::session::{Ears, Keys, Speaker};
use crate::event::{Body, now, pb};
use crate::mcp::http::{HttpConnection, HttpExchange, HttpOutput, HttpServer, Transport};
use crate::mcp::{Limits, Output, Sender};
use sensor_common::label::Label;
use sensor_common::stdio::{Chunk, FROM_CLIENT, HOW_DATA, Met, how_name};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

/// Connections at once.
const CONNECTIONS: usize = 16384;
/// Peers of one server whose failures are counted.
const PEERS: usize = 1024;
/// So many refusals of one peer within [`WINDOW`] are a finding.
const FAILURES: u32 = 5;
/// Nanoseconds.
const WINDOW: i64 = 60_000_000_000;

/// All servers' HTTP.
pub struct Http {
    keys: Keys,
    /// By instance.
    hosts: HashMap<u32, Host>,
    /// By number of the connection.
    open: HashMap<u64, Open>,
    /// By cookie of the socket.
    numbers: HashMap<u64, u64>,
}

/// What the connections of one instance share.
struct Host {
    server: HttpServer,
    ears: Ears,
    failures: HashMap<IpAddr, Failures>,
}

/// 401 and 403 to one peer.
#[derive(Default)]
struct Failures {
    since: i64,
    count: u32,
    told: bool,
}

struct Open {
    label: Label,
    cookie: u64,
    peer: Option<(IpAddr, u16)>,
    pid: u32,
    uid: u32,
    connection: HttpConnection,
    places: Places,
}

impl Http {
    pub fn new(keys: &Keys) -> Http {
        Http { keys: keys.clone(), hosts: HashMap::new(), open: HashMap::new(), numbers: HashMap::new() }
    }

    pub fn is_open(&self, cookie: u64) -> bool {
        self.numbers.contains_key(&cookie)
    }

    /// A connection shows itself.
    pub fn met(&mut self, met: &Met) {
        let peer = Some((IpAddr::from(met.peer), met.peer_port as u16));
        self.begin(met.connection, met.cookie, met.header.label, met.header.tgid, met.header.uid, peer);
    }

    fn begin(&mut self, id: u64, cookie: u64, label: Label, pid: u32, uid: u32, peer: Option<(IpAddr, u16)>) {
        if self.open.len() >= CONNECTIONS {
            return; // its records are counted as unread
        }
        let connection = HttpConnection::new();
        self.open.insert(id, Open { label, cookie, peer, pid, uid, connection, places: Places::default() });
        self.numbers.insert(cookie, id);
    }

    /// Bytes of a connection.
    pub fn take(&mut self, core: &Arc<Core>, chunk: &Chunk, data: &[u8], time: i64) {
        let id = chunk.connection;
        if !self.open.contains_key(&id) {
            if chunk.position > 0 && chunk.direction != FROM_CLIENT {
                return; // the rest of one that is closed
            }
            // The record that announced it was lost.
            let h = &chunk.header;
            self.begin(id, chunk.inode, h.label, h.tgid, h.uid, None);
        }
        let Some(open) = self.open.get_mut(&id) else { return };
        (open.pid, open.uid) = (chunk.header.tgid, chunk.header.uid);
        let Some(lost) = open.places.take(chunk) else { return };
        let host = host(&mut self.hosts, &self.keys, open.label);
        let sender = if chunk.direction == FROM_CLIENT { Sender::Client } else { Sender::Server };
        let mut out = Vec::new();
        let moved = u64::from(chunk.moved);
        let unread = if chunk.how == HOW_DATA { 0 } else { moved };
        for (bytes, how) in [(lost, "lost"), (unread, how_name(chunk.how))] {
            if bytes > 0 {
                out.push(mcp(Output::Uninspected { sender, bytes, how }));
                let values = &mut host.ears.looking(sender);
                open.connection.gap(sender, time, bytes, &mut host.server, values, &mut out);
            }
        }
        if unread == 0 {
            let values = &mut host.ears.looking(sender);
            open.connection.bytes(sender, time, data, &mut host.server, values, &mut out);
        }
        say(core, id, open, host, time, out);
    }

    /// The socket is closed, and all its records were read.
    pub fn close(&mut self, core: &Arc<Core>, cookie: u64) {
        let Some(id) = self.numbers.remove(&cookie) else { return };
        let Some(mut open) = self.open.remove(&id) else { return };
        let host = host(&mut self.hosts, &self.keys, open.label);
        let (time, mut out) = (now(), Vec::new());
        let values = &mut host.ears.looking(Sender::Server);
        open.connection.close(time, &mut host.server, values, &mut out);
        say(core, id, &open, host, time, out);
    }

    pub fn ended(&mut self, core: &Arc<Core>, instance: u32) {
        let cookies: Vec<u64> =
            self.open.values().filter(|o| o.label.instance() == instance).map(|o| o.cookie).collect();
        let last = cookies.last().and_then(|c| self.numbers.get(c)).copied();
        for cookie in cookies {
            self.close(core, cookie);
        }
        if let Some(mut host) = self.hosts.remove(&instance) {
            let (time, mut out) = (now(), Vec::new());
            host.server.close(time, &mut out);
            let open = Open {
                label: Label::new(0, 0, instance),
                cookie: 0,
                peer: None,
                pid: 0,
                uid: u32::MAX,
                connection: HttpConnection::new(),
                places: Places::default(),
            };
            say(core, last.unwrap_or(0), &open, &mut host, time, out);
        }
    }
}

fn host<'a>(hosts: &'a mut HashMap<u32, Host>, keys: &Keys, label: Label) -> &'a mut Host {
    hosts.entry(label.instance()).or_insert_with(|| Host {
        server: HttpServer::new(keys.ids, Limits::default()),
        ears: Ears::new(keys),
        failures: HashMap::new(),
    })
}

fn mcp(output: Output) -> HttpOutput {
    HttpOutput::Mcp { transport: Transport::Http, session: None, output }
}

fn say(core: &Arc<Core>, id: u64, open: &Open, host: &mut Host, time: i64, out: Vec<HttpOutput>) {
    for output in out {
        match output {
            HttpOutput::NotHttp => {}
            HttpOutput::Exchange(exchange) => {
                let actor = core.actor(open.label, open.pid, open.uid);
                if matches!(exchange.status, 401 | 403)
                    && let Some((peer, _)) = open.peer
                    && let Some(count) = host.refused(peer, time)
                {
                    core.bus.publish(time, refusals(&actor, peer, count));
                }
                core.bus.publish(time, Body::Http(event(actor, open, &exchange)));
            }
            HttpOutput::Mcp { transport, session, output } => {
                let speaker = Speaker {
                    label: open.label,
                    connection: id,
                    transport: match transport {
                        Transport::Http => "http",
                        Transport::Sse => "sse",
                    },
                    pid: open.pid,
                    uid: open.uid,
                    session,
                };
                let heard = host.ears.heard(core, &speaker, time, std::iter::once(output));
                for violation in heard.violations {
                    core.contain(open.label, violation);
                }
                for body in heard.bodies {
                    core.bus.publish(time, body);
                }
            }
        }
    }
}

impl Host {
    /// How often a peer was refused, when that is worth a finding: once a window.
    fn refused(&mut self, peer: IpAddr, at: i64) -> Option<u32> {
        if self.failures.len() >= PEERS && !self.failures.contains_key(&peer) {
            self.failures.retain(|_, f| at - f.since < WINDOW);
            if self.failures.len() >= PEERS {
                return None;
            }
        }
        let failures = self.failures.entry(peer).or_default();
        if at - failures.since >= WINDOW {
            *failures = Failures { since: at, ..Failures::default() };
        }
        failures.count += 1;
        (failures.count >= FAILURES && !std::mem::replace(&mut failures.told, failures.count >= FAILURES))
            .then_some(failures.count)
    }
}

fn refusals(actor: &pb::Actor, peer: IpAddr, count: u32) -> Body {
    let mut finding = pb::Finding {
        kind: "authentication_failures".to_owned(),
        server: actor.server.clone(),
        instance: actor.instance.clone(),
        detail: format!("{peer} was refused {count} times within a minute (401 or 403)"),
        ..Default::default()
    };
    finding.set_severity(pb::Severity::Medium);
    Body::Finding(finding)
}

fn event(actor: pb::Actor, open: &Open, e: &HttpExchange) -> pb::HttpExchange {
    let peer = open.peer.map(|(ip, port)| pb::Endpoint {
        ip: ip.to_string(),
        port: port.into(),
        ..Default::default()
    });
    let mut event = pb::HttpExchange {
        actor: Some(actor),
        method: e.method.clone(),
        path: e.path.clone(),
        host: e.host.clone(),
        status: e.status.into(),
        mcp_method: e.mcp_method.clone(),
        mcp_name: e.mcp_name.clone(),
        protocol_version: e.protocol_version.clone(),
        session_hash: e.session.map(|s| format!("{s:016x}")).unwrap_or_default(),
        request_bytes: e.request_bytes,
        response_bytes: e.response_bytes,
        duration_ns: u64::try_from(e.answered - e.asked).unwrap_or(0),
        peer,
        cookie: open.cookie,
        ..Default::default()
    };
    event.set_direction(pb::Direction::Inbound);
    event
}
