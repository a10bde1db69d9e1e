use super::*;
use proptest::prelude::*;
use sensor_common::policy::Reason;
use sensor_common::{TCP, UDP};
use std::net::{Ipv4Addr, Ipv6Addr};

const EXAMPLE: &str = r#"
version: 1
profiles:
  db:
    egress:
      - to: [10.0.0.0/8]
        ports: [443]
      - to: [10.20.0.0/16, "2001:db8::/32"]
        ports: [5432, 6000-6010]
      - to: [10.20.0.53]
        ports: [53]
        protocol: [tcp, udp]
      - to: [self]
    inbound: [{from: [127.0.0.1/32, "::1/128"], ports: [3901]}]
  empty: {}
servers:
  - {name: db, profile: db, mode: enforce, match: [{package: "@modelcontextprotocol/server-db"}]}
"#;

#[test]
fn a_cidr_carries_what_the_cidrs_around_it_allow() {
    let c = compiled(EXAMPLE);
    let rule = |d: Decision| c.rule(d.rule).map(|r| (d.reason, r.path.clone(), r.line));
    let path = |n: u32, line: u32| Some((Reason::Rule, format!("profiles.db.egress[{n}]"), line));
    assert_eq!(rule(egress(&c, "db", "10.20.0.53", 443, TCP)), path(0, 6));
    assert_eq!(rule(egress(&c, "db", "10.20.0.53", 6005, TCP)), path(1, 8));
    assert_eq!(rule(egress(&c, "db", "10.20.0.53", 53, UDP)), path(2, 10));
    assert_eq!(rule(egress(&c, "db", "2001:db8::9", 5432, TCP)), path(1, 8));
    assert_eq!(egress(&c, "db", "10.20.0.54", 53, UDP).reason, Reason::NoRule);
    assert_eq!(egress(&c, "db", "10.21.0.1", 5432, TCP).reason, Reason::NoRule);
    assert_eq!(egress(&c, "db", "10.21.0.1", 443, UDP).reason, Reason::NoRule);
}

#[test]
fn nothing_is_allowed_by_being_absent() {
    let c = compiled(EXAMPLE);
    assert_eq!(egress(&c, "empty", "10.20.0.53", 53, UDP).reason, Reason::NoRule);
    assert_eq!(inbound(&c, "empty", "127.0.0.1", 3901, TCP).reason, Reason::NoInboundRule);
    assert_eq!(egress(&c, "none", "127.0.0.1", 80, TCP).reason, Reason::ProfileNone);
    assert_eq!(egress(&c, "unrestricted", "1.1.1.1", 80, TCP).reason, Reason::Unrestricted);
    let nulls = compiled("version: 1\nprofiles:\n  a:\n    egress:\n  b:\n");
    assert_eq!(egress(&nulls, "a", "10.0.0.1", 80, TCP).reason, Reason::NoRule);
    assert_eq!(egress(&nulls, "b", "10.0.0.1", 80, TCP).reason, Reason::NoRule);
}

#[test]
fn inbound_and_egress_rules_do_not_mix() {
    let c = compiled(EXAMPLE);
    assert_eq!(inbound(&c, "db", "127.0.0.1", 3901, TCP).reason, Reason::Rule);
    assert_eq!(inbound(&c, "db", "127.0.0.2", 3901, TCP).reason, Reason::NoInboundRule);
    assert_eq!(inbound(&c, "db", "10.0.0.1", 443, TCP).reason, Reason::NoInboundRule);
    assert_eq!(egress(&c, "db", "127.0.0.1", 3901, TCP).reason, Reason::NoRule);
}

#[test]
fn the_whole_of_ipv6_is_not_the_whole_of_ipv4() {
    let profile = |to: &str| {
        let text = format!("version: 1\nprofiles: {{p: {{egress: [{{to: [{to}], ports: [80]}}]}}}}");
        let c = compiled(&text);
        let allows = |ip| egress(&c, "p", ip, 80, TCP).allows();
        (allows("10.1.2.3"), allows("2001:db8::1"), allows("::ffff:10.1.2.3"), allows("::9"))
    };
    assert_eq!(profile("\"::/0\""), (false, true, false, true));
    assert_eq!(profile("\"::/1\""), (false, true, false, true));
    assert_eq!(profile("\"::/80\""), (false, false, false, true));
    assert_eq!(profile("0.0.0.0/0"), (true, false, true, false));
    assert_eq!(profile("0.0.0.0/0, \"::/0\""), (true, true, true, true));
    assert_eq!(profile("10.0.0.0/8, \"::/0\""), (true, true, true, true));
    assert_eq!(profile("11.0.0.0/8, \"::/0\""), (false, true, false, true));
}

