//! From rules to the kernel's CIDR trie, which answers with the longest match
//! only: every CIDR carries its own port ranges and those of the CIDRs around
//! it.

use super::model::{Profile, Rule};
use ipnet::IpNet;
use sensor_common::addr::Addr;
use sensor_common::policy::{MAX_PORT_SETS, MAX_RANGES, PortRange, PortSet, RANGE_GROUP};
use std::collections::HashMap;
use std::net::IpAddr;
use std::rc::Rc;

/// One entry of the trie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    pub profile: u16,
    pub direction: u8,
    pub addr: Addr,
    /// Counted in the IPv6 form: an IPv4 /8 is 104.
    pub bits: u32,
    /// Index into the port sets.
    pub port_set: u32,
}

/// The IPv4 part of the trie.
const MAPPED: u128 = 0xffff_0000_0000;
const MAPPED_BITS: u32 = 96;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CidrError {
    #[error(
        "more than {MAX_RANGES} port ranges apply to {net}; join ranges or rules that cover the same addresses"
    )]
    Ranges { net: IpNet },
    #[error("more than {MAX_PORT_SETS} different sets of ports; give addresses with the same ports one rule")]
    PortSets,
}

/// Port sets of a whole policy, each stored once. Set 0 is empty.
pub struct PortSets {
    pub sets: Vec<PortSet>,
    index: HashMap<Box<[Range]>, u32>,
    /// What (set of the CIDR around, rules here, group) became.
    merged: HashMap<(u32, Rc<[u32]>, bool), u32>,
}

/// [`PortRange`], comparable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Range {
    rule: u32,
    protocol: u8,
    low: u16,
    high: u16,
    group: bool,
}

impl Default for PortSets {
    fn default() -> Self {
        let index = HashMap::from([(Vec::new().into_boxed_slice(), 0)]);
        PortSets { sets: vec![PortSet::default()], index, merged: HashMap::new() }
    }
}

struct Node {
    addr: u128,
    bits: u32,
    rules: Rc<[u32]>,
}

/// The CIDRs of one profile and direction; `ids` are the numbers of the rules.
pub fn compile(
    profile_id: u16,
    direction: u8,
    rules: &[(u32, &Rule)],
    sets: &mut PortSets,
    out: &mut Vec<Cidr>,
) -> Result<(), CidrError> {
    let mut places: Vec<(u128, u32, u32)> = Vec::with_capacity(rules.iter().map(|(_, r)| r.nets.len()).sum());
    for (id, rule) in rules {
        for net in &rule.nets {
            let (addr, bits) = wide(net);
            places.push((addr, bits, *id));
        }
    }
    places.sort_unstable();
    places.dedup();
    let by_id: HashMap<u32, &Rule> = rules.iter().copied().collect();
    let one_rule: HashMap<u32, Rc<[u32]>> = rules.iter().map(|(id, _)| (*id, Rc::from([*id]))).collect();
    let mut v6_covers_v4 = false;
    let mut has_v4_default = false;
    // The CIDRs around the current one, outermost first: (addr, bits, set, v4).
    let mut around: Vec<(u128, u32, u32)> = Vec::new();
    let mut at = 0;
    while at < places.len() {
        let (addr, bits, first) = places[at];
        let end = at + places[at..].iter().take_while(|p| (p.0, p.1) == (addr, bits)).count();
        let here: Rc<[u32]> = match end - at {
            1 => Rc::clone(&one_rule[&first]),
            _ => places[at..end].iter().map(|p| p.2).collect(),
        };
        at = end;
        let node = Node { addr, bits, rules: here };
        let is_v4 = node.is_v4();
        v6_covers_v4 |= !is_v4 && covers(addr, bits, MAPPED);
        has_v4_default |= is_v4 && bits == MAPPED_BITS;
        while around.last().is_some_and(|(a, b, _)| !covers(*a, *b, addr)) {
            around.pop();
        }
        // An IPv6 CIDR says nothing about IPv4, though the trie's key of
        // 0.0.0.0/0 lies within that of ::/0.
        let outer =
            around.last().filter(|(_, b, _)| !is_v4 || *b >= MAPPED_BITS).map_or(0, |(_, _, set)| *set);
        let set = sets.merge(outer, &node, &by_id)?;
        around.push((addr, bits, set));
        out.push(Cidr { profile: profile_id, direction, addr: addr_of(addr), bits, port_set: set });
    }
    if v6_covers_v4 && !has_v4_default {
        let addr = addr_of(MAPPED);
        out.push(Cidr { profile: profile_id, direction, addr, bits: MAPPED_BITS, port_set: 0 });
    }
    Ok(())
}

