//! The back end for any kernel: one program where system calls return. The
//! registers still hold the arguments there (arch/x86/include/asm/ptrace.h),
//! the return value says how much moved, and the pages were just touched. A
//! call that was blocked when the program was attached is seen, too.

use super::{End, Parts, end, file, moved, moved_in_parts, moved_unread, watched};
use crate::kernel::{Typed, offset, read};
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::helpers::generated::{bpf_loop, bpf_probe_read_user};
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use core::ffi::c_void;
use core::mem::MaybeUninit;
use sensor_common::stdio::{
    FROM_CLIENT, FROM_SERVER, HOW_COMPAT, HOW_SENDFILE, HOW_SPLICE, HOW_TEE, HOW_VMSPLICE,
};

/// Offsets in `struct pt_regs`, x86-64.
const RBX: u64 = 40;
const R10: u64 = 56;
const RDX: u64 = 96;

/// What lies in it from there on: reading all of it costs what one word costs.
#[repr(C)]
#[derive(Clone, Copy)]
struct Registers {
    rdx: u64,
    rsi: u64,
    rdi: u64,
    orig_rax: u64,
}

/// arch/x86/entry/syscalls/syscall_64.tbl
mod nr {
    pub const READ: u64 = 0;
    pub const WRITE: u64 = 1;
    pub const READV: u64 = 19;
    pub const WRITEV: u64 = 20;
    pub const SENDFILE: u64 = 40;
    pub const SENDTO: u64 = 44;
    pub const RECVFROM: u64 = 45;
    pub const SENDMSG: u64 = 46;
    pub const RECVMSG: u64 = 47;
    pub const SPLICE: u64 = 275;
    pub const TEE: u64 = 276;
    pub const VMSPLICE: u64 = 278;
    pub const RECVMMSG: u64 = 299;
    pub const SENDMMSG: u64 = 307;
    pub const PREADV2: u64 = 327;
    pub const PWRITEV2: u64 = 328;
}

const MSG_PEEK: u64 = 2;

/// `sys_exit(regs, ret)` (include/trace/events/syscalls.h).
#[raw_tracepoint(tracepoint = "sys_exit")]
pub fn syscall(ctx: RawTracePointContext) -> i32 {
    let ret: i64 = ctx.arg(1);
    if ret <= 0 {
        return 0;
    }
    if !watched((bpf_get_current_pid_tgid() >> 32) as u32) {
        return 0;
    }
    let regs: u64 = ctx.arg(0);
    let Some(Registers { rdx, rsi, rdi, orig_rax: nr }) = read::<Registers>(regs, RDX) else { return 0 };
    let other = |at: u64| read::<u64>(regs, at).unwrap_or(0);
    if is_compat() {
        compat(nr, other(RBX), ret as u64);
        return 0;
    }
    let bytes = ret as u64;
    let (direction, lie) = match nr {
        nr::READ | nr::RECVFROM => (FROM_CLIENT, Lie::AtOnce),
        nr::WRITE | nr::SENDTO => (FROM_SERVER, Lie::AtOnce),
        nr::READV | nr::PREADV2 => (FROM_CLIENT, Lie::InParts),
        nr::WRITEV | nr::PWRITEV2 => (FROM_SERVER, Lie::InParts),
        nr::RECVMSG => (FROM_CLIENT, Lie::InMessage),
        nr::SENDMSG => (FROM_SERVER, Lie::InMessage),
        nr::RECVMMSG => (FROM_CLIENT, Lie::InMessages),
        nr::SENDMMSG => (FROM_SERVER, Lie::InMessages),
        _ => {
            elsewhere(nr, rdi, rsi, rdx, bytes);
            return 0;
        }
    };
    let flags = match nr {
        nr::RECVFROM | nr::RECVMMSG => other(R10),
        nr::RECVMSG => rdx,
        _ => 0,
    };
    if flags & MSG_PEEK != 0 {
        return 0;
    }
    // SAFETY: plain integers; the callback and its context outlive the call.
    unsafe {
        match lie {
            Lie::AtOnce => note_bytes(rdi, direction, rsi, bytes),
            Lie::InParts => note_parts(rdi, direction, rsi, rdx, bytes),
            Lie::InMessage => note_message(rdi, direction, rsi, bytes),
            Lie::InMessages => {
                let mut m = Messages { fd: rdi, direction, at: rsi };
                let done = bpf_loop(bytes as u32, one_message as *mut c_void, (&raw mut m).cast(), 0);
                done as u64
            }
        };
    }
    0
}

/// Where the bytes of a call lie.
#[derive(Clone, Copy)]
enum Lie {
    AtOnce,
    /// `struct iovec`
    InParts,
    /// `struct user_msghdr`
    InMessage,
    /// `struct mmsghdr`
    InMessages,
}

