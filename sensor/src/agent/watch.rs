//! Changes of the policy file: its directory is watched, since editors and
//! config maps replace the file rather than write to it.

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use std::path::Path;
use tokio::sync::mpsc;
use tokio::time::{Duration, timeout};

/// Changes come in groups (write, rename, attributes).
const QUIET: Duration = Duration::from_millis(100);

pub struct Watch {
    changes: mpsc::Receiver<()>,
    _watcher: RecommendedWatcher,
}

impl Watch {
    pub fn new(file: &Path) -> notify::Result<Watch> {
        let directory = match file.parent() {
            Some(p) if !p.as_os_str().is_empty() => p.to_owned(),
            _ => ".".into(),
        };
        let (send, changes) = mpsc::channel(1);
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading the file is an event too, and would never end.
            let read = event.as_ref().is_ok_and(|e| e.kind.is_access());
            if !read {
                let _ = send.try_send(()); // one that waits is enough
            }
        })?;
        watcher.watch(&directory, RecursiveMode::NonRecursive)?;
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