/// Entries that a profile needs at most (before equal ones are joined).
pub fn most_entries(profile: &Profile) -> usize {
    profile.rules.iter().map(|rule| rule.nets.len()).sum()
}

impl Node {
    fn is_v4(&self) -> bool {
        self.bits >= MAPPED_BITS && self.addr >> 32 == MAPPED >> 32
    }

    fn net(&self) -> IpNet {
        let ip: IpAddr = addr_of(self.addr).into();
        let bits = if self.is_v4() { self.bits - MAPPED_BITS } else { self.bits };
        IpNet::new(ip, bits as u8).unwrap_or_else(|_| IpNet::from(ip))
    }

    /// Wholly multicast, or the broadcast address.
    fn is_group(&self) -> bool {
        if !self.is_v4() {
            return self.bits >= 8 && self.addr >> 120 == 0xff;
        }
        let v4 = self.addr as u32;
        (self.bits >= MAPPED_BITS + 4 && v4 >> 28 == 0xe) || (self.bits == 128 && v4 == u32::MAX)
    }
}

impl PortSets {
    fn merge(&mut self, outer: u32, node: &Node, rules: &HashMap<u32, &Rule>) -> Result<u32, CidrError> {
        let group = node.is_group();
        let key = (outer, Rc::clone(&node.rules), group);
        if let Some(set) = self.merged.get(&key) {
            return Ok(*set);
        }
        let mut ranges: Vec<Range> = self.ranges(outer).collect();
        for id in node.rules.iter() {
            let Some(rule) = rules.get(id) else { continue };
            for protocol in rule.protocols() {
                ranges.extend(rule.ports.iter().map(|ports| Range {
                    rule: *id,
                    protocol,
                    low: *ports.start(),
                    high: *ports.end(),
                    group,
                }));
            }
        }
        let ranges = reduce(ranges);
        if ranges.len() > MAX_RANGES {
            return Err(CidrError::Ranges { net: node.net() });
        }
        let set = self.intern(ranges)?;
        self.merged.insert(key, set);
        Ok(set)
    }

    fn ranges(&self, set: u32) -> impl Iterator<Item = Range> + '_ {
        let set = &self.sets[set as usize];
        set.ranges[..set.count as usize].iter().map(|r| Range {
            rule: r.rule,
            protocol: r.protocol,
            low: r.low,
            high: r.high,
            group: r.flags & RANGE_GROUP != 0,
        })
    }

    fn intern(&mut self, ranges: Vec<Range>) -> Result<u32, CidrError> {
        let key = ranges.into_boxed_slice();
        if let Some(set) = self.index.get(&key) {
            return Ok(*set);
        }
        if self.sets.len() >= MAX_PORT_SETS as usize {
            return Err(CidrError::PortSets);
        }
        let mut set = PortSet { count: key.len() as u32, ..PortSet::default() };
        for (slot, range) in set.ranges.iter_mut().zip(key.iter()) {
            *slot = PortRange {
                low: range.low,
                high: range.high,
                protocol: range.protocol,
                flags: if range.group { RANGE_GROUP } else { 0 },
                _pad: 0,
                rule: range.rule,
            };
        }
        let id = self.sets.len() as u32;
        self.sets.push(set);
        self.index.insert(key, id);
        Ok(id)
    }

    /// Rules are numbered anew for each policy, but never for each profile, so
    /// what was merged for one profile cannot be met again in the next.
    pub fn forget_merged(&mut self) {
        self.merged.clear();
    }
}

/// In the order of the file; a range that an earlier one covers is left out,
/// since the first that matches decides.
fn reduce(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.sort_unstable();
    ranges.dedup();
    let mut kept: Vec<Range> = Vec::with_capacity(ranges.len());
    for range in ranges {
        let covered = kept.iter().any(|k| {
            k.protocol == range.protocol
                && k.low <= range.low
                && range.high <= k.high
                && (k.group || !range.group)
        });
        if !covered {
            kept.push(range);
        }
    }
    kept
}

fn wide(net: &IpNet) -> (u128, u32) {
    match net {
        IpNet::V4(v4) => {
            (MAPPED | u128::from(u32::from(v4.network())), MAPPED_BITS + u32::from(v4.prefix_len()))
        }
        IpNet::V6(v6) => (u128::from(v6.network()), u32::from(v6.prefix_len())),
    }
}

fn addr_of(addr: u128) -> Addr {
    Addr::from(IpAddr::V6(addr.into()))
}

fn covers(addr: u128, bits: u32, inner: u128) -> bool {
    bits == 0 || (addr ^ inner) >> (128 - bits) == 0
}
