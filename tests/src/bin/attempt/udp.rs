//! Datagrams.

use crate::Target;
use crate::wire::*;
use libc::{SOCK_DGRAM, SOL_SOCKET};
use mcp_sensor_tests::peer::IPPROTO_UDPLITE;
use mcp_sensor_tests::report::PAYLOAD;
use std::os::fd::AsRawFd;

pub(crate) const ALL: &[(&str, Attempt)] = &[
    ("udp-connect-send", connected),
    ("udp-sendto", unconnected),
    ("udp-burst", burst),
    ("udp-sendmsg", message),
    ("udp-sendmmsg", messages),
    ("udp-sendmmsg-two", two_messages),
    ("udp-race", race),
    ("udp-unspec", unspec_sockaddr),
    ("udp-mapped", mapped_v4),
    ("udp-inet-on-v6", inet_sockaddr_on_v6),
    ("udplite-connect-send", lite_connected),
    ("udplite-sendto", lite_unconnected),
    ("udp-segment", segment),
    ("udp-zerocopy", zerocopy),
    ("udp-more", more),
    ("udp-large", large),
    ("udp-broadcast", broadcast),
    ("udp-bindtodevice", bindtodevice),
    ("udp-reconnect", reconnect),
    ("udp-connected-sendto", connected_sendto),
    ("udp-multicast", multicast),
    ("udp-splice", splice_in),
];

pub(crate) const SOL_UDP: i32 = 17;
pub(crate) const UDP_SEGMENT: i32 = 103;

fn connected(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    connect(&s, t.address())?;
    exchange(&s)
}

fn unconnected(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    sendto(&s, PAYLOAD, 0, t.address())?;
    Ok(answered(&s))
}

/// For many processes: does not wait for an answer.
fn burst(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    sendto(&s, PAYLOAD, 0, t.address())?;
    Ok(false)
}

fn message(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    Message::new(PAYLOAD, Some(t.address()), Vec::new()).send(&s, 0)?;
    Ok(answered(&s))
}

fn messages(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    let one = Message::new(PAYLOAD, Some(t.address()), Vec::new());
    let two = Message::new(PAYLOAD, Some(t.address()), Vec::new());
    let mut both = [
        libc::mmsghdr { msg_hdr: one.header, msg_len: 0 },
        libc::mmsghdr { msg_hdr: two.header, msg_len: 0 },
    ];
    // SAFETY: two headers whose targets live until the end of the function.
    check("sendmmsg", unsafe { libc::sendmmsg(s.as_raw_fd(), both.as_mut_ptr(), 2, 0) } as isize)?;
    Ok(answered(&s))
}

/// One call, two peers: `to` and `via`. How many left is the answer.
fn two_messages(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    let second = std::net::SocketAddr::new(t.via()?, t.port);
    let one = Message::new(PAYLOAD, Some(t.address()), Vec::new());
    let two = Message::new(PAYLOAD, Some(second), Vec::new());
    let mut both = [
        libc::mmsghdr { msg_hdr: one.header, msg_len: 0 },
        libc::mmsghdr { msg_hdr: two.header, msg_len: 0 },
    ];
    // SAFETY: two headers whose targets live until the end of the function.
    let n = check("sendmmsg", unsafe { libc::sendmmsg(s.as_raw_fd(), both.as_mut_ptr(), 2, 0) } as isize)?;
    Ok(n == 2)
}

/// Two threads on one socket, one to `to`, one to `via`, as fast as they can.
fn race(t: &Target) -> Tried {
    const ROUNDS: usize = 3000;
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    let (first, second) = (t.address(), std::net::SocketAddr::new(t.via()?, t.port));
    std::thread::scope(|scope| {
        for to in [first, second] {
            let s = &s;
            scope.spawn(move || {
                for _ in 0..ROUNDS {
                    let _ = sendto(s, PAYLOAD, 0, to);
                }
            });
        }
        // And a third that keeps changing the socket's own peer.
        scope.spawn(|| {
            for _ in 0..ROUNDS {
                let _ = connect(&s, first);
                let _ = send(&s, PAYLOAD, 0);
                let _ = connect(&s, second);
                let _ = send(&s, PAYLOAD, 0);
                let _ = connect_raw(&s, &raw(first).family(libc::AF_UNSPEC));
            }
        });
    });
    Ok(false)
}

/// An IPv4 socket takes AF_UNSPEC for AF_INET; an IPv6 socket takes it for
/// "the connected peer".
fn unspec_sockaddr(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    if t.to.is_ipv6() {
        connect(&s, t.address())?;
    }
    sendto_raw(&s, PAYLOAD, 0, &raw(t.address()).family(libc::AF_UNSPEC))?;
    Ok(answered(&s))
}

