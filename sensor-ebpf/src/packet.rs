//! Every packet of a labelled socket, both ways: the authority that nothing IP
//! gets past. Runs in softirq too, so it knows the socket, never the task.

use crate::handover::{HELLO, QUERY, hand_over, received};
use crate::record::Task;
use crate::socket::{self, storage};
use crate::verdict::{self, Facts, Judged, judge, judge_by_address};
use crate::{dns, kernel, label as labels, listener, traffic};
use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{__sk_buff, bpf_sock, bpf_sock_tuple};
use aya_ebpf::helpers::generated::{
    bpf_get_socket_cookie, bpf_sk_fullsock, bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release,
    bpf_skb_load_bytes,
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
use sensor_common::socket::{
    Peer, SOCKET_HELLO, SOCKET_INBOUND, SOCKET_NAT_TRUSTED, SOCKET_SNI, Socket, Tuple,
};
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

pub(crate) const ALLOW: i32 = 1;
pub(crate) const TCP_LISTEN: u32 = 10;
const AF_INET: u32 = 2;

/// What the headers say. Addresses in the form of [`Addr`], ports in host order.
#[derive(Clone, Copy)]
pub(crate) struct Packet {
    pub source: Addr,
    pub destination: Addr,
    pub source_port: u16,
    pub destination_port: u16,
    /// Where the payload begins.
    pub payload: u32,
    pub protocol: u8,
    pub v6: bool,
    /// TCP: a SYN without ACK.
    opens: bool,
    /// TCP: a RST.
    pub resets: bool,
}

/// Reads the headers into `packet`. `false`: no plain socket makes such a
/// packet, `reason` says why. Out of line, and in words of one buffer, to keep
/// the stack small.
#[inline(never)]
pub(crate) fn parse(skb: *mut __sk_buff, packet: &mut Packet, reason: &mut Reason) -> bool {
    const ETH_P_IP: u32 = 0x0800u16.to_be() as u32;
    const ETH_P_IPV6: u32 = 0x86ddu16.to_be() as u32;
    let mut h = MaybeUninit::<[u32; 10]>::uninit();
    let words: *mut u32 = h.as_mut_ptr().cast();
    // SAFETY: the helper writes as many bytes as it is told or
    // fails; only those are read.
    unsafe {
        let load = |at: u32, len: u32| bpf_skb_load_bytes(skb.cast(), at, words.cast(), len) == 0;
        let word = |i: usize| words.add(i).read();
        let byte = |i: usize| words.cast::<u8>().add(i).read();
        let transport = match (*skb).protocol {
            ETH_P_IP => {
                if !load(0, 20) {
                    return false;
                }
                if byte(0) != 0x45 {
                    *reason = if byte(0) >> 4 == 4 { Reason::IpOptions } else { Reason::Malformed };
                    return false;
                }
                // More fragments, or an offset.
                if byte(6) & 0x3f != 0 || byte(7) != 0 {
                    *reason = Reason::Fragment;
                    return false;
                }
                packet.protocol = byte(9);
                packet.source = Addr::v4(word(3));
                packet.destination = Addr::v4(word(4));
                packet.v6 = false;
                20
            }
            ETH_P_IPV6 => {
                if !load(0, 40) {
                    return false;
                }
                packet.protocol = byte(6);
                packet.source = Addr::v6([word(2), word(3), word(4), word(5)]);
                packet.destination = Addr::v6([word(6), word(7), word(8), word(9)]);
                packet.v6 = true;
                40
            }
            _ => return false,
        };
        if packet.protocol != TCP && packet.protocol != UDP {
            *reason = match (packet.v6, packet.protocol) {
                // Hop-by-hop, routing, destination options, mobility, HIP, shim6.
                (true, 0 | 43 | 60 | 135 | 139 | 140) => Reason::ExtensionHeader,
                (true, 44) => Reason::Fragment,
                _ => Reason::Protocol,
            };
            return false;
        }
        if !load(transport, 4) {
            return false;
        }
        packet.source_port = (byte(0) as u16) << 8 | byte(1) as u16;
        packet.destination_port = (byte(2) as u16) << 8 | byte(3) as u16;
        packet.payload = transport + 8;
        if packet.protocol == TCP {
            if !load(transport + 12, 2) {
                return false;
            }
            packet.payload = transport + (byte(0) >> 4) as u32 * 4;
            packet.opens = byte(1) & 0x12 == 0x02;
            packet.resets = byte(1) & 0x04 != 0;
        }
    }
    true
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
        let mut is_heir = false;
        stored = heir(skb, sk, matches!(hook, Hook::Egress), &mut is_heir);
        if stored.is_null() {
            if is_heir {
                return 0;
            }
            listener::passes(skb, sk, matches!(hook, Hook::Egress));
            return ALLOW;
        }
    }
    judge_packet(skb, sk, stored, hook)
}

