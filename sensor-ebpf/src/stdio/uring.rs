//! io_uring moves bytes where no system call returns them. Beside `syscall`,
//! this program counts them; `function` needs no such help.

use super::{end, moved_unread, watched};
use crate::kernel::{offset, pointer, read};
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use sensor_common::stdio::{FROM_CLIENT, FROM_SERVER, HOW_IO_URING};

/// `enum io_uring_op` (include/uapi/linux/io_uring.h) of what reads, by bit:
/// READV, READ_FIXED, RECVMSG, READ, RECV, READ_MULTISHOT, RECV_ZC, READV_FIXED.
const READS: u64 = 1 << 1 | 1 << 4 | 1 << 10 | 1 << 22 | 1 << 27 | 1 << 49 | 1 << 58 | 1 << 60;
/// WRITEV, WRITE_FIXED, SENDMSG, WRITE, SEND, SPLICE, TEE, SEND_ZC, SENDMSG_ZC,
/// WRITEV_FIXED.
const WRITES: u64 =
    1 << 2 | 1 << 5 | 1 << 9 | 1 << 23 | 1 << 26 | 1 << 30 | 1 << 33 | 1 << 47 | 1 << 48 | 1 << 61;

/// `io_uring_complete(ctx, req, cqe)`, before Linux 6.16
/// `(ctx, req, user_data, res, …)` (include/trace/events/io_uring.h), in the
/// task that the ring belongs to or in a worker thread of it.
#[raw_tracepoint(tracepoint = "io_uring_complete")]
pub fn uring(ctx: RawTracePointContext) -> i32 {
    if !watched((bpf_get_current_pid_tgid() >> 32) as u32) {
        return 0;
    }
    let request: u64 = ctx.arg(1);
    if request == 0 {
        return 0;
    }
    let res = if offset!(uring_complete_args) == 3 {
        const CQE_RES: u64 = 8;
        read::<i32>(ctx.arg(2), CQE_RES).unwrap_or(0)
    } else {
        ctx.arg::<i32>(3)
    };
    if res <= 0 {
        return 0;
    }
    let Some(opcode) = read::<u8>(request, offset!(uring_opcode)) else { return 0 };
    if opcode > 63 {
        return 0;
    }
    let bit = 1u64 << opcode;
    let direction = if READS & bit != 0 {
        FROM_CLIENT
    } else if WRITES & bit != 0 {
        FROM_SERVER
    } else {
        return 0;
    };
    let Some(end) = pointer(request, offset!(uring_file)).and_then(end) else { return 0 };
    moved_unread(&end, direction, res as u64, HOW_IO_URING);
    0
}
