//! From kernel records to events: names for numbers, the actor, the rule, and
//! the line of policy that would have allowed it.

use super::instances::Instances;
use super::state::Policies;
use crate::event::{Body, pb};
use crate::kernel::record;
use crate::policy::explain::{line_for, unix_line};
use crate::policy::model::Direction;
use sensor_common::addr::Addr;
use sensor_common::policy::Reason;
use sensor_common::record::{
    Hook, UnixVerdict, VERDICT_ALLOW, VERDICT_DENY, VERDICT_WOULD_DENY, Verdict, VerdictKey,
};
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
        other => other.to_string(),
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
                family: family(r.family),
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
            _ => {
                decision.suggestion = suggestion(key).unwrap_or_default();
                Body::Connection(self.connection(r, decision, actor))
            }
        }
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
}
