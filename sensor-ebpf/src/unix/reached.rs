//! Unix sockets judged by what is reached, where the kernel has BPF LSM: every
//! socket carries the label of the task that made it, and the name that counts
//! is the one it is bound to, whatever link, mount or directory led there.

use super::{Owner, UnixName, judge_unix, read_name};
use crate::access::answer;
use crate::kernel::{Typed, offset, pointer, read};
use crate::label;
use crate::record;
use crate::socket::Storage;
use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::macros::lsm;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::LsmContext;
use sensor_common::label::Label;
use sensor_common::record::{Hook, Loss};

const AF_UNIX: u32 = 1;
/// BPF_F_NO_PREALLOC, which the type demands.
const FLAGS: usize = 1;

/// Labels of those who made unix sockets.
#[unsafe(link_section = ".maps")]
#[unsafe(export_name = "UNIX_OWNERS")]
static OWNERS: Storage<Label, FLAGS> = Storage::new();

/// `socket_post_create(struct socket *, int family, int type, int protocol, int kern)`,
/// for each end of a pair as well.
#[lsm(hook = "socket_post_create")]
pub fn unix_made(ctx: LsmContext) -> i32 {
    let label = label::of_current();
    if !label.is_some() || ctx.arg::<u32>(1) != AF_UNIX {
        return 0;
    }
    let sk: *mut bpf_sock = Typed::at(ctx.arg(0)).field(offset!(socket_sk));
    if sk.is_null() {
        return 0;
    }
    let owner = OWNERS.get_or_zeroed(sk);
    if owner.is_null() {
        // Nobody's then, and its own instance will not reach it.
        record::lost(Loss::SocketLabel, 1);
        return 0;
    }
    // SAFETY: one aligned word in a map value.
    unsafe { *owner = label };
    0
}

/// `unix_stream_connect(struct sock *sock, struct sock *other, struct sock *newsk)`,
/// of SOCK_SEQPACKET as well.
#[lsm(hook = "unix_stream_connect")]
pub fn unix_reached(ctx: LsmContext) -> i32 {
    let label = label::of_current();
    if !label.is_some() {
        return 0;
    }
    judge(label, ctx.arg::<*mut bpf_sock>(1), Hook::UnixConnect)
}

/// `unix_may_send(struct socket *sock, struct socket *other)`: connect() of a
/// datagram socket, and each datagram.
#[lsm(hook = "unix_may_send")]
pub fn unix_sent(ctx: LsmContext) -> i32 {
    let label = label::of_current();
    if !label.is_some() {
        return 0;
    }
    let other: *mut bpf_sock = Typed::at(ctx.arg(1)).field(offset!(socket_sk));
    let own: *const u8 = Typed::at(ctx.arg(0)).field(offset!(socket_sk));
    if other.is_null() || own.is_null() {
        return 0; // on its way out
    }
    // Connected: judged then, or inherited so.
    if read::<u64>(own as u64, offset!(unix_peer)) == Some(other as u64) {
        return 0;
    }
    judge(label, other, Hook::UnixSendmsg)
}

#[inline(always)]
fn judge(label: Label, other: *mut bpf_sock, hook: Hook) -> i32 {
    let owner = if is_own(label, other) { Owner::Own } else { Owner::Another };
    answer(judge_unix(|| bound_name(other as u64), owner, hook))
}

#[inline(always)]
fn is_own(label: Label, other: *mut bpf_sock) -> bool {
    let owner = OWNERS.get(other);
    // SAFETY: null, or one aligned word in a map value.
    if !owner.is_null() && unsafe { *owner }.instance() == label.instance() {
        return true;
    }
    listens_for(label, other as u64)
}

/// Made before its task was labelled, by one that lives: the number of one that
/// does not may be anybody's by now.
#[inline(always)]
fn listens_for(label: Label, other: u64) -> bool {
    let Some(pid) = pointer(other, offset!(sock_peer_pid)) else { return false };
    if pointer(pid, offset!(pid_task)).is_none() {
        return false;
    }
    match read::<u32>(pid, offset!(pid_number)) {
        Some(number) => label::of(number).is_some() && label::of(number).instance() == label.instance(),
        None => false,
    }
}

/// An unnamed socket has an empty name, which no rule covers.
#[inline(always)]
fn bound_name(other: u64) -> Option<Key<UnixName>> {
    match pointer(other, offset!(unix_addr)) {
        Some(address) => {
            let len = read::<u32>(address, offset!(unix_address_len))?;
            read_name(address + offset!(unix_address_name), len)
        }
        None => read_name(other, 0),
    }
}
