//! The child: makes what it needs, waits for its label, tries, says what came of
//! it. Nothing of what it tries leaves the host if nobody refuses it: both ends
//! are on loopback, and it holds both.

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, sendto, socket};
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::process::ExitCode;
use std::time::Duration;

/// Nobody listens there; it is refused before that matters.
const DISCARD: u16 = 9;
/// Where the packet hook alone refuses it.
const PATIENCE: Duration = Duration::from_millis(300);

/// What was tried, and the errno that came back; 0: it went through.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Tried {
    pub what: String,
    pub errno: i32,
}

/// Both ends of one family; `None`: this namespace has no loopback of it.
struct Ends {
    ip: IpAddr,
    listener: Option<TcpListener>,
    receiver: Option<UdpSocket>,
    /// Connected while it had no label: only the packet hook sees what it sends.
    connected: Option<UdpSocket>,
}

impl Ends {
    fn new(ip: IpAddr) -> Ends {
        let receiver = UdpSocket::bind((ip, 0)).ok();
        let connected = receiver.as_ref().and_then(|receiver| {
            let socket = UdpSocket::bind((ip, 0)).ok()?;
            socket.connect(receiver.local_addr().ok()?).ok()?;
            Some(socket)
        });
        Ends { ip, listener: TcpListener::bind((ip, 0)).ok(), receiver, connected }
    }

    fn tries(&self, tried: &mut Vec<Tried>) {
        let mut note = |what: &str, done: io::Result<()>| {
            let errno = done.map_or_else(|e| e.raw_os_error().unwrap_or(libc::ETIMEDOUT), |()| 0);
            let family = if self.ip.is_ipv4() { "IPv4" } else { "IPv6" };
            tried.push(Tried { what: format!("{what} over {family}"), errno });
        };
        let listener = self.listener.as_ref().and_then(|l| l.local_addr().ok());
        let to = listener.unwrap_or(SocketAddr::new(self.ip, DISCARD));
        note("a TCP connect", TcpStream::connect_timeout(&to, PATIENCE).map(drop));
        let receiver = self.receiver.as_ref().and_then(|r| r.local_addr().ok());
        note("a UDP send", send(receiver.unwrap_or(SocketAddr::new(self.ip, DISCARD))));
        if let Some(connected) = &self.connected {
            note("a packet", connected.send(b"canary").map(drop));
        }
    }
}

fn send(to: SocketAddr) -> io::Result<()> {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    sendto(fd.as_raw_fd(), b"canary", &SockaddrStorage::from(to), MsgFlags::empty())?;
    Ok(())
}

/// Whether this kernel has the family at all.
fn there(ip: IpAddr) -> bool {
    let family = if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).is_ok()
}

/// `mcp-sensor canary`: speaks to the sensor over stdin and stderr.
pub fn run() -> anyhow::Result<ExitCode> {
    let families = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    let ends: Vec<Ends> = families.into_iter().filter(|ip| there(*ip)).map(Ends::new).collect();
    let mut out = io::stderr().lock();
    writeln!(out, "{}", super::PREPARED)?;
    let mut go = String::new();
    if io::stdin().lock().read_line(&mut go)? == 0 {
        return Ok(ExitCode::FAILURE); // nobody labelled it
    }
    let mut tried = Vec::new();
    ends.iter().for_each(|ends| ends.tries(&mut tried));
    writeln!(out, "{}", serde_json::to_string(&tried)?)?;
    Ok(ExitCode::SUCCESS)
}
