//! The two rings, their sequence numbers, and the counters of what did not get
//! in. Verdicts have a ring of their own: telemetry cannot crowd them out.

use crate::{atomic, kernel};
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::helpers::generated::{
    bpf_get_current_uid_gid, bpf_get_smp_processor_id, bpf_ktime_get_boot_ns,
};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, PerCpuArray, RingBuf};
use sensor_common::label::Label;
use sensor_common::record::{Header, Loss, RING_VERDICTS, RINGS};

#[map]
static VERDICTS: RingBuf = RingBuf::with_byte_size(4 * 1024 * 1024, 0);
#[map]
static TELEMETRY: RingBuf = RingBuf::with_byte_size(4 * 1024 * 1024, 0);
/// Next sequence number, per ring and CPU.
#[map]
static SEQUENCES: PerCpuArray<u64> = PerCpuArray::with_max_entries(RINGS, 0);
/// Indexed by `Loss`.
#[map]
static LOSSES: PerCpuArray<u64> = PerCpuArray::with_max_entries(Loss::ALL.len() as u32, 0);

#[inline(always)]
pub(crate) fn lost(reason: Loss, count: u64) {
    if let Some(counter) = LOSSES.get_ptr_mut(reason as u32) {
        // SAFETY: an aligned word; cgroup programs can be preempted by one
        // another on one CPU, hence atomic.
        atomic::add(counter, count);
    }
}

#[inline(always)]
pub(crate) fn next_seq(ring: u8) -> u64 {
    match SEQUENCES.get_ptr_mut(ring as u32) {
        // SAFETY: as in `lost`.
        Some(counter) => atomic::fetch_add(counter, 1),
        None => 0,
    }
}

/// The task that a record is about.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Task {
    pub tgid: u32,
    pub tid: u32,
    pub uid: u32,
}

impl Task {
    #[inline(always)]
    pub(crate) fn current() -> Task {
        let id = bpf_get_current_pid_tgid();
        // SAFETY: no preconditions.
        let uid = unsafe { bpf_get_current_uid_gid() } as u32;
        Task { tgid: (id >> 32) as u32, tid: id as u32, uid }
    }
}

/// Records that begin with a [`Header`], `repr(C)`.
pub(crate) trait Record: 'static {
    fn header(&mut self) -> &mut Header;
}

macro_rules! records {
    ($($t:ty),*) => {$(
        impl Record for $t {
            #[inline(always)]
            fn header(&mut self) -> &mut Header {
                &mut self.header
            }
        }
    )*};
}
records!(
    sensor_common::record::Verdict,
    sensor_common::record::NameVerdict,
    sensor_common::record::UnixVerdict,
    sensor_common::record::Exec,
    sensor_common::record::Exit,
    sensor_common::record::Released,
    sensor_common::stdio::Candidate
);

/// A record about `current`. False: the ring was full, and that is counted.
#[inline(always)]
pub(crate) fn emit<T: Record>(ring: u8, kind: u16, label: Label, fill: impl FnOnce(&mut T)) -> bool {
    emit_of(ring, kind, label, Task::current(), fill)
}

#[inline(always)]
pub(crate) fn emit_of<T: Record>(
    ring: u8,
    kind: u16,
    label: Label,
    task: Task,
    fill: impl FnOnce(&mut T),
) -> bool {
    let seq = next_seq(ring);
    let (map, full) = if ring == RING_VERDICTS {
        (&VERDICTS, Loss::VerdictRingFull)
    } else {
        (&TELEMETRY, Loss::TelemetryRingFull)
    };
    let Some(mut entry) = map.reserve::<T>(0) else {
        lost(full, 1);
        return false;
    };
    // SAFETY: `fill` and the header write every field of a plain structure.
    let record = unsafe { entry.assume_init_mut() };
    *record.header() = Header {
        kind,
        size: size_of::<T>() as u16,
        // SAFETY: no preconditions.
        cpu: unsafe { bpf_get_smp_processor_id() },
        seq,
        // SAFETY: no preconditions.
        boottime: unsafe { bpf_ktime_get_boot_ns() },
        label,
        tgid: task.tgid,
        tid: task.tid,
        uid: task.uid,
        generation: kernel::generation(),
    };
    fill(record);
    entry.submit(if ring == RING_VERDICTS { 0 } else { without_waking() });
    true
}

/// Waking the reader costs a server more than judging it. Telemetry waits for
/// the reader's next round, unless there is much of it.
#[inline(always)]
fn without_waking() -> u64 {
    const AVAILABLE: u64 = 0; // BPF_RB_AVAIL_DATA
    const NO_WAKEUP: u64 = 1; // BPF_RB_NO_WAKEUP
    const MUCH: u64 = 256 * 1024;
    if TELEMETRY.query(AVAILABLE) < MUCH { NO_WAKEUP } else { 0 }
}

/// Of [`LOSSES`], how much the agent has reported: kept here so that the next
/// agent reports what was lost while none ran, and no more.
#[map]
static REPORTED: Array<u64> = Array::with_max_entries(Loss::ALL.len() as u32, 0);
