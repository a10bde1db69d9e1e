//! Below TCP and UDP: ping and raw sockets, IP options, routing headers, and
//! the families that are no IP.

use crate::Target;
use crate::wire::*;
use libc::{IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_IP, IPPROTO_IPV6, SOCK_DGRAM, SOCK_RAW, SOCK_STREAM};
use mcp_sensor_tests::report::PAYLOAD;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

pub(crate) const ALL: &[(&str, Attempt)] = &[
    ("ping-sendto", ping),
    ("ping-connect-send", ping_connected),
    ("raw-sendto", raw_protocol),
    ("raw-udp", raw_udp),
    ("raw-hdrincl", header_included),
    ("raw-icmp", raw_icmp),
    ("ipv6-routing-header", routing_header),
    ("ip-source-route", source_route),
    ("ip-timestamp-option", timestamp_option),
    ("ipv6-destination-options", destination_options),
    ("sctp-connect", sctp),
    ("dccp-connect", dccp),
    ("l2tp-sendto", l2tp),
    ("packet-send", packet),
    ("packet-send-raw", packet_raw),
    ("vsock-connect", vsock),
    ("xdp-socket", xdp),
    ("netlink-route", netlink),
];

/// IANA "experimental".
const EXPERIMENTAL: i32 = 253;
const IPPROTO_L2TP: i32 = 115;
const IPPROTO_DCCP: i32 = 33;

/// Echo request; the kernel fills in id and checksum of a ping socket.
fn echo_request(v4: bool) -> Vec<u8> {
    let mut bytes = vec![if v4 { 8 } else { 128 }, 0, 0, 0, 0, 1, 0, 1];
    bytes.extend(PAYLOAD);
    bytes
}

fn icmp(t: &Target, kind: i32) -> Result<std::os::fd::OwnedFd, Stop> {
    socket_for(t.to, kind, if t.to.is_ipv4() { IPPROTO_ICMP } else { IPPROTO_ICMPV6 })
}

fn no_port(ip: IpAddr) -> SocketAddr {
    SocketAddr::new(ip, 0)
}

fn ping(t: &Target) -> Tried {
    let s = icmp(t, SOCK_DGRAM)?;
    sendto(&s, &echo_request(t.to.is_ipv4()), 0, no_port(t.to))?;
    Ok(answered(&s))
}

fn ping_connected(t: &Target) -> Tried {
    let s = icmp(t, SOCK_DGRAM)?;
    connect(&s, no_port(t.to))?;
    send(&s, &echo_request(t.to.is_ipv4()), 0)?;
    Ok(answered(&s))
}

fn raw_protocol(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_RAW, EXPERIMENTAL)?;
    sendto(&s, PAYLOAD, 0, no_port(t.to))?;
    Ok(false)
}

/// A UDP datagram made by hand, to a port that a rule may allow.
fn raw_udp(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_RAW, libc::IPPROTO_UDP)?;
    let mut bytes = Vec::new();
    bytes.extend(40_000u16.to_be_bytes());
    bytes.extend(t.port.to_be_bytes());
    bytes.extend((8 + PAYLOAD.len() as u16).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(PAYLOAD);
    sendto(&s, &bytes, 0, no_port(t.to))?;
    Ok(false)
}

fn header_included(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_RAW, libc::IPPROTO_RAW)?;
    let mut bytes = Vec::new();
    match t.to {
        IpAddr::V4(to) => {
            bytes.extend([0x45, 0, 0, 0, 0, 0, 0, 0, 64, EXPERIMENTAL as u8, 0, 0, 0, 0, 0, 0]);
            bytes.extend(to.octets());
        }
        IpAddr::V6(to) => {
            bytes.extend([0x60, 0, 0, 0]);
            bytes.extend((PAYLOAD.len() as u16).to_be_bytes());
            bytes.extend([EXPERIMENTAL as u8, 64]);
            let IpAddr::V6(from) = mcp_sensor_tests::network::Family::V6.server() else { unreachable!() };
            bytes.extend(from.octets());
            bytes.extend(to.octets());
        }
    }
    bytes.extend(PAYLOAD);
    sendto(&s, &bytes, 0, no_port(t.to))?;
    Ok(false)
}

fn raw_icmp(t: &Target) -> Tried {
    let s = icmp(t, SOCK_RAW)?;
    let mut bytes = echo_request(t.to.is_ipv4());
    if t.to.is_ipv4() {
        let sum = bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0))).sum();
        let sum: u32 = sum;
        let folded = (sum & 0xffff) + (sum >> 16);
        bytes[2..4].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    }
    sendto(&s, &bytes, 0, no_port(t.to))?;
    Ok(answered(&s))
}

