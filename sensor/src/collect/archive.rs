//! What a collector keeps and hands on: its log and the outputs behind it.

use super::filter::Filter;
use super::log::{Log, Settings};
use super::output::{self, Configured, Kind, Progress, Ready, ndjson};
use super::query::{Limits, Service};
use super::store::StoreError;
use crate::event::file::Rotation;
use crate::format::Format;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

pub struct Archive {
    dir: PathBuf,
    pub(super) log: Log,
    outputs: Vec<Ready>,
    /// For those who ask.
    pub limits: Limits,
}

/// With its outputs under way.
pub(super) struct Started {
    pub(super) log: Log,
    pub(super) service: Service,
    pub(super) outputs: Vec<Progress>,
    pub(super) threads: Vec<JoinHandle<()>>,
}

impl Archive {
    /// In `dir`, which it makes (0700) if it is not there. `lines`: also as
    /// `events.ndjson` files.
    pub fn open(dir: &Path, settings: Settings, lines: Option<Rotation>) -> Result<Archive, StoreError> {
        let log = Log::open(dir, settings)?;
        let (dir, outputs) = (dir.to_owned(), Vec::new());
        let mut archive = Archive { dir, log, outputs, limits: Limits::default() };
        if let Some(rotation) = lines {
            archive.add(Configured {
                name: ndjson::NAME.to_owned(),
                format: Format::Ndjson,
                filter: Filter::default(),
                kind: Kind::Ndjson(ndjson::Settings { dir: archive.dir.clone(), rotation }),
            })?;
        }
        Ok(archive)
    }

    /// An output more.
    pub fn add(&mut self, output: Configured) -> Result<(), StoreError> {
        self.outputs.push(output.open(&self.dir, &self.log.source())?);
        Ok(())
    }

    /// Starts the outputs; they end after the log.
    pub(super) fn start(self) -> io::Result<Started> {
        let (mut outputs, mut threads) = (Vec::new(), Vec::new());
        for ready in self.outputs {
            let (progress, thread) = output::spawn(&self.log, ready)?;
            outputs.push(progress);
            threads.push(thread);
        }
        let service = Service::new(self.log.source(), self.log.fleet(), outputs.clone(), self.limits);
        Ok(Started { log: self.log, service, outputs, threads })
    }
}
