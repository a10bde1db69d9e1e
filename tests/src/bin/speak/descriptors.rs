//! Where the wire's descriptors are when the talk begins.

use crate::counted;
use std::io;
use std::os::fd::RawFd;

pub(crate) const NAMES: [&str; 5] = ["plain", "dup", "high", "reopen", "passed"];

#[derive(Clone, Copy, Debug)]
pub(crate) struct Fds {
    pub(crate) input: RawFd,
    pub(crate) output: RawFd,
}

/// `None`: no such way.
pub(crate) fn moved(how: &str) -> Option<io::Result<Fds>> {
    match how {
        "plain" => Some(Ok(Fds { input: 0, output: 1 })),
        "dup" => Some(both(|fd| {
            let new = fcntl(fd, libc::F_DUPFD_CLOEXEC, 3)?;
            close(fd)?;
            Ok(new)
        })),
        // As the Python SDK 2.x does it.
        "high" => Some(both(|fd| {
            let new = fcntl(fd, libc::F_DUPFD_CLOEXEC, 100)?;
            // SAFETY: plain system calls on descriptors of this process.
            unsafe {
                let instead = if fd == 0 { libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY) } else { 2 };
                counted(libc::dup2(instead, fd) as isize)?;
            }
            Ok(new)
        })),
        // A pipe opened anew: another file, the same inode.
        "reopen" => Some(both(|fd| {
            let (path, flags) = if fd == 0 {
                (c"/proc/self/fd/0", libc::O_RDONLY)
            } else {
                (c"/proc/self/fd/1", libc::O_WRONLY)
            };
            // SAFETY: a constant path.
            let new = counted(unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) } as isize)?;
            close(fd)?;
            Ok(new as RawFd)
        })),
        "passed" => Some(both(|fd| {
            let new = through_a_socket(fd)?;
            close(fd)?;
            Ok(new)
        })),
        _ => None,
    }
}

fn both(mut of: impl FnMut(RawFd) -> io::Result<RawFd>) -> io::Result<Fds> {
    Ok(Fds { input: of(0)?, output: of(1)? })
}

fn fcntl(fd: RawFd, what: i32, argument: i32) -> io::Result<RawFd> {
    // SAFETY: a plain system call.
    counted(unsafe { libc::fcntl(fd, what, argument) } as isize).map(|fd| fd as RawFd)
}

fn close(fd: RawFd) -> io::Result<()> {
    // SAFETY: the descriptor is this program's own and not used again.
    counted(unsafe { libc::close(fd) } as isize).map(drop)
}

/// SCM_RIGHTS, to itself.
fn through_a_socket(fd: RawFd) -> io::Result<RawFd> {
    use nix::sys::socket::*;
    use std::io::{IoSlice, IoSliceMut};
    use std::os::fd::AsRawFd;
    let (a, b) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?;
    let rights = [ControlMessage::ScmRights(&[fd])];
    sendmsg::<()>(a.as_raw_fd(), &[IoSlice::new(b"x")], &rights, MsgFlags::empty(), None)?;
    let mut byte = [0u8; 1];
    let mut pieces = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let got = recvmsg::<()>(b.as_raw_fd(), &mut pieces, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for message in got.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = message
            && let Some(fd) = fds.first()
        {
            return Ok(*fd);
        }
    }
    Err(io::Error::other("no descriptor came"))
}
