//! The same calls through io_uring: no system call tracepoint sees them.

use crate::Target;
use crate::wire::*;
use io_uring::{IoUring, opcode, squeue, types};
use libc::{SOCK_CLOEXEC, SOCK_DGRAM, SOCK_STREAM};
use mcp_sensor_tests::report::PAYLOAD;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

pub(crate) const ALL: &[(&str, Attempt)] = &[
    ("uring-socket-connect", socket_connect),
    ("uring-connect-send", connect_send),
    ("uring-sendmsg", sendmsg),
    ("uring-socket-udplite", socket_udplite),
    ("uring-sqpoll-connect", sqpoll),
];

fn ring(builder: &io_uring::Builder) -> Result<IoUring, Stop> {
    let error = |e: std::io::Error| Stop { step: "io_uring_setup", errno: e.raw_os_error().unwrap_or(0) };
    builder.build(8).map_err(error)
}

fn plain_ring() -> Result<IoUring, Stop> {
    ring(&IoUring::builder())
}

/// Submits one operation and returns its result.
fn run(ring: &mut IoUring, step: &'static str, entry: &squeue::Entry) -> Result<i32, Stop> {
    // SAFETY: what the entry points to outlives this call, which waits for it.
    unsafe { ring.submission().push(entry) }.map_err(|_| Stop { step, errno: libc::EBUSY })?;
    let submitted = ring.submit_and_wait(1);
    submitted.map_err(|e| Stop { step: "io_uring_enter", errno: e.raw_os_error().unwrap_or(0) })?;
    let result = ring.completion().next().map_or(-libc::EIO, |c| c.result());
    if result < 0 { Err(Stop { step, errno: -result }) } else { Ok(result) }
}

fn make_socket(ring: &mut IoUring, t: &Target, kind: i32, protocol: i32) -> Result<OwnedFd, Stop> {
    let entry = opcode::Socket::new(family(t.to), kind | SOCK_CLOEXEC, protocol).build();
    let fd = run(ring, "IORING_OP_SOCKET", &entry)?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn connect_by(ring: &mut IoUring, s: &OwnedFd, t: &Target) -> Result<(), Stop> {
    let to = raw(t.address());
    let entry = opcode::Connect::new(types::Fd(s.as_raw_fd()), to.ptr(), to.len).build();
    run(ring, "IORING_OP_CONNECT", &entry).map(drop)
}

fn send_by(ring: &mut IoUring, s: &OwnedFd) -> Tried {
    let entry = opcode::Send::new(types::Fd(s.as_raw_fd()), PAYLOAD.as_ptr(), PAYLOAD.len() as u32).build();
    run(ring, "IORING_OP_SEND", &entry)?;
    Ok(answered(s))
}

fn socket_connect(t: &Target) -> Tried {
    let mut ring = plain_ring()?;
    let s = make_socket(&mut ring, t, SOCK_STREAM, 0)?;
    connect_by(&mut ring, &s, t)?;
    send_by(&mut ring, &s)
}

fn connect_send(t: &Target) -> Tried {
    let mut ring = plain_ring()?;
    let s = socket_for(t.to, SOCK_STREAM, 0)?;
    connect_by(&mut ring, &s, t)?;
    send_by(&mut ring, &s)
}

fn sendmsg(t: &Target) -> Tried {
    let mut ring = plain_ring()?;
    let s = make_socket(&mut ring, t, SOCK_DGRAM, 0)?;
    let message = Message::new(PAYLOAD, Some(t.address()), Vec::new());
    let entry = opcode::SendMsg::new(types::Fd(s.as_raw_fd()), &message.header).build();
    run(&mut ring, "IORING_OP_SENDMSG", &entry)?;
    Ok(answered(&s))
}

fn socket_udplite(t: &Target) -> Tried {
    let mut ring = plain_ring()?;
    let s = make_socket(&mut ring, t, SOCK_DGRAM, mcp_sensor_tests::peer::IPPROTO_UDPLITE)?;
    connect_by(&mut ring, &s, t)?;
    send_by(&mut ring, &s)
}

/// A kernel thread submits, not this task.
fn sqpoll(t: &Target) -> Tried {
    let mut ring = ring(IoUring::builder().setup_sqpoll(50))?;
    let s = make_socket(&mut ring, t, SOCK_STREAM, 0)?;
    connect_by(&mut ring, &s, t)?;
    send_by(&mut ring, &s)
}
