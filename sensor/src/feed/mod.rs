//! Sensor to collector: sealed, numbered batches, sent again until they are
//! acknowledged.
//!
//! `batch` seals events into bytes, `writer` puts them into the `spool` on this
//! host's disk, `window` decides what to send again (no IO in it), `codec` lets
//! sealed bytes pass gRPC as they are, `connect` knows the way (TLS, or on this
//! host), `order` which of several collectors it is, `client` keeps a stream. While no collector
//! answers, events wait in the spool, which gives up telemetry before denials
//! and says how many in the stream.

mod batch;
mod client;
mod codec;
mod connect;
mod order;
pub mod spool;
mod store;
mod window;
mod writer;

pub use batch::{MAX_BATCH_BYTES, MAX_BATCH_EVENTS};
pub(crate) use batch::{encode_event, event_length};
pub use client::{Collectors, Feed, FeedError, PolicyLink, Settings, SpoolSettings, spawn};
pub use connect::{AddressError, Target};

use crate::event::{Body, Bus, pb};

/// The bus's buffer for the collector, of each class.
pub const BACKLOG: usize = 8192;

/// Told in the stream itself, like every loss.
fn lost(bus: &Bus, reason: &str, count: u64, first_seq: u64, last_seq: u64) {
    bus.publish_now(Body::Loss(pb::Loss {
        r#where: "feed".to_owned(),
        reason: reason.to_owned(),
        count,
        first_seq,
        last_seq,
        ..Default::default()
    }));
}
