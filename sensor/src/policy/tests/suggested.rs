//! A suggested profile allows what was recorded, and little else.

use super::*;
use crate::policy::command::suggest_from;
use crate::policy::suggest::Suggestion;
use proptest::prelude::*;
use sensor_common::policy::{PROFILE_SELF, Reason};
use sensor_common::{TCP, UDP};
use serde_json::{Value, json};

fn suggest(events: &[Value]) -> Suggestion {
    let text: String = events.iter().map(|e| format!("{e}\n")).collect();
    suggest_from(text.as_bytes(), "s", None).unwrap()
}

fn event(ip: &str, port: u16, protocol: &str) -> Value {
    json!({"type": "connection", "server": "s", "verdict": "would_deny", "reason": "no_rule", "role": "server",
        "hook": "egress", "direction": "egress", "protocol": protocol, "dst": {"ip": ip, "port": port},
        "time": "2026-11-21T08:00:00.5Z", "seq": 1, "pid": 7})
}

fn inbound_event(peer: &str, port: u16) -> Value {
    json!({"type": "connection", "server": "s", "verdict": "would_deny", "reason": "no_inbound_rule",
        "hook": "ingress", "direction": "inbound", "protocol": "tcp", "dst": {"ip": "10.0.0.9", "port": port},
        "src": {"ip": peer, "port": 40000}})
}

fn named_event(name: &str, ip: &str, port: u16, protocol: &str) -> Value {
    let mut e = event(ip, port, protocol);
    e["dst"]["name"] = name.into();
    e
}

fn query(name: &str, reason: &str, resolver: &str) -> Value {
    json!({"type": "dns", "server": "s", "verdict": if reason == "name" { "allow" } else { "would_deny" },
        "reason": reason, "role": "server", "hook": "egress", "name": name, "qtype": "A", "protocol": "udp",
        "resolver": {"ip": resolver, "port": 53}, "time": "2026-11-21T08:00:00.5Z", "seq": 1, "pid": 7})
}

/// The resolver of the host that the suggestion is replayed on.
const PINNED: &str = "10.0.0.53";

/// What the kernel would say of these records under the suggested profile.
fn denied(suggestion: &Suggestion, events: &[Value]) -> usize {
    let policy = parse_bytes(suggestion.yaml.as_bytes()).unwrap_or_else(|e| panic!("{e:#?}"));
    let mut host = Host::default();
    host.dns.resolvers.push(PINNED.parse().unwrap());
    // No server refers to the profile, so that it has the resolvers of the host
    // or of the policy.
    let c = compile(&policy, &host, &mut Ids::default()).unwrap_or_else(|e| panic!("{e:#?}"));
    let tables = MemoryTables::new(&c);
    let profile = c.profile_names.iter().position(|n| *n == suggestion.profile).unwrap();
    let own = c.profiles[profile].flags & PROFILE_SELF != 0;
    let denies = |event: &&Value| {
        if event["reason"] == "self" {
            return !own;
        }
        if event["type"] == "dns" {
            let name = event["name"].as_str().unwrap();
            let asked = tables.name(profile as u16, name).is_some();
            let resolver = event["resolver"]["ip"].as_str().unwrap();
            let pinned = egress(&c, &suggestion.profile, resolver, 53, UDP).reason == Reason::Resolver;
            return !(asked && pinned);
        }
        let is_inbound = event["direction"] == "inbound";
        let ip = if is_inbound { &event["src"]["ip"] } else { &event["dst"]["ip"] };
        let protocol = if event["protocol"] == "udp" { UDP } else { TCP };
        let flow = Flow {
            direction: if is_inbound { INBOUND } else { EGRESS },
            protocol,
            port: event["dst"]["port"].as_u64().unwrap() as u16,
            addr: Addr::from(ip.as_str().unwrap().parse::<IpAddr>().unwrap()),
            any_port: protocol == UDP && event["hook"] == "connect",
        };
        match event["dst"]["name"].as_str().or(event["dst.name"].as_str()) {
            Some(name) => !decide(&MemoryTables::new(&c).learned_by(name), 1, profile as u16, &flow).allows(),
            None => !decide(&tables, 1, profile as u16, &flow).allows(),
        }
    };
    events.iter().filter(denies).count()
}

