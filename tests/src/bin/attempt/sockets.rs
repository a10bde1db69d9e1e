//! Sockets that are older than their owner, come from somebody else, or wait
//! for others to come in.

use crate::wire::*;
use crate::{Target, pause};
use libc::{SOCK_DGRAM, SOCK_STREAM};
use mcp_sensor_tests::report::PAYLOAD;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::ffi::CString;
use std::io::{IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

pub(crate) const ALL: &[(&str, Attempt)] = &[
    ("connected-then-send", connected_then_send),
    ("udp-connected-then-send", udp_connected_then_send),
    ("connected-then-exec", connected_then_exec),
    ("member-then-exec", member_then_exec),
    ("send-on-inherited", send_on_inherited),
    ("filter-on-inherited", filter_on_inherited),
    ("connect-on-inherited", connect_on_inherited),
    ("opened-then-exec", opened_then_exec),
    ("hand-over", hand_over),
    ("send-on-received", send_on_received),
    ("connect-on-received", connect_on_received),
    ("sendto-on-received", sendto_on_received),
    ("serve-tcp", serve_tcp),
    ("serve-queued", serve_queued),
    ("serve-udp", serve_udp),
    ("serve-unbound", serve_unbound),
    ("listen-bound-then-connect", listen_bound_then_connect),
    ("stream", stream),
    ("udp-from-port", udp_from_port),
    ("simultaneous-open", simultaneous_open),
    ("zero-address", zero_address),
    ("talk-to-itself", talk_to_itself),
];

/// Where an inherited socket stands after the exec.
const INHERITED: RawFd = 9;

fn any(like: IpAddr, port: u16) -> SocketAddr {
    let ip: IpAddr = if like.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    SocketAddr::new(ip, port)
}

fn connected_then_send(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_STREAM, 0)?;
    connect(&s, t.address())?;
    exchange(&s)?;
    pause();
    exchange(&s)
}

fn udp_connected_then_send(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    connect(&s, t.address())?;
    exchange(&s)?;
    pause();
    exchange(&s)
}

/// Leaves `s` at [`INHERITED`] and becomes `--program` with attempt `rest[0]`.
pub(crate) fn exec_with(t: &Target, s: &OwnedFd) -> Tried {
    // SAFETY: a plain system call; the new descriptor is for the next program.
    check("dup2", unsafe { libc::dup2(s.as_raw_fd(), INHERITED) } as isize)?;
    let program = t.program.clone().unwrap_or_else(|| "/proc/self/exe".into());
    let mut arguments = vec![program.clone()];
    arguments.extend(t.rest.first().cloned());
    arguments.extend(["--to".into(), t.to.to_string(), "--port".into(), t.port.to_string()]);
    if let Some(via) = t.via {
        arguments.extend(["--via".into(), via.to_string()]);
    }
    arguments.push("--pause".into());
    let text = |s: String| CString::new(s).expect("no NUL");
    let arguments: Vec<_> = arguments.into_iter().map(text).collect();
    let Err(e) = nix::unistd::execv(&text(program), &arguments);
    Err(Stop { step: "execv", errno: e as i32 })
}

fn connected_then_exec(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_STREAM, 0)?;
    connect(&s, t.address())?;
    exchange(&s)?;
    exec_with(t, &s)
}

/// Not connected, only opened.
fn opened_then_exec(t: &Target) -> Tried {
    let kind = if t.rest.get(1).is_some_and(|r| r == "udp") { SOCK_DGRAM } else { SOCK_STREAM };
    let s = socket_for(t.to, kind, 0)?;
    exec_with(t, &s)
}

fn member_then_exec(t: &Target) -> Tried {
    let s = socket(libc::AF_INET, SOCK_DGRAM, 0)?;
    crate::groups::join_v4(&s, t)?;
    exec_with(t, &s)
}

pub(crate) fn inherited() -> OwnedFd {
    // SAFETY: the program before left it there, and nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(INHERITED) }
}

fn send_on_inherited(_: &Target) -> Tried {
    exchange(&inherited())
}

fn connect_on_inherited(t: &Target) -> Tried {
    let s = inherited();
    connect(&s, t.address())?;
    exchange(&s)
}

fn filter_on_inherited(t: &Target) -> Tried {
    crate::groups::filter_v4(&inherited(), t)
}

