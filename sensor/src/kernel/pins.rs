//! What is pinned below one state directory's pin directory, and which of it
//! counts.
//!
//! Every start builds a directory of its own (`new`), which counts from the
//! moment it is renamed (`v{ABI}_{number}`): maps are complete and every link is
//! attached by then. What an earlier start left is renamed (`old_…`) before the
//! first of its links goes. So at any moment a directory `v…` is whole, whatever
//! was interrupted.

use super::load::BPFFS;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use sensor_common::ABI;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Below it, each sensor pins in a directory of its own.
const ALL: &str = "mcp_sensor";
const LINKS: &str = "links";
const MAPS: &str = "maps";
/// Being built: never counts.
const NEW: &str = "new";
/// On its way out.
const OLD: &str = "old_";
/// Its packet hooks judge sockets that no descriptor led to.
const LINGERING: &str = "lingering_";
/// Links that stay while it lingers.
const PACKETS: [&str; 2] = ["egress", "ingress"];
/// An agent that was just killed may hold the directory a moment longer.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum PinsError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("a sensor runs that holds {0}")]
    Held(PathBuf),
}

fn at(path: &Path) -> impl Fn(io::Error) -> PinsError {
    move |source| PinsError::Io { path: path.to_path_buf(), source }
}

/// Where all sensors of this host pin.
pub fn all() -> PathBuf {
    Path::new(BPFFS).join(ALL)
}

/// The pin directory of one sensor. Whoever has it is the only one: the lock is
/// the kernel's, and goes with the process.
pub struct Pins {
    root: PathBuf,
    _lock: Option<Flock<File>>,
}

impl Pins {
    /// Makes the directory if there is none.
    pub fn take(root: &Path) -> Result<Pins, PinsError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            fs::create_dir_all(root).map_err(at(root))?;
            let dir = File::open(root).map_err(at(root))?;
            match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
                // Released by somebody else since it was opened: again.
                Ok(lock) if !is_at(&lock, root) => {}
                Ok(lock) => return Ok(Pins { root: root.to_path_buf(), _lock: Some(lock) }),
                Err((_, Errno::EWOULDBLOCK)) if Instant::now() >= deadline => {
                    return Err(PinsError::Held(root.to_path_buf()));
                }
                Err((_, Errno::EWOULDBLOCK)) => std::thread::sleep(Duration::from_millis(50)),
                Err((_, e)) => return Err(at(root)(e.into())),
            }
        }
    }

    /// Although a sensor may hold it.
    pub fn seize(root: &Path) -> Pins {
        Pins { root: root.to_path_buf(), _lock: None }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Directories that are whole, the one that counts first.
    fn whole(&self) -> Result<Vec<(u64, PathBuf)>, PinsError> {
        let mut whole = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(at(&self.root))? {
            let path = entry.map_err(at(&self.root))?.path();
            if let Some(number) = path.file_name().and_then(|n| number(n.to_str()?)) {
                whole.push((number, path));
            }
        }
        whole.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
        Ok(whole)
    }

    /// What an earlier start left, with its maps.
    pub fn current(&self) -> Result<Option<Taken>, PinsError> {
        Ok(self.whole()?.into_iter().next().map(|(_, dir)| Taken { dir }))
    }

    /// An empty directory for this start. What others were interrupted at is
    /// removed: what counts is whole without it.
    pub fn begin(&self) -> Result<Building, PinsError> {
        for entry in fs::read_dir(&self.root).map_err(at(&self.root))? {
            let path = entry.map_err(at(&self.root))?.path();
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            if name == NEW || name.starts_with(OLD) {
                remove(&path)?;
            }
        }
        let dir = self.root.join(NEW);
        for sub in [LINKS, MAPS] {
            let sub = dir.join(sub);
            fs::create_dir_all(&sub).map_err(at(&sub))?;
        }
        Ok(Building { dir })
    }

    /// From here on `building` counts, and the rest goes. `linger`: the packet
    /// hooks of what it takes over from stay.
    pub fn commit(&self, building: &Building, linger: bool) -> Result<(), PinsError> {
        let before = self.whole()?;
        let next = before.first().map_or(1, |(number, _)| number + 1);
        let own = self.root.join(format!("v{ABI}_{next}"));
        fs::rename(&building.dir, &own).map_err(at(&own))?;
        for (index, (number, dir)) in before.into_iter().enumerate() {
            if index == 0 && linger {
                let stays = self.root.join(format!("{LINGERING}{number}"));
                fs::rename(&dir, &stays).map_err(at(&dir))?;
                unlink(&stays.join(LINKS), |name| !PACKETS.contains(&hook_of(name)))?;
            } else {
                let going = self.root.join(format!("{OLD}{number}"));
                fs::rename(&dir, &going).map_err(at(&dir))?;
                remove(&going)?;
            }
        }
        Ok(())
    }

    /// Packet hooks of earlier versions that still judge.
    pub fn lingering(&self) -> Result<Vec<PathBuf>, PinsError> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(at(&self.root))? {
            let path = entry.map_err(at(&self.root))?.path();
            if path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(LINGERING)) {
                found.push(path);
            }
        }
        Ok(found)
    }

    pub fn remove_lingering(&self) -> Result<(), PinsError> {
        self.lingering()?.iter().try_for_each(|dir| remove(dir))
    }

    /// Takes everything out of the kernel.
    pub fn release(self) -> Result<Released, PinsError> {
        let mut released = Released::default();
        for entry in fs::read_dir(&self.root).map_err(at(&self.root))? {
            let dir = entry.map_err(at(&self.root))?.path();
            released.links += entries(&dir.join(LINKS));
            released.maps += entries(&dir.join(MAPS));
            remove(&dir)?;
        }
        fs::remove_dir(&self.root).map_err(at(&self.root))?;
        // Only if no other sensor left something there.
        if let Some(parent) = self.root.parent() {
            let _ = fs::remove_dir(parent);
        }
        Ok(released)
    }
}

