//! Joining groups: the kernel itself reports each join on the wire, with the
//! group's address in it, on a socket that is nobody's.

use crate::Target;
use crate::udp::link_index;
use crate::wire::*;
use libc::{IPPROTO_IP, IPPROTO_IPV6, SOCK_DGRAM};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

/// `--to` is the group, `--via` the source where one is needed.
pub(crate) const ALL: &[(&str, Attempt)] = &[
    ("join-mreq", mreq),
    ("join-mreqn", mreqn),
    ("join-mreq-on-v6-socket", mreq_on_v6),
    ("join-group", group),
    ("join-group-stream", group_on_stream),
    ("join-source-mreq", source_mreq),
    ("join-source-group", source_group),
    ("join-then-msfilter", msfilter),
    ("join-then-group-filter", group_filter),
    ("join-ipv6", ipv6),
    ("join-anycast", anycast),
    ("join-raw-socket", raw_socket),
];

// linux/in.h, linux/in6.h
const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_JOIN_SOURCE_GROUP: i32 = 46;
const MCAST_MSFILTER: i32 = 48;
const IP_MSFILTER: i32 = 41;
const IPV6_JOIN_ANYCAST: i32 = 27;
const MCAST_INCLUDE: u32 = 1;

fn v4(ip: IpAddr) -> Result<libc::in_addr, Stop> {
    match ip {
        IpAddr::V4(a) => Ok(in_addr(a)),
        IpAddr::V6(_) => Err(Stop { step: "needs IPv4", errno: libc::EAFNOSUPPORT }),
    }
}

fn in_addr(a: Ipv4Addr) -> libc::in_addr {
    libc::in_addr { s_addr: u32::from_ne_bytes(a.octets()) }
}

fn v6(ip: IpAddr) -> Result<libc::in6_addr, Stop> {
    match ip {
        IpAddr::V6(a) => Ok(in6_addr(a)),
        IpAddr::V4(_) => Err(Stop { step: "needs IPv6", errno: libc::EAFNOSUPPORT }),
    }
}

fn in6_addr(a: Ipv6Addr) -> libc::in6_addr {
    libc::in6_addr { s6_addr: a.octets() }
}

fn own_v4() -> libc::in_addr {
    in_addr(mcp_sensor_tests::network::SERVER_V4)
}

fn level(ip: IpAddr) -> i32 {
    if ip.is_ipv4() { IPPROTO_IP } else { IPPROTO_IPV6 }
}

/// The membership ends with the socket, and a report that was not sent by then
/// never is.
fn hold(s: &OwnedFd) -> Tried {
    let _ = s;
    std::thread::sleep(std::time::Duration::from_millis(150));
    Ok(false)
}

fn mreq(t: &Target) -> Tried {
    let s = socket(libc::AF_INET, SOCK_DGRAM, 0)?;
    let m = libc::ip_mreq { imr_multiaddr: v4(t.to)?, imr_interface: own_v4() };
    set(&s, "IP_ADD_MEMBERSHIP", IPPROTO_IP, libc::IP_ADD_MEMBERSHIP, &m)?;
    hold(&s)
}

fn membership(t: &Target) -> Result<libc::ip_mreqn, Stop> {
    Ok(libc::ip_mreqn {
        imr_multiaddr: v4(t.to)?,
        imr_address: libc::in_addr { s_addr: 0 },
        imr_ifindex: link_index()?,
    })
}

fn mreqn(t: &Target) -> Tried {
    let s = socket(libc::AF_INET, SOCK_DGRAM, 0)?;
    set(&s, "IP_ADD_MEMBERSHIP", IPPROTO_IP, libc::IP_ADD_MEMBERSHIP, &membership(t)?)?;
    hold(&s)
}

fn mreq_on_v6(t: &Target) -> Tried {
    let s = socket(libc::AF_INET6, SOCK_DGRAM, 0)?;
    set(&s, "IP_ADD_MEMBERSHIP", IPPROTO_IP, libc::IP_ADD_MEMBERSHIP, &membership(t)?)?;
    hold(&s)
}

#[repr(C)]
struct GroupReq {
    interface: u32,
    group: libc::sockaddr_storage,
}

#[repr(C)]
struct GroupSourceReq {
    interface: u32,
    group: libc::sockaddr_storage,
    source: libc::sockaddr_storage,
}

fn storage(ip: IpAddr) -> libc::sockaddr_storage {
    raw(SocketAddr::new(ip, 0)).storage
}

