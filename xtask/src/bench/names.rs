//! What it costs to be held to names: a section of docs/figures.md of its own.

use std::process::Command;

use anyhow::Result;

use super::report;
use crate::{
    build, setup,
    step::{self, Step, say},
    test, toolchain, workspace,
};

const SECTION: &str = "## Names\n";

pub(super) fn all(rounds: usize, print_only: bool) -> Result<()> {
    setup::build_tools()?;
    if !setup::on_path("squid")
        && let Err(error) = setup::apt_without_service(&["squid"])
    {
        say(format!("no proxy to compare with: {error:#}"));
    }
    build::all(false)?;
    step::run_visible(toolchain::cargo().args([
        "build",
        "--release",
        "--package",
        "xtask",
        "--bin",
        "names",
        "--target-dir",
        "target",
    ]))?;
    test::mount_bpffs()?;
    let step = Step::start(format!("{rounds} interleaved rounds"));
    let section = step::output(
        Command::new(workspace::target().join("release/names"))
            .args(["report", "--rounds", &rounds.to_string()])
            .env("MCP_SENSOR_BIN", workspace::sensor_binary(false)),
    )?;
    step.done();
    report::publish(SECTION, &section, print_only)
}
