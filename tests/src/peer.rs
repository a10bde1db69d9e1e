//! What listens in the peer's namespace: whoever gets through is answered with
//! an echo, and what arrived is counted.

use crate::network::Network;
use anyhow::{Context, Result, ensure};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, bind, connect, recv, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// TCP (plain and MPTCP) and UDP; the profile `wire` allows it.
pub const PORT: u16 = 7001;
/// The same listeners where the profile does not allow the port.
pub const OTHER_PORT: u16 = 7002;

pub const IPPROTO_UDPLITE: libc::c_int = 136;
const MAX_CONNECTIONS: usize = 1024;

/// Stops its thread on drop.
pub struct Peer {
    stop: Arc<AtomicBool>,
    tally: Arc<Tally>,
    thread: Option<JoinHandle<()>>,
}

/// What has arrived so far.
#[derive(Default)]
pub struct Tally {
    pub accepted: AtomicU64,
    pub stream_bytes: AtomicU64,
    pub datagrams: AtomicU64,
}

impl Peer {
    pub fn new(network: &Network) -> Result<Peer> {
        let listeners = network.peer.within(listeners)?;
        let stop = Arc::new(AtomicBool::new(false));
        let tally = Arc::new(Tally::default());
        let thread = std::thread::spawn({
            let (stop, tally) = (stop.clone(), tally.clone());
            move || serve(listeners, &stop, &tally)
        });
        Ok(Peer { stop, tally, thread: Some(thread) })
    }

    pub fn accepted(&self) -> u64 {
        self.tally.accepted.load(Ordering::Relaxed)
    }

    pub fn stream_bytes(&self) -> u64 {
        self.tally.stream_bytes.load(Ordering::Relaxed)
    }

    pub fn datagrams(&self) -> u64 {
        self.tally.datagrams.load(Ordering::Relaxed)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Listener,
    Datagram,
    Connection,
}

fn listeners() -> Result<Vec<(OwnedFd, Role)>> {
    let mut all = Vec::new();
    for port in [PORT, OTHER_PORT] {
        // An MPTCP listener takes plain TCP as well.
        let stream = listen(libc::SOCK_STREAM, libc::IPPROTO_MPTCP, port)
            .or_else(|_| listen(libc::SOCK_STREAM, 0, port))?;
        all.push((stream, Role::Listener));
        all.push((listen(libc::SOCK_DGRAM, 0, port)?, Role::Datagram));
        if let Ok(lite) = listen(libc::SOCK_DGRAM, IPPROTO_UDPLITE, port) {
            all.push((lite, Role::Datagram));
        }
    }
    Ok(all)
}

/// On `[::]`, which takes IPv4 too.
fn listen(kind: libc::c_int, protocol: libc::c_int, port: u16) -> Result<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: a plain system call.
    let raw = unsafe { libc::socket(libc::AF_INET6, kind | flags, protocol) };
    ensure!(raw >= 0, "socket {kind}/{protocol}: {}", io::Error::last_os_error());
    // SAFETY: a fresh descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    let one: libc::c_int = 1;
    // SAFETY: all-zero is a valid sockaddr_in6 (`::`).
    let mut address: libc::sockaddr_in6 = unsafe { std::mem::zeroed() };
    address.sin6_family = libc::AF_INET6 as u16;
    address.sin6_port = port.to_be();
    // SAFETY: option and address outlive the calls and their sizes are passed.
    let rc = unsafe {
        libc::setsockopt(raw, libc::SOL_SOCKET, libc::SO_REUSEADDR, (&raw const one).cast(), 4);
        libc::bind(raw, (&raw const address).cast(), size_of::<libc::sockaddr_in6>() as u32)
    };
    ensure!(rc == 0, "bind port {port}: {}", io::Error::last_os_error());
    if kind == libc::SOCK_DGRAM {
        // SAFETY: as above.
        unsafe {
            libc::setsockopt(raw, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, (&raw const one).cast(), 4)
        };
    }
    if kind == libc::SOCK_STREAM {
        // SAFETY: a plain system call.
        ensure!(unsafe { libc::listen(raw, 128) } == 0, "listen: {}", io::Error::last_os_error());
    }
    Ok(fd)
}

fn serve(mut sockets: Vec<(OwnedFd, Role)>, stop: &AtomicBool, tally: &Tally) {
    while !stop.load(Ordering::Relaxed) {
        let mut polls: Vec<_> = sockets
            .iter()
            .map(|(fd, _)| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 })
            .collect();
        // The timeout bounds how long a drop waits for this thread.
        // SAFETY: `polls` is a valid array of its length.
        if unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as u64, 20) } <= 0 {
            continue;
        }
        let mut arrived = Vec::new();
        let mut ended = Vec::new();
        for (poll, (fd, role)) in polls.iter().zip(&sockets).filter(|(p, _)| p.revents != 0) {
            match role {
                Role::Listener => arrived.extend(accept(fd.as_raw_fd(), tally)),
                Role::Datagram => echo_datagrams(fd.as_raw_fd(), tally),
                Role::Connection => {
                    if echo_stream(fd.as_raw_fd(), tally).is_err() {
                        ended.push(poll.fd);
                    }
                }
            }
        }
        sockets.retain(|(fd, _)| !ended.contains(&fd.as_raw_fd()));
        arrived.truncate(MAX_CONNECTIONS.saturating_sub(sockets.len()));
        sockets.extend(arrived.into_iter().map(|fd| (fd, Role::Connection)));
    }
}

