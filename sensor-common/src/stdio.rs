//! Wires: the pipes and sockets that an MCP server speaks its stdio through,
//! and the records of what moved over them.
//!
//! A wire is known by the inode of the pipe or socket (both live in
//! pseudo-filesystems that number from one counter, fs/inode.c
//! `get_next_ino`), never by a descriptor's number, and by the direction in
//! which the *server* moves bytes: what it reads came from its client.

use crate::addr::Addr;
use crate::label::Label;
use crate::record::Header;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The server read it.
pub const FROM_CLIENT: u32 = 0;
/// The server wrote it.
pub const FROM_SERVER: u32 = 1;

/// [`WireKey::dev`] of TCP connections, which are known by their socket's cookie
/// in place of an inode.
pub const TCP_WIRE: u32 = u32::MAX;
/// Set in the numbers of connections over TCP.
pub const CONNECTION_OVER_TCP: u64 = 1 << 62;

/// Whether a read that begins like this is of an HTTP/1 request (RFC 9110,
/// section 9): the first four bytes.
#[inline(always)]
pub const fn is_request(first: [u8; 4]) -> bool {
    matches!(&first, b"POST" | b"GET " | b"DELE" | b"OPTI" | b"HEAD" | b"PUT " | b"PATC")
}

/// Key of the wires' map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct WireKey {
    pub inode: u64,
    /// `super_block.s_dev`, the kernel's form: major in the upper 12 bits.
    pub dev: u32,
    /// [`FROM_CLIENT`] or [`FROM_SERVER`].
    pub direction: u32,
}

/// What the kernel keeps of a wire.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Wire {
    /// Whose it is; [`Label::NONE`]: a candidate's.
    pub label: Label,
    /// The same for both directions of one server's stdio.
    pub connection: u64,
    /// Bytes that have moved since the wire was known, read or not.
    pub position: u64,
    /// [`WIRE_IGNORED`], [`WIRE_JOINED`].
    pub flags: u64,
}

/// A candidate's, and what it carries is certainly no MCP.
pub const WIRE_IGNORED: u64 = 1;
/// It was found when bytes had moved already: a message may be under way.
pub const WIRE_JOINED: u64 = 2;

/// How much of a candidate is looked at, each way.
pub const CANDIDATE_BYTES: u64 = 64 * 1024;

/// Whether a message of JSON-RPC can begin with this byte, blank space before
/// it allowed: what begins otherwise is no candidate any more.
#[inline(always)]
pub const fn may_begin(byte: u8) -> bool {
    matches!(byte, b'{' | b'[' | b' ' | b'\t' | b'\r' | b'\n')
}

/// Numbers of connections that the agent gives out have the top bit set.
pub const CONNECTION_BY_AGENT: u64 = 1 << 63;

/// Data of one record at most; a call that moves more makes several.
pub const CHUNK_BYTES: usize = 16 * 1024;
/// Room for data that records are reserved with: the smallest that fits.
pub const CHUNK_CLASSES: [usize; 4] = [256, 1024, 4096, CHUNK_BYTES];

/// The bytes are in the record.
pub const HOW_DATA: u32 = 0;
/// They moved where no program can read them: only their number is known.
pub const HOW_SPLICE: u32 = 1;
pub const HOW_VMSPLICE: u32 = 2;
pub const HOW_TEE: u32 = 3;
pub const HOW_SENDFILE: u32 = 4;
pub const HOW_IO_URING: u32 = 5;
/// The memory could not be read again.
pub const HOW_FAULT: u32 = 6;
/// More parts in one call than are looked at.
pub const HOW_SEGMENTS: u32 = 7;
/// A system call of the 32-bit interface.
pub const HOW_COMPAT: u32 = 8;

/// The name that events have for a `HOW_…`.
pub const fn how_name(how: u32) -> &'static str {
    match how {
        HOW_DATA => "data",
        HOW_SPLICE => "splice",
        HOW_VMSPLICE => "vmsplice",
        HOW_TEE => "tee",
        HOW_SENDFILE => "sendfile",
        HOW_IO_URING => "io_uring",
        HOW_FAULT => "fault",
        HOW_SEGMENTS => "segments",
        HOW_COMPAT => "compat",
        _ => "unknown",
    }
}

/// Bytes that moved over a wire. `CHUNK_CLASSES[n]` bytes of room follow, of
/// which `len` are data.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Chunk {
    pub header: Header,
    pub connection: u64,
    /// [`WireKey::inode`].
    pub inode: u64,
    /// [`Wire::position`] of the first byte.
    pub position: u64,
    /// Bytes that moved.
    pub moved: u32,
    /// Bytes of data that follow.
    pub len: u32,
    pub direction: u32,
    /// `HOW_…`.
    pub how: u32,
}

/// A program that nobody declared was started with pipes or sockets for its
/// stdin and stdout.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Candidate {
    pub header: Header,
    pub connection: u64,
    /// 1: another process speaks through the same wires, since before.
    pub joined: u32,
    /// Real parent's thread group.
    pub parent: u32,
    pub input: WireKey,
    pub output: WireKey,
}

/// A labelled server read an HTTP request from a TCP connection, the first that
/// was seen on it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Met {
    pub header: Header,
    pub connection: u64,
    /// Of the socket.
    pub cookie: u64,
    pub peer: Addr,
    /// Host byte order.
    pub peer_port: u32,
    pub _pad: u32,
}

const _: () = {
    assert!(size_of::<WireKey>() == 16);
    assert!(size_of::<Wire>() == 32);
    assert!(size_of::<Chunk>() == 88);
    assert!(size_of::<Candidate>() == 96);
    assert!(size_of::<Met>() == 88);
};
