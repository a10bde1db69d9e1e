//! Writing, by each call that writes.

use crate::ring::Ring;
use crate::{counted, total};
use io_uring::{opcode, types};
use std::io::{self, IoSlice};
use std::os::fd::RawFd;

pub(crate) const NAMES: [&str; 16] = [
    "write",
    "writev",
    "pwritev2",
    "send",
    "sendto",
    "sendmsg",
    "sendmmsg",
    "uring-write",
    "uring-writev",
    "uring-send",
    "uring-sendmsg",
    "splice",
    "vmsplice",
    "tee",
    "sendfile",
    "nonblocking",
];

/// In what portions a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Whole,
    /// One call for each byte.
    Bytes,
    /// One call, several pieces to each message.
    Pieces,
    /// One call for all messages that are ready.
    Together,
}

impl Shape {
    pub(crate) fn named(name: &str) -> Option<Shape> {
        match name {
            "whole" => Some(Shape::Whole),
            "bytes" => Some(Shape::Bytes),
            "pieces" => Some(Shape::Pieces),
            "together" => Some(Shape::Together),
            _ => None,
        }
    }
}

/// May write less than there is.
type Call = fn(&mut Output, &[IoSlice<'_>]) -> io::Result<usize>;

pub(crate) struct Output {
    fd: RawFd,
    call: Call,
    shape: Shape,
    ring: Option<Ring>,
    /// For `splice` and `tee`.
    pipe: [RawFd; 2],
    /// For `sendfile`.
    file: RawFd,
}

impl Output {
    /// `None`: no such call.
    pub(crate) fn new(name: &str, fd: RawFd, shape: Shape) -> Option<io::Result<Output>> {
        let call: Call = match name {
            "write" => write,
            "writev" => writev,
            "pwritev2" => pwritev2,
            "send" => |o, pieces| sendto(o, pieces, 0),
            "sendto" => |o, pieces| sendto(o, pieces, libc::MSG_NOSIGNAL),
            "sendmsg" => sendmsg,
            "sendmmsg" => sendmmsg,
            "uring-write" => uring_write,
            "uring-writev" => uring_writev,
            "uring-send" => uring_send,
            "uring-sendmsg" => uring_sendmsg,
            "splice" => splice,
            "vmsplice" => vmsplice,
            "tee" => tee,
            "sendfile" => sendfile,
            "nonblocking" => nonblocking,
            _ => return None,
        };
        Some(Output::with(name, fd, call, shape))
    }

    fn with(name: &str, fd: RawFd, call: Call, shape: Shape) -> io::Result<Output> {
        let ring = if name.starts_with("uring") { Some(Ring::new()?) } else { None };
        let mut pipe = [-1; 2];
        // SAFETY: a place for two descriptors; a constant name.
        let file = unsafe {
            counted(libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) as isize)?;
            counted(libc::memfd_create(c"answer".as_ptr(), libc::MFD_CLOEXEC) as isize)?
        };
        Ok(Output { fd, call, shape, ring, pipe, file: file as RawFd })
    }

    pub(crate) fn send(&mut self, messages: &[Vec<u8>]) -> io::Result<()> {
        match self.shape {
            Shape::Whole => messages.iter().try_for_each(|m| self.all(&mut [IoSlice::new(m)])),
            Shape::Together => self.all(&mut messages.iter().map(|m| IoSlice::new(m)).collect::<Vec<_>>()),
            Shape::Bytes => {
                let mut bytes = messages.iter().flat_map(|m| m.chunks(1));
                bytes.try_for_each(|byte| self.all(&mut [IoSlice::new(byte)]))
            }
            Shape::Pieces => messages.iter().try_for_each(|m| {
                let size = m.len().div_ceil(7).max(1);
                self.all(&mut m.chunks(size).map(IoSlice::new).collect::<Vec<_>>())
            }),
        }
    }

    fn all(&mut self, mut pieces: &mut [IoSlice<'_>]) -> io::Result<()> {
        // An empty piece at the front would never be passed.
        IoSlice::advance_slices(&mut pieces, 0);
        while !pieces.is_empty() {
            let n = (self.call)(self, pieces)?;
            IoSlice::advance_slices(&mut pieces, n);
        }
        Ok(())
    }

    fn entry(&mut self, entry: &io_uring::squeue::Entry) -> io::Result<usize> {
        let ring = self.ring.as_mut().expect("made with the call");
        // SAFETY: entries point into the caller's pieces, which outlive this.
        unsafe { ring.run(entry) }
    }
}

/// `IoSlice` has the layout of `iovec`, as its documentation promises.
fn vectors(pieces: &[IoSlice<'_>]) -> *const libc::iovec {
    pieces.as_ptr().cast()
}

fn header(pieces: &[IoSlice<'_>]) -> libc::msghdr {
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = vectors(pieces).cast_mut();
    header.msg_iovlen = pieces.len();
    header
}

fn write(o: &mut Output, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    // SAFETY: the piece outlives the call and its size is passed.
    counted(unsafe { libc::write(o.fd, pieces[0].as_ptr().cast(), pieces[0].len()) })
}

fn writev(o: &mut Output, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    // SAFETY: the pieces outlive the call and their number is passed.
    counted(unsafe { libc::writev(o.fd, vectors(pieces), pieces.len() as i32) })
}

fn pwritev2(o: &mut Output, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    // SAFETY: as for writev; offset -1 is "where it stands".
    counted(unsafe { libc::pwritev2(o.fd, vectors(pieces), pieces.len() as i32, -1, 0) })
}

fn sendto(o: &mut Output, pieces: &[IoSlice<'_>], flags: i32) -> io::Result<usize> {
    let (start, size) = (pieces[0].as_ptr().cast(), pieces[0].len());
    // SAFETY: the piece outlives the call and its size is passed; no address.
    counted(unsafe { libc::sendto(o.fd, start, size, flags, std::ptr::null(), 0) })
}

fn sendmsg(o: &mut Output, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    // SAFETY: the pieces outlive the call.
    counted(unsafe { libc::sendmsg(o.fd, &header(pieces), 0) })
}

/// One message of the call for each piece.
fn sendmmsg(o: &mut Output, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    let mut messages: Vec<libc::mmsghdr> =
        pieces.chunks(1).map(|p| libc::mmsghdr { msg_hdr: header(p), msg_len: 0 }).collect();
    // SAFETY: headers and pieces outlive the call.
    let rc = unsafe { libc::sendmmsg(o.fd, messages.as_mut_ptr(), messages.len() as u32, 0) };
    let sent = counted(rc as isize)?;
    Ok(messages[..sent].iter().map(|m| m.msg_len as usize).sum())
}

fn uring_write(o: &mut Output, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    let entry = opcode::Write::new(types::Fd(o.fd), pieces[0].as_ptr(), pieces[0].len() as u32);
    o.entry(&entry.build())
}

fn uring_writev(o: &mut Output, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    o.entry(&opcode::Writev::new(types::Fd(o.fd), vectors(pieces), pieces.len() as u32).build())
}

fn uring_send(o: &mut Output, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    let entry = opcode::Send::new(types::Fd(o.fd), pieces[0].as_ptr(), pieces[0].len() as u32);
    o.entry(&entry.build())
}

fn uring_sendmsg(o: &mut Output, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    let header = header(pieces);
    o.entry(&opcode::SendMsg::new(types::Fd(o.fd), &raw const header).build())
}

/// Into the pipe of its own, which holds 64 KiB.
fn filled(o: &Output, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    let size = pieces[0].len().min(32 * 1024);
    // SAFETY: the piece outlives the call and is not shorter.
    counted(unsafe { libc::write(o.pipe[1], pieces[0].as_ptr().cast(), size) })
}

fn splice(o: &mut Output, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    let size = filled(o, pieces)?;
    let (none, mut moved) = (std::ptr::null_mut(), 0);
    while moved < size {
        // SAFETY: two descriptors of this process, no offsets.
        moved += counted(unsafe { libc::splice(o.pipe[0], none, o.fd, none, size - moved, 0) })?;
    }
    Ok(size)
}

fn vmsplice(o: &mut Output, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    // The pipe keeps the pages themselves: they must never be used again.
    let kept = [IoSlice::new(Box::leak(pieces[0].to_vec().into_boxed_slice()))];
    // SAFETY: the piece lives as long as the program.
    counted(unsafe { libc::vmsplice(o.fd, vectors(&kept), 1, 0) })
}

fn tee(o: &mut Output, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    let size = filled(o, pieces)?;
    // SAFETY: two pipes of this process.
    let moved = counted(unsafe { libc::tee(o.pipe[0], o.fd, size, 0) })?;
    let mut drain = vec![0u8; size];
    // SAFETY: room for what is in the pipe.
    counted(unsafe { libc::read(o.pipe[0], drain.as_mut_ptr().cast(), size) })?;
    Ok(moved)
}

fn sendfile(o: &mut Output, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    let mut offset = 0;
    // SAFETY: a file of this program's own, filled with the piece just before.
    unsafe {
        counted(libc::ftruncate(o.file, 0) as isize)?;
        counted(libc::pwrite(o.file, pieces[0].as_ptr().cast(), pieces[0].len(), 0))?;
        counted(libc::sendfile(o.fd, o.file, &mut offset, pieces[0].len()))
    }
}

/// As much as there is room for, then waits.
fn nonblocking(o: &mut Output, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    debug_assert!(total(pieces) > 0);
    // SAFETY: plain system calls.
    unsafe {
        let flags = libc::fcntl(o.fd, libc::F_GETFL);
        libc::fcntl(o.fd, libc::F_SETFL, flags | libc::O_NONBLOCK);
    }
    loop {
        match write(o, pieces) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let mut poll = libc::pollfd { fd: o.fd, events: libc::POLLOUT, revents: 0 };
                // SAFETY: one valid pollfd.
                counted(unsafe { libc::poll(&mut poll, 1, 5000) } as isize)?;
            }
            other => return other,
        }
    }
}
