//! What was reported on a connection before: the same secret in every message
//! is one finding, reported again each time its count has grown tenfold.

use std::collections::HashMap;

use super::Found;

/// Secrets remembered of a connection. Beyond it the one seen longest ago is
/// forgotten, and is new when it is seen again.
pub const SEEN: usize = 256;

#[derive(Debug, Default)]
pub struct Seen {
    entries: HashMap<(&'static str, [u8; 16]), Entry>,
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    sightings: u64,
    reported: u64,
    used: u64,
    /// The latest sighting, to be reported with a count.
    found: Found,
}

impl Seen {
    /// Adds to `report` what is to be reported now that `found` was seen.
    pub fn see(&mut self, found: Found, report: &mut Vec<Found>) {
        self.clock += 1;
        let used = self.clock;
        let key = (found.rule, found.value_hash);
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.sightings += found.count;
            entry.used = used;
            entry.found = found;
            if entry.sightings >= entry.reported * 10 {
                report.push(entry.report());
            }
            return;
        }
        if self.entries.len() >= SEEN {
            report.extend(self.forget_oldest());
        }
        let count = found.count;
        self.entries.insert(key, Entry { sightings: count, reported: count, used, found: found.clone() });
        report.push(found);
    }

    /// Sightings that nobody was told of, at the end of a connection.
    pub fn rest(&mut self) -> Vec<Found> {
        let mut rest: Vec<Found> = self.entries.drain().filter_map(|(_, entry)| entry.rest()).collect();
        rest.sort_by(|a, b| (a.rule, a.value_hash).cmp(&(b.rule, b.value_hash)));
        rest
    }

    fn forget_oldest(&mut self) -> Option<Found> {
        let key = *self.entries.iter().min_by_key(|(_, entry)| entry.used)?.0;
        self.entries.remove(&key)?.rest()
    }
}

impl Entry {
    fn report(&mut self) -> Found {
        let count = self.sightings - self.reported;
        self.reported = self.sightings;
        Found { count, ..self.found.clone() }
    }

    fn rest(mut self) -> Option<Found> {
        (self.sightings > self.reported).then(|| self.report())
    }
}
