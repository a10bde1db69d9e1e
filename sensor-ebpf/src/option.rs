//! setsockopt() by labelled tasks: no groups (the kernel's own IGMP and MLD
//! reports would carry chosen bytes), no options that take packets off the
//! plain path.

use crate::record::Task;
use crate::socket::storage;
use crate::verdict::{self, Facts, judge_by_address};
use crate::{label, policy};
use aya_ebpf::bindings::bpf_sockopt;
use aya_ebpf::macros::cgroup_sockopt;
use aya_ebpf::programs::SockoptContext;
use sensor_common::UDP;
use sensor_common::addr::Addr;
use sensor_common::label::Label;
use sensor_common::policy::{EGRESS, Flow, Reason};
use sensor_common::record::Hook;

const SOL_IP: i32 = 0;
const SOL_SOCKET: i32 = 1;
const SOL_IPV6: i32 = 41;

#[cgroup_sockopt(setsockopt)]
pub fn setsockopt(ctx: SockoptContext) -> i32 {
    const PAGE: i32 = 4096;
    let ctx = ctx.sockopt;
    // SAFETY: fields of the context.
    let (level, option) = unsafe {
        if (*ctx).optlen > PAGE {
            // The kernel hands programs one page; 0 means "use the caller's
            // own buffer", without it large tables fail with EFAULT before 6.5.
            (*ctx).optlen = 0;
        }
        ((*ctx).level, (*ctx).optname)
    };
    let Some(reason) = refused(level, option) else {
        return 1;
    };
    let label = label::of_current();
    // SAFETY: a field of the context.
    let sk = unsafe { (*ctx).__bindgen_anon_1.sk };
    let socket_label = if sk.is_null() {
        Label::NONE
    } else {
        let stored = storage(sk);
        // SAFETY: checked for null.
        if stored.is_null() { Label::NONE } else { unsafe { (*stored).label } }
    };
    let party = if label.is_some() { label } else { socket_label };
    if !party.is_some() || policy::unrestricted(party) {
        return 1;
    }
    let wants = match reason {
        Reason::GroupJoin => group(ctx, level, option),
        Reason::Broadcast => Some(Addr::v4(u32::MAX)),
        _ => None,
    };
    if let Some(addr) = wants {
        let flow = Flow { direction: EGRESS, protocol: UDP, port: 0, addr, any_port: true };
        let judged = judge_by_address(party, &flow);
        if judged.decision.allows() {
            return 1; // a rule names it
        }
        if matches!(reason, Reason::Broadcast) {
            if judged.denies() {
                // Go sets it on every UDP socket: the call succeeds and sets
                // nothing, so that the kernel itself refuses to broadcast.
                // SAFETY: a field of the context; -1 skips the kernel's handler.
                unsafe { (*ctx).optlen = -1 };
            }
            return 1;
        }
    }
    let mut facts = Facts::of(party, Hook::Setsockopt, Task::current());
    if let Some(addr) = wants {
        facts.key.addr = addr.0;
    }
    facts.kind = level as u16;
    facts.option = option as u16;
    // Repeats are told apart by what was asked for.
    facts.key.port = option as u16;
    facts.key.protocol = level as u8;
    verdict::refuse(&mut facts, reason)
}

/// The group that a join names; `None`: a form that no rule opens.
#[inline(always)]
fn group(ctx: *mut bpf_sockopt, level: i32, option: i32) -> Option<Addr> {
    // SAFETY: fields of the context.
    let (value, end) = unsafe {
        ((*ctx).__bindgen_anon_2.optval.cast::<u8>(), (*ctx).__bindgen_anon_3.optval_end.cast::<u8>())
    };
    const WORDS: usize = 8;
    // SAFETY: compared with the end before anything is read.
    unsafe {
        let word = |at: usize| value.add(at).cast::<u32>().read();
        match (level, option) {
            // struct ip_mreq, ip_mreqn, ip_mreq_source, ip_msfilter: the group
            // is first.
            (SOL_IP, 35 | 39 | 41) if value.add(4) <= end => Some(Addr::v4(word(0))),
            // struct ipv6_mreq
            (SOL_IPV6, 20) if value.add(16) <= end => Some(Addr::v6([word(0), word(4), word(8), word(12)])),
            // struct group_req, group_source_req, group_filter: an interface,
            // then a sockaddr.
            (SOL_IP | SOL_IPV6, 42 | 46 | 48) if value.add(4 * WORDS) <= end => match word(8) as u16 {
                2 => Some(Addr::v4(word(12))),
                10 => Some(Addr::v6([word(16), word(20), word(24), word(28)])),
                _ => None,
            },
            _ => None,
        }
    }
}

/// linux/in.h, linux/in6.h, asm-generic/socket.h. The MCAST_* numbers are the
/// same at both levels.
#[inline(always)]
fn refused(level: i32, option: i32) -> Option<Reason> {
    match (level, option) {
        // IP_ADD_MEMBERSHIP, IP_ADD_SOURCE_MEMBERSHIP, IP_MSFILTER
        (SOL_IP, 35 | 39 | 41)
        // MCAST_JOIN_GROUP, MCAST_JOIN_SOURCE_GROUP, MCAST_MSFILTER
        | (SOL_IP | SOL_IPV6, 42 | 46 | 48)
        // IPV6_ADD_MEMBERSHIP, IPV6_JOIN_ANYCAST
        | (SOL_IPV6, 20 | 27) => Some(Reason::GroupJoin),
        // IP_OPTIONS
        (SOL_IP, 4)
        // IPV6_2292*: PKTOPTIONS, HOPOPTS, DSTOPTS, RTHDR
        | (SOL_IPV6, 3..=6)
        // IPV6_HOPOPTS, RTHDRDSTOPTS, RTHDR, DSTOPTS
        | (SOL_IPV6, 54 | 55 | 57 | 59)
        => Some(Reason::SocketOption),
        // SO_BROADCAST: a subnet's broadcast address looks like any other.
        (SOL_SOCKET, 6) => Some(Reason::Broadcast),
        _ => None,
    }
}
