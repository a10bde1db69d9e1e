//! What a server's connections moved: counted by the packet hooks, told when the
//! socket is closed.

use crate::packet::Packet;
use crate::record::{self, Task};
use crate::socket::{self, Storage};
use crate::verdict::take_token;
use crate::{atomic, stdio};
use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{__sk_buff, bpf_sock};
use aya_ebpf::helpers::generated::{
    bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_boot_ns, bpf_sk_fullsock,
};
use aya_ebpf::macros::cgroup_sock;
use aya_ebpf::programs::SockContext;
use sensor_common::record::{KIND_RELEASED, RING_TELEMETRY, Released};
use sensor_common::socket::{Peer, Traffic};

/// BPF_F_NO_PREALLOC, which the type demands.
#[unsafe(link_section = ".maps")]
#[unsafe(export_name = "TRAFFIC")]
static TRAFFIC: Storage<Traffic, 1> = Storage::new();

/// A packet, before its verdict: where names are read, another program says that.
#[inline(always)]
pub(crate) fn count(skb: *mut __sk_buff, sk: *mut bpf_sock, packet: &Packet, outbound: bool) {
    // SAFETY: a field of the context.
    let bytes = unsafe { (*skb).len } as u64;
    let traffic = TRAFFIC.get_or_zeroed(sk);
    if traffic.is_null() {
        return;
    }
    // SAFETY: not null; the value lives as long as the socket.
    let traffic = unsafe { &mut *traffic };
    if traffic.started == 0 {
        // SAFETY: no preconditions.
        traffic.started = unsafe { bpf_ktime_get_boot_ns() };
        // An accepted socket has its cookie from here on, by which `stdio` knows
        // it.
        // SAFETY: `skb` is the program's context.
        unsafe { bpf_get_socket_cookie(skb.cast()) };
        let end = |addr, port| Peer { addr, port, protocol: packet.protocol, valid: 1 };
        let source = end(packet.source, packet.source_port);
        let destination = end(packet.destination, packet.destination_port);
        (traffic.local, traffic.remote) =
            if outbound { (source, destination) } else { (destination, source) };
    }
    if outbound {
        atomic::add(&raw mut traffic.sent_bytes, bytes);
        atomic::add(&raw mut traffic.sent_packets, 1);
    } else {
        atomic::add(&raw mut traffic.received_bytes, bytes);
        atomic::add(&raw mut traffic.received_packets, 1);
    }
    if packet.resets {
        traffic.reset = 1;
    }
}

/// A packet that was counted is dropped.
#[inline(always)]
pub(crate) fn denied(skb: *mut __sk_buff, outbound: bool) {
    // SAFETY: fields of the context.
    let (bytes, sk) = unsafe { ((*skb).len as u64, (*skb).__bindgen_anon_2.sk) };
    if sk.is_null() {
        return;
    }
    // SAFETY: `sk` is not null.
    let sk = unsafe { bpf_sk_fullsock(sk) };
    if sk.is_null() {
        return;
    }
    let traffic = TRAFFIC.get(sk);
    if traffic.is_null() {
        return;
    }
    // SAFETY: not null; the value lives as long as the socket.
    let traffic = unsafe { &mut *traffic };
    if outbound {
        atomic::add(&raw mut traffic.sent_bytes, bytes.wrapping_neg());
        atomic::add(&raw mut traffic.sent_packets, u64::MAX);
    } else {
        atomic::add(&raw mut traffic.received_bytes, bytes.wrapping_neg());
        atomic::add(&raw mut traffic.received_packets, u64::MAX);
    }
    atomic::add(&raw mut traffic.denied, 1);
}

/// cgroup/sock_release: the last descriptor is gone (net/ipv4/af_inet.c,
/// `inet_release`). What still waits to be sent is not counted any more.
#[cgroup_sock(sock_release)]
pub fn released(ctx: SockContext) -> i32 {
    let traffic = TRAFFIC.get(ctx.sock);
    if traffic.is_null() {
        return 1;
    }
    let stored = socket::storage(ctx.sock);
    if stored.is_null() {
        return 1;
    }
    // SAFETY: `ctx` is the program's context.
    let (netns, cookie) =
        unsafe { (bpf_get_netns_cookie(ctx.as_ptr()), bpf_get_socket_cookie(ctx.as_ptr())) };
    stdio::closed(cookie);
    // SAFETY: neither is null; the values live as long as the socket.
    let (s, traffic) = unsafe { (&*stored, &*traffic) };
    if !take_token(s.label, false) {
        return 1;
    }
    record::emit_of::<Released>(RING_TELEMETRY, KIND_RELEASED, s.label, Task::current(), |r| {
        r.netns = netns;
        r.cookie = cookie;
        r.traffic = *traffic;
        r.flags = s.flags;
        r.tgid = s.tgid;
    });
    1
}
