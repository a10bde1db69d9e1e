//! The collector inside the sensor's own process, for a host that has none:
//! the same store and the same view, without a network between.

use super::positions::Origin;
use super::store::Store;
use super::view::View;
use crate::event::ledger::Unsafe;
use crate::event::{Body, Bus, Event, Subscriber, is_denial, now, pb};
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::runtime::Handle;

const BATCH: usize = 2048;
/// How long a batch waits to fill: bounds the fdatasyncs a second.
const LINGER: Duration = Duration::from_millis(20);

/// Stores and shows what `subscriber` gets, until the bus closes. Events that
/// could not be stored are counted, and told by a loss once it works again.
/// `left`: what went with the run before.
pub fn spawn(
    bus: Arc<Bus>,
    mut subscriber: Subscriber,
    mut store: Store,
    view: Option<View>,
    left: Option<&Unsafe>,
    runtime: Handle,
) -> io::Result<JoinHandle<()>> {
    if let Some(left) = left {
        let origin = Origin { sensor: left.identity.sensor.clone(), boot: left.identity.boot.clone() };
        store.append(&Arc::new(origin), &[left.told()]).and_then(|_| store.commit())?;
    }
    let identity = subscriber.identity().clone();
    let origin = Arc::new(Origin { sensor: identity.sensor.clone(), boot: identity.boot.clone() });
    std::thread::Builder::new().name("collect".to_owned()).spawn(move || {
        let mut events: Vec<Arc<Event>> = Vec::with_capacity(BATCH);
        let mut unstored: Option<pb::Loss> = None;
        while runtime.block_on(subscriber.recv(&mut events, BATCH)) {
            if events.len() < BATCH {
                std::thread::sleep(LINGER);
                let room = BATCH - events.len();
                subscriber.try_recv(&mut events, room);
            }
            let mut batch: Vec<Arc<Event>> = Vec::with_capacity(events.len() + 1);
            batch.extend(unstored.clone().map(|loss| {
                Arc::new(Event {
                    seq: loss.last_seq,
                    time_unix_ns: now(),
                    sensor: identity.sensor.clone(),
                    boot: identity.boot.clone(),
                    body: Some(Body::Loss(loss)),
                })
            }));
            batch.extend(events.iter().cloned());
            match store.append(&origin, &batch).and_then(|_| store.commit()) {
                Ok(()) => {
                    unstored = None;
                    bus.safe(events.last().map_or(0, |e| e.seq));
                }
                Err(error) => {
                    if unstored.is_none() {
                        tracing::error!(%error, "events cannot be stored");
                    }
                    let loss = unstored.get_or_insert_with(|| pb::Loss {
                        r#where: "collector".to_owned(),
                        reason: "store_failed".to_owned(),
                        first_seq: events.first().map_or(0, |e| e.seq),
                        ..Default::default()
                    });
                    let denials = events.iter().filter(|e| e.body.as_ref().is_some_and(is_denial));
                    loss.count += events.len() as u64;
                    loss.denials += denials.count() as u64;
                    loss.last_seq = events.last().map_or(loss.last_seq, |e| e.seq);
                }
            }
            match &view {
                Some(view) => view.show(std::mem::take(&mut events)),
                None => events.clear(),
            }
        }
    })
}
