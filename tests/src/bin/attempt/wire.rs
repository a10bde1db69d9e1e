//! Bare socket calls with the name of the step that failed.

use mcp_sensor_tests::report::PAYLOAD;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Stop {
    pub(crate) step: &'static str,
    pub(crate) errno: i32,
}

/// `Ok(true)`: the peer answered.
pub(crate) type Tried = Result<bool, Stop>;
pub(crate) type Attempt = fn(&crate::Target) -> Tried;

/// How long one step may block.
const STEP_SECONDS: i64 = 2;
/// How long an answer is waited for.
const ANSWER_MS: i32 = 700;

pub(crate) fn stop(step: &'static str) -> Stop {
    Stop { step, errno: io::Error::last_os_error().raw_os_error().unwrap_or(0) }
}

pub(crate) fn check(step: &'static str, rc: isize) -> Result<usize, Stop> {
    if rc < 0 { Err(stop(step)) } else { Ok(rc as usize) }
}

/// An address as the system calls take it.
#[derive(Clone, Copy)]
pub(crate) struct Raw {
    pub(crate) storage: libc::sockaddr_storage,
    pub(crate) len: u32,
}

impl Raw {
    pub(crate) fn ptr(&self) -> *const libc::sockaddr {
        (&raw const self.storage).cast()
    }

    pub(crate) fn family(mut self, family: i32) -> Raw {
        self.storage.ss_family = family as u16;
        self
    }
}

pub(crate) fn raw(address: SocketAddr) -> Raw {
    // SAFETY: all-zero is a valid sockaddr_storage, and both address types fit
    // into it with its alignment.
    unsafe {
        let mut storage: libc::sockaddr_storage = std::mem::zeroed();
        let len = match address {
            SocketAddr::V4(a) => {
                let sin = &mut *(&raw mut storage).cast::<libc::sockaddr_in>();
                sin.sin_family = libc::AF_INET as u16;
                sin.sin_port = a.port().to_be();
                sin.sin_addr.s_addr = u32::from_ne_bytes(a.ip().octets());
                size_of::<libc::sockaddr_in>()
            }
            SocketAddr::V6(a) => {
                let sin6 = &mut *(&raw mut storage).cast::<libc::sockaddr_in6>();
                sin6.sin6_family = libc::AF_INET6 as u16;
                sin6.sin6_port = a.port().to_be();
                sin6.sin6_addr.s6_addr = a.ip().octets();
                sin6.sin6_scope_id = a.scope_id();
                size_of::<libc::sockaddr_in6>()
            }
        };
        Raw { storage, len: len as u32 }
    }
}

pub(crate) fn family(ip: IpAddr) -> i32 {
    if ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }
}

/// `::ffff:a.b.c.d`
pub(crate) fn mapped(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(a) => SocketAddrV6::new(a.ip().to_ipv6_mapped(), a.port(), 0, 0).into(),
        v6 => v6,
    }
}

pub(crate) fn socket(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd, Stop> {
    // SAFETY: a plain system call.
    let fd = check("socket", unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) } as isize)?;
    // SAFETY: a fresh descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
    let limit = libc::timeval { tv_sec: STEP_SECONDS, tv_usec: 0 };
    set(&fd, "SO_SNDTIMEO", libc::SOL_SOCKET, libc::SO_SNDTIMEO, &limit)?;
    Ok(fd)
}

/// For the family of `ip`.
pub(crate) fn socket_for(ip: IpAddr, kind: i32, protocol: i32) -> Result<OwnedFd, Stop> {
    socket(family(ip), kind, protocol)
}

pub(crate) fn set<T>(
    fd: &OwnedFd,
    step: &'static str,
    level: i32,
    option: i32,
    value: &T,
) -> Result<(), Stop> {
    // SAFETY: `value` outlives the call and its size is passed.
    let rc = unsafe {
        libc::setsockopt(fd.as_raw_fd(), level, option, (&raw const *value).cast(), size_of::<T>() as u32)
    };
    check(step, rc as isize).map(drop)
}

