//! What is written about the format holds: examples, schema, explanations,
//! ToolHive's files, and what stays over a reload.

use super::*;
use crate::policy::command::{Format, Status, check, explain, schema};
use crate::policy::diagnostic::Severity;
use crate::policy::explain::{Query, Target, Verdict, allow_line, line_for, unix_line};
use crate::policy::load::load;
use crate::policy::model::Direction;
use crate::policy::toolhive;
use sensor_common::policy::{
    PROFILE_NONE, PROFILE_UNRESTRICTED, Reason, SERVER_LAUNCHES, UNIX_OPEN, UNIX_STRICT,
};
use sensor_common::unix::{PATH_BYTES, POWER};
use sensor_common::{TCP, UDP};
use std::path::{Path, PathBuf};

fn examples() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/profiles");
    let paths = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let yaml: Vec<PathBuf> = paths.filter(|p| p.extension().is_some_and(|e| e == "yaml")).collect();
    assert!(yaml.len() >= 5);
    yaml
}

#[test]
fn every_example_passes_the_check_and_the_schema() {
    let schema: serde_json::Value = serde_json::from_str(&schema().text).unwrap();
    let validator = jsonschema::draft202012::new(&schema).unwrap();
    for path in examples() {
        let text = std::fs::read_to_string(&path).unwrap();
        let output = check(&path, Format::Text { color: false });
        assert_eq!(output.status, Status::Ok, "{}", output.text);
        let value: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
        assert!(validator.is_valid(&value), "{}: {:?}", path.display(), validator.iter_errors(&value).next());
    }
}

#[test]
fn the_schema_refuses_what_the_parser_refuses() {
    let schema: serde_json::Value = serde_json::from_str(&schema().text).unwrap();
    let validator = jsonschema::draft202012::new(&schema).unwrap();
    for text in [
        "profiles: {}",
        "version: 2",
        "version: 1\nprofile: {}",
        "version: 1\nprofiles: {a: {egres: []}}",
        "version: 1\nprofiles: {a: {egress: [{to: [x.example], sni: on}]}}",
        "version: 1\nresolvers: []",
        "version: 1\nsearch: corp.example",
        "version: 1\nprofiles: {a: {egress: [{to: []}]}}",
        "version: 1\nprofiles: {a: {egress: [{to: [10.0.0.1], ports: []}]}}",
        "version: 1\nprofiles: {a: {egress: [{to: [10.0.0.1], ports: [70000]}]}}",
        "version: 1\nprofiles: {a: {egress: [{to: [10.0.0.1], protocol: icmp}]}}",
        "version: 1\nprofiles: {a: {egress: [], network: {outbound: {}}}}",
        "version: 1\nprofiles: {a: {name: x}}",
        "version: 1\nservers: [{profile: none}]",
        "version: 1\nservers: [{name: a}]",
        "version: 1\nservers: [{name: a, profile: none, mode: on}]",
        "version: 1\nservers: [{name: a, profile: none, matches: []}]",
        "version: 1\nservers: [{name: a, profile: none, match: [{sha256: x}]}]",
        "version: 1\nservers: [{name: a, profile: none, match: [{exe: /a, sha256: x}]}]",
        "version: 1\nservers: [{name: a, profile: none, match: [{sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855}]}]",
        "version: 1\nservers: [{name: a, profile: none, match: [{exe: /a, argv: x, sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855}]}]",
        "version: 1\nservers: [{name: a, profile: none, unix: all}]",
        "version: 1\nunknown: {profil: none}",
    ] {
        let value: serde_json::Value = serde_saphyr::from_str(text).unwrap();
        assert!(!validator.is_valid(&value), "the schema takes {text}");
        assert!(try_compiled(text).is_err(), "the parser takes {text}");
    }
}

