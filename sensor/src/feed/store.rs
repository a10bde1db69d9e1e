//! The spool as it is shared: one thread writes, the stream to the collector
//! reads.

use super::batch::Sealed;
use super::spool::{Appended, Owner, Spool};
use crate::event::pb;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// What the stream may send next.
pub(super) enum Next {
    Batch(Sealed),
    /// Nothing is there now.
    Nothing,
    /// It is of another run of the sensor.
    Other,
}

#[derive(Clone, Copy, Default)]
struct Phase {
    /// When the bus was closed.
    closed: Option<Instant>,
    /// And everything of it is here.
    drained: bool,
}

pub(super) struct Store {
    spool: Mutex<Spool>,
    ready: Notify,
    phase: watch::Sender<Phase>,
}

impl Store {
    pub(super) fn new(spool: Spool) -> Store {
        Store { spool: Mutex::new(spool), ready: Notify::new(), phase: watch::Sender::default() }
    }

    /// Poisoned: a panic between two steps, each of which leaves it whole.
    fn spool(&self) -> MutexGuard<'_, Spool> {
        self.spool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn append(&self, batch: Sealed) -> Result<Appended, Sealed> {
        let outcome = self.spool().append(batch);
        self.ready.notify_one();
        outcome
    }

    /// What was written reaches the disk, without holding up the stream.
    pub(super) fn sync(&self) {
        let file = self.spool().unsynced();
        if let Some(Err(error)) = file.map(|f| f.sync_data()) {
            tracing::error!(%error, "the spool does not reach the disk");
        }
    }

    pub(super) fn next_owner(&self) -> Option<Arc<Owner>> {
        self.spool().next_owner()
    }

    pub(super) fn next(&self, owner: &Arc<Owner>) -> io::Result<Next> {
        let mut spool = self.spool();
        match spool.next_owner() {
            None => Ok(Next::Nothing),
            Some(next) if next != *owner => Ok(Next::Other),
            Some(_) => Ok(spool.next_batch()?.map_or(Next::Nothing, Next::Batch)),
        }
    }

    pub(super) fn acked(&self, boot: &str, seq: u64) {
        self.spool().acked(boot, seq);
    }

    /// Something was appended, or nothing more will be.
    pub(super) async fn ready(&self) {
        self.ready.notified().await;
    }

    pub(super) fn close(&self) {
        self.phase.send_modify(|p| p.closed = p.closed.or_else(|| Some(Instant::now())));
        self.ready.notify_one();
    }

    pub(super) fn drain(&self) {
        self.phase.send_modify(|p| p.drained = true);
        self.close();
    }

    pub(super) fn closed(&self) -> Option<Instant> {
        self.phase.borrow().closed
    }

    pub(super) async fn closing(&self) {
        let _ = self.phase.subscribe().wait_for(|p| p.closed.is_some()).await;
    }

    pub(super) fn drained(&self) -> bool {
        self.phase.borrow().drained
    }

    pub(super) fn shown(&self) -> pb::SpoolState {
        let spool = self.spool();
        let given = spool.given();
        pb::SpoolState {
            bytes: spool.bytes(),
            oldest_unix_ns: spool.oldest_unix_ms().map_or(0, |ms| i64::try_from(ms).unwrap_or(0) * 1_000_000),
            evicted: given.evicted,
            damaged: given.damaged,
            error: spool.trouble().to_owned(),
        }
    }

    /// The last word; bytes that stay for the next run.
    pub(super) fn end(&self, boot: &str, acked_seq: u64) -> u64 {
        let mut spool = self.spool();
        spool.close(boot, acked_seq);
        spool.bytes()
    }
}
