//! One thread writes for all sensors: batches that wait together share one
//! fdatasync.

use super::log::Log;
use super::positions::Origin;
use super::view::View;
use crate::event::Event;
use crate::health::{self, State};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};

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
    /// Or why nobody knows.
    pub answer: oneshot::Sender<Result<u64, String>>,
}

pub(super) enum Command {
    Store(Job),
    Ask(Ask),
    /// Let go what is too old.
    Tidy,
    /// Whether this thread still answers.
    Ping(oneshot::Sender<()>),
}

pub(super) fn spawn(
    mut log: Log,
    view: Option<View>,
    health: watch::Sender<State>,
) -> std::io::Result<(mpsc::Sender<Command>, JoinHandle<()>)> {
    let (commands, mut waiting) = mpsc::channel(WAITING);
    let thread = std::thread::Builder::new().name("store".to_owned()).spawn(move || {
        while let Some(first) = waiting.blocking_recv() {
            let mut jobs = Vec::new();
            let mut next = Some(first);
            while let Some(command) = next {
                match command {
                    Command::Store(job) => jobs.push(job),
                    Command::Ask(ask) => drop(ask.answer.send(Ok(log.position(&ask.origin)))),
                    Command::Tidy => log.tidy(),
                    Command::Ping(answer) => drop(answer.send(())),
                }
                next = waiting.try_recv().ok();
            }
            if jobs.is_empty() {
                continue;
            }
            let failed = group(&mut log, jobs, view.as_ref()).err();
            health::change(&health, |state| {
                state.not_ready =
                    failed.map(|why| format!("events cannot be stored: {why}")).into_iter().collect();
            });
        }
    })?;
    Ok((commands, thread))
}

/// How often old events are looked for.
const TIDY: Duration = Duration::from_secs(60);

/// Until the writer ends, which it does when nobody else holds `commands`.
pub(super) fn tidy(commands: &mpsc::Sender<Command>) {
    let commands = commands.downgrade();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(TIDY).await;
            let Some(commands) = commands.upgrade() else { return };
            let _ = commands.send(Command::Tidy).await;
        }
    });
}

/// How often the writer is asked whether it is there, and how long it may take:
/// a disk may be slow, one that hangs answers nobody.
pub(super) const PULSE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(30));

/// Until the writer ends, which it does when nobody else holds `commands`.
pub(super) fn pulse(
    commands: &mpsc::Sender<Command>,
    health: watch::Sender<State>,
    (every, patience): (Duration, Duration),
) {
    let commands = commands.downgrade();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(every).await;
            let (answer, answered) = oneshot::channel();
            let asking = async {
                let commands = commands.upgrade()?;
                commands.send(Command::Ping(answer)).await.ok()?;
                drop(commands);
                answered.await.ok()
            };
            let not_live = match tokio::time::timeout(patience, asking).await {
                Ok(Some(())) => None,
                Ok(None) => return,
                Err(_) => Some(format!(
                    "what stores events has not answered for {} seconds: does its disk hang?",
                    patience.as_secs()
                )),
            };
            health::change(&health, |state| state.not_live = not_live.into_iter().collect());
        }
    });
}

/// Stores a group and answers; all of it counts, or nothing.
fn group(log: &mut Log, jobs: Vec<Job>, view: Option<&View>) -> Result<(), String> {
    let (broken, jobs): (Vec<Job>, Vec<Job>) =
        jobs.into_iter().partition(|job| job.broken.load(Ordering::Relaxed));
    for job in broken {
        let _ = job.done.send(Err("a batch before it was not stored".to_owned()));
    }
    let mut written = Vec::with_capacity(jobs.len());
    let mut failed = None;
    for job in &jobs {
        match log.append(&job.origin, &job.events) {
            Ok(new) => written.push(new),
            Err(error) => {
                failed = Some(error);
                break;
            }
        }
    }
    let failed = failed.or_else(|| log.commit().err());
    if let Some(error) = failed {
        tracing::error!(%error, batches = jobs.len(), "events cannot be stored");
        for job in jobs {
            job.broken.store(true, Ordering::Relaxed);
            let _ = job.done.send(Err(error.to_string()));
        }
        return Err(error.to_string());
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
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collect::log::{Next, Settings};

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_disk_that_hangs_is_told_until_it_goes_on() {
        let (commands, mut waiting) = mpsc::channel(WAITING);
        let health = watch::Sender::default();
        let mut told = health.subscribe();
        pulse(&commands, health, (Duration::from_millis(5), Duration::from_millis(100)));
        // It takes what comes, and then hangs in a write.
        let (hang, go_on) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let mut held = Vec::new();
            held.push(waiting.blocking_recv());
            let _ = go_on.recv();
            held.clear();
            while let Some(Command::Ping(answer)) = waiting.blocking_recv() {
                let _ = answer.send(());
            }
        });
        let is = |live: bool| move |state: &State| state.not_live.is_empty() == live;
        let patience = Duration::from_secs(30);
        let state = tokio::time::timeout(patience, told.wait_for(is(false))).await.unwrap().unwrap().clone();
        assert!(state.not_live[0].contains("does its disk hang"), "{state:?}");
        hang.send(()).unwrap();
        tokio::time::timeout(patience, told.wait_for(is(true))).await.unwrap().unwrap();
        drop(commands);
        thread.join().unwrap();
    }

    #[tokio::test]
    async fn after_a_batch_that_was_not_stored_the_stream_stores_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { keep_bytes: 1 << 30, keep: Duration::ZERO };
        let log = Log::open(dir.path(), settings).unwrap();
        let source = log.source();
        let (commands, thread) = spawn(log, None, watch::Sender::default()).unwrap();
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
        let mut reader = source.reader(0);
        let mut seqs = Vec::new();
        while let Next::Events(events, _) = reader.read().unwrap() {
            seqs.extend(events.iter().map(|e| e.seq));
        }
        assert_eq!(seqs, [1, 3]);
    }
}
