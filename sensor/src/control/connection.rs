//! How many connections the control socket takes, and from whom.

use super::Peer;
use crate::grpc::{Connection, Deadlines};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::UnixStream;

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub connections: usize,
    /// Of these, for one user other than root: one user cannot lock out others.
    pub per_user: usize,
    /// Connections of labelled callers, which are only told that they are
    /// refused: a server must not use up its user's places.
    pub refused: usize,
    pub deadlines: Deadlines,
    /// Life of a connection that is only told that it is refused.
    pub refusal: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: 64,
            per_user: 16,
            refused: 4,
            deadlines: Deadlines::default(),
            refusal: Duration::from_secs(5),
        }
    }
}

pub(super) type ControlConnection = Connection<UnixStream, Caller, Place>;

/// Places for connections.
#[derive(Debug)]
pub(super) struct Places {
    limits: Limits,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    refused: usize,
    by_user: HashMap<u32, usize>,
}

/// One place; dropping it frees it.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    /// `None`: among the refused.
    uid: Option<u32>,
}

impl Places {
    pub(super) fn new(limits: Limits) -> Arc<Places> {
        Arc::new(Places { limits, taken: Mutex::default() })
    }

    pub(super) fn connection(&self, stream: UnixStream, caller: Caller, place: Place) -> ControlConnection {
        let mut deadlines = self.limits.deadlines;
        if caller.refused {
            deadlines.end = Some(self.limits.refusal);
        }
        Connection::new(stream, caller, place, deadlines)
    }

    /// `None`: all taken.
    pub(super) fn take(self: &Arc<Self>, uid: u32, refused: bool) -> Option<Place> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if refused {
            if taken.refused >= self.limits.refused {
                return None;
            }
            taken.refused += 1;
            return Some(Place { places: self.clone(), uid: None });
        }
        let of_user = taken.by_user.get(&uid).copied().unwrap_or(0);
        if taken.all >= self.limits.connections || (uid != 0 && of_user >= self.limits.per_user) {
            return None;
        }
        taken.all += 1;
        taken.by_user.insert(uid, of_user + 1);
        Some(Place { places: self.clone(), uid: Some(uid) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(uid) = self.uid else {
            taken.refused -= 1;
            return;
        };
        taken.all -= 1;
        if let Some(count) = taken.by_user.get_mut(&uid) {
            *count -= 1;
            if *count == 0 {
                taken.by_user.remove(&uid);
            }
        }
    }
}

/// What a request knows of its connection.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    pub peer: Arc<Peer>,
    /// Labelled when it connected: refused whatever happens later.
    pub refused: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_user_and_no_server_takes_every_place() {
        let places = Places::new(Limits { connections: 3, per_user: 2, refused: 1, ..Limits::default() });
        let first = places.take(1000, false).unwrap();
        let _second = places.take(1000, false).unwrap();
        assert!(places.take(1000, false).is_none());
        let refused = places.take(1000, true).unwrap();
        assert!(places.take(1001, true).is_none(), "one place for the refused");
        let _root = places.take(0, false).unwrap();
        assert!(places.take(0, false).is_none(), "three places in all");
        drop(first);
        drop(refused);
        assert!(places.take(1000, false).is_some());
        assert!(places.take(1000, true).is_some());
    }
}
