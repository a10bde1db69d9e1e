//! What servers say over HTTP, in plain text, from their own TCP sockets.

use super::core::Core;
use super::places::Places;
use super::session::{Ears, Keys, Memory, Speaker};
use crate::event::{Body, now, pb};
use crate::mcp::http::{HttpConnection, HttpExchange, HttpOutput, HttpServer, Transport};
use crate::mcp::{Limits, Output, Sender};
use sensor_common::label::Label;
use sensor_common::stdio::{Chunk, FROM_CLIENT, HOW_DATA, Met, TCP_WIRE, WireKey, how_name};
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
    label: Label,
    server: HttpServer,
    memory: Memory,
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
    /// Messages of several connections pass by interleaved.
    ears: Ears,
    places: Places,
    /// Nothing was read yet.
    fresh: bool,
}

impl Open {
    fn new(keys: &Keys, label: Label) -> Open {
        Open {
            label,
            cookie: 0,
            peer: None,
            pid: 0,
            uid: u32::MAX,
            connection: HttpConnection::new(),
            ears: Ears::new(keys),
            places: Places::default(),
            fresh: true,
        }
    }
}

impl Http {
    pub fn new(keys: &Keys) -> Http {
        Http { keys: keys.clone(), hosts: HashMap::new(), open: HashMap::new(), numbers: HashMap::new() }
    }

    pub fn is_open(&self, cookie: u64) -> bool {
        self.numbers.contains_key(&cookie)
    }

    /// Whether an instance is spoken to over HTTP.
    pub fn speaks(&self, instance: u32) -> bool {
        self.hosts.get(&instance).is_some_and(|host| host.server.recognised())
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
        self.open.insert(id, Open { cookie, peer, pid, uid, ..Open::new(&self.keys, label) });
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
        if std::mem::take(&mut open.fresh) {
            open.ears.ask_policy(core, open.label);
        }
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
                let values = &mut open.ears.looking(sender);
                open.connection.gap(sender, time, bytes, &mut host.server, values, &mut out);
            }
        }
        if unread == 0 {
            let values = &mut open.ears.looking(sender);
            open.connection.bytes(sender, time, data, &mut host.server, values, &mut out);
        }
        say(core, id, open, host, time, out);
    }

    /// The socket is closed, and all its records were read.
    pub fn close(&mut self, core: &Arc<Core>, cookie: u64) {
        let Some((id, mut open)) = self.remove(cookie) else { return };
        let host = host(&mut self.hosts, &self.keys, open.label);
        let (time, mut out) = (now(), Vec::new());
        let values = &mut open.ears.looking(Sender::Server);
        open.connection.close(time, &mut host.server, values, &mut out);
        say(core, id, &mut open, host, time, out);
    }

    fn remove(&mut self, cookie: u64) -> Option<(u64, Open)> {
        let id = self.numbers.remove(&cookie)?;
        let open = self.open.remove(&id)?;
        if let Some(host) = self.hosts.get_mut(&open.label.instance()) {
            host.memory.forget(id);
        }
        Some((id, open))
    }

    /// Connections whose wire the kernel has forgotten, which it does at their
    /// end.
    pub fn gone(&self, is_gone: impl Fn(&WireKey) -> bool) -> Vec<u64> {
        let wire = |cookie: u64| WireKey { inode: cookie, dev: TCP_WIRE, direction: FROM_CLIENT };
        self.numbers.keys().filter(|cookie| is_gone(&wire(**cookie))).copied().collect()
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
            let mut open = Open::new(&self.keys, host.label);
            say(core, last.unwrap_or(0), &mut open, &mut host, time, out);
        }
    }
}

fn host<'a>(hosts: &'a mut HashMap<u32, Host>, keys: &Keys, label: Label) -> &'a mut Host {
    hosts.entry(label.instance()).or_insert_with(|| Host {
        server: HttpServer::new(keys.ids, Limits::default()),
        label,
        memory: Memory::new(keys),
        failures: HashMap::new(),
    })
}

fn mcp(output: Output) -> HttpOutput {
    HttpOutput::Mcp { transport: Transport::Http, session: None, output }
}

fn say(core: &Arc<Core>, id: u64, open: &mut Open, host: &mut Host, time: i64, out: Vec<HttpOutput>) {
    let mut out = out.into_iter().peekable();
    while let Some(output) = out.next() {
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
                let mut outputs = vec![output];
                let alike = |o: &HttpOutput| match o {
                    HttpOutput::Mcp { transport: t, session: s, .. } => (*t, *s) == (transport, session),
                    _ => false,
                };
                while let Some(HttpOutput::Mcp { output, .. }) = out.next_if(alike) {
                    outputs.push(output);
                }
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
                let heard = open.ears.heard(core, &mut host.memory, &speaker, time, outputs.into_iter());
                for violation in heard.violations {
                    core.contain(open.label, violation);
                }
                for body in heard.bodies {
                    core.bus.publish(time, body);
                }
            }
        }
    }
    open.ears.settle();
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

#[cfg(test)]
mod tests {
    use super::*;
    use sensor_common::record::Header;

    fn met(number: u64) -> Met {
        let header = Header { label: Label::new(1, 0, 1), ..Header::default() };
        Met { header, connection: number, cookie: number + 7, ..Met::default() }
    }

    fn sizes(http: &Http) -> (usize, usize) {
        (http.open.len(), http.numbers.len())
    }

    #[test]
    fn nothing_stays_of_connections_that_end() {
        let mut http = Http::new(&Keys::new(&[7; 32]));
        for number in 0..3 * CONNECTIONS as u64 {
            http.met(&met(number));
            assert!(http.remove(number + 7).is_some());
        }
        assert_eq!(sizes(&http), (0, 0));
    }

    #[test]
    fn connections_whose_end_was_not_told_are_found() {
        let mut http = Http::new(&Keys::new(&[7; 32]));
        for number in 0..2 * CONNECTIONS as u64 {
            http.met(&met(number));
        }
        assert_eq!(sizes(&http), (CONNECTIONS, CONNECTIONS));
        for cookie in http.gone(|key| key.inode != 9) {
            http.remove(cookie);
        }
        assert!(http.is_open(9));
        assert_eq!(sizes(&http), (1, 1));
    }

    #[test]
    fn refusals_are_told_once_a_window_for_each_peer() {
        let mut hosts = HashMap::new();
        let host = host(&mut hosts, &Keys::new(&[7; 32]), Label::new(1, 0, 1));
        let (one, other) = (IpAddr::from([127, 0, 0, 1]), IpAddr::from([127, 0, 0, 2]));
        let told: Vec<_> = (0..2 * FAILURES).filter_map(|n| host.refused(one, n.into())).collect();
        assert_eq!(told, [FAILURES]);
        assert_eq!(host.refused(other, 1), None);
        let told: Vec<_> = (0..FAILURES).filter_map(|n| host.refused(one, WINDOW + i64::from(n))).collect();
        assert_eq!(told, [FAILURES]);
    }
}
