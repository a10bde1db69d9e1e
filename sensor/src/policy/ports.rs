//! Sets of port ranges, as addresses and names share them: each is stored once.

use super::model::Rule;
use sensor_common::policy::{
    MAX_PORT_SETS, MAX_RANGES, PortRange, PortSet, RANGE_DNS, RANGE_GROUP, RANGE_SNI,
};
use sensor_common::{TCP, UDP};
use std::collections::HashMap;
use std::rc::Rc;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    #[error(
        "more than {MAX_RANGES} port ranges apply to {place}; join ranges or rules that cover the same {what}"
    )]
    Ranges { place: String, what: &'static str },
    #[error(
        "more than {MAX_PORT_SETS} different sets of ports; give destinations with the same ports one rule"
    )]
    Sets,
}

/// Where ranges come from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    Rule(&'a Rule),
    /// A pinned resolver: its port 53.
    Resolver,
}

/// What ranges stand at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    Address,
    /// Wholly multicast, or the broadcast address.
    Group,
    Name,
}

/// Port sets of a whole policy. Set 0 is empty.
pub struct PortSets {
    pub sets: Vec<PortSet>,
    index: HashMap<Box<[Range]>, u32>,
    /// What (set around, sources here, place) became.
    merged: HashMap<(u32, Rc<[u32]>, Place), u32>,
}

/// [`PortRange`], ordered as it decides: the first that matches does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Range {
    kind: Kind,
    rule: u32,
    protocol: u8,
    low: u16,
    high: u16,
    group: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Kind {
    /// Before all others, so that no rule lifts the inspection of a resolver.
    Dns,
    Plain,
    /// Behind those that ask for nothing: what one rule allows, another does
    /// not take away.
    Sni,
}

impl Default for PortSets {
    fn default() -> Self {
        let index = HashMap::from([(Vec::new().into_boxed_slice(), 0)]);
        PortSets { sets: vec![PortSet::default()], index, merged: HashMap::new() }
    }
}

impl PortSets {
    /// The set of what `outer` holds and what the sources `here` add. `None`:
    /// more ranges than the kernel takes for one place.
    pub fn merge(
        &mut self,
        outer: u32,
        here: &Rc<[u32]>,
        place: Place,
        sources: &HashMap<u32, Source<'_>>,
    ) -> Result<Option<u32>, PortError> {
        let key = (outer, Rc::clone(here), place);
        if let Some(set) = self.merged.get(&key) {
            return Ok(Some(*set));
        }
        let mut ranges: Vec<Range> = self.ranges(outer).collect();
        for id in here.iter() {
            match sources.get(id) {
                Some(Source::Rule(rule)) => add_rule(&mut ranges, *id, rule, place),
                Some(Source::Resolver) => ranges.extend([UDP, TCP].map(|protocol| Range {
                    kind: Kind::Dns,
                    rule: *id,
                    protocol,
                    low: 53,
                    high: 53,
                    group: false,
                })),
                None => {}
            }
        }
        let ranges = reduce(ranges);
        if ranges.len() > MAX_RANGES {
            return Ok(None);
        }
        let set = self.intern(ranges)?;
        self.merged.insert(key, set);
        Ok(Some(set))
    }

    fn ranges(&self, set: u32) -> impl Iterator<Item = Range> + '_ {
        let set = &self.sets[set as usize];
        set.ranges[..set.count as usize].iter().map(|r| Range {
            kind: if r.flags & RANGE_DNS != 0 {
                Kind::Dns
            } else if r.flags & RANGE_SNI != 0 {
                Kind::Sni
            } else {
                Kind::Plain
            },
            rule: r.rule,
            protocol: r.protocol,
            low: r.low,
            high: r.high,
            group: r.flags & RANGE_GROUP != 0,
        })
    }

    fn intern(&mut self, ranges: Vec<Range>) -> Result<u32, PortError> {
        let key = ranges.into_boxed_slice();
        if let Some(set) = self.index.get(&key) {
            return Ok(*set);
        }
        if self.sets.len() >= MAX_PORT_SETS as usize {
            return Err(PortError::Sets);
        }
        let mut set = PortSet { count: key.len() as u32, ..PortSet::default() };
        for (slot, range) in set.ranges.iter_mut().zip(key.iter()) {
            let kind = match range.kind {
                Kind::Dns => RANGE_DNS,
                Kind::Plain => 0,
                Kind::Sni => RANGE_SNI,
            };
            *slot = PortRange {
                low: range.low,
                high: range.high,
                protocol: range.protocol,
                flags: kind | if range.group { RANGE_GROUP } else { 0 },
                _pad: 0,
                rule: range.rule,
            };
        }
        let id = self.sets.len() as u32;
        self.sets.push(set);
        self.index.insert(key, id);
        Ok(id)
    }

    /// What was merged for the rules of one profile is not met again in the
    /// next.
    pub fn forget_merged(&mut self) {
        self.merged.clear();
    }
}

fn add_rule(ranges: &mut Vec<Range>, id: u32, rule: &Rule, place: Place) {
    for protocol in rule.protocols() {
        for ports in &rule.ports {
            let range = |(low, high, sni)| Range {
                kind: if sni { Kind::Sni } else { Kind::Plain },
                rule: id,
                protocol,
                low,
                high,
                group: place == Place::Group,
            };
            if place == Place::Name && protocol == TCP {
                ranges.extend(rule.sni.split(ports).map(range));
            } else {
                ranges.push(range((*ports.start(), *ports.end(), false)));
            }
        }
    }
}

/// Ordered; a range that an earlier one covers is left out.
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
