//! The store of the collector inside the sensor: NDJSON files, and how far each
//! boot is stored, so that a batch that comes twice is written once.
//!
//! `events.ndjson` is appended to and rotated. How far each boot is stored
//! follows from its lines; before a rotation takes lines out of the current
//! file, it is written to `positions.json`.

use super::positions::{Origin, Position, Positions};
use crate::event::file::{LineFile, Rotation};
use crate::event::{Event, json};
use crate::lock::exclusively;
use nix::fcntl::Flock;
use std::borrow::Borrow;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Longest line that is read back.
const MAX_LINE: u64 = 4 << 20;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("another collector writes to {0}")]
    InUse(PathBuf),
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path}: line {line} is no event: {why}; move the file away to start afresh")]
    Line { path: PathBuf, line: u64, why: String },
}

pub struct Store {
    dir: PathBuf,
    file: LineFile,
    positions: Positions,
    /// Positions before what is not yet committed.
    undo: Vec<(Arc<Origin>, u64)>,
    lines: Vec<u8>,
    _lock: Flock<File>,
}

impl Store {
    /// Makes `dir` (0700) if it is not there.
    pub fn open(dir: &Path, rotation: Rotation) -> Result<Store, StoreError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::Io { path, source }
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(at(dir))?;
        let lock = lock(dir)?;
        let path = dir.join("events.ndjson");
        let file = LineFile::open(&path, rotation).map_err(at(&path))?;
        let mut positions = Positions::default();
        load(&dir.join("positions.json"), &mut positions)?;
        replay(&path, 0, &mut positions)?;
        Ok(Store { dir: dir.to_owned(), file, positions, undo: Vec::new(), lines: Vec::new(), _lock: lock })
    }

    /// The last event of a boot that is stored; 0: none.
    pub fn position(&self, origin: &Origin) -> u64 {
        self.positions.get(origin)
    }

    /// Writes the events that are not stored yet (in ascending order) and gives
    /// their number; they are the last ones of `events`. Stored only after
    /// [`Store::commit`]; on an error nothing since the last commit is.
    pub fn append<E: Borrow<Event>>(&mut self, origin: &Arc<Origin>, events: &[E]) -> io::Result<usize> {
        let stored = self.positions.get(origin);
        let new = &events[events.partition_point(|e| e.borrow().seq <= stored)..];
        let Some(last) = new.last() else { return Ok(0) };
        self.lines.clear();
        for event in new {
            json::write_line(event.borrow(), &mut self.lines)?;
        }
        let written = self.rotate_for(self.lines.len()).and_then(|()| self.file.append(&self.lines));
        if let Err(error) = written {
            self.roll_back();
            return Err(error);
        }
        self.undo.push((origin.clone(), stored));
        self.positions.set(origin, last.borrow().seq);
        Ok(new.len())
    }

    /// What was appended survives a crash from now on.
    pub fn commit(&mut self) -> io::Result<()> {
        if self.undo.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.file.commit() {
            self.roll_back();
            return Err(error);
        }
        self.undo.clear();
        Ok(())
    }

    /// A failed fdatasync may have dropped any of the pages (the kernel marks
    /// them clean): nothing since the last commit counts.
    fn roll_back(&mut self) {
        for (origin, seq) in self.undo.drain(..).rev() {
            self.positions.set(&origin, seq);
        }
        if let Err(error) = self.file.roll_back() {
            tracing::error!(path = %self.file.path().display(), %error, "events may be in the file twice");
        }
    }

    fn rotate_for(&mut self, bytes: usize) -> io::Result<()> {
        if !self.file.is_full_for(bytes) {
            return Ok(());
        }
        self.file.commit()?;
        self.undo.clear();
        self.save()?;
        self.file.rotate()
    }

    fn save(&self) -> io::Result<()> {
        let path = self.dir.join("positions.json");
        let temporary = self.dir.join("positions.json.new");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&temporary)?;
        file.write_all(&serde_json::to_vec(&self.positions.to_json())?)?;
        file.sync_all()?;
        fs::rename(temporary, path)?;
        File::open(&self.dir)?.sync_all()
    }
}

pub(super) fn lock(dir: &Path) -> Result<Flock<File>, StoreError> {
    let path = dir.join("lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)
        .map_err(|source| StoreError::Io { path: path.clone(), source })?;
    exclusively(file).map_err(|errno| match errno {
        nix::Error::EWOULDBLOCK => StoreError::InUse(dir.to_owned()),
        errno => StoreError::Io { path, source: errno.into() },
    })
}

pub(super) fn load(path: &Path, positions: &mut Positions) -> Result<(), StoreError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(StoreError::Io { path: path.to_owned(), source }),
    };
    let list: Vec<Position> = serde_json::from_slice(&bytes).map_err(|error| StoreError::Line {
        path: path.to_owned(),
        line: error.line() as u64,
        why: error.to_string(),
    })?;
    for position in list {
        positions.set(&position.origin(), position.seq);
    }
    Ok(())
}

/// Takes positions from the lines of a file, from byte `from` on.
pub(super) fn replay(path: &Path, from: u64, positions: &mut Positions) -> Result<(), StoreError> {
    let mut last: Option<Arc<Origin>> = None;
    each_line(path, from, |line| {
        let position: Position = serde_json::from_slice(line).map_err(|e| e.to_string())?;
        let origin = match &last {
            Some(last) if last.sensor == position.sensor && last.boot == position.boot => last.clone(),
            _ => last.insert(position.origin()).clone(),
        };
        if position.seq > positions.get(&origin) {
            positions.set(&origin, position.seq);
        }
        Ok(())
    })
}

