//! Records of the two rings, and the counters of what did not get in.

use crate::addr::Addr;
use crate::exec::ARGV_BYTES;
use crate::identity::FileId;
use crate::label::Label;
use crate::name::NameText;
use crate::socket::Traffic;
use crate::unix::PATH_BYTES;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub const COMM_BYTES: usize = 16;
/// Executable path in an exec record, file name first (see `exec::KIND_EXE`).
pub const EXE_BYTES: usize = 256;
/// argv in an exec record.
pub const ARGV_SAMPLE: usize = 512;
const _: () = assert!(ARGV_SAMPLE <= ARGV_BYTES);

pub const KIND_VERDICT: u16 = 1;
pub const KIND_UNIX: u16 = 2;
pub const KIND_EXEC: u16 = 3;
pub const KIND_EXIT: u16 = 4;
pub const KIND_NAME: u16 = 5;
/// `stdio::Chunk`, in the ring of wires.
pub const KIND_CHUNK: u16 = 6;
/// `stdio::Candidate`.
pub const KIND_CANDIDATE: u16 = 7;

/// `stdio::Met`.
pub const KIND_MET: u16 = 9;
/// `Released`.
pub const KIND_RELEASED: u16 = 8;
/// `listener::Look`, in the ring of wires.
pub const KIND_LOOK: u16 = 10;

pub const RING_VERDICTS: u8 = 0;
pub const RING_TELEMETRY: u8 = 1;
pub const RING_STDIO: u8 = 2;
/// How many rings there are.
pub const RINGS: u32 = 3;

/// First in every record. `seq` counts per ring and CPU, lost records
/// included: a gap is a loss.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Header {
    pub kind: u16,
    pub size: u16,
    pub cpu: u32,
    pub seq: u64,
    /// CLOCK_BOOTTIME, nanoseconds.
    pub boottime: u64,
    pub label: Label,
    pub tgid: u32,
    /// 0 where the hook runs outside the task (packets).
    pub tid: u32,
    pub uid: u32,
    pub generation: u32,
}

pub const VERDICT_ALLOW: u8 = 0;
pub const VERDICT_DENY: u8 = 1;
/// Audit: it went through.
pub const VERDICT_WOULD_DENY: u8 = 2;

/// Which hook decided. Codes are stable.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Socket = 1,
    Connect = 2,
    Sendmsg = 3,
    Bind = 4,
    Setsockopt = 5,
    Egress = 6,
    Ingress = 7,
    UnixConnect = 8,
    UnixSendmsg = 9,
    /// Memory, descriptors or control of another process.
    Ptrace = 10,
    Bpf = 11,
    Kill = 12,
    /// Removing, renaming or covering what lies in bpffs.
    Pins = 13,
}

impl Hook {
    pub const ALL: [Hook; 13] = [
        Hook::Socket,
        Hook::Connect,
        Hook::Sendmsg,
        Hook::Bind,
        Hook::Setsockopt,
        Hook::Egress,
        Hook::Ingress,
        Hook::UnixConnect,
        Hook::UnixSendmsg,
        Hook::Ptrace,
        Hook::Bpf,
        Hook::Kill,
        Hook::Pins,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Hook::Socket => "socket",
            Hook::Connect => "connect",
            Hook::Sendmsg => "sendmsg",
            Hook::Bind => "bind",
            Hook::Setsockopt => "setsockopt",
            Hook::Egress => "egress",
            Hook::Ingress => "ingress",
            Hook::UnixConnect => "unix_connect",
            Hook::UnixSendmsg => "unix_sendmsg",
            Hook::Ptrace => "ptrace",
            Hook::Bpf => "bpf",
            Hook::Kill => "kill",
            Hook::Pins => "pins",
        }
    }

    pub fn from_code(code: u8) -> Option<Hook> {
        Self::ALL.into_iter().find(|h| *h as u8 == code)
    }
}

