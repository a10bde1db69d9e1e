//! Events as lines of JSON in files that are rotated, each event once and in
//! order. After a crash the lines beyond the cursor say what was written.

use super::file::Context;
use super::{Batch, Delivered, Output, Place, Settled};
use crate::collect::positions::{Origin, Positions};
use crate::collect::store::{StoreError, each_line};
use crate::event::Event;
use crate::event::file::{LineFile, Rotation};
use crate::format::{self, Format};
use crate::policy::parse::at;
use serde::{Deserialize, Serialize};
use serde_saphyr::Spanned;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The one that is there without a file of outputs.
pub const NAME: &str = "ndjson";
pub const KIND: &str = "ndjson";

/// As written in the file of outputs.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    path: Spanned<String>,
    max_bytes: Option<Spanned<u64>>,
    keep: Option<Spanned<u64>>,
}

#[derive(Clone, Debug)]
pub struct Settings {
    /// Of `events.ndjson`; made (0700) if it is not there.
    pub dir: PathBuf,
    pub rotation: Rotation,
}

pub(super) fn check(context: &mut Context<'_>, raw: &Raw) -> Option<Settings> {
    let max_bytes = context.number(raw.max_bytes.as_ref(), "max_bytes", (1 << 20, 256 << 20, 1 << 40));
    let keep = context.number(raw.keep.as_ref(), "keep", (1, 16, 10_000));
    if raw.path.value.is_empty() {
        context.error(at(&raw.path), "path", "no directory").help = Some("name a directory".to_owned());
        return None;
    }
    let dir = context.path(&raw.path.value);
    Some(Settings { dir, rotation: Rotation { max_bytes, keep: u32::try_from(keep).unwrap_or(u32::MAX) } })
}

pub struct Ndjson {
    name: String,
    format: Format,
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
    pub fn open(name: &str, format: Format, settings: Settings, place: &Place) -> Result<Ndjson, StoreError> {
        let Settings { dir, rotation } = settings;
        let path = dir.join("events.ndjson");
        let at = |source| StoreError::Io { path: path.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(at)?;
        let file = LineFile::open(&path, rotation).map_err(at)?;
        let meta = fs::metadata(&path).map_err(at)?;
        let mark = place.output.clone().and_then(|v| serde_json::from_value::<Mark>(v).ok());
        // A file that was begun after the cursor was saved is all beyond it.
        let from = mark.filter(|m| m.inode == meta.ino()).map_or(0, |m| m.bytes.min(meta.len()));
        let written = Some((replay(&path, from)?, Mark { inode: meta.ino(), bytes: from }));
        let (name, lines) = (name.to_owned(), Vec::new());
        Ok(Ndjson { name, format, path, file, lines, written, settled: false })
    }

    /// How many of `events`, the first ones, are in the file already; losses of
    /// this collector have no number and may be there twice.
    fn written(&self, events: &[Event]) -> usize {
        let Some((positions, _)) = &self.written else { return 0 };
        let is_written = |event: &Event| {
            event.seq > 0 && positions.get(&line_origin(&event.sensor, &event.boot)) >= event.seq
        };
        events.iter().position(|e| !is_written(e)).unwrap_or(events.len())
    }
}

/// The two together, as OCSF and ECS have them in one field.
fn line_origin(sensor: &str, boot: &str) -> Origin {
    Origin { sensor: format!("{sensor}/{boot}"), boot: String::new() }
}

/// What a line says of its event, in each format.
#[derive(Deserialize)]
struct Line {
    sensor: Option<String>,
    boot: Option<String>,
    seq: Option<u64>,
    metadata: Option<Metadata>,
    event: Option<EventId>,
}

#[derive(Deserialize)]
struct Metadata {
    uid: Option<String>,
}

#[derive(Deserialize)]
struct EventId {
    id: Option<String>,
}

impl Line {
    fn position(self) -> Option<(Origin, u64)> {
        if let (Some(sensor), Some(boot), Some(seq)) = (&self.sensor, &self.boot, self.seq) {
            return Some((line_origin(sensor, boot), seq));
        }
        let id = self.metadata.and_then(|m| m.uid).or(self.event.and_then(|e| e.id))?;
        let (origin, seq) = id.rsplit_once('/')?;
        Some((Origin { sensor: origin.to_owned(), boot: String::new() }, seq.parse().ok()?))
    }
}

/// How far each boot is in the lines of a file, from byte `from` on.
fn replay(path: &Path, from: u64) -> Result<Positions, StoreError> {
    let mut positions = Positions::default();
    each_line(path, from, |line| {
        let line: Line = serde_json::from_slice(line).map_err(|e| e.to_string())?;
        if let Some((origin, seq)) = line.position()
            && seq > positions.get(&origin)
        {
            positions.set(&Arc::new(origin), seq);
        }
        Ok(())
    })?;
    Ok(positions)
}

impl Output for Ndjson {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> &'static str {
        KIND
    }

