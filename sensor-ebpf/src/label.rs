//! Labels of tasks: where they are kept, inherited at fork, dropped at the end
//! of the thread group.

use crate::kernel::{self, offset, pointer, read};
use crate::{atomic, record, stdio};
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::macros::{map, raw_tracepoint};
use aya_ebpf::maps::{Array, HashMap};
use aya_ebpf::programs::RawTracePointContext;
use sensor_common::kernel::PID_LIMIT;
use sensor_common::label::Label;
use sensor_common::record::{Exit, Instance, KIND_EXIT, Loss, RING_VERDICTS};

/// Indexed by thread group id, sized to `pid_max`: an entry always has a place,
/// an unlabelled process pays one array look-up.
#[map]
static TASKS: Array<Label> = Array::with_max_entries(32768, 0);

/// One bit per possible thread group: labelled ones beyond [`TASKS`] (a
/// `pid_max` raised later). They are denied all IP, and inherit that.
#[map]
static OVERFLOW: Array<u64> = Array::with_max_entries(PID_LIMIT / 64, 0);

/// Instances that reach nothing any more, whatever their profile.
#[map]
static QUARANTINED: HashMap<u32, u8> = HashMap::with_max_entries(16384, 0);

#[map]
static INSTANCES: HashMap<u32, Instance> = HashMap::with_max_entries(16384, 0);

/// Belongs to no server: whatever it asks for is denied.
pub(crate) const OVERFLOWED: Label = Label::new(u16::MAX, 0, 0);

#[inline(always)]
pub(crate) fn of(tgid: u32) -> Label {
    match TASKS.get(tgid) {
        Some(label) => *label,
        None => beyond(tgid),
    }
}

#[inline(always)]
pub(crate) fn of_current() -> Label {
    of((bpf_get_current_pid_tgid() >> 32) as u32)
}

#[inline(always)]
fn beyond(tgid: u32) -> Label {
    match OVERFLOW.get(tgid / 64) {
        Some(word) if *word & (1 << (tgid % 64)) == 0 => Label::NONE,
        // Also a thread group id that cannot be: closed.
        _ => OVERFLOWED,
    }
}

/// Sets or clears the label of a thread group.
#[inline(always)]
pub(crate) fn set(tgid: u32, label: Label) {
    if let Some(slot) = TASKS.get_ptr_mut(tgid) {
        // SAFETY: one aligned word in a map value.
        unsafe { (*slot) = label };
        return;
    }
    let Some(word) = OVERFLOW.get_ptr_mut(tgid / 64) else { return };
    let bit = 1u64 << (tgid % 64);
    if label.is_some() {
        atomic::or(word, bit);
        record::lost(Loss::LabelOverflow, 1);
    } else {
        atomic::and(word, !bit);
    }
}

/// Whether the label's instance is in quarantine.
#[inline(always)]
pub(crate) fn quarantined(label: Label) -> bool {
    // SAFETY: plain integers, both ways.
    matches!(kernel::state(), Some(s) if s.quarantined != 0) && unsafe { is_quarantined(label.0) } != 0
}

/// A global function, which the verifier looks at once.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn is_quarantined(label: u64) -> u64 {
    // SAFETY: only the presence of the entry matters.
    unsafe { QUARANTINED.get(Label(label).instance()) }.is_some() as u64
}

#[inline(always)]
pub(crate) fn instance(id: u32) -> Option<*mut Instance> {
    INSTANCES.get_ptr_mut(id)
}

/// `netns` if it is the one that the label's instance was labelled in, else 0.
#[inline(always)]
pub(crate) fn home(label: Label, netns: u64) -> u64 {
    if netns == 0 {
        return 0;
    }
    match instance(label.instance()) {
        // SAFETY: map value.
        Some(i) if unsafe { (*i).netns } == netns => netns,
        _ => 0,
    }
}

#[inline(always)]
pub(crate) fn add_instance(id: u32, instance: &Instance) -> bool {
    INSTANCES.insert(id, instance, 0).is_ok()
}

/// `sched_process_fork(parent, child)`, before the child first runs
/// (kernel/fork.c, `copy_process`).
#[raw_tracepoint(tracepoint = "sched_process_fork")]
pub fn fork(ctx: RawTracePointContext) -> i32 {
    let parent: u64 = ctx.arg::<u64>(0);
    let child: u64 = ctx.arg::<u64>(1);
    let (Some(parent), Some(child)) =
        (read::<u32>(parent, offset!(task_tgid)), read::<u32>(child, offset!(task_tgid)))
    else {
        return 0;
    };
    if parent == child {
        return 0; // a thread
    }
    let label = of(parent);
    if !label.is_some() {
        // The child's number may be that of a process whose end was not seen.
        if of(child).is_some() {
            set(child, Label::NONE);
        }
        stdio::forked(parent, child);
        return 0;
    }
    set(child, label);
    if let Some(i) = instance(label.instance()) {
        // SAFETY: an aligned word in a map value.
        atomic::add(unsafe { &raw mut (*i).tasks }, 1);
    }
    0
}

/// `sched_process_exit(task)`, once per thread (kernel/exit.c, `do_exit`): the
/// label goes with the last one, not with the first.
#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub fn exit(ctx: RawTracePointContext) -> i32 {
    let task: u64 = ctx.arg::<u64>(0);
    let Some(tgid) = read::<u32>(task, offset!(task_tgid)) else { return 0 };
    let label = of(tgid);
    if !label.is_some() && !stdio::is_candidate(tgid) {
        return 0;
    }
    let live = pointer(task, offset!(task_signal)).and_then(|s| read::<u32>(s, offset!(signal_live)));
    if live != Some(0) {
        return 0;
    }
    stdio::ended(tgid);
    if !label.is_some() {
        return 0;
    }
    set(tgid, Label::NONE);
    let Some(i) = instance(label.instance()) else { return 0 };
    // SAFETY: an aligned word in a map value.
    let before = atomic::fetch_add(unsafe { &raw mut (*i).tasks }, (1_u64).wrapping_neg());
    if before != 1 {
        return 0;
    }
    let code = read::<u32>(task, offset!(task_exit_code)).unwrap_or(0);
    let _ = INSTANCES.remove(label.instance());
    record::emit::<Exit>(RING_VERDICTS, KIND_EXIT, label, |r| {
        r.left = 0;
        r.code = code;
    });
    0
}
