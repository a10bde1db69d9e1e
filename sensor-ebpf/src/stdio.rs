//! What MCP servers read and write on their stdio. A wire is known by the
//! inode behind descriptors 0 and 1 at exec, and followed from there through
//! every dup, fork and reopening. Two back ends find the bytes: `syscall`
//! (tracepoints, any kernel) and `function` (fexit). Neither decides anything.

mod end;
mod function;
mod moved;
mod syscall;
mod uring;

use crate::kernel::{self, offset, pointer, read};
use crate::record::{self, Task};
use crate::{atomic, label};
use aya_ebpf::helpers::generated::bpf_probe_read_user;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, RingBuf};
use end::{AF_INET, End, end, file, tcp};
use moved::{Parts, SEGMENTS, header, moved, moved_in_parts, moved_unread, waking};
use sensor_common::addr::Addr;
use sensor_common::kernel::PID_LIMIT;
use sensor_common::label::Label;
use sensor_common::record::{KIND_CANDIDATE, KIND_MET, Loss, RING_STDIO, RING_VERDICTS};
use sensor_common::stdio::{
    CONNECTION_OVER_TCP, Candidate, FROM_CLIENT, FROM_SERVER, Met, TCP_WIRE, Wire, WireKey, is_request,
};

#[map]
static WIRES: HashMap<WireKey, Wire> = HashMap::with_max_entries(16384, 0);
/// One bit per thread group that is, or descends from, a candidate.
#[map]
static CANDIDATES: Array<u64> = Array::with_max_entries(PID_LIMIT / 64, 0);
/// Candidates' connections that turned out to be MCP, and whose they are now.
/// Apart from [`WIRES`], whose values are counted in while the agent decides.
#[map]
static ADMITTED: HashMap<u64, Label> = HashMap::with_max_entries(16384, 0);
#[map]
pub(crate) static STDIO: RingBuf = RingBuf::with_byte_size(8 * 1024 * 1024, 0);

/// Whether what this task reads and writes may matter.
#[inline(always)]
fn watched(tgid: u32) -> bool {
    label::of(tgid).is_some() || is_candidate(tgid)
}

#[inline(always)]
pub(crate) fn is_candidate(tgid: u32) -> bool {
    match CANDIDATES.get(tgid / 64) {
        Some(word) => *word & 1 << (tgid % 64) != 0,
        None => false,
    }
}

#[inline(always)]
fn set_candidate(tgid: u32, yes: bool) {
    let Some(word) = CANDIDATES.get_ptr_mut(tgid / 64) else { return };
    let bit = 1u64 << (tgid % 64);
    if yes {
        atomic::or(word, bit);
    } else {
        atomic::and(word, !bit);
    }
}

/// A process forked: what its parent speaks through is its own, too.
#[inline(always)]
pub(crate) fn forked(parent: u32, child: u32) {
    let now = is_candidate(parent);
    if now != is_candidate(child) {
        set_candidate(child, now);
    }
}

/// The last thread of an unlabelled process ended.
#[inline(always)]
pub(crate) fn ended(tgid: u32) {
    if is_candidate(tgid) {
        set_candidate(tgid, false);
    }
}

#[inline(always)]
fn inherited(fd: u32) -> Option<End> {
    match file(fd).and_then(end) {
        Some(e) if e.tcp == 0 => Some(e),
        _ => None,
    }
}

/// After an exec. `begun`: the program begins an instance, so that its stdin and
/// stdout are that server's; those of programs further down in its tree are not.
#[inline(always)]
pub(crate) fn executed(task: Task, label: Label, begun: bool) {
    // SAFETY: plain integers, both ways.
    unsafe { note_stdio(task.tgid, label.0, begun as u32) };
}

/// A global function, which the verifier looks at once.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn note_stdio(tgid: u32, label: u64, begun: u32) -> u64 {
    let label = Label(label);
    let begun = begun != 0;
    if label.is_some() && !begun {
        return 0;
    }
    let looked_at = matches!(kernel::state(), Some(s) if s.candidates != 0) && kernel::in_scope();
    let wanted = label.is_some() || looked_at;
    let ends = if wanted { (inherited(0), inherited(1)) } else { (None, None) };
    let (Some(input), Some(output)) = ends else {
        ended(tgid);
        return 0;
    };
    let (from, to) = (input.key(FROM_CLIENT), output.key(FROM_SERVER));
    let known = (connection(&from), connection(&to));
    let (id, joined) = match known {
        (0, 0) => (next_connection(), false),
        (a, b) if a == b => (a, true),
        // Half of another's: a helper with output of its own.
        _ => {
            if !label.is_some() {
                ended(tgid);
                return 0;
            }
            (next_connection(), false)
        }
    };
    if label.is_some() || !joined {
        let wire = Wire { label, connection: id, position: 0, flags: 0 };
        add(&from, &wire);
        add(&to, &wire);
        if input.socket {
            add(&input.key(FROM_SERVER), &wire);
        }
        if output.socket {
            add(&output.key(FROM_CLIENT), &wire);
        }
    }
    if !label.is_some() {
        set_candidate(tgid, true);
    }
    let parent = pointer(kernel::current(), offset!(task_real_parent))
        .and_then(|p| read::<u32>(p, offset!(task_tgid)))
        .unwrap_or(0);
    record::emit::<Candidate>(RING_VERDICTS, KIND_CANDIDATE, label, |r| {
        r.connection = id;
        r.joined = joined as u32;
        r.parent = parent;
        r.input = from;
        r.output = to;
    });
    1
}

