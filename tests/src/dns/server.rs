//! A DNS server over UDP and TCP on the peer's side, on addresses of a test's
//! choice. Counts every byte that reaches it.

use super::message::{Query, framed};
use super::zone::{From, Over, Zone};
use crate::network::{DENIED_V4, Network};
use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

pub const PORT: u16 = 53;
const ANOTHER_PORT: u16 = 5399;
const MAX_CONNECTIONS: usize = 256;

/// What has arrived so far.
#[derive(Default)]
struct Tally {
    bytes: AtomicU64,
    connections: AtomicU64,
    asked: Mutex<Vec<Query>>,
}

/// Ends on drop.
pub struct DnsServer {
    stop: Arc<AtomicBool>,
    tally: Arc<Tally>,
    thread: Option<JoinHandle<()>>,
}

struct Sockets {
    datagrams: Vec<UdpSocket>,
    listeners: Vec<TcpListener>,
    another_address: Option<UdpSocket>,
    another_port: Option<UdpSocket>,
}

impl DnsServer {
    /// On port 53 of each address.
    pub fn start(network: &Network, addresses: &[IpAddr], zone: Zone) -> Result<DnsServer> {
        DnsServer::start_on(network, &addresses.iter().map(|a| (*a, PORT).into()).collect::<Vec<_>>(), zone)
    }

    pub fn start_on(network: &Network, addresses: &[SocketAddr], zone: Zone) -> Result<DnsServer> {
        let addresses = addresses.to_vec();
        let sockets = network.peer.within(move || open(&addresses))?;
        let stop = Arc::new(AtomicBool::new(false));
        let tally = Arc::new(Tally::default());
        let thread = std::thread::spawn({
            let (stop, tally) = (stop.clone(), tally.clone());
            move || serve(&sockets, &zone, &stop, &tally)
        });
        Ok(DnsServer { stop, tally, thread: Some(thread) })
    }

    /// Payload over UDP and TCP together.
    pub fn bytes(&self) -> u64 {
        self.tally.bytes.load(Ordering::Relaxed)
    }

    pub fn connections(&self) -> u64 {
        self.tally.connections.load(Ordering::Relaxed)
    }

    /// Every question that could be read.
    pub fn asked(&self) -> Vec<Query> {
        self.tally.asked.lock().expect("asked").clone()
    }
}

impl Drop for DnsServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn datagram(address: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(address).with_context(|| format!("bind {address}"))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn open(addresses: &[SocketAddr]) -> Result<Sockets> {
    let datagrams = addresses.iter().map(|a| datagram(*a)).collect::<Result<_>>()?;
    let listen = |address: &SocketAddr| -> Result<TcpListener> {
        let listener = TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    let listeners = addresses.iter().map(listen).collect::<Result<_>>()?;
    let first = addresses.first().filter(|a| a.is_ipv4()).map(SocketAddr::ip);
    Ok(Sockets {
        datagrams,
        listeners,
        // A second server of the same test has neither.
        another_address: datagram((DENIED_V4, PORT).into()).ok(),
        another_port: first.and_then(|ip| datagram((ip, ANOTHER_PORT).into()).ok()),
    })
}

struct Connection {
    stream: TcpStream,
    bytes: Vec<u8>,
}

fn serve(sockets: &Sockets, zone: &Zone, stop: &AtomicBool, tally: &Tally) {
    let mut connections: Vec<Connection> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let fds = sockets
            .datagrams
            .iter()
            .map(AsFd::as_fd)
            .chain(sockets.listeners.iter().map(AsFd::as_fd))
            .chain(connections.iter().map(|c| c.stream.as_fd()));
        let mut polls: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        // The timeout bounds how long a drop waits for this thread.
        if poll(&mut polls, PollTimeout::from(20u8)).unwrap_or(0) == 0 {
            continue;
        }
        for socket in &sockets.datagrams {
            answer_datagrams(socket, sockets, zone, tally);
        }
        connections.retain_mut(|c| answer_stream(c, zone, tally).is_some());
        for listener in &sockets.listeners {
            while let Ok((stream, _)) = listener.accept() {
                tally.connections.fetch_add(1, Ordering::Relaxed);
                if connections.len() < MAX_CONNECTIONS && stream.set_nonblocking(true).is_ok() {
                    connections.push(Connection { stream, bytes: Vec::new() });
                }
            }
        }
    }
}

fn answer_datagrams(socket: &UdpSocket, sockets: &Sockets, zone: &Zone, tally: &Tally) {
    let mut bytes = [0; 65536];
    while let Ok((n, from)) = socket.recv_from(&mut bytes) {
        tally.bytes.fetch_add(n as u64, Ordering::Relaxed);
        let Some(query) = Query::parse(&bytes[..n]) else { continue };
        for reply in zone.answer(&query, Over::Udp) {
            let by = match reply.from {
                From::Resolver => Some(socket),
                From::AnotherAddress => sockets.another_address.as_ref(),
                From::AnotherPort => sockets.another_port.as_ref(),
            };
            let _ = by.map(|socket| socket.send_to(&reply.bytes, from));
        }
        note(tally, query);
    }
}

fn note(tally: &Tally, query: Query) {
    tally.asked.lock().expect("asked").push(query);
}

/// `None`: the connection is over.
fn answer_stream(connection: &mut Connection, zone: &Zone, tally: &Tally) -> Option<()> {
    let mut bytes = [0; 4096];
    match connection.stream.read(&mut bytes) {
        Ok(0) => return None,
        Ok(n) => {
            tally.bytes.fetch_add(n as u64, Ordering::Relaxed);
            connection.bytes.extend(&bytes[..n]);
        }
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Some(()),
        Err(_) => return None,
    }
    while let Some(len) = connection.bytes.get(..2) {
        let end = 2 + usize::from(u16::from_be_bytes([len[0], len[1]]));
        if connection.bytes.len() < end {
            break;
        }
        let message: Vec<u8> = connection.bytes.drain(..end).skip(2).collect();
        let query = Query::parse(&message)?;
        for reply in zone.answer(&query, Over::Tcp) {
            connection.stream.write_all(&framed(&reply.bytes)).ok()?;
        }
        note(tally, query);
    }
    Some(())
}
