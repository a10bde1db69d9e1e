//! What it costs that servers' stdio is read: a section of docs/figures.md of
//! its own.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Result, bail};

use super::report;
use crate::{
    build, setup,
    step::{self, Step, say},
    test, testbed, toolchain, workspace,
};

const SECTION: &str = "## Stdio\n";
/// A proxy that people put in front of stdio servers (PyPI).
const PROXY: &str = "mcp-proxy==0.13.0";

pub(super) fn all(rounds: usize, print_only: bool) -> Result<()> {
    if std::thread::available_parallelism()?.get() < 2 {
        bail!("one CPU only: client and agent need one each");
    }
    setup::build_tools()?;
    let testbed = testbed::install()?;
    let proxy = proxy();
    build::all(false)?;
    step::run_visible(toolchain::cargo().args([
        "build",
        "--release",
        "--package",
        "xtask",
        "--bin",
        "stdio",
        "--target-dir",
        "target",
    ]))?;
    test::mount_bpffs()?;
    let step = Step::start(format!("{rounds} interleaved rounds"));
    let mut command = Command::new(workspace::target().join("release/stdio"));
    command.args(["report", "--rounds", &rounds.to_string(), "--everything"]).arg(&testbed.everything);
    match &proxy {
        Ok(path) => drop(command.arg("--proxy").arg(path)),
        Err(error) => say(format!("no proxy to compare with: {error:#}")),
    }
    let section = step::output(command.env("MCP_SENSOR_BIN", workspace::sensor_binary(false)))?;
    step.done();
    let section = format!("{}.\n\n{section}", report::machine()?);
    report::publish(SECTION, &section, print_only)
}

/// Installed once, in a virtual environment of its own: it wants another
/// version of the SDK than the real servers.
fn proxy() -> Result<PathBuf> {
    let dir = workspace::target().join("bench/proxy");
    let program = dir.join("bin/mcp-proxy");
    let stamp = dir.join("installed");
    let works = || step::succeeds(Command::new(&program).arg("--help"));
    if fs::read_to_string(&stamp).is_ok_and(|there| there == PROXY) && works() {
        say(format!("{PROXY}: there"));
        return Ok(program);
    }
    let _ = fs::remove_dir_all(&dir);
    step::run("python3 -m venv", Command::new("python3").args(["-m", "venv"]).arg(&dir))?;
    step::run(
        &format!("pip install {PROXY}"),
        Command::new(dir.join("bin/pip")).args(["install", "--disable-pip-version-check", PROXY]),
    )?;
    if !works() {
        bail!("{PROXY} was installed but does not start; see {}", dir.display());
    }
    fs::write(&stamp, PROXY)?;
    Ok(program)
}
