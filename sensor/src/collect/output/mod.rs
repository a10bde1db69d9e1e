//! Where events go on to from the log. Each output goes its own way (`way`)
//! behind a cursor of its own on the disk (`place`), and tries again until it
//! takes them. `file` is what `--outputs FILE` says of them.

pub mod file;
pub mod nats;
pub mod ndjson;
pub mod otlp;
mod part;
mod place;
mod progress;
mod secret;
pub mod syslog;
#[cfg(test)]
mod tests;
mod way;
pub mod webhook;

pub use file::{Configured, Kind, Loaded};
pub(super) use part::Part;
pub use place::Place;
pub use progress::Progress;
pub use secret::Secret;
pub(super) use way::spawn;

use super::filter::Filter;
use crate::event::Event;
use serde_json::Value;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;
use tokio::runtime::Runtime;

/// Events for an output, in the order of the log.
#[derive(Debug)]
pub struct Batch<'a> {
    /// Which log they are from.
    pub log: u64,
    /// The cursor before them and after them. The filter may have left out some,
    /// and a loss has no number of its own.
    pub from: u64,
    pub next: u64,
    pub events: &'a [Event],
}

/// What became of a batch.
#[derive(Debug)]
pub enum Delivered {
    /// The receiver has them, but for these, which it will never take. They are
    /// counted, and told to it as a `loss`.
    Taken(Vec<Refused>),
    /// Some of them, which do not go out again when the same batch comes again; then
    /// this happened.
    Partly(io::Error),
    /// None of them; first the cursor before them must be safe.
    SaveFirst,
    /// What was delivered since the cursor was last safe may be lost: everything
    /// from there on comes again.
    Back(io::Error),
}

impl Delivered {
    pub const ALL: Delivered = Delivered::Taken(Vec::new());
}

/// An event that is never taken: its place in [`Batch::events`], or
/// [`SOME`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    pub event: usize,
    /// [`REFUSED`] or [`TOO_LARGE`].
    pub reason: &'static str,
}

/// One of the batch; the receiver does not say which.
pub const SOME: usize = usize::MAX;
/// The receiver says that it will never take it.
pub const REFUSED: &str = "refused";
/// It is larger than the receiver or the way to it takes.
pub const TOO_LARGE: &str = "too_large";

/// How far what was delivered is safe.
#[derive(Debug)]
pub enum Settled {
    /// All of it. The value is kept with the cursor, for the next start.
    All(Value),
    /// What is before this cursor; the rest may still be lost on the way.
    Upto(u64, Value),
    /// As [`Delivered::Back`].
    Back(io::Error),
}

/// Its thread calls it, and it may block, but not for longer than some seconds:
/// the collector ends only after that.
pub trait Output: Send {
    /// In file names, metrics and losses.
    fn name(&self) -> &str;

    /// As in the file of outputs.
    fn kind(&self) -> &'static str;

    /// About how many events it likes to get at once, if so many wait.
    fn batch(&self) -> usize {
        1
    }

    /// An error: none were taken, and the same come again.
    fn deliver(&mut self, batch: &Batch<'_>) -> io::Result<Delivered>;

    /// Called about once a second, while something that was delivered is not
    /// known to be safe.
    fn settle(&mut self) -> io::Result<Settled>;

    /// [`Output::settle`] for the last time: what can be made safe only by ending
    /// is made safe now.
    fn finish(&mut self) -> io::Result<Settled> {
        self.settle()
    }
}

/// For a client that wants to be served also between batches: one thread.
fn runtime(kind: &str, name: &str) -> io::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name(format!("{kind}-{name}"))
        .enable_all()
        .build()
}

/// An output that can be started.
pub struct Ready {
    pub place: Place,
    pub filter: Filter,
    pub output: Box<dyn Output>,
    /// Of our own, that the receiver verifies.
    pub certificate: Option<PathBuf>,
}

/// An error of a receiver that says when it wants to be asked again.
#[derive(Debug)]
pub struct Later {
    pub why: String,
    pub after: Duration,
}

impl fmt::Display for Later {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

impl std::error::Error for Later {}

impl From<Later> for io::Error {
    fn from(later: Later) -> io::Error {
        io::Error::other(later)
    }
}
