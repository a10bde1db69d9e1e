use super::*;
use crate::policy::load::{LoadError, load};
use proptest::prelude::*;
use std::path::Path;
use std::time::Instant;

/// (text, line, column, part of the message)
const BAD: [(&str, u32, u32, &str); 45] = [
    ("version: 2", 1, 10, "version 2 is not known"),
    ("version: 1\nversion: 1\n", 2, 1, "duplicate mapping key"),
    ("version: 1\nprofile: {}\n", 2, 1, "unknown field `profile`"),
    ("version: 1\nprofiles:\n  a:\n    egres: []\n", 4, 5, "unknown field `egres`"),
    ("version: 1\nprofiles: {a: {egress: [{to: [10.0.0.1], snj: x}]}}", 2, 42, "unknown field `snj`"),
    (
        "version: 1\nprofiles: {a: {egress: [{to: [x.example], sni: on}]}}",
        2,
        48,
        "`on` is no way to treat SNI",
    ),
    ("version: 1\nprofiles: {a: {egress: [{to: [10.0.0.1], sni: require}]}}", 2, 47, "names no host"),
    (
        "version: 1\nprofiles: {a: {egress: [{to: [x.example], protocol: [tcp, udp], sni: require}]}}",
        2,
        70,
        "cannot be checked on UDP",
    ),
    ("version: 1\nprofiles:\n  a: {}\n  a: {}\n", 4, 3, "duplicate mapping key"),
    ("version: 1\nprofiles: {none: {}}", 2, 12, "built-in profile"),
    ("version: 1\nprofiles: {\"a b\": {}}", 2, 12, "is not a name"),
    ("version: 1\nprofiles: {a: {egress: [{to: []}]}}", 2, 25, "names no destination"),
    ("version: 1\nprofiles: {a: {egress: [{to: [10.1.2.3/8]}]}}", 2, 31, "bits set behind its prefix"),
    ("version: 1\nprofiles: {a: {egress: [{to: [\"exa\\0mple.com\"]}]}}", 2, 31, "NUL or control"),
    ("version: 1\nprofiles: {a: {egress: [{to: [1.2.3.400]}]}}", 2, 31, "neither an address nor a host name"),
    ("version: 1\nprofiles: {a: {egress: [{to: [10.0.0.1], ports: []}]}}", 2, 49, "empty list of ports"),
    (
        "version: 1\nprofiles: {a: {egress: [{to: [10.0.0.1], ports: [443, 70000]}]}}",
        2,
        55,
        "`70000` is not a port",
    ),
    ("version: 1\nprofiles: {a: {egress: [{to: [10.0.0.1], ports: [0]}]}}", 2, 50, "`0` is not a port"),
    ("version: 1\nprofiles: {a: {egress: [{to: [10.0.0.1], ports: [9-8]}]}}", 2, 50, "empty range"),
    ("version: 1\nprofiles: {a: {egress: [{to: [10.0.0.1], ports: 443}]}}", 2, 49, "sequence"),
    (
        "version: 1\nprofiles: {a: {egress: [{to: [10.0.0.1], protocol: sctp}]}}",
        2,
        52,
        "`sctp` is no protocol",
    ),
    ("version: 1\nprofiles: {a: {egress: [{to: [self], ports: [1]}]}}", 2, 31, "every port and protocol"),
    ("version: 1\nprofiles: {a: {inbound: [{from: [x.example]}]}}", 2, 34, "is not an address"),
    ("version: 1\nprofiles: {a: {unix: [run/x]}}", 2, 23, "neither an absolute path"),
    ("version: 1\nprofiles: {a: {unix: [/*]}}", 2, 23, "every socket"),
    ("version: 1\nservers: [{name: a, profile: b}]", 2, 30, "no profile `b`"),
    ("version: 1\nservers: [{name: a, profile: none, mode: on}]", 2, 42, "`on` is no mode"),
    (
        "version: 1\nservers:\n- {name: a, profile: none}\n- {name: a, profile: none}",
        4,
        10,
        "a second server `a`",
    ),
    ("version: 1\nservers: [{name: unknown, profile: none}]", 2, 18, "built in"),
    ("version: 1\nservers: [{name: a, profile: none, may_launch: [b]}]", 2, 49, "no server `b`"),
    ("version: 1\nservers: [{name: a, profile: none, match: [{}]}]", 2, 44, "matches nothing"),
    (
        "version: 1\nservers: [{name: a, profile: none, match: [{unit: a.service, exe: /b}]}]",
        2,
        44,
        "cannot be added",
    ),
    ("version: 1\nresolvers: [localhost]", 2, 13, "not an IP address"),
    ("version: 1\nresolvers: []", 2, 12, "empty list of resolvers"),
    ("version: 1\nresolvers: [10.0.0.53, 10.0.0.53]", 2, 24, "twice"),
    ("version: 1\nresolvers: [224.0.0.251]", 2, 13, "a group of hosts"),
    ("version: 1\nresolvers: [\"::ffff:10.0.0.53\"]", 2, 13, "never matches"),
    ("version: 1\nresolvers: [10.0.0.53:53]", 2, 13, "not an IP address"),
    ("version: 1\nservers: [{name: a, profile: none, resolvers: [0.0.0.0]}]", 2, 48, "never matches"),
    (
        "version: 1\nresolvers: [1.0.0.1, 1.0.0.2, 1.0.0.3, 1.0.0.4, 1.0.0.5, 1.0.0.6, 1.0.0.7, 1.0.0.8, 1.0.0.9, \
         2.0.0.1, 2.0.0.2, 2.0.0.3, 2.0.0.4, 2.0.0.5, 2.0.0.6, 2.0.0.7, 2.0.0.8]",
        2,
        157,
        "17 resolvers; at most 16",
    ),
    ("version: 1\nsearch: [\"*.corp.example\"]", 2, 10, "without `*`"),
    ("version: 1\nsearch: [a..b]", 2, 10, "empty label"),
    ("version: 1\nsearch: [a.example, A.Example.]", 2, 21, "twice"),
    ("version: 1\nlaunchers: [\"/**/npx\"]", 2, 13, "whole trees"),
    ("version: 1\nlaunchers: [bin/npx]", 2, 13, "absolute path or glob"),
];

