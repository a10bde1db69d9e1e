//! Policies that are wrong: a clear error with a position, and no start.

use anyhow::{Result, ensure};
use mcp_sensor_tests::run::{Finished, Running};
use mcp_sensor_tests::sensor::binary;
use mcp_sensor_tests::spec::must;
use std::fs;
use std::process::Command;
use std::time::Duration;

const INVALID: Option<i32> = Some(3);

fn check(policy: &str) -> Result<Finished> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("policy.yaml");
    fs::write(&file, policy)?;
    let mut command = Command::new(binary()?);
    command.args(["policy", "check"]).arg(&file);
    Running::start(command)?.finish(Duration::from_secs(30))
}

/// `says`: what the error must name; `line`: where it must point.
fn is_refused(policy: &str, line: usize, says: &str) -> Result<()> {
    let done = check(policy)?;
    let text = format!("{}\n{}", done.lines.join("\n"), done.stderr);
    ensure!(done.status.code() == INVALID, "exit {:?}: {text}", done.status.code());
    ensure!(text.contains(&format!("policy.yaml:{line}:")), "no position on line {line}: {text}");
    ensure!(text.contains(says), "does not say \"{says}\": {text}");
    Ok(())
}

const SERVERS: &str = "servers:\n  - {name: s, profile: p, match: [{argv: x}]}\n";

/// Its rule stands on line 5.
fn with_rule(rule: &str) -> String {
    format!("version: 1\nprofiles:\n  p:\n    egress:\n      - {rule}\n{SERVERS}")
}

#[test]
fn a_good_policy_is_accepted() {
    must(|| {
        let done = check(&with_rule("{to: [10.0.0.0/8], ports: [443]}"))?;
        ensure!(done.status.success(), "{:?} {}", done.lines, done.stderr);
        Ok(())
    });
}

#[test]
fn malformed_yaml_is_refused_with_its_position() {
    must(|| is_refused("version: 1\nprofiles: {\n  p: [\n", 3, ""));
}

#[test]
fn an_unknown_key_is_refused_with_its_position() {
    must(|| is_refused(&with_rule("{to: [10.0.0.0/8], port: [443]}"), 5, "port"));
}

#[test]
fn a_port_out_of_range_is_refused_with_its_position() {
    must(|| is_refused(&with_rule("{to: [10.0.0.0/8], ports: [65536]}"), 5, "65536"));
}

#[test]
fn a_port_range_upside_down_is_refused_with_its_position() {
    must(|| is_refused(&with_rule("{to: [10.0.0.0/8], ports: [6010-6000]}"), 5, "6010-6000"));
}

#[test]
fn a_name_with_nul_is_refused_with_its_position() {
    must(|| is_refused(&with_rule("{to: [\"api\\0.example.com\"], ports: [443]}"), 5, ""));
}

#[test]
fn a_server_name_with_nul_is_refused_with_its_position() {
    must(|| {
        let policy = "version: 1\nservers:\n  - {name: \"s\\0x\", profile: none, match: [{argv: x}]}\n";
        is_refused(policy, 3, "")
    });
}

#[test]
fn an_address_that_is_none_is_refused_with_its_position() {
    must(|| is_refused(&with_rule("{to: [10.0.0.0/33], ports: [443]}"), 5, "10.0.0.0/33"));
}

#[test]
fn a_profile_that_nobody_defined_is_refused_with_its_position() {
    must(|| {
        let policy = "version: 1\nservers:\n  - {name: s, profile: nowhere, match: [{argv: x}]}\n";
        is_refused(policy, 3, "nowhere")
    });
}

#[test]
fn two_servers_of_one_name_are_refused_with_the_position() {
    must(|| {
        let server = "  - {name: twin, profile: none, match: [{argv: x}]}\n";
        is_refused(&format!("version: 1\nservers:\n{server}{server}"), 4, "twin")
    });
}

#[test]
fn overlapping_rules_are_accepted() {
    must(|| {
        let rules = "{to: [10.0.0.0/8], ports: [443]}\n      - {to: [10.1.0.0/16], ports: [443, 400-500]}\n      \
                     - {to: [10.1.2.0/24, 10.0.0.0/8], ports: [1-65535], protocol: udp}";
        let done = check(&with_rule(rules))?;
        ensure!(done.status.success(), "{:?} {}", done.lines, done.stderr);
        Ok(())
    });
}

#[test]
fn mistakes_about_names_are_refused_with_the_position() {
    must(|| {
        let enforced = |rule: &str| with_rule(rule).replace("profile: p", "profile: p, mode: enforce");
        let good = enforced("{to: [api.example.com], ports: [443]}");
        let done = check(&format!("{good}resolvers: [192.0.2.53]\n"))?;
        ensure!(done.status.success(), "{:?} {}", done.lines, done.stderr);
        is_refused(&good.replace("version: 1\n", "version: 1\nresolvers: []\n"), 2, "resolvers")?;
        is_refused(
            &good.replace("version: 1\n", "version: 1\nresolvers: [dns.example]\n"),
            2,
            "dns.example",
        )?;
        is_refused(
            &enforced("{to: [api.example.com], ports: [443], protocol: udp, sni: require}"),
            5,
            "sni",
        )?;
        is_refused(&enforced("{to: [\"*.com\"], ports: [443]}"), 5, "com")
    });
}

#[test]
fn the_sensor_does_not_start_on_a_bad_policy_and_says_why() {
    must(|| {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("policy.yaml");
        fs::write(&file, with_rule("{to: [10.0.0.0/8], ports: [0x]}"))?;
        let mut command = Command::new(binary()?);
        command.arg("run").arg("--policy").arg(&file);
        command.arg("--control").arg(folder.path().join("c.sock"));
        command.arg("--state-dir").arg(folder.path().join("state"));
        // A leaf that does not exist: it must not get as far as attaching.
        command.arg("--cgroup").arg(folder.path());
        let done = Running::start(command)?.finish(Duration::from_secs(30))?;
        ensure!(done.status.code() == INVALID, "exit {:?}: {}", done.status.code(), done.stderr);
        ensure!(done.stderr.contains("policy.yaml:5:"), "no position: {}", done.stderr);
        ensure!(!done.lines.iter().any(|l| l == "ready"), "it says ready");
        Ok(())
    });
}
