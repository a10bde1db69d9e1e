//! A bundle and a host's policy together allow nothing that one of them denies.

use super::super::combine::combine;
use super::super::compile::UNKNOWN;
use super::super::model::Policy;
use super::super::resolvers::HostDns;
use super::super::tools::ToolVerdict;
use super::*;
use crate::policy::diagnostic::Severity;
use proptest::prelude::*;
use sensor_common::policy::{
    MODE_ENFORCE, PROFILE_UNRESTRICTED, Reason, SERVER_UNKNOWN, UNIX_OPEN, UNIX_STRICT,
};
use sensor_common::unix::POWER;

fn dns() -> HostDns {
    HostDns { resolvers: vec!["10.0.0.53".parse().unwrap()], ..HostDns::default() }
}

fn host() -> Host {
    Host { dns: dns(), ..Host::default() }
}

fn alone(text: &str) -> Result<Compiled, Vec<Diagnostic>> {
    compile(&parse_bytes(text.as_bytes())?, &host(), &mut Ids::default())
}

fn together(bundle: &str, local: &str, delegate: bool) -> Result<Compiled, Vec<Diagnostic>> {
    let [bundle, local] = [bundle, local].map(|text| parse_bytes(text.as_bytes()).unwrap());
    compile(&combine(bundle, &local, delegate, &dns())?, &host(), &mut Ids::default())
}

fn both(bundle: &str, local: &str) -> Compiled {
    together(bundle, local, false).unwrap_or_else(|e| panic!("{e:#?}"))
}

/// The profile that a policy holds a server to; `None`: it denies it nothing,
/// since it knows it as an `unknown` in audit.
fn held(compiled: &Compiled, server: &str, launcher: bool) -> Option<(u16, u8, bool)> {
    let of = |s: &sensor_common::policy::Server| {
        (if launcher { s.launcher_profile } else { s.profile }, s.unix, s.mode == MODE_ENFORCE)
    };
    match compiled.server(server) {
        Some((_, s)) => Some(of(s)),
        None => compiled.server(UNKNOWN).map(|(_, s)| of(s)).filter(|(_, _, enforced)| *enforced),
    }
}

/// By address, and by each of [`NAMES`].
struct Judge<'a>(Vec<MemoryTables<'a>>);

impl<'a> Judge<'a> {
    fn new(compiled: &'a Compiled) -> Judge<'a> {
        let tables = || MemoryTables::new(compiled);
        Judge(std::iter::once(tables()).chain(NAMES.map(|name| tables().learned_by(name))).collect())
    }

    fn by(&self, name: usize, profile: u16, flow: &Flow) -> Decision {
        decide(&self.0[name], 1, profile, flow)
    }
}

fn unix_allowed(compiled: &Compiled, (profile, mode, _): (u16, u8, bool), path: &str) -> bool {
    let unrestricted = compiled.profiles[usize::from(profile)].kind == PROFILE_UNRESTRICTED;
    if mode == UNIX_OPEN || (mode != UNIX_STRICT && unrestricted) {
        return true;
    }
    let key = [path.as_bytes(), b"\0"].concat();
    let listed = |scope: u32| compiled.unix.iter().any(|u| u.profile == scope && key.starts_with(&u.text));
    listed(profile.into()) || (mode != UNIX_STRICT && !listed(POWER))
}

const NAMES: [&str; 4] = ["a.example.com", "b.a.example.com", "example.com", "other.org"];
const PLACES: [&str; 10] = [
    "10.0.0.1",
    "10.0.0.53",
    "10.0.1.1",
    "10.9.9.9",
    "192.0.2.7",
    "224.0.0.251",
    "255.255.255.255",
    "127.0.0.1",
    "2001:db8::1",
    "ff02::1",
];
const SOCKETS: [&str; 5] = ["/run/docker.sock", "/run/docker/x", "/run/app.sock", "/run/app/x", "/tmp/x"];
const TOOLS: [&str; 4] = ["read_file", "write_file", "read_", "delete"];

fn one_of(items: &'static [&'static str]) -> impl Strategy<Value = String> {
    proptest::sample::select(items).prop_map(str::to_owned)
}

fn some_of(items: &'static [&'static str], most: usize) -> impl Strategy<Value = String> {
    proptest::sample::subsequence(items, 1..=most).prop_map(|items| format!("[{}]", items.join(", ")))
}

