//! From the bus to the spool: a thread of its own, so that a slow disk holds up
//! nobody. While the spool takes nothing, events wait in the bus's buffer, which
//! gives up telemetry before denials and says how many.

use super::batch::{Full, Open, Sealed};
use super::spool::Appended;
use super::store::Store;
use crate::event::{Bus, Event, Subscriber};
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// How long what was written may be lost with the host.
const SYNC: Duration = Duration::from_secs(1);
/// Until a disk that took nothing is asked again.
const RETRY: Duration = Duration::from_millis(100);

pub(super) fn spawn(
    store: Arc<Store>,
    bus: Arc<Bus>,
    subscriber: Subscriber,
    linger: Duration,
) -> io::Result<JoinHandle<()>> {
    let runtime = Handle::current();
    std::thread::Builder::new().name("spool".to_owned()).spawn(move || {
        Writer { store, bus, linger, open: Open::default(), synced: Instant::now(), dirty: false }
            .run(subscriber, &runtime);
    })
}

struct Writer {
    store: Arc<Store>,
    bus: Arc<Bus>,
    linger: Duration,
    open: Open,
    synced: Instant,
    /// Something was written since.
    dirty: bool,
}

impl Writer {
    fn run(mut self, mut subscriber: Subscriber, runtime: &Handle) {
        let mut events = Vec::new();
        loop {
            // While something is to be synced it does not wait for events.
            if !self.dirty && !runtime.block_on(subscriber.recv(&mut events, super::MAX_BATCH_EVENTS)) {
                break;
            }
            std::thread::sleep(self.linger);
            let room = super::MAX_BATCH_EVENTS - events.len();
            subscriber.try_recv(&mut events, room);
            let idle = events.is_empty();
            for event in events.drain(..) {
                self.put(&event);
            }
            self.seal();
            self.dirty |= !idle;
            if self.dirty && (self.synced.elapsed() >= SYNC || idle && subscriber.is_closed()) {
                self.store.sync();
                (self.synced, self.dirty) = (Instant::now(), false);
            }
        }
        self.store.drain();
    }

    fn put(&mut self, event: &Arc<Event>) {
        loop {
            match self.open.push(event) {
                Ok(()) => return,
                Err(Full::Batch) => self.seal(),
                Err(Full::TooLarge) => {
                    tracing::error!(seq = event.seq, "an event is too large for any batch");
                    super::lost(&self.bus, "too_large", 1, event.seq, event.seq);
                    return;
                }
            }
        }
    }

    fn seal(&mut self) {
        if let Some(batch) = self.open.seal() {
            self.append(batch);
        }
    }

    /// Waits until the batch is taken.
    fn append(&self, mut batch: Sealed) {
        let last = batch.last_seq;
        loop {
            match self.store.append(batch) {
                Ok(Appended::Stored) => return self.bus.safe(last),
                // The collector may have it before the disk does.
                Ok(Appended::Waiting) => return,
                Err(refused) => {
                    batch = refused;
                    // The end does not wait for a disk.
                    if self.bus.is_closed() {
                        self.store.close();
                    }
                    std::thread::sleep(RETRY);
                }
            }
        }
    }
}
