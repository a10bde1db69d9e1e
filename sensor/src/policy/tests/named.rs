//! Profiles by host name: what the kernel's trie says of a name is what the
//! rules say of it one by one.

use super::*;
use crate::policy::explain::{Explanation, Query, explain, line_for_query, name_line};
use crate::policy::model::Direction;
use crate::policy::names::NamePattern;
use crate::policy::resolvers::HostDns;
use proptest::prelude::*;
use sensor_common::name::{MAX_NAME, NAME_ASK_ONLY, readable};
use sensor_common::policy::{PROFILE_NAMES, RANGE_DNS, RANGE_SNI, Reason};
use sensor_common::{TCP, UDP};
use std::collections::BTreeSet;
use std::time::Instant;

/// A host with a resolver and a search list.
fn host(search: &[&str]) -> Host {
    let dns = HostDns {
        resolvers: vec!["10.0.0.53".parse().unwrap()],
        search: search.iter().map(|s| (*s).to_owned()).collect(),
        ..HostDns::default()
    };
    Host { dns, ..Host::default() }
}

fn on(text: &str, host: &Host) -> Result<Compiled, Vec<Diagnostic>> {
    compile(&parse_bytes(text.as_bytes())?, host, &mut Ids::default())
}

fn profile(rules: &str) -> String {
    format!(
        "version: 1\nprofiles: {{p: {{egress: [{rules}]}}}}\nservers: [{{name: a, profile: p, mode: enforce}}]\n"
    )
}

/// As if the server had learned an address by `name`: (reason, rule, SNI).
fn by_name(c: &Compiled, profile: u16, name: &str, port: u16, protocol: u8) -> (Reason, u32, bool) {
    let addr = Addr::from("192.0.2.1".parse::<IpAddr>().unwrap());
    let flow = Flow { direction: EGRESS, protocol, port, addr, any_port: false };
    let d = decide(&MemoryTables::new(c).learned_by(name), 1, profile, &flow);
    (d.reason, d.rule, d.sni)
}

#[test]
fn an_exact_name_is_itself_and_a_wildcard_what_is_below() {
    let c = on(
        &profile("{to: [API.Example.com.], ports: [443]}, {to: [\"*.example.com\"], ports: [8443]}"),
        &host(&[]),
    )
    .unwrap();
    let ask = |name, port| by_name(&c, 2, name, port, TCP);
    assert_eq!(ask("api.example.com", 443), (Reason::Rule, 1, true));
    assert_eq!(ask("api.example.com", 8443), (Reason::Rule, 2, false), "the wildcard around it");
    assert_eq!(ask("a.b.example.com", 8443), (Reason::Rule, 2, false));
    for name in ["example.com", "evilexample.com", "api.example.com.evil.net", "com"] {
        assert_eq!(ask(name, 8443).0, Reason::NoRule, "{name}");
    }
    assert_eq!(ask("x.api.example.com", 443).0, Reason::NoRule);
    assert_eq!(by_name(&c, 2, "api.example.com", 443, UDP).0, Reason::NoRule);
    assert_eq!(c.profiles[2].flags & PROFILE_NAMES, PROFILE_NAMES);
    assert_eq!(c.profiles[0].flags & PROFILE_NAMES, 0);
}

#[test]
fn a_client_hello_is_asked_for_on_443_unless_the_rule_says_otherwise() {
    let sni = |rule: &str, ports: &[u16]| -> Vec<Option<bool>> {
        let c = on(&profile(rule), &host(&[])).unwrap();
        ports
            .iter()
            .map(|port| {
                let (reason, _, sni) = by_name(&c, 2, "x.example", *port, TCP);
                reason.allows().then_some(sni)
            })
            .collect()
    };
    let ports = [1, 442, 443, 444, 65535];
    let (no, yes, plain) = (None, Some(true), Some(false));
    assert_eq!(sni("{to: [x.example], ports: [443]}", &ports), [no, no, yes, no, no]);
    assert_eq!(sni("{to: [x.example], ports: [442-443]}", &ports), [no, plain, yes, no, no]);
    assert_eq!(sni("{to: [x.example], ports: [443-444]}", &ports), [no, no, yes, plain, no]);
    assert_eq!(sni("{to: [x.example]}", &ports), [plain, plain, yes, plain, plain]);
    assert_eq!(sni("{to: [x.example], sni: ignore}", &ports), [plain; 5]);
    assert_eq!(sni("{to: [x.example], ports: [442-444], sni: require}", &ports), [no, yes, yes, yes, no]);
    // What one rule allows, another does not take away.
    for both in [
        "{to: [x.example], ports: [443]}, {to: [\"*.example\", x.example], sni: ignore, ports: [443]}",
        "{to: [x.example], sni: ignore, ports: [443]}, {to: [x.example], ports: [443], sni: require}",
    ] {
        let both = both.replace("\"*.example\", ", "");
        assert_eq!(sni(&both, &ports), [no, no, plain, no, no], "{both}");
    }
    let c = on(&profile("{to: [x.example], protocol: udp}"), &host(&[])).unwrap();
    assert_eq!(by_name(&c, 2, "x.example", 443, UDP), (Reason::Rule, 1, false), "UDP shows none");
}