pub(crate) fn set_bytes(
    fd: &OwnedFd,
    step: &'static str,
    level: i32,
    option: i32,
    value: &[u8],
) -> Result<(), Stop> {
    // SAFETY: `value` outlives the call and its size is passed.
    let rc =
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, value.as_ptr().cast(), value.len() as u32) };
    check(step, rc as isize).map(drop)
}

pub(crate) fn bind(fd: &OwnedFd, address: SocketAddr) -> Result<(), Stop> {
    let to = raw(address);
    // SAFETY: the address outlives the call and its size is passed.
    check("bind", unsafe { libc::bind(fd.as_raw_fd(), to.ptr(), to.len) } as isize).map(drop)
}

pub(crate) fn connect(fd: &OwnedFd, address: SocketAddr) -> Result<(), Stop> {
    connect_raw(fd, &raw(address))
}

pub(crate) fn connect_raw(fd: &OwnedFd, to: &Raw) -> Result<(), Stop> {
    // SAFETY: the address outlives the call and its size is passed.
    check("connect", unsafe { libc::connect(fd.as_raw_fd(), to.ptr(), to.len) } as isize).map(drop)
}

pub(crate) fn send(fd: &OwnedFd, bytes: &[u8], flags: i32) -> Result<(), Stop> {
    let flags = flags | libc::MSG_NOSIGNAL;
    // SAFETY: the bytes outlive the call and their number is passed.
    let n = unsafe { libc::send(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    check("send", n).map(drop)
}

pub(crate) fn sendto(fd: &OwnedFd, bytes: &[u8], flags: i32, address: SocketAddr) -> Result<(), Stop> {
    sendto_raw(fd, bytes, flags, &raw(address))
}

pub(crate) fn sendto_raw(fd: &OwnedFd, bytes: &[u8], flags: i32, to: &Raw) -> Result<(), Stop> {
    let flags = flags | libc::MSG_NOSIGNAL;
    // SAFETY: bytes and address outlive the call and their sizes are passed.
    let n =
        unsafe { libc::sendto(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags, to.ptr(), to.len) };
    check("sendto", n).map(drop)
}

/// Waits for the echo.
pub(crate) fn answered(fd: &OwnedFd) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let mut bytes = [0u8; 2048];
    // SAFETY: one valid pollfd; the buffer outlives the call.
    unsafe {
        libc::poll(&mut poll, 1, ANSWER_MS) == 1
            && libc::recv(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), libc::MSG_DONTWAIT) > 0
    }
}

/// Sends the payload over a connected socket.
pub(crate) fn exchange(fd: &OwnedFd) -> Tried {
    send(fd, PAYLOAD, 0)?;
    Ok(answered(fd))
}

/// A message with one address and one piece, as sendmsg and io_uring take it.
pub(crate) struct Message {
    pub(crate) header: libc::msghdr,
    _to: Box<Raw>,
    _piece: Box<libc::iovec>,
    _control: Vec<u8>,
}

impl Message {
    pub(crate) fn new(bytes: &'static [u8], to: Option<SocketAddr>, control: Vec<u8>) -> Message {
        let address = Box::new(raw(to.unwrap_or(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0))));
        let mut piece =
            Box::new(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() });
        let mut control = control;
        // SAFETY: all-zero is a valid msghdr; the boxes keep what it points to.
        let header = unsafe {
            let mut h: libc::msghdr = std::mem::zeroed();
            if to.is_some() {
                h.msg_name = address.ptr().cast_mut().cast();
                h.msg_namelen = address.len;
            }
            h.msg_iov = &raw mut *piece;
            h.msg_iovlen = 1;
            if !control.is_empty() {
                h.msg_control = control.as_mut_ptr().cast();
                h.msg_controllen = control.len();
            }
            h
        };
        Message { header, _to: address, _piece: piece, _control: control }
    }

    pub(crate) fn send(&self, fd: &OwnedFd, flags: i32) -> Result<(), Stop> {
        // SAFETY: everything that the header points to lives in `self`.
        let n = unsafe { libc::sendmsg(fd.as_raw_fd(), &self.header, flags | libc::MSG_NOSIGNAL) };
        check("sendmsg", n).map(drop)
    }
}
