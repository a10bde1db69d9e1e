//! What is taken of a file of outputs, and what is said of a wrong one.

use super::*;

fn lines(text: &str) -> Vec<String> {
    parse(text.as_bytes(), Path::new("/base")).unwrap_err().iter().map(|f| f.line("o.yaml")).collect()
}

#[track_caller]
fn refused(text: &str, place: &str, message: &str) {
    let lines = lines(text);
    let found =
        lines.iter().any(|l| l.starts_with(&format!("o.yaml:{place}: error: ")) && l.contains(message));
    assert!(found, "{place} {message}\n{lines:#?}");
}

#[test]
fn an_output_is_read_with_its_filter_and_paths_are_relative_to_the_file() {
    let text = "\
outputs:
  - name: siem-1
    format: ocsf
    filter: {types: [connection, finding], verdicts: [deny], sensors: [web-1], min_severity: high}
    ndjson: {path: lines, keep: 3}
  - name: other
    ndjson: {path: /var/lib/lines}
";
    let loaded = parse(text.as_bytes(), Path::new("/base")).unwrap();
    assert!(loaded.warnings.is_empty());
    let [first, second] = &loaded.outputs[..] else { panic!() };
    assert_eq!((first.name.as_str(), first.format, second.format), ("siem-1", Format::Ocsf, Format::Ndjson));
    let settings = |kind: &Kind| match kind {
        Kind::Ndjson(settings) => settings.clone(),
        other => panic!("{other:?}"),
    };
    let (lines, other) = (settings(&first.kind), settings(&second.kind));
    assert_eq!((lines.dir.as_path(), lines.rotation.keep), (Path::new("/base/lines"), 3));
    assert_eq!(other.dir, Path::new("/var/lib/lines"));
    let finding = |severity: pb::Severity| crate::event::Event {
        sensor: "web-1".to_owned(),
        body: Some(crate::event::Body::Finding(pb::Finding {
            severity: severity.into(),
            ..Default::default()
        })),
        ..Default::default()
    };
    assert!(!first.filter.passes(&finding(pb::Severity::High)), "it is no verdict");
    assert!(second.filter.passes(&finding(pb::Severity::Low)));
}

#[test]
fn what_is_wrong_is_said_with_its_place_and_what_would_be_right() {
    refused("outputs:\n  - {name: a, nonsense: 1}\n", "2:15", "nonsense");
    refused("outputs:\n  - name: a\n    name: b\n", "3:5", "name");
    refused(
        "outputs:\n  - {name: A_b, ndjson: {path: x}}\n",
        "2:12",
        "`A_b` is no name of an output (a to z",
    );
    refused("outputs:\n  - {name: ndjson, ndjson: {path: x}}\n", "2:12", "built in");
    refused("outputs:\n  - {name: a}\n", "2:5", "one of nats, ndjson, otlp, syslog, webhook");
    refused(
        "outputs:\n  - {name: a, format: cef, ndjson: {path: x}}\n",
        "2:23",
        "outputs[0].format: `cef` is not known (one of native, ocsf, ecs)",
    );
    refused(
        "outputs:\n  - name: a\n    filter: {types: [verdict]}\n    ndjson: {path: x}\n",
        "3:22",
        "outputs[0].filter.types: `verdict` is not known (one of connection",
    );
    refused(
        "outputs:\n  - {name: a, ndjson: {path: x}}\n  - {name: a, ndjson: {path: y}}\n",
        "3:12",
        "a second output `a`",
    );
    refused(
        "outputs:\n  - {name: a, ndjson: {path: x}}\n  - {name: b, ndjson: {path: x}}\n",
        "3:5",
        "another output writes there",
    );
    refused("outputs:\n  - {name: a, ndjson: {path: x, max_bytes: 5}}\n", "2:44", "5 is not from");
    assert_eq!(lines("# nothing\n"), ["o.yaml: error: the file is empty (begin with `outputs:`)"]);
    assert!(lines("outputs: [\n")[0].starts_with("o.yaml:"));
}

#[test]
fn what_is_wrong_with_a_receiver_is_said_with_its_place() {
    let syslog = |rest: &str| format!("outputs:\n  - name: a\n    syslog: {rest}\n");
    refused(&syslog("{address: 'siem:514'}"), "3:23", "write tls://HOST");
    refused(&syslog("{address: 'tcp://a', facility: local8}"), "3:44", "`local8` is not known (one of kern");
    refused(&syslog("{address: 'tcp://a', ca: ca.pem}"), "3:38", "certificates are for tls:// only");
    refused(&syslog("{address: 'tls://a', ca: none.pem}"), "3:38", "/base/none.pem: No such file");
    refused(&syslog("{address: 'tls://a', cert: c.pem}"), "3:40", "`cert` and `key` come together");
    refused(&syslog("{address: 'udp://a', framing: newline}"), "3:43", "a datagram is one message");
    refused(&syslog("{address: 'udp://a', max_bytes: 70000}"), "3:45", "70000 is not from 480 to 65507");
    refused(&syslog("{address: 'tcp://a', resend: 5}"), "3:42", "write a time from 1s to 60s like");
    let webhook = |rest: &str| format!("outputs:\n  - name: a\n    webhook: {rest}\n");
    refused(&webhook("{url: 'https://u:hunter2@a/'}"), "3:20", "a password does not stand in this file");
    refused(&webhook("{url: 'http://a', headers: {host: b}}"), "3:48", "set by the collector");
    refused(&webhook("{url: 'http://a', body: xml}"), "3:38", "one of ndjson, array");
    let text = webhook("{url: 'http://a', headers: {Authorization: 'Bearer hunter2'}}");
    refused(&text, "3:57", "outputs[0].webhook.headers.Authorization: a secret does not stand in this file");
    for text in [text, webhook("{url: 'https://u:hunter2@a/'}")] {
        assert!(!lines(&text).concat().contains("hunter2"));
    }
    let text = webhook("{url: 'http://a.example/'}");
    let loaded = parse(text.as_bytes(), Path::new("/")).unwrap();
    assert!(loaded.warnings[0].message.contains("unencrypted"));
    assert!(!format!("{:?}", loaded.outputs).contains("Bearer"));
}