#[test]
fn a_rule_of_names_and_addresses_is_both() {
    let c = on(&profile("{to: [x.example, 10.1.0.0/16], ports: [443]}"), &host(&[])).unwrap();
    assert_eq!(by_name(&c, 2, "x.example", 443, TCP), (Reason::Rule, 1, true));
    let d = egress(&c, "p", "10.1.2.3", 443, TCP);
    assert_eq!((d.reason, d.rule, d.sni), (Reason::Rule, 1, false));
}

#[test]
fn a_resolver_is_inspected_whatever_rules_cover_it() {
    let rules =
        "{to: [x.example]}, {to: [10.0.0.0/8], protocol: [tcp, udp]}, {to: [10.0.0.53], ports: [53, 443]}";
    let c = on(&profile(rules), &host(&[])).unwrap();
    let ask = |ip, port, protocol| egress(&c, "p", ip, port, protocol);
    for protocol in [UDP, TCP] {
        let d = ask("10.0.0.53", 53, protocol);
        assert_eq!(d.reason, Reason::Resolver);
        let rule = c.rule(d.rule).unwrap();
        assert_eq!((rule.text.as_str(), rule.path.as_str()), ("resolvers: 10.0.0.53", "/etc/resolv.conf"));
    }
    assert_eq!(ask("10.0.0.53", 54, UDP).reason, Reason::Rule);
    assert_eq!(ask("10.0.0.54", 53, UDP).reason, Reason::Rule, "nothing of it leaks to a neighbour");
    let first = |bits: u32| {
        let cidr = c.cidrs.iter().find(|c| c.bits == bits).unwrap();
        c.port_sets[cidr.port_set as usize].ranges[0].flags
    };
    assert_eq!((first(128), first(104)), (RANGE_DNS, 0));
    assert_eq!((c.warnings.len(), c.warnings[0].path.as_str()), (1, "profiles.p.egress[1]"));
    let message = &c.warnings[0].message;
    assert!(message.contains("stays inspected") && message.contains("and 1 more"), "{message}");
    // Without names nobody looks into DNS, and a rule is what it says.
    let c = on(&profile("{to: [10.0.0.53], ports: [53], protocol: udp}"), &host(&[])).unwrap();
    assert_eq!(egress(&c, "p", "10.0.0.53", 53, UDP).reason, Reason::Rule);
    assert!(c.warnings.is_empty());
}

