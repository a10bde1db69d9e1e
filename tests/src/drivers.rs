//! Real programs that tests drive: installed once below `target/testbed`.

use crate::run::Running;
use anyhow::{Context, Result, ensure};
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A cold install over a slow line.
const INSTALL: Duration = Duration::from_secs(300);

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("drivers")
}

pub fn script(name: &str) -> PathBuf {
    folder().join(name)
}

/// What: see `tests/drivers/install`. The error says why it
/// cannot be had here.
pub fn installed(what: &str) -> Result<PathBuf> {
    let mut command = Command::new(folder().join("install"));
    command.arg(what).env("MCP_SENSOR_TESTBED", crate::sensor::target()?.join("testbed"));
    let done = Running::start(command)?.finish(INSTALL)?;
    ensure!(done.status.success(), "install {what}: {} {}", done.status, done.stderr.trim());
    done.lines.last().map(PathBuf::from).context("install prints no folder")
}

/// Where a program lies on this machine's PATH.
pub fn found(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|p| p.join(program)).find(|p| p.is_file())
}

/// Gives `command` an `/etc/resolv.conf` of its own, in a mount namespace.
pub fn with_resolver(command: &mut Command, folder: &Path, nameserver: std::net::IpAddr) -> Result<()> {
    use nix::mount::{MsFlags, mount};
    use std::os::unix::process::CommandExt;
    let file = folder.join("resolv.conf");
    std::fs::write(&file, format!("nameserver {nameserver}\noptions timeout:1 attempts:1\n"))?;
    let file = CString::new(file.as_os_str().as_encoded_bytes())?;
    let none: Option<&str> = None;
    let hook = move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(Some(file.as_c_str()), "/etc/resolv.conf", none, MsFlags::MS_BIND, none)?;
        Ok(())
    };
    // SAFETY: between fork and exec only system calls on memory that the
    // closure owns; nix copies short paths to the stack, not to the heap.
    unsafe { command.pre_exec(hook) };
    Ok(())
}

/// Gives `command` an empty folder in place of `path`, in a mount namespace.
pub fn with_empty_folder(command: &mut Command, path: &'static std::ffi::CStr) {
    use nix::mount::{MsFlags, mount};
    use std::os::unix::process::CommandExt;
    let none: Option<&str> = None;
    let hook = move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(Some("none"), path, Some("tmpfs"), MsFlags::empty(), none)?;
        Ok(())
    };
    // SAFETY: between fork and exec only system calls on constants.
    unsafe { command.pre_exec(hook) };
}
