//! Addresses that stand for others, and loopback.

use anyhow::{Result, ensure};
use mcp_sensor_tests::bed::{Bed, LIMIT};
use mcp_sensor_tests::network::Family;
use mcp_sensor_tests::policy::{NONE, Policy, WIRE};
use mcp_sensor_tests::run::Running;
use mcp_sensor_tests::sensor::{SOON, Sensor};
use mcp_sensor_tests::spec::must;

const LOCAL: u16 = 7003;

fn attempt(name: &str, to: &str, port: u16) -> Vec<String> {
    [name, "--to", to, "--port", &port.to_string()].map(String::from).to_vec()
}

/// A listener on the server's loopback, of nobody's.
fn local_listener(bed: &Bed, family: Family) -> Result<Running> {
    let command = bed.attempt(&attempt("serve-tcp", &family.allowed().to_string(), LOCAL))?;
    let mut running = Running::start(command)?;
    running.wait_for_line(&format!("port {LOCAL}"), LIMIT)?;
    Ok(running)
}

fn loopback_policy() -> Policy {
    let body = format!("egress: [{{to: [127.0.0.1/32, \"::1/128\"], ports: [{LOCAL}]}}]");
    Policy::standard().profile("local", &body).server("local", "local", "enforce", "")
}

fn connects_locally(name: &str, to: &str, family: Family, server: Option<&str>) -> Result<bool> {
    let bed = Bed::new()?;
    let sensor = Sensor::start(&bed, &loopback_policy())?;
    let listener = local_listener(&bed, family)?;
    let command = match server {
        Some(server) => bed.labelled_attempt(&sensor, server, &attempt(name, to, LOCAL))?,
        None => bed.attempt(&attempt(name, to, LOCAL))?,
    };
    let tried = bed.try_out(command)?;
    if let Some(server) = server {
        let denials = sensor.events().denials_of(server)?;
        ensure!(!tried.report.answered() || denials.is_empty(), "answered, but {denials:?}");
    }
    drop(listener);
    Ok(tried.report.answered())
}

fn is_judged_as_loopback(name: &str, to: &str, family: Family) -> Result<()> {
    ensure!(connects_locally(name, to, family, None)?, "proves nothing: unlabelled, no answer");
    ensure!(connects_locally(name, to, family, Some("local"))?, "the loopback rule does not hold");
    for server in [NONE, WIRE] {
        ensure!(!connects_locally(name, to, family, Some(server))?, "{server} has no rule for it");
    }
    Ok(())
}

#[test]
fn connect_to_127_0_0_1_needs_a_rule() {
    must(|| is_judged_as_loopback("tcp-connect", "127.0.0.1", Family::V4));
}

#[test]
fn connect_to_ipv6_loopback_needs_a_rule() {
    must(|| is_judged_as_loopback("tcp-connect", "::1", Family::V6));
}

#[test]
fn connect_to_0_0_0_0_is_judged_as_loopback() {
    must(|| is_judged_as_loopback("zero-address", "10.77.1.2", Family::V4));
}

#[test]
fn connect_to_ipv6_unspecified_is_judged_as_loopback() {
    must(|| is_judged_as_loopback("zero-address", "fd77:0:0:1::2", Family::V6));
}

/// An address of the host's own is no loopback address, and needs a rule too.
#[test]
fn connect_to_the_hosts_own_address_needs_a_rule() {
    must(|| {
        for family in [Family::V4, Family::V6] {
            let own = family.server().to_string();
            ensure!(connects_locally("tcp-connect", &own, family, None)?, "proves nothing");
            for server in [NONE, WIRE, "local"] {
                ensure!(!connects_locally("tcp-connect", &own, family, Some(server))?, "{server}: {own}");
            }
        }
        Ok(())
    });
}

/// `::/0` is every IPv6 address, and no IPv4 address in IPv6 clothes.
fn is_judged_as_ipv4(name: &str, to: &str) -> Result<()> {
    let bed = Bed::new()?;
    let port = mcp_sensor_tests::peer::PORT;
    let rule = |to: &str| format!("egress: [{{to: [{to}], ports: [{port}], protocol: [tcp, udp]}}]");
    let policy = Policy::standard()
        .profile("six", &rule("\"::/0\""))
        .server("six", "six", "enforce", "")
        .profile("four", &rule("10.77.2.0/24"))
        .server("four", "four", "enforce", "");
    let sensor = Sensor::start(&bed, &policy)?;
    let run = |server: &str| bed.try_out(bed.labelled_attempt(&sensor, server, &attempt(name, to, port))?);
    let tried = run("six")?;
    ensure!(tried.frames.is_empty(), "::/0 opened it: {} {:?}", tried.report, tried.frames);
    sensor.events().wait_for("a denial", SOON, |e| e.is_denial_of("six"))?;
    let tried = run("four")?;
    ensure!(!tried.frames.is_empty(), "the IPv4 rule does not cover it: {}", tried.report);
    let tried = bed.try_out(bed.attempt(&attempt(name, to, port))?)?;
    ensure!(!tried.frames.is_empty(), "proves nothing: unlabelled, {}", tried.report);
    Ok(())
}

#[test]
fn nat64_udp_is_judged_as_ipv4() {
    must(|| is_judged_as_ipv4("udp-sendto", "64:ff9b::10.77.2.2"));
}

#[test]
fn nat64_tcp_is_judged_as_ipv4() {
    must(|| is_judged_as_ipv4("tcp-connect", "64:ff9b::10.77.2.2"));
}

#[test]
fn six_to_four_udp_is_judged_as_ipv4() {
    must(|| is_judged_as_ipv4("udp-sendto", "2002:a4d:202::1"));
}

#[test]
fn v4_mapped_is_judged_as_ipv4() {
    must(|| is_judged_as_ipv4("udp-mapped", "10.77.2.2"));
}

/// Names in the profile `self`: its own listener, and nobody else's.
#[test]
fn self_means_the_same_instance_only() {
    must(|| {
        let bed = Bed::new()?;
        let policy = Policy::standard()
            .profile("self", "egress: [{to: [self]}]")
            .server("self", "self", "enforce", "");
        let sensor = Sensor::start(&bed, &policy)?;
        for (to, family) in [("127.0.0.1", Family::V4), ("::1", Family::V6)] {
            let talk = attempt("talk-to-itself", to, 0);
            let tried = bed.try_out(bed.labelled_attempt(&sensor, "self", &talk)?)?;
            ensure!(tried.report.answered(), "itself over {to}: {}", tried.report);
            let listener = local_listener(&bed, family)?;
            let other = attempt("tcp-connect", to, LOCAL);
            let tried = bed.try_out(bed.labelled_attempt(&sensor, "self", &other)?)?;
            ensure!(!tried.report.answered(), "somebody else's listener over {to}");
            drop(listener);
            let tried = bed.try_out(bed.labelled_attempt(&sensor, NONE, &talk)?)?;
            ensure!(!tried.report.answered(), "none has not even that");
            let tried = bed.try_out(bed.attempt(&talk)?)?;
            ensure!(tried.report.answered(), "proves nothing: unlabelled, {}", tried.report);
        }
        Ok(())
    });
}