/// The lines of a file from byte `from` on; `take` says what is wrong with one.
pub(super) fn each_line(
    path: &Path,
    from: u64,
    mut take: impl FnMut(&[u8]) -> Result<(), String>,
) -> Result<(), StoreError> {
    let io = |source| StoreError::Io { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(io)?;
    file.seek(SeekFrom::Start(from)).map_err(io)?;
    let mut reader = BufReader::with_capacity(256 << 10, file);
    let mut text = Vec::new();
    let mut line = 0;
    loop {
        text.clear();
        let read = io::Read::take(&mut reader, MAX_LINE).read_until(b'\n', &mut text).map_err(io)?;
        if read == 0 {
            return Ok(());
        }
        line += 1;
        take(&text).map_err(|why| StoreError::Line { path: path.to_owned(), line, why })?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LARGE: Rotation = Rotation { max_bytes: 0, keep: 1 };

    fn origin(boot: &str) -> Arc<Origin> {
        Arc::new(Origin { sensor: "host".to_owned(), boot: boot.to_owned() })
    }

    fn events(boot: &str, seqs: impl IntoIterator<Item = u64>) -> Vec<Event> {
        let event =
            |seq| Event { seq, sensor: "host".to_owned(), boot: boot.to_owned(), ..Default::default() };
        seqs.into_iter().map(event).collect()
    }

    fn stored(dir: &Path) -> Vec<(String, u64)> {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
        names.retain(|p| p.to_string_lossy().contains("events.ndjson"));
        names.sort();
        let lines = names
            .iter()
            .rev()
            .flat_map(|p| fs::read_to_string(p).unwrap().lines().map(str::to_owned).collect::<Vec<_>>());
        lines
            .map(|l| serde_json::from_str::<serde_json::Value>(&l).unwrap())
            .map(|v| (v["boot"].as_str().unwrap().to_owned(), v["seq"].as_u64().unwrap()))
            .collect()
    }

    #[test]
    fn a_batch_that_comes_twice_is_stored_once_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path(), LARGE).unwrap();
        let (a, b) = (origin("a"), origin("b"));
        assert_eq!(store.append(&a, &events("a", 1..=3)).unwrap(), 3);
        assert_eq!(store.append(&b, &events("b", 1..=1)).unwrap(), 1);
        assert_eq!(store.append(&a, &events("a", 1..=3)).unwrap(), 0);
        store.commit().unwrap();
        drop(store);
        let mut store = Store::open(dir.path(), LARGE).unwrap();
        assert_eq!((store.position(&a), store.position(&b)), (3, 1));
        assert_eq!(store.append(&a, &events("a", 2..=5)).unwrap(), 2);
        store.commit().unwrap();
        let seqs: Vec<u64> =
            stored(dir.path()).into_iter().filter(|(b, _)| b == "a").map(|(_, s)| s).collect();
        assert_eq!(seqs, [1, 2, 3, 4, 5]);
    }

    #[test]
    fn positions_outlive_the_files_that_held_the_lines() {
        let dir = tempfile::tempdir().unwrap();
        let rotation = Rotation { max_bytes: 200, keep: 1 };
        let mut store = Store::open(dir.path(), rotation).unwrap();
        for seq in 1..=20 {
            store.append(&origin("a"), &events("a", [seq])).unwrap();
            store.append(&origin("b"), &events("b", [1])).unwrap();
            store.commit().unwrap();
        }
        drop(store);
        assert!(!stored(dir.path()).contains(&("b".to_owned(), 1)), "rotated away");
        let store = Store::open(dir.path(), rotation).unwrap();
        assert_eq!((store.position(&origin("a")), store.position(&origin("b"))), (20, 1));
    }

    #[test]
    fn a_batch_cut_short_by_a_crash_is_completed() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path(), LARGE).unwrap();
        store.append(&origin("a"), &events("a", 1..=4)).unwrap();
        store.commit().unwrap();
        drop(store);
        let path = dir.path().join("events.ndjson");
        let length = fs::metadata(&path).unwrap().len();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(length - 10).unwrap();
        let mut store = Store::open(dir.path(), LARGE).unwrap();
        assert_eq!(store.position(&origin("a")), 3);
        assert_eq!(store.append(&origin("a"), &events("a", 1..=4)).unwrap(), 1);
        store.commit().unwrap();
        assert_eq!(stored(dir.path()).into_iter().map(|(_, s)| s).collect::<Vec<_>>(), [1, 2, 3, 4]);
    }

    #[test]
    fn what_was_not_committed_does_not_count_after_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path(), LARGE).unwrap();
        store.append(&origin("a"), &events("a", 1..=2)).unwrap();
        store.commit().unwrap();
        store.append(&origin("a"), &events("a", 3..=4)).unwrap();
        store.roll_back();
        assert_eq!(store.position(&origin("a")), 2);
        assert_eq!(store.append(&origin("a"), &events("a", 3..=4)).unwrap(), 2);
        store.commit().unwrap();
        assert_eq!(stored(dir.path()).len(), 4);
    }

    #[test]
    fn two_collectors_do_not_share_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let _first = Store::open(dir.path(), LARGE).unwrap();
        assert!(matches!(Store::open(dir.path(), LARGE), Err(StoreError::InUse(_))));
    }

    #[test]
    fn a_foreign_file_is_refused_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("events.ndjson"),
            "{\"sensor\":\"s\",\"boot\":\"b\",\"seq\":1}\nnot json\n",
        )
        .unwrap();
        let error = Store::open(dir.path(), LARGE).err().unwrap();
        assert!(matches!(error, StoreError::Line { line: 2, .. }), "{error}");
    }
}
