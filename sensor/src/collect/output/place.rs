//! How far an output is, on the disk.

use crate::collect::log::{Cursor, Source, replace};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

#[derive(Serialize, Deserialize)]
struct Saved {
    log: String,
    next: u64,
    output: Value,
}

/// What an earlier run left of an output's way.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    /// Number of the next event.
    pub(in crate::collect) next: u64,
    /// As [`super::Output::settle`] answered; `None`: it begins anew.
    pub output: Option<Value>,
}

impl Place {
    /// Of the output called `name`, in the collector's directory.
    pub fn load(dir: &Path, name: &str, source: &Source) -> io::Result<Place> {
        let dir = dir.join("outputs");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        let path = dir.join(format!("{name}.json"));
        let log = format!("{:016x}", source.cursor(0).log);
        let saved = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice::<Saved>(&bytes).ok().filter(|s| s.log == log),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Ok(match saved {
            Some(saved) => Place { path, next: saved.next.min(source.end()), output: Some(saved.output) },
            None => Place { path, next: source.oldest(), output: None },
        })
    }

    pub(in crate::collect) fn save(&mut self, cursor: Cursor, output: Value) -> io::Result<()> {
        let saved = Saved { log: format!("{:016x}", cursor.log), next: cursor.offset, output };
        let dir = self.path.parent().unwrap_or(Path::new("."));
        replace(dir, &self.path, &serde_json::to_vec(&saved)?)?;
        self.next = cursor.offset;
        Ok(())
    }
}