#[test]
fn a_server_keeps_its_id_over_reloads_and_no_id_changes_hands() {
    let policy = |names: &[&str]| {
        let servers: Vec<String> = names.iter().map(|n| format!("{{name: {n}, profile: none}}")).collect();
        parse_bytes(format!("version: 1\nservers: [{}]", servers.join(", ")).as_bytes()).unwrap()
    };
    let mut ids = Ids::default();
    let mut load = |names: &[&str]| {
        let c = compile(&policy(names), &Host::default(), &mut ids).unwrap();
        c.servers.iter().map(|(id, name, _)| (*id, name.clone())).collect::<Vec<_>>()
    };
    let named =
        |pairs: &[(u16, &str)]| pairs.iter().map(|(id, n)| (*id, (*n).to_owned())).collect::<Vec<_>>();
    assert_eq!(load(&["a", "b"]), named(&[(1, "unknown"), (2, "a"), (3, "b")]));
    assert_eq!(load(&["b"]), named(&[(1, "unknown"), (3, "b")]));
    assert_eq!(load(&["c", "a"]), named(&[(1, "unknown"), (4, "c"), (2, "a")]));
    // A policy that does not compile takes no ids.
    let bad = "version: 1\nservers: [{name: d, profile: none, match: [{script: x}]}, {name: e, profile: none, match: [{script: x}]}]";
    assert!(compile(&parse_bytes(bad.as_bytes()).unwrap(), &Host::default(), &mut ids).is_err());
    assert_eq!((ids.get("d"), ids.get("c"), ids.get("unknown")), (None, Some(4), Some(1)));
    assert!(!ids.restore("z", 4) && ids.restore("z", 9) && ids.restore("z", 9) && !ids.restore("y", 1));
    let c = compile(&policy(&["n"]), &Host::default(), &mut ids).unwrap();
    assert_eq!(c.servers[1].0, 10);
}

#[test]
fn servers_profiles_and_launches_are_as_declared() {
    let c = compiled(
        "version: 1\nprofiles: {p: {egress: [{to: [self]}]}}\nservers:\n\
         - {name: gateway, profile: p, launcher_profile: unrestricted, mode: enforce, may_launch: [leaf], unix: open}\n\
         - {name: leaf, profile: none, unix: strict}\nunknown: {profile: p, mode: enforce}\n",
    );
    let of = |name| *c.server(name).unwrap().1;
    let (gateway, leaf, unknown) = (of("gateway"), of("leaf"), of("unknown"));
    assert_eq!(
        (gateway.valid, gateway.mode, gateway.unix, gateway.flags),
        (1, 1, UNIX_OPEN, SERVER_LAUNCHES)
    );
    assert_eq!((leaf.valid, leaf.mode, leaf.unix, leaf.flags), (1, 0, UNIX_STRICT, 0));
    assert_eq!((unknown.mode, unknown.profile, unknown.launcher_profile), (1, 2, 2));
    assert_eq!(c.profiles[gateway.launcher_profile as usize].kind, PROFILE_UNRESTRICTED);
    assert_eq!(c.profiles[leaf.launcher_profile as usize].kind, PROFILE_NONE);
    assert_eq!(c.launches, [(2, 3)]);
    let own = c.profiles[gateway.profile as usize];
    assert_eq!((own.flags, own.self_rule), (1, 1));
    assert_eq!(c.rule(1).unwrap().path, "profiles.p.egress[0]");
    assert_eq!(c.rule(0), None);
}

#[test]
fn unix_names_become_keys() {
    let c = compiled("version: 1\nprofiles: {p: {unix: [/run/x.sock, \"/run/y/*\", \"@abs\", \"@pre*\"]}}\n");
    let keys: Vec<&[u8]> = c.unix.iter().filter(|u| u.profile == 2).map(|u| u.text.as_slice()).collect();
    assert_eq!(keys, [&b"/run/x.sock\0"[..], b"/run/y/", b"\0abs\0", b"\0pre"]);
    let power: Vec<&[u8]> = c.unix.iter().filter(|u| u.profile == POWER).map(|u| u.text.as_slice()).collect();
    assert!(power.contains(&&b"/run/docker.sock\0"[..]) && power.contains(&&b"/run/user/"[..]));
    assert!(power.contains(&&b"\0/containerd-shim/"[..]));
    assert!(c.unix.iter().all(|u| u.text.len() <= PATH_BYTES));
    assert_eq!(c.rule(c.unix[0].rule.rule).unwrap().text, "unix: /run/x.sock");
}

