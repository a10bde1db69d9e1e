//! Working memory for names. The hooks run with migration off but preemption
//! on, in tasks and in softirqs: whoever shares a CPU must not share a buffer,
//! or one query could be read while another is judged.

use crate::atomic;
use crate::name::NameBits;
use crate::record::Task;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::bpf_skb_load_bytes;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{PerCpuArray, lpm_trie::Key};
use sensor_common::addr::Addr;
use sensor_common::dns::{self, Bytes, MESSAGE_BYTES};
use sensor_common::label::Label;
use sensor_common::name::{Learned, LearnedKey};
use sensor_common::tls;

/// Buffers per CPU. One that finds none free is counted, and denied.
const BUFFERS: u32 = 4;

/// The packet that is being read.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct About {
    pub label: Label,
    /// The socket's, if it is the one its server was labelled in; else 0.
    pub netns: u64,
    pub cookie: u64,
    pub now: u64,
    /// Who the socket talks to, before translation; in the form of the packet.
    pub peer: Addr,
    pub task: Task,
    /// `name::scope` of the label's profile under the generation in force.
    pub scope: u32,
    pub generation: u32,
    pub rule: u32,
    pub port: u16,
    pub own_port: u16,
    pub protocol: u8,
    /// `Reason` of the packet's own verdict, then of the name's.
    pub reason: u8,
    pub audit: u8,
    /// 1: it was read to its end, 2: it could not be.
    pub done: u8,
    /// `ASKED_*` of the question being answered.
    pub asked: u32,
    /// Questions read.
    pub questions: u32,
}

#[repr(C)]
pub struct Scratch {
    pub bytes: Buffer,
    /// `data.text` is the name that was read.
    pub name: Key<NameBits>,
    pub about: About,
    pub dns: dns::Reader,
    pub tls: tls::Reader,
    pub key: LearnedKey,
    pub learned: Learned,
}

#[repr(C)]
pub struct Buffer(pub [u8; MESSAGE_BYTES]);

impl Bytes for Buffer {
    #[inline(always)]
    fn at(&self, at: u32) -> u8 {
        let at = bounded(at as u64, MESSAGE_BYTES as u64 - 1);
        // SAFETY: the index is below the length, a power of two.
        unsafe { *self.0.as_ptr().add(at as usize) }
    }
}

/// `x & mask`, where the compiler cannot see it and move the bound to another
/// register than the one that is used.
#[inline(always)]
pub(crate) fn bounded(mut x: u64, mask: u64) -> u64 {
    // SAFETY: one instruction on registers.
    unsafe {
        core::arch::asm!("{0} &= {1}", inout(reg) x, in(reg) mask, options(nomem, nostack, pure, preserves_flags));
    }
    x
}

impl Buffer {
    /// Takes `len` bytes of the packet, of which at most the buffer's size.
    #[inline(always)]
    pub(crate) fn load(&mut self, skb: *mut __sk_buff, at: u32, len: u32) -> bool {
        // 1..=MESSAGE_BYTES, seen by the verifier on the very register.
        let len = bounded(len.wrapping_sub(1) as u64, MESSAGE_BYTES as u64 - 1) as u32 + 1;
        // SAFETY: the helper writes `len` bytes or fails.
        unsafe { bpf_skb_load_bytes(skb.cast(), at, self.0.as_mut_ptr().cast(), len) == 0 }
    }
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

/// The buffer of a number that [`take`] gave.
#[inline(always)]
pub(crate) fn at(number: u32) -> Option<*mut Scratch> {
    SCRATCH.get_ptr_mut(number)
}

#[inline(always)]
pub(crate) fn give(number: u32) {
    if let Some(busy) = SCRATCH_BUSY.get_ptr_mut(0) {
        atomic::and(busy, !(1 << (number & (BUFFERS - 1))));
    }
}
