//! Several steps in one process, so that what one learns another can use. The
//! steps stand as JSON after `--`; their outcomes are the line before the last.

use crate::Target;
use crate::wire::*;
use libc::{SOCK_DGRAM, SOCK_STREAM};
use mcp_sensor_tests::dns::message::{A, AAAA, Message, Query, all_addresses, framed};
use mcp_sensor_tests::dns::zone::addresses_of;
use mcp_sensor_tests::report::{PAYLOAD, Report};
use mcp_sensor_tests::step::{Outcome, Step, Trick};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub(crate) const ALL: &[(&str, Attempt)] =
    &[("steps", steps), ("dns-answer", dns_answer), ("dns-wait", dns_wait)];

/// A query over TCP, and then waiting for whatever becomes of the connection.
fn dns_wait(t: &Target) -> Tried {
    let mut stream = TcpStream::connect(t.address()).map_err(|_| stop("connect"))?;
    let name = t.rest.first().map_or("", String::as_str);
    stream.write_all(&framed(&Message::query(7, name, A).to_bytes())).map_err(|_| stop("send"))?;
    let mut answer = [0; 512];
    stream.read(&mut answer).map(|n| n > 0).map_err(|_| stop("recv"))
}

/// A resolver that knows one address, `--via`, for every name. Until it is ended.
fn dns_answer(t: &Target) -> Tried {
    let address = t.via()?;
    let socket = UdpSocket::bind(t.address()).map_err(|_| stop("bind"))?;
    let mut bytes = [0; 1024];
    loop {
        let (len, from) = socket.recv_from(&mut bytes).map_err(|_| stop("recvfrom"))?;
        if let Some(query) = Query::parse(&bytes[..len]) {
            let answer = addresses_of(&query, &[address]).to_bytes();
            socket.send_to(&answer, from).map_err(|_| stop("sendto"))?;
        }
    }
}

/// For the first answer; what comes after it is waited for a moment only.
const FIRST: Duration = Duration::from_millis(700);
const LATER: Duration = Duration::from_millis(40);
/// How long a connection that is meant to end may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a step yields: was it answered, with what addresses and text.
#[derive(Default)]
struct Got {
    answered: bool,
    addresses: Vec<IpAddr>,
    text: String,
}

type Step1 = Result<Got, Stop>;

fn steps(t: &Target) -> Tried {
    let text = t.rest.first().ok_or(Stop { step: "no steps after --", errno: libc::EINVAL })?;
    let steps: Vec<Step> =
        serde_json::from_str(text).map_err(|_| Stop { step: "no such steps", errno: libc::EINVAL })?;
    let mut kept = None;
    let outcomes: Vec<Outcome> = steps.iter().map(|s| outcome(take(s, &mut kept))).collect();
    println!("{}", serde_json::to_string(&outcomes).expect("outcomes are plain data"));
    Ok(true)
}

fn outcome(got: Step1) -> Outcome {
    match got {
        Ok(got) => Outcome {
            report: Report::Done { answered: got.answered },
            addresses: got.addresses,
            text: got.text,
        },
        Err(Stop { step, errno }) => Outcome {
            report: Report::Stopped { step: step.to_string(), errno },
            addresses: Vec::new(),
            text: String::new(),
        },
    }
}

fn take(step: &Step, kept: &mut Option<OwnedFd>) -> Step1 {
    match step {
        Step::Ask { name, kind, to, tcp } => ask(name, *kind, *to, *tcp),
        Step::Bytes { pieces, to, tcp: false, trick } => datagrams(pieces, *to, *trick),
        Step::Bytes { pieces, to, tcp: true, trick } => stream(pieces, *to, *trick),
        Step::Connect { to } => {
            let s = socket_for(to.ip(), SOCK_STREAM, 0)?;
            connect(&s, *to)?;
            exchange(&s).map(answered_only)
        }
        Step::Datagram { to } => datagram(*to),
        Step::Hello { to, hello } => crate::tls::hello(*to, hello).map(answered_only),
        Step::Get { to, sni, ca } => {
            let text = crate::tls::get(*to, sni, ca)?;
            Ok(Got { answered: text.starts_with("HTTP/1.1 200"), text, ..Got::default() })
        }
        Step::Open { to } => {
            let s = socket_for(to.ip(), SOCK_STREAM, 0)?;
            connect(&s, *to)?;
            let answered = exchange(&s)?;
            *kept = Some(s);
            Ok(answered_only(answered))
        }
        Step::Talk => {
            let s = kept.as_ref().ok_or(Stop { step: "nothing is open", errno: libc::ENOTCONN })?;
            exchange(s).map(answered_only)
        }
        Step::AskMany { suffix, count, to } => ask_many(suffix, *count, *to),
        Step::Race { suffix, threads, rounds, to, port } => {
            race(*threads, *rounds, |n| resolve_and_connect(&format!("r{n}.{suffix}"), n, *to, *port))
        }
        Step::SystemRace { suffix, threads, rounds, port } => {
            race(*threads, *rounds, |n| system(&format!("s{n}.{suffix}"), *port, connect_only).map(drop))
        }
        Step::AnswerItself { name, resolver, address } => answer_itself(name, *resolver, *address),
        Step::System { name, port } => system(name, *port, talk_to),
        Step::Sleep { seconds } => {
            std::thread::sleep(Duration::from_secs(*seconds));
            Ok(Got::default())
        }
        Step::Pause => {
            crate::pause();
            Ok(Got::default())
        }
    }
}

