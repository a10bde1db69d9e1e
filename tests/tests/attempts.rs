//! The first table of KERNEL.md and its relatives: one attempt each, over IPv4
//! and IPv6, unlabelled, under `none` and under a CIDR profile.

use anyhow::{Result, ensure};
use mcp_sensor_tests::attempts;
use mcp_sensor_tests::bed::Bed;
use mcp_sensor_tests::frame::Frame;
use mcp_sensor_tests::network::Family;
use mcp_sensor_tests::peer::PORT;
use mcp_sensor_tests::policy::{Policy, WIRE};
use mcp_sensor_tests::sensor::{SOON, Sensor};
use mcp_sensor_tests::spec::must;

attempts! {
    tcp_connect: "tcp-connect", Tcp, Passes, [v4 v6];
    tcp_connect_nonblocking: "tcp-nonblocking", Tcp, Passes, [v4 v6];
    tcp_connect_after_bind: "tcp-bound", Tcp, Passes, [v4 v6];
    tcp_connect_bound_to_a_device: "tcp-bindtodevice", Tcp, Passes, [v4 v6];
    tcp_v4_mapped: "tcp-mapped", Tcp, Passes, [v4];
    tcp_fastopen: "tcp-fastopen", Tcp, Passes, [v4 v6];
    tcp_fastopen_connect: "tcp-fastopen-connect", Tcp, Passes, [v4 v6];
    tcp_zerocopy: "tcp-zerocopy", Tcp, Passes, [v4 v6];
    tcp_repair: "tcp-repair", Tcp, Passes, [v4 v6];
    tcp_sendfile: "tcp-sendfile", Tcp, Passes, [v4 v6];
    tcp_disconnect_then_connect: "tcp-disconnect-connect", Tcp, Passes, [v4 v6];
    tcp_listen_without_bind_then_connect: "tcp-listen-connect", Tcp, Passes, [v4 v6];
    mptcp_connect: "mptcp-connect", Mptcp, NeverLeaves, [v4 v6];
    mptcp_fastopen: "mptcp-fastopen", Mptcp, NeverLeaves, [v4 v6];
    udp_connect_send: "udp-connect-send", Udp, Passes, [v4 v6];
    udp_sendto: "udp-sendto", Udp, Passes, [v4 v6];
    udp_sendmsg: "udp-sendmsg", Udp, Passes, [v4 v6];
    udp_sendmmsg: "udp-sendmmsg", Udp, Passes, [v4 v6];
    udp_sendto_unspec_sockaddr: "udp-unspec", Udp, Passes, [v4 v6];
    udp_v6_socket_to_v4_mapped: "udp-mapped", Udp, Passes, [v4];
    udp_v6_socket_with_inet_sockaddr: "udp-inet-on-v6", Udp, Passes, [v4];
    udp_disconnect_then_connect: "udp-reconnect", Udp, Passes, [v4 v6];
    udp_connected_sendto_elsewhere: "udp-connected-sendto", Udp, Passes, [v4 v6];
    udp_segment_offload: "udp-segment", Udp, Passes, [v4 v6];
    udp_zerocopy: "udp-zerocopy", Udp, Passes, [v4 v6];
    udp_msg_more: "udp-more", Udp, Passes, [v4 v6];
    udp_spliced: "udp-splice", Udp, Passes, [v4 v6];
    udp_larger_than_the_link: "udp-large", Fragments, Passes, [v4 v6];
    udp_with_broadcast_option: "udp-broadcast", Udp, Passes, [v4 v6];
    udp_bound_to_a_device: "udp-bindtodevice", Udp, Passes, [v4 v6];
    udp_lite_connect_send: "udplite-connect-send", UdpLite, NeverLeaves, [v4 v6];
    udp_lite_sendto: "udplite-sendto", UdpLite, NeverLeaves, [v4 v6];
    icmp_ping_socket: "ping-sendto", Ping, NeverLeaves, [v4 v6];
    icmp_ping_socket_connected: "ping-connect-send", Ping, NeverLeaves, [v4 v6];
    raw_ip_protocol: "raw-sendto", Protocol(253), NeverLeaves, [v4 v6];
    raw_udp_by_hand: "raw-udp", Udp, NeverLeaves, [v4 v6];
    raw_header_included: "raw-hdrincl", Protocol(253), NeverLeaves, [v4 v6];
    raw_icmp: "raw-icmp", Ping, NeverLeaves, [v4 v6];
    io_uring_socket_connect: "uring-socket-connect", Tcp, Passes, [v4 v6];
    io_uring_connect: "uring-connect-send", Tcp, Passes, [v4 v6];
    io_uring_sendmsg: "uring-sendmsg", Udp, Passes, [v4 v6];
    io_uring_socket_udp_lite: "uring-socket-udplite", UdpLite, NeverLeaves, [v4 v6];
    io_uring_sqpoll_connect: "uring-sqpoll-connect", Tcp, Passes, [v4 v6];
    ipv6_routing_header: "ipv6-routing-header", RoutingHeader, NeverLeaves, [v6_via];
    ipv6_routing_header_after_connect:
        "ipv6-routing-header-after-connect", RoutingHeader, NeverLeaves, [v6_via];
    tcp_with_ipv6_routing_header: "tcp-routing-header", RoutingHeader, NeverLeaves, [v6_via];
    tcp_with_loose_source_route: "tcp-source-route", IpOptions, NeverLeaves, [v4_via];
    ip_loose_source_route: "ip-source-route", IpOptions, NeverLeaves, [v4_via];
    ip_timestamp_option: "ip-timestamp-option", IpOptions, NeverLeaves, [v4];
    ipv6_destination_options: "ipv6-destination-options", IpOptions, NeverLeaves, [v6];
    sctp_connect: "sctp-connect", Protocol(132), NeverLeaves, [v4 v6];
    dccp_connect: "dccp-connect", Protocol(33), NeverLeaves, [v4 v6];
    l2tp_ip_sendto: "l2tp-sendto", Protocol(115), NeverLeaves, [v4 v6];
}