/// What makes two denials the same, for counting repeats.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VerdictKey {
    pub instance: u32,
    pub server: u16,
    /// Destination (egress) or local port (inbound), host byte order. Beyond
    /// the network: what was tried, see `access`.
    pub port: u16,
    /// [`Hook::Socket`]: the family, where it is none of IP. Beyond the network:
    /// the thread group that was meant, then 0.
    pub addr: [u32; 4],
    /// IANA number; for [`Hook::Socket`] what socket() asked for.
    pub protocol: u8,
    /// `policy::Reason`.
    pub reason: u8,
    pub verdict: u8,
    /// [`Hook`].
    pub hook: u8,
}

/// A decision about IP.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Verdict {
    pub header: Header,
    pub key: VerdictKey,
    pub rule: u32,
    pub netns: u64,
    pub cookie: u64,
    /// Local port for egress, peer's port for inbound.
    pub other_port: u16,
    pub family: u16,
    /// socket() and setsockopt(): type or level.
    pub kind: u16,
    /// setsockopt(): option.
    pub option: u16,
    pub comm: [u8; COMM_BYTES],
}

/// A decision about a name: in a DNS query or answer, or in a TLS ClientHello.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct NameVerdict {
    pub header: Header,
    /// The peer: the resolver, or who the hello goes to.
    pub key: VerdictKey,
    pub rule: u32,
    pub netns: u64,
    pub cookie: u64,
    /// DNS: the address that an answer gave, where the reason is about one.
    pub answer: Addr,
    /// DNS: query type (IANA). TLS: 0.
    pub qtype: u16,
    pub other_port: u16,
    /// Turned around; empty where none could be read.
    pub text: NameText,
}

/// A decision about a unix socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct UnixVerdict {
    pub header: Header,
    pub rule: u32,
    pub reason: u8,
    pub verdict: u8,
    pub hook: u8,
    pub _pad: u8,
    pub path: [u8; PATH_BYTES],
    pub path_len: u32,
    pub comm: [u8; COMM_BYTES],
}

pub const EXEC_NEW_INSTANCE: u32 = 1;
/// The launcher became the server.
pub const EXEC_ROLE_CHANGED: u32 = 2;
/// No exec: the process was moved into a cgroup that the policy names. argv,
/// executable and uid are not in the record.
pub const EXEC_MOVED: u32 = 4;
/// A rule with a hash began the instance, and its file is not verified.
pub const EXEC_UNVERIFIED: u32 = 8;

/// An exec by a labelled task.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Exec {
    pub header: Header,
    /// Real parent's thread group.
    pub parent: u32,
    /// [`EXEC_NEW_INSTANCE`], [`EXEC_ROLE_CHANGED`].
    pub flags: u32,
    pub netns: u64,
    pub argv_len: u32,
    pub exe_len: u32,
    /// Which `match` of the policy began the instance (`ExecRule::priority`).
    pub matched: u32,
    pub _pad: u32,
    pub comm: [u8; COMM_BYTES],
    pub exe: [u8; EXE_BYTES],
    pub argv: [u8; ARGV_SAMPLE],
}

/// The last thread of a labelled process ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Exit {
    pub header: Header,
    /// Processes of the instance that are left.
    pub left: u32,
    pub code: u32,
}

/// A socket that had traffic was closed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Released {
    pub header: Header,
    pub netns: u64,
    pub cookie: u64,
    pub traffic: Traffic,
    /// `socket::SOCKET_…`.
    pub flags: u32,
    /// The task that made the socket.
    pub tgid: u32,
}

