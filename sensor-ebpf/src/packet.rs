//! Every packet of a labelled socket, both ways: the authority that nothing IP
//! gets past. Runs in softirq too, so it knows the socket, never the task.

use crate::address::self_rule;
use crate::kernel;
use crate::record::Task;
use crate::socket::{self, storage};
use crate::verdict::{self, Facts, Judged, judge};
use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{__sk_buff, bpf_sock, bpf_sock_tuple};
use aya_ebpf::helpers::generated::{
    bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sk_fullsock, bpf_sk_lookup_tcp, bpf_sk_lookup_udp,
    bpf_sk_release, bpf_skb_load_bytes,
};
use aya_ebpf::macros::{cgroup_skb, map};
use aya_ebpf::maps::LruHashMap;
use aya_ebpf::programs::SkBuffContext;
use core::ffi::c_void;
use core::mem::MaybeUninit;
use sensor_common::addr::Addr;
use sensor_common::label::Label;
use sensor_common::policy::{Decision, EGRESS, Flow, INBOUND, Reason};
use sensor_common::record::Hook;
use sensor_common::socket::{Peer, SOCKET_INBOUND, SOCKET_NAT_TRUSTED, Socket};
use sensor_common::{TCP, UDP};

/// A peer whose datagram an inbound rule let in may be answered. Losing an
/// entry closes, it never opens.
#[map]
static UDP_PEERS: LruHashMap<UdpPeer, u32> = LruHashMap::with_max_entries(16384, 0);

#[repr(C)]
#[derive(Clone, Copy)]
pub struct UdpPeer {
    cookie: u64,
    addr: Addr,
    port: u32,
    generation: u32,
}

const ALLOW: i32 = 1;
const TCP_LISTEN: u32 = 10;
const AF_INET: u32 = 2;

/// What the headers say. Addresses in the form of [`Addr`], ports in host order.
#[derive(Clone, Copy)]
struct Packet {
    source: Addr,
    destination: Addr,
    source_port: u16,
    destination_port: u16,
    protocol: u8,
    v6: bool,
    /// TCP: a SYN without ACK.
    opens: bool,
}

#[inline(always)]
fn load<const N: usize>(skb: *mut __sk_buff, offset: u32) -> Option<[u8; N]> {
    let mut bytes = MaybeUninit::<[u8; N]>::uninit();
    // SAFETY: the helper writes N bytes or fails.
    if unsafe { bpf_skb_load_bytes(skb.cast(), offset, bytes.as_mut_ptr().cast(), N as u32) } != 0 {
        return None;
    }
    // SAFETY: written in full.
    Some(unsafe { bytes.assume_init() })
}

#[inline(always)]
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Reads the headers; an `Err` is a packet that no plain socket makes.
#[inline(always)]
fn parse(skb: *mut __sk_buff) -> Result<Packet, Reason> {
    const ETH_P_IP: u32 = 0x0800u16.to_be() as u32;
    const ETH_P_IPV6: u32 = 0x86ddu16.to_be() as u32;
    // SAFETY: a field of the context.
    match unsafe { (*skb).protocol } {
        ETH_P_IP => {
            let h = load::<20>(skb, 0).ok_or(Reason::Malformed)?;
            if h[0] != 0x45 {
                return Err(if h[0] >> 4 == 4 { Reason::IpOptions } else { Reason::Malformed });
            }
            // More fragments, or an offset.
            if h[6] & 0x3f != 0 || h[7] != 0 {
                return Err(Reason::Fragment);
            }
            transport(skb, 20, h[9], Addr::v4(word(&h, 12)), Addr::v4(word(&h, 16)), false)
        }
        ETH_P_IPV6 => {
            let h = load::<40>(skb, 0).ok_or(Reason::Malformed)?;
            let at = |i: usize| Addr::v6([word(&h, i), word(&h, i + 4), word(&h, i + 8), word(&h, i + 12)]);
            match h[6] {
                0 | 43 | 60 | 135 | 139 | 140 => return Err(Reason::ExtensionHeader),
                44 => return Err(Reason::Fragment),
                _ => {}
            }
            transport(skb, 40, h[6], at(8), at(24), true)
        }
        _ => Err(Reason::Malformed),
    }
}

