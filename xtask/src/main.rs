//! The project's own commands: `cargo xtask COMMAND`.

mod build;
mod setup;
mod step;
mod toolchain;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Set up, build, demonstrate, test and measure mcp-sensor")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what building and testing need, where it is missing
    Setup,
    /// Build the kernel programs and target/release/mcp-sensor
    Build {
        /// Build user space without optimisation (target/debug/mcp-sensor)
        #[arg(long)]
        debug: bool,
        /// Build the kernel object only.
        #[arg(long)]
        kernel: bool,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.command {
        Task::Setup => setup::all(),
        Task::Build { kernel: true, .. } => build::kernel(),
        Task::Build { debug, .. } => build::all(debug),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
