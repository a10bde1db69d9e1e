//! A way to a receiver that is open: bytes go out without waiting for ever, and
//! what the other end says, or that it is gone, is seen.

use super::config::{Address, Framing, Settings};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::ClientConnection;
use rustls::pki_types::ServerName;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::time::{Duration, Instant};

/// For a connection, and for TLS.
const CONNECT: Duration = Duration::from_secs(5);
/// For an answer of ICMP.
const ANSWER: Duration = Duration::from_millis(200);
/// When nothing that was sent is acknowledged for so long, the connection is over.
const UNACKNOWLEDGED: Duration = Duration::from_secs(30);

pub struct Link {
    wire: Wire,
    /// Framed, and not yet on the wire.
    pending: Vec<u8>,
    done: usize,
    written: u64,
    taken: u64,
}

enum Wire {
    Tcp(TcpStream),
    Tls(Box<ClientConnection>, TcpStream),
    Stream(UnixStream),
    Udp(UdpSocket),
    Datagram(UnixDatagram),
}

/// What became of a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Sent {
    Taken,
    /// It is larger than a datagram can be here.
    TooLarge,
    /// The receiver does not read; nothing of it was sent.
    Full,
}

impl Link {
    pub fn connect(settings: &Settings) -> io::Result<Link> {
        let wire = match &settings.address {
            Address::Tcp { host, port } => Wire::Tcp(tcp(host, *port)?),
            Address::Tls { host, port } => {
                let Some(tls) = &settings.tls else { return Err(io::Error::other("no TLS")) };
                let name = ServerName::try_from(host.clone()).map_err(io::Error::other)?;
                let connection = ClientConnection::new(tls.current(), name).map_err(io::Error::other)?;
                Wire::Tls(Box::new(connection), tcp(host, *port)?)
            }
            Address::Udp { host, port } => {
                let address = first((host.as_str(), *port).to_socket_addrs()?)?;
                let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                let socket = UdpSocket::bind(any)?;
                socket.connect(address)?;
                socket.set_nonblocking(true)?;
                Wire::Udp(socket)
            }
            Address::UnixDatagram(path) => {
                let socket = UnixDatagram::unbound()?;
                socket.connect(path)?;
                socket.set_nonblocking(true)?;
                Wire::Datagram(socket)
            }
            Address::UnixStream(path) => {
                let socket = UnixStream::connect(path)?;
                socket.set_nonblocking(true)?;
                Wire::Stream(socket)
            }
        };
        let mut link = Link { wire, pending: Vec::new(), done: 0, written: 0, taken: 0 };
        link.shake_hands()?;
        Ok(link)
    }

    fn shake_hands(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + CONNECT;
        loop {
            match &self.wire {
                Wire::Tls(tls, _) if tls.is_handshaking() => (),
                _ => return Ok(()),
            }
            self.flush(deadline.saturating_duration_since(Instant::now()))?;
            self.check()?;
            if let Wire::Tls(tls, _) = &self.wire
                && tls.is_handshaking()
                && !tls.wants_write()
                && !self.wait(PollFlags::POLLIN, deadline)?
            {
                return Err(io::Error::new(ErrorKind::TimedOut, "TLS was not done in time"));
            }
        }
    }

