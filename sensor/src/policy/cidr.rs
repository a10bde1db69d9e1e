//! From rules to the kernel's CIDR trie, which answers with the longest match
//! only: every CIDR carries its own port ranges and those of the CIDRs around
//! it.

use super::model::{Profile, Rule};
use super::ports::{Place, PortError, PortSets, Source};
use ipnet::IpNet;
use sensor_common::addr::Addr;
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

struct Node {
    addr: u128,
    bits: u32,
    rules: Rc<[u32]>,
}

/// The CIDRs of one profile and direction; `ids` are the numbers of the rules.
/// `pinned` are resolvers, each with a number of its own.
pub fn compile(
    profile_id: u16,
    direction: u8,
    rules: &[(u32, &Rule)],
    pinned: &[(u32, IpAddr)],
    sets: &mut PortSets,
    out: &mut Vec<Cidr>,
) -> Result<(), PortError> {
    let most = rules.iter().map(|(_, r)| r.nets.len()).sum::<usize>() + pinned.len();
    let mut places: Vec<(u128, u32, u32)> = Vec::with_capacity(most);
    for (id, rule) in rules {
        for net in &rule.nets {
            let (addr, bits) = wide(net);
            places.push((addr, bits, *id));
        }
    }
    for (id, ip) in pinned {
        let (addr, bits) = wide(&IpNet::from(IpAddr::from(Addr::from(*ip).normalise())));
        places.push((addr, bits, *id));
    }
    places.sort_unstable();
    places.dedup();
    let sources: HashMap<u32, Source> = rules
        .iter()
        .map(|(id, rule)| (*id, Source::Rule(rule)))
        .chain(pinned.iter().map(|(id, _)| (*id, Source::Resolver)))
        .collect();
    let one_rule: HashMap<u32, Rc<[u32]>> = sources.keys().map(|id| (*id, Rc::from([*id]))).collect();
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
        let place = if node.is_group() { Place::Group } else { Place::Address };
        let Some(set) = sets.merge(outer, &node.rules, place, &sources)? else {
            return Err(PortError::Ranges { place: node.net().to_string(), what: "addresses" });
        };
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

    fn is_group(&self) -> bool {
        is_group(&self.net())
    }
}

/// Wholly multicast, or the broadcast address.
pub fn is_group(net: &IpNet) -> bool {
    match net {
        IpNet::V6(v6) => v6.prefix_len() >= 8 && v6.network().octets()[0] == 0xff,
        IpNet::V4(v4) => {
            let network = v4.network();
            (v4.prefix_len() >= 4 && network.is_multicast())
                || (v4.prefix_len() == 32 && network.is_broadcast())
        }
    }
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