    fn deliver(&mut self, batch: &Batch<'_>) -> io::Result<Delivered> {
        let written = self.written(batch.events);
        let new = &batch.events[written..];
        if new.is_empty() {
            return Ok(Delivered::ALL);
        }
        self.lines.clear();
        for event in new {
            format::write_line(self.format, event, &mut self.lines)?;
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
        Ok(Delivered::ALL)
    }

    fn settle(&mut self) -> io::Result<Settled> {
        self.file.commit()?;
        let meta = fs::metadata(&self.path)?;
        self.settled = true;
        let end = Mark { inode: meta.ino(), bytes: meta.len() };
        let state = serde_json::to_value(self.written.as_ref().map_or(end, |(_, mark)| *mark))?;
        Ok(Settled::All(state))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collect::log::{self, Log, Next};
    use proptest::prelude::*;
    use std::fs::OpenOptions;
    use std::time::Duration;

    /// Boot and number of every line, oldest file first.
    fn lines(dir: &Path) -> Vec<(String, u64)> {
        let mut files: Vec<PathBuf> = (1..1000).map(|n| dir.join(format!("events.ndjson.{n}"))).collect();
        files.retain(|f| f.exists());
        files.reverse();
        files.push(dir.join("events.ndjson"));
        let text: String = files.iter().map(|f| fs::read_to_string(f).unwrap()).collect();
        let line = |l: &str| {
            let (origin, seq) = serde_json::from_str::<Line>(l).unwrap().position().unwrap();
            (origin.sensor, seq)
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
            format in prop::sample::select(vec![Format::Ndjson, Format::Ocsf, Format::Ecs]),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let keep = log::Settings { keep_bytes: 1 << 30, keep: Duration::ZERO };
            let mut log = Log::open(dir.path(), keep).unwrap();
            let mut expected = Vec::new();
            for (boot, count) in batches {
                let origin = Arc::new(Origin { sensor: "s".to_owned(), boot: format!("b{boot}") });
                let from = log.position(&origin) + 1;
                let events: Vec<Event> = (from..from + count).map(|seq| Event { seq, ..Default::default() }).collect();
                log.append(&origin, &events).unwrap();
                log.commit().unwrap();
                expected.extend(events.iter().map(|e| (format!("s/{}", origin.boot), e.seq)));
            }
            let source = log.source();
            let save = |place: &mut Place, at: u64, output: &mut Ndjson| {
                let Settled::All(state) = output.settle().unwrap() else { panic!() };
                place.save(source.cursor(at), state).unwrap();
            };
            let whole = (usize::MAX, 1, 0);
            for (chunks, save_every, cut) in runs.into_iter().chain([whole]) {
                let mut place = Place::load(dir.path(), NAME, &source).unwrap();
                let rotation = Rotation { max_bytes: 1500, keep: 900 };
                let settings = Settings { dir: dir.path().to_owned(), rotation };
                let mut output = Ndjson::open(NAME, format, settings, &place).unwrap();
                let mut reader = source.reader(place.next);
                let mut safe = fs::metadata(&output.path).unwrap().len();
                for chunk in 0..chunks {
                    let before = reader.offset();
                    let Next::Events(events, _) = reader.read().unwrap() else { break };
                    let batch = Batch { log: 1, from: before, next: reader.offset(), events: &events };
                    while matches!(output.deliver(&batch).unwrap(), Delivered::SaveFirst) {
                        save(&mut place, before, &mut output);
                    }
                    let length = fs::metadata(&output.path).unwrap().len();
                    // After a rotation nothing of the file is safe yet.
                    safe = safe.min(length - output.lines.len().min(length as usize) as u64);
                    if save_every > 0 && chunk % save_every == 0 {
                        save(&mut place, reader.offset(), &mut output);
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
