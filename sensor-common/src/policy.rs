//! The compiled policy as the kernel holds it, and the decision over it.
//!
//! Everything is addressed by a *generation*. A new policy is written beside
//! the old one and one store of the generation switches every server at once;
//! arrays have two halves, tries carry the generation in their keys.

use crate::addr::Addr;
use crate::name::{NAMES_PER_ADDRESS, NO_SET};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Servers that one policy may declare; id 0 is "unlabelled", id 1 `unknown`.
pub const MAX_SERVERS: u32 = 4096;
pub const MAX_PROFILES: u32 = 4096;
/// Distinct sets of port ranges in one policy.
pub const MAX_PORT_SETS: u32 = 16384;
/// Port ranges that may apply to one address.
pub const MAX_RANGES: usize = 32;
/// CIDRs of all profiles together, in one generation.
pub const MAX_CIDRS: u32 = 262_144;

/// The server id of whatever nobody declared.
pub const SERVER_UNKNOWN: u16 = 1;
/// Of the sensor's own children that try whether they are refused; profile `none`.
pub const SERVER_CANARY: u16 = MAX_SERVERS as u16 - 1;

pub const MODE_AUDIT: u8 = 0;
pub const MODE_ENFORCE: u8 = 1;

/// What an instance may do with unix sockets.
pub const UNIX_DEFAULT: u8 = 0;
pub const UNIX_STRICT: u8 = 1;
pub const UNIX_OPEN: u8 = 2;

/// Some server may be launched (see [`LaunchKey`]).
pub const SERVER_LAUNCHES: u8 = 1;
/// Some rule of it names a hash: an instance may be unverified.
pub const SERVER_HASHED: u8 = 2;

/// One server under one generation. `valid` is 1, so that a zeroed entry is
/// never mistaken for a policy.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Server {
    pub valid: u8,
    pub mode: u8,
    pub unix: u8,
    /// [`SERVER_LAUNCHES`], [`SERVER_HASHED`].
    pub flags: u8,
    pub profile: u16,
    pub launcher_profile: u16,
}

/// Nothing, not even `self`.
pub const PROFILE_NONE: u8 = 1;
/// What its rules say.
pub const PROFILE_RULES: u8 = 2;
/// Everything; recorded.
pub const PROFILE_UNRESTRICTED: u8 = 3;

pub const PROFILE_SELF: u8 = 1;
/// Some rule of it names hosts.
pub const PROFILE_NAMES: u8 = 2;

/// One profile under one generation; a zeroed entry (`kind` 0) denies.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Profile {
    pub kind: u8,
    /// [`PROFILE_SELF`], [`PROFILE_NAMES`].
    pub flags: u8,
    pub _pad: [u8; 2],
    /// The rule that `to: [self]` stands in.
    pub self_rule: u32,
}

pub const EGRESS: u8 = 0;
pub const INBOUND: u8 = 1;
/// May a port be bound at all: the union of the inbound rules, whoever the
/// peer. The address of such a flow does not matter.
pub const BIND: u8 = 2;

/// Key of the CIDR trie: 32 bits of scope, then the address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CidrKey {
    /// 64 (scope and direction) + the prefix length of `addr` as IPv6.
    pub prefix_len: u32,
    /// Generation in the upper half, profile in the lower, network byte order.
    pub scope: u32,
    /// [`EGRESS`] or [`INBOUND`], network byte order.
    pub direction: u32,
    pub addr: Addr,
}

pub const CIDR_SCOPE_BITS: u32 = 64;

impl CidrKey {
    /// `bits` counts from the start of the IPv6 form (an IPv4 /8 is 104).
    #[inline(always)]
    pub fn new(generation: u32, profile: u16, direction: u8, addr: Addr, bits: u32) -> CidrKey {
        CidrKey {
            prefix_len: CIDR_SCOPE_BITS + bits,
            scope: (generation << 16 | profile as u32).to_be(),
            direction: (direction as u32).to_be(),
            addr,
        }
    }
}

/// The range comes from a rule whose CIDR lies within the multicast (or is the
/// broadcast) address: only such a rule opens them.
pub const RANGE_GROUP: u8 = 1;
/// A pinned resolver's port 53: what is sent there is looked into. First in its
/// set, so that no wider rule of the operator's opens it.
pub const RANGE_DNS: u8 = 2;
/// By name, TCP: the TLS ClientHello must name it (`sni: require`).
pub const RANGE_SNI: u8 = 4;