fn answered_only(answered: bool) -> Got {
    Got { answered, ..Got::default() }
}

fn failed(step: &'static str) -> impl Fn(io::Error) -> Stop {
    move |e| {
        // A read that took too long says EAGAIN.
        let errno = match e.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => libc::ETIMEDOUT,
            io::ErrorKind::UnexpectedEof => libc::ENODATA,
            _ => e.raw_os_error().unwrap_or(libc::EIO),
        };
        Stop { step, errno }
    }
}

/// Ids that no other query of this process has.
fn next_id() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    (std::process::id() as u16).wrapping_add((NEXT.fetch_add(1, Ordering::Relaxed) as u16).wrapping_mul(7919))
}

fn ask(name: &str, kind: u16, to: SocketAddr, tcp: bool) -> Step1 {
    let query = Message::query(next_id(), name, kind).to_bytes();
    if tcp { stream(&[framed(&query)], to, Trick::None) } else { datagrams(&[query], to, Trick::None) }
}

/// Not connected: takes an answer from anybody.
fn datagrams(pieces: &[Vec<u8>], to: SocketAddr, trick: Trick) -> Step1 {
    let s = socket_for(to.ip(), SOCK_DGRAM, 0)?;
    match trick {
        Trick::Segment(size) => {
            set(&s, "UDP_SEGMENT", crate::udp::SOL_UDP, crate::udp::UDP_SEGMENT, &i32::from(size))?;
        }
        Trick::Zerocopy => set(&s, "SO_ZEROCOPY", libc::SOL_SOCKET, libc::SO_ZEROCOPY, &1i32)?,
        Trick::Splice => connect(&s, to)?,
        _ => {}
    }
    let last = pieces.len().saturating_sub(1);
    for (n, piece) in pieces.iter().enumerate() {
        match trick {
            Trick::More if n < last => sendto(&s, piece, libc::MSG_MORE, to)?,
            Trick::Zerocopy => sendto(&s, piece, libc::MSG_ZEROCOPY, to)?,
            Trick::Splice => splice(&s, piece)?,
            _ => sendto(&s, piece, 0, to)?,
        }
    }
    let mut got = Got::default();
    let mut patience = FIRST;
    let mut bytes = vec![0; 65536];
    while let Some(n) = receive(&s, &mut bytes, patience)? {
        got.answered = true;
        got.addresses.extend(all_addresses(&bytes[..n]));
        patience = LATER;
    }
    Ok(got)
}

fn splice(s: &OwnedFd, bytes: &[u8]) -> Result<(), Stop> {
    let (read, write) = nix::unistd::pipe().map_err(|e| Stop { step: "pipe", errno: e as i32 })?;
    nix::unistd::write(&write, bytes).map_err(|e| Stop { step: "write", errno: e as i32 })?;
    let none = std::ptr::null_mut();
    // SAFETY: both descriptors are open and no offsets are passed.
    let n = unsafe { libc::splice(read.as_raw_fd(), none, s.as_raw_fd(), none, bytes.len(), 0) };
    check("splice", n).map(drop)
}

fn receive(s: &OwnedFd, bytes: &mut [u8], within: Duration) -> Result<Option<usize>, Stop> {
    let mut poll = libc::pollfd { fd: s.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    if unsafe { libc::poll(&mut poll, 1, within.as_millis() as i32) } != 1 {
        return Ok(None);
    }
    // SAFETY: the buffer outlives the call and its size is passed.
    let n = unsafe { libc::recv(s.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), libc::MSG_DONTWAIT) };
    check("recv", n).map(Some)
}