/// Labels a socket that its task held when it was labelled, or that waited in
/// an accept queue then. Null: it is neither, or could not be. Out of line, to
/// keep the caller's stack small.
#[inline(never)]
fn heir(skb: *mut __sk_buff, sk: *mut bpf_sock, outbound: bool, is_heir: &mut bool) -> *mut Socket {
    let mut from_queue = false;
    let label = match socket::inherited(skb.cast()) {
        Some(label) => label,
        None => match queued(skb, outbound) {
            Some(label) => {
                from_queue = true;
                label
            }
            None => return core::ptr::null_mut(),
        },
    };
    *is_heir = true;
    // Its namespace: before Linux 6.13 this hook may not ask.
    let stored = socket::adopt(sk, label, 0, Task { tgid: 0, tid: 0, uid: 0 });
    if !stored.is_null() && from_queue {
        // SAFETY: not null; the value lives as long as the socket.
        unsafe { (*stored).flags |= SOCKET_INBOUND };
    }
    stored
}

#[inline(always)]
fn judge_packet(skb: *mut __sk_buff, sk: *mut bpf_sock, stored: *mut Socket, hook: Hook) -> i32 {
    // SAFETY: the value lives as long as the socket.
    let s = unsafe { &mut *stored };
    let label = s.label;
    let outbound = matches!(hook, Hook::Egress);
    let mut packet = EMPTY;
    let mut reason = Reason::Malformed;
    if !parse(skb, &mut packet, &mut reason) {
        let judged = Judged::flat(label, reason, verdict::in_audit(label));
        return conclude(skb, s, &packet, &judged, outbound as u32 | OUTSIDE);
    }
    // The far end and our own port, whichever way the packet goes.
    let (peer, peer_port, own_port) = if outbound {
        (packet.destination, packet.destination_port, packet.source_port)
    } else {
        (packet.source, packet.source_port, packet.destination_port)
    };
    let generation = kernel::generation();
    let now = Peer { addr: peer, port: peer_port, protocol: packet.protocol, valid: 1 };
    if s.cached_generation == generation && generation != 0 && s.cached == now && !labels::quarantined(label)
    {
        traffic::count(skb, sk, &packet, outbound);
        if !outbound || s.flags & SOCKET_SNI == 0 {
            return ALLOW;
        }
        let judged = Judged::flat(label, Reason::Rule, verdict::in_audit(label));
        return hand_over(skb, HELLO, &packet, &judged);
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
    if !listening {
        traffic::count(skb, sk, &packet, outbound);
    }
    let mut judged = judge(label, &flow, s.netns);
    let mut record_allow = inbound && listening && packet.opens && !outbound;

    // Nothing that was allowed before lifts a quarantine.
    let contained = matches!(judged.decision.reason, Reason::Quarantined);
    if !judged.decision.allows() && packet.protocol == UDP && !contained {
        record_allow = inbound_datagram(skb, sk, &mut judged, &packet, outbound);
    }
    if !inbound && outbound && !contained {
        translated(sk, s, &mut judged, &mut packet);
    }
    if matches!(judged.decision.reason, Reason::NameExpired) && !packet.opens && s.cached == now {
        // What began in time goes on.
        judged.decision = Decision { reason: Reason::Rule, ..judged.decision };
    }
    if !inbound && outbound && packet.destination_port == dns::PORT && reads_query(&judged) {
        return hand_over(skb, QUERY, &packet, &judged);
    }
    if judged.self_rule != 0 && !judged.decision.allows() && peer_is_own(skb.cast(), &packet, outbound, label)
    {
        judged.decision = Decision::by_rule(Reason::SelfInstance, judged.self_rule);
    }

    if judged.decision.allows() {
        if listening {
            // What accept() returns starts with a copy of this.
            s.flags |= SOCKET_INBOUND;
            s.cached.valid = 0;
        } else if packet.protocol == TCP {
            // One peer for the life of the connection; a datagram socket's
            // could be torn by two senders.
            if !matches!(judged.decision.reason, Reason::Resolver) {
                s.cached_generation = generation;
                s.cached = now;
            }
            // A new connection of the socket's says its own hello.
            let kept = !(SOCKET_SNI | if packet.opens { SOCKET_HELLO } else { 0 });
            s.flags = s.flags & kept | if judged.decision.sni { SOCKET_SNI } else { 0 };
        }
        if outbound && judged.decision.sni {
            return hand_over(skb, HELLO, &packet, &judged);
        }
        if !record_allow {
            return if outbound { ALLOW } else { received(skb, &packet, &judged) };
        }
    } else if listening && judged.audit {
        s.flags |= SOCKET_INBOUND;
    }

    let own_side = matches!(judged.decision.reason, Reason::NoInboundRule) || flow.direction == INBOUND;
    let verdict = conclude(skb, s, &packet, &judged, outbound as u32 | if own_side { OWN_SIDE } else { 0 });
    if verdict == ALLOW && !outbound { received(skb, &packet, &judged) } else { verdict }
}

/// A query is read where it decides, and where its name is worth knowing.
#[inline(always)]
fn reads_query(judged: &Judged) -> bool {
    match judged.decision.reason {
        Reason::Resolver | Reason::ForeignResolver | Reason::Unrestricted => true,
        reason => judged.audit && !reason.allows(),
    }
}

pub(crate) const EMPTY: Packet = Packet {
    source: Addr([0; 4]),
    destination: Addr([0; 4]),
    source_port: 0,
    destination_port: 0,
    payload: 0,
    protocol: 0,
    v6: false,
    opens: false,
    resets: false,
};

/// Flags of [`conclude`]; bit 0 is "outbound".
const OUTBOUND: u32 = 1;
/// The record's port is our own (inbound rules), not the peer's.
const OWN_SIDE: u32 = 2;
/// Nothing of the packet is known.
const OUTSIDE: u32 = 4;

#[inline(never)]
fn conclude(skb: *mut __sk_buff, s: &Socket, packet: &Packet, judged: &Judged, flags: u32) -> i32 {
    let hook = if flags & OUTBOUND != 0 { Hook::Egress } else { Hook::Ingress };
    let mut facts = Facts::of(judged.label, hook, Task { tgid: s.tgid, tid: 0, uid: s.uid });
    facts.netns = s.netns;
    // SAFETY: `skb` is the program's context.
    facts.cookie = unsafe { bpf_get_socket_cookie(skb.cast()) };
    if flags & OUTSIDE == 0 {
        let (peer, peer_port, own_port) = if flags & OUTBOUND != 0 {
            (&packet.destination, packet.destination_port, packet.source_port)
        } else {
            (&packet.source, packet.source_port, packet.destination_port)
        };
        let own_side = flags & OWN_SIDE != 0;
        facts.key.addr = peer.0;
        facts.key.port = if own_side { own_port } else { peer_port };
        facts.key.protocol = packet.protocol;
        facts.other_port = if own_side { peer_port } else { own_port };
        facts.family = if packet.v6 { 10 } else { 2 };
    }
    let verdict = verdict::conclude_packet(&mut facts, judged);
    if verdict != ALLOW && flags & OUTSIDE == 0 {
        traffic::denied(skb, flags & OUTBOUND != 0);
    }
    verdict
}

/// The label of a connection that waited in an accept queue when its listener
/// was labelled.
#[inline(always)]
fn queued(skb: *mut __sk_buff, outbound: bool) -> Option<Label> {
    if kernel::state()?.queued == 0 {
        return None;
    }
    let mut packet = EMPTY;
    let mut reason = Reason::Malformed;
    if !parse(skb, &mut packet, &mut reason) || packet.protocol != TCP {
        return None;
    }
    let (local, local_port, remote, remote_port) = if outbound {
        (packet.source, packet.source_port, packet.destination, packet.destination_port)
    } else {
        (packet.destination, packet.destination_port, packet.source, packet.source_port)
    };
    socket::queued(&Tuple {
        local: local.0,
        remote: remote.0,
        local_port: local_port as u32,
        remote_port: remote_port as u32,
    })
}

/// The inbound rule that let this peer in, if one did: it may be answered.
#[inline(always)]
pub(crate) fn answers(cookie: u64, flow: &Flow) -> Option<u32> {
    let key = UdpPeer { cookie, addr: flow.addr, port: flow.port as u32, generation: kernel::generation() };
    // SAFETY: the value is one word.
    unsafe { UDP_PEERS.get(key) }.copied()
}

/// A datagram that no egress rule covers may be one that an inbound rule lets
/// in, or the answer to such a one. True: the first from this peer.
#[inline(never)]
fn inbound_datagram(
    skb: *mut __sk_buff,
    sk: *mut bpf_sock,
    judged: &mut Judged,
    packet: &Packet,
    outbound: bool,
) -> bool {
    let label = judged.label;
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
            judged.decision = Decision::by_rule(Reason::Reply, rule);
        }
        return false;
    }
    let flow = Flow { direction: INBOUND, protocol: UDP, port: own_port, addr, any_port: false };
    let by_rule = judge_by_address(label, &flow);
    if !by_rule.decision.allows() {
        // SAFETY: a field of a full socket.
        if unsafe { (&raw const (*sk).dst_port).read_volatile() } == 0 {
            judged.decision = by_rule.decision; // a stranger, not an answer
        }
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
#[inline(never)]
fn translated(sk: *mut bpf_sock, s: &Socket, judged: &mut Judged, packet: &mut Packet) {
    // SAFETY: fields of a full socket. All are read before any is chosen: a
    // chosen offset would be arithmetic on a socket pointer.
    let (family, dst_port, v4, v6) = unsafe {
        let words = (&raw const (*sk).dst_ip6).cast::<u32>();
        let word = |i: usize| words.add(i).read_volatile();
        (
            (*sk).family,
            u16::from_be((&raw const (*sk).dst_port).read_volatile()),
            (&raw const (*sk).dst_ip4).read_volatile(),
            [word(0), word(1), word(2), word(3)],
        )
    };
    let (addr, port) = if dst_port != 0 {
        (if family == AF_INET { Addr::v4(v4) } else { Addr::v6(v6) }, dst_port)
    } else if s.approved.valid != 0 && s.approved.protocol == packet.protocol {
        (s.approved.addr, s.approved.port)
    } else {
        return;
    };
    if addr == packet.destination && port == packet.destination_port {
        return;
    }
    if dst_port == 0 && judged.decision.allows() {
        return; // another thread's sendto in between: both were approved
    }
    let flow = Flow { direction: EGRESS, protocol: packet.protocol, port, addr, any_port: false };
    let original = judge(judged.label, &flow, s.netns);
    if !original.decision.allows() {
        judged.decision = original.decision;
    } else if matches!(original.decision.reason, Reason::Resolver) {
        // Read as what it was sent as, or nothing would be learned.
        if s.flags & SOCKET_NAT_TRUSTED != 0 || judged.decision.allows() {
            judged.decision = original.decision;
            (packet.destination, packet.destination_port) = (addr, port);
        }
    } else if s.flags & SOCKET_NAT_TRUSTED != 0 && !judged.decision.allows() {
        judged.decision = Decision { reason: Reason::Translated, ..original.decision };
    }
}

/// At connect() and sendmsg(): does a socket of the same instance take what is
/// sent there?
#[inline(never)]
pub(crate) fn destination_is_own(ctx: *mut c_void, flow: &Flow, label: Label) -> bool {
    let addr = flow.addr.normalise();
    let packet = Packet {
        source: addr,
        destination: addr,
        source_port: 0,
        destination_port: flow.port,
        payload: 0,
        protocol: flow.protocol,
        v6: !addr.is_v4(),
        resets: false,
        opens: false,
    };
    peer_is_own(ctx, &packet, true, label)
}

/// Does the socket at the far end belong to the same instance? It is the one
/// that receives what goes from our end to the peer's.
#[inline(never)]
fn peer_is_own(ctx: *mut c_void, packet: &Packet, outbound: bool, label: Label) -> bool {
    const CURRENT_NETNS: u64 = u64::MAX; // BPF_F_CURRENT_NETNS is -1
    let (from, from_port, to, to_port) = if outbound {
        (&packet.source, packet.source_port, &packet.destination, packet.destination_port)
    } else {
        (&packet.destination, packet.destination_port, &packet.source, packet.source_port)
    };
    let mut tuple = MaybeUninit::<bpf_sock_tuple>::uninit();
    let tuple = tuple.as_mut_ptr();
    // SAFETY: writing all of the variant that the size names.
    let size = unsafe {
        if packet.v6 {
            let t = &mut (*tuple).__bindgen_anon_1.ipv6;
            t.saddr = from.0;
            t.daddr = to.0;
            t.sport = from_port.to_be();
            t.dport = to_port.to_be();
            size_of_val(t) as u32
        } else {
            let t = &mut (*tuple).__bindgen_anon_1.ipv4;
            t.saddr = from.0[3];
            t.daddr = to.0[3];
            t.sport = from_port.to_be();
            t.dport = to_port.to_be();
            size_of_val(t) as u32
        }
    };
    // SAFETY: the tuple is on the stack; the reference is released below.
    unsafe {
        let other = if packet.protocol == TCP {
            bpf_sk_lookup_tcp(ctx, tuple, size, CURRENT_NETNS, 0)
        } else {
            bpf_sk_lookup_udp(ctx, tuple, size, CURRENT_NETNS, 0)
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
