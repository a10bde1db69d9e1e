//! Events as lines of JSON in files that are rotated, each event once and in
//! order. After a crash the lines beyond the cursor say what was written.

use super::output::{Delivered, Output, Place};
use super::positions::{Origin, Positions};
use super::store::{StoreError, replay};
use crate::event::file::{LineFile, Rotation};
use crate::event::{Event, json};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

pub const NAME: &str = "ndjson";

pub struct Ndjson {
    path: PathBuf,
    file: LineFile,
    lines: Vec<u8>,
    /// What the file holds beyond the cursor that was saved: these events come
    /// first and again. `None`: all of them have come.
    written: Option<(Positions, Mark)>,
    /// The cursor is at the end of the file.
    settled: bool,
}

/// How much of which file the cursor stands for.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Mark {
    inode: u64,
    bytes: u64,
}

impl Ndjson {
    /// `events.ndjson` in the collector's directory.
    pub fn open(dir: &Path, rotation: Rotation, place: &Place) -> Result<Ndjson, StoreError> {
        let path = dir.join("events.ndjson");
        let at = |source| StoreError::Io { path: path.clone(), source };
        let file = LineFile::open(&path, rotation).map_err(at)?;
        let meta = fs::metadata(&path).map_err(at)?;
        let mark = place.output.clone().and_then(|v| serde_json::from_value::<Mark>(v).ok());
        // A file that was begun after the cursor was saved is all beyond it.
        let from = mark.filter(|m| m.inode == meta.ino()).map_or(0, |m| m.bytes.min(meta.len()));
        let mut positions = Positions::default();
        replay(&path, from, &mut positions)?;
        let written = Some((positions, Mark { inode: meta.ino(), bytes: from }));
        Ok(Ndjson { path, file, lines: Vec::new(), written, settled: false })
    }

    /// How many of `events`, the first ones, are in the file already; losses of
    /// this collector have no number and may be there twice.
    fn written(&self, events: &[Event]) -> usize {
        let Some((positions, _)) = &self.written else { return 0 };
        let is_written = |event: &Event| {
            let origin = Origin { sensor: event.sensor.clone(), boot: event.boot.clone() };
            event.seq > 0 && positions.get(&origin) >= event.seq
        };
        events.iter().position(|e| !is_written(e)).unwrap_or(events.len())
    }
}

impl Output for Ndjson {
    fn name(&self) -> &'static str {
        NAME
    }

    fn deliver(&mut self, events: &[Event]) -> io::Result<Delivered> {
        let written = self.written(events);
        let new = &events[written..];
        if new.is_empty() {
            return Ok(Delivered::All);
        }
        self.lines.clear();
        for event in new {
            json::write_line(event, &mut self.lines)?;
        }
        // A file that is rotated away is not read again: the cursor must be
        // behind it, and cannot be in the middle of these.
        if written == 0 && self.file.is_full_for(self.lines.len()) {
            if !self.settled {
                return Ok(Delivered::SaveFirst);
            }
            self.file.rotate()?;
        }
        self.settled = false;
        self.file.extend(&self.lines)?;
        if new.iter().any(|e| e.seq > 0) {
            self.written = None;
        }
        Ok(Delivered::All)
    }

    fn settle(&mut self) -> io::Result<Value> {
        self.file.commit()?;
        let meta = fs::metadata(&self.path)?;
        self.settled = true;
        let end = Mark { inode: meta.ino(), bytes: meta.len() };
        Ok(serde_json::to_value(self.written.as_ref().map_or(end, |(_, mark)| *mark))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collect::log::{Log, Next, Settings};
    use proptest::prelude::*;
    use std::fs::OpenOptions;
    use std::sync::Arc;
    use std::time::Duration;

    /// Boot and number of every line, oldest file first.
    fn lines(dir: &Path) -> Vec<(String, u64)> {
        let mut files: Vec<PathBuf> = (1..1000).map(|n| dir.join(format!("events.ndjson.{n}"))).collect();
        files.retain(|f| f.exists());
        files.reverse();
        files.push(dir.join("events.ndjson"));
        let text: String = files.iter().map(|f| fs::read_to_string(f).unwrap()).collect();
        let line = |l: &str| {
            let value: Value = serde_json::from_str(l).unwrap();
            (value["boot"].as_str().unwrap().to_owned(), value["seq"].as_u64().unwrap())
        };
        text.lines().map(line).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        /// However often the collector is killed, wherever its last line is cut
        /// and whenever the cursor was saved: each event is there once, in order.
        #[test]
        fn each_event_is_a_line_once_and_in_order_over_crashes_and_rotations(
            batches in prop::collection::vec((0u8..3, 1u64..12), 1..30),
            runs in prop::collection::vec((0usize..12, 0usize..5, any::<u16>()), 0..12),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let keep = Settings { keep_bytes: 1 << 30, keep: Duration::ZERO };
            let mut log = Log::open(dir.path(), keep).unwrap();
            let mut expected = Vec::new();
            for (boot, count) in batches {
                let origin = Arc::new(Origin { sensor: "s".to_owned(), boot: format!("b{boot}") });
                let from = log.position(&origin) + 1;
                let events: Vec<Event> = (from..from + count).map(|seq| Event { seq, ..Default::default() }).collect();
                log.append(&origin, &events).unwrap();
                log.commit().unwrap();
                expected.extend(events.iter().map(|e| (origin.boot.clone(), e.seq)));
            }
            let source = log.source();
            let whole = (usize::MAX, 1, 0);
            for (chunks, save_every, cut) in runs.into_iter().chain([whole]) {
                let place = Place::load(dir.path(), NAME, &source).unwrap();
                let rotation = Rotation { max_bytes: 1500, keep: 900 };
                let mut output = Ndjson::open(dir.path(), rotation, &place).unwrap();
                let mut reader = source.reader(place.next);
                let mut safe = fs::metadata(&output.path).unwrap().len();
                for chunk in 0..chunks {
                    let before = reader.offset();
                    let Next::Events(events, _) = reader.read().unwrap() else { break };
                    while output.deliver(&events).unwrap() == Delivered::SaveFirst {
                        place.save(source.cursor(before), output.settle().unwrap()).unwrap();
                    }
                    let length = fs::metadata(&output.path).unwrap().len();
                    // After a rotation nothing of the file is safe yet.
                    safe = safe.min(length - output.lines.len().min(length as usize) as u64);
                    if save_every > 0 && chunk % save_every == 0 {
                        place.save(source.cursor(reader.offset()), output.settle().unwrap()).unwrap();
                        safe = length;
                    }
                }
                let length = fs::metadata(&output.path).unwrap().len();
                let cut = u64::from(cut) % (length - safe + 1);
                drop(output);
                let file = OpenOptions::new().write(true).open(dir.path().join("events.ndjson")).unwrap();
                file.set_len(length - cut).unwrap();
            }
            prop_assert_eq!(lines(dir.path()), expected);
        }
    }
}
