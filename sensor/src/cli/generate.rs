//! `mcp-sensor completions` and `mcp-sensor man`.

use super::{Cli, CompletionsArgs, ManArgs, output};
use anyhow::Context;
use clap::CommandFactory;
use std::process::ExitCode;

pub(super) fn completions(args: &CompletionsArgs) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "mcp-sensor", &mut script);
    output::text(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn man(args: &ManArgs) -> anyhow::Result<ExitCode> {
    std::fs::create_dir_all(&args.dir).with_context(|| args.dir.display().to_string())?;
    clap_mangen::generate_to(Cli::command(), &args.dir).with_context(|| args.dir.display().to_string())?;
    Ok(ExitCode::SUCCESS)
}