const EXPLAINED: &str = r#"version: 1
profiles:
  p:
    egress:
      - to: [10.0.0.0/8]
        ports: [443]
      - to: [self]
      - to: ["*.example.com"]
        ports: [443]
      - to: [10.0.0.53]
        ports: [53]
        protocol: udp
    inbound: [{from: [127.0.0.1], ports: [3901]}]
servers:
  - {name: a, profile: p, launcher_profile: none}
  - {name: b, profile: none, mode: enforce}
  - name: c
    profile: p
    match: [{exe: /opt/c, sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855}]
"#;

fn explained(server: &str, direction: Direction, target: &str) -> crate::policy::explain::Explanation {
    let policy = parse_bytes(EXPLAINED.as_bytes()).unwrap();
    let c = compile(&policy, &Host::default(), &mut Ids::default()).unwrap();
    let query =
        Query { server: server.to_owned(), launcher: false, direction, target: target.parse().unwrap() };
    crate::policy::explain::explain(&policy, &c, &query).unwrap()
}

#[test]
fn explain_names_the_rule_or_the_line_that_would_allow_it() {
    let e = explained("a", Direction::Egress, "10.1.2.3:443");
    assert_eq!((e.verdict, e.reason), (Verdict::Allow, "rule"));
    let rule = e.rule.unwrap();
    assert_eq!((rule.path.as_str(), rule.line), ("profiles.p.egress[0]", 5));
    assert_eq!(rule.text, "{to: [\"10.0.0.0/8\"], ports: [443]}");

    let e = explained("a", Direction::Egress, "[2001:db8::1]:80");
    assert_eq!((e.verdict, e.reason), (Verdict::WouldDeny, "no_rule"));
    let line = "profiles.p.egress: add `- {to: [\"2001:db8::1\"], ports: [80]}`";
    assert_eq!(e.suggestion.as_deref(), Some(line));

    let e = explained("b", Direction::Egress, "9.9.9.9:53/udp");
    assert_eq!((e.verdict, e.reason, e.mode), (Verdict::Deny, "profile_none", "enforce"));
    let line =
        "give the server a profile of its own with `egress: [{to: [9.9.9.9], ports: [53], protocol: udp}]`";
    assert_eq!(e.suggestion.as_deref(), Some(line));

    let e = explained("a", Direction::Inbound, "127.0.0.1:3901");
    assert_eq!((e.verdict, e.rule.unwrap().path.as_str()), (Verdict::Allow, "profiles.p.inbound[0]"));
    let e = explained("unknown", Direction::Inbound, "127.0.0.1:3901");
    assert_eq!((e.verdict, e.profile.as_str()), (Verdict::WouldDeny, "none"));
}

#[test]
fn explain_says_what_holds_while_a_file_is_not_verified() {
    let e = explained("c", Direction::Egress, "10.1.2.3:443");
    assert_eq!(e.verdict, Verdict::Allow);
    assert_eq!(e.notes.len(), 1);
    assert!(
        e.notes[0].contains("profile none, audit") && e.notes[0].ends_with("it does not"),
        "{:?}",
        e.notes
    );
    assert!(explained("a", Direction::Egress, "10.1.2.3:443").notes.is_empty());
}

