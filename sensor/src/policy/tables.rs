//! The compiled policy as `sensor_common::policy::decide` reads it: the same
//! function that runs in the kernel, over vectors in place of maps.

use super::cidr::Cidr;
use super::compile::Compiled;
use sensor_common::addr::Addr;
use sensor_common::policy::{CidrKey, PortSet, Profile, Tables};
use std::collections::HashMap;

/// In memory; the generation is ignored, since there is one only.
pub struct MemoryTables<'a> {
    compiled: &'a Compiled,
    /// (profile, direction, bits, masked address) → port set.
    cidrs: HashMap<(u16, u8, u32, u128), u32>,
}

impl<'a> MemoryTables<'a> {
    pub fn new(compiled: &'a Compiled) -> MemoryTables<'a> {
        let key = |c: &Cidr| ((c.profile, c.direction, c.bits, number(c.addr)), c.port_set);
        MemoryTables { compiled, cidrs: compiled.cidrs.iter().map(key).collect() }
    }
}

impl Tables for MemoryTables<'_> {
    fn profile(&self, _generation: u32, profile: u16) -> Option<Profile> {
        self.compiled.profiles.get(usize::from(profile)).copied()
    }

    fn ports(&self, _generation: u32, key: &CidrKey) -> Option<&PortSet> {
        let profile = u32::from_be(key.scope) as u16;
        let direction = u32::from_be(key.direction) as u8;
        let address = number(key.addr);
        let longest = (0..=128u32).rev().find_map(|bits| {
            let mask = if bits == 0 { 0 } else { u128::MAX << (128 - bits) };
            self.cidrs.get(&(profile, direction, bits, address & mask))
        })?;
        self.compiled.port_sets.get(*longest as usize)
    }
}

/// The 128 bits as they stand in the trie. (`IpAddr` would make IPv4 of a
/// v4-mapped address.)
fn number(addr: Addr) -> u128 {
    addr.0.iter().fold(0, |sum, word| sum << 32 | u128::from(u32::from_be(*word)))
}
