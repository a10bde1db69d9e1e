//! The collector: takes events from sensors, keeps them, shows them. Needs no
//! privilege and nothing of the kernel.

mod accept;
mod local;
mod service;
mod store;
mod view;
mod writer;

pub use local::spawn as spawn_local;
pub use service::{Collector, Listen, ListenError};
pub use store::{MAX_BOOTS, Origin, Store, StoreError};
pub use view::{Printer, Style, View, wants_color, write_event, write_headings};
