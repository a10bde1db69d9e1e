//! The first table of KERNEL.md and its relatives: one attempt each, over IPv4
//! and IPv6, unlabelled, under `none` and under a CIDR profile.

use mcp_sensor_tests::attempts;

attempts! {
    tcp_connect: "tcp-connect", Tcp, Passes, [v4 v6];
    tcp_connect_nonblocking: "tcp-nonblocking", Tcp, Passes, [v4 v6];
    tcp_connect_after_bind: "tcp-bound", Tcp, Passes, [v4 v6];
    tcp_connect_bound_to_a_device: "tcp-bindtodevice", Tcp, Passes, [v4 v6];
    tcp_v4_mapped: "tcp-mapped", Tcp, Passes, [v4];
    tcp_fastopen: "tcp-fastopen", Tcp, Passes, [v4 v6];
    tcp_fastopen_connect: "tcp-fastopen-connect", Tcp, Passes, [v4 v6];
    tcp_zerocopy: "tcp-zerocopy", Tcp, Passes, [v4 v6];
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
    ip_loose_source_route: "ip-source-route", IpOptions, NeverLeaves, [v4_via];
    ip_timestamp_option: "ip-timestamp-option", IpOptions, NeverLeaves, [v4];
    ipv6_destination_options: "ipv6-destination-options", IpOptions, NeverLeaves, [v6];
    sctp_connect: "sctp-connect", Protocol(132), NeverLeaves, [v4 v6];
    dccp_connect: "dccp-connect", Protocol(33), NeverLeaves, [v4 v6];
    l2tp_ip_sendto: "l2tp-sendto", Protocol(115), NeverLeaves, [v4 v6];
}