fn rule(key: &'static str) -> impl Strategy<Value = String> {
    let nets: &'static [&'static str] = &[
        "0.0.0.0/0",
        "\"::/0\"",
        "10.0.0.0/8",
        "10.0.0.0/24",
        "10.0.0.53",
        "10.0.0.1",
        "192.0.2.0/24",
        "224.0.0.0/4",
        "255.255.255.255",
        "\"ff00::/8\"",
        "\"2001:db8::/32\"",
    ];
    let named: &'static [&'static str] =
        &["\"*.example.com\"", "a.example.com", "\"*.a.example.com\"", "example.com", "other.org"];
    let ports: &'static [&'static str] =
        &["", ", ports: [443]", ", ports: [53]", ", ports: [1-1023, 8080]", ", ports: [440-445]"];
    let protocol: &'static [&'static str] = &["", ", protocol: [tcp, udp]", ", protocol: udp"];
    let by_address = (some_of(nets, 3), one_of(ports), one_of(protocol))
        .prop_map(move |(to, ports, protocol)| format!("{{{key}: {to}{ports}{protocol}}}"));
    let by_name = (some_of(named, 3), one_of(ports), one_of(&["", ", sni: require", ", sni: ignore"]))
        .prop_map(move |(to, ports, sni)| format!("{{{key}: {to}{ports}{sni}}}"));
    if key == "to" {
        prop_oneof![3 => by_address, 3 => by_name, 1 => Just("{to: [self]}".to_owned())].boxed()
    } else {
        by_address.boxed()
    }
}

fn profile() -> impl Strategy<Value = String> {
    let unix: &'static [&'static str] =
        &["/run/docker.sock", "\"/run/docker/*\"", "/run/app.sock", "\"/run/*\"", "\"/run/app/*\""];
    let rules = |key| proptest::collection::vec(rule(key), 0..4).prop_map(|rules| rules.join(", "));
    (rules("to"), rules("from"), prop_oneof![Just("[]".to_owned()), some_of(unix, 3)]).prop_map(
        |(egress, inbound, unix)| format!("{{egress: [{egress}], inbound: [{inbound}], unix: {unix}}}"),
    )
}

fn said_of_server() -> impl Strategy<Value = String> {
    let tools: &'static [&'static str] = &["read_file", "\"read_*\"", "\"*\"", "delete", "\"*_file\""];
    let tools = prop_oneof![
        Just(String::new()),
        some_of(tools, 3).prop_map(|list| format!(", tools: {{allow: {list}}}")),
        some_of(tools, 3).prop_map(|list| format!(", tools: {{deny: {list}}}")),
    ];
    (
        one_of(&["none", "unrestricted", "p", "q"]),
        one_of(&["audit", "enforce"]),
        one_of(&["default", "strict", "open"]),
        tools,
    )
        .prop_map(|(profile, mode, unix, tools)| {
            format!("profile: {profile}, mode: {mode}, unix: {unix}{tools}")
        })
}

fn server(name: &'static str) -> impl Strategy<Value = String> {
    let matches = prop_oneof![
        Just(format!("[{{package: {name}}}]")),
        Just(format!("[{{package: {name}}}, {{script: {name}.py}}]")),
        Just("[]".to_owned()),
    ];
    let launcher =
        prop_oneof![Just(""), Just(", launcher_profile: q"), Just(", launcher_profile: unrestricted")];
    (said_of_server(), launcher, matches).prop_map(move |(said, launcher, matches)| {
        format!("{{name: {name}, {said}{launcher}, match: {matches}}}")
    })
}

fn policy() -> impl Strategy<Value = String> {
    let resolvers = prop_oneof![
        3 => Just(""),
        2 => Just("resolvers: [10.0.0.53]\n"),
        1 => Just("resolvers: [10.0.0.53, 10.0.0.1]\n"),
        1 => Just("resolvers: [192.0.2.7]\n"),
    ];
    let launchers = prop_oneof![3 => Just(""), 1 => Just("launchers: [/opt/x/npx]\n")];
    let servers = (
        proptest::option::weighted(0.8, server("a")),
        proptest::option::weighted(0.6, server("b")),
        proptest::option::weighted(0.4, server("c")),
    )
        .prop_map(|(a, b, c)| [a, b, c].into_iter().flatten().collect::<Vec<_>>().join(", "));
    let unknown = proptest::option::of(said_of_server());
    (resolvers, launchers, profile(), profile(), servers, unknown).prop_map(
        |(resolvers, launchers, p, q, servers, unknown)| {
            let unknown = unknown.map_or(String::new(), |said| format!("unknown: {{{said}}}\n"));
            format!(
                "version: 1\n{resolvers}{launchers}profiles: {{p: {p}, q: {q}}}\nservers: [{servers}]\n{unknown}"
            )
        },
    )
}

fn flows() -> impl Iterator<Item = Flow> {
    [EGRESS, INBOUND].into_iter().flat_map(|direction| {
        PLACES.into_iter().flat_map(move |place| {
            let addr = Addr::from(place.parse::<IpAddr>().unwrap());
            let ports = [(53, 17), (53, 6), (443, 6), (444, 6), (443, 17), (8080, 6), (9000, 6)];
            ports.map(|(port, protocol)| Flow { direction, protocol, port, addr, any_port: false })
        })
    })
}