#[test]
fn explain_says_what_is_not_decided_by_the_address() {
    let e = explained("a", Direction::Egress, "127.0.0.1:9222");
    assert_eq!(e.rule.unwrap().path, "profiles.p.egress[1]");
    assert!(e.notes[0].contains("same instance"), "{:?}", e.notes);
    let e = explained("a", Direction::Egress, "[64:ff9b::a00:1]:443");
    assert_eq!((e.verdict, e.host.as_str()), (Verdict::Allow, "10.0.0.1"));
    let e = explained("a", Direction::Egress, "API.example.com:443");
    assert_eq!(
        (e.verdict, e.reason, e.sni, e.host.as_str()),
        (Verdict::Allow, "rule", true, "api.example.com")
    );
    assert_eq!(e.rule.unwrap().path, "profiles.p.egress[2]");
    let e = explained("a", Direction::Egress, "example.com:443");
    assert_eq!((e.verdict, e.reason, e.rule), (Verdict::WouldDeny, "name_no_rule", None));
    assert_eq!(e.suggestion.as_deref(), Some("profiles.p.egress: add `- {to: [example.com], ports: [443]}`"));
    assert!(e.notes[0].contains("addresses hold"), "{:?}", e.notes);
    let e = explained("a", Direction::Egress, "api.example.com:80");
    assert_eq!((e.reason, e.rule), ("no_rule", None));
    let e = explained("a", Direction::Egress, "192.0.2.1:443");
    assert!(e.notes[0].contains("by one of the profile's host names"), "{:?}", e.notes);
    let e = explained("a", Direction::Inbound, "api.example.com:3901");
    assert_eq!((e.reason, e.suggestion), ("no_inbound_rule", None));
    let e = explained("b", Direction::Egress, "api.example.com:443/udp");
    assert_eq!((e.verdict, e.reason), (Verdict::Deny, "profile_none"));
    assert!(e.suggestion.unwrap().contains("{to: [api.example.com], ports: [443], protocol: udp}"));
    let e = explained("a", Direction::Egress, "10.0.0.53:5353/udp");
    assert!(e.notes[1].contains("connect()"), "{:?}", e.notes);
}

#[test]
fn a_target_that_cannot_be_read_is_refused() {
    for text in [
        "",
        "10.0.0.1",
        "10.0.0.1:",
        "10.0.0.1:0",
        "10.0.0.1:70000",
        "::1:80",
        "[::1]",
        "[x]:1",
        "a b:1",
        "*.example.com:1",
        "10.0.0.1:80/icmp",
        "10.0.0.1:+80",
        "[10.0.0.1]:80",
        "\0:1",
    ] {
        assert!(text.parse::<Target>().is_err(), "{text:?}");
    }
}

#[test]
fn the_suggested_line_allows_exactly_what_was_asked() {
    for (direction, ip, port, protocol) in [
        (Direction::Egress, "10.0.0.1", 443, TCP),
        (Direction::Egress, "2001:db8::1", 53, UDP),
        (Direction::Egress, "::ffff:10.0.0.1", 1, TCP),
        (Direction::Egress, "224.0.0.251", 5353, UDP),
        (Direction::Inbound, "::1", 3901, TCP),
    ] {
        let line = allow_line(direction, ip.parse().unwrap(), port, protocol);
        let key = if direction == Direction::Egress { "egress" } else { "inbound" };
        let c = compiled(&format!("version: 1\nprofiles: {{p: {{{key}: [{line}]}}}}"));
        let ask = |port, protocol| flow(&c, "p", direction.code(), ip, port, protocol).reason;
        assert_eq!(ask(port, protocol), Reason::Rule, "{line}");
        assert_ne!(ask(port + 1, protocol), Reason::Rule, "{line}");
        assert_ne!(ask(port, if protocol == TCP { UDP } else { TCP }), Reason::Rule, "{line}");
    }
}

