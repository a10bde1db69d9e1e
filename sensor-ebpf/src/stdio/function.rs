//! The back end for kernels that allow fexit: the functions that every way of
//! reading and writing a pipe or a unix socket ends in, io_uring's included.

use super::{End, Parts, SEGMENTS, end, moved, moved_in_parts, moved_unread, tcp, watched};
use crate::kernel::{offset, pointer, read};
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::helpers::generated::bpf_loop;
use aya_ebpf::macros::fexit;
use aya_ebpf::programs::FExitContext;
use core::ffi::c_void;
use sensor_common::stdio::{
    FROM_CLIENT, FROM_SERVER, HOW_IO_URING, HOW_SENDFILE, HOW_SPLICE, HOW_TEE, HOW_VMSPLICE,
};

const MSG_PEEK: u32 = 2;

#[inline(always)]
fn concerned(ret: i64) -> bool {
    ret > 0 && watched((bpf_get_current_pid_tgid() >> 32) as u32)
}

/// As a number: a global function takes no pointer whose type the verifier knows.
#[inline(always)]
fn untyped(pointer: u64) -> u64 {
    read::<u64>((&raw const pointer) as u64, 0).unwrap_or(0)
}

/// `pipe_write(struct kiocb *, struct iov_iter *)`; `anon_pipe_write` since 6.16.
#[fexit(function = "pipe_write")]
pub fn pipe_write(ctx: FExitContext) -> i32 {
    kiocb(&ctx, FROM_SERVER)
}

#[fexit(function = "pipe_read")]
pub fn pipe_read(ctx: FExitContext) -> i32 {
    kiocb(&ctx, FROM_CLIENT)
}

/// Named pipes, where they have functions of their own.
#[fexit(function = "fifo_pipe_write")]
pub fn fifo_write(ctx: FExitContext) -> i32 {
    kiocb(&ctx, FROM_SERVER)
}

#[fexit(function = "fifo_pipe_read")]
pub fn fifo_read(ctx: FExitContext) -> i32 {
    kiocb(&ctx, FROM_CLIENT)
}

#[inline(always)]
fn kiocb(ctx: &FExitContext, direction: u32) -> i32 {
    let ret: i64 = ctx.arg(2);
    if concerned(ret)
        && let Some(end) = pointer(ctx.arg(0), offset!(kiocb_filp)).and_then(end)
    {
        iterated(end, direction, ctx.arg(1), ret as u64);
    }
    0
}

/// `unix_stream_sendmsg(struct socket *, struct msghdr *, size_t)`
#[fexit(function = "unix_stream_sendmsg")]
pub fn unix_send(ctx: FExitContext) -> i32 {
    /// splice and sendfile: `spliced` counts these (linux/socket.h, 6.5).
    const MSG_SPLICE_PAGES: u32 = 0x0800_0000;
    let ret: i32 = ctx.arg(3);
    if !concerned(ret as i64) {
        return 0;
    }
    let message: u64 = ctx.arg(1);
    if read::<u32>(message, offset!(msghdr_flags)).unwrap_or(0) & MSG_SPLICE_PAGES != 0 {
        return 0;
    }
    if let Some(end) = pointer(ctx.arg(0), offset!(socket_file)).and_then(end) {
        iterated(end, FROM_SERVER, message + offset!(msghdr_iter), ret as u64);
    }
    0
}

/// `unix_stream_recvmsg(struct socket *, struct msghdr *, size_t, int flags)`
#[fexit(function = "unix_stream_recvmsg")]
pub fn unix_receive(ctx: FExitContext) -> i32 {
    let ret: i32 = ctx.arg(4);
    if !concerned(ret as i64) || ctx.arg::<u32>(3) & MSG_PEEK != 0 {
        return 0;
    }
    if let Some(end) = pointer(ctx.arg(0), offset!(socket_file)).and_then(end) {
        iterated(end, FROM_CLIENT, ctx.arg::<u64>(1) + offset!(msghdr_iter), ret as u64);
    }
    0
}

/// `tcp_sendmsg(struct sock *, struct msghdr *, size_t)`
#[fexit(function = "tcp_sendmsg")]
pub fn tcp_send(ctx: FExitContext) -> i32 {
    let ret: i32 = ctx.arg(3);
    if concerned(ret as i64)
        && let Some(end) = tcp(untyped(ctx.arg(0)))
    {
        iterated(end, FROM_SERVER, ctx.arg::<u64>(1) + offset!(msghdr_iter), ret as u64);
    }
    0
}

/// `tcp_recvmsg(struct sock *, struct msghdr *, size_t, int flags, int *)`
#[fexit(function = "tcp_recvmsg")]
pub fn tcp_receive(ctx: FExitContext) -> i32 {
    tcp_received(&ctx, ctx.arg(5))
}