#[inline(always)]
fn transport(
    skb: *mut __sk_buff,
    offset: u32,
    protocol: u8,
    source: Addr,
    destination: Addr,
    v6: bool,
) -> Result<Packet, Reason> {
    if protocol != TCP && protocol != UDP {
        return Err(Reason::Protocol);
    }
    let ports = load::<4>(skb, offset).ok_or(Reason::Malformed)?;
    let mut opens = false;
    if protocol == TCP {
        let flags = load::<2>(skb, offset + 12).ok_or(Reason::Malformed)?;
        opens = flags[1] & 0x12 == 0x02;
    }
    Ok(Packet {
        source,
        destination,
        source_port: u16::from_be_bytes([ports[0], ports[1]]),
        destination_port: u16::from_be_bytes([ports[2], ports[3]]),
        protocol,
        v6,
        opens,
    })
}

#[cgroup_skb(egress)]
pub fn egress(ctx: SkBuffContext) -> i32 {
    labelled(ctx.as_ptr().cast(), Hook::Egress)
}

#[cgroup_skb(ingress)]
pub fn ingress(ctx: SkBuffContext) -> i32 {
    labelled(ctx.as_ptr().cast(), Hook::Ingress)
}

/// The part that every packet of the host pays for.
#[inline(always)]
fn labelled(skb: *mut __sk_buff, hook: Hook) -> i32 {
    // SAFETY: a field of the context.
    let sk = unsafe { (*skb).__bindgen_anon_2.sk };
    if sk.is_null() {
        return ALLOW;
    }
    // SAFETY: `sk` is not null.
    let sk = unsafe { bpf_sk_fullsock(sk) };
    if sk.is_null() {
        return ALLOW;
    }
    let mut stored = storage(sk);
    if stored.is_null() {
        let Some(label) = socket::inherited(skb.cast()) else {
            return ALLOW;
        };
        // SAFETY: `skb` is the program's context.
        let netns = unsafe { bpf_get_netns_cookie(skb.cast()) };
        stored = socket::adopt(sk, label, netns, Task { tgid: 0, tid: 0, uid: 0 });
        if stored.is_null() {
            return 0;
        }
    }
    judge_packet(skb, sk, stored, hook)
}

