//! What the policy says of messages: tools, what a forbidden call brings, content.

use super::*;
use crate::policy::command::{Format, Status, explain, schema};
use crate::policy::tools::{CAPTURE_BYTES, Capture, OnViolation, ToolVerdict};

const POLICY: &str = "version: 1
servers:
  - name: github
    profile: none
    mode: enforce
    tools: {deny: [delete_repository, \"push_*\"]}
    on_violation: kill
  - name: files
    profile: none
    tools:
      allow: [read_*, list]
    capture: {content: redacted, max_bytes: 4096}
  - {name: plain, profile: none, capture: {content: redacted}}
  - {name: mute, profile: none, tools: {allow: []}, capture: {max_bytes: 10}}
unknown:
  tools: {deny: [\"*\"]}
  on_violation: quarantine
  capture: {content: none}
";

fn verdict(compiled: &Compiled, server: &str, tool: &str) -> Option<(String, u32)> {
    let id = compiled.server(server).unwrap().0;
    match compiled.tool_verdict(id, tool) {
        ToolVerdict::Allowed => None,
        ToolVerdict::Forbidden { rule, line } => Some((rule.to_owned(), line)),
    }
}

#[test]
fn a_tool_is_forbidden_by_the_entry_or_by_the_list_that_lacks_it() {
    let c = compiled(POLICY);
    let forbidden = |rule: &str, line| Some((rule.to_owned(), line));
    assert_eq!(verdict(&c, "github", "delete_repository"), forbidden("servers[0].tools.deny[0]", 6));
    assert_eq!(verdict(&c, "github", "push_files"), forbidden("servers[0].tools.deny[1]", 6));
    assert_eq!(verdict(&c, "github", "Delete_repository"), None);
    assert_eq!(verdict(&c, "files", "read_file"), None);
    assert_eq!(verdict(&c, "files", "list"), None);
    assert_eq!(verdict(&c, "files", "write_file"), forbidden("servers[1].tools.allow", 11));
    assert_eq!(verdict(&c, "plain", "anything"), None);
    assert_eq!(verdict(&c, "mute", "anything"), forbidden("servers[3].tools.allow", 14));
    assert_eq!(verdict(&c, "unknown", "anything"), forbidden("unknown.tools.deny[0]", 16));
    assert_eq!(c.tool_verdict(4000, "anything"), ToolVerdict::Allowed, "a server that is declared no more");
}

#[test]
fn what_follows_and_what_is_recorded_is_by_server() {
    let c = compiled(POLICY);
    let id = |name| c.server(name).unwrap().0;
    assert_eq!(c.on_violation(id("github")), OnViolation::Kill);
    assert_eq!(c.on_violation(id("files")), OnViolation::Report);
    assert_eq!(c.on_violation(id("unknown")), OnViolation::Quarantine);
    assert_eq!(c.capture(id("files")), Capture::Redacted { max_bytes: 4096 });
    assert_eq!(c.capture(id("plain")), Capture::Redacted { max_bytes: CAPTURE_BYTES });
    for name in ["github", "mute", "unknown"] {
        assert_eq!(c.capture(id(name)), Capture::None, "{name}");
    }
    let bare = compiled("version: 1\nservers: [{name: a, profile: none}]");
    let id = bare.server("a").unwrap().0;
    assert_eq!((bare.on_violation(id), bare.capture(id)), (OnViolation::Report, Capture::None));
}

/// (keys of a server, column, part of the message)
const BAD: [(&str, u32, &str); 15] = [
    ("tools: {allow: [a], deny: [b]}", 62, "at once"),
    ("tools: {}", 43, "neither `allow` nor `deny`"),
    ("tools: {deny: []}", 50, "forbids nothing"),
    ("tools: {allow: [\"\"]}", 52, "no name of a tool"),
    ("tools: {allow: [a, a]}", 55, "twice"),
    ("tools: {allow: [\"a\\nb\"]}", 52, "no name of a tool"),
    ("tools: {only: [a]}", 44, "unknown field `only`"),
    ("tools: [a]", 43, ""),
    ("tools: {allow: a}", 51, "sequence"),
    ("on_violation: freeze", 50, "nothing that can be done"),
    ("capture: {content: all}", 55, "no way to record content"),
    ("capture: {max_bytes: 0}", 57, "from 1 to 65536"),
    ("capture: {max_bytes: 65537}", 57, "from 1 to 65536"),
    ("capture: {max_bytes: -1}", 57, ""),
    ("capture: redacted", 45, ""),
];

#[test]
fn every_complaint_about_messages_has_its_place() {
    for (keys, column, message) in BAD {
        let found = errors(&format!("version: 1\nservers: [{{name: a, profile: none, {keys}}}]"));
        let first = &found[0];
        assert!(first.message.contains(message), "{keys}\n{first:?}");
        assert_eq!(first.position.map(|p| (p.line, p.column)), Some((2, column)), "{keys}\n{first:?}");
        assert!(try_compiled(&format!("version: 1\nunknown: {{{keys}}}")).is_err(), "unknown: {keys}");
    }
}

#[test]
fn a_list_of_tools_has_a_limit() {
    let names: Vec<String> = (0..1001).map(|i| format!("t{i}")).collect();
    let policy = |n| format!("version: 1\nunknown: {{tools: {{allow: [{}]}}}}", names[..n].join(", "));
    assert!(try_compiled(&policy(1000)).is_ok());
    assert!(errors(&policy(1001))[0].message.contains("1001 tools; at most 1000"));
    let long = format!("version: 1\nunknown: {{tools: {{allow: [{}]}}}}", "x".repeat(257));
    assert!(errors(&long)[0].message.contains("no name of a tool"));
}

#[test]
fn what_can_never_happen_is_warned_about() {
    let policy = parse_bytes(b"version: 1\nservers: [{name: a, profile: none, on_violation: kill}]").unwrap();
    assert_eq!(policy.warnings.len(), 1);
    assert!(policy.warnings[0].message.contains("without `tools`"), "{:?}", policy.warnings);
}

#[test]
fn the_schema_knows_the_keys_as_the_parser_does() {
    let schema: serde_json::Value = serde_json::from_str(&schema().text).unwrap();
    let validator = jsonschema::draft202012::new(&schema).unwrap();
    let valid = |text: &str| validator.is_valid(&serde_saphyr::from_str::<serde_json::Value>(text).unwrap());
    assert!(valid(POLICY));
    for (keys, _, _) in BAD.iter().filter(|(keys, _, _)| !keys.contains("\\n")) {
        assert!(!valid(&format!("version: 1\nservers: [{{name: a, profile: none, {keys}}}]")), "{keys}");
        assert!(!valid(&format!("version: 1\nunknown: {{{keys}}}")), "unknown: {keys}");
    }
}

#[test]
fn a_tool_is_explained_with_its_rule_and_what_follows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("policy.yaml");
    std::fs::write(&path, POLICY).unwrap();
    let ask = |server: &str, tool: &str, format| {
        let out = explain(&path, crate::policy::command::Question::Tool { server, tool }, format);
        (out.status, out.text)
    };
    let text = Format::Text { color: false };
    let (status, said) = ask("github", "push_files", text);
    assert_eq!(status, Status::Denied);
    assert_eq!(
        said,
        "github (enforce) tool push_files\n  verdict  forbidden\n  rule     servers[0].tools.deny[1] (line 6)\n  \
         then     kill\n"
    );
    assert_eq!(ask("github", "get_file", text).0, Status::Ok);
    assert_eq!(ask("gone", "x", text).0, Status::NoServer);
    // In audit whatever is forbidden is only reported.
    let (_, json) = ask("unknown", "x", Format::Json);
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&value["allowed"], &value["on_violation"]), (&false.into(), &"report".into()));
}
