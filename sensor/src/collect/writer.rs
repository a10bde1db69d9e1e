//! One thread writes for all sensors: batches that wait together share one
//! fdatasync.

use super::store::{Origin, Store};
use super::view::View;
use crate::event::Event;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use tokio::sync::{mpsc, oneshot};

/// Batches that may wait for the disk; then sensors wait.
const WAITING: usize = 64;

/// A batch to store; `done` hears the number of its last event, or why not.
pub(super) struct Job {
    pub origin: Arc<Origin>,
    pub events: Vec<Event>,
    /// Of the stream it came by: one of its batches was not stored, so none
    /// after it may be, or the position would run past the gap.
    pub broken: Arc<AtomicBool>,
    pub done: oneshot::Sender<Result<u64, String>>,
}

/// How far a boot is stored.
pub(super) struct Ask {
    pub origin: Arc<Origin>,
    pub answer: oneshot::Sender<u64>,
}

pub(super) enum Command {
    Store(Job),
    Ask(Ask),
}

pub(super) fn spawn(
    mut store: Store,
    view: Option<View>,
) -> std::io::Result<(mpsc::Sender<Command>, JoinHandle<()>)> {
    let (commands, mut waiting) = mpsc::channel(WAITING);
    let thread = std::thread::Builder::new().name("store".to_owned()).spawn(move || {
        while let Some(first) = waiting.blocking_recv() {
            let mut jobs = Vec::new();
            let mut next = Some(first);
            while let Some(command) = next {
                match command {
                    Command::Store(job) => jobs.push(job),
                    Command::Ask(ask) => drop(ask.answer.send(store.position(&ask.origin))),
                }
                next = waiting.try_recv().ok();
            }
            group(&mut store, jobs, view.as_ref());
        }
    })?;
    Ok((commands, thread))
}

/// Stores a group and answers; all of it counts, or nothing.
fn group(store: &mut Store, jobs: Vec<Job>, view: Option<&View>) {
    let (broken, jobs): (Vec<Job>, Vec<Job>) =
        jobs.into_iter().partition(|job| job.broken.load(Ordering::Relaxed));
    for job in broken {
        let _ = job.done.send(Err("a batch before it was not stored".to_owned()));
    }
    let mut written = Vec::with_capacity(jobs.len());
    let mut failed = None;
    for job in &jobs {
        match store.append(&job.origin, &job.events) {
            Ok(new) => written.push(new),
            Err(error) => {
                failed = Some(error);
                break;
            }
        }
    }
    let failed = failed.or_else(|| store.commit().err());
    if let Some(error) = failed {
        tracing::error!(%error, batches = jobs.len(), "events cannot be stored");
        for job in jobs {
            job.broken.store(true, Ordering::Relaxed);
            let _ = job.done.send(Err(error.to_string()));
        }
        return;
    }
    for (mut job, new) in jobs.into_iter().zip(written) {
        let last = job.events.last().map_or(0, |e| e.seq);
        // The sensor may be gone; what it sent is stored all the same.
        let _ = job.done.send(Ok(last));
        if let Some(view) = view
            && new > 0
        {
            view.show(job.events.drain(job.events.len() - new..).map(Arc::new).collect());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::file::Rotation;

    #[tokio::test]
    async fn after_a_batch_that_was_not_stored_the_stream_stores_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), Rotation { max_bytes: 0, keep: 1 }).unwrap();
        let (commands, thread) = spawn(store, None).unwrap();
        let origin = Arc::new(Origin { sensor: "s".to_owned(), boot: "b".to_owned() });
        let mut answers = Vec::new();
        for (seq, broken) in [(1, false), (2, true), (3, false)] {
            let (done, answer) = oneshot::channel();
            let events = vec![Event { seq, ..Default::default() }];
            let broken = Arc::new(AtomicBool::new(broken));
            let job = Job { origin: origin.clone(), events, broken, done };
            assert!(commands.send(Command::Store(job)).await.is_ok());
            answers.push(answer.await.unwrap());
        }
        assert_eq!((answers[0].clone(), answers[1].is_err(), answers[2].clone()), (Ok(1), true, Ok(3)));
        drop(commands);
        thread.join().unwrap();
        let text = std::fs::read_to_string(dir.path().join("events.ndjson")).unwrap();
        assert_eq!(text.lines().count(), 2);
    }
}