#[test]
fn servers_with_resolvers_of_their_own_share_a_profile_by_name_only() {
    let text = r#"version: 1
profiles:
  p: {egress: [{to: [x.example], ports: [443]}], unix: [/run/x.sock]}
  q: {egress: [{to: [10.1.0.0/16]}]}
servers:
  - {name: a, profile: p, mode: enforce}
  - {name: docker, profile: p, mode: enforce, resolvers: [127.0.0.11]}
  - {name: two, profile: p, launcher_profile: q, mode: enforce, resolvers: [10.0.0.2, 10.0.0.1]}
  - {name: same, profile: p, launcher_profile: p, mode: enforce, resolvers: [10.0.0.1, 10.0.0.2]}
  - {name: plain, profile: q, mode: enforce, resolvers: [10.0.0.9]}
resolvers: [10.0.0.53]
"#;
    let c = on(text, &host(&[])).unwrap();
    let of = |name| c.server(name).unwrap().1;
    let (a, docker, two, same, plain) = (of("a"), of("docker"), of("two"), of("same"), of("plain"));
    assert_eq!((a.profile, plain.profile), (2, 3));
    assert_eq!((docker.profile, two.profile, two.launcher_profile), (4, 5, 3));
    assert_eq!((same.profile, same.launcher_profile), (5, 5));
    assert_eq!(c.profile_names[2..], ["p", "q", "p", "p"]);
    assert_eq!(c.profile_of[2..], [2, 3, 2, 2]);
    let asks = |profile: u16| -> Vec<(String, u32, &str)> {
        let of = c.cidrs.iter().filter(|c| c.profile == profile && c.bits == 128);
        of.map(|cidr| {
            let rule = c.rule(c.port_sets[cidr.port_set as usize].ranges[0].rule).unwrap();
            (IpAddr::from(cidr.addr).to_string(), rule.line, rule.path.as_str())
        })
        .collect()
    };
    assert_eq!(asks(2), [("10.0.0.53".to_owned(), 11, "resolvers[0]")]);
    assert_eq!(asks(4), [("127.0.0.11".to_owned(), 7, "servers[1].resolvers[0]")]);
    assert_eq!(asks(5).len(), 2);
    assert_eq!(asks(3), []);
    for profile in [2, 4, 5] {
        assert_eq!(
            by_name(&c, profile, "x.example", 443, TCP),
            (Reason::Rule, 1, true),
            "one rule, one number"
        );
        assert!(c.unix.iter().any(|u| u.profile == u32::from(profile) && u.text == b"/run/x.sock\0"));
    }
    let explained = asked(text, "two", "x.example:443");
    assert_eq!((explained.profile.as_str(), explained.sni), ("p", true));
}

#[test]
fn names_that_nobody_can_ask_for_are_not_enforced() {
    let text = |mode: &str| {
        format!(
            "version: 1\nprofiles: {{p: {{egress: [{{to: [api.example.com]}}]}}}}\n\
             servers: [{{name: a, profile: none, launcher_profile: p, mode: {mode}}}]\n"
        )
    };
    let problem = Some("/etc/resolv.conf belongs to uid 1000".to_owned());
    let nobody = Host { dns: HostDns { problem, ..HostDns::default() }, ..Host::default() };
    let found = on(&text("enforce"), &nobody).unwrap_err();
    assert_eq!((found.len(), found[0].path.as_str()), (1, "servers[0].launcher_profile"));
    assert_eq!(found[0].position.map(|p| p.line), Some(3));
    assert!(found[0].message.contains("api.example.com"), "{found:?}");
    assert!(found[0].message.ends_with("/etc/resolv.conf belongs to uid 1000"), "{found:?}");
    assert!(found[0].help.as_ref().unwrap().contains("resolvers: ["), "{found:?}");
    let audited = on(&text("audit"), &nobody).unwrap();
    assert_eq!((audited.warnings.len(), audited.unresolved.len()), (1, 1));
    assert!(
        on(&format!("{}resolvers: [127.0.0.11]\n", text("enforce")), &nobody).unwrap().warnings.is_empty()
    );
    assert!(on(&text("enforce"), &host(&[])).is_ok());
    let unknown =
        "version: 1\nprofiles: {p: {egress: [{to: [x.example]}]}}\nunknown: {profile: p, mode: enforce}\n";
    assert_eq!(on(unknown, &nobody).unwrap_err()[0].path, "unknown.profile");
}

fn entries(c: &Compiled) -> Vec<(String, bool)> {
    let mut entries: Vec<(String, bool)> = c
        .names
        .iter()
        .map(|n| {
            let below = n.text.ends_with(b".");
            let name = readable(n.text.strip_suffix(b".").unwrap_or(&n.text));
            (NamePattern { below, name }.to_string(), n.rule.flags & NAME_ASK_ONLY != 0)
        })
        .collect();
    entries.sort();
    entries
}