/// 0: not known.
#[inline(always)]
fn connection(key: &WireKey) -> u64 {
    match WIRES.get_ptr(key) {
        // SAFETY: map value.
        Some(wire) => unsafe { (*wire).connection },
        None => 0,
    }
}

/// A wire that is known stays whose it is, unless it is only a candidate's.
#[inline(always)]
fn add(key: &WireKey, wire: &Wire) {
    if let Some(old) = WIRES.get_ptr_mut(key) {
        // SAFETY: aligned words in a map value.
        unsafe {
            if wire.label.is_some() && !(*old).label.is_some() {
                (*old).label = wire.label;
                (*old).connection = wire.connection;
                (*old).flags = 0;
            }
        }
        return;
    }
    const NOEXIST: u64 = 1;
    if WIRES.insert(key, wire, NOEXIST).is_err() {
        record::lost(Loss::WiresFull, 1);
    }
}

#[inline(always)]
fn next_connection() -> u64 {
    match kernel::counts() {
        // SAFETY: an aligned word in a map value; 0 is "not known".
        Some(counts) => atomic::fetch_add(unsafe { &raw mut (*counts).next_connection }, 1) + 1,
        None => 0,
    }
}

/// A server reads its first request from a TCP connection: from here on this is
/// a wire of its own.
#[inline(always)]
fn meet(end: &End, direction: u32, base: u64) {
    if end.tcp != 0 && direction == FROM_CLIENT {
        // SAFETY: plain integers.
        unsafe { meet_tcp(end.inode, end.tcp, base) };
    }
}

/// A global function, which the verifier looks at once. `sk`: `struct sock`.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn meet_tcp(cookie: u64, sk: u64, base: u64) -> u64 {
    let key = &WireKey { inode: cookie, dev: TCP_WIRE, direction: FROM_CLIENT };
    if connection(key) != 0 {
        return 0;
    }
    let mut first = core::mem::MaybeUninit::<[u8; 4]>::uninit();
    // SAFETY: the helper checks the address and writes 4 bytes.
    if unsafe { bpf_probe_read_user(first.as_mut_ptr().cast(), 4, base as *const _) } != 0 {
        return 0;
    }
    let label = label::of_current();
    // SAFETY: written in full.
    if !label.is_some() || !is_request(unsafe { first.assume_init() }) {
        return 0;
    }
    let id = next_connection() | CONNECTION_OVER_TCP;
    let wire = Wire { label, connection: id, position: 0, flags: 0 };
    add(key, &wire);
    add(&WireKey { direction: FROM_SERVER, ..*key }, &wire);
    let Some(mut entry) = STDIO.reserve::<Met>(0) else {
        record::lost(Loss::StdioRingFull, 1);
        return 0;
    };
    let family = read::<u16>(sk, offset!(sock_family)).unwrap_or(0);
    let peer = if family == AF_INET {
        Addr::v4(read::<u32>(sk, offset!(sock_daddr)).unwrap_or(0))
    } else {
        Addr(read::<[u32; 4]>(sk, offset!(sock_v6_daddr)).unwrap_or([0; 4]))
    };
    let port = u16::from_be(read::<u16>(sk, offset!(sock_dport)).unwrap_or(0));
    let header = header(KIND_MET, size_of::<Met>(), label, record::next_seq(RING_STDIO));
    entry.write(Met { header, connection: id, cookie, peer, peer_port: port as u32, _pad: 0 });
    entry.submit(waking(label, size_of::<Met>() as u64));
    1
}

/// The connection is closed: nothing more moves.
#[inline(always)]
pub(crate) fn closed(cookie: u64) {
    let key = WireKey { inode: cookie, dev: TCP_WIRE, direction: FROM_CLIENT };
    if WIRES.remove(key).is_ok() {
        let _ = WIRES.remove(WireKey { direction: FROM_SERVER, ..key });
    }
}
