//! Where cgroup v2 is mounted: `/sys/fs/cgroup`, or below it on hybrid hosts.

use procfs::process::Process;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("cannot read /proc/self/mountinfo: {0}")]
    Mounts(#[from] procfs::ProcError),
    #[error("cgroup v2 is not mounted: mount it with `mount -t cgroup2 none /sys/fs/cgroup/unified`")]
    Absent,
}

/// The root of cgroup v2 as mounted here.
pub fn root() -> Result<PathBuf, CgroupError> {
    let mounts = Process::myself()?.mountinfo()?;
    mounts
        .into_iter()
        .find(|m| m.fs_type == "cgroup2" && m.root == "/")
        .map(|m| m.mount_point)
        .ok_or(CgroupError::Absent)
}