/// Answered when as many messages came back as whole ones went out.
fn stream(pieces: &[Vec<u8>], to: SocketAddr, trick: Trick) -> Step1 {
    let s = socket_for(to.ip(), SOCK_STREAM, 0)?;
    set(&s, "TCP_NODELAY", libc::IPPROTO_TCP, libc::TCP_NODELAY, &1i32)?;
    if trick == Trick::Zerocopy {
        set(&s, "SO_ZEROCOPY", libc::SOL_SOCKET, libc::SO_ZEROCOPY, &1i32)?;
    }
    if trick != Trick::Fastopen {
        connect(&s, to)?;
    }
    let last = pieces.len().saturating_sub(1);
    for (n, piece) in pieces.iter().enumerate() {
        match trick {
            Trick::More if n < last => send(&s, piece, libc::MSG_MORE)?,
            Trick::Zerocopy => send(&s, piece, libc::MSG_ZEROCOPY)?,
            Trick::Splice => splice(&s, piece)?,
            Trick::Fastopen if n == 0 => sendto(&s, piece, libc::MSG_FASTOPEN, to)?,
            _ => send(&s, piece, 0)?,
        }
        if trick == Trick::Slow {
            std::thread::sleep(LATER);
        }
    }
    let whole = count_framed(&pieces.concat());
    let mut stream = TcpStream::from(s);
    stream.set_read_timeout(Some(PATIENCE)).map_err(failed("SO_RCVTIMEO"))?;
    let mut got = Got::default();
    for _ in 0..whole.max(1) {
        let mut len = [0; 2];
        stream.read_exact(&mut len).map_err(failed("recv"))?;
        let mut answer = vec![0; usize::from(u16::from_be_bytes(len))];
        stream.read_exact(&mut answer).map_err(failed("recv"))?;
        got.addresses.extend(all_addresses(&answer));
    }
    got.answered = true;
    Ok(got)
}

fn count_framed(mut bytes: &[u8]) -> usize {
    let mut count = 0;
    while let Some(len) = bytes.get(..2) {
        let Some(rest) = bytes.get(2 + usize::from(u16::from_be_bytes([len[0], len[1]]))..) else { break };
        bytes = rest;
        count += 1;
    }
    count
}

fn datagram(to: SocketAddr) -> Step1 {
    let s = socket_for(to.ip(), SOCK_DGRAM, 0)?;
    match to.ip() {
        IpAddr::V6(ip) if ip.is_multicast() => {
            let link = crate::udp::link_index()?;
            set(&s, "IPV6_MULTICAST_IF", libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_IF, &link)?;
        }
        IpAddr::V4(ip) if ip.is_multicast() => {
            let which = libc::ip_mreqn {
                imr_multiaddr: libc::in_addr { s_addr: 0 },
                imr_address: libc::in_addr { s_addr: 0 },
                imr_ifindex: crate::udp::link_index()?,
            };
            set(&s, "IP_MULTICAST_IF", libc::IPPROTO_IP, libc::IP_MULTICAST_IF, &which)?;
        }
        _ => {}
    }
    sendto(&s, PAYLOAD, 0, to)?;
    if to.ip().is_multicast() {
        return Ok(Got::default());
    }
    Ok(answered_only(answered(&s)))
}

fn ask_many(suffix: &str, count: u32, to: SocketAddr) -> Step1 {
    let s = socket_for(to.ip(), SOCK_DGRAM, 0)?;
    let mut bytes = vec![0; 4096];
    for n in 0..count {
        let query = Message::query(n as u16, &format!("n{n}.{suffix}"), A).to_bytes();
        sendto(&s, &query, 0, to)?;
        if receive(&s, &mut bytes, FIRST)?.is_none() {
            return Err(Stop { step: "no answer", errno: libc::ETIMEDOUT });
        }
    }
    Ok(answered_only(true))
}

