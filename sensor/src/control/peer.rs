//! Who is at the other end of the control socket, and whether that process
//! still is who it was when it connected.

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

/// linux/socket.h, since 6.5; the same on every architecture but sparc and parisc.
const SO_PEERPIDFD: libc::c_int = 77;

/// The process that opened the connection (SO_PEERCRED: as of connect()).
#[derive(Clone, Debug)]
pub struct Peer {
    /// Thread group, in this process's pid namespace.
    pub pid: u32,
    pub uid: u32,
    pub gid: u32,
    /// Field 22 of /proc/PID/stat at accept, clock ticks since boot: with the
    /// pid it names one process.
    pub start_time: u64,
    /// Where the kernel gives one (6.5).
    pub pidfd: Option<Arc<OwnedFd>>,
}

#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    #[error("the caller's process cannot be seen from here (another pid namespace)")]
    Unseen,
    #[error("the caller's process is gone")]
    Gone,
    #[error("the caller's credentials cannot be read: {0}")]
    Io(#[from] io::Error),
}

impl Peer {
    pub fn of(socket: BorrowedFd<'_>) -> Result<Peer, PeerError> {
        let credentials = getsockopt(&socket, PeerCredentials).map_err(io::Error::from)?;
        let pid = u32::try_from(credentials.pid()).unwrap_or(0);
        if pid == 0 {
            return Err(PeerError::Unseen);
        }
        let pidfd = match peer_pidfd(socket) {
            Ok(fd) => Some(Arc::new(fd)),
            // A reaped process has no pidfd; ENOPROTOOPT: an older kernel.
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => None,
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ESRCH | libc::ENODATA)) =>
            {
                return Err(PeerError::Gone);
            }
            Err(error) => return Err(error.into()),
        };
        let start_time = start_time(pid).ok_or(PeerError::Gone)?;
        let peer = Peer { pid, uid: credentials.uid(), gid: credentials.gid(), start_time, pidfd };
        // The start time was read by pid: it is this process's only if the
        // process was still there afterwards.
        if peer.is_alive() { Ok(peer) } else { Err(PeerError::Gone) }
    }

    /// Whether the pid still means the process that connected.
    pub fn is_alive(&self) -> bool {
        match &self.pidfd {
            Some(fd) => {
                let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
                // SAFETY: one pollfd that lives through the call; the fd is owned.
                let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
                // A pidfd is readable once the process has ended.
                ready == 0
            }
            None => start_time(self.pid) == Some(self.start_time),
        }
    }
}

fn peer_pidfd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut fd: libc::c_int = -1;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, an int, into `fd`.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut length,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that the kernel installed for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `None`: no such process.
fn start_time(pid: u32) -> Option<u64> {
    let pid = i32::try_from(pid).ok()?;
    Some(procfs::process::Process::new(pid).ok()?.stat().ok()?.starttime)
}