/// One `ports` entry of one rule.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PortRange {
    pub low: u16,
    /// Inclusive.
    pub high: u16,
    /// [`crate::TCP`] or [`crate::UDP`].
    pub protocol: u8,
    /// [`RANGE_GROUP`], [`RANGE_DNS`], [`RANGE_SNI`].
    pub flags: u8,
    pub _pad: u16,
    /// Index of the rule in the compiled policy, never 0.
    pub rule: u32,
}

/// Every range that applies to a CIDR: its own and those of the CIDRs around
/// it, since a trie answers with the longest match only.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PortSet {
    pub count: u32,
    pub ranges: [PortRange; MAX_RANGES],
}

impl Default for PortSet {
    fn default() -> Self {
        PortSet { count: 0, ranges: [PortRange::default(); MAX_RANGES] }
    }
}

/// The range that covers a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Match {
    pub rule: u32,
    /// Of the range.
    pub flags: u8,
}

impl PortSet {
    /// The first range that covers the flow; `group`: only ranges that open
    /// groups count.
    #[inline(always)]
    pub fn covering(&self, flow: &Flow, group: bool) -> Option<Match> {
        let mut i = 0;
        while i < MAX_RANGES {
            if i as u32 >= self.count {
                break;
            }
            let r = &self.ranges[i];
            i += 1;
            if group && r.flags & RANGE_GROUP == 0 {
                continue;
            }
            if flow.any_port || (r.protocol == flow.protocol && r.low <= flow.port && flow.port <= r.high) {
                return Some(Match { rule: r.rule, flags: r.flags });
            }
        }
        None
    }
}

/// `from` may start `to` as an instance of its own (`may_launch`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct LaunchKey {
    pub generation: u32,
    pub from: u16,
    pub to: u16,
}

/// Index into an array with two halves of `half` entries each.
#[inline(always)]
pub const fn slot(generation: u32, index: u32, half: u32) -> u32 {
    (generation & 1) * half + index
}

/// Why a verdict is what it is. Codes are stable; new ones go at the end.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A rule allows it (`rule` names it).
    Rule = 1,
    /// The profile is `unrestricted`.
    Unrestricted = 2,
    /// Loopback to a socket of the same instance (`to: [self]`).
    SelfInstance = 3,
    /// The packet was translated after its destination had been approved.
    Translated = 4,
    /// A UDP reply to a peer that an inbound rule let in.
    Reply = 5,
    /// UDP connect() to a covered address, or AF_UNSPEC: sends nothing.
    NoTraffic = 6,
    /// DNS to a pinned resolver: the query decides.
    Resolver = 7,
    /// A name that a rule covers, asked of a pinned resolver.
    Name = 8,
    /// A pinned resolver's answer that cannot be read, or answers no question:
    /// passed on, nothing learned.
    AnswerUnread = 9,
    /// An answer led into loopback, a private or a metadata address: passed on,
    /// not learned.
    Rebinding = 10,
    /// An address of an answer found no place: passed on, not learned.
    NotLearned = 11,
    /// The profile is `none`.
    ProfileNone = 32,
    /// No rule covers the destination.
    NoRule = 33,
    /// No inbound rule covers the peer and the local port.
    NoInboundRule = 34,
    /// Only (STREAM, TCP) and (DGRAM, UDP) sockets.
    SocketType = 35,
    /// Joining a multicast or anycast group.
    GroupJoin = 36,
    /// A socket option that lets bytes leave the plain path.
    SocketOption = 37,
    Multicast = 38,
    Broadcast = 39,
    Fragment = 40,
    IpOptions = 41,
    ExtensionHeader = 42,
    /// Neither TCP nor UDP.
    Protocol = 43,
    /// The packet's headers could not be read.
    Malformed = 44,
    /// The unix socket gives power over the host.
    UnixPath = 45,
    /// `unix: strict` and no rule names the socket.
    UnixStrict = 46,
    /// The task's label could not be kept.
    LabelOverflow = 47,
    /// No policy entry for the label: never a reason to allow.
    NoPolicy = 48,
    /// The socket could not take its label.
    SocketLabel = 49,
    /// DNS: no rule covers the name.
    NameNoRule = 50,
    /// DNS: neither A nor AAAA, or not of class IN.
    QueryType = 51,
    /// DNS: the query cannot be read, or is more than one question.
    QueryUnread = 52,
    /// DNS to a resolver that is not pinned.
    ForeignResolver = 53,
    /// TLS: another name than the address was learned by, or none at all.
    Sni = 54,
    /// TLS: encrypted ClientHello.
    Ech = 55,
    /// The address was learned by a name, and its time is over.
    NameExpired = 56,
    /// The server's profile allows it, but the file is not verified and the
    /// profile of `unknown` does not.
    Unverified = 57,
    /// The instance did what `on_violation: quarantine` answers.
    Quarantined = 58,
    /// The unix socket is neither the instance's own nor named by a rule (where
    /// the kernel tells who made it).
    UnixForeign = 59,
    /// Neither IP nor unix, nor what libc asks the kernel for addresses by.
    SocketFamily = 60,
    /// Memory, descriptors or control of a process outside the instance.
    OtherProcess = 61,
    /// bpf(): no server has business there.
    Bpf = 62,
    /// The sensor's own process, or what it keeps in bpffs.
    Sensor = 63,
}

