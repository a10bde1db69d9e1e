//! The compiled policy in maps; the decision itself is `sensor_common::policy`.

use crate::{identity, kernel};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, lpm_trie::Key};
use sensor_common::addr::Addr;
use sensor_common::label::Label;
use sensor_common::policy::{
    self, CidrKey, LaunchKey, MAX_CIDRS, MAX_PORT_SETS, MAX_PROFILES, MAX_SERVERS, PROFILE_UNRESTRICTED,
    PortSet, Profile, SERVER_UNKNOWN, Server, slot,
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

pub(crate) struct Maps;

impl policy::Tables for Maps {
    #[inline(always)]
    fn profile(&self, generation: u32, profile: u16) -> Option<Profile> {
        PROFILES.get(slot(generation, profile as u32, MAX_PROFILES)).copied()
    }

    #[inline(always)]
    fn ports(&self, generation: u32, key: &CidrKey) -> Option<&PortSet> {
        let bits = CidrBits { scope: key.scope, direction: key.direction, addr: key.addr };
        let set = *CIDRS.get(Key::new(key.prefix_len, bits))?;
        PORT_SETS.get(slot(generation, set, MAX_PORT_SETS))
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
    if !is_unrestricted(generation, profile_of(own, label)) {
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