#[test]
fn completed_names_may_be_asked_and_never_learned() {
    let text = profile("{to: [a.example, \"*.b.example\"], ports: [443]}");
    let c = on(&text, &host(&["svc.cluster.local", "corp"])).unwrap();
    let entry = |name: &str, ask| (name.to_owned(), ask);
    assert_eq!(
        entries(&c),
        [
            entry("*.b.example", false),
            entry("*.b.example.corp", true),
            entry("*.b.example.svc.cluster.local", true),
            entry("a.example", false),
            entry("a.example.corp", true),
            entry("a.example.svc.cluster.local", true),
        ]
    );
    assert_eq!(by_name(&c, 2, "a.example.corp", 443, TCP).0, Reason::NoRule);
    // What is written replaces the host's.
    assert_eq!(on(&format!("{text}search: []\n"), &host(&["corp"])).unwrap().names.len(), 2);
    let own = on(&format!("{text}search: [x.y]\n"), &host(&["corp"])).unwrap();
    assert!(entries(&own).contains(&entry("a.example.x.y", true)));
    let explained =
        asked(&format!("{text}search: [x.y]\nresolvers: [10.0.0.53]\n"), "a", "a.example.x.y:443");
    assert!(explained.notes[0].contains("search list"), "{explained:?}");
}

#[test]
fn a_completed_name_shadows_no_rule() {
    let text = profile("{to: [a.example], ports: [1]}, {to: [\"*.corp.example\", b.example.corp.example], ports: [2]}, {to: [b.example, \"*.example\"], ports: [3]}".replace("\"*.example\"", "\"*.x.example\"").as_str());
    let c = on(&text, &host(&["corp.example"])).unwrap();
    assert!(entries(&c).iter().all(|(_, ask)| !ask), "{:?}", entries(&c));
    for name in ["a.example.corp.example", "b.example.corp.example", "y.x.example.corp.example"] {
        assert_eq!(by_name(&c, 2, name, 2, TCP), (Reason::Rule, 2, false), "{name}");
        assert_eq!(by_name(&c, 2, name, 1, TCP).0, Reason::NoRule, "{name}");
    }
}

#[test]
fn a_completed_name_that_no_key_holds_is_left_out() {
    let name = vec!["a".repeat(48); 5].join(".");
    let search = "b".repeat(MAX_NAME - name.len() - 1 - 2) + ".c";
    let longer = format!("b{search}");
    let c = on(&profile(&format!("{{to: [{name}], ports: [1]}}")), &host(&[&search, &longer])).unwrap();
    let lengths: BTreeSet<usize> = c.names.iter().map(|n| n.text.len()).collect();
    assert_eq!(lengths, BTreeSet::from([name.len() + 1, MAX_NAME + 1]));
}

#[test]
fn too_much_for_the_kernel_is_refused_with_its_reason() {
    let ports: Vec<String> = (0..40).map(|i| (1000 + 2 * i).to_string()).collect();
    let found =
        on(&profile(&format!("{{to: [\"*.x.example\"], ports: [{}]}}", ports.join(", "))), &host(&[]));
    let found = found.unwrap_err();
    assert!(found[0].message.contains("32 port ranges apply to *.x.example"), "{found:?}");
    assert_eq!(found[0].path, "profiles.p");
    let names: Vec<String> = (0..30_000).map(|i| format!("n{i}.example")).collect();
    let text = profile(&format!("{{to: [{}], ports: [1]}}", names.join(", ")));
    assert_eq!(on(&text, &host(&["a", "b"])).unwrap().names.len(), 90_000);
    let search: Vec<String> = (0..8).map(|i| format!("s{i}")).collect();
    let search: Vec<&str> = search.iter().map(String::as_str).collect();
    let found = on(&text, &host(&search)).unwrap_err();
    assert!(found[0].message.contains("more than 262144 host names"), "{found:?}");
}

/// Prints its time; the budget (100 ms) is for release builds.
#[test]
fn ten_thousand_names_compile_with_their_search_list() {
    let mut rules = String::new();
    for block in 0..100 {
        let names: Vec<String> = (0..100).map(|i| format!("h{i}.b{block}.example.com")).collect();
        rules.push_str(&format!(
            "{{to: [\"*.b{block}.example.com\", {}], ports: [{}]}}, ",
            names.join(", "),
            1000 + block
        ));
    }
    let policy = parse_bytes(profile(&rules).as_bytes()).unwrap();
    let host = host(&["ns.svc.cluster.local", "svc.cluster.local", "cluster.local", "corp.example"]);
    let start = Instant::now();
    let c = compile(&policy, &host, &mut Ids::default()).unwrap();
    println!("{} names in {:?}, {} port sets", c.names.len(), start.elapsed(), c.port_sets.len());
    assert_eq!(c.names.len(), 10_100 * 5);
}