impl Drop for Pins {
    /// Nothing is left of a directory in which nothing is pinned.
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.root);
    }
}

/// How much was pinned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Released {
    pub links: usize,
    pub maps: usize,
}

/// A directory that is not in force yet.
pub struct Building {
    dir: PathBuf,
}

impl Drop for Building {
    /// A start that failed leaves nothing attached.
    fn drop(&mut self) {
        if self.dir.exists()
            && let Err(error) = remove(&self.dir)
        {
            tracing::warn!(%error, "what a failed start pinned stays behind until the next");
        }
    }
}

impl Building {
    pub fn map(&self, name: &str) -> PathBuf {
        self.dir.join(MAPS).join(name)
    }

    pub fn link(&self, hook: &str) -> PathBuf {
        self.dir.join(LINKS).join(hook)
    }
}

/// What an earlier start left in force.
pub struct Taken {
    dir: PathBuf,
}

impl Taken {
    pub fn map(&self, name: &str) -> PathBuf {
        self.dir.join(MAPS).join(name)
    }
}

fn number(name: &str) -> Option<u64> {
    name.strip_prefix('v')?.split_once('_')?.1.parse().ok()
}

/// bpffs knows no dots; what follows an underscore is not the hook's name.
fn hook_of(name: &str) -> &str {
    name.split_once('_').map_or(name, |(hook, _)| hook)
}

fn is_at(dir: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    match (dir.metadata(), fs::metadata(path)) {
        (Ok(open), Ok(there)) => (open.dev(), open.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).map_or(0, Iterator::count)
}

fn unlink(dir: &Path, which: impl Fn(&str) -> bool) -> Result<(), PinsError> {
    for entry in fs::read_dir(dir).map_err(at(dir))? {
        let path = entry.map_err(at(dir))?.path();
        if path.file_name().is_some_and(|n| which(&n.to_string_lossy())) {
            fs::remove_file(&path).map_err(at(&path))?;
        }
    }
    Ok(())
}

/// Links first, or programs would judge by maps that nobody can reach.
fn remove(dir: &Path) -> Result<(), PinsError> {
    for sub in [LINKS, MAPS] {
        let sub = dir.join(sub);
        if sub.exists() {
            unlink(&sub, |_| true)?;
            fs::remove_dir(&sub).map_err(at(&sub))?;
        }
    }
    fs::remove_dir(dir).map_err(at(dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names alone: any file system does for them.
    fn start(pins: &Pins, linger: bool) {
        let building = pins.begin().expect("begin");
        for hook in ["egress", "fork"] {
            File::create(building.link(hook)).expect("link");
        }
        File::create(building.map("TASKS")).expect("map");
        pins.commit(&building, linger).expect("commit");
    }

    fn names(root: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(root)
            .expect("root")
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    fn killed(building: Building) {
        std::mem::forget(building);
    }

    #[test]
    fn what_was_interrupted_never_counts_and_what_counts_is_never_removed_first() {
        let dir = tempfile::tempdir().expect("dir");
        let pins = Pins::take(&dir.path().join("pins")).expect("take");
        assert!(pins.current().expect("current").is_none());
        start(&pins, false);
        // Killed while the next was being built, and before that while an old one went.
        let building = pins.begin().expect("begin");
        File::create(building.link("egress")).expect("link");
        killed(building);
        fs::create_dir(pins.root().join("old_7")).expect("old");
        assert_eq!(pins.current().expect("current").expect("the first").map("TASKS"), {
            pins.root().join(format!("v{ABI}_1")).join("maps/TASKS")
        });
        start(&pins, false);
        assert_eq!(names(pins.root()), [format!("v{ABI}_2")]);
        // Killed between the two renames: the newer counts.
        fs::create_dir(pins.root().join("v1_1")).expect("older");
        assert!(
            pins.current()
                .expect("current")
                .expect("it")
                .map("X")
                .starts_with(pins.root().join(format!("v{ABI}_2")))
        );
    }

    #[test]
    fn only_packet_hooks_linger() {
        let dir = tempfile::tempdir().expect("dir");
        let pins = Pins::take(&dir.path().join("pins")).expect("take");
        start(&pins, false);
        start(&pins, true);
        assert_eq!(names(&pins.root().join("lingering_1/links")), ["egress"]);
        assert_eq!(names(pins.root()), ["lingering_1".to_owned(), format!("v{ABI}_2")]);
        start(&pins, false);
        assert_eq!(pins.lingering().expect("lingering").len(), 1, "a start leaves it");
        pins.remove_lingering().expect("remove");
        let released = pins.release().expect("release");
        assert_eq!(released, Released { links: 2, maps: 1 });
        assert!(!dir.path().join("pins").exists());
    }

    #[test]
    fn one_sensor_holds_a_directory() {
        let dir = tempfile::tempdir().expect("dir");
        let root = dir.path().join("pins");
        let pins = Pins::take(&root).expect("take");
        assert!(matches!(Pins::take(&root), Err(PinsError::Held(_))));
        drop(pins);
        Pins::take(&root).expect("free again");
    }
}