impl Reason {
    #[inline(always)]
    pub const fn allows(self) -> bool {
        (self as u8) < 32
    }

    pub const ALL: [Reason; 43] = [
        Reason::Rule,
        Reason::Unrestricted,
        Reason::SelfInstance,
        Reason::Translated,
        Reason::Reply,
        Reason::NoTraffic,
        Reason::Resolver,
        Reason::Name,
        Reason::AnswerUnread,
        Reason::Rebinding,
        Reason::NotLearned,
        Reason::ProfileNone,
        Reason::NoRule,
        Reason::NoInboundRule,
        Reason::SocketType,
        Reason::GroupJoin,
        Reason::SocketOption,
        Reason::Multicast,
        Reason::Broadcast,
        Reason::Fragment,
        Reason::IpOptions,
        Reason::ExtensionHeader,
        Reason::Protocol,
        Reason::Malformed,
        Reason::UnixPath,
        Reason::UnixStrict,
        Reason::LabelOverflow,
        Reason::NoPolicy,
        Reason::SocketLabel,
        Reason::NameNoRule,
        Reason::QueryType,
        Reason::QueryUnread,
        Reason::ForeignResolver,
        Reason::Sni,
        Reason::Ech,
        Reason::NameExpired,
        Reason::Unverified,
        Reason::Quarantined,
        Reason::UnixForeign,
        Reason::SocketFamily,
        Reason::OtherProcess,
        Reason::Bpf,
        Reason::Sensor,
    ];

    /// The name in events and in `explain`.
    pub const fn name(self) -> &'static str {
        match self {
            Reason::Rule => "rule",
            Reason::Unrestricted => "unrestricted",
            Reason::SelfInstance => "self",
            Reason::Translated => "translated",
            Reason::Reply => "reply",
            Reason::NoTraffic => "no_traffic",
            Reason::Resolver => "resolver",
            Reason::Name => "name",
            Reason::AnswerUnread => "answer_unread",
            Reason::Rebinding => "rebinding",
            Reason::NotLearned => "not_learned",
            Reason::ProfileNone => "profile_none",
            Reason::NoRule => "no_rule",
            Reason::NoInboundRule => "no_inbound_rule",
            Reason::SocketType => "socket_type",
            Reason::GroupJoin => "group_join",
            Reason::SocketOption => "socket_option",
            Reason::Multicast => "multicast",
            Reason::Broadcast => "broadcast",
            Reason::Fragment => "fragment",
            Reason::IpOptions => "ip_options",
            Reason::ExtensionHeader => "extension_header",
            Reason::Protocol => "protocol",
            Reason::Malformed => "malformed",
            Reason::UnixPath => "unix_path",
            Reason::UnixStrict => "unix_strict",
            Reason::LabelOverflow => "label_overflow",
            Reason::NoPolicy => "no_policy",
            Reason::SocketLabel => "socket_label",
            Reason::NameNoRule => "name_no_rule",
            Reason::QueryType => "query_type",
            Reason::QueryUnread => "query_unread",
            Reason::ForeignResolver => "foreign_resolver",
            Reason::Sni => "sni",
            Reason::Ech => "ech",
            Reason::NameExpired => "name_expired",
            Reason::Unverified => "unverified",
            Reason::Quarantined => "quarantined",
            Reason::UnixForeign => "unix_foreign",
            Reason::SocketFamily => "socket_family",
            Reason::OtherProcess => "other_process",
            Reason::Bpf => "bpf",
            Reason::Sensor => "sensor",
        }
    }

    /// `None`: a code that this version does not know.
    pub fn from_code(code: u8) -> Option<Reason> {
        Self::ALL.into_iter().find(|r| *r as u8 == code)
    }
}

/// A decision and the rule that made it (0: none).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    pub reason: Reason,
    pub rule: u32,
    /// The connection's first bytes must be a TLS ClientHello that names a name
    /// which the address was learned by.
    pub sni: bool,
}

