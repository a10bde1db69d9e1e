//! The compiled policy as `sensor_common::policy::decide` reads it: the same
//! function that runs in the kernel, over vectors in place of maps.

use super::cidr::Cidr;
use super::compile::Compiled;
use sensor_common::addr::Addr;
use sensor_common::name::{NAME_ASK_ONLY, NO_SET, NameRule, turned};
use sensor_common::policy::{CidrKey, EGRESS, Flow, Match, Named, Profile, Tables};
use std::collections::HashMap;

/// In memory; the generation is ignored, since there is one only.
pub struct MemoryTables<'a> {
    compiled: &'a Compiled,
    /// (profile, direction, bits, masked address) → port set.
    cidrs: HashMap<(u16, u8, u32, u128), u32>,
    names: HashMap<(u16, &'a [u8]), NameRule>,
    learned: Option<&'a str>,
}

impl<'a> MemoryTables<'a> {
    pub fn new(compiled: &'a Compiled) -> MemoryTables<'a> {
        let key = |c: &Cidr| ((c.profile, c.direction, c.bits, number(c.addr)), c.port_set);
        MemoryTables {
            compiled,
            cidrs: compiled.cidrs.iter().map(key).collect(),
            names: compiled.names.iter().map(|n| ((n.profile, n.text.as_slice()), n.rule)).collect(),
            learned: None,
        }
    }

    /// As if every address had been learned by this name, and no CIDR covered
    /// any. `name`: ASCII, lower case, without trailing dot.
    #[must_use]
    pub fn learned_by(mut self, name: &'a str) -> MemoryTables<'a> {
        self.learned = Some(name);
        self
    }

    /// The longest entry that covers a name.
    pub fn name(&self, profile: u16, name: &str) -> Option<NameRule> {
        let text = turned(name, false);
        let dots = text.iter().enumerate().rev().filter(|(_, b)| **b == b'.').map(|(at, _)| at + 1);
        std::iter::once(text.len())
            .chain(dots)
            .find_map(|end| self.names.get(&(profile, &text[..end])).copied())
    }
}

impl Tables for MemoryTables<'_> {
    fn profile(&self, _generation: u32, profile: u16) -> Option<Profile> {
        self.compiled.profiles.get(usize::from(profile)).copied()
    }

    fn set(&self, key: &CidrKey) -> Option<u32> {
        let profile = u32::from_be(key.scope) as u16;
        let direction = u32::from_be(key.direction) as u8;
        if self.learned.is_some() && direction == EGRESS {
            return None;
        }
        let address = number(key.addr);
        (0..=128u32).rev().find_map(|bits| {
            let mask = if bits == 0 { 0 } else { u128::MAX << (128 - bits) };
            self.cidrs.get(&(profile, direction, bits, address & mask)).copied()
        })
    }

    fn covering(&self, _generation: u32, set: u32, flow: &Flow, group: bool) -> Option<Match> {
        self.compiled.port_sets.get(set as usize)?.covering(flow, group)
    }

    fn named(&self, _generation: u32, profile: u16, _addr: &Addr, slot: u16) -> Option<Named> {
        let name = self.learned.filter(|_| slot == 0)?;
        let rule = self.name(profile, name).filter(|rule| rule.flags & NAME_ASK_ONLY == 0);
        Some(Named { set: rule.map_or(NO_SET, |rule| rule.port_set), expired: false })
    }

    fn at_home(&self) -> bool {
        true
    }
}

/// The 128 bits as they stand in the trie. (`IpAddr` would make IPv4 of a
/// v4-mapped address.)
fn number(addr: Addr) -> u128 {
    addr.0.iter().fold(0, |sum, word| sum << 32 | u128::from(u32::from_be(*word)))
}
