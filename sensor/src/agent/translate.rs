//! From kernel records to events: names for numbers, the actor, the rule, and
//! the line of policy that would have allowed it.

use super::instances::Instances;
use super::state::Policies;
use crate::event::{Body, pb};
use crate::kernel::record;
use crate::policy::explain::{line_for, line_for_query, unix_line};
use crate::policy::model::Direction;
use sensor_common::access;
use sensor_common::addr::Addr;
use sensor_common::name::readable;
use sensor_common::policy::Reason;
use sensor_common::record::{
    Hook, NameVerdict, Released, UnixVerdict, VERDICT_ALLOW, VERDICT_DENY, VERDICT_WOULD_DENY, Verdict,
    VerdictKey,
};
use sensor_common::socket::{Peer, SOCKET_INBOUND};
use sensor_common::{TCP, UDP};
use std::net::IpAddr;

pub fn verdict(code: u8) -> pb::Verdict {
    match code {
        VERDICT_ALLOW => pb::Verdict::Allow,
        VERDICT_DENY => pb::Verdict::Deny,
        VERDICT_WOULD_DENY => pb::Verdict::WouldDeny,
        _ => pb::Verdict::Unspecified,
    }
}

pub fn protocol(number: u8) -> String {
    match number {
        TCP => "tcp".to_owned(),
        UDP => "udp".to_owned(),
        1 => "icmp".to_owned(),
        58 => "icmpv6".to_owned(),
        132 => "sctp".to_owned(),
        136 => "udplite".to_owned(),
        other => other.to_string(),
    }
}

fn socket_type(number: u16) -> String {
    match number {
        1 => "stream".to_owned(),
        2 => "dgram".to_owned(),
        3 => "raw".to_owned(),
        5 => "seqpacket".to_owned(),
        other => other.to_string(),
    }
}

fn family(number: u16) -> String {
    match number {
        2 => "inet".to_owned(),
        10 => "inet6".to_owned(),
        16 => "netlink".to_owned(),
        17 => "packet".to_owned(),
        38 => "alg".to_owned(),
        40 => "vsock".to_owned(),
        44 => "xdp".to_owned(),
        other => other.to_string(),
    }
}

/// What was tried, beyond the network.
fn operation(hook: Hook, what: u16) -> String {
    match (hook, what) {
        (Hook::Ptrace, access::READ) => "read".to_owned(),
        (Hook::Ptrace, access::ATTACH) => "attach".to_owned(),
        (Hook::Pins, access::UNLINK) => "unlink".to_owned(),
        (Hook::Pins, access::RENAME) => "rename".to_owned(),
        (Hook::Pins, access::UNMOUNT) => "unmount".to_owned(),
        (Hook::Pins, access::COVER) => "cover".to_owned(),
        (_, number) => number.to_string(),
    }
}

/// A verdict record with the state it is read in.
pub struct Context<'a> {
    pub policies: &'a Policies,
    pub instances: &'a Instances,
}