fn accept(listener: RawFd, tally: &Tally) -> Option<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: a null address is allowed.
    let raw = unsafe { libc::accept4(listener, std::ptr::null_mut(), std::ptr::null_mut(), flags) };
    if raw < 0 {
        return None;
    }
    tally.accepted.fetch_add(1, Ordering::Relaxed);
    // SAFETY: a fresh descriptor that nobody else owns.
    Some(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// `Err`: the connection is over.
fn echo_stream(fd: RawFd, tally: &Tally) -> Result<()> {
    let mut buffer = [0u8; 65536];
    // SAFETY: the buffer outlives both calls and its size is passed.
    let n = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    if n < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EAGAIN) {
        return Ok(());
    }
    ensure!(n > 0, "closed");
    tally.stream_bytes.fetch_add(n as u64, Ordering::Relaxed);
    // A client that floods and does not read gets no more echo: not an error.
    // SAFETY: as above.
    unsafe { libc::send(fd, buffer.as_ptr().cast(), (n as usize).min(512), libc::MSG_NOSIGNAL) };
    Ok(())
}

fn echo_datagrams(fd: RawFd, tally: &Tally) {
    let mut buffer = [0u8; 65536];
    loop {
        // SAFETY: all-zero is a valid sockaddr_storage.
        let mut from: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        // A cmsghdr and an in6_pktinfo, aligned as the kernel wants them.
        let mut control = [0u64; 8];
        let mut piece = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // SAFETY: all-zero is a valid msghdr.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_name = (&raw mut from).cast();
        message.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
        message.msg_iov = &raw mut piece;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: what the header points to outlives the call.
        let n = unsafe { libc::recvmsg(fd, &mut message, 0) };
        if n < 0 {
            return;
        }
        tally.datagrams.fetch_add(1, Ordering::Relaxed);
        // SAFETY: `msg_iov` points to `piece`.
        unsafe { (*message.msg_iov).iov_len = (n as usize).min(512) };
        // The received packet info says where the answer must come from; the
        // route alone would choose any of the peer's addresses.
        // SAFETY: as above; the control bytes are those just received.
        unsafe { libc::sendmsg(fd, &message, 0) };
    }
}

/// A socket on the peer's side, bound to one of its addresses.
pub struct Client(OwnedFd);

impl Client {
    /// `Ok`: connected from `from`. Gives up after a second.
    pub fn tcp(network: &Network, from: IpAddr, to: SocketAddr) -> Result<Client> {
        Client::tcp_from(network, SocketAddr::new(from, 0), to)
    }

    /// From a port of one's choice.
    pub fn tcp_from(network: &Network, from: SocketAddr, to: SocketAddr) -> Result<Client> {
        let client = Client::bound(network, from, SockType::Stream)?;
        client.set_limit(Duration::from_secs(1))?;
        let to = SockaddrStorage::from(to);
        connect(client.0.as_raw_fd(), &to).with_context(|| format!("connect to {to}"))?;
        Ok(client)
    }

    pub fn udp(network: &Network, from: IpAddr, to: SocketAddr) -> Result<Client> {
        let client = Client::bound(network, SocketAddr::new(from, 0), SockType::Datagram)?;
        connect(client.0.as_raw_fd(), &SockaddrStorage::from(to))?;
        Ok(client)
    }

    fn bound(network: &Network, from: SocketAddr, kind: SockType) -> Result<Client> {
        let fd = network.peer.within(move || {
            let family = if from.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
            Ok(socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?)
        })?;
        bind(fd.as_raw_fd(), &SockaddrStorage::from(from))?;
        Ok(Client(fd))
    }

    fn set_limit(&self, limit: Duration) -> Result<()> {
        let limit = TimeVal::milliseconds(limit.as_millis() as i64);
        setsockopt(&self.0, sockopt::SendTimeout, &limit)?;
        Ok(setsockopt(&self.0, sockopt::ReceiveTimeout, &limit)?)
    }

    /// Sends `bytes`; the answer that comes within `limit`, if any.
    pub fn ask(&self, bytes: &[u8], limit: Duration) -> Result<Option<Vec<u8>>> {
        send(self.0.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)?;
        self.set_limit(limit)?;
        let mut answer = vec![0; 2048];
        match recv(self.0.as_raw_fd(), &mut answer, MsgFlags::empty()) {
            Ok(0) | Err(_) => Ok(None),
            Ok(n) => {
                answer.truncate(n);
                Ok(Some(answer))
            }
        }
    }
}
