//! How far each sensor's boots are stored, so that a batch that comes twice is
//! kept once.

use serde::Deserialize;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

/// Boots whose position is remembered; the one not heard of for longest goes.
pub const MAX_BOOTS: usize = 20_000;

/// Whose events.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    pub sensor: String,
    pub boot: String,
}

#[derive(Debug, Default)]
pub(super) struct Positions {
    boots: HashMap<Arc<Origin>, (u64, u64)>,
    clock: u64,
}

impl Positions {
    pub(super) fn get(&self, origin: &Origin) -> u64 {
        self.boots.get(origin).map_or(0, |(seq, _)| *seq)
    }

    pub(super) fn set(&mut self, origin: &Arc<Origin>, seq: u64) {
        self.clock += 1;
        if self.boots.len() >= MAX_BOOTS && !self.boots.contains_key(origin) {
            let oldest = self.boots.iter().min_by_key(|(_, (_, used))| *used).map(|(o, _)| o.clone());
            if let Some(oldest) = oldest {
                tracing::warn!(sensor = %oldest.sensor, boot = %oldest.boot, "too many boots: forgotten, a batch of it may be stored twice");
                self.boots.remove(&oldest);
            }
        }
        self.boots.insert(origin.clone(), (seq, self.clock));
    }

    /// Those not heard of for longest first, so that setting them again in this
    /// order keeps it.
    pub(super) fn oldest_first(&self) -> Vec<(&Arc<Origin>, u64)> {
        let mut boots: Vec<_> = self.boots.iter().collect();
        boots.sort_by_key(|(_, (_, used))| *used);
        boots.into_iter().map(|(origin, (seq, _))| (origin, *seq)).collect()
    }

    pub(super) fn to_json(&self) -> serde_json::Value {
        let entry = |(o, seq): (&Arc<Origin>, u64)| serde_json::json!({ "sensor": o.sensor, "boot": o.boot, "seq": seq });
        self.oldest_first().into_iter().map(entry).collect()
    }
}

/// An entry of saved positions; and what is read of an event's line.
#[derive(Deserialize)]
pub(super) struct Position<'a> {
    #[serde(borrow)]
    pub sensor: Cow<'a, str>,
    #[serde(borrow)]
    pub boot: Cow<'a, str>,
    pub seq: u64,
}

impl Position<'_> {
    pub(super) fn origin(&self) -> Arc<Origin> {
        Arc::new(Origin { sensor: self.sensor.to_string(), boot: self.boot.to_string() })
    }
}
