//! Group memberships. The kernel reports a join on the wire by itself, behind
//! every egress filter, and the reported address is the server's choice.

use anyhow::{Result, ensure};
use mcp_sensor_tests::bed::Bed;
use mcp_sensor_tests::frame::{Frame, L4};
use mcp_sensor_tests::network::Network;
use mcp_sensor_tests::policy::{NONE, Policy, WIRE};
use mcp_sensor_tests::sensor::{SOON, Sensor};
use mcp_sensor_tests::spec::{Claim, must, run};
use std::time::Duration;

const GROUP_V4: &str = "239.77.1.2";
const GROUP_V6: &str = "ff0e::77:1:2";
/// Server whose profile names the two groups.
const MEMBER: &str = "member";
/// A report is delayed by the kernel; later than this there is none.
const REPORT: Duration = Duration::from_millis(400);

struct Join {
    name: &'static str,
    group: &'static str,
    source: Option<&'static str>,
}

fn is_report(frame: &Frame) -> bool {
    matches!(frame, Frame::Ip { l4: L4::Igmp(0x12 | 0x16 | 0x22) | L4::Icmp6(131 | 143), .. })
}

fn policy() -> Policy {
    let rule = format!("egress: [{{to: [{GROUP_V4}/32, \"{GROUP_V6}/128\"], ports: [5353], protocol: udp}}]");
    Policy::standard().profile("groups", &rule).server(MEMBER, "groups", "enforce", "")
}

impl Join {
    fn arguments(&self) -> Vec<String> {
        let mut all = vec![self.name.to_string(), "--to".into(), self.group.into()];
        if let Some(source) = self.source {
            all.extend(["--via".into(), source.into()]);
        }
        all
    }

    fn reported_unlabelled(&self, bed: &Bed) -> Result<Claim> {
        let tried = bed.try_out(bed.attempt(&self.arguments())?)?;
        if tried.report.is_lacking() {
            return Ok(Claim::Skipped(tried.report.to_string()));
        }
        ensure!(tried.report.errno().is_none(), "proves nothing: unlabelled, {}", tried.report);
        let reported =
            tried.frames.iter().any(is_report) || bed.sniffer.wait_for(REPORT, is_report)?.is_some();
        ensure!(reported, "proves nothing: unlabelled, the peer sees no report, only {:?}", tried.frames);
        Ok(Claim::Holds)
    }

    fn reaches_the_peer_unlabelled(&self) -> Result<Claim> {
        self.reported_unlabelled(&Bed::new()?)
    }

    fn is_denied(&self, server: &str) -> Result<Claim> {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &policy())?;
        let tried = bed.try_out(bed.labelled_attempt(&sensor, server, &self.arguments())?)?;
        bed.sniffer.settle(REPORT)?;
        let late = bed.frames()?;
        let event = sensor.events().wait_for("a denied join", SOON, |e| {
            e.is_denial_of(server) && ["group_join", "socket_type"].contains(&e.text("reason"))
        });
        let claim = self.reported_unlabelled(&bed)?;
        if matches!(claim, Claim::Holds) {
            ensure!(tried.report.errno() == Some(libc::EPERM), "the join says: {}", tried.report);
            event?;
        }
        ensure!(tried.frames.is_empty() && late.is_empty(), "{:?} {late:?}", tried.frames);
        Ok(claim)
    }

    fn is_allowed_where_a_rule_names_it(&self) -> Result<Claim> {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &policy())?;
        let tried = bed.try_out(bed.labelled_attempt(&sensor, MEMBER, &self.arguments())?)?;
        if tried.report.is_lacking() {
            return Ok(Claim::Skipped(tried.report.to_string()));
        }
        ensure!(tried.report.errno().is_none(), "the rule names the group, but {}", tried.report);
        let reported =
            tried.frames.iter().any(is_report) || bed.sniffer.wait_for(REPORT, is_report)?.is_some();
        ensure!(reported, "no report: {:?}", tried.frames);
        let denials = sensor.events().denials_of(MEMBER)?;
        ensure!(denials.is_empty(), "denied: {denials:?}");
        Ok(Claim::Holds)
    }
}

macro_rules! joins {
    ($($claim:ident: $name:literal, $group:expr, $source:expr;)+) => {
        $(mod $claim {
            use super::*;
            const JOIN: Join = Join { name: $name, group: $group, source: $source };

            #[test]
            fn reaches_the_peer_unlabelled() { run(|| JOIN.reaches_the_peer_unlabelled()); }

            #[test]
            fn is_denied_under_none() { run(|| JOIN.is_denied(NONE)); }

            #[test]
            fn is_denied_where_no_rule_names_it() { run(|| JOIN.is_denied(WIRE)); }

            #[test]
            fn is_allowed_where_a_rule_names_it() { run(|| JOIN.is_allowed_where_a_rule_names_it()); }
        })+
    };
}

