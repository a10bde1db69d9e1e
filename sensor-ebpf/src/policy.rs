//! The compiled policy in maps; the decision itself is `sensor_common::policy`.

use crate::{identity, kernel, label as labels, name};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, lpm_trie::Key};
use sensor_common::addr::Addr;
use sensor_common::label::Label;
use sensor_common::name::LearnedKey;
use sensor_common::policy::{
    self, CidrKey, Flow, LaunchKey, MAX_CIDRS, MAX_PORT_SETS, MAX_PROFILES, MAX_SERVERS, Match, Named,
    PROFILE_UNRESTRICTED, PortSet, Profile, SERVER_UNKNOWN, Server, slot,
};

#[map]
static SERVERS: Array<Server> = Array::with_max_entries(2 * MAX_SERVERS, 0);
#[map]
static PROFILES: Array<Profile> = Array::with_max_entries(2 * MAX_PROFILES, 0);
#[map]
static PORT_SETS: Array<PortSet> = Array::with_max_entries(2 * MAX_PORT_SETS, 0);
/// The value is an index into [`PORT_SETS`].
#[map]
static CIDRS: LpmTrie<CidrBits, u32> = LpmTrie::with_max_entries(2 * MAX_CIDRS, 0);
#[map]
static LAUNCHES: HashMap<LaunchKey, u8> = HashMap::with_max_entries(65536, 0);

/// [`CidrKey`] without its prefix length.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CidrBits {
    scope: u32,
    direction: u32,
    addr: Addr,
}

/// The tables as one server sees them.
pub(crate) struct Maps {
    pub server: u16,
    /// Network namespace, if it is the one the server was labelled in; else 0.
    pub netns: u64,
}

impl policy::Tables for Maps {
    #[inline(always)]
    fn profile(&self, generation: u32, profile: u16) -> Option<Profile> {
        PROFILES.get(slot(generation, profile as u32, MAX_PROFILES)).copied()
    }

    #[inline(always)]
    fn set(&self, key: &CidrKey) -> Option<u32> {
        let bits = CidrBits { scope: key.scope, direction: key.direction, addr: key.addr };
        CIDRS.get(Key::new(key.prefix_len, bits)).copied()
    }

    #[inline(always)]
    fn covering(&self, generation: u32, set: u32, flow: &Flow, group: bool) -> Option<Match> {
        // SAFETY: plain integers, both ways.
        let found = unsafe { covering_range(generation, set, pack(flow, group)) };
        if found == 0 {
            return None;
        }
        Some(Match { rule: found as u32, flags: (found >> 32) as u8 })
    }

    #[inline(always)]
    fn named(&self, generation: u32, profile: u16, addr: &Addr, slot: u16) -> Option<Named> {
        if self.netns == 0 {
            return None;
        }
        let key = LearnedKey { netns: self.netns, addr: addr.0, server: self.server, slot, _pad: 0 };
        name::named(&key, generation, profile)
    }

    #[inline(always)]
    fn at_home(&self) -> bool {
        self.netns != 0
    }
}

/// A rule of a set, for a record; 0: none.
#[inline(always)]
pub(crate) fn first_rule(generation: u32, set: u32) -> u32 {
    match PORT_SETS.get(slot(generation, set, MAX_PORT_SETS)) {
        Some(set) => set.ranges[0].rule,
        None => 0,
    }
}

/// A flow without its address as one word.
#[inline(always)]
pub(crate) const fn pack(flow: &Flow, group: bool) -> u64 {
    flow.port as u64
        | (flow.protocol as u64) << 16
        | (flow.direction as u64) << 24
        | (flow.any_port as u64) << 32
        | (group as u64) << 33
}

#[inline(always)]
pub(crate) const fn unpack(word: u64) -> Flow {
    Flow {
        direction: (word >> 24) as u8,
        protocol: (word >> 16) as u8,
        port: word as u16,
        addr: Addr([0; 4]),
        any_port: word >> 32 & 1 != 0,
    }
}

/// [`PortSet::covering`] as a global function of integers, for the verifier's
/// sake. Returns the rule, and the range's flags in bits 32..40; 0: none.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn covering_range(generation: u32, set: u32, flow: u64) -> u64 {
    let Some(set) = PORT_SETS.get(slot(generation, set, MAX_PORT_SETS)) else { return 0 };
    match set.covering(&unpack(flow), flow >> 33 & 1 != 0) {
        Some(m) => m.rule as u64 | (m.flags as u64) << 32,
        None => 0,
    }
}

/// `None`: no such server under this generation.
#[inline(always)]
pub(crate) fn server(generation: u32, id: u16) -> Option<&'static Server> {
    if id as u32 >= MAX_SERVERS {
        return None;
    }
    let server = SERVERS.get(slot(generation, id as u32, MAX_SERVERS))?;
    if server.valid != 1 {
        return None;
    }
    Some(server)
}

#[inline(always)]
pub(crate) fn profile(generation: u32, id: u16) -> Option<&'static Profile> {
    PROFILES.get(slot(generation, id as u32, MAX_PROFILES))
}

#[inline(always)]
pub(crate) fn may_launch(generation: u32, from: u16, to: u16) -> bool {
    // SAFETY: only the presence of the entry matters.
    unsafe { LAUNCHES.get(LaunchKey { generation, from, to }) }.is_some()
}

/// The profile that holds a label under a generation.
#[inline(always)]
pub(crate) fn profile_of(server: &Server, label: Label) -> u16 {
    if label.is_launcher() { server.launcher_profile } else { server.profile }
}

/// The label's profile is `unrestricted`, and that of `unknown` as well if the
/// file is not verified.
#[inline(always)]
pub(crate) fn unrestricted(label: Label) -> bool {
    // SAFETY: plain integers, both ways.
    unsafe { label_is_unrestricted(label.0) != 0 }
}

/// [`unrestricted`] out of line: it is asked for odd sockets and options only.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn label_is_unrestricted(label: u64) -> u64 {
    let (label, generation) = (Label(label), kernel::generation());
    let Some(own) = server(generation, label.server()) else { return 0 };
    if !is_unrestricted(generation, profile_of(own, label)) || labels::quarantined(label) {
        return 0;
    }
    if !identity::unverified(generation, own, label) {
        return 1;
    }
    match server(generation, SERVER_UNKNOWN) {
        Some(unknown) => is_unrestricted(generation, unknown.profile) as u64,
        None => 0,
    }
}

#[inline(always)]
pub(crate) fn is_unrestricted(generation: u32, id: u16) -> bool {
    match profile(generation, id) {
        Some(p) => p.kind == PROFILE_UNRESTRICTED,
        None => false,
    }
}
