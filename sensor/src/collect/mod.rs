//! The collector: takes events from sensors, keeps them, shows them, hands them
//! on. Needs no privilege and nothing of the kernel.
//!
//! `service` takes what sensors send, `writer` commits it to the `log`; from
//! there `query` answers those who ask and each `output` goes its way. A
//! collector that keeps nothing has `publish` in the writer's place. The
//! collector inside the sensor (`local`) keeps NDJSON files only (`store`).

mod accept;
mod archive;
mod filter;
mod fleet;
mod local;
pub mod log;
mod metrics;
pub mod output;
mod policies;
mod positions;
mod publish;
mod query;
mod service;
mod store;
mod view;
mod writer;

pub use archive::Archive;
pub use local::spawn as spawn_local;
#[cfg(test)]
pub(crate) use metrics::tests::every_metric;
pub use positions::{MAX_BOOTS, Origin};
pub use publish::{NoPublisher, Publisher};
pub use query::Limits;
pub use service::{Collector, Listen, ListenError};
pub use store::{Store, StoreError};
pub use view::{Printer, Style, View, wants_color, write_event, write_headings};