#[test]
fn a_group_is_opened_by_a_rule_of_its_own_only() {
    let c = compiled(
        r#"
version: 1
profiles:
  p:
    egress:
      - {to: [0.0.0.0/0, "::/0"], protocol: udp}
      - {to: [224.0.0.251, "ff02::fb", 255.255.255.255], ports: [5353], protocol: udp}
"#,
    );
    for (group, reason) in [
        ("224.0.0.251", Reason::Multicast),
        ("ff02::fb", Reason::Multicast),
        ("255.255.255.255", Reason::Broadcast),
    ] {
        let open = egress(&c, "p", group, 5353, UDP);
        assert_eq!((open.reason, open.rule), (Reason::Rule, 2), "{group}");
        assert_eq!(egress(&c, "p", group, 5354, UDP).reason, reason, "{group}");
    }
    assert_eq!(egress(&c, "p", "224.0.0.252", 5353, UDP).reason, Reason::Multicast);
    assert_eq!(egress(&c, "p", "8.8.8.8", 9, UDP).reason, Reason::Rule);
}

#[test]
fn equal_port_sets_are_stored_once() {
    let nets: Vec<String> = (0..=255).map(|i| format!("10.{i}.0.0/16")).collect();
    let text =
        format!("version: 1\nprofiles: {{p: {{egress: [{{to: [{}], ports: [1]}}]}}}}", nets.join(", "));
    let c = compiled(&text);
    assert_eq!((c.cidrs.len(), c.port_sets.len()), (256, 2));
}

#[test]
fn more_ranges_than_the_kernel_holds_are_refused_with_the_address() {
    let ports: Vec<String> = (0..40).map(|i| (1000 + 2 * i).to_string()).collect();
    let text = format!(
        "version: 1\nprofiles: {{p: {{egress: [{{to: [10.0.0.0/8], ports: [{}]}}]}}}}",
        ports.join(", ")
    );
    let found = errors(&text);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].path, "profiles.p");
    assert!(found[0].message.contains("10.0.0.0/8"), "{}", found[0].message);
    let joined = text.replace("1000, 1002", "1000-1030");
    assert!(try_compiled(&joined).is_ok(), "ranges that one covers do not count");
}

/// A rule as the oracle sees it: nothing of the compiler's own types.
#[derive(Clone, Debug)]
struct Plain {
    inbound: bool,
    nets: Vec<(IpAddr, u8)>,
    ports: Vec<(u16, u16)>,
    tcp: bool,
    udp: bool,
}

fn yaml(rules: &[Plain]) -> String {
    let rule = |r: &Plain| {
        let key = if r.inbound { "from" } else { "to" };
        let nets: Vec<String> = r.nets.iter().map(|(ip, bits)| format!("\"{ip}/{bits}\"")).collect();
        let ports: Vec<String> = r.ports.iter().map(|(low, high)| format!("{low}-{high}")).collect();
        let ports = if ports.is_empty() { String::new() } else { format!(", ports: [{}]", ports.join(", ")) };
        let protocol = match (r.tcp, r.udp) {
            (true, true) => "[tcp, udp]",
            (true, false) => "tcp",
            _ => "udp",
        };
        format!("      - {{{key}: [{}]{ports}, protocol: {protocol}}}\n", nets.join(", "))
    };
    let of = |inbound: bool| rules.iter().filter(|r| r.inbound == inbound).map(rule).collect::<String>();
    let part = |key: &str, body: String| if body.is_empty() { body } else { format!("    {key}:\n{body}") };
    format!("version: 1\nprofiles:\n  p:\n{}{}", part("egress", of(false)), part("inbound", of(true)))
}

/// The address that a packet reaches, by the RFCs and the kernel's habit.
fn reached(ip: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = ip else {
        return if ip.is_unspecified() { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { ip };
    };
    let o = v6.octets();
    let v4 = |at: usize| reached(IpAddr::from([o[at], o[at + 1], o[at + 2], o[at + 3]]));
    if v6.to_ipv4_mapped().is_some() {
        return v4(12);
    }
    if o[..12] == [0, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0] {
        return v4(12);
    }
    if o[..2] == [0x20, 0x02] {
        return v4(2);
    }
    if v6.is_unspecified() { IpAddr::V6(Ipv6Addr::LOCALHOST) } else { ip }
}

fn bits_of(ip: IpAddr) -> (u128, u8) {
    match ip {
        IpAddr::V4(v4) => (u128::from(u32::from(v4)) << 96, 32),
        IpAddr::V6(v6) => (u128::from(v6), 128),
    }
}

fn inside((net, bits): (IpAddr, u8), ip: IpAddr) -> bool {
    let ((net, family), (ip, other)) = (bits_of(net), bits_of(ip));
    family == other && (0..bits).all(|bit| (net >> (127 - bit)) & 1 == (ip >> (127 - bit)) & 1)
}

fn is_group(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_multicast() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_multicast(),
    }
}

/// A net of groups only: its first and last address are.
fn opens_groups((net, bits): (IpAddr, u8)) -> bool {
    let ends = ipnet::IpNet::new(net, bits).unwrap();
    is_group(ends.network()) && is_group(ends.broadcast()) && !(net.is_ipv4() && bits < 4)
}