impl Decision {
    #[inline(always)]
    pub const fn because(reason: Reason) -> Decision {
        Decision { reason, rule: 0, sni: false }
    }

    #[inline(always)]
    pub const fn by_rule(reason: Reason, rule: u32) -> Decision {
        Decision { reason, rule, sni: false }
    }

    #[inline(always)]
    pub const fn allows(self) -> bool {
        self.reason.allows()
    }
}

/// What a profile says of one flow, and whether `to: [self]` may lift a denial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    pub decision: Decision,
    /// 0: no.
    pub self_rule: u32,
    pub audit: bool,
}

impl Held {
    #[inline(always)]
    const fn may_pass(&self) -> bool {
        self.decision.allows() || self.self_rule != 0
    }
}

/// What holds an instance whose file is not verified: both its server's profile
/// and that of `unknown` must allow, in `enforce` if either says so.
#[inline(always)]
pub fn stricter(server: Held, unknown: Held) -> Held {
    let audit = server.audit && unknown.audit;
    let denied = Decision::because(Reason::Unverified);
    if !server.may_pass() {
        Held { audit, ..server }
    } else if !unknown.may_pass() {
        Held { decision: denied, self_rule: 0, audit }
    } else if server.decision.allows() && !unknown.decision.allows() {
        Held { decision: denied, self_rule: unknown.self_rule, audit }
    } else {
        Held { audit, ..server }
    }
}

/// One side of a conversation as a rule sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// [`EGRESS`]: `addr` and `port` are the destination. [`INBOUND`]: `addr`
    /// is the peer, `port` the local port.
    pub direction: u8,
    pub protocol: u8,
    /// Host byte order.
    pub port: u16,
    /// Any form; normalised here.
    pub addr: Addr,
    /// Nothing will be sent (UDP connect): the address alone must be covered.
    pub any_port: bool,
}

/// One name that an address was learned by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Named {
    /// Port set of the rules that cover the name; [`NO_SET`]: none does.
    pub set: u32,
    /// No connection may begin any more.
    pub expired: bool,
}

/// Where the compiled policy is kept: BPF maps in the kernel, plain vectors in
/// `policy explain`.
pub trait Tables {
    fn profile(&self, generation: u32, profile: u16) -> Option<Profile>;
    /// The port set of the longest CIDR that covers `key.addr` (`prefix_len` is
    /// the full length).
    fn set(&self, key: &CidrKey) -> Option<u32>;
    /// [`PortSet::covering`] of a set.
    fn covering(&self, generation: u32, set: u32, flow: &Flow, group: bool) -> Option<Match>;
    /// The name in one slot of an address, below [`NAMES_PER_ADDRESS`]. `None`
    /// in a namespace other than the server's own, and beyond the last.
    fn named(&self, generation: u32, profile: u16, addr: &Addr, slot: u16) -> Option<Named>;
    /// The flow is in the network namespace that the server was labelled in:
    /// only there is a resolver's address the resolver's.
    fn at_home(&self) -> bool;
}

/// The verdict of one profile on one flow. `self` is not decided here, it needs
/// a socket look-up: a caller asks for it when this says [`Reason::NoRule`].
pub fn decide<T: Tables>(tables: &T, generation: u32, profile: u16, flow: &Flow) -> Decision {
    match by_address(tables, generation, profile, flow) {
        Decision { reason: Reason::NoRule, .. } => by_name(tables, generation, profile, flow),
        decision => decision,
    }
}

/// The verdict by the address alone; [`Reason::NoRule`] leaves it to the names.
#[inline(always)]
pub fn by_address<T: Tables>(tables: &T, generation: u32, profile_id: u16, flow: &Flow) -> Decision {
    let Some(profile) = tables.profile(generation, profile_id) else {
        return Decision::because(Reason::NoPolicy);
    };
    match profile.kind {
        PROFILE_UNRESTRICTED => return Decision::because(Reason::Unrestricted),
        PROFILE_RULES => {}
        PROFILE_NONE => return Decision::because(Reason::ProfileNone),
        _ => return Decision::because(Reason::NoPolicy),
    }
    let addr = flow.addr.normalise();
    let group = addr.is_multicast() || addr.is_broadcast();
    let key = CidrKey::new(generation, profile_id, flow.direction, addr, 128);
    if let Some(set) = tables.set(&key)
        && let Some(m) = tables.covering(generation, set, flow, group)
        && (m.flags & RANGE_DNS == 0 || tables.at_home())
    {
        return Decision::by_rule(
            if flow.any_port {
                Reason::NoTraffic
            } else if m.flags & RANGE_DNS != 0 {
                Reason::Resolver
            } else {
                Reason::Rule
            },
            m.rule,
        );
    }
    // Only now, so that the search above is one path to the kernel's verifier.
    if group || flow.direction != EGRESS {
        return Decision::because(if addr.is_multicast() {
            Reason::Multicast
        } else if group {
            Reason::Broadcast
        } else {
            Reason::NoInboundRule
        });
    }
    Decision::because(Reason::NoRule)
}

