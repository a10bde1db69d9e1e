//! Reading, by each call that reads.

use crate::counted;
use crate::ring::Ring;
use io_uring::{opcode, types};
use std::io;
use std::os::fd::RawFd;

pub(crate) const NAMES: [&str; 14] = [
    "read",
    "readv",
    "preadv2",
    "recv",
    "recvfrom",
    "recvmsg",
    "recvmmsg",
    "peek",
    "uring-read",
    "uring-readv",
    "uring-recv",
    "uring-recvmsg",
    "splice",
    "nonblocking",
];

const ROOM: usize = 64 * 1024;

type Call = fn(&mut Input) -> io::Result<usize>;

pub(crate) struct Input {
    fd: RawFd,
    call: Call,
    ring: Option<Ring>,
    /// For `splice`: a pipe of its own.
    pipe: [RawFd; 2],
    room: Vec<u8>,
    rest: Vec<u8>,
}

impl Input {
    /// `None`: no such call.
    pub(crate) fn new(name: &str, fd: RawFd) -> Option<io::Result<Input>> {
        let call: Call = match name {
            "read" => read,
            "readv" => readv,
            "preadv2" => preadv2,
            "recv" => |i| recv(i, 0),
            "recvfrom" => recvfrom,
            "recvmsg" => recvmsg,
            "recvmmsg" => recvmmsg,
            "peek" => |i| recv(i, libc::MSG_PEEK).and_then(|_| recv(i, 0)),
            "uring-read" => uring_read,
            "uring-readv" => uring_readv,
            "uring-recv" => uring_recv,
            "uring-recvmsg" => uring_recvmsg,
            "splice" => splice,
            "nonblocking" => nonblocking,
            _ => return None,
        };
        Some(Input::with(name, fd, call))
    }

    fn with(name: &str, fd: RawFd, call: Call) -> io::Result<Input> {
        let ring = if name.starts_with("uring") { Some(Ring::new()?) } else { None };
        let mut pipe = [-1; 2];
        if name == "splice" {
            // SAFETY: a place for two descriptors.
            counted(unsafe { libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) } as isize)?;
        }
        Ok(Input { fd, call, ring, pipe, room: vec![0; ROOM], rest: Vec::new() })
    }

    /// The lines that one call ends, at least one; `None` at the end.
    pub(crate) fn lines(&mut self) -> io::Result<Option<Vec<Vec<u8>>>> {
        loop {
            let n = (self.call)(self)?;
            if n == 0 {
                return Ok(None);
            }
            self.rest.extend_from_slice(&self.room[..n]);
            if !self.room[..n].contains(&b'\n') {
                continue;
            }
            let mut lines: Vec<Vec<u8>> = self.rest.split(|b| *b == b'\n').map(<[u8]>::to_vec).collect();
            self.rest = lines.pop().unwrap_or_default();
            return Ok(Some(lines));
        }
    }

    /// The room in three pieces, the first two small.
    fn pieces(&mut self) -> [libc::iovec; 3] {
        let start = self.room.as_mut_ptr();
        let piece = |from: usize, to: usize| libc::iovec {
            iov_base: start.wrapping_add(from).cast(),
            iov_len: to - from,
        };
        [piece(0, 10), piece(10, 1000), piece(1000, ROOM)]
    }

    fn entry(&mut self, make: impl FnOnce(&mut Input) -> io_uring::squeue::Entry) -> io::Result<usize> {
        let entry = make(self);
        let ring = self.ring.as_mut().expect("made with the call");
        // SAFETY: entries point into `room`, or to what their maker keeps until after this.
        unsafe { ring.run(&entry) }
    }
}

fn header(pieces: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = pieces.as_mut_ptr();
    header.msg_iovlen = pieces.len();
    header
}

fn read(i: &mut Input) -> io::Result<usize> {
    // SAFETY: the room outlives the call and its size is passed.
    counted(unsafe { libc::read(i.fd, i.room.as_mut_ptr().cast(), ROOM) })
}

fn readv(i: &mut Input) -> io::Result<usize> {
    let pieces = i.pieces();
    // SAFETY: the pieces lie in the room.
    counted(unsafe { libc::readv(i.fd, pieces.as_ptr(), 3) })
}

