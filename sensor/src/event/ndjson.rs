//! `--events FILE`: every event as one line of JSON.

use super::file::LineFile;
use super::{Body, Event, Subscriber, json, now, pb};
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// Events per write.
const BATCH: usize = 2048;
/// How long a batch waits to fill: who makes events would be in the way of whom
/// it watches if it woke this thread for each of them.
const LINGER: Duration = Duration::from_millis(5);

/// Starts a thread that writes what `subscriber` gets, until the bus closes.
/// Disk writes block, so this is no task. What could not be written is counted
/// and told in the file itself, as a loss where the lines would have been.
pub fn spawn(
    mut subscriber: Subscriber,
    mut file: LineFile,
    runtime: tokio::runtime::Handle,
) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("events".to_owned()).spawn(move || {
        let mut events: Vec<Arc<Event>> = Vec::with_capacity(BATCH);
        let mut lines = Vec::new();
        let mut unwritten: Option<pb::Loss> = None;
        while runtime.block_on(subscriber.recv(&mut events, BATCH)) {
            if events.len() < BATCH {
                std::thread::sleep(LINGER);
                let room = BATCH - events.len();
                subscriber.try_recv(&mut events, room);
            }
            lines.clear();
            if let Some(loss) = &unwritten {
                let identity = subscriber.identity();
                let event = Event {
                    seq: loss.last_seq,
                    time_unix_ns: now(),
                    sensor: identity.sensor.clone(),
                    boot: identity.boot.clone(),
                    body: Some(Body::Loss(loss.clone())),
                };
                line(&event, &mut lines);
            }
            for event in &events {
                line(event, &mut lines);
            }
            match file.append(&lines) {
                Ok(()) => {
                    if let Some(loss) = unwritten.take() {
                        tracing::info!(file = %file.path().display(), lost = loss.count, "events are written again");
                    }
                }
                Err(error) => {
                    if unwritten.is_none() {
                        tracing::error!(file = %file.path().display(), %error, "events cannot be written");
                    }
                    let loss = unwritten.get_or_insert_with(|| pb::Loss {
                        r#where: format!("file:{}", file.path().display()),
                        reason: "write_failed".to_owned(),
                        first_seq: events.first().map_or(0, |e| e.seq),
                        ..Default::default()
                    });
                    loss.count += events.len() as u64;
                    loss.denials +=
                        events.iter().filter(|e| e.body.as_ref().is_some_and(super::is_denial)).count() as u64;
                    loss.last_seq = events.last().map_or(loss.last_seq, |e| e.seq);
                }
            }
            events.clear();
        }
        if let Err(error) = file.commit() {
            tracing::error!(file = %file.path().display(), %error, "events may not be on disk");
        }
    })
}

fn line(event: &Event, out: &mut Vec<u8>) {
    // Writing to memory; an event always serializes.
    if let Err(error) = json::write_line(event, out) {
        tracing::error!(seq = event.seq, %error, "an event has no JSON form");
    }
}
