//! Programs that nobody declared and that listen: of the HTTP requests that come
//! to them, and of the answers, the first bytes are looked at, to tell whether
//! they are MCP.
//!
//! Nothing here decides about a packet.

use crate::addr::Addr;
use crate::record::Header;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A packet of this size or less has 20 bytes of data at most, most often none:
/// IPv6 and TCP with timestamps. What such a one may carry is missed.
pub const BARE_BYTES: u32 = 72;
/// Packets from a client that are examined, if the first is of HTTP.
pub const ASKING_PACKETS: u32 = 128;
/// Packets to a client that are examined after each request that is looked at.
pub const ANSWER_PACKETS: u32 = 16;
/// Of one request, or answer: head and body.
pub const LOOK_BYTES: u32 = 8 * 1024;
/// Data of one record at most.
pub const PIECE_BYTES: usize = 2 * 1024;
/// Requests to one listener that are looked at within [`REFILL_NS`].
pub const LOOKS: u64 = 8;
pub const REFILL_NS: u64 = 2_000_000_000;

/// Whether a TCP segment that begins like this begins an HTTP/1 request with a
/// body: all that an MCP client says goes by POST.
#[inline(always)]
pub const fn is_post(first: [u8; 5]) -> bool {
    matches!(&first, b"POST ")
}

/// The same of an answer.
#[inline(always)]
pub const fn is_answer(first: [u8; 5]) -> bool {
    matches!(&first, b"HTTP/")
}

/// Beside a listening socket that has no label; what accept() returns starts
/// with a copy of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Incoming {
    /// Cookie of the listening socket.
    pub listener: u64,
    /// What comes from the client, and what goes to it.
    pub asking: Side,
    pub answer: Side,
}

/// One direction of a connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Side {
    /// How many packets are still examined.
    pub packets: u32,
    /// TCP sequence number that the look goes on with.
    pub next: u32,
    /// Bytes of the look that are recorded, or [`LOOK_BYTES`].
    pub taken: u32,
}

/// What a segment is to the look at its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The first of a request, or of an answer.
    Begin,
    /// The next of the one at hand.
    GoOn,
    /// Neither: sent again, out of order, of another method, or beyond what is
    /// looked at.
    Pass,
}

impl Side {
    #[inline(always)]
    pub const fn step(&self, sequence: u32, begins: bool) -> Step {
        if begins {
            Step::Begin
        } else if self.taken > 0 && self.taken < LOOK_BYTES && sequence == self.next {
            Step::GoOn
        } else {
            Step::Pass
        }
    }
}

/// How often a listener is looked at; by its cookie.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Looks {
    /// Looks that are left.
    pub tokens: u64,
    /// When they were [`LOOKS`]; CLOCK_BOOTTIME, nanoseconds.
    pub refilled: u64,
    /// 1: it is known what it is, nobody looks any more.
    pub known: u64,
}

/// Bytes of a request, or of its answer. [`PIECE_BYTES`] of room follow, of which `len` are data.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Look {
    /// Packets know no process: its numbers are 0.
    pub header: Header,
    /// Cookie of the listening socket.
    pub listener: u64,
    /// Cookie of the connection's.
    pub connection: u64,
    pub peer: Addr,
    /// Host byte order.
    pub peer_port: u32,
    /// The listener's.
    pub port: u32,
    /// Where in the request, in the answer; 0: a look begins.
    pub position: u32,
    pub len: u32,
    /// `stdio::FROM_CLIENT` or `stdio::FROM_SERVER`.
    pub direction: u32,
    pub _pad: u32,
}

const _: () = {
    assert!(size_of::<Incoming>() == 32);
    assert!(size_of::<Looks>() == 24);
    assert!(size_of::<Look>() == 104);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_follows_a_request_in_order_up_to_its_limit() {
        let at = |taken, next| Side { packets: 1, taken, next };
        assert_eq!(at(0, 0).step(0, false), Step::Pass);
        assert_eq!(at(0, 0).step(7, true), Step::Begin);
        assert_eq!(at(100, 107).step(107, false), Step::GoOn);
        // Sent again, or one is missing between.
        assert_eq!(at(100, 107).step(7, false), Step::Pass);
        assert_eq!(at(100, 107).step(200, false), Step::Pass);
        assert_eq!(at(LOOK_BYTES, 107).step(107, false), Step::Pass);
        assert_eq!(at(LOOK_BYTES, 107).step(107, true), Step::Begin);
    }
}