joins! {
    ip_add_membership_mreq: "join-mreq", GROUP_V4, None;
    ip_add_membership_mreqn: "join-mreqn", GROUP_V4, None;
    ip_add_membership_on_a_v6_socket: "join-mreq-on-v6-socket", GROUP_V4, None;
    mcast_join_group_v4: "join-group", GROUP_V4, None;
    mcast_join_group_v6: "join-group", GROUP_V6, None;
    ip_add_source_membership: "join-source-mreq", GROUP_V4, Some("10.77.1.2");
    mcast_join_source_group_v4: "join-source-group", GROUP_V4, Some("10.77.1.2");
    mcast_join_source_group_v6: "join-source-group", GROUP_V6, Some("fd77:0:0:1::2");
    ipv6_add_membership: "join-ipv6", GROUP_V6, None;
    join_then_ip_msfilter: "join-then-msfilter", GROUP_V4, Some("10.77.1.2");
    join_then_mcast_msfilter_v4: "join-then-group-filter", GROUP_V4, Some("10.77.1.2");
    join_then_mcast_msfilter_v6: "join-then-group-filter", GROUP_V6, Some("fd77:0:0:1::2");
}

/// An anycast address is announced by the solicited-node group made from it.
#[test]
fn ipv6_join_anycast_is_denied_under_none() {
    run(|| {
        let join = Join { name: "join-anycast", group: "fd77::77:1:2", source: None };
        let bed = Bed::with_network(Network::with_arp(true)?)?;
        let sensor = Sensor::start(&bed, &policy())?;
        bed.sniffer.settle(REPORT)?;
        bed.frames()?;
        let tried = bed.try_out(bed.labelled_attempt(&sensor, NONE, &join.arguments())?)?;
        bed.sniffer.settle(REPORT)?;
        let late = bed.frames()?;
        let claim = join.reported_unlabelled(&bed)?;
        ensure!(tried.report.errno() == Some(libc::EPERM), "the join says: {}", tried.report);
        let reports: Vec<_> = tried.frames.iter().chain(&late).filter(|f| is_report(f)).collect();
        ensure!(reports.is_empty(), "{reports:?}");
        Ok(claim)
    });
}

/// Datagrams to everybody: a rule for the network does not open them.
fn group_send_is_denied(name: &str, to: &str) -> Result<()> {
    let bed = Bed::new()?;
    let everywhere = "egress: [{to: [0.0.0.0/0, \"::/0\"], ports: [1-65535], protocol: udp}]";
    let policy = Policy::standard().profile("wide", everywhere).server("wide", "wide", "enforce", "");
    let sensor = Sensor::start(&bed, &policy)?;
    let arguments = [name, "--to", to, "--port", "7001"].map(String::from);
    for server in [NONE, WIRE, "wide"] {
        let tried = bed.try_out(bed.labelled_attempt(&sensor, server, &arguments)?)?;
        ensure!(tried.frames.is_empty(), "{server}: {} {:?}", tried.report, tried.frames);
        ensure!(tried.report.errno().is_some(), "{server}: the send succeeds");
        // EACCES: the kernel itself refuses a broadcast where SO_BROADCAST was not let through.
        if tried.report.errno() != Some(libc::EACCES) {
            sensor.events().wait_for("a denial", SOON, |e| e.is_denial_of(server))?;
        }
    }
    let tried = bed.try_out(bed.attempt(&arguments)?)?;
    let there = tried.frames.iter().any(|f| f.destination() == to.parse().ok());
    ensure!(there, "proves nothing: unlabelled, {} {:?}", tried.report, tried.frames);
    Ok(())
}

#[test]
fn udp_to_a_v4_group_is_denied_unless_named() {
    must(|| group_send_is_denied("udp-multicast", "224.0.0.251"));
}

#[test]
fn udp_to_a_v6_group_is_denied_unless_named() {
    must(|| group_send_is_denied("udp-multicast", "ff0e::fb"));
}

#[test]
fn udp_to_the_networks_broadcast_address_is_denied() {
    must(|| group_send_is_denied("udp-broadcast", "10.77.255.255"));
}

#[test]
fn udp_to_the_limited_broadcast_address_is_denied() {
    must(|| group_send_is_denied("udp-broadcast", "255.255.255.255"));
}