/// `name` sends to an allowed and to a denied peer in turn; only the allowed
/// one sees anything.
fn only_the_allowed_leaves(name: &str, family: Family) -> Result<()> {
    let bed = Bed::new()?;
    let sensor = Sensor::start(&bed, &Policy::standard())?;
    let (allowed, denied) = (family.allowed(), family.denied());
    let sees = |frames: &[Frame], peer| frames.iter().filter(|f| f.destination() == Some(peer)).count();
    for (to, via) in [(allowed, denied), (denied, allowed)] {
        let all = [name, "--to", &to.to_string(), "--port", &PORT.to_string(), "--via", &via.to_string()]
            .map(String::from);
        let tried = bed.try_out(bed.labelled_attempt(&sensor, WIRE, &all)?)?;
        let astray = tried.frames.len() - sees(&tried.frames, allowed);
        ensure!(astray == 0, "{astray} frames to others: {}", tried.report);
        if to == allowed {
            ensure!(sees(&tried.frames, allowed) > 0, "what the rule allows does not arrive");
        }
        sensor
            .events()
            .wait_for("a denial", SOON, |e| e.is_denial_of(WIRE) && e.text("dst.ip") == denied.to_string())?;
        let tried = bed.try_out(bed.attempt(&all)?)?;
        ensure!(sees(&tried.frames, denied) > 0, "proves nothing: unlabelled, {}", tried.report);
    }
    Ok(())
}

#[test]
fn sendmmsg_to_two_v4_peers_reaches_only_the_allowed() {
    must(|| only_the_allowed_leaves("udp-sendmmsg-two", Family::V4));
}

#[test]
fn sendmmsg_to_two_v6_peers_reaches_only_the_allowed() {
    must(|| only_the_allowed_leaves("udp-sendmmsg-two", Family::V6));
}

#[test]
fn threads_racing_on_one_v4_socket_reach_only_the_allowed() {
    must(|| only_the_allowed_leaves("udp-race", Family::V4));
}

#[test]
fn threads_racing_on_one_v6_socket_reach_only_the_allowed() {
    must(|| only_the_allowed_leaves("udp-race", Family::V6));
}
