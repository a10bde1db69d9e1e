//! How an output does, for those who ask.

use crate::event::pb;
use crate::policy::load::read_regular;
use crate::tls::read_pem;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Of a file with a certificate and its chain.
const MAX_CERTIFICATE: usize = 1 << 20;

#[derive(Clone, Debug)]
pub struct Progress {
    state: Arc<Mutex<pb::OutputState>>,
    certificate: Option<Arc<Path>>,
}

impl Progress {
    /// `certificate`: of our own, that the receiver verifies.
    pub(in crate::collect) fn new(name: &str, kind: &str, certificate: Option<PathBuf>) -> Progress {
        let state = pb::OutputState { name: name.to_owned(), kind: kind.to_owned(), ..Default::default() };
        Progress { state: Arc::new(Mutex::new(state)), certificate: certificate.map(Arc::from) }
    }

    /// When the certificate ends that the next connection has; seconds since 1970.
    /// `None`: there is none, or it cannot be read.
    pub(in crate::collect) fn certificate_end(&self) -> Option<i64> {
        let pem = read_regular(self.certificate.as_deref()?, MAX_CERTIFICATE).ok()?;
        Some(read_pem(&pem).ok()?.first()?.not_after)
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
