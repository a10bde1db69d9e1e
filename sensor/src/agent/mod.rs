//! The agent; merged from its own branch.

use crate::cli::RunArgs;
use std::process::ExitCode;

pub fn run(_args: RunArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("this build has no agent")
}