#[test]
fn what_names_cannot_do_is_said() {
    let warnings = |rule: &str| -> Vec<String> {
        let policy = parse_bytes(profile(rule).as_bytes()).unwrap();
        policy.warnings.into_iter().map(|w| w.message).collect()
    };
    assert_eq!(warnings("{to: [x.example], ports: [443]}"), [""; 0]);
    assert!(warnings("{to: [x.example], ports: [443], protocol: [tcp, udp]}")[0].contains("QUIC"));
    assert_eq!(warnings("{to: [x.example], ports: [3478], protocol: udp}"), [""; 0]);
    assert!(
        warnings("{to: [x.example, 10.0.0.1], ports: [443], sni: require}")[0]
            .contains("not for its addresses")
    );
    assert!(warnings("{to: [10.0.0.1], sni: ignore}")[0].contains("says nothing"));
    assert!(warnings("{to: [db], ports: [5432]}")[0].contains("one label"));
    assert_eq!(warnings("{to: [localhost], ports: [5432]}"), [""; 0]);
}

fn asked(text: &str, server: &str, target: &str) -> Explanation {
    let policy = parse_bytes(text.as_bytes()).unwrap();
    let c = compile(&policy, &host(&[]), &mut Ids::default()).unwrap();
    let query = Query {
        server: server.to_owned(),
        launcher: false,
        direction: Direction::Egress,
        target: target.parse().unwrap(),
    };
    explain(&policy, &c, &query).unwrap()
}

#[test]
fn the_suggested_line_allows_the_name() {
    for (name, port, protocol) in [
        ("api.example.com", 443, TCP),
        ("_x.example.com", 53, UDP),
        ("1.example.com", 1, TCP),
        ("null", 9, TCP),
    ] {
        let line = name_line(name, port, protocol).unwrap();
        let c = on(&profile(&line), &host(&[])).unwrap();
        assert_eq!(by_name(&c, 2, name, port, protocol).0, Reason::Rule, "{line}");
        assert_eq!(by_name(&c, 2, name, port + 1, protocol).0, Reason::NoRule, "{line}");
    }
    assert_eq!(
        line_for_query(Reason::NameNoRule, "API.example.com").as_deref(),
        Some("{to: [api.example.com], ports: [443]}")
    );
    for (reason, name) in [
        (Reason::QueryType, "a.example"),
        (Reason::NameNoRule, "a..b"),
        (Reason::NameNoRule, "self"),
        (Reason::NameNoRule, "*.a.example"),
        (Reason::NameNoRule, "a.example\" ]"),
    ] {
        assert_eq!(line_for_query(reason, name), None, "{name}");
    }
}

#[derive(Clone, Debug)]
struct Plain {
    names: Vec<String>,
    ports: Vec<(u16, u16)>,
    tcp: bool,
    udp: bool,
    sni: usize,
}

const SNI: [&str; 3] = ["", ", sni: require", ", sni: ignore"];

fn yaml(rules: &[Plain]) -> String {
    let rule = |r: &Plain| {
        let names: Vec<String> = r.names.iter().map(|n| format!("\"{n}\"")).collect();
        let ports: Vec<String> = r.ports.iter().map(|(low, high)| format!("{low}-{high}")).collect();
        let ports = if ports.is_empty() { String::new() } else { format!(", ports: [{}]", ports.join(", ")) };
        let protocol = match (r.tcp, r.udp) {
            (true, true) => "[tcp, udp]",
            (true, false) => "tcp",
            _ => "udp",
        };
        let sni = if r.udp && r.sni == 1 { "" } else { SNI[r.sni] };
        format!("{{to: [{}]{ports}, protocol: {protocol}{sni}}}", names.join(", "))
    };
    profile(&rules.iter().map(rule).collect::<Vec<_>>().join(", "))
}

/// By hand: no key, no prefix, no turned-around text.
fn covered(pattern: &str, name: &str) -> bool {
    match pattern.strip_prefix("*.") {
        None => pattern == name,
        Some(apex) => {
            let (labels, of): (Vec<&str>, Vec<&str>) = (name.split('.').collect(), apex.split('.').collect());
            labels.len() > of.len() && labels[labels.len() - of.len()..] == of[..]
        }
    }
}