    /// An error: the other end has ended, or says what is wrong.
    pub fn check(&mut self) -> io::Result<()> {
        let gone = || io::Error::new(ErrorKind::UnexpectedEof, "the receiver closed the connection");
        let mut heard = [0; 4096];
        let read = match &mut self.wire {
            Wire::Tls(tls, socket) => return hear(tls, socket),
            Wire::Tcp(socket) => socket.read(&mut heard),
            Wire::Stream(socket) => socket.read(&mut heard),
            // An answer of ICMP to what was sent before.
            Wire::Udp(socket) => return socket.take_error()?.map_or(Ok(()), Err),
            Wire::Datagram(socket) => return socket.take_error()?.map_or(Ok(()), Err),
        };
        match read {
            Ok(0) => Err(gone()),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Over a stream everything is taken: what does not go out now waits here.
    pub fn send(&mut self, message: &[u8], framing: Framing, patience: Duration) -> io::Result<Sent> {
        let deadline = Instant::now() + patience;
        loop {
            let sent = match &self.wire {
                Wire::Udp(socket) => socket.send(message),
                Wire::Datagram(socket) => socket.send(message),
                Wire::Tcp(_) | Wire::Tls(..) | Wire::Stream(_) => {
                    match framing {
                        Framing::OctetCounting => {
                            self.pending.extend_from_slice(format!("{} ", message.len()).as_bytes());
                            self.pending.extend_from_slice(message);
                        }
                        Framing::Newline => {
                            self.pending.extend_from_slice(message);
                            self.pending.push(b'\n');
                        }
                    }
                    return Ok(Sent::Taken);
                }
            };
            match sent {
                Ok(_) => {
                    self.written += message.len() as u64;
                    return Ok(Sent::Taken);
                }
                Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => return Ok(Sent::TooLarge),
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS)) => {
                    if !self.wait(PollFlags::POLLOUT, deadline)? || Instant::now() >= deadline {
                        return Ok(Sent::Full);
                    }
                    // ENOBUFS is not told by poll.
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether everything is on the wire when the time is over.
    pub fn flush(&mut self, patience: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + patience;
        loop {
            let left = &self.pending[self.done..];
            let idle = left.is_empty() && !self.wire.wants_write();
            let written = match &mut self.wire {
                Wire::Udp(_) | Wire::Datagram(_) => return Ok(true),
                _ if idle => {
                    self.pending.clear();
                    self.done = 0;
                    return Ok(true);
                }
                Wire::Tcp(socket) => socket.write(left).map(|n| (n, n)),
                Wire::Stream(socket) => socket.write(left).map(|n| (n, n)),
                Wire::Tls(tls, socket) => {
                    let taken = if tls.is_handshaking() { 0 } else { tls.writer().write(left)? };
                    // What TLS has taken is not offered again.
                    self.done += taken;
                    tls.write_tls(socket).map(|n| (0, n))
                }
            };
            match written {
                Ok((done, sent)) => {
                    self.done += done;
                    self.written += sent as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => (),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if !self.wait(PollFlags::POLLOUT, deadline)? {
                        return Ok(false);
                    }
                }
                Err(error) => {
                    // Why it ended may have come before that.
                    self.check()?;
                    return Err(error);
                }
            }
        }
    }

    /// Bytes that are on the wire.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// How many of them the other end's kernel has; of a unix socket, its program.
    pub fn taken(&mut self) -> io::Result<u64> {
        if matches!(self.wire, Wire::Udp(_)) {
            return Ok(self.written);
        }
        let mut left: libc::c_int = 0;
        // SAFETY: SIOCOUTQ (the same number as TIOCOUTQ) writes one int.
        let asked = unsafe { libc::ioctl(self.wire.fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut left) };
        nix::Error::result(asked)?;
        let left = u64::try_from(left).unwrap_or(0);
        if left == 0 {
            self.taken = self.written;
        } else if matches!(self.wire, Wire::Tcp(_) | Wire::Tls(..)) {
            // Of a unix socket it counts more than the bytes.
            self.taken = self.taken.max(self.written.saturating_sub(left));
        }
        Ok(self.taken)
    }

    /// True: the other end has read everything. Over a stream it says so by ending
    /// as well; a datagram of UDP only has no answer that it could not be taken.
    pub fn close(mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        match &self.wire {
            Wire::Udp(_) => {
                std::thread::sleep(ANSWER);
                return self.check().is_ok();
            }
            Wire::Datagram(_) => return self.is_read(deadline),
            Wire::Tcp(_) | Wire::Tls(..) | Wire::Stream(_) => (),
        }
        if let Wire::Tls(tls, _) = &mut self.wire {
            tls.send_close_notify();
        }
        self.flush(patience).is_ok_and(|all| all) && self.ends(deadline).unwrap_or(false)
    }

    fn is_read(&mut self, deadline: Instant) -> bool {
        loop {
            match self.taken() {
                Ok(taken) if taken == self.written => return true,
                Ok(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
                _ => return false,
            }
        }
    }

    fn ends(&mut self, deadline: Instant) -> io::Result<bool> {
        match &self.wire {
            Wire::Tcp(socket) | Wire::Tls(_, socket) => socket.shutdown(Shutdown::Write)?,
            Wire::Stream(socket) => socket.shutdown(Shutdown::Write)?,
            Wire::Udp(_) | Wire::Datagram(_) => return Ok(false),
        }
        let mut heard = [0; 4096];
        loop {
            let read = match &mut self.wire {
                Wire::Tcp(socket) | Wire::Tls(_, socket) => socket.read(&mut heard),
                Wire::Stream(socket) => socket.read(&mut heard),
                Wire::Udp(_) | Wire::Datagram(_) => return Ok(false),
            };
            match read {
                Ok(0) => return Ok(true),
                Ok(_) => (),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if !self.wait(PollFlags::POLLIN, deadline)? {
                        return Ok(false);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// False: the time is over.
    fn wait(&self, what: PollFlags, deadline: Instant) -> io::Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.wire.fd(), what)], timeout) {
            Ok(ready) => Ok(ready > 0),
            Err(nix::Error::EINTR) => Ok(!left.is_zero()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Wire {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Wire::Tcp(socket) | Wire::Tls(_, socket) => socket.as_fd(),
            Wire::Stream(socket) => socket.as_fd(),
            Wire::Udp(socket) => socket.as_fd(),
            Wire::Datagram(socket) => socket.as_fd(),
        }
    }

    fn wants_write(&self) -> bool {
        matches!(self, Wire::Tls(tls, _) if tls.wants_write())
    }
}

/// What the other end says over TLS: nothing, but that it ends or refuses.
fn hear(tls: &mut ClientConnection, socket: &mut TcpStream) -> io::Result<()> {
    loop {
        match tls.read_tls(socket) {
            Ok(0) => {
                return Err(io::Error::new(ErrorKind::UnexpectedEof, "the receiver closed the connection"));
            }
            Ok(_) => (),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        let state = tls.process_new_packets().map_err(|error| {
            // The other end may hear why.
            let _ = tls.write_tls(socket);
            let error = io::Error::other(error);
            let why = crate::tls::of_receiver(&error);
            why.map_or(error, io::Error::other)
        })?;
        if state.peer_has_closed() {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "the receiver ended TLS"));
        }
        // What it says is not for us.
        io::copy(&mut tls.reader().take(state.plaintext_bytes_to_read() as u64), &mut io::sink())?;
    }
}

fn first(mut addresses: impl Iterator<Item = std::net::SocketAddr>) -> io::Result<std::net::SocketAddr> {
    addresses.next().ok_or_else(|| io::Error::new(ErrorKind::NotFound, "no address of that name"))
}

/// The first address that answers.
fn tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let deadline = Instant::now() + CONNECT;
    let mut last = io::Error::new(ErrorKind::NotFound, "no address of that name");
    for address in (host, port).to_socket_addrs()? {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(100));
        match TcpStream::connect_timeout(&address, left) {
            Ok(socket) => {
                socket.set_nodelay(true)?;
                socket.set_nonblocking(true)?;
                setsockopt(&socket, sockopt::KeepAlive, &true)?;
                setsockopt(&socket, sockopt::TcpUserTimeout, &(UNACKNOWLEDGED.as_millis() as u32))?;
                return Ok(socket);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}