#[test]
fn a_suggestion_is_exact() {
    let events = [
        event("10.0.0.1", 443, "tcp"),
        event("10.0.0.2", 443, "tcp"),
        event("10.0.0.1", 443, "tcp"),
        event("10.0.0.53", 53, "udp"),
        event("2001:db8::1", 6000, "tcp"),
        event("2001:db8::1", 6001, "tcp"),
        inbound_event("127.0.0.1", 3901),
    ];
    let s = suggest(&events);
    assert_eq!(
        s.yaml,
        r#"version: 1
profiles:
  "s":
    egress:
      - to: ["10.0.0.1", "10.0.0.2"]
        ports: [443]
      - to: ["2001:db8::1"]
        ports: [6000-6001]
      - to: ["10.0.0.53"]
        ports: [53]
        protocol: udp
    inbound:
      - from: ["127.0.0.1"]
        ports: [3901]
"#
    );
    assert_eq!((s.records, denied(&s, &events)), (7, 0));
    let c = compiled(&s.yaml);
    assert_eq!(egress(&c, "s", "10.0.0.3", 443, TCP).reason, Reason::NoRule);
    assert_eq!(egress(&c, "s", "10.0.0.2", 443, UDP).reason, Reason::NoRule);
    assert_eq!(egress(&c, "s", "10.0.0.53", 443, TCP).reason, Reason::NoRule);
}

#[test]
fn nothing_recorded_allows_nothing() {
    let s = suggest(&[]);
    let c = compiled(&s.yaml);
    assert_eq!(egress(&c, "s", "10.0.0.1", 443, TCP).reason, Reason::NoRule);
}

#[test]
fn an_address_sort_needs_no_port_of_its_own() {
    let mut looked = event("10.0.0.7", 443, "udp");
    looked["hook"] = "connect".into();
    let events = [event("10.0.0.1", 443, "tcp"), looked];
    let s = suggest(&events);
    assert_eq!(denied(&s, &events), 0);
    let c = compiled(&s.yaml);
    assert!(egress(&c, "s", "10.0.0.7", 443, TCP).allows(), "the service's other address");
    assert!(!egress(&c, "s", "10.0.0.7", 443, UDP).allows());
    let alone = suggest(&events[1..]);
    assert_eq!(alone.left_out.len(), 1, "{alone:?}");
}

#[test]
fn what_no_rule_allows_or_was_denied_is_left_out_and_counted() {
    let with = |key: &str, value: Value| {
        let mut e = event("10.0.0.1", 443, "tcp");
        e[key] = value;
        e
    };
    let s = suggest(&[
        with("verdict", "deny".into()),
        with("reason", "fragment".into()),
        with("protocol", "132".into()),
        with("server", "other".into()),
        with("type", "repeat".into()),
        json!({"type": "loss", "where": "kernel", "reason": "x", "count": 3}),
        json!({"type": "unix_connection", "server": "s", "verdict": "would_deny", "path": "/run/docker.sock"}),
        json!({"type": "unix_connection", "server": "s", "verdict": "would_deny", "path": "relative"}),
        with("reason", "self".into()),
    ]);
    assert_eq!(s.records, 2);
    assert_eq!(s.left_out.iter().map(|l| l.count).sum::<u64>(), 4, "{:?}", s.left_out);
    assert!(s.yaml.contains("- to: [self]\n") && s.yaml.contains("- \"/run/docker.sock\"\n"), "{}", s.yaml);
    assert!(!s.yaml.contains("10.0.0.1"), "{}", s.yaml);
    compiled(&s.yaml);
}

#[test]
fn a_launcher_gets_a_profile_of_its_own() {
    let mut launcher = event("10.9.9.9", 443, "tcp");
    launcher["role"] = "launcher".into();
    let s = suggest(&[event("10.0.0.1", 443, "tcp"), launcher]);
    assert_eq!(s.launcher_profile.as_deref(), Some("s-launcher"));
    let c = compiled(&s.yaml);
    assert!(egress(&c, "s-launcher", "10.9.9.9", 443, TCP).allows());
    assert!(!egress(&c, "s", "10.9.9.9", 443, TCP).allows());
}

#[test]
fn only_records_since_count() {
    let since = time::macros::datetime!(2026-11-21 09:00 UTC);
    let mut late = event("10.0.0.2", 443, "tcp");
    late["time"] = "2026-11-21T09:00:00Z".into();
    let text = format!("{}\n{late}\n", event("10.0.0.1", 443, "tcp"));
    let s = suggest_from(text.as_bytes(), "s", Some(since)).unwrap();
    assert_eq!(s.records, 1);
    assert!(s.yaml.contains("10.0.0.2") && !s.yaml.contains("10.0.0.1"));
}

#[test]
fn an_event_file_of_garbage_is_counted() {
    let mut text = b"not json\n\xff\xfe\n{\"type\":\n\n".to_vec();
    text.extend(std::iter::repeat_n(b'x', (2 << 20) + 5));
    text.extend(b"\n");
    text.extend(event("10.0.0.1", 443, "tcp").to_string().bytes());
    let s = suggest_from(&text[..], "s", None).unwrap();
    assert_eq!(s.records, 1);
    assert_eq!(s.left_out.iter().map(|l| l.count).sum::<u64>(), 4, "{:?}", s.left_out);
}