/// What one name of an address says, so that the greatest decides: a name that
/// asks for no SNI before one that does, a live one before one that has expired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ranked(pub u64);

impl Ranked {
    /// No rule covers the name.
    pub const NONE: Ranked = Ranked(0);
    const EXPIRED: u64 = 1 << 32;
    const SNI: u64 = 2 << 32;
    /// Nothing is greater.
    pub const PLAIN: Ranked = Ranked(3 << 32);

    #[inline(always)]
    pub const fn decision(self, any_port: bool) -> Decision {
        let rule = self.0 as u32;
        let allowed = if any_port { Reason::NoTraffic } else { Reason::Rule };
        match self.0 >> 32 {
            0 => Decision::because(Reason::NoRule),
            1 => Decision::by_rule(Reason::NameExpired, rule),
            2 => Decision { reason: allowed, rule, sni: true },
            _ => Decision::by_rule(allowed, rule),
        }
    }
}

/// What a name says of a flow.
#[inline(always)]
pub fn rank<T: Tables>(tables: &T, generation: u32, named: Named, flow: &Flow) -> Ranked {
    if named.set == NO_SET {
        return Ranked::NONE;
    }
    let Some(m) = tables.covering(generation, named.set, flow, false) else { return Ranked::NONE };
    let rank = if named.expired {
        Ranked::EXPIRED
    } else if m.flags & RANGE_SNI != 0 {
        Ranked::SNI
    } else {
        Ranked::PLAIN.0
    };
    Ranked(rank | m.rule as u64)
}

/// The verdict by all names that the address was learned by.
fn by_name<T: Tables>(tables: &T, generation: u32, profile: u16, flow: &Flow) -> Decision {
    let addr = flow.addr.normalise();
    (0..NAMES_PER_ADDRESS as u16)
        .map_while(|slot| tables.named(generation, profile, &addr, slot))
        .map(|named| rank(tables, generation, named, flow))
        .max()
        .unwrap_or(Ranked::NONE)
        .decision(flow.any_port)
}

const _: () = {
    assert!(size_of::<Server>() == 8);
    assert!(size_of::<Profile>() == 8);
    assert!(size_of::<CidrKey>() == 28);
    assert!(size_of::<PortRange>() == 12);
    assert!(size_of::<PortSet>() == 4 + 12 * MAX_RANGES);
};

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOWED: Held = Held { decision: Decision::by_rule(Reason::Rule, 7), self_rule: 0, audit: true };
    const DENIED: Held = Held { decision: Decision::because(Reason::NoRule), self_rule: 0, audit: true };
    const ASKS: Held = Held { self_rule: 9, ..DENIED };

    #[test]
    fn both_profiles_must_allow_what_is_not_verified() {
        for (server, unknown, reason, self_rule) in [
            (ALLOWED, ALLOWED, Reason::Rule, 0),
            (ALLOWED, DENIED, Reason::Unverified, 0),
            (ALLOWED, ASKS, Reason::Unverified, 9),
            (DENIED, ALLOWED, Reason::NoRule, 0),
            (DENIED, DENIED, Reason::NoRule, 0),
            (DENIED, ASKS, Reason::NoRule, 0),
            (ASKS, ALLOWED, Reason::NoRule, 9),
            (ASKS, DENIED, Reason::Unverified, 0),
            (ASKS, ASKS, Reason::NoRule, 9),
        ] {
            let held = stricter(server, unknown);
            assert_eq!((held.decision.reason, held.self_rule), (reason, self_rule), "{server:?} {unknown:?}");
        }
    }

    #[test]
    fn what_is_not_verified_is_enforced_if_either_mode_says_so() {
        for (server, unknown) in [(true, true), (true, false), (false, true), (false, false)] {
            for held in [ALLOWED, DENIED, ASKS] {
                let other = Held { audit: unknown, ..DENIED };
                assert_eq!(stricter(Held { audit: server, ..held }, other).audit, server && unknown);
            }
        }
    }
}