fn preadv2(i: &mut Input) -> io::Result<usize> {
    let pieces = i.pieces();
    // SAFETY: the pieces lie in the room; offset -1 is "where it stands".
    counted(unsafe { libc::preadv2(i.fd, pieces.as_ptr(), 3, -1, 0) })
}

fn recv(i: &mut Input, flags: i32) -> io::Result<usize> {
    // SAFETY: the room outlives the call and its size is passed.
    counted(unsafe { libc::recv(i.fd, i.room.as_mut_ptr().cast(), ROOM, flags) })
}

fn recvfrom(i: &mut Input) -> io::Result<usize> {
    // SAFETY: all-zero is a valid address; the room and the address outlive the call.
    unsafe {
        let mut from: libc::sockaddr_storage = std::mem::zeroed();
        let mut size = size_of_val(&from) as u32;
        let address = (&raw mut from).cast();
        counted(libc::recvfrom(i.fd, i.room.as_mut_ptr().cast(), ROOM, 0, address, &mut size))
    }
}

fn recvmsg(i: &mut Input) -> io::Result<usize> {
    let mut pieces = i.pieces();
    let mut header = header(&mut pieces);
    // SAFETY: the pieces lie in the room.
    counted(unsafe { libc::recvmsg(i.fd, &mut header, 0) })
}

fn recvmmsg(i: &mut Input) -> io::Result<usize> {
    let mut pieces = i.pieces();
    let (first, second) = pieces.split_at_mut(2);
    let mut messages = [
        libc::mmsghdr { msg_hdr: header(first), msg_len: 0 },
        libc::mmsghdr { msg_hdr: header(second), msg_len: 0 },
    ];
    // SAFETY: the pieces lie in the room; both headers are valid.
    let rc =
        unsafe { libc::recvmmsg(i.fd, messages.as_mut_ptr(), 2, libc::MSG_WAITFORONE, std::ptr::null_mut()) };
    let got = counted(rc as isize)?;
    let sizes: Vec<usize> = messages[..got].iter().map(|m| m.msg_len as usize).collect();
    if let [first, second] = sizes[..] {
        // The second begins at 1000, wherever the first ended.
        i.room.copy_within(1000..1000 + second, first);
    }
    Ok(sizes.iter().sum())
}

fn uring_read(i: &mut Input) -> io::Result<usize> {
    i.entry(|i| opcode::Read::new(types::Fd(i.fd), i.room.as_mut_ptr(), ROOM as u32).build())
}

fn uring_readv(i: &mut Input) -> io::Result<usize> {
    let pieces = i.pieces();
    i.entry(|i| opcode::Readv::new(types::Fd(i.fd), pieces.as_ptr(), 3).build())
}

fn uring_recv(i: &mut Input) -> io::Result<usize> {
    i.entry(|i| opcode::Recv::new(types::Fd(i.fd), i.room.as_mut_ptr(), ROOM as u32).build())
}

fn uring_recvmsg(i: &mut Input) -> io::Result<usize> {
    let mut pieces = i.pieces();
    let mut header = header(&mut pieces);
    i.entry(|i| opcode::RecvMsg::new(types::Fd(i.fd), &raw mut header).build())
}

fn splice(i: &mut Input) -> io::Result<usize> {
    let none = std::ptr::null_mut();
    // SAFETY: two descriptors of this process, no offsets.
    let n = counted(unsafe { libc::splice(i.fd, none, i.pipe[1], none, ROOM, 0) })?;
    // SAFETY: the room is large enough for what was just put into the pipe.
    counted(unsafe { libc::read(i.pipe[0], i.room.as_mut_ptr().cast(), n) })
}

/// Asks again and again, as an event loop that is too eager does.
fn nonblocking(i: &mut Input) -> io::Result<usize> {
    // SAFETY: plain system calls.
    unsafe {
        let flags = libc::fcntl(i.fd, libc::F_GETFL);
        libc::fcntl(i.fd, libc::F_SETFL, flags | libc::O_NONBLOCK);
    }
    loop {
        match read(i) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            other => return other,
        }
    }
}
