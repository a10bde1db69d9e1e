//! connect(), sendmsg() and bind(): the fast, clean EPERM before anything is
//! sent. What gets past them is judged again as packets.

use crate::record::Task;
use crate::socket::{self, storage};
use crate::verdict::{self, Facts, Judged, judge, judge_by_address};
use crate::{kernel, label, packet, policy};
use aya_ebpf::bindings::{bpf_sock, bpf_sock_addr};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_setsockopt};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use sensor_common::UDP;
use sensor_common::addr::Addr;
use sensor_common::label::Label;
use sensor_common::policy::{BIND, Decision, EGRESS, Flow, PROFILE_SELF, Reason};
use sensor_common::record::{Hook, INSTANCE_NET_ADMIN};
use sensor_common::socket::{Peer, SOCKET_INBOUND, SOCKET_NAT_TRUSTED, Socket};

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    outgoing(ctx.sock_addr, Hook::Connect, false)
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    outgoing(ctx.sock_addr, Hook::Connect, true)
}

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    outgoing(ctx.sock_addr, Hook::Sendmsg, false)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    outgoing(ctx.sock_addr, Hook::Sendmsg, true)
}

#[cgroup_sock_addr(bind4)]
pub fn bind4(ctx: SockAddrContext) -> i32 {
    bind(ctx.sock_addr, false)
}

#[cgroup_sock_addr(bind6)]
pub fn bind6(ctx: SockAddrContext) -> i32 {
    bind(ctx.sock_addr, true)
}

#[inline(always)]
fn sk_of(ctx: *mut bpf_sock_addr) -> *mut bpf_sock {
    // SAFETY: a field of the context.
    unsafe { (*ctx).__bindgen_anon_1.sk }
}

#[inline(always)]
fn destination(ctx: *mut bpf_sock_addr, v6: bool) -> Addr {
    // SAFETY: fields of the context; each word is read on its own, as the
    // verifier wants it.
    unsafe {
        if v6 {
            let words = &raw const (*ctx).user_ip6;
            let word = |i: usize| words.cast::<u32>().add(i).read_volatile();
            Addr::v6([word(0), word(1), word(2), word(3)])
        } else {
            Addr::v4((&raw const (*ctx).user_ip4).read_volatile())
        }
    }
}

#[inline(always)]
fn outgoing(ctx: *mut bpf_sock_addr, hook: Hook, v6: bool) -> i32 {
    let task_label = label::of_current();
    let sk = sk_of(ctx);
    if sk.is_null() {
        return !task_label.is_some() as i32;
    }
    let stored = storage(sk);
    if stored.is_null() && !task_label.is_some() {
        return 1;
    }
    judge_outgoing(ctx, hook, v6, task_label)
}

#[inline(always)]
fn judge_outgoing(ctx: *mut bpf_sock_addr, hook: Hook, v6: bool, task_label: Label) -> i32 {
    // SAFETY: fields of the context.
    let (protocol, port) = unsafe { ((*ctx).protocol as u8, u16::from_be((*ctx).user_port as u16)) };
    let addr = destination(ctx, v6);
    let flow = Flow {
        direction: EGRESS,
        protocol,
        port,
        addr,
        // connect() of a datagram socket sends nothing; libc sorts addresses
        // by it, on every port.
        any_port: matches!(hook, Hook::Connect) && protocol == UDP,
    };

    let sk = sk_of(ctx);
    let mut stored = storage(sk);
    // SAFETY: checked for null; the value lives as long as the socket.
    let socket_label = if stored.is_null() { Label::NONE } else { unsafe { (*stored).label } };
    let first = if task_label.is_some() { task_label } else { socket_label };

    // SAFETY: `ctx` is the program's context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.cast()) };
    let hook_flags = hook as u32 | if v6 { V6 } else { 0 };

    // The stricter of the task's label and the socket's.
    let mut judged = judge_with_self(ctx, &flow, first, netns);
    if !judged.denies() && socket_label.is_some() && socket_label != first {
        let by_socket = judge_with_self(ctx, &flow, socket_label, netns);
        if by_socket.denies() || judged.decision.allows() {
            judged = by_socket;
        }
    }
    if matches!(hook, Hook::Sendmsg)
        && matches!(judged.decision.reason, Reason::NoRule | Reason::Unverified)
        // SAFETY: `ctx` is the program's context.
        && let Some(rule) = packet::answers(unsafe { bpf_get_socket_cookie(ctx.cast()) }, &flow)
    {
        judged.decision = Decision::by_rule(Reason::Reply, rule);
    }
    if stored.is_null() {
        stored = socket::adopt(sk, first, netns, Task::current());
        if stored.is_null() {
            judged.decision = Decision::because(Reason::SocketLabel);
            return conclude(ctx, &flow, &judged, netns, hook_flags);
        }
    }
    if matches!(judged.decision.reason, Reason::ForeignResolver) && !judged.audit {
        return 1; // a datagram: refused as a packet, which says what was asked
    }
    if matches!(judged.decision.reason, Reason::Resolver) && matches!(hook, Hook::Connect) {
        end_soon(ctx);
    }
    if !judged.denies() {
        let known = approve(stored, &judged, &flow, netns, hook);
        if judged.decision.allows()
            && (known || matches!(judged.decision.reason, Reason::NoTraffic | Reason::Reply))
        {
            return 1; // recorded before, or nothing is sent
        }
    }
    conclude(ctx, &flow, &judged, netns, hook_flags)
}