/// Unlabelled: makes the socket that `rest[1]` names and gives it to whoever
/// asks at the unix socket `rest[0]`.
fn hand_over(t: &Target) -> Tried {
    let io = |step| move |e: std::io::Error| Stop { step, errno: e.raw_os_error().unwrap_or(0) };
    let listener = UnixListener::bind(&t.rest[0]).map_err(io("bind"))?;
    let kind = t.rest.get(1).map_or("", String::as_str);
    let s = match kind {
        "connected-tcp" | "tcp" => socket_for(t.to, SOCK_STREAM, 0)?,
        _ => socket_for(t.to, SOCK_DGRAM, 0)?,
    };
    if kind.starts_with("connected") {
        connect(&s, t.address())?;
        exchange(&s)?;
    }
    println!("{}", mcp_sensor_tests::report::READY);
    let (stream, _) = listener.accept().map_err(io("accept"))?;
    let fds = [s.as_raw_fd()];
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(b"x")],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::empty(),
        None,
    );
    sent.map_err(|e| Stop { step: "SCM_RIGHTS", errno: e as i32 })?;
    // Holds its own copy until the test ends it: a close would not be the taker's.
    pause();
    Ok(false)
}

fn receive(t: &Target) -> Result<OwnedFd, Stop> {
    let nothing = Stop { step: "SCM_RIGHTS", errno: libc::EBADF };
    let stream = UnixStream::connect(&t.rest[0])
        .map_err(|e| Stop { step: "unix connect", errno: e.raw_os_error().unwrap_or(0) })?;
    let mut byte = [0];
    let mut pieces = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let got = recvmsg::<()>(stream.as_raw_fd(), &mut pieces, Some(&mut space), MsgFlags::empty())
        .map_err(|e| Stop { step: "recvmsg", errno: e as i32 })?;
    for message in got.cmsgs().map_err(|_| nothing)? {
        if let ControlMessageOwned::ScmRights(fds) = message {
            // SAFETY: the kernel has just made this descriptor for us.
            return Ok(unsafe { OwnedFd::from_raw_fd(*fds.first().ok_or(nothing)?) });
        }
    }
    Err(nothing)
}

fn send_on_received(t: &Target) -> Tried {
    exchange(&receive(t)?)
}

fn connect_on_received(t: &Target) -> Tried {
    let s = receive(t)?;
    connect(&s, t.address())?;
    exchange(&s)
}

fn sendto_on_received(t: &Target) -> Tried {
    let s = receive(t)?;
    sendto(&s, PAYLOAD, 0, t.address())?;
    Ok(answered(&s))
}

fn accept(s: &OwnedFd, wait_ms: i32) -> Result<OwnedFd, Stop> {
    let mut poll = libc::pollfd { fd: s.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    if unsafe { libc::poll(&mut poll, 1, wait_ms) } != 1 {
        return Err(Stop { step: "nobody came", errno: libc::ETIMEDOUT });
    }
    // SAFETY: a null address is allowed.
    let fd = unsafe {
        libc::accept4(s.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC)
    };
    let fd = check("accept", fd as isize)?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

fn listen(s: &OwnedFd) -> Result<(), Stop> {
    // SAFETY: a plain system call.
    check("listen", unsafe { libc::listen(s.as_raw_fd(), 8) } as isize).map(drop)
}

fn say_port(s: &OwnedFd) -> Result<u16, Stop> {
    use nix::sys::socket::{SockaddrStorage, getsockname};
    let name: SockaddrStorage =
        getsockname(s.as_raw_fd()).map_err(|e| Stop { step: "getsockname", errno: e as i32 })?;
    let port =
        name.as_sockaddr_in().map(|a| a.port()).or(name.as_sockaddr_in6().map(|a| a.port())).unwrap_or(0);
    println!("port {port}");
    Ok(port)
}

/// Answers one connection with what it sent; `--to` gives the family.
fn serve_tcp(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_STREAM, 0)?;
    set(&s, "SO_REUSEADDR", libc::SOL_SOCKET, libc::SO_REUSEADDR, &1i32)?;
    bind(&s, any(t.to, t.port))?;
    listen(&s)?;
    say_port(&s)?;
    answer_one(&s)
}

fn answer_one(s: &OwnedFd) -> Tried {
    let c = accept(s, 3000)?;
    let mut bytes = [0u8; 2048];
    let limit = libc::timeval { tv_sec: 2, tv_usec: 0 };
    set(&c, "SO_RCVTIMEO", libc::SOL_SOCKET, libc::SO_RCVTIMEO, &limit)?;
    // SAFETY: the buffer outlives the call and its size is passed.
    let n = check("recv", unsafe { libc::recv(c.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), 0) })?;
    send(&c, &bytes[..n], 0)?;
    Ok(true)
}