fn join_group(s: &OwnedFd, t: &Target) -> Result<(), Stop> {
    let request = GroupReq { interface: link_index()? as u32, group: storage(t.to) };
    set(s, "MCAST_JOIN_GROUP", level(t.to), MCAST_JOIN_GROUP, &request)
}

fn group(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    join_group(&s, t)?;
    hold(&s)
}

fn group_on_stream(t: &Target) -> Tried {
    let s = socket_for(t.to, libc::SOCK_STREAM, 0)?;
    join_group(&s, t)?;
    hold(&s)
}

fn source_mreq(t: &Target) -> Tried {
    let s = socket(libc::AF_INET, SOCK_DGRAM, 0)?;
    let m = libc::ip_mreq_source {
        imr_multiaddr: v4(t.to)?,
        imr_interface: own_v4(),
        imr_sourceaddr: v4(t.via()?)?,
    };
    set(&s, "IP_ADD_SOURCE_MEMBERSHIP", IPPROTO_IP, libc::IP_ADD_SOURCE_MEMBERSHIP, &m)?;
    hold(&s)
}

fn source_group(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    let request =
        GroupSourceReq { interface: link_index()? as u32, group: storage(t.to), source: storage(t.via()?) };
    set(&s, "MCAST_JOIN_SOURCE_GROUP", level(t.to), MCAST_JOIN_SOURCE_GROUP, &request)?;
    hold(&s)
}

/// linux/in.h `ip_msfilter` with one source.
#[repr(C)]
struct IpMsfilter {
    group: libc::in_addr,
    interface: libc::in_addr,
    mode: u32,
    count: u32,
    source: libc::in_addr,
}

/// A filter goes with a membership, and each change of it is a report.
fn msfilter(t: &Target) -> Tried {
    let s = socket(libc::AF_INET, SOCK_DGRAM, 0)?;
    join_v4(&s, t)?;
    filter_v4(&s, t)
}

pub(crate) fn join_v4(s: &OwnedFd, t: &Target) -> Result<(), Stop> {
    let m = libc::ip_mreq { imr_multiaddr: v4(t.to)?, imr_interface: own_v4() };
    set(s, "IP_ADD_MEMBERSHIP", IPPROTO_IP, libc::IP_ADD_MEMBERSHIP, &m)
}

pub(crate) fn filter_v4(s: &OwnedFd, t: &Target) -> Tried {
    let filter = IpMsfilter {
        group: v4(t.to)?,
        interface: own_v4(),
        mode: MCAST_INCLUDE,
        count: 1,
        source: v4(t.via()?)?,
    };
    set(s, "IP_MSFILTER", IPPROTO_IP, IP_MSFILTER, &filter)?;
    hold(s)
}

/// linux/in.h `group_filter` with one source.
#[repr(C)]
struct GroupFilter {
    interface: u32,
    group: libc::sockaddr_storage,
    mode: u32,
    count: u32,
    source: libc::sockaddr_storage,
}

fn group_filter(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    join_group(&s, t)?;
    let filter = GroupFilter {
        interface: link_index()? as u32,
        group: storage(t.to),
        mode: MCAST_INCLUDE,
        count: 1,
        source: storage(t.via()?),
    };
    set(&s, "MCAST_MSFILTER", level(t.to), MCAST_MSFILTER, &filter)?;
    hold(&s)
}

fn ipv6(t: &Target) -> Tried {
    let s = socket(libc::AF_INET6, SOCK_DGRAM, 0)?;
    let m = libc::ipv6_mreq { ipv6mr_multiaddr: v6(t.to)?, ipv6mr_interface: link_index()? as u32 };
    set(&s, "IPV6_ADD_MEMBERSHIP", IPPROTO_IPV6, libc::IPV6_ADD_MEMBERSHIP, &m)?;
    hold(&s)
}

fn anycast(t: &Target) -> Tried {
    let s = socket(libc::AF_INET6, SOCK_DGRAM, 0)?;
    let m = libc::ipv6_mreq { ipv6mr_multiaddr: v6(t.to)?, ipv6mr_interface: link_index()? as u32 };
    set(&s, "IPV6_JOIN_ANYCAST", IPPROTO_IPV6, IPV6_JOIN_ANYCAST, &m)?;
    hold(&s)
}

fn raw_socket(t: &Target) -> Tried {
    let s = socket_for(t.to, libc::SOCK_RAW, 253)?;
    join_group(&s, t)?;
    hold(&s)
}