/// Says `to`, goes to `via` first (RFC 8754, open to any user).
fn routing_header(t: &Target) -> Tried {
    let (IpAddr::V6(to), IpAddr::V6(via)) = (t.to, t.via()?) else {
        return Err(Stop { step: "needs IPv6", errno: libc::EAFNOSUPPORT });
    };
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    // next header, length in 8 octets, type 4, segments left, last entry, flags, tag
    let mut header = vec![0, 4, 4, 1, 1, 0, 0, 0];
    header.extend(to.octets());
    header.extend(via.octets());
    set_bytes(&s, "IPV6_RTHDR", IPPROTO_IPV6, libc::IPV6_RTHDR, &header)?;
    sendto(&s, PAYLOAD, 0, t.address())?;
    Ok(false)
}

/// Loose source route: says `to`, goes to `via` first (RFC 791).
fn source_route(t: &Target) -> Tried {
    let (IpAddr::V4(to), IpAddr::V4(via)) = (t.to, t.via()?) else {
        return Err(Stop { step: "needs IPv4", errno: libc::EAFNOSUPPORT });
    };
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    let mut option = vec![1, 131, 11, 4];
    option.extend(via.octets());
    option.extend(to.octets());
    set_bytes(&s, "IP_OPTIONS", IPPROTO_IP, libc::IP_OPTIONS, &option)?;
    sendto(&s, PAYLOAD, 0, t.address())?;
    Ok(false)
}

/// Forty chosen bytes on every packet.
fn timestamp_option(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    let mut option = vec![68, 36, 5, 0];
    option.resize(36, 0);
    set_bytes(&s, "IP_OPTIONS", IPPROTO_IP, libc::IP_OPTIONS, &option)?;
    sendto(&s, PAYLOAD, 0, t.address())?;
    Ok(answered(&s))
}

fn destination_options(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    // PadN of 12 bytes.
    let mut header = vec![0, 1, 1, 12];
    header.resize(16, 0);
    set_bytes(&s, "IPV6_DSTOPTS", IPPROTO_IPV6, libc::IPV6_DSTOPTS, &header)?;
    sendto(&s, PAYLOAD, 0, t.address())?;
    Ok(answered(&s))
}

fn sctp(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_STREAM, libc::IPPROTO_SCTP)?;
    connect(&s, t.address())?;
    exchange(&s)
}

fn dccp(t: &Target) -> Tried {
    const SOCK_DCCP: i32 = 6;
    let s = socket_for(t.to, SOCK_DCCP, IPPROTO_DCCP)?;
    connect(&s, t.address())?;
    exchange(&s)
}

fn l2tp(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, IPPROTO_L2TP)?;
    sendto(&s, PAYLOAD, 0, no_port(t.to))?;
    Ok(false)
}

/// EtherType "local experimental 2", to everybody.
const ETHERTYPE: u16 = 0x88b6;

fn to_the_wire() -> Result<libc::sockaddr_ll, Stop> {
    // SAFETY: all-zero is a valid sockaddr_ll.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_protocol = ETHERTYPE.to_be();
    to.sll_ifindex = crate::udp::link_index()?;
    to.sll_halen = 6;
    to.sll_addr[..6].fill(0xff);
    Ok(to)
}

fn send_link(s: &std::os::fd::OwnedFd, bytes: &[u8]) -> Tried {
    let to = to_the_wire()?;
    let len = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: bytes and address outlive the call and their sizes are passed.
    let n = unsafe {
        libc::sendto(s.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0, (&raw const to).cast(), len)
    };
    check("sendto", n)?;
    Ok(false)
}

fn packet(_: &Target) -> Tried {
    let s = socket(libc::AF_PACKET, SOCK_DGRAM, 0)?;
    send_link(&s, PAYLOAD)
}

fn packet_raw(_: &Target) -> Tried {
    let s = socket(libc::AF_PACKET, SOCK_RAW, 0)?;
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 1]);
    frame.extend(ETHERTYPE.to_be_bytes());
    frame.extend(PAYLOAD);
    send_link(&s, &frame)
}

fn vsock(_: &Target) -> Tried {
    let s = socket(libc::AF_VSOCK, SOCK_STREAM, 0)?;
    // SAFETY: all-zero is a valid sockaddr_vm.
    let mut to: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    to.svm_family = libc::AF_VSOCK as u16;
    to.svm_cid = libc::VMADDR_CID_LOCAL;
    to.svm_port = 9;
    let len = size_of::<libc::sockaddr_vm>() as u32;
    // SAFETY: the address outlives the call and its size is passed.
    check("connect", unsafe { libc::connect(s.as_raw_fd(), (&raw const to).cast(), len) } as isize)?;
    Ok(false)
}

fn xdp(_: &Target) -> Tried {
    socket(libc::AF_XDP, SOCK_RAW, 0)?;
    Ok(false)
}

/// Asks the kernel for the links: no frame, but a family that no IP hook sees.
fn netlink(_: &Target) -> Tried {
    let s = socket(libc::AF_NETLINK, SOCK_RAW, libc::NETLINK_ROUTE)?;
    let mut request = Vec::new();
    request.extend(32u32.to_ne_bytes());
    request.extend(libc::RTM_GETLINK.to_ne_bytes());
    request.extend(((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    request.resize(32, 0);
    send(&s, &request, 0)?;
    Ok(answered(&s))
}
