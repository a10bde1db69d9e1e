//! Links that a sensor pinned, and their end behind its back.

use anyhow::{Context, Result, bail};
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// The link of a hook, somewhere below a pin directory.
pub fn pinned(dir: &Path, hook: &str) -> Result<PathBuf> {
    for entry in fs::read_dir(dir)?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if let Ok(found) = pinned(&path, hook) {
                return Ok(found);
            }
        } else if path.ends_with(Path::new("links").join(hook)) {
            return Ok(path);
        }
    }
    bail!("no link of {hook} below {}", dir.display())
}

fn bpf(command: i64, attr: &[u64; 18]) -> io::Result<i64> {
    // SAFETY: the attribute is as long as announced, and its pointer lives.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), size_of_val(attr)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done) }
}

/// As `bpftool link detach` does.
pub fn detach(link: &Path) -> Result<()> {
    const BPF_OBJ_GET: i64 = 7;
    const BPF_LINK_DETACH: i64 = 34;
    let path = CString::new(link.as_os_str().as_bytes())?;
    let mut attr = [0; 18];
    attr[0] = path.as_ptr() as u64;
    let fd = bpf(BPF_OBJ_GET, &attr).context("BPF_OBJ_GET")?;
    let mut attr = [0; 18];
    attr[0] = fd as u64;
    bpf(BPF_LINK_DETACH, &attr).context("BPF_LINK_DETACH")?;
    Ok(())
}