impl Context<'_> {
    fn decision(&self, key: &VerdictKey, rule: u32, generation: u32) -> pb::Decision {
        let (hash, info) = self.policies.rule(generation, rule);
        let mut decision = pb::Decision {
            reason: Reason::from_code(key.reason)
                .map_or_else(|| key.reason.to_string(), |r| r.name().to_owned()),
            rule: info.map(|r| r.path.clone()).unwrap_or_default(),
            rule_line: info.map_or(0, |r| r.line),
            hook: Hook::from_code(key.hook).map_or_else(|| key.hook.to_string(), |h| h.name().to_owned()),
            count: 1,
            generation: generation.into(),
            policy: hash.unwrap_or_default().to_owned(),
            ..Default::default()
        };
        decision.set_verdict(verdict(key.verdict));
        decision
    }

    pub fn verdict(&self, r: &Verdict) -> Body {
        let key = &r.key;
        let server = self.policies.server_name(key.server);
        let mut actor =
            self.instances.actor(r.header.label, server, r.header.tgid, r.header.uid, record::text(&r.comm));
        if r.netns != 0 {
            actor.netns = r.netns;
        }
        let mut decision = self.decision(key, r.rule, r.header.generation);
        match Hook::from_code(key.hook) {
            Some(Hook::Socket) => Body::Socket(pb::Socket {
                decision: Some(decision),
                actor: Some(actor),
                // What is counted again has it in its key only.
                family: family(if r.family == 0 { key.addr[0] as u16 } else { r.family }),
                r#type: socket_type(r.kind),
                protocol: protocol(key.protocol),
                level: None,
                option: None,
            }),
            Some(Hook::Setsockopt) => Body::Socket(pb::Socket {
                decision: Some(decision),
                actor: Some(actor),
                level: Some(r.kind.into()),
                option: Some(r.option.into()),
                ..Default::default()
            }),
            Some(hook @ (Hook::Ptrace | Hook::Bpf | Hook::Kill | Hook::Pins)) => Body::Access(pb::Access {
                decision: Some(decision),
                actor: Some(actor),
                operation: operation(hook, key.port),
                target_pid: key.addr[0],
            }),
            // More of a denied query: which name, the kernel does not count.
            Some(Hook::Egress | Hook::Ingress) if is_dns(key) => Body::Dns(dns(key, "", 0, decision, actor)),
            _ => {
                decision.suggestion = suggestion(key).unwrap_or_default();
                Body::Connection(self.connection(r, decision, actor))
            }
        }
    }

    /// The end of a connection; the name of the far end is for the caller to add.
    pub fn released(&self, r: &Released, time: i64) -> pb::ConnectionEnd {
        let label = r.header.label;
        let server = self.policies.server_name(label.server());
        let mut actor = self.instances.actor(label, server, r.tgid, r.header.uid, String::new());
        actor.netns = r.netns;
        let end = |peer: &Peer| pb::Endpoint {
            ip: IpAddr::from(peer.addr).to_string(),
            port: peer.port.into(),
            ..Default::default()
        };
        let inbound = r.flags & SOCKET_INBOUND != 0;
        let (local, remote) = (end(&r.traffic.local), end(&r.traffic.remote));
        let (dst, src) = if inbound { (local, remote) } else { (remote, local) };
        let t = &r.traffic;
        let duration = r.header.boottime.saturating_sub(t.started);
        let outcome = if t.denied != 0 {
            "denied"
        } else if t.reset != 0 {
            "reset"
        } else if t.received_packets == 0 {
            "no_answer"
        } else {
            "closed"
        };
        let mut ended = pb::ConnectionEnd {
            actor: Some(actor),
            protocol: protocol(t.local.protocol),
            dst: Some(dst),
            src: Some(src),
            cookie: r.cookie,
            started_unix_ns: time.saturating_sub(i64::try_from(duration).unwrap_or(0)),
            duration_ns: duration,
            bytes_sent: t.sent_bytes,
            bytes_received: t.received_bytes,
            packets_sent: t.sent_packets,
            packets_received: t.received_packets,
            outcome: outcome.to_owned(),
            ..Default::default()
        };
        ended.set_direction(if inbound { pb::Direction::Inbound } else { pb::Direction::Egress });
        ended
    }

    fn connection(&self, r: &Verdict, decision: pb::Decision, actor: pb::Actor) -> pb::Connection {
        let key = &r.key;
        let ip: IpAddr = Addr(key.addr).into();
        let inbound = is_inbound(key);
        let remote = |port: u16| pb::Endpoint { ip: ip.to_string(), port: port.into(), ..Default::default() };
        let own = |port: u16| pb::Endpoint { port: port.into(), ..Default::default() };
        let (dst, src) = if inbound {
            (own(key.port), remote(r.other_port))
        } else {
            (remote(key.port), own(r.other_port))
        };
        let mut connection = pb::Connection {
            decision: Some(decision),
            actor: Some(actor),
            protocol: protocol(key.protocol),
            dst: Some(dst),
            src: Some(src),
            cookie: r.cookie,
            ..Default::default()
        };
        connection.set_direction(if inbound { pb::Direction::Inbound } else { pb::Direction::Egress });
        connection
    }

    /// A name in a DNS message or in a TLS ClientHello.
    pub fn name(&self, r: &NameVerdict) -> Body {
        let key = &r.key;
        let server = self.policies.server_name(key.server);
        let mut actor =
            self.instances.actor(r.header.label, server, r.header.tgid, r.header.uid, String::new());
        if r.netns != 0 {
            actor.netns = r.netns;
        }
        let decision = self.decision(key, r.rule, r.header.generation);
        let name = readable(&r.text);
        let is_dns = is_dns(key) || r.qtype != 0 || key.port == DNS_PORT;
        if is_tls(key) || !is_dns {
            let ip: IpAddr = Addr(key.addr).into();
            let mut connection = pb::Connection {
                decision: Some(decision),
                actor: Some(actor),
                protocol: protocol(key.protocol),
                dst: Some(pb::Endpoint { ip: ip.to_string(), port: key.port.into(), ..Default::default() }),
                src: Some(pb::Endpoint { port: r.other_port.into(), ..Default::default() }),
                cookie: r.cookie,
                sni: name,
                ..Default::default()
            };
            connection.set_direction(pb::Direction::Egress);
            return Body::Connection(connection);
        }
        let mut dns = dns(key, &name, r.qtype, decision, actor);
        dns.cookie = r.cookie;
        if r.answer != Addr::default() {
            dns.address = IpAddr::from(r.answer).to_string();
        }
        Body::Dns(dns)
    }

    pub fn unix(&self, r: &UnixVerdict) -> Body {
        let server = self.policies.server_name(r.header.label.server());
        let actor =
            self.instances.actor(r.header.label, server, r.header.tgid, r.header.uid, record::text(&r.comm));
        let key = VerdictKey { reason: r.reason, verdict: r.verdict, hook: r.hook, ..VerdictKey::default() };
        let path = record::unix_path(&r.path);
        let mut decision = self.decision(&key, r.rule, r.header.generation);
        if verdict(r.verdict) != pb::Verdict::Allow {
            decision.suggestion = unix_line(&path).unwrap_or_default();
        }
        Body::UnixConnection(pb::UnixConnection { decision: Some(decision), actor: Some(actor), path })
    }
}

