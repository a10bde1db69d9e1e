//! Programs of other languages that tests drive, installed once below the target
//! folder.

use std::path::{Path, PathBuf};
use std::process::Command;

fn drivers() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/drivers")
}

pub fn script(name: &str) -> PathBuf {
    drivers().join(name)
}

/// The folder of `what` (see `tests/drivers/install`). Says why and gives none,
/// where it cannot be had.
pub fn installed(what: &str) -> Option<PathBuf> {
    // The program under test lies in TARGET/PROFILE.
    let target = Path::new(env!("CARGO_BIN_EXE_mcp-sensor")).ancestors().nth(2).unwrap();
    let mut command = Command::new(drivers().join("install"));
    let done = command.arg(what).env("MCP_SENSOR_TESTBED", target.join("testbed")).output().unwrap();
    if !done.status.success() {
        let why = String::from_utf8_lossy(&done.stderr);
        println!("SKIP: {what} cannot be installed here: {}", why.trim().replace('\n', "; "));
        return None;
    }
    let text = String::from_utf8(done.stdout).unwrap();
    Some(PathBuf::from(text.lines().last().unwrap()))
}
