//! Sensor to collector: sealed, numbered batches, sent again until they are
//! acknowledged.
//!
//! `batch` seals events into bytes, `window` decides what to send again (no IO
//! in it), `codec` lets sealed bytes pass gRPC as they are, `client` connects.
//! While no collector answers, events wait in the bus's buffer for this reader,
//! which gives up telemetry before denials and says how many in the stream.

mod batch;
mod client;
mod codec;
mod window;

pub use batch::{MAX_BATCH_BYTES, MAX_BATCH_EVENTS};
pub use client::{AddressError, Feed, Settings, parse_address, spawn};

/// The bus's buffer for the collector, of each class.
pub const BACKLOG: usize = 8192;
