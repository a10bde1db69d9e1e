//! Changes of the policy file and of the files it refers to: their directories
//! are watched, since editors and config maps replace files rather than write
//! to them.

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use tokio::io::unix::AsyncFd;
use tokio::time::{Duration, timeout};

/// Changes come in groups (write, rename, attributes).
const QUIET: Duration = Duration::from_millis(100);
/// However many there are: a directory may never be quiet.
const GROUPS: u32 = 10;

/// No IN_MODIFY: a file of events in the same directory would be a change each
/// time something happens. Who writes to a policy closes it.
const CHANGES: AddWatchFlags = AddWatchFlags::IN_CLOSE_WRITE
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_CREATE)
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_MOVE)
    .union(AddWatchFlags::IN_ONLYDIR);

fn directory(file: &Path) -> PathBuf {
    match file.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_owned(),
        _ => ".".into(),
    }
}

pub struct Watch {
    inotify: Inotify,
    ready: AsyncFd<OwnedFd>,
    /// Something changed that [`Watch::changed`] did not tell yet: who waits for it
    /// may stop waiting.
    untold: bool,
}

impl Watch {
    /// Must be called within a runtime.
    pub fn new(files: &BTreeSet<PathBuf>) -> io::Result<Watch> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        for directory in files.iter().map(|f| directory(f)).collect::<BTreeSet<_>>() {
            match inotify.add_watch(&directory, CHANGES) {
                // Of a file that may be absent (`/etc/resolv.conf`): the others are watched.
                Err(nix::Error::ENOENT) => {
                    tracing::debug!(directory = %directory.display(), "not there to watch");
                }
                watched => drop(watched?),
            }
        }
        // SAFETY: an owned descriptor, which stays open and the same until it is dropped.
        let ready = unsafe { AsyncFd::register(inotify.as_fd().try_clone_to_owned()?) }?;
        Ok(Watch { inotify, ready, untold: false })
    }

    /// Returns when something changed and it has been quiet for a moment.
    pub async fn changed(&mut self) -> bool {
        if !self.untold && self.one().await.is_err() {
            return false;
        }
        self.untold = true;
        let mut groups = 1;
        while groups < GROUPS && matches!(timeout(QUIET, self.one()).await, Ok(Ok(()))) {
            groups += 1;
            // What comes at once is one group.
            tokio::time::sleep(QUIET / 2).await;
        }
        self.untold = false;
        true
    }

    /// What has changed so far, at least one file.
    async fn one(&self) -> io::Result<()> {
        loop {
            let mut guard = self.ready.readable().await?;
            match self.inotify.read_events() {
                Ok(_) => return Ok(()),
                Err(nix::Error::EAGAIN) => guard.clear_ready(),
                Err(nix::Error::EINTR) => (),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write as _;

    const LONG: Duration = Duration::from_secs(5);

    fn policy() -> (tempfile::TempDir, PathBuf, Watch) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy.yaml");
        fs::write(&path, "version: 1\n").unwrap();
        let watch = Watch::new(&BTreeSet::from([path.clone()])).unwrap();
        (dir, path, watch)
    }

    #[tokio::test]
    async fn a_file_that_is_replaced_or_written_has_changed() {
        let (dir, path, mut watch) = policy();
        fs::write(dir.path().join("new"), "version: 1\n").unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
        assert!(timeout(LONG, watch.changed()).await.unwrap());
        fs::write(&path, "version: 1 # again\n").unwrap();
        assert!(timeout(LONG, watch.changed()).await.unwrap());
    }

    #[tokio::test]
    async fn what_is_written_beside_it_all_the_time_is_no_change_and_hides_none() {
        let (dir, path, mut watch) = policy();
        let mut events = fs::File::create(dir.path().join("events.ndjson")).unwrap();
        assert!(timeout(LONG, watch.changed()).await.unwrap(), "it was created");
        let writer = tokio::spawn(async move {
            loop {
                events.write_all(b"{}\n").unwrap();
                tokio::time::sleep(QUIET / 10).await;
            }
        });
        assert!(timeout(QUIET * 3, watch.changed()).await.is_err(), "only the events were written");
        fs::write(&path, "version: 1 # again\n").unwrap();
        assert!(timeout(LONG, watch.changed()).await.unwrap());
        writer.abort();
    }

    #[tokio::test]
    async fn a_directory_that_is_never_quiet_is_told_all_the_same() {
        let (dir, _, mut watch) = policy();
        let path = dir.path().join("busy");
        let writer = tokio::spawn(async move {
            loop {
                fs::write(&path, "x").unwrap();
                tokio::time::sleep(QUIET / 10).await;
            }
        });
        assert!(timeout(LONG, watch.changed()).await.unwrap());
        writer.abort();
    }
}
