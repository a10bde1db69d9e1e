//! Writing a compiled policy beside the one in force, and switching to it.

use super::maps::{CidrBits, ExecBits, LpmKey, Maps, NameBits, Shared, UnixBits};
use crate::policy::compile::Compiled;
use aya::maps::MapError;
use sensor_common::addr::Addr;
use sensor_common::exec::{ExecKey, KIND_CGROUP};
use sensor_common::identity::{FileId, IdentityKey};
use sensor_common::kernel::State;
use sensor_common::name::NameKey;
use sensor_common::policy::{
    BIND, CidrKey, INBOUND, LaunchKey, MAX_PORT_SETS, MAX_PROFILES, MAX_RANGES, MAX_SERVERS, MODE_ENFORCE,
    PortRange, PortSet, Profile, SERVER_CANARY, SERVER_UNKNOWN, Server, slot,
};
use sensor_common::record::Instance;
use sensor_common::unix::UnixKey;
use sensor_common::{TCP, UDP};
use std::collections::{BTreeSet, HashMap};

#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    #[error("the kernel's `{map}` map does not take the policy: {source}; the old policy stays in force")]
    Map { map: &'static str, source: MapError },
    #[error("a key of the policy is longer than the kernel's `{0}` map allows")]
    Key(&'static str),
    #[error("the policy has more than {MAX_PORT_SETS} port sets")]
    PortSets,
}

fn at(map: &'static str) -> impl Fn(MapError) -> InstallError {
    move |source| InstallError::Map { map, source }
}

fn cidr_key(key: &CidrKey) -> LpmKey<CidrBits> {
    let a = key.addr.0;
    LpmKey::new(key.prefix_len, Shared([key.scope, key.direction, a[0], a[1], a[2], a[3]]))
}

/// The generation in force.
pub fn generation(maps: &Maps) -> u32 {
    maps.state.get(&0, 0).map_or(0, |s| s.0.generation)
}

/// The one after `current`; 0 means "none" and is passed over. Tries keep 16
/// bits of it.
pub fn next_generation(current: u32) -> u32 {
    match (current + 1) & 0xffff {
        0 => 2,
        next => next,
    }
}

/// Writes everything under `generation` and switches to it with one store.
/// What the generation before it left is removed by [`sweep`].
pub fn install(maps: &mut Maps, generation: u32, compiled: &Compiled) -> Result<(), InstallError> {
    for (index, profile) in compiled.profiles.iter().enumerate() {
        let slot = slot(generation, index as u32, MAX_PROFILES);
        maps.profiles.set(slot, Shared(*profile), 0).map_err(at("PROFILES"))?;
    }
    // Profiles of two generations ago must not answer for one that is gone.
    for index in compiled.profiles.len() as u32..MAX_PROFILES {
        let slot = slot(generation, index, MAX_PROFILES);
        if maps.profiles.get(&slot, 0).is_ok_and(|p| p.0 == Profile::default()) {
            break;
        }
        maps.profiles.set(slot, Shared(Profile::default()), 0).map_err(at("PROFILES"))?;
    }
    let binds = bind_sets(compiled);
    let mut sets = compiled.port_sets.clone();
    let mut bind_ids = Vec::with_capacity(binds.len());
    for (profile, set) in binds {
        bind_ids.push((profile, sets.len() as u32));
        sets.push(set);
    }
    if sets.len() > MAX_PORT_SETS as usize {
        return Err(InstallError::PortSets);
    }
    for (index, set) in sets.iter().enumerate() {
        let slot = slot(generation, index as u32, MAX_PORT_SETS);
        maps.port_sets.set(slot, Shared(*set), 0).map_err(at("PORT_SETS"))?;
    }
    for c in &compiled.cidrs {
        let key = CidrKey::new(generation, c.profile, c.direction, c.addr, c.bits);
        maps.cidrs.insert(&cidr_key(&key), c.port_set, 0).map_err(at("CIDRS"))?;
    }
    for (profile, set) in bind_ids {
        let key = CidrKey::new(generation, profile, BIND, Addr::default(), 0);
        maps.cidrs.insert(&cidr_key(&key), set, 0).map_err(at("CIDRS"))?;
    }
    for entry in &compiled.exec {
        let key = ExecKey::new(generation, entry.kind, &entry.text).ok_or(InstallError::Key("EXEC_RULES"))?;
        let bits = ExecBits { generation: key.generation, kind: key.kind, bytes: key.bytes };
        maps.exec_rules
            .insert(&LpmKey::new(key.prefix_len, Shared(bits)), Shared(entry.rule), 0)
            .map_err(at("EXEC_RULES"))?;
    }
    for entry in &compiled.unix {
        let key = UnixKey::new(generation, entry.profile, &entry.text).ok_or(InstallError::Key("UNIX"))?;
        let bits = UnixBits { generation: key.generation, profile: key.profile, path: key.path };
        maps.unix
            .insert(&LpmKey::new(key.prefix_len, Shared(bits)), Shared(entry.rule), 0)
            .map_err(at("UNIX"))?;
    }
    for entry in &compiled.names {
        let key = NameKey::new(generation, entry.profile, &entry.text).ok_or(InstallError::Key("NAMES"))?;
        let bits = NameBits { scope: key.scope, text: key.text };
        maps.names
            .insert(&LpmKey::new(key.prefix_len, Shared(bits)), Shared(entry.rule), 0)
            .map_err(at("NAMES"))?;
    }
    for (from, to) in &compiled.launches {
        let key = LaunchKey { generation, from: *from, to: *to };
        maps.launches.insert(Shared(key), 1, 0).map_err(at("LAUNCHES"))?;
    }
    let servers: HashMap<u16, Server> = compiled.servers.iter().map(|(id, _, s)| (*id, *s)).collect();
    let unknown = servers.get(&SERVER_UNKNOWN).copied().unwrap_or_default();
    let canary = Server { valid: 1, mode: MODE_ENFORCE, ..Server::default() };
    for id in 1..MAX_SERVERS {
        // A server that the policy no longer declares is one nobody declared.
        let server = match id as u16 {
            SERVER_CANARY => canary,
            id => servers.get(&id).copied().unwrap_or(unknown),
        };
        maps.servers.set(slot(generation, id, MAX_SERVERS), Shared(server), 0).map_err(at("SERVERS"))?;
    }
    let mut state = maps.state.get(&0, 0).map_err(at("STATE"))?.0;
    state.cgroup_rules = u32::from(compiled.exec.iter().any(|e| e.kind == KIND_CGROUP));
    state.generation = generation;
    maps.state.set(0, Shared(state), 0).map_err(at("STATE"))
}

/// Switches one server's mode in place: one aligned store of 8 bytes.
pub fn set_mode(maps: &mut Maps, generation: u32, id: u16, mode: u8) -> Result<(), InstallError> {
    let slot = slot(generation, u32::from(id), MAX_SERVERS);
    let mut server = maps.servers.get(&slot, 0).map_err(at("SERVERS"))?.0;
    server.mode = mode;
    maps.servers.set(slot, Shared(server), 0).map_err(at("SERVERS"))
}

/// A server as it is in force.
pub fn server(maps: &Maps, generation: u32, id: u16) -> Option<Server> {
    let server = maps.servers.get(&slot(generation, u32::from(id), MAX_SERVERS), 0).ok()?.0;
    (server.valid == 1).then_some(server)
}

/// Writes that a file holds what a server's rule says.
pub fn verify(maps: &mut Maps, generation: u32, file: FileId, server: u16) -> Result<(), InstallError> {
    let key = IdentityKey { file, generation, server: server.into() };
    maps.identities.insert(Shared(key), 1, 0).map_err(at("IDENTITIES"))
}

/// Takes it out again.
pub fn forget_file(maps: &mut Maps, generation: u32, file: FileId, server: u16) {
    let key = IdentityKey { file, generation, server: server.into() };
    let _ = maps.identities.remove(&Shared(key));
}

/// What the kernel keeps of an instance.
pub fn instance(maps: &Maps, number: u32) -> Option<Instance> {
    maps.instances.get(&number, 0).ok().map(|i| i.0)
}

/// The instance reaches nothing from here on. False: there is no place to say so.
pub fn quarantine(maps: &mut Maps, number: u32) -> bool {
    if maps.quarantined.insert(number, 1, 0).is_err() {
        return false;
    }
    set_quarantined(maps)
}

/// An instance has ended; its number may be given out again.
pub fn release(maps: &mut Maps, number: u32) {
    if maps.quarantined.remove(&number).is_ok() {
        set_quarantined(maps);
    }
}

fn set_quarantined(maps: &mut Maps) -> bool {
    let any = maps.quarantined.keys().flatten().next().is_some();
    let Ok(state) = maps.state.get(&0, 0) else { return false };
    maps.state.set(0, Shared(State { quarantined: any.into(), ..state.0 }), 0).is_ok()
}

/// Removes the keys of every generation but `keep`. Errors only leave keys that
/// no program asks for.
pub fn sweep(maps: &mut Maps, keep: u32) -> usize {
    let mut removed = 0;
    let stale: Vec<_> = maps
        .cidrs
        .keys()
        .flatten()
        .filter(|k| u32::from_be({ k.data() }.0[0]) >> 16 != keep & 0xffff)
        .collect();
    for key in stale {
        removed += usize::from(maps.cidrs.remove(&key).is_ok());
    }
    let stale: Vec<_> = maps
        .exec_rules
        .keys()
        .flatten()
        .filter(|k| u32::from_be({ k.data() }.0.generation) != keep)
        .collect();
    for key in stale {
        removed += usize::from(maps.exec_rules.remove(&key).is_ok());
    }
    let stale: Vec<_> =
        maps.unix.keys().flatten().filter(|k| u32::from_be({ k.data() }.0.generation) != keep).collect();
    for key in stale {
        removed += usize::from(maps.unix.remove(&key).is_ok());
    }
    let stale: Vec<_> = maps
        .names
        .keys()
        .flatten()
        .filter(|k| u32::from_be({ k.data() }.0.scope) >> 16 != keep & 0xffff)
        .collect();
    for key in stale {
        removed += usize::from(maps.names.remove(&key).is_ok());
    }
    let stale: Vec<_> = maps.launches.keys().flatten().filter(|k| k.0.generation != keep).collect();
    for key in stale {
        removed += usize::from(maps.launches.remove(&key).is_ok());
    }
    let stale: Vec<_> = maps.identities.keys().flatten().filter(|k| k.0.generation != keep).collect();
    for key in stale {
        removed += usize::from(maps.identities.remove(&key).is_ok());
    }
    removed
}

/// For each profile with inbound rules, the ports that any peer may reach: what
/// bind() is asked about.
fn bind_sets(compiled: &Compiled) -> Vec<(u16, PortSet)> {
    let mut by_profile: HashMap<u16, BTreeSet<(u8, u16, u16, u32)>> = HashMap::new();
    for c in compiled.cidrs.iter().filter(|c| c.direction == INBOUND) {
        let Some(set) = compiled.port_sets.get(c.port_set as usize) else { continue };
        let ranges = by_profile.entry(c.profile).or_default();
        for r in &set.ranges[..(set.count as usize).min(MAX_RANGES)] {
            ranges.insert((r.protocol, r.low, r.high, r.rule));
        }
    }
    by_profile.into_iter().map(|(profile, ranges)| (profile, join(ranges))).collect()
}

fn join(ranges: BTreeSet<(u8, u16, u16, u32)>) -> PortSet {
    let mut joined: Vec<PortRange> = Vec::new();
    for (protocol, low, high, rule) in ranges {
        match joined.last_mut() {
            Some(last) if last.protocol == protocol && u32::from(low) <= u32::from(last.high) + 1 => {
                last.high = last.high.max(high);
            }
            _ => joined.push(PortRange { low, high, protocol, flags: 0, _pad: 0, rule }),
        }
    }
    if joined.len() > MAX_RANGES {
        // bind() is only the early error; packets are judged rule by rule.
        let rule = joined[0].rule;
        joined = [TCP, UDP]
            .map(|protocol| PortRange { low: 0, high: u16::MAX, protocol, flags: 0, _pad: 0, rule })
            .to_vec();
    }
    let mut set = PortSet { count: joined.len() as u32, ..PortSet::default() };
    set.ranges[..joined.len()].copy_from_slice(&joined);
    set
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_never_are_zero() {
        assert_eq!(next_generation(0), 1);
        assert_eq!(next_generation(0xffff), 2);
        assert_eq!(next_generation(7), 8);
    }

    #[test]
    fn bind_ranges_join_and_stay_within_the_limit() {
        let set =
            join(BTreeSet::from([(TCP, 80, 90, 1), (TCP, 85, 100, 2), (TCP, 101, 101, 3), (UDP, 5, 5, 4)]));
        assert_eq!(set.count, 2);
        assert_eq!((set.ranges[0].low, set.ranges[0].high, set.ranges[1].protocol), (80, 101, UDP));
        let many = join((0..100u16).map(|i| (TCP, i * 3, i * 3, 1)).collect());
        assert_eq!((many.count, many.ranges[0].low, many.ranges[0].high), (2, 0, u16::MAX));
    }
}
