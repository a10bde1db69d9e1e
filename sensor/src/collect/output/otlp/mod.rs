//! Events to whatever speaks OTLP over gRPC, as log records; and, if it is asked
//! for, sums of what they say as metrics.

mod answer;
mod exporter;
mod metrics;
pub mod settings;

pub use settings::Settings;

use super::part::Part;
use super::{Batch, Delivered, Output, Settled, runtime};
use exporter::Exporter;
use metrics::Sums;
use serde_json::Value;
use std::io;
use tokio::runtime::Runtime;

pub const KIND: &str = "otlp";
/// Events at once.
const EVENTS: usize = 512;

pub struct Otlp {
    name: String,
    exporter: Exporter,
    part: Part,
    sums: Option<Sums>,
    /// Ends after what runs on it.
    runtime: Runtime,
}

impl Otlp {
    pub fn new(name: &str, settings: Settings) -> io::Result<Otlp> {
        // Metrics are sent and connections are kept alive also between batches.
        let runtime = runtime(KIND, name)?;
        let _inside = runtime.enter();
        let exporter = Exporter::new(settings.clone())?;
        let sums = settings.metrics.map(|every| Sums::start(exporter.channel(), settings, every));
        drop(_inside);
        Ok(Otlp { name: name.to_owned(), exporter, part: Part::default(), sums, runtime })
    }
}

impl Output for Otlp {
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
        self.runtime.block_on(self.exporter.export(batch.events, &mut self.part))?;
        if let Some(sums) = &self.sums {
            sums.observe(batch.events);
        }
        Ok(Delivered::Taken(self.part.end()))
    }

    /// What a receiver took is its own affair.
    fn settle(&mut self) -> io::Result<Settled> {
        Ok(Settled::All(Value::Null))
    }
}

impl Drop for Otlp {
    fn drop(&mut self) {
        if let Some(sums) = &self.sums {
            self.runtime.block_on(sums.send_last());
        }
    }
}
