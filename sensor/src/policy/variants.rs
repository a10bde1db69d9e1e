//! A profile with names compiles once for each list of resolvers that its
//! servers ask: a resolver's address is part of what a profile allows.

use super::host::Host;
use super::model::{Policy, Profile, ProfileId, ProfileKind, Resolver};
use super::resolvers::RESOLV_CONF;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

/// One profile as it is compiled.
#[derive(Clone, Debug)]
pub struct Variant {
    pub profile: ProfileId,
    /// Of a profile with names only.
    pub resolvers: Vec<Resolver>,
}

/// What servers refer to; the index is the id of the compiled profile. The first
/// ones are the policy's profiles, each with the same index.
#[derive(Debug)]
pub struct Variants {
    pub list: Vec<Variant>,
    by_resolvers: HashMap<(ProfileId, Vec<IpAddr>), usize>,
    taken: HashSet<ProfileId>,
    host: Vec<Resolver>,
}

impl Profile {
    /// Hosts are known to it by name.
    pub fn has_names(&self) -> bool {
        self.kind == ProfileKind::Rules && self.named().is_some()
    }
}

impl Variants {
    pub fn new(policy: &Policy, host: &Host) -> Variants {
        let resolver = |addr: &IpAddr| Resolver { addr: *addr, path: RESOLV_CONF.to_owned(), position: None };
        let host: Vec<Resolver> = host.dns.resolvers.iter().map(resolver).collect();
        let usual = policy.resolvers.as_ref().unwrap_or(&host);
        let list = policy.profiles.iter().enumerate().map(|(profile, of)| Variant {
            profile,
            resolvers: if of.has_names() { usual.clone() } else { Vec::new() },
        });
        Variants { list: list.collect(), by_resolvers: HashMap::new(), taken: HashSet::new(), host }
    }

    /// The compiled profile of a server whose resolvers are these (`None`: the
    /// host's).
    pub fn of(&mut self, policy: &Policy, profile: ProfileId, resolvers: Option<&[Resolver]>) -> usize {
        if !policy.profiles[profile].has_names() {
            return profile;
        }
        let resolvers = resolvers.unwrap_or(&self.host);
        let mut addresses: Vec<IpAddr> = resolvers.iter().map(|r| r.addr).collect();
        addresses.sort_unstable();
        if let Some(index) = self.by_resolvers.get(&(profile, addresses.clone())) {
            return *index;
        }
        let variant = Variant { profile, resolvers: resolvers.to_vec() };
        let index = if self.taken.insert(profile) {
            self.list[profile] = variant;
            profile
        } else {
            self.list.push(variant);
            self.list.len() - 1
        };
        self.by_resolvers.insert((profile, addresses), index);
        index
    }
}