#[inline(always)]
fn judge_packet(skb: *mut __sk_buff, sk: *mut bpf_sock, stored: *mut Socket, hook: Hook) -> i32 {
    // SAFETY: the value lives as long as the socket.
    let s = unsafe { &mut *stored };
    let label = s.label;
    let outbound = matches!(hook, Hook::Egress);
    let packet = match parse(skb) {
        Ok(packet) => packet,
        Err(reason) => {
            let task = Task { tgid: s.tgid, tid: 0, uid: s.uid };
            return verdict::refuse(&Facts::of(label, hook, task), reason);
        }
    };
    // The far end and our own port, whichever way the packet goes.
    let (peer, peer_port, own_port) = if outbound {
        (packet.destination, packet.destination_port, packet.source_port)
    } else {
        (packet.source, packet.source_port, packet.destination_port)
    };
    let generation = kernel::generation();
    let now = Peer { addr: peer, port: peer_port, protocol: packet.protocol, valid: 1 };
    if s.cached_generation == generation && generation != 0 && s.cached == now {
        return ALLOW;
    }

    // SAFETY: fields of a full socket.
    let state = unsafe { (*sk).state };
    let listening = packet.protocol == TCP && state == TCP_LISTEN;
    let inbound = packet.protocol == TCP && (listening || s.flags & SOCKET_INBOUND != 0);
    let flow = Flow {
        direction: if inbound { INBOUND } else { EGRESS },
        protocol: packet.protocol,
        port: if inbound { own_port } else { peer_port },
        addr: peer,
        any_port: false,
    };
    let mut judged = judge(label, &flow);
    let mut record_allow = inbound && listening && packet.opens && !outbound;

    if !judged.decision.allows() && packet.protocol == UDP {
        record_allow = inbound_datagram(skb, &mut judged, label, &packet, outbound);
    }
    if !inbound && outbound {
        translated(sk, s, &mut judged, &packet);
    }
    if matches!(judged.decision.reason, Reason::NoRule | Reason::NoInboundRule)
        && peer.normalise().is_loopback()
        && let Some(rule) = self_rule(label)
        && peer_is_own(skb, &packet, outbound, label)
    {
        judged.decision = Decision { reason: Reason::SelfInstance, rule };
    }

    if judged.decision.allows() {
        if listening {
            s.flags |= SOCKET_INBOUND; // what accept() returns starts with it
        } else if packet.protocol == TCP {
            // One peer for the life of the connection; a datagram socket's
            // could be torn by two senders.
            s.cached_generation = generation;
            s.cached_rule = judged.decision.rule;
            s.cached = now;
        }
        if !record_allow {
            return ALLOW;
        }
    } else if listening && judged.audit {
        s.flags |= SOCKET_INBOUND;
    }

    let mut facts = Facts::of(label, hook, Task { tgid: s.tgid, tid: 0, uid: s.uid });
    let own_side = matches!(judged.decision.reason, Reason::NoInboundRule) || flow.direction == INBOUND;
    facts.key.addr = peer.0;
    facts.key.port = if own_side { own_port } else { peer_port };
    facts.key.protocol = packet.protocol;
    facts.other_port = if own_side { peer_port } else { own_port };
    facts.family = if packet.v6 { 10 } else { 2 };
    facts.netns = s.netns;
    // SAFETY: `skb` is the program's context.
    facts.cookie = unsafe { bpf_get_socket_cookie(skb.cast()) };
    verdict::conclude(&facts, &judged)
}

/// A datagram that no egress rule covers may be one that an inbound rule lets
/// in, or the answer to such a one. True: the first from this peer.
#[inline(always)]
fn inbound_datagram(
    skb: *mut __sk_buff,
    judged: &mut Judged,
    label: Label,
    packet: &Packet,
    outbound: bool,
) -> bool {
    // SAFETY: `skb` is the program's context.
    let cookie = unsafe { bpf_get_socket_cookie(skb.cast()) };
    let (addr, port, own_port) = if outbound {
        (packet.destination, packet.destination_port, packet.source_port)
    } else {
        (packet.source, packet.source_port, packet.destination_port)
    };
    let key = UdpPeer { cookie, addr, port: port as u32, generation: kernel::generation() };
    // SAFETY: the value is one word.
    let known = unsafe { UDP_PEERS.get(key) }.copied();
    if outbound {
        if let Some(rule) = known {
            judged.decision = Decision { reason: Reason::Reply, rule };
        }
        return false;
    }
    let flow = Flow { direction: INBOUND, protocol: UDP, port: own_port, addr, any_port: false };
    let by_rule = judge(label, &flow);
    if !by_rule.decision.allows() {
        return false;
    }
    judged.decision = by_rule.decision;
    if known.is_none() {
        let _ = UDP_PEERS.insert(key, by_rule.decision.rule, 0);
    }
    known.is_none()
}

