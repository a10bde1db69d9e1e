//! What a collector keeps and hands on: its log and the outputs behind it.

use super::log::{Log, Settings};
use super::ndjson::{self, Ndjson};
use super::output::{self, Output, Place};
use super::query::{Limits, Service};
use super::store::StoreError;
use crate::event::file::Rotation;
use std::io;
use std::path::Path;
use std::thread::JoinHandle;

pub struct Archive {
    pub(super) log: Log,
    outputs: Vec<(Place, Box<dyn Output>)>,
    /// For those who ask.
    pub limits: Limits,
}

impl Archive {
    /// In `dir`, which it makes (0700) if it is not there. `lines`: also as
    /// `events.ndjson` files.
    pub fn open(dir: &Path, settings: Settings, lines: Option<Rotation>) -> Result<Archive, StoreError> {
        let log = Log::open(dir, settings)?;
        let mut outputs: Vec<(Place, Box<dyn Output>)> = Vec::new();
        if let Some(rotation) = lines {
            let place = Place::load(dir, ndjson::NAME, &log.source())
                .map_err(|source| StoreError::Io { path: dir.join("outputs"), source })?;
            let lines = Ndjson::open(dir, rotation, &place)?;
            outputs.push((place, Box::new(lines)));
        }
        Ok(Archive { log, outputs, limits: Limits::default() })
    }

    /// Starts the outputs; they end after the log.
    pub(super) fn start(self) -> io::Result<(Log, Service, Vec<JoinHandle<()>>)> {
        let (mut shown, mut threads) = (Vec::new(), Vec::new());
        for (place, output) in self.outputs {
            let (progress, thread) = output::spawn(&self.log, place, output)?;
            shown.push(progress);
            threads.push(thread);
        }
        let service = Service::new(self.log.source(), self.log.fleet(), shown, self.limits);
        Ok((self.log, service, threads))
    }
}