/// The first rule of the file that allows it.
fn oracle(rules: &[Plain], inbound: bool, ip: IpAddr, port: u16, udp: bool, any_port: bool) -> Option<usize> {
    let ip = reached(ip);
    let mut ordered: Vec<&Plain> = rules.iter().filter(|r| !r.inbound).collect();
    ordered.extend(rules.iter().filter(|r| r.inbound));
    ordered.iter().position(|r| {
        let covered = r.nets.iter().any(|net| inside(*net, ip) && (!is_group(ip) || opens_groups(*net)));
        let protocol = if udp { r.udp } else { r.tcp };
        let ports = r.ports.is_empty() || r.ports.iter().any(|(low, high)| (*low..=*high).contains(&port));
        r.inbound == inbound && covered && (any_port || (protocol && ports))
    })
}

fn any_ip() -> impl Strategy<Value = IpAddr> {
    let v4 = prop_oneof![
        Just([10, 0, 0, 0]),
        Just([10, 20, 0, 53]),
        Just([127, 0, 0, 1]),
        Just([224, 0, 0, 251]),
        Just([239, 255, 255, 255]),
        Just([255, 255, 255, 255]),
        Just([0, 0, 0, 0]),
        any::<[u8; 4]>()
    ];
    let v6 = prop_oneof![
        Just(Ipv6Addr::LOCALHOST),
        Just(Ipv6Addr::UNSPECIFIED),
        Just("2001:db8::1".parse().unwrap()),
        Just("2002:a00::1".parse().unwrap()),
        Just("64:ff9b::a00:1".parse().unwrap()),
        Just("ff02::fb".parse().unwrap()),
        Just("fe80::1".parse().unwrap()),
        Just("::fffe:ffff:ffff".parse().unwrap()),
        v4.clone().prop_map(|o| Ipv4Addr::from(o).to_ipv6_mapped()),
        any::<u128>().prop_map(Ipv6Addr::from)
    ];
    // A flipped bit gives neighbours, inside and outside of the nets.
    (prop_oneof![v4.prop_map(IpAddr::from), v6.prop_map(IpAddr::V6)], prop::option::of(0u32..128)).prop_map(
        |(ip, flip)| match (ip, flip) {
            (IpAddr::V4(v4), Some(bit)) => IpAddr::V4((u32::from(v4) ^ (1 << (bit % 32))).into()),
            (IpAddr::V6(v6), Some(bit)) => IpAddr::V6((u128::from(v6) ^ (1 << bit)).into()),
            (ip, None) => ip,
        },
    )
}

fn any_net() -> impl Strategy<Value = (IpAddr, u8)> {
    (any_ip(), 0u8..=128).prop_filter_map("a net that can match", |(ip, bits)| {
        let bits = if ip.is_ipv4() { bits % 33 } else { bits };
        let net = ipnet::IpNet::new(ip, bits).unwrap().trunc();
        super::super::address::net(&net.to_string())?.ok()?;
        Some((net.addr(), bits))
    })
}

fn any_ports() -> impl Strategy<Value = (u16, u16)> {
    (1u16..40, 0u16..10).prop_map(|(low, more)| (low, low + more))
}

fn any_rule() -> impl Strategy<Value = Plain> {
    let nets = prop::collection::vec(any_net(), 1..6);
    let ports = prop::collection::vec(any_ports(), 0..3);
    (any::<bool>(), nets, ports, 0u8..3).prop_map(|(inbound, nets, ports, protocol)| Plain {
        inbound,
        nets,
        ports,
        tcp: protocol != 1,
        udp: protocol != 0,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn the_trie_decides_as_the_rules_do_one_by_one(
        rules in prop::collection::vec(any_rule(), 0..7),
        flows in prop::collection::vec((any_ip(), 0u16..50, any::<bool>(), any::<bool>(), any::<bool>()), 1..40),
    ) {
        let text = yaml(&rules);
        let text = if rules.is_empty() { text.replace("  p:\n", "  p: {}\n") } else { text };
        let c = compiled(&text);
        let tables = MemoryTables::new(&c);
        let near = rules.iter().flat_map(|r| &r.nets).map(|(ip, _)| (*ip, 5, true, false, false));
        for (ip, port, udp, is_inbound, any_port) in flows.iter().copied().chain(near) {
            let flow = Flow {
                direction: if is_inbound { INBOUND } else { EGRESS },
                protocol: if udp { UDP } else { TCP },
                port,
                addr: Addr::from(ip),
                any_port,
            };
            let got = decide(&tables, 1, 2, &flow);
            let expected = oracle(&rules, is_inbound, ip, port, udp, any_port);
            let rule = got.allows().then(|| got.rule as usize - 1);
            prop_assert_eq!(rule, expected, "{:?} {} {:?}\n{}", flow, ip, got, text);
            if any_port && got.allows() {
                prop_assert_eq!(got.reason, Reason::NoTraffic);
            }
        }
    }
}