/// `tcp_recvmsg(struct sock *, struct msghdr *, size_t, int flags)`, on newer kernels (7.2).
/// Not where it has five: the fifth would be taken for what it returned.
#[fexit(function = "tcp_recvmsg")]
pub fn tcp_receive_of_4(ctx: FExitContext) -> i32 {
    tcp_received(&ctx, ctx.arg(4))
}

#[inline(always)]
fn tcp_received(ctx: &FExitContext, ret: i32) -> i32 {
    if concerned(ret as i64)
        && ctx.arg::<u32>(3) & MSG_PEEK == 0
        && let Some(end) = tcp(untyped(ctx.arg(0)))
    {
        iterated(end, FROM_CLIENT, ctx.arg::<u64>(1) + offset!(msghdr_iter), ret as u64);
    }
    0
}

/// `do_splice(in, off_in, out, off_out, len, flags)`: the system call's and
/// io_uring's.
#[fexit(function = "do_splice")]
pub fn spliced(ctx: FExitContext) -> i32 {
    let ret: i64 = ctx.arg(6);
    if concerned(ret) {
        unread(ctx.arg(0), FROM_CLIENT, ret as u64, HOW_SPLICE);
        unread(ctx.arg(2), FROM_SERVER, ret as u64, HOW_SPLICE);
    }
    0
}

/// `do_tee(in, out, len, flags)`
#[fexit(function = "do_tee")]
pub fn teed(ctx: FExitContext) -> i32 {
    let ret: i64 = ctx.arg(4);
    if concerned(ret) {
        unread(ctx.arg(1), FROM_SERVER, ret as u64, HOW_TEE);
    }
    0
}

/// `__x64_sys_vmsplice(struct pt_regs *)`
#[fexit(function = "__x64_sys_vmsplice")]
pub fn vmspliced(ctx: FExitContext) -> i32 {
    let ret: i64 = ctx.arg(1);
    if concerned(ret)
        && let Some(file) = first_argument(ctx.arg(0))
    {
        unread(file, FROM_CLIENT, ret as u64, HOW_VMSPLICE);
        unread(file, FROM_SERVER, ret as u64, HOW_VMSPLICE);
    }
    0
}

/// `__x64_sys_sendfile64(struct pt_regs *)`
#[fexit(function = "__x64_sys_sendfile64")]
pub fn sent_file(ctx: FExitContext) -> i32 {
    let ret: i64 = ctx.arg(1);
    if concerned(ret)
        && let Some(file) = first_argument(ctx.arg(0))
    {
        unread(file, FROM_SERVER, ret as u64, HOW_SENDFILE);
    }
    0
}

/// The file behind a system call's first argument.
#[inline(always)]
fn first_argument(regs: u64) -> Option<u64> {
    const RDI: u64 = 112;
    super::file(read::<u64>(regs, RDI)? as u32)
}

#[inline(always)]
fn unread(file: u64, direction: u32, bytes: u64, how: u32) {
    if let Some(end) = end(file) {
        moved_unread(&end, direction, bytes, how);
    }
}

/// `bytes` went through an iterator, which has moved on: what it passed lies
/// behind where it stands.
#[inline(always)]
fn iterated(end: End, direction: u32, iter: u64, bytes: u64) {
    let kind = read::<u8>(iter, offset!(iter_type)).unwrap_or(u8::MAX) as u64;
    let (Some(data), Some(at)) =
        (read::<u64>(iter, offset!(iter_data)), read::<u64>(iter, offset!(iter_offset)))
    else {
        return;
    };
    if kind == offset!(iter_ubuf) {
        moved(&end, direction, data + at.wrapping_sub(bytes), bytes);
    } else if kind == offset!(iter_iovec) {
        let mut back = Back { segment: data, at, left: bytes };
        // SAFETY: the callback and its context outlive the call.
        unsafe { bpf_loop(1025, step_back as *mut c_void, (&raw mut back).cast(), 0) };
        let parts = Parts { segments: back.segment, count: SEGMENTS, skip: back.at, in_kernel: true };
        moved_in_parts(&end, direction, parts, bytes);
    } else {
        // Pages: io_uring's registered buffers.
        moved_unread(&end, direction, bytes, HOW_IO_URING);
    }
}

/// Not how many there are: the verifier would follow the loop once for each
/// number that it could end with. The bytes say where to stop.
#[repr(C)]
struct Back {
    segment: u64,
    /// Bytes of the segment that were passed.
    at: u64,
    left: u64,
}

/// Back by one segment; its array is the kernel's own copy.
extern "C" fn step_back(_index: u32, back: *mut Back) -> i64 {
    // SAFETY: what was given to bpf_loop.
    let back = unsafe { &mut *back };
    if back.at >= back.left {
        back.at -= back.left;
        back.left = 0;
        return 1;
    }
    back.left -= back.at;
    back.segment -= 16;
    match read::<u64>(back.segment, 8) {
        Some(len) => back.at = len,
        None => return 1,
    }
    0
}
