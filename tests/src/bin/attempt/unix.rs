//! Unix sockets by name; `rest[0]`, where a leading `@` stands for NUL.

use crate::Target;
use crate::wire::*;
use mcp_sensor_tests::mcp::wire::{Link, Wire};
use mcp_sensor_tests::report::PAYLOAD;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;

pub(crate) const ALL: &[(&str, Attempt)] = &[
    ("unix-serve", serve),
    ("unix-connect", connect_to),
    ("unix-sendto", send_to),
    ("unix-seqpacket", connect_seqpacket),
    ("unix-own", own),
    ("unix-unterminated", unterminated),
    ("mcp-over-sockets", mcp_over_sockets),
];

/// Starts the MCP server `--program` with socket pairs as its stdio, as node
/// does, and calls a tool of it.
fn mcp_over_sockets(t: &Target) -> Tried {
    let program = t.program.as_deref().ok_or(Stop { step: "no --program", errno: libc::EINVAL })?;
    let talk = || -> anyhow::Result<()> {
        let mut wire = Wire::start(Command::new(program), Link::Sockets)?;
        wire.initialize()?;
        wire.call("echo", serde_json::json!({"bytes": 70_000}))?;
        wire.end().map(drop)
    };
    talk().map(|()| true).map_err(|_| stop("talk"))
}

fn named(name: &str) -> (libc::sockaddr_un, u32) {
    // SAFETY: all-zero is a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as u16;
    for (to, from) in address.sun_path.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let mut len = size_of::<libc::sa_family_t>() + name.len();
    if name.starts_with('@') {
        address.sun_path[0] = 0;
    } else {
        len += 1;
    }
    (address, len as u32)
}

fn name(t: &Target) -> Result<&str, Stop> {
    t.rest.first().map(String::as_str).ok_or(Stop { step: "no name after --", errno: libc::EINVAL })
}

fn bind_to(s: &OwnedFd, name: &str) -> Result<(), Stop> {
    let (address, len) = named(name);
    // SAFETY: the address outlives the call and its length is passed.
    let rc = unsafe { libc::bind(s.as_raw_fd(), (&raw const address).cast(), len) };
    check("bind", rc as isize).map(drop)
}

fn connect_by(kind: i32, name: &str) -> Result<OwnedFd, Stop> {
    connect_named(kind, named(name))
}

fn connect_named(kind: i32, (address, len): (libc::sockaddr_un, u32)) -> Result<OwnedFd, Stop> {
    let s = socket(libc::AF_UNIX, kind, 0)?;
    // SAFETY: the address outlives the call and its length is passed.
    let rc = unsafe { libc::connect(s.as_raw_fd(), (&raw const address).cast(), len) };
    check("connect", rc as isize)?;
    Ok(s)
}

/// `rest[1]`: stream, dgram or seqpacket. Holds the name until the input ends.
fn serve(t: &Target) -> Tried {
    let kind = match t.rest.get(1).map(String::as_str) {
        Some("dgram") => libc::SOCK_DGRAM,
        Some("seqpacket") => libc::SOCK_SEQPACKET,
        _ => libc::SOCK_STREAM,
    };
    let s = socket(libc::AF_UNIX, kind, 0)?;
    bind_to(&s, name(t)?)?;
    if kind != libc::SOCK_DGRAM {
        // SAFETY: a plain system call.
        check("listen", unsafe { libc::listen(s.as_raw_fd(), 8) } as isize)?;
    }
    crate::pause();
    Ok(false)
}

fn connect_to(t: &Target) -> Tried {
    connect_by(libc::SOCK_STREAM, name(t)?)?;
    Ok(true)
}

fn connect_seqpacket(t: &Target) -> Tried {
    connect_by(libc::SOCK_SEQPACKET, name(t)?)?;
    Ok(true)
}

fn send_to(t: &Target) -> Tried {
    let s = socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0)?;
    let (address, len) = named(name(t)?);
    let to = (&raw const address).cast();
    // SAFETY: payload and address outlive the call and their lengths are passed.
    let n = unsafe { libc::sendto(s.as_raw_fd(), PAYLOAD.as_ptr().cast(), PAYLOAD.len(), 0, to, len) };
    check("sendto", n)?;
    Ok(true)
}

/// Binds the name and connects to it, as python's multiprocessing does.
fn own(t: &Target) -> Tried {
    let s = socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
    bind_to(&s, name(t)?)?;
    // SAFETY: a plain system call.
    check("listen", unsafe { libc::listen(s.as_raw_fd(), 8) } as isize)?;
    connect_to(t)
}

/// The name's length ends before its NUL, which unix(7) allows; what follows in
/// the kernel's copy is whatever an earlier call left there.
fn unterminated(t: &Target) -> Tried {
    let name = name(t)?;
    let (address, len) = named(name);
    let bare = size_of::<libc::sa_family_t>() + name.len();
    for _ in 0..50 {
        let (mut junk, _) = named(&"x".repeat(107));
        junk.sun_path[107] = b'x' as libc::c_char;
        let _ = connect_named(libc::SOCK_STREAM, (junk, size_of::<libc::sockaddr_un>() as u32));
        match connect_named(libc::SOCK_STREAM, (address, len.min(bare as u32))) {
            Ok(_) => return Ok(true),
            Err(Stop { errno: libc::EPERM, .. }) => {}
            Err(e) => return Err(e),
        }
    }
    Err(Stop { step: "connect", errno: libc::EPERM })
}