#[test]
fn a_hostile_server_name_is_no_yaml() {
    let text = json!({"type": "connection", "server": "a: [\"\n", "verdict": "allow", "protocol": "tcp",
        "dst": {"ip": "10.0.0.1", "port": 1}});
    let s = suggest_from(text.to_string().as_bytes(), "a: [\"\n", None).unwrap();
    assert_eq!(s.records, 1);
    compiled(&s.yaml);
    compiled(&s.text());
}

#[test]
fn odd_socket_names_survive_the_yaml() {
    let names = ["/run/a\u{7f}b", "/run/\u{85}\u{9f}", "/run/\u{1f600} \"q\" \\", "@\u{feff}x\ty"];
    let events: Vec<Value> = names
        .iter()
        .map(|path| json!({"type": "unix_connection", "server": "s", "verdict": "would_deny", "path": path}))
        .collect();
    let s = suggest(&events);
    let policy = parse_bytes(s.text().as_bytes()).unwrap_or_else(|e| panic!("{e:#?}\n{}", s.yaml));
    let mut kept: Vec<&str> = policy.profiles[2].unix.iter().map(|u| u.written.as_str()).collect();
    let mut names = names;
    kept.sort_unstable();
    names.sort_unstable();
    assert_eq!(kept, names);
}

#[test]
fn names_are_proposed_in_place_of_addresses() {
    let mut flat = event("192.0.2.9", 443, "tcp");
    flat["dst.name"] = "api.example.com".into();
    let mut looked = named_event("api.example.com", "192.0.2.8", 0, "udp");
    looked["hook"] = "connect".into();
    let mut resolver = event(PINNED, 53, "udp");
    resolver["reason"] = "resolver".into();
    resolver["verdict"] = "allow".into();
    let mut tcp = event(PINNED, 53, "tcp");
    tcp["hook"] = "connect".into();
    let events = [
        query("api.example.com", "name_no_rule", PINNED),
        named_event("api.example.com", "192.0.2.1", 443, "tcp"),
        named_event("api.example.com", "192.0.2.2", 8443, "tcp"),
        named_event("cdn.example.net", "2001:db8::1", 443, "tcp"),
        named_event("stun.example.net", "192.0.2.3", 3478, "udp"),
        query("asked.example.net", "name_no_rule", PINNED),
        event("10.1.0.1", 5432, "tcp"),
        flat,
        looked,
        resolver,
        tcp,
    ];
    let s = suggest(&events);
    assert_eq!(
        s.yaml,
        r#"version: 1
profiles:
  "s":
    egress:
      - to: ["asked.example.net", "cdn.example.net"]
        ports: [443]
      - to: ["api.example.com"]
        ports: [443, 8443]
      - to: ["stun.example.net"]
        ports: [3478]
        protocol: udp
      - to: ["10.1.0.1"]
        ports: [5432]
"#
    );
    assert_eq!((s.records, denied(&s, &events), s.left_out.len()), (11, 0, 0), "{:?}", s.left_out);
}

#[test]
fn resolvers_are_listed_if_one_is_not_pinned() {
    let events = [
        query("a.example", "name", PINNED),
        query("b.example", "foreign_resolver", "192.0.2.53"),
        event("192.0.2.53", 53, "udp"),
        event("192.0.2.54", 53, "tcp"),
    ];
    let s = suggest(&events);
    assert!(
        s.yaml.starts_with("version: 1\nresolvers: [\"10.0.0.53\", \"192.0.2.53\", \"192.0.2.54\"]\n"),
        "{}",
        s.yaml
    );
    assert_eq!(denied(&s, &events), 0, "{}", s.yaml);
    // Without a name nobody looks into DNS.
    let s = suggest(&events[2..]);
    assert!(!s.yaml.contains("resolvers") && s.yaml.contains("- to: [\"192.0.2.53\"]"), "{}", s.yaml);
    assert_eq!(denied(&s, &events[2..]), 0);
    let many: Vec<Value> =
        (0..20).map(|i| query("a.example", "foreign_resolver", &format!("192.0.2.{i}"))).collect();
    let s = suggest(&many);
    compiled(&s.yaml);
    assert_eq!(s.left_out[0].count, 4, "{:?}", s.left_out);
}

