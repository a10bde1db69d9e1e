//! What MCP servers read and write on their stdio. A wire is known by the
//! inode behind descriptors 0 and 1 at exec, and followed from there through
//! every dup, fork and reopening. Two back ends find the bytes: `syscall`
//! (tracepoints, any kernel) and `function` (fexit). Neither decides anything.

mod function;
mod syscall;
mod uring;

use crate::kernel::{self, Typed, offset, pointer, read};
use crate::record::{self, Task};
use crate::{atomic, label};
use aya_ebpf::helpers::generated::{bpf_loop, bpf_probe_read_user};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, RingBuf};
use core::ffi::c_void;
use sensor_common::addr::Addr;
use sensor_common::kernel::PID_LIMIT;
use sensor_common::label::Label;
use sensor_common::record::{Header, KIND_CANDIDATE, KIND_CHUNK, KIND_MET, Loss, RING_STDIO, RING_VERDICTS};
use sensor_common::stdio::{
    CANDIDATE_BYTES, CHUNK_BYTES, CHUNK_CLASSES, CONNECTION_OVER_TCP, Candidate, Chunk, FROM_CLIENT,
    FROM_SERVER, HOW_DATA, HOW_FAULT, HOW_SEGMENTS, Met, TCP_WIRE, WIRE_IGNORED, WIRE_JOINED, Wire, WireKey,
    is_request, may_begin,
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

const S_IFMT: u16 = 0xf000;
const S_IFIFO: u16 = 0x1000;
const S_IFSOCK: u16 = 0xc000;
const AF_UNIX: u16 = 1;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// What a descriptor leads to, if that can be a wire.
#[derive(Clone, Copy)]
struct End {
    /// Or, of TCP, the socket's cookie.
    inode: u64,
    dev: u32,
    /// Both directions go over it.
    socket: bool,
    /// `struct sock` of a TCP connection, else 0.
    tcp: u64,
}

impl End {
    #[inline(always)]
    fn key(self, direction: u32) -> WireKey {
        WireKey { inode: self.inode, dev: self.dev, direction }
    }
}

/// `struct file *` of a descriptor of the current task.
#[inline(always)]
fn file(fd: u32) -> Option<u64> {
    let table = Typed::current().to(offset!(task_files))?.to(offset!(files_fdt))?;
    if fd >= table.field::<u32>(offset!(fdtable_max_fds)) {
        return None;
    }
    pointer(table.field::<u64>(offset!(fdtable_fd)), fd as u64 * 8)
}

/// The first words of a `struct inode`.
const INODE_WORDS: usize = 9;

/// Mode, superblock and number.
#[inline(always)]
fn inode(inode: u64) -> Option<(u16, u64, u64)> {
    let (mode, sb, ino) = (offset!(inode_mode), offset!(inode_sb), offset!(inode_ino));
    const LAST: u64 = (INODE_WORDS as u64 - 1) * 8;
    // As they lie in every kernel that is known: one read costs little more for all
    // of them. The verifier knows the offsets, and which way is dead.
    if mode <= LAST && sb <= LAST && ino <= LAST {
        let words = read::<[u64; INODE_WORDS]>(inode, 0)?;
        let at = |offset: u64| (&raw const words).cast::<u8>().wrapping_add(offset as usize);
        // SAFETY: within the words, each at its own alignment.
        return Some(unsafe {
            (at(mode).cast::<u16>().read(), at(sb).cast::<u64>().read(), at(ino).cast::<u64>().read())
        });
    }
    Some((read::<u16>(inode, mode)?, read::<u64>(inode, sb)?, read::<u64>(inode, ino)?))
}

/// Pipes, named ones included, unix sockets, and TCP sockets that have a cookie:
/// every labelled one has, with its first packet at the latest.
#[inline(always)]
fn end(file: u64) -> Option<End> {
    let (mode, sb, inode) = inode(pointer(file, offset!(file_inode))?)?;
    let kind = mode & S_IFMT;
    if kind == S_IFSOCK {
        let sk = pointer(file, offset!(file_private_data)).and_then(|s| pointer(s, offset!(socket_sk)))?;
        if read::<u16>(sk, offset!(sock_family))? != AF_UNIX {
            return tcp(sk);
        }
    } else if kind != S_IFIFO {
        return None;
    }
    let dev = read::<u32>(sb, offset!(sb_dev))?;
    Some(End { inode, dev, socket: kind == S_IFSOCK, tcp: 0 })
}

#[inline(always)]
fn tcp(sk: u64) -> Option<End> {
    const SOCK_STREAM: u16 = 1;
    let family = read::<u16>(sk, offset!(sock_family))?;
    if (family != AF_INET && family != AF_INET6) || read::<u16>(sk, offset!(sock_type))? != SOCK_STREAM {
        return None;
    }
    match read::<u64>(sk, offset!(sock_cookie)) {
        Some(0) | None => None,
        Some(cookie) => Some(End { inode: cookie, dev: TCP_WIRE, socket: true, tcp: sk }),
    }
}

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

/// Where the bytes of one call lie, and how many moved. In a map: of what lies
/// on the stack the verifier would follow each step of the loop.
#[repr(C)]
pub struct Moved {
    /// [`Label::NONE`]: a candidate's.
    label: Label,
    key: WireKey,
    connection: u64,
    flags: u64,
    /// Bytes that moved and are not in a record yet.
    left: u64,
    /// Wire position of the next.
    position: u64,
    /// The array of segments; its address is in user space or in the kernel.
    segments: u64,
    count: u64,
    in_kernel: u64,
    /// What is left of the segment at hand.
    base: u64,
    rest: u64,
    how: u32,
    /// Which of [`MOVES`] this is.
    number: u32,
}

/// Per CPU. fexit programs can be preempted by one another.
const MOVES_AT_ONCE: u32 = 4;
#[map]
static MOVES: PerCpuArray<Moved> = PerCpuArray::with_max_entries(MOVES_AT_ONCE, 0);
/// One bit per entry in use.
#[map]
static MOVES_BUSY: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

#[repr(C)]
#[derive(Clone, Copy)]
struct Segment {
    base: u64,
    len: u64,
}

/// The wire, if these bytes are to be recorded, and their place in its stream.
#[inline(always)]
fn place(key: &WireKey, bytes: u64) -> Option<(Moved, *mut Wire)> {
    let wire = WIRES.get_ptr_mut(key)?;
    // SAFETY: aligned words in a map value.
    let (mut label, connection, flags, position) =
        unsafe { ((*wire).label, (*wire).connection, (*wire).flags, (*wire).position) };
    if !label.is_some()
        && let Some(admitted) = ADMITTED.get_ptr(connection)
    {
        // SAFETY: an aligned word in a map value.
        label = unsafe { *admitted };
    }
    if !label.is_some() && (flags & WIRE_IGNORED != 0 || position >= CANDIDATE_BYTES) {
        return None;
    }
    // SAFETY: as above.
    let position = atomic::fetch_add(unsafe { &raw mut (*wire).position }, bytes);
    let moved = Moved {
        label,
        key: *key,
        connection,
        flags,
        left: bytes,
        position,
        segments: 0,
        count: 0,
        in_kernel: 0,
        base: 0,
        rest: 0,
        how: HOW_DATA,
        number: 0,
    };
    Some((moved, wire))
}

/// The same with an entry of [`MOVES`], which must be given back.
#[inline(always)]
fn admit(key: &WireKey, bytes: u64) -> Option<(&'static mut Moved, *mut Wire)> {
    let (placed, wire) = place(key, bytes)?;
    let busy = MOVES_BUSY.get_ptr_mut(0)?;
    let mut number = 0;
    while number < MOVES_AT_ONCE {
        if atomic::fetch_or(busy, 1 << number) & 1 << number == 0 {
            break;
        }
        number += 1;
    }
    let Some(moved) = MOVES.get_ptr_mut(number) else {
        // As many programs at once: the gap in the positions tells.
        record::lost(Loss::StdioRingFull, bytes);
        return None;
    };
    // SAFETY: this entry is the program's alone until it is given back.
    let moved = unsafe { &mut *moved };
    *moved = Moved { number, ..placed };
    Some((moved, wire))
}

#[inline(always)]
fn give_back(moved: &Moved) {
    if let Some(busy) = MOVES_BUSY.get_ptr_mut(0) {
        atomic::and(busy, !(1 << (moved.number & (MOVES_AT_ONCE - 1))));
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

/// `bytes` went over the wire from or to one place in user memory.
#[inline(always)]
fn moved(end: &End, direction: u32, base: u64, bytes: u64) {
    let key = &end.key(direction);
    meet(end, direction, base);
    if bytes <= CHUNK_BYTES as u64 {
        // SAFETY: plain integers.
        unsafe { record_one(key.inode, (key.dev as u64) << 32 | direction as u64, base, bytes) };
        return;
    }
    let Some((m, _)) = admit(key, bytes) else { return };
    (m.base, m.rest) = (base, bytes);
    record_all(m);
}

/// What moves in most calls: bytes at one place that are one record. A global
/// function, as [`record_moved`] is. `wire`: device, then direction.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn record_one(inode: u64, wire: u64, base: u64, bytes: u64) -> u64 {
    let key = WireKey { inode, dev: (wire >> 32) as u32, direction: wire as u32 };
    let Some((mut m, wire)) = place(&key, bytes) else { return 0 };
    put_data(&mut m, wire, bytes, base);
    1
}

/// Where bytes lie that are in several places: `struct iovec` at `segments`, the
/// first of them from `skip` on.
#[derive(Clone, Copy)]
struct Parts {
    segments: u64,
    count: u64,
    skip: u64,
    /// The array is; the bytes never are.
    in_kernel: bool,
}

#[inline(always)]
fn first_base(segments: u64) -> u64 {
    let mut base = core::mem::MaybeUninit::<u64>::uninit();
    // SAFETY: the helper checks the address and writes 8 bytes.
    if unsafe { bpf_probe_read_user(base.as_mut_ptr().cast(), 8, segments as *const _) } != 0 {
        return 0;
    }
    // SAFETY: written in full.
    unsafe { base.assume_init() }
}

/// As [`moved`].
#[inline(always)]
fn moved_in_parts(end: &End, direction: u32, parts: Parts, bytes: u64) {
    let key = &end.key(direction);
    let Parts { segments, count, skip, in_kernel } = parts;
    if end.tcp != 0 && !in_kernel {
        meet(end, direction, first_base(segments));
    } else if end.tcp != 0 {
        meet(end, direction, read::<u64>(segments, 0).unwrap_or(0));
    }
    let Some((m, _)) = admit(key, bytes) else { return };
    (m.segments, m.count, m.in_kernel) = (segments, count, in_kernel as u64);
    if skip > 0 {
        next_segment(m);
        if skip <= m.rest {
            m.base += skip;
            m.rest -= skip;
        }
    }
    record_all(m);
}

/// `bytes` went over the wire where nobody can read them.
#[inline(always)]
fn moved_unread(end: &End, direction: u32, bytes: u64, how: u32) {
    let key = &end.key(direction);
    let Some((m, wire)) = admit(key, bytes) else { return };
    m.how = how;
    put::<{ CHUNK_CLASSES[0] }>(m, wire, bytes, 0);
    give_back(m);
}

/// More segments than this are not looked at (UIO_MAXIOV, linux/uio.h).
const SEGMENTS: u64 = 1024;

/// What a step of the loop works on; bpf_loop takes it from the stack only.
#[repr(C)]
struct Work {
    moved: *mut Moved,
    wire: *mut Wire,
}

#[inline(always)]
fn record_all(m: &Moved) {
    // SAFETY: a plain integer.
    unsafe { record_moved(m.number as u64) };
}

/// A global function, which the verifier looks at once however many calls lead
/// here. `number`: of an entry of [`MOVES`], which it gives back.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn record_moved(number: u64) -> u64 {
    let Some(m) = MOVES.get_ptr_mut(number as u32) else { return 0 };
    // SAFETY: the entry is the caller's alone.
    let m = unsafe { &mut *m };
    if let Some(wire) = WIRES.get_ptr_mut(m.key) {
        let segments = if m.count > SEGMENTS { SEGMENTS } else { m.count };
        let count = m.left / CHUNK_BYTES as u64 + segments * 2 + 2;
        const MOST: u64 = 1 << 22; // of bpf_loop: 1 << 23
        let count = if count > MOST { MOST } else { count } as u32;
        let mut work = Work { moved: m, wire };
        // SAFETY: the callback and its context outlive the call.
        unsafe { bpf_loop(count, step as *mut c_void, (&raw mut work).cast(), 0) };
        if m.left > 0 {
            m.how = HOW_SEGMENTS;
            let left = m.left;
            put::<{ CHUNK_CLASSES[0] }>(m, wire, left, 0);
        }
    }
    give_back(m);
    1
}

#[inline(always)]
fn next_segment(m: &mut Moved) -> bool {
    if m.count == 0 {
        return false;
    }
    let mut segment = core::mem::MaybeUninit::<Segment>::uninit();
    let failed = if m.in_kernel != 0 {
        match read::<Segment>(m.segments, 0) {
            Some(s) => {
                segment.write(s);
                0
            }
            None => 1,
        }
    } else {
        // SAFETY: the helper checks the address and writes 16 bytes.
        unsafe { bpf_probe_read_user(segment.as_mut_ptr().cast(), 16, m.segments as *const _) }
    };
    if failed != 0 {
        return false;
    }
    // SAFETY: written in full.
    let segment = unsafe { segment.assume_init() };
    m.count -= 1;
    m.segments += 16;
    m.base = segment.base;
    m.rest = segment.len;
    true
}

/// One record, or one step to the next segment.
extern "C" fn step(_index: u32, work: *mut Work) -> i64 {
    // SAFETY: what `record_all` gave to bpf_loop.
    let (m, wire) = unsafe { (&mut *(*work).moved, (*work).wire) };
    if m.left == 0 {
        return 1;
    }
    if m.rest == 0 {
        return if next_segment(m) { 0 } else { 1 };
    }
    let mut n = if m.rest < m.left { m.rest } else { m.left };
    if n > CHUNK_BYTES as u64 {
        n = CHUNK_BYTES as u64;
    }
    let base = m.base;
    put_data(m, wire, n, base);
    m.left -= n;
    m.rest -= n;
    m.base += n;
    m.position += n;
    // A candidate may have ended with this record.
    if m.flags & WIRE_IGNORED != 0 {
        m.left = 0;
    }
    0
}

/// One record of up to [`CHUNK_BYTES`].
#[inline(always)]
fn put_data(m: &mut Moved, wire: *mut Wire, n: u64, base: u64) {
    if n <= CHUNK_CLASSES[0] as u64 {
        put::<{ CHUNK_CLASSES[0] }>(m, wire, n, base);
    } else if n <= CHUNK_CLASSES[1] as u64 {
        put::<{ CHUNK_CLASSES[1] }>(m, wire, n, base);
    } else if n <= CHUNK_CLASSES[2] as u64 {
        put::<{ CHUNK_CLASSES[2] }>(m, wire, n, base);
    } else {
        put::<{ CHUNK_CLASSES[3] }>(m, wire, n, base);
    }
}

#[repr(C)]
struct Record<const ROOM: usize> {
    chunk: Chunk,
    data: [u8; ROOM],
}

/// One record about `n` bytes, which lie at `base`, or nowhere (0).
#[inline(always)]
fn put<const ROOM: usize>(m: &mut Moved, wire: *mut Wire, n: u64, base: u64) {
    let seq = record::next_seq(RING_STDIO);
    let Some(mut entry) = STDIO.reserve::<Record<ROOM>>(0) else {
        record::lost(Loss::StdioRingFull, n);
        return;
    };
    let record = entry.as_mut_ptr();
    let mut how = m.how;
    let mut len = 0;
    if base != 0 {
        // 1..=ROOM, seen by the verifier on the very register; ROOM is a power
        // of two.
        len = crate::scratch::bounded(n.wrapping_sub(1), ROOM as u64 - 1) + 1;
        // SAFETY: the helper writes `len` ≤ ROOM bytes or fails.
        let failed =
            unsafe { bpf_probe_read_user((&raw mut (*record).data).cast(), len as u32, base as *const _) };
        if failed != 0 {
            how = HOW_FAULT;
            len = 0;
        }
    }
    let label = m.label;
    // Most candidates end here: a shell's pipeline carries no JSON.
    if !label.is_some() && m.position == 0 && how == HOW_DATA && m.flags & WIRE_JOINED == 0 {
        // SAFETY: at least one byte was written.
        let first = unsafe { (&raw const (*record).data).cast::<u8>().read() };
        if !may_begin(first) {
            // SAFETY: an aligned word in a map value.
            atomic::or(unsafe { &raw mut (*wire).flags }, WIRE_IGNORED);
            m.flags |= WIRE_IGNORED;
            entry.discard(0);
            return;
        }
    }
    // SAFETY: the record is this program's until it is submitted.
    unsafe {
        (*record).chunk = Chunk {
            header: header(KIND_CHUNK, size_of::<Record<ROOM>>(), label, seq),
            connection: m.connection,
            inode: m.key.inode,
            position: m.position,
            moved: n as u32,
            len: len as u32,
            direction: m.key.direction,
            how,
        };
    }
    entry.submit(waking(label, size_of::<Record<ROOM>>() as u64));
}

#[inline(always)]
fn header(kind: u16, size: usize, label: Label, seq: u64) -> Header {
    let task = Task::current();
    Header {
        kind,
        size: size as u16,
        // SAFETY: no preconditions.
        cpu: unsafe { aya_ebpf::helpers::generated::bpf_get_smp_processor_id() },
        seq,
        // SAFETY: no preconditions.
        boottime: unsafe { aya_ebpf::helpers::generated::bpf_ktime_get_boot_ns() },
        label,
        tgid: task.tgid,
        tid: task.tid,
        uid: task.uid,
        generation: kernel::generation(),
    }
}

/// Who reads a candidate must act at once; a server's calls can wait for the
/// reader's next round, unless much is waiting: then it is woken once, since
/// waking costs the server more than the record does. `size`: of the record.
#[inline(always)]
fn waking(label: Label, size: u64) -> u64 {
    const AVAILABLE: u64 = 0; // BPF_RB_AVAIL_DATA
    const NO_WAKEUP: u64 = 1; // BPF_RB_NO_WAKEUP
    const FORCE_WAKEUP: u64 = 2; // BPF_RB_FORCE_WAKEUP
    const MUCH: u64 = 512 * 1024;
    if !label.is_some() {
        return FORCE_WAKEUP;
    }
    let waiting = STDIO.query(AVAILABLE);
    if waiting >= MUCH && waiting < MUCH + size + 64 { FORCE_WAKEUP } else { NO_WAKEUP }
}
