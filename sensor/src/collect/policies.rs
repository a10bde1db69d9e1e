//! Policies for sensors: the signed bundles of a directory, each to the sensors
//! that it is for. Who signed them the sensors verify.

use super::service::AbortOnDrop;
use crate::event::pb;
use crate::policy::bundle::{Bundle, MAX_BYTES};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How often the directory is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Bundles that are served.
const MAX_FILES: usize = 1024;

/// What a file was when it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

#[derive(Clone, Debug)]
struct Entry {
    stamp: Option<Stamp>,
    /// The last content that was one.
    bundle: Option<Arc<Bundle>>,
    /// Why the present one is none.
    error: String,
}

type Served = BTreeMap<String, Entry>;

/// The bundles that are there now. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Policies {
    served: watch::Sender<Served>,
    _looking: Option<Arc<AbortOnDrop>>,
}

impl Policies {
    /// Of a directory, from now on as it changes. Needs a tokio runtime around
    /// it; ends with the last clone.
    pub(super) fn of(dir: &Path) -> io::Result<Policies> {
        let policies = Policies::default();
        let first = look(dir, &Served::new())?;
        policies.served.send_replace(first);
        let looking = tokio::spawn(follow(dir.to_owned(), policies.served.clone()));
        Ok(Policies { _looking: Some(Arc::new(AbortOnDrop(looking))), ..policies })
    }

    /// For the sensors of `group`: the highest version, of two the one for the
    /// group itself.
    fn newest(served: &Served, group: &str) -> Option<Arc<Bundle>> {
        let bundles = served.values().filter_map(|entry| entry.bundle.as_ref());
        let fits = bundles.filter(|b| b.group.is_empty() || b.group == group);
        fits.max_by_key(|b| (b.version, !b.group.is_empty(), &b.hash)).cloned()
    }

    /// Gives a sensor what is for it, again when that changes, until `send` says
    /// no.
    pub(super) async fn serve<F: Future<Output = bool>>(
        &self,
        sensor: &pb::BundleState,
        send: impl Fn(pb::PolicyUpdate) -> F,
    ) {
        let mut served = self.served.subscribe();
        let mut given = sensor.hash.clone();
        loop {
            let newest = Policies::newest(&served.borrow_and_update(), &sensor.group);
            if let Some(bundle) = newest.filter(|bundle| bundle.hash != given) {
                given.clone_from(&bundle.hash);
                if !send(pb::PolicyUpdate { signed_bundle: bundle.signed.clone() }).await {
                    return;
                }
            }
            if served.changed().await.is_err() {
                return;
            }
        }
    }

    pub(super) fn list(&self) -> Vec<pb::ServedPolicy> {
        let shown = |(file, entry): (&String, &Entry)| pb::ServedPolicy {
            file: file.clone(),
            version: entry.bundle.as_ref().map_or(0, |b| b.version),
            group: entry.bundle.as_ref().map(|b| b.group.clone()).unwrap_or_default(),
            hash: entry.bundle.as_ref().map(|b| b.hash.clone()).unwrap_or_default(),
            error: entry.error.clone(),
        };
        self.served.borrow().iter().map(shown).collect()
    }
}

async fn follow(dir: PathBuf, served: watch::Sender<Served>) {
    let mut tick = tokio::time::interval(LOOK);
    let mut failed = false;
    loop {
        tick.tick().await;
        let before = served.borrow().clone();
        let at = dir.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let now = look(&at, &before)?;
            let same = now.len() == before.len()
                && now
                    .iter()
                    .zip(&before)
                    .all(|(a, b)| a.0 == b.0 && a.1.stamp == b.1.stamp && a.1.error == b.1.error);
            Ok::<_, io::Error>((!same).then_some(now))
        });
        match looked.await {
            Ok(Ok(now)) => {
                failed = false;
                if let Some(now) = now {
                    served.send_replace(now);
                }
            }
            Ok(Err(error)) => {
                if !std::mem::replace(&mut failed, true) {
                    tracing::error!(dir = %dir.display(), %error, "policies cannot be looked at; those before are served");
                }
            }
            Err(_) => return,
        }
    }
}

