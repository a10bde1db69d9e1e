//! Changes of the policy file and of the files it refers to: their directories
//! are watched, since editors and config maps replace files rather than write
//! to them.

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use tokio::sync::mpsc;
use tokio::time::{Duration, timeout};

/// Changes come in groups (write, rename, attributes).
const QUIET: Duration = Duration::from_millis(100);

fn directory(file: &Path) -> PathBuf {
    match file.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_owned(),
        _ => ".".into(),
    }
}

pub struct Watch {
    changes: mpsc::Receiver<()>,
    _watcher: RecommendedWatcher,
}

impl Watch {
    pub fn new(files: &BTreeSet<PathBuf>) -> notify::Result<Watch> {
        let (send, changes) = mpsc::channel(1);
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading the file is an event too, and would never end.
            let read = event.as_ref().is_ok_and(|e| e.kind.is_access());
            if !read {
                let _ = send.try_send(()); // one that waits is enough
            }
        })?;
        for directory in files.iter().map(|f| directory(f)).collect::<BTreeSet<_>>() {
            watcher.watch(&directory, RecursiveMode::NonRecursive)?;
        }
        Ok(Watch { changes, _watcher: watcher })
    }

    /// Returns when something changed and it has been quiet for a moment.
    pub async fn changed(&mut self) -> bool {
        if self.changes.recv().await.is_none() {
            return false;
        }
        while timeout(QUIET, self.changes.recv()).await.is_ok_and(|more| more.is_some()) {}
        true
    }
}
