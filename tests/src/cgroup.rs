//! A cgroup v2 subtree of a test's own. A sensor attached there cannot touch
//! the machine's other processes, not even if it is wrong.

use anyhow::{Context, Result, bail};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const PARENT: &str = "mcp-sensor-tests";

/// Removed on drop, with every process that is still in it.
pub struct Subtree {
    path: PathBuf,
}

impl Subtree {
    pub fn new() -> Result<Subtree> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let parent = mount_point()?.join(PARENT);
        let name = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = parent.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Subtree { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A process that writes `0` here is in the subtree.
    pub fn entrance(&self) -> Result<OwnedFd> {
        let procs = self.path.join("cgroup.procs");
        let file = fs::OpenOptions::new().write(true).open(&procs);
        Ok(file.with_context(|| format!("cannot open {}", procs.display()))?.into())
    }

    pub fn processes(&self) -> Result<Vec<u32>> {
        let text = fs::read_to_string(self.path.join("cgroup.procs"))?;
        Ok(text.lines().filter_map(|l| l.parse().ok()).collect())
    }

    /// Kills every process in the subtree and waits for the last to go.
    pub fn clear(&self) -> Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1").context("cgroup.kill")?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.processes()?.is_empty() {
            if Instant::now() > deadline {
                bail!("processes do not leave {}", self.path.display());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

impl Drop for Subtree {
    fn drop(&mut self) {
        let removed = self.clear().and_then(|()| {
            let deadline = Instant::now() + Duration::from_secs(5);
            loop {
                match fs::remove_dir(&self.path) {
                    Ok(()) => return Ok(()),
                    Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                    Err(e) => return Err(e.into()),
                }
            }
        });
        if let Err(e) = removed {
            eprintln!("{} stays behind: {e:#}", self.path.display());
        }
    }
}

/// Where cgroup v2 is mounted: `/sys/fs/cgroup`, or below it on hybrid hosts.
pub fn mount_point() -> Result<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("/proc/self/mountinfo")?;
    find_mount(&table).context("no cgroup v2 is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

/// proc(5): `... mount-point options [tags] - type source options`.
fn find_mount(table: &str) -> Option<PathBuf> {
    table.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        (right.split(' ').next()? == "cgroup2").then(|| left.split(' ').nth(4).map(PathBuf::from))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_on_hybrid_hosts() {
        let table = "40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd\n\
                     41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_mount(table), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(find_mount("31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"), None);
    }
}