/// (allowed, a ClientHello is needed) by the rules one by one.
fn oracle(rules: &[Plain], name: &str, port: u16, udp: bool) -> (bool, bool) {
    let needs = |r: &Plain| -> Option<bool> {
        let covers = r.names.iter().any(|n| covered(n, name))
            && (if udp { r.udp } else { r.tcp })
            && (r.ports.is_empty() || r.ports.iter().any(|(low, high)| (*low..=*high).contains(&port)));
        let sni = match (r.sni, r.udp) {
            (1, false) => true,
            (2, _) => false,
            _ => port == 443,
        };
        covers.then_some(!udp && sni)
    };
    let needs: Vec<bool> = rules.iter().filter_map(needs).collect();
    (!needs.is_empty(), needs.iter().all(|n| *n) && !needs.is_empty())
}

fn any_name() -> impl Strategy<Value = String> {
    let label = prop::sample::select(vec!["a", "b", "ab", "a-b", "0", "_x"]);
    let top = prop::sample::select(vec!["example", "corp", "aexample"]);
    (prop::collection::vec(label, 0..4), top).prop_map(|(mut labels, top)| {
        labels.push(top);
        labels.join(".")
    })
}

fn any_pattern() -> impl Strategy<Value = String> {
    (any_name(), any::<bool>()).prop_map(
        |(name, below)| {
            if below && name.contains('.') { format!("*.{name}") } else { name }
        },
    )
}

fn any_rule() -> impl Strategy<Value = Plain> {
    let names = prop::collection::vec(any_pattern(), 1..5);
    let ports =
        prop::collection::vec((430u16..450, 0u16..20).prop_map(|(low, more)| (low, low + more)), 0..3);
    (names, ports, 0u8..3, 0usize..3).prop_map(|(names, ports, protocol, sni)| Plain {
        names,
        ports,
        tcp: protocol != 1,
        udp: protocol != 0,
        sni,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 384, ..ProptestConfig::default() })]

    #[test]
    fn the_trie_says_of_a_name_what_the_rules_say_one_by_one(
        rules in prop::collection::vec(any_rule(), 1..6),
        flows in prop::collection::vec((any_name(), 428u16..475, any::<bool>()), 1..40),
        search in prop::collection::vec(any_name(), 0..3),
    ) {
        let text = yaml(&rules);
        let search: Vec<&str> = search.iter().map(String::as_str).collect();
        let c = on(&text, &host(&search)).unwrap_or_else(|e| panic!("{e:#?}\n{text}"));
        let tables = MemoryTables::new(&c);
        let patterns: Vec<&String> = rules.iter().flat_map(|r| &r.names).collect();
        let near = patterns.iter().flat_map(|p| {
            let name = p.trim_start_matches("*.");
            let completed = search.iter().map(move |s| format!("{name}.{s}"));
            completed.chain([name.to_owned(), format!("x.{name}"), format!("x{name}")])
        });
        for (name, port, udp) in
            flows.into_iter().chain(near.flat_map(|n| [(n.clone(), 443, false), (n, 440, true)]))
        {
            let (reason, rule, sni) = by_name(&c, 2, &name, port, if udp { UDP } else { TCP });
            prop_assert_eq!((reason.allows(), sni), oracle(&rules, &name, port, udp), "{} {} {}\n{}", name, port, udp, text);
            if reason.allows() {
                let rule = &rules[rule as usize - 1];
                prop_assert!(rule.names.iter().any(|n| covered(n, &name)), "{} {:?}", name, rule);
            }
            // What may be asked: what a rule covers, and its completions.
            let entry = tables.name(2, &name);
            let real = patterns.iter().any(|p| covered(p, &name));
            let completed = patterns.iter().any(|p| search.iter().any(|s| covered(&format!("{p}.{s}"), &name)));
            prop_assert_eq!(entry.is_some(), real || completed, "{}\n{}", name, text);
            if let Some(entry) = entry {
                prop_assert_eq!(entry.flags == NAME_ASK_ONLY, !real, "{}\n{}", name, text);
                prop_assert!(real || entry.port_set == 0);
            }
        }
        for set in &c.port_sets {
            let flags: Vec<u8> = set.ranges[..set.count as usize].iter().map(|r| r.flags).collect();
            prop_assert!(flags.iter().rev().skip_while(|f| **f & RANGE_SNI != 0).all(|f| f & RANGE_SNI == 0));
        }
    }
}
