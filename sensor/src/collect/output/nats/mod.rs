//! Events to NATS JetStream, each as a message of its own. A batch is taken when
//! the stream has acknowledged every message of it.

mod bus;
mod positions;
pub mod settings;
mod subject;

pub(in crate::collect) use bus::Bus;
pub(in crate::collect) use positions::Shared;

pub use settings::Settings;

use super::part::Part;
use super::{Batch, Delivered, Output, Settled, runtime};
use crate::format::Format;
use serde_json::Value;
use std::io;
use tokio::runtime::Runtime;

pub const KIND: &str = "nats";
/// Events at once.
const EVENTS: usize = 512;

pub struct Nats {
    name: String,
    runtime: Runtime,
    bus: Bus,
    part: Part,
}

impl Nats {
    pub fn new(name: &str, settings: Settings, format: Format) -> io::Result<Nats> {
        // The server wants answers also between batches.
        let runtime = runtime(KIND, name)?;
        Ok(Nats { name: name.to_owned(), runtime, bus: Bus::new(settings, format), part: Part::default() })
    }
}

impl Output for Nats {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> &'static str {
        KIND
    }

    fn batch(&self) -> usize {
        EVENTS
    }

    fn deliver(&mut self, batch: &Batch<'_>) -> io::Result<Delivered> {
        self.part.begin(batch);
        self.runtime.block_on(self.bus.publish(batch.events, &mut self.part))?;
        Ok(Delivered::Taken(self.part.end()))
    }

    /// What was acknowledged is as safe as the stream makes it.
    fn settle(&mut self) -> io::Result<Settled> {
        Ok(Settled::All(Value::Null))
    }
}
