//! What servers learned by DNS: the name of an address for events, and the list
//! for `mcp-sensor names`. The kernel alone writes and forgets.

use super::reader::boottime;
use super::state::Policies;
use crate::event::{now, pb};
use crate::kernel::maps::LearnedNames;
use crate::policy::Compiled;
use crate::policy::compile::NameEntry;
use sensor_common::addr::Addr;
use sensor_common::name::{
    LEARNED_TRUSTED, Learned, LearnedKey, MAX_LEARNED, NAME_ASK_ONLY, NAMES_PER_ADDRESS, NameText, readable,
};
use sensor_common::policy::MAX_SERVERS;
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};

/// The server has learned something.
const SOME: u64 = u64::MAX;

pub struct Names {
    maps: LearnedNames,
    learners: Learners,
}

/// Which servers have learned anything: spares records of servers without names
/// the look-ups, and most of a burst even the question.
struct Learners {
    /// For each server: CLOCK_BOOTTIME up to which it had learned nothing, or
    /// [`SOME`].
    nothing_until: Vec<AtomicU64>,
}

impl Learners {
    fn new() -> Learners {
        Learners { nothing_until: (0..MAX_SERVERS).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Whether a server may have learned something before `at` (CLOCK_BOOTTIME,
    /// nanoseconds; 0: now). `count` is how often it has learned, if known.
    fn any(&self, server: u16, at: u64, count: impl FnOnce() -> Option<u64>) -> bool {
        let Some(nothing_until) = self.nothing_until.get(usize::from(server)) else { return false };
        let known = nothing_until.load(Ordering::Relaxed);
        if known == SOME {
            return true;
        }
        if at != 0 && at <= known {
            return false;
        }
        // Before the look: what is learned between the two is looked for again.
        let looked = u64::try_from(boottime()).unwrap_or(0);
        let some = count() != Some(0);
        nothing_until.store(if some { SOME } else { looked }, Ordering::Relaxed);
        some
    }
}

impl Names {
    pub fn new(maps: LearnedNames) -> Names {
        Names { maps, learners: Learners::new() }
    }

    /// The name that a server learned an address by, the latest of several.
    /// `at`: when the address was used, as for a record.
    pub fn of(&self, server: u16, netns: u64, addr: Addr, at: u64) -> Option<String> {
        if netns == 0 || !self.learners.any(server, at, || self.maps.count(server)) {
            return None;
        }
        let addr = addr.normalise().0;
        (0..NAMES_PER_ADDRESS as u16)
            .map_while(|slot| self.maps.get(&LearnedKey { netns, addr, server, slot, _pad: 0 }))
            .max_by_key(|l| l.learned)
            .map(|l| readable(&l.text))
    }

    /// Everything that is learned, or what one server has; takes no lock that a
    /// policy is written under.
    pub fn all(&self, server: Option<u16>) -> Vec<(LearnedKey, Learned)> {
        // The kernel's walk begins anew where its place was deleted meanwhile.
        let most = 2 * MAX_LEARNED as usize;
        let seen: HashMap<LearnedKey, Learned> = self
            .maps
            .iter()
            .take(most)
            .filter(|(key, _)| server.is_none_or(|wanted| key.server == wanted))
            .collect();
        seen.into_iter().collect()
    }
}

/// As the control service shows it, sorted.
pub fn shown(
    entries: Vec<(LearnedKey, Learned)>,
    policies: &Policies,
    compiled: &Compiled,
) -> Vec<pb::LearnedName> {
    let covering = Covering::new(compiled);
    let (wall, boot) = (now(), u64::try_from(boottime()).unwrap_or(0));
    let time = |t: u64| wall.saturating_add(i64::try_from(t).unwrap_or(i64::MAX) - boot as i64);
    let mut shown: Vec<(IpAddr, pb::LearnedName)> = entries
        .into_iter()
        .map(|(key, learned)| {
            let ip: IpAddr = Addr(key.addr).into();
            let name = pb::LearnedName {
                server: policies.server_name(key.server).to_owned(),
                name: readable(&learned.text),
                address: ip.to_string(),
                netns: key.netns,
                resolver: IpAddr::from(learned.resolver).to_string(),
                ttl: learned.ttl,
                learned_unix_ns: time(learned.learned),
                until_unix_ns: time(learned.expires),
                expired: boot > learned.expires,
                rules: match learned.flags & LEARNED_TRUSTED {
                    0 => Vec::new(), // it opens nothing
                    _ => covering.rules(key.server, &learned.text),
                },
            };
            (ip, name)
        })
        .collect();
    shown.sort_by(|(a, x), (b, y)| (&x.server, &x.name, a, x.netns).cmp(&(&y.server, &y.name, b, y.netns)));
    shown.into_iter().map(|(_, name)| name).collect()
}

/// The rules that cover a name, found as the kernel's trie finds them.
struct Covering<'a> {
    compiled: &'a Compiled,
    entries: HashMap<(u16, &'a [u8]), &'a NameEntry>,
    /// Profiles of a server: its own, its launcher's.
    profiles: HashMap<u16, [u16; 2]>,
}

impl<'a> Covering<'a> {
    fn new(compiled: &'a Compiled) -> Covering<'a> {
        Covering {
            compiled,
            entries: compiled.names.iter().map(|e| ((e.profile, e.text.as_slice()), e)).collect(),
            profiles: compiled
                .servers
                .iter()
                .map(|(id, _, s)| (*id, [s.profile, s.launcher_profile]))
                .collect(),
        }
    }

    /// The longest match alone answers, and one for the search list is none.
    fn entry(&self, profile: u16, text: &NameText) -> Option<&NameEntry> {
        let end = text.iter().position(|b| *b == 0)?;
        (0..=end)
            .rev()
            .filter(|i| matches!(text[*i], 0 | b'.'))
            .find_map(|i| self.entries.get(&(profile, &text[..=i])).copied())
            .filter(|e| e.rule.flags & NAME_ASK_ONLY == 0)
    }

    fn rules(&self, server: u16, text: &NameText) -> Vec<String> {
        let profiles = self.profiles.get(&server).copied().unwrap_or_default();
        let mut rules = BTreeSet::new();
        for profile in profiles {
            let Some(entry) = self.entry(profile, text) else { continue };
            let Some(set) = self.compiled.port_sets.get(entry.rule.port_set as usize) else { continue };
            rules.extend(set.ranges.iter().take(set.count as usize).map(|r| r.rule));
        }
        rules.into_iter().filter_map(|id| self.compiled.rule(id)).map(|r| r.path.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::compile::RuleInfo;
    use sensor_common::name::{NAME_BYTES, NameRule, turned};
    use sensor_common::policy::{PortRange, PortSet, Server};
    use zerocopy::FromZeros as _;

    fn text(name: &str) -> NameText {
        let turned = turned(name, false);
        let mut text = [0; NAME_BYTES];
        text[..turned.len()].copy_from_slice(&turned);
        text
    }

    fn policy() -> Compiled {
        let rule =
            |id: u32, path: &str| RuleInfo { id, path: path.to_owned(), line: id, text: String::new() };
        let set = |rules: &[u32]| {
            let mut set = PortSet { count: rules.len() as u32, ..PortSet::default() };
            for (range, rule) in set.ranges.iter_mut().zip(rules) {
                *range = PortRange { low: 443, high: 443, protocol: 6, rule: *rule, ..PortRange::default() };
            }
            set
        };
        let entry = |text: Vec<u8>, port_set: u32, flags: u32| NameEntry {
            profile: 2,
            text,
            rule: NameRule { port_set, flags },
        };
        Compiled {
            servers: vec![(5, "github".to_owned(), Server { valid: 1, profile: 2, ..Server::default() })],
            port_sets: vec![PortSet::default(), set(&[1]), set(&[1, 2])],
            names: vec![
                entry(turned("example.com", true), 1, 0),
                entry(turned("api.example.com", false), 2, 0),
                entry(turned("x.example.com", false), 0, NAME_ASK_ONLY),
            ],
            rules: vec![rule(1, "profiles.p.egress[0]"), rule(2, "profiles.p.egress[1]")],
            ..Compiled::default()
        }
    }

    #[test]
    fn a_name_is_covered_by_its_longest_match() {
        let compiled = policy();
        let covering = Covering::new(&compiled);
        let rules = |name: &str| covering.rules(5, &text(name));
        assert_eq!(rules("api.example.com"), ["profiles.p.egress[0]", "profiles.p.egress[1]"]);
        assert_eq!(rules("a.b.example.com"), ["profiles.p.egress[0]"]);
        for none in ["example.com", "evilexample.com", "x.example.com", "com"] {
            assert!(rules(none).is_empty(), "{none}");
        }
        assert!(covering.rules(6, &text("api.example.com")).is_empty(), "another server");
    }

    #[test]
    fn a_server_that_learned_nothing_is_asked_about_once_for_records_of_the_past() {
        let learners = Learners::new();
        let start = u64::try_from(boottime()).unwrap();
        assert!(!learners.any(5, start, || Some(0)));
        assert!(!learners.any(5, start, || panic!("a record from before the last look")));
        let later = u64::try_from(boottime()).unwrap() + 1_000_000_000;
        assert!(!learners.any(6, later, || Some(0)), "each server for itself");
        assert!(learners.any(5, later, || Some(1)));
        assert!(learners.any(5, 0, || panic!("once and for all")));
        assert!(learners.any(7, start, || None), "not known: looked up");
        assert!(!learners.any(u16::MAX, start, || panic!("no such server")));
    }

    #[test]
    fn the_list_is_sorted_and_tells_what_has_expired() {
        let boot = u64::try_from(boottime()).unwrap();
        let entry = |ip: &str, name: &str, expires: u64| {
            let addr = Addr::from(ip.parse::<IpAddr>().unwrap()).0;
            let mut learned = Learned::new_zeroed();
            (learned.expires, learned.learned, learned.ttl) = (expires, boot, 30);
            learned.resolver = Addr::from("10.0.0.2".parse::<IpAddr>().unwrap());
            learned.text = text(name);
            learned.flags = LEARNED_TRUSTED;
            (LearnedKey { netns: 7, addr, server: 5, slot: 0, _pad: 0 }, learned)
        };
        let hour = 3_600_000_000_000;
        let mut hearsay = entry("192.0.2.10", "b.example.com", boot + hour);
        hearsay.1.flags = 0;
        let entries = vec![
            hearsay,
            entry("192.0.2.9", "b.example.com", boot + hour),
            entry("2001:db8::1", "api.example.com", 1),
        ];
        let shown = shown(entries, &Policies::default(), &policy());
        let seen: Vec<_> = shown.iter().map(|n| (n.name.as_str(), n.address.as_str(), n.expired)).collect();
        assert_eq!(
            seen,
            [
                ("api.example.com", "2001:db8::1", true),
                ("b.example.com", "192.0.2.9", false),
                ("b.example.com", "192.0.2.10", false),
            ]
        );
        let ahead = shown[1].until_unix_ns - now();
        assert!((hour as i64 - 10_000_000_000..=hour as i64).contains(&ahead), "{ahead}");
        assert_eq!((shown[1].resolver.as_str(), shown[1].rules.len()), ("10.0.0.2", 1));
        assert!(shown[2].rules.is_empty(), "not from a pinned resolver: it opens nothing");
    }
}