/// A query that is not let out must end its connection with an error: the C
/// library waits for minutes for one that only vanishes. The agent does so at
/// once; this does while there is none.
#[inline(always)]
fn end_soon(ctx: *mut bpf_sock_addr) {
    const SOL_TCP: i32 = 6;
    const TCP_USER_TIMEOUT: i32 = 18;
    let mut milliseconds: u32 = 5000;
    // SAFETY: four bytes, as the option has; an error leaves the default.
    unsafe {
        bpf_setsockopt(ctx.cast(), SOL_TCP, TCP_USER_TIMEOUT, (&raw mut milliseconds).cast(), 4);
    }
}

/// Beside the hook's number in the last argument of [`conclude`].
const V6: u32 = 1 << 8;

/// Out of line, to keep the facts off the caller's stack.
#[inline(never)]
fn conclude(ctx: *mut bpf_sock_addr, flow: &Flow, judged: &Judged, netns: u64, hook: u32) -> i32 {
    let connect = hook & 0xff == Hook::Connect as u32;
    let kind = if connect { Hook::Connect } else { Hook::Sendmsg };
    let mut facts = Facts::of(judged.label, kind, Task::current());
    facts.key.addr = flow.addr.0;
    facts.key.port = flow.port;
    facts.key.protocol = flow.protocol;
    facts.family = if hook & V6 != 0 { 10 } else { 2 };
    facts.netns = netns;
    // SAFETY: `ctx` is the program's context.
    facts.cookie = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    verdict::conclude(&mut facts, judged)
}

/// `self` needs a look at the other end, so it is asked only when no rule
/// allows.
#[inline(always)]
fn judge_with_self(ctx: *mut bpf_sock_addr, flow: &Flow, label: Label, netns: u64) -> Judged {
    let mut judged = judge(label, flow, netns);
    if judged.self_rule != 0 && (flow.any_port || packet::destination_is_own(ctx.cast(), flow, label)) {
        judged.decision = Decision::by_rule(Reason::SelfInstance, judged.self_rule);
    }
    judged
}

/// The rule that `to: [self]` stands in, if the label's profile has one.
#[inline(always)]
fn self_rule(label: Label) -> Option<u32> {
    let generation = kernel::generation();
    let server = policy::server(generation, label.server())?;
    let profile = policy::profile(generation, policy::profile_of(server, label))?;
    if profile.flags & PROFILE_SELF == 0 {
        return None;
    }
    Some(profile.self_rule)
}

/// Remembers on the socket what was approved. True: the same peer as before
/// under the same policy.
#[inline(always)]
fn approve(stored: *mut Socket, judged: &Judged, flow: &Flow, netns: u64, hook: Hook) -> bool {
    let generation = kernel::generation();
    let peer = Peer { addr: flow.addr, port: flow.port, protocol: flow.protocol, valid: 1 };
    // SAFETY: the value lives as long as the socket. Threads that share a
    // socket may interleave; whoever uses `approved` judges it again.
    unsafe {
        let s = &mut *stored;
        let mut flags = s.flags & !SOCKET_NAT_TRUSTED;
        if matches!(hook, Hook::Connect) {
            flags &= !SOCKET_INBOUND; // a listener reused for connect
        }
        if translation_is_trusted(judged.label, netns) {
            flags |= SOCKET_NAT_TRUSTED;
        }
        s.flags = flags;
        let known = s.approved == peer && s.approved_generation == generation && flow.protocol == UDP;
        s.approved = peer;
        s.approved_generation = generation;
        known
    }
}

/// Nobody in the instance can have set up the translation: it lives in the
/// network namespace it was labelled in, and neither the caller nor any of its
/// execs held CAP_NET_ADMIN.
#[inline(always)]
fn translation_is_trusted(label: Label, netns: u64) -> bool {
    let Some(i) = label::instance(label.instance()) else { return false };
    // SAFETY: map value.
    let (home, flags) = unsafe { ((*i).netns, (*i).flags) };
    home != 0 && home == netns && flags & INSTANCE_NET_ADMIN == 0 && !kernel::has_net_admin(kernel::current())
}

/// An early, clear error for a port that no inbound rule names. Ingress is the
/// authority: listen() works without bind().
#[inline(always)]
fn bind(ctx: *mut bpf_sock_addr, v6: bool) -> i32 {
    let label = label::of_current();
    if !label.is_some() {
        return 1;
    }
    // SAFETY: fields of the context.
    let (protocol, port) = unsafe { ((*ctx).protocol as u8, u16::from_be((*ctx).user_port as u16)) };
    if port == 0 || self_rule(label).is_some() {
        return 1;
    }
    let flow = Flow { direction: BIND, protocol, port, addr: Addr::LOOPBACK6, any_port: false };
    let judged = judge_by_address(label, &flow);
    if judged.decision.allows() {
        return 1; // recorded when a peer comes
    }
    let mut facts = Facts::of(label, Hook::Bind, Task::current());
    facts.key.addr = destination(ctx, v6).0;
    facts.key.port = port;
    facts.key.protocol = protocol;
    facts.family = if v6 { 10 } else { 2 };
    // SAFETY: `ctx` is the program's context.
    facts.netns = unsafe { bpf_get_netns_cookie(ctx.cast()) };
    verdict::conclude(&mut facts, &judged)
}
