//! setsockopt() by labelled tasks: no groups (the kernel's own IGMP and MLD
//! reports would carry chosen bytes), no options that take packets off the
//! plain path.

use crate::record::Task;
use crate::socket::storage;
use crate::verdict::{self, Facts};
use crate::{label, policy};
use aya_ebpf::macros::cgroup_sockopt;
use aya_ebpf::programs::SockoptContext;
use sensor_common::label::Label;
use sensor_common::policy::Reason;
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
    let mut facts = Facts::of(party, Hook::Setsockopt, Task::current());
    facts.kind = level as u16;
    facts.option = option as u16;
    // Repeats are told apart by what was asked for.
    facts.key.port = option as u16;
    facts.key.protocol = level as u8;
    verdict::refuse(&mut facts, reason)
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
        | (SOL_IPV6, 3 | 4 | 5 | 6)
        // IPV6_HOPOPTS, RTHDRDSTOPTS, RTHDR, DSTOPTS
        | (SOL_IPV6, 54 | 55 | 57 | 59)
        // SO_BROADCAST: a subnet's broadcast address looks like any other
        | (SOL_SOCKET, 6) => Some(Reason::SocketOption),
        _ => None,
    }
}