/// Everything that the combination allows, the two allow.
fn is_stricter(combined: &Compiled, of: &Compiled) -> Result<(), TestCaseError> {
    let (judge, judge_of) = (Judge::new(combined), Judge::new(of));
    for (id, server, s) in &combined.servers {
        if *id == SERVER_UNKNOWN && held(of, server, false).is_none_or(|(.., enforced)| !enforced) {
            // One that says nothing of `unknown` denies it nothing.
            continue;
        }
        for launcher in [false, true] {
            let (profile, mode, enforced) = held(combined, server, launcher).unwrap();
            let Some(theirs) = held(of, server, launcher) else { continue };
            prop_assert!(enforced || !theirs.2, "{server} is enforced by one");
            let names = |flow: Flow| {
                (0..=if flow.direction == EGRESS { NAMES.len() } else { 0 }).map(move |n| (flow, n))
            };
            for (flow, name) in flows().flat_map(names) {
                let (ours, their) = (judge.by(name, profile, &flow), judge_of.by(name, theirs.0, &flow));
                let what = || format!("{server} {flow:?} {name:?}: {ours:?}, alone {their:?}");
                prop_assert!(!ours.allows() || their.allows(), "{}", what());
                prop_assert!(!ours.allows() || ours.sni || !their.sni, "{}", what());
                let inspected = |d: Decision| d.reason == Reason::Resolver;
                prop_assert!(!ours.allows() || inspected(ours) || !inspected(their), "{}", what());
            }
            let own = |c: &Compiled, p: u16| {
                let profile = &c.profiles[usize::from(p)];
                profile.self_rule != 0 || profile.kind == PROFILE_UNRESTRICTED
            };
            prop_assert!(!own(combined, profile) || own(of, theirs.0));
            for path in SOCKETS {
                let ours = unix_allowed(combined, (profile, mode, enforced), path);
                prop_assert!(!ours || unix_allowed(of, theirs, path), "{server} {path}");
            }
        }
        if held(of, server, false).is_none() {
            continue;
        }
        let their_id = of.server(server).map_or(SERVER_UNKNOWN, |(id, _)| id);
        for tool in TOOLS {
            let allowed = |c: &Compiled, id| c.tool_verdict(id, tool) == ToolVerdict::Allowed;
            prop_assert!(!allowed(combined, *id) || allowed(of, their_id), "{server} {tool}");
        }
        prop_assert!(combined.on_violation(*id) >= of.on_violation(their_id));
        prop_assert_eq!(s.valid, 1);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn what_the_two_allow_together_each_allows_alone(bundle in policy(), local in policy()) {
        let (Ok(a), Ok(b)) = (alone(&bundle), alone(&local)) else { return Ok(()) };
        match together(&bundle, &local, false) {
            Ok(combined) => {
                is_stricter(&combined, &a)?;
                is_stricter(&combined, &b)?;
            }
            Err(errors) => prop_assert!(
                errors.iter().all(|e| e.severity == Severity::Error && e.message.contains("resolver")),
                "{errors:#?}"
            ),
        }
    }

    /// A host that says nothing of its own has the bundle as it is.
    #[test]
    fn a_silent_host_changes_nothing(bundle in policy()) {
        let Ok(a) = alone(&bundle) else { return Ok(()) };
        let parsed = parse_bytes(bundle.as_bytes()).unwrap();
        let combined = combine(parsed, &Policy::silent(), false, &dns()).unwrap();
        let combined = compile(&combined, &host(), &mut Ids::default()).unwrap();
        is_stricter(&combined, &a)?;
        is_stricter(&a, &combined)?;
    }
}

#[test]
fn some_of_what_both_allow_is_left() {
    let combined = both(
        "{version: 1, profiles: {p: {egress: [{to: [10.0.0.0/8, \"*.example.com\"], ports: [1-1023]}]}}, \
         servers: [{name: a, profile: p, mode: enforce, match: [{package: a}]}, {name: b, profile: p}]}",
        "{version: 1, profiles: {mine: {egress: [{to: [10.0.0.0/24, 192.0.2.1, a.example.com], ports: [443, 8080]}]}}, \
         servers: [{name: a, profile: mine, match: [{package: a}]}, {name: c, profile: unrestricted}]}",
    );
    let profile = held(&combined, "a", false).unwrap().0;
    let to = |place: &str, port| {
        let addr = Addr::from(place.parse::<IpAddr>().unwrap());
        Flow { direction: EGRESS, protocol: 6, port, addr, any_port: false }
    };
    let judge = Judge::new(&combined);
    let allowed = |profile, place: &str, port| judge.by(0, profile, &to(place, port)).allows();
    assert!(allowed(profile, "10.0.0.9", 443));
    for (place, port) in [("10.0.0.9", 80), ("10.0.0.9", 8080), ("10.1.0.9", 443), ("192.0.2.1", 443)] {
        assert!(!allowed(profile, place, port), "{place} {port}");
    }
    let [a, other] =
        ["a.example.com", "example.com"].map(|n| 1 + NAMES.iter().position(|k| *k == n).unwrap());
    let named = judge.by(a, profile, &to("198.51.100.1", 443));
    assert!(named.allows() && named.sni);
    assert!(!judge.by(other, profile, &to("198.51.100.1", 443)).allows());
    let rule = combined.rule(judge.by(0, profile, &to("10.0.0.9", 443)).rule).unwrap();
    assert_eq!(rule.path, "bundle: profiles.p.egress[0] and profiles.mine.egress[0]");
    let [b, c] = ["b", "c"].map(|name| combined.server(name).unwrap().1.profile);
    assert!(allowed(b, "10.1.0.9", 80), "as the bundle says");
    assert!(allowed(c, "192.0.2.200", 80), "as the host says");
}

#[test]
fn a_bundle_that_delegates_leaves_to_the_host_what_it_declares() {
    let bundle = "{version: 1, servers: [{name: a, profile: none, mode: enforce}, {name: b, profile: none}], \
                  unknown: {profile: none, mode: enforce}}";
    let local = "{version: 1, servers: [{name: a, profile: unrestricted}, {name: c, profile: unrestricted}]}";
    let delegated = together(bundle, local, true).unwrap();
    let kinds = |c: &Compiled| {
        ["a", "b", "c", UNKNOWN].map(|name| {
            let (_, s) = c.server(name).unwrap();
            (c.profiles[usize::from(s.profile)].kind == PROFILE_UNRESTRICTED, s.mode == MODE_ENFORCE)
        })
    };
    assert_eq!(kinds(&delegated), [(true, false), (false, false), (true, false), (false, true)]);
    let strict = together(bundle, local, false).unwrap();
    assert_eq!(kinds(&strict), [(false, true), (false, false), (false, true), (false, true)]);
}

#[test]
fn the_bundle_recognises_first_and_two_meanings_of_one_entry_are_refused() {
    let bundle = "{version: 1, servers: [{name: a, profile: none, match: [{package: x}]}, {name: b, profile: none, match: [{argv: y}]}]}";
    let local = "{version: 1, servers: [{name: a, profile: none, match: [{argv: z}]}]}";
    let combined = both(bundle, local);
    let order: Vec<&str> = combined.matchers.iter().map(|m| m.evidence.as_str()).collect();
    assert_eq!(order, ["package: x", "argv: y", "argv: z"]);
    let other = "{version: 1, servers: [{name: mine, profile: none, match: [{package: x}]}]}";
    let errors = together(bundle, other, false).unwrap_err();
    assert!(errors[0].message.contains("matches the same"), "{errors:#?}");
}

#[test]
fn files_are_what_both_pin() {
    let pinned = |hash: &str| {
        format!("{{version: 1, servers: [{{name: a, profile: none, match: [{{exe: /opt/a{hash}}}]}}]}}")
    };
    let sha = |digit: &str| format!(", sha256: {}", digit.repeat(64));
    let one = both(&pinned(&sha("1")), &pinned(""));
    assert_eq!(one.hashes[0].sha256, [[0x11; 32]]);
    assert!(one.matchers.iter().all(|m| m.hashed), "{:?}", one.matchers);
    assert_eq!(both(&pinned(&sha("1")), &pinned(&sha("1"))).hashes[0].sha256.len(), 1);
    let errors = together(&pinned(&sha("1")), &pinned(&sha("2")), false).unwrap_err();
    assert!(errors[0].message.contains("different contents"), "{errors:#?}");
}

#[test]
fn a_file_that_is_not_verified_stays_held_to_an_unknown_that_nobody_wrote() {
    let local = format!(
        "{{version: 1, servers: [{{name: a, profile: unrestricted, mode: enforce, match: [{{exe: /opt/a, sha256: {}}}]}}]}}",
        "1".repeat(64)
    );
    let bundle = "{version: 1, unknown: {profile: unrestricted}}";
    let kind = |compiled: &Compiled| {
        let (_, unknown) = compiled.server(UNKNOWN).unwrap();
        compiled.profiles[usize::from(unknown.profile)].kind
    };
    assert_eq!(kind(&both(bundle, &local)), sensor_common::policy::PROFILE_NONE);
    assert_eq!(kind(&both(bundle, "version: 1")), PROFILE_UNRESTRICTED);
}