/// A packet whose destination differs from its socket's peer was translated
/// (DNAT, kube-proxy, Docker's DNS). The peer approved before that decides, if
/// nobody in the instance can have made the translation; otherwise both must
/// be allowed.
#[inline(always)]
fn translated(sk: *mut bpf_sock, s: &Socket, judged: &mut Judged, packet: &Packet) {
    // SAFETY: fields of a full socket, one read each.
    let (family, dst_port) = unsafe { ((*sk).family, u16::from_be((&raw const (*sk).dst_port).read_volatile())) };
    let (addr, port) = if dst_port != 0 {
        // SAFETY: as above.
        let addr = unsafe {
            if family == AF_INET {
                Addr::v4((&raw const (*sk).dst_ip4).read_volatile())
            } else {
                let words = (&raw const (*sk).dst_ip6).cast::<u32>();
                let word = |i: usize| words.add(i).read_volatile();
                Addr::v6([word(0), word(1), word(2), word(3)])
            }
        };
        (addr, dst_port)
    } else if s.approved.valid != 0 && s.approved.protocol == packet.protocol {
        (s.approved.addr, s.approved.port)
    } else {
        return;
    };
    if addr.normalise() == packet.destination.normalise() && port == packet.destination_port {
        return;
    }
    if dst_port == 0 && judged.decision.allows() {
        return; // another thread's sendto in between: both were approved
    }
    let flow = Flow { direction: EGRESS, protocol: packet.protocol, port, addr, any_port: false };
    let original = judge(judged.label, &flow);
    if !original.decision.allows() {
        judged.decision = original.decision;
    } else if s.flags & SOCKET_NAT_TRUSTED != 0 && !judged.decision.allows() {
        judged.decision = Decision { reason: Reason::Translated, rule: original.decision.rule };
    }
}

#[inline(always)]
fn peer_is_own(skb: *mut __sk_buff, packet: &Packet, outbound: bool, label: Label) -> bool {
    // The socket that receives what goes from our end to the peer's.
    let (from, from_port, to, to_port) = if outbound {
        (packet.source, packet.source_port, packet.destination, packet.destination_port)
    } else {
        (packet.destination, packet.destination_port, packet.source, packet.source_port)
    };
    receiver_is_own(skb.cast(), from, from_port, to, to_port, packet.protocol, packet.v6, label)
}

/// At connect(): does a socket of the same instance listen there?
#[inline(always)]
pub(crate) fn listener_is_own(
    ctx: *mut c_void,
    addr: Addr,
    port: u16,
    protocol: u8,
    _v6: bool,
    label: Label,
) -> bool {
    receiver_is_own(ctx, addr, 0, addr, port, protocol, !addr.is_v4(), label)
}

#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "a tuple and its context, inlined")]
fn receiver_is_own(
    ctx: *mut c_void,
    from: Addr,
    from_port: u16,
    to: Addr,
    to_port: u16,
    protocol: u8,
    v6: bool,
    label: Label,
) -> bool {
    const CURRENT_NETNS: u64 = u64::MAX; // BPF_F_CURRENT_NETNS is -1
    // SAFETY: plain integers.
    let mut tuple: bpf_sock_tuple = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: writing the variant that the size names.
    let size = unsafe {
        if v6 {
            let t = &mut tuple.__bindgen_anon_1.ipv6;
            t.saddr = from.0;
            t.daddr = to.0;
            t.sport = from_port.to_be();
            t.dport = to_port.to_be();
            size_of_val(t) as u32
        } else {
            let t = &mut tuple.__bindgen_anon_1.ipv4;
            t.saddr = from.0[3];
            t.daddr = to.0[3];
            t.sport = from_port.to_be();
            t.dport = to_port.to_be();
            size_of_val(t) as u32
        }
    };
    // SAFETY: the tuple is on the stack; the reference is released below.
    unsafe {
        let other = if protocol == TCP {
            bpf_sk_lookup_tcp(ctx, &raw mut tuple, size, CURRENT_NETNS, 0)
        } else {
            bpf_sk_lookup_udp(ctx, &raw mut tuple, size, CURRENT_NETNS, 0)
        };
        if other.is_null() {
            return false;
        }
        let stored = storage(other);
        let own = !stored.is_null()
            && (*stored).label.instance() == label.instance()
            && (*stored).label.server() == label.server();
        bpf_sk_release(other.cast());
        own
    }
}