/// Connections wait in the accept queue until the test says go.
fn serve_queued(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_STREAM, 0)?;
    bind(&s, any(t.to, t.port))?;
    listen(&s)?;
    say_port(&s)?;
    pause();
    answer_one(&s)
}

fn serve_unbound(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_STREAM, 0)?;
    listen(&s)?;
    say_port(&s)?;
    answer_one(&s)
}

fn serve_udp(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    bind(&s, any(t.to, t.port))?;
    say_port(&s)?;
    let limit = libc::timeval { tv_sec: 3, tv_usec: 0 };
    set(&s, "SO_RCVTIMEO", libc::SOL_SOCKET, libc::SO_RCVTIMEO, &limit)?;
    // SAFETY: all-zero is a valid sockaddr_storage.
    let mut from: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    let mut bytes = [0u8; 2048];
    // SAFETY: buffer and address outlive the call and their sizes are passed.
    let n = check("recvfrom", unsafe {
        libc::recvfrom(
            s.as_raw_fd(),
            bytes.as_mut_ptr().cast(),
            bytes.len(),
            0,
            (&raw mut from).cast(),
            &mut len,
        )
    })?;
    sendto_raw(&s, &bytes[..n], 0, &Raw { storage: from, len })?;
    Ok(true)
}

/// Listens where an inbound rule lets it, then calls out from the same port.
fn listen_bound_then_connect(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_STREAM, 0)?;
    bind(&s, any(t.to, t.rest.first().and_then(|p| p.parse().ok()).unwrap_or(0)))?;
    listen(&s)?;
    connect_raw(&s, &raw(t.address()).family(libc::AF_UNSPEC))
        .map_err(|e| Stop { step: "connect(AF_UNSPEC)", ..e })?;
    connect(&s, t.address())?;
    exchange(&s)
}

/// Speaks first, from a port where it may only answer.
fn udp_from_port(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_DGRAM, 0)?;
    bind(&s, any(t.to, t.rest.first().and_then(|p| p.parse().ok()).unwrap_or(0)))?;
    sendto(&s, PAYLOAD, 0, t.address())?;
    Ok(answered(&s))
}

/// Sends without end until it fails or the test closes the input.
fn stream(t: &Target) -> Tried {
    let kind = if t.rest.first().is_some_and(|r| r == "udp") { SOCK_DGRAM } else { SOCK_STREAM };
    let s = socket_for(t.to, kind, 0)?;
    connect(&s, t.address())?;
    println!("{}", mcp_sensor_tests::report::READY);
    let over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    std::thread::spawn({
        let over = over.clone();
        move || {
            let _ = std::io::Read::read(&mut std::io::stdin(), &mut [0]);
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    });
    let mut failed = Ok(());
    while !over.load(std::sync::atomic::Ordering::Relaxed) {
        match send(&s, &[b's'; 1000], 0) {
            // The peer's buffers are full, or nothing is acknowledged any more.
            Ok(()) | Err(Stop { errno: libc::EAGAIN, .. }) => {}
            Err(e) => failed = Err(e),
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    failed.map(|()| true)
}

/// connect() to a port where the peer answers SYN with SYN (RFC 9293, 3.5).
fn simultaneous_open(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_STREAM, 0)?;
    connect(&s, t.address())?;
    send(&s, PAYLOAD, 0)?;
    Ok(true)
}

/// `0.0.0.0` and `::` mean loopback: tries to reach `rest[0]`, a local port.
fn zero_address(t: &Target) -> Tried {
    let s = socket_for(t.to, SOCK_STREAM, 0)?;
    connect(&s, any(t.to, t.port))?;
    exchange(&s)
}

/// A listener on loopback and a client of it in one process tree, as a browser
/// and its driver.
fn talk_to_itself(t: &Target) -> Tried {
    let listener = socket_for(t.to, SOCK_STREAM, 0)?;
    bind(&listener, SocketAddr::new(t.to, 0))?;
    listen(&listener)?;
    let port = say_port(&listener)?;
    // SAFETY: this program has one thread here.
    match unsafe { nix::unistd::fork() }.map_err(|e| Stop { step: "fork", errno: e as i32 })? {
        nix::unistd::ForkResult::Child => {
            let _ = answer_one(&listener);
            // SAFETY: no destructors of the parent are to run.
            unsafe { libc::_exit(0) }
        }
        nix::unistd::ForkResult::Parent { .. } => {
            drop(listener);
            let s = socket_for(t.to, SOCK_STREAM, 0)?;
            connect(&s, SocketAddr::new(t.to, port))?;
            exchange(&s)
        }
    }
}