#[test]
fn every_complaint_has_its_place() {
    for (text, line, column, message) in BAD {
        let found = errors(text);
        let first = &found[0];
        assert!(first.message.contains(message), "{text}\n{first:?}");
        let place = first.position.map(|p| (p.line, p.column));
        assert_eq!(place, Some((line, column)), "{text}\n{first:?}");
    }
}

#[test]
fn all_that_is_wrong_is_said_at_once_and_none_of_it_taken() {
    let text =
        "version: 1\nprofiles: {a: {egress: [{to: [10.0.0.1/8, a..b]}]}}\nservers: [{name: x, profile: y}]\n";
    let messages: Vec<u32> = errors(text).iter().map(|e| e.position.unwrap().column).collect();
    assert_eq!(messages, [31, 43, 30]);
}

#[test]
fn forms_that_are_normalised_away_are_refused() {
    for net in ["::ffff:10.0.0.0/104", "64:ff9b::/96", "2002:a00::/24", "0.0.0.0", "::"] {
        let text = format!("version: 1\nprofiles: {{a: {{egress: [{{to: [\"{net}\"]}}]}}}}");
        let found = errors(&text);
        assert!(found[0].message.contains("never matches"), "{found:?}");
        assert!(found[0].help.as_ref().is_some_and(|h| h.starts_with("write `")), "{found:?}");
    }
}

#[test]
fn an_empty_file_is_no_policy() {
    for text in ["", "\n\n", "# nothing\n", "---\n", "~", "[]", "1"] {
        assert!(try_compiled(text).is_err(), "{text:?}");
    }
    assert_eq!(errors("")[0].help.as_deref(), Some("begin with `version: 1`"));
}

#[test]
fn more_than_one_document_is_refused() {
    assert!(try_compiled("version: 1\n---\nversion: 1\n").is_err());
}

#[test]
fn what_is_not_utf8_is_refused_with_its_place() {
    let found = parse_bytes(b"version: 1\nprofiles: {\xff: {}}\n").unwrap_err();
    assert_eq!(found[0].position.map(|p| (p.line, p.column)), Some((2, 12)));
}

#[test]
fn a_bomb_of_aliases_ends_early() {
    let mut text = String::from("version: 1\nresolvers:\n  - &a [x, x, x, x, x, x, x, x, x, x]\n");
    for level in b'b'..=b'z' {
        let (this, last) = (level as char, (level - 1) as char);
        text.push_str(&format!("  - &{this} [{}]\n", vec![format!("*{last}"); 10].join(", ")));
    }
    let start = Instant::now();
    assert!(try_compiled(&text).is_err());
    // Shaped so that every alias is of the type that is wanted.
    let many = vec!["*a"; 9_000].join(", ");
    let nets = vec!["10.0.0.1"; 1000].join(", ");
    let text = format!("version: 1\nprofiles:\n  a: {{egress: [&a {{to: [{nets}]}}, {many}]}}\n");
    let found = errors(&text);
    assert!(found[0].message.contains("total_replayed_events"), "{found:?}");
    assert!(start.elapsed().as_secs() < 20);
}

#[test]
fn deep_nesting_is_refused() {
    for (open, close) in [("[", "]"), ("{a: ", "}")] {
        let text = format!("version: 1\nprofiles: {}1{}", open.repeat(100_000), close.repeat(100_000));
        assert!(try_compiled(&text).is_err());
    }
    let block: String = (0..20_000).map(|i| format!("{}a:\n", " ".repeat(i % 2000))).collect();
    assert!(try_compiled(&block).is_err());
}

#[test]
fn a_file_that_is_too_long_is_not_parsed() {
    let found = parse_bytes(&vec![b' '; (64 << 20) + 1]).unwrap_err();
    assert!(found[0].message.contains("at most 67108864"), "{found:?}");
}

