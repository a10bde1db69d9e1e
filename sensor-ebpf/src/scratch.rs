//! Working memory for names. The hooks run with migration off but preemption
//! on, in tasks and in softirqs: whoever shares a CPU must not share a buffer,
//! or one query could be read while another is judged.

use crate::atomic;
use crate::name::NameBits;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{PerCpuArray, lpm_trie::Key};
use sensor_common::name::{Learned, LearnedKey};

/// Buffers per CPU. One that finds none free is counted, and denied.
const BUFFERS: u32 = 4;

#[repr(C)]
pub struct Scratch {
    pub name: Key<NameBits>,
    pub learned: Learned,
    pub key: LearnedKey,
}

#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(BUFFERS, 0);
/// One bit per buffer in use.
#[map]
static SCRATCH_BUSY: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// A buffer of this CPU's and its number; to be [`give`]n back on every path.
#[inline(always)]
pub(crate) fn take() -> Option<(u32, *mut Scratch)> {
    let busy = SCRATCH_BUSY.get_ptr_mut(0)?;
    let mut i = 0;
    while i < BUFFERS {
        if atomic::fetch_or(busy, 1 << i) & 1 << i == 0 {
            return SCRATCH.get_ptr_mut(i).map(|scratch| (i, scratch));
        }
        i += 1;
    }
    None
}

#[inline(always)]
pub(crate) fn give(number: u32) {
    if let Some(busy) = SCRATCH_BUSY.get_ptr_mut(0) {
        atomic::and(busy, !(1 << (number & (BUFFERS - 1))));
    }
}