#[test]
fn a_line_is_suggested_where_a_line_helps() {
    let ip = "10.0.0.1".parse().unwrap();
    let line = |reason, protocol| line_for(reason, Direction::Egress, ip, 443, protocol);
    assert_eq!(line(Reason::NoRule, TCP).as_deref(), Some("{to: [10.0.0.1], ports: [443]}"));
    assert_eq!(line(Reason::ProfileNone, 132), None);
    for reason in [Reason::SocketType, Reason::Fragment, Reason::GroupJoin, Reason::Rule, Reason::NoPolicy] {
        assert_eq!(line(reason, TCP), None, "{reason:?}");
    }
    let c = compiled(&format!("version: 1\nprofiles: {{p: {{{}}}}}", unix_line("/run/x.sock").unwrap()));
    assert_eq!(c.unix[0].text, b"/run/x.sock\0");
    assert_eq!(unix_line("x.sock"), None);
}

#[test]
fn the_commands_end_as_they_should() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.yaml");
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    std::fs::write(&path, EXPLAINED).unwrap();
    let query = |server: &str, target: &str| Query {
        server: server.to_owned(),
        launcher: false,
        direction: Direction::Egress,
        target: target.parse().unwrap(),
    };
    let ask = |server, target| explain(&path, &query(server, target), Format::Json);
    assert_eq!(ask("a", "10.0.0.1:443").status, Status::Ok);
    assert_eq!(ask("a", "11.0.0.1:443").status, Status::Denied);
    assert_eq!(json(&ask("a", "11.0.0.1:443").text)["verdict"], "would_deny");
    assert_eq!(ask("zz", "10.0.0.1:443").status, Status::NoServer);
    assert_eq!(json(&check(&path, Format::Json).text)["valid"], true);
    std::fs::write(&path, "version: 1\nprofiles: {p: 5}\n").unwrap();
    let bad = check(&path, Format::Json);
    assert_eq!(bad.status, Status::Invalid);
    assert_eq!(json(&bad.text)["findings"][0]["line"], 2);
    assert_eq!(ask("a", "10.0.0.1:443").status, Status::Invalid);
    assert_eq!(check(&dir.path().join("gone"), Format::Json).status, Status::NotFound);
}

#[test]
fn an_exe_that_is_a_link_is_warned_about_with_its_real_path() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    std::fs::write(root.join("real"), "").unwrap();
    std::os::unix::fs::symlink("real", root.join("link")).unwrap();
    let path = root.join("p.yaml");
    let warnings = |exe: &str| {
        let text = format!("version: 1\nservers: [{{name: a, profile: none, match: [{{exe: {exe}}}]}}]\n");
        std::fs::write(&path, text).unwrap();
        load(&path, &mut Ids::default()).unwrap().warnings
    };
    let real = root.join("real").display().to_string();
    assert_eq!(warnings(&real), []);
    let found = warnings(&root.join("link").display().to_string());
    assert_eq!(found[0].help.as_deref(), Some(format!("write `{real}`").as_str()));
}

fn toolhive(text: &str) -> (String, Vec<String>) {
    let policy = format!("version: 1\nprofiles: {{p: {text}}}\n");
    let policy = parse_bytes(policy.as_bytes()).unwrap_or_else(|e| panic!("{e:#?}"));
    let profile = &policy.profiles[2];
    let rules: Vec<String> = profile.rules.iter().map(|r| r.text()).collect();
    let warnings = policy.warnings.iter().map(|w| w.message.clone()).collect();
    (format!("{:?} {}", profile.kind, rules.join(" ")), warnings)
}

