//! Where cgroup v2 is mounted: `/sys/fs/cgroup`, or below it on hybrid hosts.

use procfs::process::Process;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("cannot read /proc/self/mountinfo: {0}")]
    Mounts(#[from] procfs::ProcError),
    #[error(
        "the root of cgroup v2 is not mounted here: mount -t cgroup2 none /sys/fs/cgroup/unified; in a container, \
         give it the host's /sys/fs/cgroup"
    )]
    Absent,
}

/// Inode of the root, which no other cgroup has (fs/kernfs/dir.c). What a cgroup
/// namespace shows as `/` may be any other.
const ROOT: u64 = 1;

/// The root of cgroup v2 as mounted here.
pub fn root() -> Result<PathBuf, CgroupError> {
    let mounts = Process::myself()?.mountinfo()?;
    mounts
        .into_iter()
        .find(|m| m.fs_type == "cgroup2" && fs::metadata(&m.mount_point).is_ok_and(|meta| meta.ino() == ROOT))
        .map(|m| m.mount_point)
        .ok_or(CgroupError::Absent)
}

/// How deep a cgroup is below the root of cgroup v2, and its id, which is the
/// inode of its directory (kernel/cgroup/cgroup.c, `cgroup_id`).
pub fn place(path: &Path) -> io::Result<(u32, u64)> {
    let path = fs::canonicalize(path)?;
    let root = root().map_err(io::Error::other)?;
    let below = path.strip_prefix(&root).map_err(|_| {
        io::Error::other(format!("it is not below {}, where cgroup v2 is mounted", root.display()))
    })?;
    Ok((below.components().count() as u32, fs::metadata(&path)?.ino()))
}

/// Whether a process is in the cgroup at `path`, or below it.
pub fn holds(path: &Path, pid: u32) -> bool {
    let Ok(root) = root() else { return false };
    let Ok(text) = fs::read_to_string(format!("/proc/{pid}/cgroup")) else { return false };
    let own = text.lines().find_map(|line| line.strip_prefix("0::/"));
    own.is_some_and(|own| root.join(own).starts_with(path))
}
