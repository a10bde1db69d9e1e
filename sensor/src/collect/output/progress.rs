//! How an output does, for those who ask.

use crate::event::pb;
use std::sync::{Arc, Mutex, PoisonError};

#[derive(Clone, Debug)]
pub struct Progress {
    state: Arc<Mutex<pb::OutputState>>,
}

impl Progress {
    pub(in crate::collect) fn new(name: &str, kind: &str) -> Progress {
        let state = pb::OutputState { name: name.to_owned(), kind: kind.to_owned(), ..Default::default() };
        Progress { state: Arc::new(Mutex::new(state)) }
    }

    pub fn state(&self) -> pb::OutputState {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(in crate::collect) fn update<T>(&self, change: impl FnOnce(&mut pb::OutputState) -> T) -> T {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(in crate::collect) fn lost(&self, count: u64, reason: &str) {
        self.update(|s| {
            s.lost += count;
            *s.lost_by_reason.entry(reason.to_owned()).or_default() += count;
        });
    }
}
