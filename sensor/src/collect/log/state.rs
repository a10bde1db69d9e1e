//! What the log knows of all that it ever held: how far each boot is stored, and
//! the fleet. Saved whenever a segment is full, so that a start reads only what
//! came after.

use super::super::fleet::Fleet;
use super::super::positions::{Position, Positions};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

#[derive(Debug, Default)]
pub(super) struct State {
    /// Events before this number are in it.
    pub through: u64,
    pub positions: Positions,
}

#[derive(Serialize)]
struct Saved<'a> {
    log: String,
    through: u64,
    positions: serde_json::Value,
    fleet: &'a Fleet,
}

#[derive(Deserialize)]
struct Loaded<'a> {
    log: String,
    through: u64,
    #[serde(borrow)]
    positions: Vec<Position<'a>>,
    fleet: Fleet,
}

fn path(dir: &Path) -> PathBuf {
    dir.join("state.json")
}

impl State {
    pub(super) fn save(&self, dir: &Path, log: u64, fleet: &Fleet) -> io::Result<()> {
        let log = format!("{log:016x}");
        let saved = Saved { log, through: self.through, positions: self.positions.to_json(), fleet };
        replace(dir, &path(dir), &serde_json::to_vec(&saved)?)
    }

    /// `None`: there is none of this log; all of it is to be read.
    pub(super) fn load(dir: &Path, log: u64) -> io::Result<Option<(State, Fleet)>> {
        let bytes = match fs::read(path(dir)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let loaded: Loaded = match serde_json::from_slice(&bytes) {
            Ok(loaded) => loaded,
            Err(error) => {
                tracing::warn!(path = %path(dir).display(), %error, "damaged: the whole log is read instead");
                return Ok(None);
            }
        };
        if loaded.log != format!("{log:016x}") {
            return Ok(None);
        }
        let mut positions = Positions::default();
        for position in loaded.positions {
            positions.set(&position.origin(), position.seq);
        }
        Ok(Some((State { through: loaded.through, positions }, loaded.fleet)))
    }
}

/// A file as it was, or as it is now, whatever happens meanwhile.
pub(in crate::collect) fn replace(dir: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(temporary, path)?;
    File::open(dir)?.sync_all()
}