#[test]
fn several_mistakes_are_told_at_once() {
    let text = "outputs:\n  - {name: '', format: x, ndjson: {path: x}}\n  - {name: b}\n";
    assert_eq!(lines(text).len(), 3);
}

#[test]
fn times_have_units() {
    assert_eq!(duration("500ms"), Some(Duration::from_millis(500)));
    assert_eq!(duration("2m"), Some(Duration::from_secs(120)));
    for bad in ["", "5", "s", "5 s", "-1s", "99999999999999999999s", "400000000000000000m", "5d"] {
        assert_eq!(duration(bad), None, "{bad}");
    }
}

proptest::proptest! {
    /// Whatever the file holds.
    #[test]
    fn any_bytes_end_in_outputs_or_in_findings(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400)) {
        let _ = parse(&bytes, Path::new("/"));
        let mut yaml = b"outputs:\n  - name: ".to_vec();
        yaml.extend(bytes);
        let _ = parse(&yaml, Path::new("/"));
    }
}

fn bus(kind: &str) -> String {
    format!("outputs:\n  - name: a\n    {kind}\n")
}

#[test]
fn what_is_said_of_nats_is_checked_with_its_place() {
    let nats = |rest: &str| bus(&format!("nats: {{servers: [\"nats://127.0.0.1\"]{rest}}}"));
    let loaded = parse(nats(", subject: x.y, by_sensor: true").as_bytes(), Path::new("/base")).unwrap();
    let Kind::Nats(settings) = &loaded.outputs[0].kind else { panic!() };
    assert_eq!((settings.subject.as_str(), settings.tls, settings.servers[0].port()), ("x.y", false, 4222));
    refused(&bus("nats: {servers: []}"), "3:21", "give 1 to 16 servers");
    refused(&bus("nats: {servers: [\"http://a\"]}"), "3:22", "no address of a server (write `tls://");
    refused(&bus("nats: {servers: [\"nats://u:p@a\"]}"), "3:22", "a secret does not stand in this file");
    refused(&nats(", subject: \"a.*\""), "3:52", "without spaces, * and >");
    refused(&nats(", stream: \"a b\""), "3:51", "a stream's name");
    refused(&nats(", create: {}"), "3:51", "needs a name (give `stream` as well)");
    refused(&nats(", stream: A, create: {replicas: 9}"), "3:73", "9 is not from 1 to 5");
    refused(&nats(", stream: A, create: {max_age: 1m}"), "3:72", "shorter than `duplicate_window`");
    refused(&nats(", token: abc"), "3:50", "a secret does not stand in this file (write `file:PATH`");
    refused(&nats(", user: abc"), "3:49", "`user` and `password` come together");
    refused(&nats(", ca: nowhere.pem"), "3:47", "nowhere.pem");
    refused(&nats(", tokn: x"), "3:43", "tokn");
}

#[test]
fn what_is_said_of_otlp_is_checked_with_its_place() {
    let otlp = |rest: &str| bus(&format!("otlp: {{endpoint: \"http://127.0.0.1:4317\"{rest}}}"));
    let loaded = parse(otlp(", metrics: 10s").as_bytes(), Path::new("/base")).unwrap();
    let Kind::Otlp(settings) = &loaded.outputs[0].kind else { panic!() };
    assert_eq!(
        (settings.authority.as_str(), settings.metrics),
        ("127.0.0.1:4317", Some(Duration::from_secs(10)))
    );
    refused(&bus("otlp: {endpoint: \"127.0.0.1:4317\"}"), "3:22", "is no endpoint of OTLP over gRPC");
    refused(&bus("otlp: {endpoint: \"http://a/v1/logs\"}"), "3:22", "is no endpoint of OTLP over gRPC");
    refused(&otlp(", ca: x.pem"), "3:51", "certificates are for https://");
    refused(&otlp(", compression: zstd"), "3:60", "`zstd` is not known (one of gzip, none)");
    refused(&otlp(", timeout: 2h"), "3:56", "`2h` is no such time");
    refused(&otlp(", headers: {Host: \"env:PATH\"}"), "3:63", "`Host` is no header that may be set");
    refused(&otlp(", headers: {a: b}"), "3:60", "a secret does not stand in this file");
    let both = "outputs:\n  - name: a\n    format: ecs\n    otlp: {endpoint: \"http://a\"}\n";
    refused(both, "3:13", "OTLP has a form of its own");
}