/// Calls whose bytes are in no memory of the task's.
#[inline(always)]
fn elsewhere(nr: u64, rdi: u64, rsi: u64, rdx: u64, bytes: u64) {
    match nr {
        nr::SPLICE => {
            unread(rdi, FROM_CLIENT, bytes, HOW_SPLICE);
            unread(rdx, FROM_SERVER, bytes, HOW_SPLICE);
        }
        nr::TEE => unread(rsi, FROM_SERVER, bytes, HOW_TEE),
        nr::SENDFILE => unread(rdi, FROM_SERVER, bytes, HOW_SENDFILE),
        nr::VMSPLICE => {
            unread(rdi, FROM_CLIENT, bytes, HOW_VMSPLICE);
            unread(rdi, FROM_SERVER, bytes, HOW_VMSPLICE);
        }
        _ => {}
    }
}

#[inline(always)]
fn wire(fd: u64) -> Option<End> {
    file(fd as u32).and_then(end)
}

// Global functions, each of which the verifier looks at once: the frames of a
// chain of calls have 512 bytes together.

/// Read or written at one place.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn note_bytes(fd: u64, direction: u32, base: u64, bytes: u64) -> u64 {
    let Some(end) = wire(fd) else { return 0 };
    moved(&end, direction, base, bytes);
    1
}

#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn note_parts(fd: u64, direction: u32, segments: u64, count: u64, bytes: u64) -> u64 {
    let Some(end) = wire(fd) else { return 0 };
    moved_in_parts(&end, direction, Parts { segments, count, skip: 0, in_kernel: false }, bytes);
    1
}

#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn note_message(fd: u64, direction: u32, at: u64, bytes: u64) -> u64 {
    let Some(end) = wire(fd) else { return 0 };
    message(&end, direction, at, bytes);
    1
}

#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn note_unread(fd: u64, direction: u32, bytes: u64, how: u32) -> u64 {
    let Some(end) = wire(fd) else { return 0 };
    moved_unread(&end, direction, bytes, how);
    1
}

#[inline(always)]
fn unread(fd: u64, direction: u32, bytes: u64, how: u32) {
    // SAFETY: plain integers.
    unsafe { note_unread(fd, direction, bytes, how) };
}

/// A word of user memory; 0 if it cannot be read.
#[inline(always)]
fn user_word(at: u64) -> u64 {
    let mut word = MaybeUninit::<u64>::uninit();
    // SAFETY: the helper checks the address and writes 8 bytes.
    if unsafe { bpf_probe_read_user(word.as_mut_ptr().cast(), 8, at as *const _) } != 0 {
        return 0;
    }
    // SAFETY: written in full.
    unsafe { word.assume_init() }
}

/// `struct user_msghdr` (linux/socket.h): the segments at 16, their number at 24.
#[inline(always)]
fn message(end: &End, direction: u32, at: u64, bytes: u64) {
    let (segments, count) = (user_word(at + 16), user_word(at + 24));
    moved_in_parts(end, direction, Parts { segments, count, skip: 0, in_kernel: false }, bytes);
}

#[repr(C)]
struct Messages {
    fd: u64,
    direction: u32,
    at: u64,
}

/// One `struct mmsghdr`: a message header and how much moved.
extern "C" fn one_message(_index: u32, m: *mut Messages) -> i64 {
    const SIZE: u64 = 64;
    const LEN: u64 = 56;
    // SAFETY: what was given to bpf_loop.
    let m = unsafe { &mut *m };
    let bytes = user_word(m.at + LEN) as u32 as u64;
    if bytes > 0 {
        // SAFETY: plain integers.
        unsafe { note_message(m.fd, m.direction, m.at, bytes) };
    }
    m.at += SIZE;
    0
}

/// The call came through the 32-bit interface (`TS_COMPAT`,
/// arch/x86/include/asm/thread_info.h).
#[inline(always)]
fn is_compat() -> bool {
    const TS_COMPAT: u32 = 2;
    Typed::current().field::<u32>(offset!(task_status)) & TS_COMPAT != 0
}

/// Its numbers and structures are others: only how much moved is recorded.
/// arch/x86/entry/syscalls/syscall_32.tbl; `socketcall` hides its descriptor.
#[inline(always)]
fn compat(nr: u64, fd: u64, bytes: u64) {
    match nr {
        3 | 145 | 371 | 378 => unread(fd, FROM_CLIENT, bytes, HOW_COMPAT),
        4 | 146 | 369 | 379 | 187 | 239 | 316 => unread(fd, FROM_SERVER, bytes, HOW_COMPAT),
        _ => {}
    }
}