/// The directory as it is now; what did not change since `before` is not read
/// again.
fn look(dir: &Path, before: &Served) -> io::Result<Served> {
    let mut now = Served::new();
    let mut more = 0u64;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        // Those of editors and of copies that are not done.
        if name.starts_with('.') || name.ends_with(".new") || name.ends_with('~') {
            continue;
        }
        let path = entry.path();
        let Ok(meta) = fs::metadata(&path) else { continue };
        if !meta.is_file() {
            continue;
        }
        if now.len() >= MAX_FILES {
            more += 1;
            continue;
        }
        let stamp = Stamp {
            inode: meta.ino(),
            bytes: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        };
        let known = before.get(&name);
        if let Some(known) = known.filter(|known| known.stamp == Some(stamp)) {
            now.insert(name, known.clone());
            continue;
        }
        let entry = match read(&path) {
            Ok(bundle) => {
                tracing::info!(file = %path.display(), version = bundle.version, group = %bundle.group, "a policy is served");
                Entry { stamp: Some(stamp), bundle: Some(Arc::new(bundle)), error: String::new() }
            }
            Err(error) => {
                tracing::error!(file = %path.display(), %error, "no policy bundle: nothing is changed");
                Entry { stamp: Some(stamp), bundle: known.and_then(|k| k.bundle.clone()), error }
            }
        };
        now.insert(name, entry);
    }
    if more > 0 {
        tracing::error!(dir = %dir.display(), more, "more than {MAX_FILES} files: the rest is not served");
    }
    Ok(now)
}

fn read(path: &Path) -> Result<Bundle, String> {
    let mut bytes = Vec::new();
    // Opening a FIFO would wait for a writer.
    let file =
        File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(|e| e.to_string())?;
    file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    Bundle::parse(&bytes).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::bundle::{Draft, SigningKey};

    fn write(dir: &Path, name: &str, version: u64, group: &str) {
        let key = SigningKey::generate().unwrap();
        let files = vec![("policy.yaml".to_owned(), b"version: 1\n".to_vec())];
        let draft = Draft { version, group: group.to_owned(), files, ..Draft::default() };
        fs::write(dir.join(name), draft.sign(&key).unwrap().signed).unwrap();
    }

    #[test]
    fn each_group_gets_the_newest_that_is_for_it() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "all-1", 1, "");
        write(dir.path(), "all-3", 3, "");
        write(dir.path(), "web-2", 2, "web");
        write(dir.path(), "web-3", 3, "web");
        write(dir.path(), "db-9", 9, "db");
        write(dir.path(), ".hidden", 99, "");
        let served = look(dir.path(), &Served::new()).unwrap();
        let of = |group: &str| {
            let newest = Policies::newest(&served, group).unwrap();
            (newest.version, newest.group.clone())
        };
        assert_eq!(of(""), (3, String::new()));
        assert_eq!(of("web"), (3, "web".to_owned()));
        assert_eq!(of("db"), (9, "db".to_owned()));
        assert_eq!(of("other"), (3, String::new()));
        assert!(Policies::newest(&Served::new(), "").is_none());
    }

    #[test]
    fn a_file_that_goes_bad_changes_nothing_and_one_that_goes_is_served_no_more() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "a", 4, "");
        let first = look(dir.path(), &Served::new()).unwrap();
        fs::write(dir.path().join("a"), b"half a bun").unwrap();
        fs::write(dir.path().join("b"), b"").unwrap();
        let second = look(dir.path(), &first).unwrap();
        assert_eq!(Policies::newest(&second, "").unwrap().version, 4);
        assert!(second["a"].error.contains("not a policy bundle") && !second["b"].error.is_empty());
        fs::remove_file(dir.path().join("a")).unwrap();
        let third = look(dir.path(), &second).unwrap();
        assert!(Policies::newest(&third, "").is_none());
    }
}