/// Every round of every thread has a number of its own. The text says how many
/// failed, and the first failure.
fn race(threads: u32, rounds: u32, round: impl Fn(u32) -> Result<(), Stop> + Sync) -> Step1 {
    let failures = AtomicU64::new(0);
    let first = std::sync::Mutex::new(None);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (failures, first, round) = (&failures, &first, &round);
            scope.spawn(move || {
                for n in 0..rounds {
                    if let Err(stop) = round(thread * rounds + n) {
                        failures.fetch_add(1, Ordering::Relaxed);
                        first.lock().expect("first").get_or_insert(stop);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner();
    let first = first.into_inner().expect("first");
    let text = first.map_or_else(String::new, |s| format!("{failures} failed, the first at {s:?}"));
    Ok(Got { answered: failures == 0, text, ..Got::default() })
}

/// A or AAAA by turns.
fn resolve_and_connect(name: &str, n: u32, to: SocketAddr, port: u16) -> Result<(), Stop> {
    let kind = if n.is_multiple_of(2) { A } else { AAAA };
    let query = Message::query(next_id(), name, kind).to_bytes();
    let s = socket_for(to.ip(), SOCK_DGRAM, 0)?;
    sendto(&s, &query, 0, to)?;
    let mut bytes = [0; 4096];
    let len = receive(&s, &mut bytes, PATIENCE)?;
    let len = len.ok_or(Stop { step: "no answer", errno: libc::ETIMEDOUT })?;
    let addresses = all_addresses(&bytes[..len]);
    let address = addresses.first().ok_or(Stop { step: "no address", errno: libc::ENODATA })?;
    connect_only(SocketAddr::new(*address, port))
}

/// Resets at once: thousands of connections would else wait for their end.
fn connect_only(to: SocketAddr) -> Result<(), Stop> {
    let s = socket_for(to.ip(), SOCK_STREAM, 0)?;
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    set(&s, "SO_LINGER", libc::SOL_SOCKET, libc::SO_LINGER, &linger)?;
    connect(&s, to)
}

fn talk_to(to: SocketAddr) -> Result<(), Stop> {
    let s = socket_for(to.ip(), SOCK_STREAM, 0)?;
    connect(&s, to)?;
    if exchange(&s)? { Ok(()) } else { Err(Stop { step: "no answer", errno: libc::ETIMEDOUT }) }
}

/// Each address that the C library finds is tried.
fn system(name: &str, port: u16, each: impl Fn(SocketAddr) -> Result<(), Stop>) -> Step1 {
    let found = (name, port).to_socket_addrs();
    let found: Vec<_> = found.map_err(|_| Stop { step: "getaddrinfo", errno: libc::EHOSTUNREACH })?.collect();
    for to in &found {
        each(*to)?;
    }
    Ok(Got {
        answered: !found.is_empty(),
        addresses: found.iter().map(SocketAddr::ip).collect(),
        ..Got::default()
    })
}

/// In a child, since namespaces of a user's own need a process of one thread;
/// the address then is this process's to use.
fn answer_itself(name: &str, resolver: SocketAddr, address: IpAddr) -> Step1 {
    let answered = crate::process::in_child(|| {
        let (user, group) = (nix::unistd::geteuid(), nix::unistd::getegid());
        crate::process::own_namespace()?;
        // Without a user here, an exec would take what it may do, and it could make no file.
        let maps = [
            ("uid_map", format!("0 {user} 1")),
            ("setgroups", "deny".to_string()),
            ("gid_map", format!("0 {group} 1")),
        ];
        for (file, text) in maps {
            std::fs::write(format!("/proc/self/{file}"), text).map_err(failed("uid_map, gid_map"))?;
        }
        crate::process::loopback_up()?;
        let added = std::process::Command::new("ip")
            .args(["addr", "add", &resolver.ip().to_string(), "dev", "lo"])
            .status();
        if !added.map_err(failed("ip addr add"))?.success() {
            return Err(Stop { step: "ip addr add", errno: libc::EIO });
        }
        own_resolver_file(resolver.ip())?;
        let server = UdpSocket::bind(resolver).map_err(failed("bind"))?;
        std::thread::spawn(move || {
            let mut bytes = [0; 512];
            while let Ok((n, from)) = server.recv_from(&mut bytes) {
                let Some(query) = Query::parse(&bytes[..n]) else { continue };
                let _ = server.send_to(&addresses_of(&query, &[address]).to_bytes(), from);
            }
        });
        let found = (name, 0).to_socket_addrs();
        let mut found = found.map_err(|_| Stop { step: "getaddrinfo", errno: libc::EHOSTUNREACH })?;
        Ok(found.any(|f| f.ip() == address))
    })?;
    Ok(Got { answered, addresses: vec![address], ..Got::default() })
}

/// An `/etc/resolv.conf` of its own, in a mount namespace of its own.
fn own_resolver_file(resolver: IpAddr) -> Result<(), Stop> {
    use nix::mount::{MsFlags, mount};
    let none: Option<&str> = None;
    let error = |step| move |e: nix::Error| Stop { step, errno: e as i32 };
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).map_err(error("unshare"))?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(error("mount"))?;
    mount(Some("none"), "/mnt", Some("tmpfs"), MsFlags::empty(), none).map_err(error("mount"))?;
    let text = format!("nameserver {resolver}\noptions timeout:1 attempts:1\n");
    std::fs::write("/mnt/resolv.conf", text).map_err(failed("resolv.conf"))?;
    mount(Some("/mnt/resolv.conf"), "/etc/resolv.conf", none, MsFlags::MS_BIND, none).map_err(error("mount"))
}

/// What the other end says first.
pub(crate) fn first_byte(stream: &mut TcpStream) -> Result<u8, Stop> {
    let deadline = Instant::now() + PATIENCE;
    let mut byte = [0];
    stream.set_read_timeout(Some(PATIENCE)).map_err(failed("SO_RCVTIMEO"))?;
    let read = stream.read_exact(&mut byte);
    if read.is_err() && Instant::now() >= deadline {
        return Err(Stop { step: "recv", errno: libc::ETIMEDOUT });
    }
    read.map_err(failed("recv"))?;
    Ok(byte[0])
}
