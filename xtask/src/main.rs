//! The project's own commands: `cargo xtask COMMAND`.

mod bench;
mod build;
mod demo;
mod dist;
mod fuzz;
mod lint;
mod setup;
mod step;
mod tally;
mod test;
mod testbed;
mod toolchain;
mod vm;
mod workspace;

use std::{process::ExitCode, time::Duration};

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
        /// Build the kernel object only
        #[arg(long)]
        kernel: bool,
        /// Build target/other-layout/mcp-sensor, whose maps are laid out differently: for tests of upgrades
        #[arg(long)]
        other_layout: bool,
    },
    /// Real servers held to a policy, before your eyes
    Demo,
    /// Every test; closes with one line that sums them
    Test {
        /// Ignored tests, a minute per fuzz target, kernels in virtual machines
        #[arg(long)]
        full: bool,
        /// Only tests whose name contains this
        filter: Option<String>,
    },
    /// Format, clippy, licences
    Lint {
        /// Install cargo-deny below target/ where it is missing
        #[arg(long)]
        install: bool,
    },
    /// Measure what the sensor costs; writes docs/figures.md
    Bench {
        /// Only these
        operations: Vec<bench::Operation>,
        /// Only under these
        #[arg(long, value_delimiter = ',')]
        settings: Vec<bench::Setting>,
        /// Interleaved rounds
        #[arg(long, default_value_t = 7)]
        rounds: usize,
        /// How long one operation runs in one round
        #[arg(long, default_value_t = 400)]
        milliseconds: u64,
        /// How long the collector is away in `feed`, seconds
        #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..))]
        outage: u64,
        /// Leave docs/figures.md as it is
        #[arg(long)]
        print_only: bool,
    },
    /// Boot Debian's kernels under QEMU with the sensor in them
    Vm {
        /// Only this series (5.10, 6.1, 6.12, newest)
        series: Option<String>,
        /// The Debian package under a systemd that boots, instead
        #[arg(long, conflicts_with_all = ["series", "quick", "veristat", "output"])]
        systemd: bool,
        /// Fewer claims
        #[arg(long)]
        quick: bool,
        /// Write docs/verifier.md
        #[arg(long)]
        veristat: bool,
        /// The table as text, or everything as JSON
        #[arg(short, long, value_parser = ["text", "json"], default_value = "text")]
        output: String,
    },
    /// Make what is handed out, in target/dist: package, image, SBOM, sums
    Dist {
        /// Only this part
        part: Option<dist::Part>,
        /// Then install, upgrade, remove and purge the package in a clean Debian
        #[arg(long)]
        test: bool,
    },
    /// Fuzz one target, or each in turn
    Fuzz {
        target: Option<String>,
        /// Seconds for each target
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.command {
        Task::Setup => setup::all(),
        Task::Build { kernel: true, .. } => build::kernel(),
        Task::Build { other_layout: true, debug, .. } => build::other_layout(debug).map(drop),
        Task::Build { debug, .. } => build::all(debug),
        Task::Demo => demo::all(),
        Task::Test { full, filter } => test::all(&test::Options { full, filter }),
        Task::Lint { install } => lint::all(install),
        Task::Bench { operations, settings, rounds, milliseconds, outage, print_only } => {
            bench::all(&bench::Options { operations, settings, rounds, milliseconds, outage, print_only })
        }
        Task::Vm { systemd: true, .. } => vm::under_systemd(),
        Task::Vm { series, quick, veristat, output, .. } => {
            let json = output == "json";
            vm::run(&vm::Options { series: series.as_deref(), quick, veristat, json })
        }
        Task::Dist { part, test } => dist::run(part, test),
        Task::Fuzz { target: Some(name), seconds } => fuzz::named(&name, Duration::from_secs(seconds)),
        Task::Fuzz { target: None, seconds } => fuzz::every(Duration::from_secs(seconds)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
