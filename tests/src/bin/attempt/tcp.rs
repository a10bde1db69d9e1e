//! Streams.

use crate::Target;
use crate::wire::*;
use libc::{IPPROTO_MPTCP, IPPROTO_TCP, MSG_FASTOPEN, SOCK_STREAM};
use mcp_sensor_tests::report::PAYLOAD;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;

pub(crate) const ALL: &[(&str, Attempt)] = &[
    ("tcp-connect", plain),
    ("tcp-mapped", mapped_v4),
    ("tcp-fastopen", fastopen),
    ("tcp-fastopen-connect", fastopen_connect),
    ("mptcp-connect", mptcp),
    ("mptcp-fastopen", mptcp_fastopen),
    ("tcp-disconnect-connect", disconnect_then_connect),
    ("tcp-listen-connect", listener_then_connect),
    ("tcp-bound", bound),
    ("tcp-nonblocking", nonblocking),
    ("tcp-bindtodevice", bindtodevice),
    ("tcp-zerocopy", zerocopy),
];

/// `TCP_FASTOPEN_CONNECT` (linux/tcp.h).
const TCP_FASTOPEN_CONNECT: i32 = 30;

fn plain(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_STREAM, 0)?;
    connect(&s, t.address())?;
    exchange(&s)
}

fn mapped_v4(t: &Target) -> Tried {
    let s = socket(libc::AF_INET6, SOCK_STREAM, 0)?;
    connect(&s, mapped(t.address()))?;
    exchange(&s)
}

fn fastopen(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_STREAM, 0)?;
    sendto(&s, PAYLOAD, MSG_FASTOPEN, t.address())?;
    Ok(answered(&s))
}

fn fastopen_connect(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_STREAM, 0)?;
    set(&s, "TCP_FASTOPEN_CONNECT", IPPROTO_TCP, TCP_FASTOPEN_CONNECT, &1i32)?;
    connect(&s, t.address())?;
    exchange(&s)
}

fn mptcp(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_STREAM, IPPROTO_MPTCP)?;
    connect(&s, t.address())?;
    exchange(&s)
}

fn mptcp_fastopen(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_STREAM, IPPROTO_MPTCP)?;
    sendto(&s, PAYLOAD, MSG_FASTOPEN, t.address())?;
    Ok(answered(&s))
}

/// connect(AF_UNSPEC) clears the socket; then the real connect.
fn disconnect_then_connect(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_STREAM, 0)?;
    if let Some(first) = t.via {
        connect(&s, SocketAddr::new(first, t.port))?;
    }
    connect_raw(&s, &raw(t.address()).family(libc::AF_UNSPEC))
        .map_err(|e| Stop { step: "connect(AF_UNSPEC)", ..e })?;
    connect(&s, t.address())?;
    exchange(&s)
}

/// listen() without bind() takes a port; disconnected, it is a client.
fn listener_then_connect(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_STREAM, 0)?;
    // SAFETY: a plain system call.
    check("listen", unsafe { libc::listen(s.as_raw_fd(), 1) } as isize)?;
    connect_raw(&s, &raw(t.address()).family(libc::AF_UNSPEC))
        .map_err(|e| Stop { step: "connect(AF_UNSPEC)", ..e })?;
    connect(&s, t.address())?;
    exchange(&s)
}

fn bound(t: &Target) -> Tried {
    let any: IpAddr =
        if t.to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let s = socket_for(t.to, SOCK_STREAM, 0)?;
    bind(&s, SocketAddr::new(any, 0))?;
    connect(&s, t.address())?;
    exchange(&s)
}

fn nonblocking(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_STREAM | libc::SOCK_NONBLOCK, 0)?;
    match connect(&s, t.address()) {
        Err(Stop { errno: libc::EINPROGRESS, .. }) | Ok(()) => {}
        Err(e) => return Err(e),
    }
    let mut poll = libc::pollfd { fd: s.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one valid pollfd.
    if unsafe { libc::poll(&mut poll, 1, 2000) } != 1 {
        return Err(Stop { step: "poll", errno: libc::ETIMEDOUT });
    }
    exchange(&s)
}

fn bindtodevice(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_STREAM, 0)?;
    let link = mcp_sensor_tests::network::LINK.as_bytes();
    set_bytes(&s, "SO_BINDTODEVICE", libc::SOL_SOCKET, libc::SO_BINDTODEVICE, link)?;
    connect(&s, t.address())?;
    exchange(&s)
}

fn zerocopy(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_STREAM, 0)?;
    set(&s, "SO_ZEROCOPY", libc::SOL_SOCKET, libc::SO_ZEROCOPY, &1i32)?;
    connect(&s, t.address())?;
    send(&s, &[b'z'; 16384], libc::MSG_ZEROCOPY)?;
    Ok(answered(&s))
}
