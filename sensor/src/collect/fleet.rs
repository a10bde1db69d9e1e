//! The sensors that feed this collector, as far as their events and streams say.

use super::positions::Origin;
use crate::event::{Body, Event, now, pb};
use serde::{Deserialize, Serialize};
use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Sensors that are remembered; the one not heard of for longest goes.
const MAX_SENSORS: usize = 20_000;
/// Of what a sensor says of itself.
const MAX_TEXT: usize = 256;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Known {
    boot: String,
    boots: u64,
    version: String,
    host: String,
    kernel: String,
    policy: String,
    degraded: u32,
    first_seen_unix_ns: i64,
    last_seen_unix_ns: i64,
    newest_unix_ns: i64,
    committed_seq: u64,
    lost: u64,
    lost_denials: u64,
    /// Of the stream that is open, if one is.
    #[serde(skip)]
    streams: u32,
    #[serde(skip)]
    next_seq: u64,
    /// As it said last, on a stream since the collector's start.
    #[serde(skip)]
    bundle: Option<pb::BundleState>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Fleet {
    sensors: BTreeMap<String, Known>,
}

/// What a batch says of its sensor.
#[derive(Debug)]
pub(super) struct Heard {
    origin: Arc<Origin>,
    at: i64,
    newest: i64,
    last_seq: u64,
    lost: u64,
    lost_denials: u64,
    state: Option<pb::SensorState>,
    policy: Option<String>,
}

fn cut(text: &str) -> String {
    text.chars().take(MAX_TEXT).collect()
}

fn said(state: &pb::BundleState) -> pb::BundleState {
    pb::BundleState {
        version: state.version,
        hash: cut(&state.hash),
        refused_hash: cut(&state.refused_hash),
        kind: cut(&state.kind),
        error: cut(&state.error),
        group: cut(&state.group),
    }
}

impl Heard {
    pub(super) fn of<E: Borrow<Event>>(origin: &Arc<Origin>, events: &[E], at: i64) -> Heard {
        let (mut lost, mut lost_denials, mut newest, mut last_seq) = (0u64, 0u64, i64::MIN, 0);
        let (mut state, mut policy) = (None, None);
        for event in events {
            let event: &Event = event.borrow();
            newest = newest.max(event.time_unix_ns);
            last_seq = event.seq;
            match &event.body {
                Some(Body::Loss(loss)) => {
                    lost = lost.saturating_add(loss.count);
                    lost_denials = lost_denials.saturating_add(loss.denials);
                }
                Some(Body::SensorState(said)) => {
                    policy = Some(cut(&said.policy));
                    state = Some(said.clone());
                }
                Some(Body::PolicyChange(change)) if change.ok && change.server.is_empty() => {
                    policy = Some(cut(&change.hash));
                }
                _ => (),
            }
        }
        Heard { origin: origin.clone(), at, newest, last_seq, lost, lost_denials, state, policy }
    }
}

impl Fleet {
    fn known(&mut self, sensor: &str, at: i64) -> &mut Known {
        if self.sensors.len() >= MAX_SENSORS && !self.sensors.contains_key(sensor) {
            let unconnected = self.sensors.iter().filter(|(_, k)| k.streams == 0);
            let oldest = unconnected.min_by_key(|(_, k)| k.last_seen_unix_ns).map(|(name, _)| name.clone());
            if let Some(oldest) = oldest {
                self.sensors.remove(&oldest);
            }
        }
        self.sensors.entry(sensor.to_owned()).or_insert_with(|| Known {
            first_seen_unix_ns: at,
            last_seen_unix_ns: at,
            ..Known::default()
        })
    }

    /// A batch of it is stored.
    pub(super) fn hear(&mut self, heard: &Heard) {
        let known = self.known(&heard.origin.sensor, heard.at);
        known.is_of(&heard.origin.boot);
        known.last_seen_unix_ns = known.last_seen_unix_ns.max(heard.at);
        known.newest_unix_ns = known.newest_unix_ns.max(heard.newest);
        known.committed_seq = known.committed_seq.max(heard.last_seq);
        known.lost = known.lost.saturating_add(heard.lost);
        known.lost_denials = known.lost_denials.saturating_add(heard.lost_denials);
        if let Some(state) = &heard.state {
            known.version = cut(&state.version);
            known.host = cut(&state.host);
            known.kernel = cut(&state.kernel);
            known.degraded = state.degraded.len() as u32;
        }
        if let Some(policy) = heard.policy.as_ref().filter(|p| !p.is_empty()) {
            known.policy.clone_from(policy);
        }
    }

    pub(super) fn summary(&self, most: usize) -> Summary {
        let mut first: Vec<_> = self.sensors.iter().collect();
        first.sort_by_key(|(_, k)| k.first_seen_unix_ns);
        Summary {
            known: first.len(),
            connected: first.iter().filter(|(_, k)| k.streams > 0).count(),
            newest: first.iter().take(most).map(|(name, k)| ((*name).clone(), k.newest_unix_ns)).collect(),
        }
    }

    /// How many refused the policy they were given.
    pub(super) fn refusing(&self) -> usize {
        let refuses = |k: &&Known| k.bundle.as_ref().is_some_and(|bundle| !bundle.kind.is_empty());
        self.sensors.values().filter(refuses).count()
    }

    /// Sorted by name; empty `names`: all.
    fn list(&self, names: &[String]) -> Vec<pb::FleetSensor> {
        let wanted = |name: &String| names.is_empty() || names.contains(name);
        self.sensors.iter().filter(|(name, _)| wanted(name)).map(|(name, k)| k.show(name)).collect()
    }
}

/// How many sensors there are, and when some of them were last heard.
pub(super) struct Summary {
    pub(super) known: usize,
    pub(super) connected: usize,
    /// Name and newest event by its own clock, of those known for longest.
    pub(super) newest: Vec<(String, i64)>,
}

impl Known {
    fn is_of(&mut self, boot: &str) {
        if self.boot != boot {
            boot.clone_into(&mut self.boot);
            self.boots += 1;
            (self.committed_seq, self.next_seq) = (0, 0);
        }
    }

    fn show(&self, name: &str) -> pb::FleetSensor {
        pb::FleetSensor {
            sensor: name.to_owned(),
            boot: self.boot.clone(),
            boots: self.boots,
            version: self.version.clone(),
            host: self.host.clone(),
            kernel: self.kernel.clone(),
            policy: self.policy.clone(),
            degraded: self.degraded,
            connected: self.streams > 0,
            first_seen_unix_ns: self.first_seen_unix_ns,
            last_seen_unix_ns: self.last_seen_unix_ns,
            newest_unix_ns: self.newest_unix_ns,
            committed_seq: self.committed_seq,
            next_seq: self.next_seq,
            lost: self.lost,
            lost_denials: self.lost_denials,
            bundle: self.bundle.clone(),
        }
    }
}

/// The fleet as the writer, the streams and those who ask share it.
#[derive(Clone, Debug, Default)]
pub(super) struct SharedFleet(Arc<Mutex<Fleet>>);

impl SharedFleet {
    pub(super) fn new(fleet: Fleet) -> SharedFleet {
        SharedFleet(Arc::new(Mutex::new(fleet)))
    }

    pub(super) fn with<T>(&self, change: impl FnOnce(&mut Fleet) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn list(&self, names: &[String]) -> Vec<pb::FleetSensor> {
        self.with(|fleet| fleet.list(names))
    }

    /// What became of the policies that a sensor was offered. True: it did not
    /// say so before.
    pub(super) fn bundle(&self, sensor: &str, state: &pb::BundleState) -> bool {
        let state = Some(said(state));
        self.with(|fleet| {
            let known = fleet.known(sensor, now());
            let new = known.bundle != state;
            known.bundle = state;
            new
        })
    }

    /// As long as the answer lives, the sensor has a stream.
    pub(super) fn connected(&self, hello: &pb::Hello, committed_seq: u64) -> Stream {
        self.with(|fleet| {
            let known = fleet.known(&hello.sensor, now());
            known.is_of(&hello.boot);
            known.committed_seq = known.committed_seq.max(committed_seq);
            known.next_seq = hello.next_seq;
            known.streams += 1;
            if !hello.version.is_empty() {
                known.version = cut(&hello.version);
            }
            known.bundle = hello.bundle.as_ref().map(said);
        });
        Stream { fleet: self.clone(), sensor: hello.sensor.clone() }
    }
}

/// A stream that is open.
pub(super) struct Stream {
    fleet: SharedFleet,
    sensor: String,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.fleet.with(|fleet| {
            if let Some(known) = fleet.sensors.get_mut(&self.sensor) {
                known.streams = known.streams.saturating_sub(1);
            }
        });
    }
}