#[test]
fn what_names_do_not_allow_is_left_out_and_counted() {
    let with = |mut event: Value, key: &str, value: &str| {
        event[key] = value.into();
        event
    };
    let s = suggest(&[
        named_event("api.example.com", "192.0.2.1", 443, "tcp"),
        query("api.example.com.corp.example", "name_no_rule", PINNED),
        query("x.example", "query_type", PINNED),
        query("", "query_unread", PINNED),
        query("a..b", "name_no_rule", PINNED),
        query("self", "name_no_rule", PINNED),
        query("*.x.example", "name_no_rule", PINNED),
        with(query("x.example", "name_no_rule", PINNED), "verdict", "deny"),
        with(named_event("y.example", "192.0.2.1", 443, "tcp"), "reason", "sni"),
        // Of answers.
        query("z.example", "rebinding", PINNED),
    ]);
    assert_eq!(s.left_out.iter().map(|l| l.count).sum::<u64>(), 8, "{:?}", s.left_out);
    let names: Vec<&str> = s.yaml.lines().filter(|line| line.contains("- to:")).collect();
    assert_eq!(names, ["      - to: [\"api.example.com\"]"]);
}

#[test]
fn many_ports_of_a_name_still_compile() {
    let mut events = Vec::new();
    for port in (1..2000u16).step_by(2) {
        events.push(named_event("a.example", "192.0.2.1", port, "tcp"));
        events.push(named_event("a.example", "192.0.2.1", port, "udp"));
        events.push(event("10.0.0.53", port, "udp"));
        events.push(event("10.0.0.53", port, "tcp"));
    }
    let s = suggest(&events);
    assert_eq!(denied(&s, &events), 0, "{}", s.yaml);
}

fn any_name() -> impl Strategy<Value = String> {
    prop::sample::select(vec![
        "a.example",
        "b.example",
        "api.x.example",
        "_y.example",
        "localhost",
        "1.example",
    ])
    .prop_map(str::to_owned)
}

fn any_dns_event() -> impl Strategy<Value = Value> {
    let resolver = prop::sample::select(vec![PINNED, "192.0.2.53", "2001:db8::53"]);
    (any_name(), resolver, 1u16..=u16::MAX, 0u8..7).prop_map(|(name, resolver, port, kind)| match kind {
        0 => query(&name, if resolver == PINNED { "name" } else { "foreign_resolver" }, resolver),
        1 => query(&name, if resolver == PINNED { "name_no_rule" } else { "foreign_resolver" }, resolver),
        2 => event(resolver, 53, if port % 2 == 0 { "udp" } else { "tcp" }),
        3 => {
            let mut e = named_event(&name, "192.0.2.1", port, "udp");
            e["hook"] = "connect".into();
            e
        }
        4 => named_event(&name, "192.0.2.1", port, "udp"),
        5 => named_event(&name, "2001:db8::7", 443, "tcp"),
        _ => named_event(&name, "192.0.2.1", port, "tcp"),
    })
}

fn any_event() -> impl Strategy<Value = Value> {
    let ip = prop_oneof![
        (0u8..4, 0u8..4).prop_map(|(a, b)| format!("10.0.{a}.{b}")),
        (0u16..4).prop_map(|a| format!("2001:db8::{a:x}")),
        Just("127.0.0.1".to_owned()),
        Just("224.0.0.251".to_owned()),
        Just("255.255.255.255".to_owned()),
        Just("::ffff:10.0.0.1".to_owned()),
        Just("64:ff9b::a00:1".to_owned()),
        Just("0.0.0.0".to_owned()),
    ];
    (ip, 1u16..=u16::MAX, 0u8..5, any::<bool>()).prop_map(|(ip, port, kind, udp)| match kind {
        0 => inbound_event(&ip, port),
        1 => {
            let mut e = event(&ip, port, "tcp");
            e["reason"] = "self".into();
            e["verdict"] = "allow".into();
            e
        }
        2 if udp => {
            let mut e = event(&ip, port, "udp");
            e["hook"] = "connect".into();
            e
        }
        _ => event(&ip, port, if udp { "udp" } else { "tcp" }),
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn replaying_what_was_recorded_gives_no_denial(
        events in prop::collection::vec(prop_oneof![any_event(), any_dns_event()], 0..200),
    ) {
        // One TCP connection, so that looked-at addresses have a service.
        let mut events = events;
        events.push(event("10.0.0.9", 443, "tcp"));
        let s = suggest(&events);
        prop_assert_eq!(s.records as usize, events.len());
        prop_assert_eq!(denied(&s, &events), 0, "{}", s.yaml);
        prop_assert!(s.left_out.is_empty(), "{:?}", s.left_out);
    }

    #[test]
    fn replaying_names_alone_gives_no_denial(events in prop::collection::vec(any_dns_event(), 0..60)) {
        let s = suggest(&events);
        prop_assert_eq!(denied(&s, &events), 0, "{}", s.yaml);
        prop_assert!(s.left_out.is_empty(), "{:?}", s.left_out);
    }
}