const DNS_PORT: u16 = 53;

/// Only a DNS message has such a reason.
fn is_dns(key: &VerdictKey) -> bool {
    matches!(
        Reason::from_code(key.reason),
        Some(
            Reason::Name
                | Reason::AnswerUnread
                | Reason::Rebinding
                | Reason::NotLearned
                | Reason::NameNoRule
                | Reason::QueryType
                | Reason::QueryUnread
                | Reason::ForeignResolver
        )
    )
}

/// Only a TLS hello has such a reason.
fn is_tls(key: &VerdictKey) -> bool {
    matches!(Reason::from_code(key.reason), Some(Reason::Sni | Reason::Ech))
}

fn dns(key: &VerdictKey, name: &str, qtype: u16, mut decision: pb::Decision, actor: pb::Actor) -> pb::Dns {
    let ip: IpAddr = Addr(key.addr).into();
    decision.suggestion = name_suggestion(key, name).unwrap_or_default();
    pb::Dns {
        decision: Some(decision),
        actor: Some(actor),
        name: name.to_owned(),
        qtype: query_type(qtype),
        resolver: Some(pb::Endpoint { ip: ip.to_string(), port: key.port.into(), ..Default::default() }),
        protocol: protocol(key.protocol),
        ..Default::default()
    }
}

/// Empty: none could be read.
fn query_type(number: u16) -> String {
    match number {
        0 => String::new(),
        1 => "A".to_owned(),
        16 => "TXT".to_owned(),
        28 => "AAAA".to_owned(),
        65 => "HTTPS".to_owned(),
        other => other.to_string(),
    }
}