#[test]
fn toolhive_profiles_mean_what_their_strict_backend_makes_of_them() {
    for (text, meaning, warned) in [
        (r#"{"network": {"outbound": {}}}"#, "Rules ", 0),
        (r#"{"network": {}}"#, "Rules ", 1),
        (r#"{"network": {"mode": "none", "outbound": {"allow_port": [443]}}}"#, "None ", 1),
        (r#"{"network": {"outbound": {"insecure_allow_all": true}}}"#, "Unrestricted ", 1),
        (r#"{"network": {"outbound": {"insecureAllowAll": true, "allowPort": [443]}}}"#, "Unrestricted ", 1),
        (
            r#"{"network": {"outbound": {"allow_host": ["a.example", ".b.example", "*.c.example", "10.0.0.1"], "allow_port": [443, 8443]}}}"#,
            "Rules {to: [\"a.example\", \"b.example\", \"*.b.example\", \"*.c.example\", \"10.0.0.1/32\"], ports: [443, 8443]}",
            0,
        ),
        (r#"{"network": {"outbound": {"allow_host": ["a.example"]}}}"#, "Rules {to: [\"a.example\"]}", 1),
        (
            r#"{"network": {"outbound": {"allow_port": [53]}}}"#,
            "Rules {to: [\"0.0.0.0/0\", \"::/0\"], ports: [53]}",
            1,
        ),
        (
            r#"{"network": {"outbound": {"allow_transport": ["tcp"]}, "inbound": {"allow_host": ["localhost", "x.example"]}}}"#,
            "Rules {from: [\"127.0.0.0/8\", \"::1/128\"]}",
            2,
        ),
        (
            r#"{"name": "x", "read": ["/a"], "write": [], "privileged": true, "network": {"outbound": {}}}"#,
            "Rules ",
            3,
        ),
    ] {
        let (got, warnings) = toolhive(text);
        assert_eq!((got.as_str(), warnings.len()), (meaning, warned), "{text} {warnings:?}");
    }
}

#[test]
fn toolhive_traps_are_refused() {
    for (text, message) in [
        (r#"{"name": "x"}"#, "without `network`"),
        (r#"{"name": "x", "read": [], "write": []}"#, "without `network`"),
        (r#"{"network": {"outbound": {"allow_hosts": ["x"]}}}"#, "unknown field `allow_hosts`"),
        (r#"{"network": {"outbound": {"allow_port": [0]}}}"#, "`0` is not a port"),
        (r#"{"network": {"outbound": {"allow_host": ["a..b"]}}}"#, "empty label"),
        (r#"{"network": {"outbound": {}}, "egress": []}"#, "do not mix"),
        (r#"{"network": {"outbound": {}}, "toolhive": "./x.json"}"#, "twice"),
        (r#"{"toolhive": "./x.json"}"#, "read from a file"),
    ] {
        let found = errors(&format!("version: 1\nprofiles: {{p: {text}}}\n"));
        assert!(found[0].message.contains(message), "{text} {found:?}");
        assert_eq!(found[0].position.map(|p| p.line), Some(2), "{text} {found:?}");
    }
    assert!(toolhive::parse(br#"{"name": "x"}"#).unwrap_err()[0].message.contains("without `network`"));
}

#[test]
fn a_toolhive_file_is_read_from_beside_the_policy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.yaml");
    std::fs::write(
        &path,
        "version: 1\nservers: [{name: a, profile: ./t.json}, {name: b, profile: ./t.json}]\n",
    )
    .unwrap();
    let gone = load(&path, &mut Ids::default()).unwrap_err().to_string();
    assert!(gone.contains("p.yaml:2:30") && gone.contains("t.json: No such file"), "{gone}");
    let json = r#"{"network": {"outbound": {"allow_host": ["10.0.0.1"], "allow_port": [443], "allow_transport": []}}}"#;
    std::fs::write(dir.path().join("t.json"), json).unwrap();
    let loaded = load(&path, &mut Ids::default()).unwrap();
    assert_eq!(loaded.compiled.profiles.len(), 3, "the same file is the same profile");
    assert!(egress(&loaded.compiled, "./t.json", "10.0.0.1", 443, TCP).allows());
    let warning = &loaded.warnings[0];
    assert_eq!((warning.severity, warning.file.as_deref()), (Severity::Warning, Some("./t.json")));
    std::fs::write(dir.path().join("t.json"), "{\"network\":\n {\"out\": {}}}").unwrap();
    let bad = load(&path, &mut Ids::default()).unwrap_err().to_string();
    assert!(bad.starts_with("./t.json:2:3: error: unknown field `out`"), "{bad}");
}
