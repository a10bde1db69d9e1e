//! Reading kernel structures, and the words that switch the programs.

use aya_ebpf::helpers::generated::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_current_task, bpf_get_current_task_btf, bpf_probe_read_kernel,
};
use aya_ebpf::macros::map;
use aya_ebpf::maps::Array;
use core::mem::MaybeUninit;
use sensor_common::kernel::{Counts, Offsets, State};

#[unsafe(no_mangle)]
static OFFSETS: Offsets = zeroed_offsets();

const fn zeroed_offsets() -> Offsets {
    // SAFETY: every field is an integer.
    unsafe { MaybeUninit::<Offsets>::zeroed().assume_init() }
}

/// Reads one offset; volatile, so that the compiler does not fold the zero it
/// sees before the agent has written the real value.
macro_rules! offset {
    ($field:ident) => {
        $crate::kernel::offset_at(core::mem::offset_of!(sensor_common::kernel::Offsets, $field))
    };
}
pub(crate) use offset;

#[inline(always)]
pub(crate) fn offset_at(field: usize) -> u64 {
    // SAFETY: `field` comes from `offset_of!`.
    unsafe { (&raw const OFFSETS).byte_add(field).cast::<u32>().read_volatile() as u64 }
}

#[map]
static STATE: Array<State> = Array::with_max_entries(1, 0);

#[map]
static COUNTS: Array<Counts> = Array::with_max_entries(1, 0);

#[inline(always)]
pub(crate) fn counts() -> Option<*mut Counts> {
    COUNTS.get_ptr_mut(0)
}

#[inline(always)]
pub(crate) fn state() -> Option<&'static State> {
    STATE.get(0)
}

/// The generation in force, or 0.
#[inline(always)]
pub(crate) fn generation() -> u32 {
    match STATE.get_ptr(0) {
        // SAFETY: the map value outlives the program; the agent stores one word.
        Some(s) => unsafe { (&raw const (*s).generation).read_volatile() },
        None => 0,
    }
}

/// `T` at `base + offset` in kernel memory, `None` if it cannot be read.
#[inline(always)]
pub(crate) fn read<T: Copy>(base: u64, offset: u64) -> Option<T> {
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: the helper checks the address and writes size_of::<T>() bytes.
    let failed = unsafe {
        bpf_probe_read_kernel(value.as_mut_ptr().cast(), size_of::<T>() as u32, (base + offset) as *const _)
    };
    if failed != 0 {
        return None;
    }
    // SAFETY: written in full.
    Some(unsafe { value.assume_init() })
}

/// A pointer field; null is `None`.
#[inline(always)]
pub(crate) fn pointer(base: u64, offset: u64) -> Option<u64> {
    match read::<u64>(base, offset) {
        Some(0) | None => None,
        some => some,
    }
}

/// `current` as an address.
#[inline(always)]
pub(crate) fn current() -> u64 {
    // SAFETY: no preconditions.
    unsafe { bpf_get_current_task() }
}

/// A structure whose type the verifier knows, so that its fields are read by
/// plain loads: a fault reads as 0, and a read costs a tenth of [`read`]'s.
/// For tracing programs (`bpf_tracing_func_proto`, kernel/trace/bpf_trace.c).
#[derive(Clone, Copy)]
pub(crate) struct Typed(*const u8);

impl Typed {
    /// An argument of a tracing or LSM program.
    #[inline(always)]
    pub(crate) fn at(argument: *const u8) -> Typed {
        Typed(argument)
    }

    /// `current`.
    #[inline(always)]
    pub(crate) fn current() -> Typed {
        // SAFETY: no preconditions.
        Typed(unsafe { bpf_get_current_task_btf() }.cast())
    }

    /// A field that is a number, or a pointer to what is none of C's structures.
    #[inline(always)]
    pub(crate) fn field<T: Copy>(self, offset: u64) -> T {
        // SAFETY: the verifier holds offset and size against the type.
        unsafe { self.0.byte_add(offset as usize).cast::<T>().read_volatile() }
    }

    /// A field that points to a structure.
    #[inline(always)]
    pub(crate) fn to(self, offset: u64) -> Option<Typed> {
        let to: *const u8 = self.field(offset);
        if to.is_null() { None } else { Some(Typed(to)) }
    }
}

/// Whether the current task is within the cgroup that the sensor watches.
#[inline(always)]
pub(crate) fn in_scope() -> bool {
    let level = offset!(scope_level);
    // SAFETY: written once before the programs are loaded; no preconditions.
    level == 0
        || unsafe {
            bpf_get_current_ancestor_cgroup_id(level as i32) == (&raw const OFFSETS.scope).read_volatile()
        }
}

/// CAP_NET_ADMIN in the task's permitted set, in whatever user namespace. Not
/// readable counts as yes.
#[inline(always)]
pub(crate) fn has_net_admin(task: u64) -> bool {
    const CAP_NET_ADMIN: u64 = 12;
    let Some(cred) = pointer(task, offset!(task_cred)) else {
        return true;
    };
    match read::<u64>(cred, offset!(cred_cap_permitted)) {
        Some(set) => set & (1 << CAP_NET_ADMIN) != 0,
        None => true,
    }
}

/// Cookie of the task's network namespace, 0 if it cannot be read.
#[inline(always)]
pub(crate) fn netns(task: u64) -> u64 {
    pointer(task, offset!(task_nsproxy))
        .and_then(|p| pointer(p, offset!(nsproxy_net)))
        .and_then(|n| read::<u64>(n, offset!(net_cookie)))
        .unwrap_or(0)
}