/// Why something was not recorded, or not kept. One per-CPU counter each.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    VerdictRingFull = 0,
    TelemetryRingFull = 1,
    /// Denials beyond the instance's quota.
    VerdictQuota = 2,
    TelemetryQuota = 3,
    /// Repeats could not be counted apart: the table of denials is full.
    DenialsFull = 4,
    InstancesFull = 5,
    /// Labels that had no place: these tasks are denied all IP.
    LabelOverflow = 6,
    /// Sockets that could not take a label: denied.
    SocketLabel = 7,
    /// Inherited sockets that could not be noted.
    InheritedFull = 8,
    /// Descriptors beyond those looked at when a label is given.
    InheritedUnseen = 9,
    /// Bytes of argv that were not looked at.
    ArgvTruncated = 10,
    /// argv or a path could not be read at exec.
    ExecUnreadable = 11,
    /// Messages that found no buffer to be read in: queries were dropped, answers
    /// passed unlearned.
    NameBuffer = 12,
    /// Addresses that were not learned: the map of all servers is full.
    LearnedFull = 13,
    /// Bytes of wires that found no place in their ring.
    StdioRingFull = 14,
    /// Wires that found no place in their map: nothing of them is read.
    WiresFull = 15,
}

impl Loss {
    pub const ALL: [Loss; 16] = [
        Loss::VerdictRingFull,
        Loss::TelemetryRingFull,
        Loss::VerdictQuota,
        Loss::TelemetryQuota,
        Loss::DenialsFull,
        Loss::InstancesFull,
        Loss::LabelOverflow,
        Loss::SocketLabel,
        Loss::InheritedFull,
        Loss::InheritedUnseen,
        Loss::ArgvTruncated,
        Loss::ExecUnreadable,
        Loss::NameBuffer,
        Loss::LearnedFull,
        Loss::StdioRingFull,
        Loss::WiresFull,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Loss::VerdictRingFull => "verdict_ring_full",
            Loss::TelemetryRingFull => "telemetry_ring_full",
            Loss::VerdictQuota => "verdict_quota",
            Loss::TelemetryQuota => "telemetry_quota",
            Loss::DenialsFull => "denials_full",
            Loss::InstancesFull => "instances_full",
            Loss::LabelOverflow => "label_overflow",
            Loss::SocketLabel => "socket_label",
            Loss::InheritedFull => "inherited_full",
            Loss::InheritedUnseen => "inherited_unseen",
            Loss::ArgvTruncated => "argv_truncated",
            Loss::ExecUnreadable => "exec_unreadable",
            Loss::NameBuffer => "name_buffer",
            Loss::LearnedFull => "learned_full",
            Loss::StdioRingFull => "stdio_ring_full",
            Loss::WiresFull => "wires_full",
        }
    }
}

/// What the kernel keeps of one instance.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Instance {
    /// Network namespace the instance was labelled in.
    pub netns: u64,
    /// Refill clock of the two quotas, CLOCK_BOOTTIME nanoseconds.
    pub refilled: u64,
    pub verdict_tokens: i64,
    pub telemetry_tokens: i64,
    pub tasks: u64,
    /// [`INSTANCE_NET_ADMIN`], [`INSTANCE_HASHED`].
    pub flags: u64,
    /// With [`INSTANCE_HASHED`]: the file that began the instance.
    pub file: FileId,
    /// The generation under which that file was found verified; under any other
    /// it is looked up again. 0: none.
    pub verified: u32,
    pub _pad: u32,
    #[cfg(feature = "other-layout")]
    pub more: u64,
}

/// Some task of it had CAP_NET_ADMIN when it exec'ed: translation is not trusted.
pub const INSTANCE_NET_ADMIN: u64 = 1;
/// A rule with a hash began it: unless its file is verified, `unknown` holds it
/// as well.
pub const INSTANCE_HASHED: u64 = 2;

const _: () = {
    assert!(size_of::<Header>() == 48);
    assert!(size_of::<VerdictKey>() == 28);
    assert!(size_of::<Verdict>() == 120);
    assert!(size_of::<NameVerdict>() == 48 + 28 + 4 + 32 + 4 + 252);
    assert!(size_of::<UnixVerdict>() == 48 + 8 + 108 + 4 + 16);
    assert!(size_of::<Exec>() == 48 + 32 + 16 + 256 + 512);
    assert!(size_of::<Exit>() == 56);
    assert!(size_of::<Released>() == 48 + 16 + 96 + 8);
    assert!(size_of::<Instance>() == if cfg!(feature = "other-layout") { 96 } else { 88 });
    assert!(size_of::<Addr>() == 16);
};