/// The line of policy that would allow a query. For what the address is wanted
/// a query does not say: HTTPS, most likely.
fn name_suggestion(key: &VerdictKey, name: &str) -> Option<String> {
    if verdict(key.verdict) == pb::Verdict::Allow {
        return None;
    }
    let reason = Reason::from_code(key.reason)?;
    match reason {
        // NoRule: DNS over TCP, which is no different from any other connection
        // until it is read.
        Reason::ForeignResolver | Reason::NoRule => {
            let ip = IpAddr::from(Addr(key.addr).normalise());
            Some(if ip.is_ipv6() { format!("resolvers: [\"{ip}\"]") } else { format!("resolvers: [{ip}]") })
        }
        _ => line_for_query(reason, name),
    }
}

/// Whether the key's port is the server's own.
fn is_inbound(key: &VerdictKey) -> bool {
    match Hook::from_code(key.hook) {
        Some(Hook::Bind) => true,
        // A packet is inbound by the rule that judged it.
        Some(Hook::Ingress | Hook::Egress) => {
            key.reason == Reason::NoInboundRule as u8 || key.verdict == VERDICT_ALLOW
        }
        _ => false,
    }
}

/// The line of policy that would allow it; none where no line can.
fn suggestion(key: &VerdictKey) -> Option<String> {
    if verdict(key.verdict) == pb::Verdict::Allow {
        return None;
    }
    let ip: IpAddr = Addr(key.addr).normalise().into();
    let direction = if is_inbound(key) { Direction::Inbound } else { Direction::Egress };
    line_for(Reason::from_code(key.reason)?, direction, ip, key.port, key.protocol)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sensor_common::label::Label;
    use zerocopy::FromZeros as _;

    #[test]
    fn an_unknown_code_becomes_text_and_nothing_breaks() {
        let (policies, instances) = (Policies::default(), Instances::default());
        let context = Context { policies: &policies, instances: &instances };
        let mut r = Verdict::default();
        r.header.label = Label::new(9, 0, 4);
        r.key = VerdictKey { reason: 250, hook: 200, verdict: 9, protocol: 99, ..VerdictKey::default() };
        let Body::Connection(c) = context.verdict(&r) else { panic!("a connection") };
        let decision = c.decision.expect("decision");
        assert_eq!(
            (decision.reason.as_str(), decision.hook.as_str(), c.protocol.as_str()),
            ("250", "200", "99")
        );
        assert_eq!(decision.suggestion, "");
    }

    #[test]
    fn a_denied_connect_says_which_line_would_allow_it() {
        let key = VerdictKey {
            addr: Addr::from("10.0.0.7".parse::<IpAddr>().expect("ip")).0,
            port: 443,
            protocol: TCP,
            reason: Reason::NoRule as u8,
            verdict: VERDICT_DENY,
            hook: Hook::Connect as u8,
            ..VerdictKey::default()
        };
        let line = suggestion(&key).expect("a line");
        assert!(line.contains("10.0.0.7") && line.contains("443"), "{line}");
        assert_eq!(suggestion(&VerdictKey { reason: Reason::Fragment as u8, ..key }), None);
    }

    fn named(reason: Reason, name: &str, qtype: u16, port: u16) -> Body {
        let (policies, instances) = (Policies::default(), Instances::default());
        let context = Context { policies: &policies, instances: &instances };
        let mut r = NameVerdict::new_zeroed();
        r.header.label = Label::new(9, 0, 4);
        r.key = VerdictKey {
            addr: Addr::from("10.0.0.2".parse::<IpAddr>().expect("ip")).0,
            port,
            protocol: TCP,
            reason: reason as u8,
            verdict: if reason.allows() { VERDICT_ALLOW } else { VERDICT_DENY },
            hook: Hook::Egress as u8,
            ..VerdictKey::default()
        };
        (r.qtype, r.other_port, r.cookie) = (qtype, 40_000, 7);
        if reason == Reason::Rebinding {
            r.answer = Addr::from("127.0.0.1".parse::<IpAddr>().expect("ip"));
        }
        let text = sensor_common::name::turned(name, false);
        r.text[..text.len()].copy_from_slice(&text);
        context.name(&r)
    }

    #[test]
    fn a_denied_query_says_its_name_and_the_line_that_would_allow_it() {
        let Body::Dns(d) = named(Reason::NameNoRule, "evil.example", 28, 53) else { panic!("dns") };
        let decision = d.decision.expect("decision");
        assert_eq!((d.name.as_str(), d.qtype.as_str(), d.protocol.as_str()), ("evil.example", "AAAA", "tcp"));
        assert_eq!(d.resolver.map(|r| (r.ip, r.port)), Some(("10.0.0.2".to_owned(), 53)));
        assert_eq!((d.cookie, d.address.as_str()), (7, ""));
        assert_eq!(decision.suggestion, "{to: [evil.example], ports: [443]}");
        assert_eq!(decision.reason, "name_no_rule");
    }

    #[test]
    fn what_no_rule_allows_has_no_line() {
        for (reason, name, qtype) in [
            (Reason::QueryType, "evil.example", 16),
            (Reason::QueryUnread, "", 0),
            (Reason::NameNoRule, "a\u{1}b.example", 1),
            (Reason::NameNoRule, "*.example", 1),
        ] {
            let Body::Dns(d) = named(reason, name, qtype, 53) else { panic!("{reason:?}") };
            assert_eq!(d.decision.expect("decision").suggestion, "", "{reason:?} {name}");
        }
    }

    #[test]
    fn another_resolver_is_pinned_by_one_line() {
        for reason in [Reason::ForeignResolver, Reason::NoRule] {
            let Body::Dns(d) = named(reason, "a.example", 1, 53) else { panic!("dns") };
            assert_eq!(d.decision.expect("decision").suggestion, "resolvers: [10.0.0.2]");
        }
    }

    #[test]
    fn a_rebinding_answer_says_which_address_it_gave() {
        let Body::Dns(d) = named(Reason::Rebinding, "a.example", 1, 53) else { panic!("dns") };
        assert_eq!((d.address.as_str(), d.qtype.as_str()), ("127.0.0.1", "A"));
        assert_eq!(d.decision.expect("decision").verdict(), pb::Verdict::Allow);
    }

    #[test]
    fn a_denied_hello_is_a_connection_with_the_name_it_asked_for() {
        // On port 53 too: DNS over TLS where it should not be.
        for port in [443, 53] {
            let Body::Connection(c) = named(Reason::Sni, "evil.example", 0, port) else {
                panic!("connection")
            };
            assert_eq!((c.sni.as_str(), c.direction()), ("evil.example", pb::Direction::Egress));
            assert_eq!(c.dst.map(|d| (d.ip, d.port)), Some(("10.0.0.2".to_owned(), port.into())));
            assert_eq!((c.src.map(|s| s.port), c.cookie), (Some(40_000), 7));
        }
    }

    #[test]
    fn more_of_a_denied_query_is_of_the_same_type() {
        let (policies, instances) = (Policies::default(), Instances::default());
        let context = Context { policies: &policies, instances: &instances };
        let key = VerdictKey {
            port: 53,
            reason: Reason::NameNoRule as u8,
            verdict: VERDICT_DENY,
            hook: Hook::Egress as u8,
            ..VerdictKey::default()
        };
        let verdict = |key| context.verdict(&Verdict { key, ..Verdict::default() });
        assert!(matches!(verdict(key), Body::Dns(_)));
        assert!(matches!(verdict(VerdictKey { reason: Reason::Sni as u8, ..key }), Body::Connection(_)));
        assert!(matches!(verdict(VerdictKey { reason: Reason::NoRule as u8, ..key }), Body::Connection(_)));
    }
}
