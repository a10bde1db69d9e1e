//! Denials that came again, and what the kernel could not record, reported from
//! its counters.

use crate::kernel::maps::Maps;
use sensor_common::kernel::Denial;
use sensor_common::record::{Loss, VerdictKey};
use std::collections::HashMap;

/// Rounds without a repeat after which an entry is forgotten, so that the next
/// one is a record of its own.
const IDLE_ROUNDS: u32 = 15;

struct Known {
    reported: u64,
    idle: u32,
}

/// How often each denial was reported. As many entries as the kernel's table.
#[derive(Default)]
pub struct Repeats {
    known: HashMap<VerdictKey, Known>,
}

impl Repeats {
    /// Denials since the last round that were not records of their own.
    pub fn round(&mut self, maps: &mut Maps) -> Vec<(VerdictKey, u64)> {
        let mut repeats = Vec::new();
        let entries: Vec<(VerdictKey, Denial)> =
            maps.denials.iter().flatten().map(|(k, v)| (k.0, v.0)).collect();
        let mut forget = Vec::new();
        for (key, denial) in &entries {
            let known = self.known.entry(*key).or_insert(Known { reported: denial.sent, idle: 0 });
            let more = denial.count.saturating_sub(known.reported);
            if more > 0 {
                known.reported = denial.count;
                known.idle = 0;
                repeats.push((*key, more));
            } else {
                known.idle += 1;
                if known.idle >= IDLE_ROUNDS {
                    forget.push(*key);
                }
            }
        }
        for key in forget {
            // What was added since the look above comes out with the entry.
            let last = maps.take_denial(&key);
            let reported = self.known.remove(&key).map_or(0, |k| k.reported);
            if let Some(more) = last.map(|d| d.count.saturating_sub(reported)).filter(|n| *n > 0) {
                repeats.push((key, more));
            }
        }
        if self.known.len() > entries.len() {
            let present: std::collections::HashSet<VerdictKey> = entries.iter().map(|(k, _)| *k).collect();
            self.known.retain(|k, _| present.contains(k));
        }
        repeats
    }
}

/// What the kernel lost since the last report, by reason.
pub fn losses(maps: &mut Maps) -> Vec<(Loss, u64)> {
    let mut losses = Vec::new();
    for reason in Loss::ALL {
        let index = reason as u32;
        let Ok(per_cpu) = maps.losses.get(&index, 0) else { continue };
        let total: u64 = per_cpu.iter().sum();
        let reported = maps.reported.get(&index, 0).unwrap_or(0);
        if total > reported && maps.reported.set(index, total, 0).is_ok() {
            losses.push((reason, total - reported));
        }
    }
    losses
}

impl Maps {
    fn take_denial(&self, key: &VerdictKey) -> Option<Denial> {
        let mut value = Denial::default();
        crate::kernel::take_denial(self, key, &mut value).then_some(value)
    }
}
