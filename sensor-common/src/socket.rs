//! What a labelled socket carries in `sk_storage` from creation to close.

use crate::addr::Addr;
use crate::label::Label;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Came out of accept(), or is the listener that lets connections in: judged
/// by inbound rules.
pub const SOCKET_INBOUND: u32 = 1;
/// The task that approved the peer could not have set up address translation:
/// no CAP_NET_ADMIN, in the namespace its instance was labelled in.
pub const SOCKET_NAT_TRUSTED: u32 = 2;
/// Labelled after it existed (found by the agent, or inherited).
pub const SOCKET_ADOPTED: u32 = 4;
/// Allowed by a name whose rule asks for the TLS server name.
pub const SOCKET_SNI: u32 = 8;
/// Its ClientHello was right.
pub const SOCKET_HELLO: u32 = 16;

/// One remote end.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Peer {
    pub addr: Addr,
    /// Host byte order.
    pub port: u16,
    pub protocol: u8,
    pub valid: u8,
}

/// What a labelled socket has sent and received, in packets as the packet hooks
/// let them pass: IP headers included, before segmentation and after reassembly
/// by offloads. Value of a socket storage of its own, which accept() does not copy.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Traffic {
    /// The first packet, CLOCK_BOOTTIME nanoseconds; 0: there was none.
    pub started: u64,
    pub sent_bytes: u64,
    pub sent_packets: u64,
    pub received_bytes: u64,
    pub received_packets: u64,
    /// Both ends of the first packet; of a datagram socket's others, nothing.
    pub local: Peer,
    pub remote: Peer,
    /// Packets that were dropped, either way.
    pub denied: u64,
    /// 1: a TCP RST was sent or received.
    pub reset: u64,
}

/// Value of the socket storage, cloned to accepted sockets.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Socket {
    pub label: Label,
    /// Network namespace at creation (`bpf_get_netns_cookie`).
    pub netns: u64,
    /// Thread group and user that created it.
    pub tgid: u32,
    pub uid: u32,
    pub flags: u32,
    /// The generation under which `approved` was approved.
    pub approved_generation: u32,
    /// Last destination allowed at connect or sendmsg, before translation.
    pub approved: Peer,
    /// Last packet destination allowed.
    pub cached: Peer,
    /// The generation under which it was.
    pub cached_generation: u32,
    pub _pad: u32,
    #[cfg(feature = "other-layout")]
    pub more: u64,
}

/// A connection that waited in an accept queue when its listener was labelled:
/// no descriptor leads to it, its ends name it. (The packet hooks cannot ask for
/// the network namespace; entries live for seconds.)
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Tuple {
    pub local: [u32; 4],
    pub remote: [u32; 4],
    /// Host byte order.
    pub local_port: u32,
    pub remote_port: u32,
}

const _: () = {
    assert!(size_of::<Peer>() == 20);
    assert!(size_of::<Tuple>() == 40);
    assert!(size_of::<Socket>() == if cfg!(feature = "other-layout") { 88 } else { 80 });
};