#[test]
fn a_file_that_vanished_or_is_none_is_an_error_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let gone = load(&dir.path().join("policy.yaml"), &mut Ids::default()).unwrap_err();
    assert!(matches!(gone, LoadError::Read { .. }), "{gone}");
    let none = load(dir.path(), &mut Ids::default()).unwrap_err();
    assert!(none.to_string().ends_with("not a regular file"), "{none}");
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(load(&fifo, &mut Ids::default()).unwrap_err().to_string().ends_with("not a regular file"));
    assert!(load(Path::new("/dev/zero"), &mut Ids::default()).is_err());
}

#[test]
fn ten_thousand_servers_are_too_many() {
    let mut text = String::from("version: 1\nservers:\n");
    for i in 0..10_000 {
        text.push_str(&format!("- {{name: s{i}, profile: none}}\n"));
    }
    let found = errors(&text);
    assert_eq!(found.len(), 1);
    assert!(found[0].message.contains("10000 servers are declared, at most 4093"), "{found:?}");
    assert!(found[0].position.is_some());
}

#[test]
fn findings_are_bounded() {
    let mut text = String::from("version: 1\nprofiles: {a: {egress: [{to: [");
    for _ in 0..50_000 {
        text.push_str("10.0.0.1/8, ");
    }
    text.push_str("10.0.0.1]}]}}\n");
    let found = errors(&text);
    assert!(found.len() <= 1002, "{}", found.len());
    assert!(found.iter().any(|f| f.message.contains("more findings are not listed")));
    let shown = crate::policy::diagnostic::render(&found, "p.yaml", &text, false);
    assert!(shown.ends_with(&format!("… and {} more\n", found.len() - 20)), "{shown}");
}

/// Prints its time; the budget is for release builds (`--release`).
#[test]
fn a_hundred_thousand_cidrs_and_ten_thousand_names_compile() {
    let mut text = String::from("version: 1\nprofiles:\n  big:\n    egress:\n");
    for block in 0..100u32 {
        text.push_str("      - to:\n");
        for n in (block..100_000).step_by(100) {
            // Chains of eight CIDRs around one address, each in another rule.
            let addr = 0x0a00_0000 | (n / 8) << 7;
            let bits = 25 + n % 8;
            text.push_str(&format!("          - {}/{bits}\n", std::net::Ipv4Addr::from(addr)));
        }
        for i in 0..100 {
            text.push_str(&format!("          - h{i}.b{block}.example.com\n"));
        }
        text.push_str(&format!("        ports: [{}]\n", 1000 + 2 * (block % 30)));
    }
    let start = Instant::now();
    let policy = parse_bytes(text.as_bytes()).unwrap();
    let parsed = start.elapsed();
    let c = compile(&policy, &Host::default(), &mut Ids::default()).unwrap();
    println!(
        "{} bytes: parsed in {parsed:?}, compiled in {:?}: {} CIDRs, {} port sets",
        text.len(),
        start.elapsed() - parsed,
        c.cidrs.len(),
        c.port_sets.len()
    );
    assert_eq!(policy.profiles[2].rules.iter().map(|r| r.nets.len()).sum::<usize>(), 100_000);
    assert_eq!(policy.profiles[2].rules.iter().map(|r| r.names.len()).sum::<usize>(), 10_000);
    assert_eq!(c.cidrs.len(), 100_000);
    assert!(c.port_sets.len() > 100, "{}", c.port_sets.len());
}

proptest! {
    #[test]
    fn any_bytes_give_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = parse_bytes(&bytes);
        let _ = crate::policy::toolhive::parse(&bytes);
    }

    /// A policy with one character changed: taken, or refused with findings
    /// that render.
    #[test]
    fn a_slip_of_the_pen_gives_an_answer(at in 0usize..800, with in any::<char>()) {
        let text: String = GOOD.chars().enumerate().map(|(i, c)| if i == at { with } else { c }).collect();
        if let Err(found) = try_compiled(&text) {
            prop_assert!(!found.is_empty());
            let shown = crate::policy::diagnostic::render(&found, "p.yaml", &text, false);
            prop_assert!(shown.contains("p.yaml"), "{}", shown);
        }
    }
}

const GOOD: &str = r#"version: 1
profiles:
  a:
    egress:
      - to: [10.0.0.0/8, "2001:db8::/32", bücher.example, "*.example.com"]
        ports: [443, 6000-6010]
        protocol: [tcp, udp]
    inbound: [{from: [127.0.0.1/32], ports: [3901]}]
    unix: [/run/x.sock, "@abstract*"]
servers:
  - name: a
    profile: a
    mode: audit
    match: [{package: "@a/b"}, {argv: [x, "y z"], exe: /usr/bin/q}]
    may_launch: [b]
    unix: strict
    tools: {allow: [read_*, list]}
    on_violation: quarantine
    capture: {content: redacted, max_bytes: 4096}
  - {name: b, profile: {network: {outbound: {}}}, match: [{container: 0123456789abcdef}]}
unknown: {profile: none, mode: audit, tools: {deny: ["*"]}}
resolvers: [9.9.9.9]
search: [corp.example]
launchers: ["/opt/*/bin/npx"]
"#;

#[test]
fn the_policy_that_slips_are_made_in_is_good() {
    assert!(try_compiled(GOOD).is_ok());
}