fn mapped_v4(t: &Target) -> Tried {
    let s = socket(libc::AF_INET6, SOCK_DGRAM, 0)?;
    sendto(&s, PAYLOAD, 0, mapped(t.address()))?;
    Ok(answered(&s))
}

fn inet_sockaddr_on_v6(t: &Target) -> Tried {
    let s = socket(libc::AF_INET6, SOCK_DGRAM, 0)?;
    sendto(&s, PAYLOAD, 0, t.address())?;
    Ok(answered(&s))
}

fn lite_connected(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, IPPROTO_UDPLITE)?;
    connect(&s, t.address())?;
    exchange(&s)
}

fn lite_unconnected(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, IPPROTO_UDPLITE)?;
    sendto(&s, PAYLOAD, 0, t.address())?;
    Ok(answered(&s))
}

/// One skb that becomes several datagrams.
fn segment(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    set(&s, "UDP_SEGMENT", SOL_UDP, UDP_SEGMENT, &500i32)?;
    sendto(&s, &[b's'; 3000], 0, t.address())?;
    Ok(answered(&s))
}

fn zerocopy(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    set(&s, "SO_ZEROCOPY", SOL_SOCKET, libc::SO_ZEROCOPY, &1i32)?;
    connect(&s, t.address())?;
    send(&s, &[b'z'; 1200], libc::MSG_ZEROCOPY)?;
    Ok(answered(&s))
}

/// The datagram leaves with the second call.
fn more(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    sendto(&s, PAYLOAD, libc::MSG_MORE, t.address())?;
    sendto(&s, PAYLOAD, 0, t.address())?;
    Ok(answered(&s))
}

/// Larger than the link: leaves in fragments.
fn large(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    sendto(&s, &[b'f'; 6000], 0, t.address())?;
    Ok(answered(&s))
}

fn broadcast(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    set(&s, "SO_BROADCAST", SOL_SOCKET, libc::SO_BROADCAST, &1i32)?;
    sendto(&s, PAYLOAD, 0, t.address())?;
    Ok(answered(&s))
}

fn bindtodevice(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    let link = mcp_sensor_tests::network::LINK.as_bytes();
    set_bytes(&s, "SO_BINDTODEVICE", SOL_SOCKET, libc::SO_BINDTODEVICE, link)?;
    sendto(&s, PAYLOAD, 0, t.address())?;
    Ok(answered(&s))
}

/// Connected to `via` first, then cleared, then to the target.
fn reconnect(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    connect(&s, std::net::SocketAddr::new(t.via.unwrap_or(t.to), t.port))?;
    connect_raw(&s, &raw(t.address()).family(libc::AF_UNSPEC))
        .map_err(|e| Stop { step: "connect(AF_UNSPEC)", ..e })?;
    connect(&s, t.address())?;
    exchange(&s)
}

/// Connected to `via`, but this datagram names another peer.
fn connected_sendto(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    connect(&s, std::net::SocketAddr::new(t.via.unwrap_or(t.to), t.port))?;
    sendto(&s, PAYLOAD, 0, t.address())?;
    Ok(answered(&s))
}

fn multicast(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    let link = link_index()?;
    if t.to.is_ipv6() {
        set(&s, "IPV6_MULTICAST_IF", libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_IF, &link)?;
    } else {
        let which = libc::ip_mreqn {
            imr_multiaddr: libc::in_addr { s_addr: 0 },
            imr_address: libc::in_addr { s_addr: 0 },
            imr_ifindex: link,
        };
        set(&s, "IP_MULTICAST_IF", libc::IPPROTO_IP, libc::IP_MULTICAST_IF, &which)?;
    }
    sendto(&s, PAYLOAD, 0, t.address())?;
    Ok(true)
}

/// Bytes moved into the socket by splice(), not by a send call.
fn splice_in(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    connect(&s, t.address())?;
    let (read, write) = nix::unistd::pipe().map_err(|e| Stop { step: "pipe", errno: e as i32 })?;
    nix::unistd::write(&write, PAYLOAD).map_err(|e| Stop { step: "write", errno: e as i32 })?;
    let none = std::ptr::null_mut();
    // SAFETY: both descriptors are open and no offsets are passed.
    let n = unsafe { libc::splice(read.as_raw_fd(), none, s.as_raw_fd(), none, PAYLOAD.len(), 0) };
    check("splice", n)?;
    Ok(answered(&s))
}

pub(crate) fn link_index() -> Result<i32, Stop> {
    let index = nix::net::if_::if_nametoindex(mcp_sensor_tests::network::LINK);
    index.map(|i| i as i32).map_err(|e| Stop { step: "if_nametoindex", errno: e as i32 })
}
