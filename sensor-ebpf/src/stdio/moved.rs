//! Bytes that moved over a wire become records: their place in the stream, and
//! as much of them as the rings take.

use super::end::End;
use super::{ADMITTED, STDIO, WIRES, meet};
use crate::atomic;
use crate::kernel::{self, read};
use crate::record::{self, Task};
use aya_ebpf::helpers::generated::{bpf_loop, bpf_probe_read_user};
use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use core::ffi::c_void;
use sensor_common::label::Label;
use sensor_common::record::{Header, KIND_CHUNK, Loss, RING_STDIO};
use sensor_common::stdio::{
    CANDIDATE_BYTES, CHUNK_BYTES, CHUNK_CLASSES, Chunk, HOW_DATA, HOW_FAULT, HOW_SEGMENTS, WIRE_IGNORED,
    WIRE_JOINED, Wire, WireKey, may_begin,
};

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

/// `bytes` went over the wire from or to one place in user memory.
#[inline(always)]
pub(super) fn moved(end: &End, direction: u32, base: u64, bytes: u64) {
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
pub(super) struct Parts {
    pub(super) segments: u64,
    pub(super) count: u64,
    pub(super) skip: u64,
    /// The array is; the bytes never are.
    pub(super) in_kernel: bool,
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
pub(super) fn moved_in_parts(end: &End, direction: u32, parts: Parts, bytes: u64) {
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
pub(super) fn moved_unread(end: &End, direction: u32, bytes: u64, how: u32) {
    let key = &end.key(direction);
    let Some((m, wire)) = admit(key, bytes) else { return };
    m.how = how;
    put::<{ CHUNK_CLASSES[0] }>(m, wire, bytes, 0);
    give_back(m);
}

/// More segments than this are not looked at (UIO_MAXIOV, linux/uio.h).
pub(super) const SEGMENTS: u64 = 1024;

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
pub(super) fn header(kind: u16, size: usize, label: Label, seq: u64) -> Header {
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
pub(super) fn waking(label: Label, size: u64) -> u64 {
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
