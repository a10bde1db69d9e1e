//! What `cargo xtask bench stdio` measures: tool calls of a server whose stdio
//! is read, beside the same without a sensor and behind a proxy; what everyone
//! else pays for it; how much can be read. `stdio report` prints a section of
//! docs/figures.md; the other roles are what it starts in between.

mod agent;
mod client;
mod figures;
mod others;
mod pipelines;
mod proxy;
mod round_trip;
mod server;
mod sustained;
mod unknown;

use std::{
    path::PathBuf,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use nix::sched::{CloneFlags, unshare};

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Measures, prints Markdown
    Report(Report),
    /// An MCP server that answers and does nothing else
    Echo,
    /// One that answers each call with a result of so many bytes
    Results { bytes: usize },
    /// One that tries to connect from its first message on
    Connecting,
    /// Times calls that have nothing to do with any server
    Others {
        #[arg(long)]
        milliseconds: u64,
    },
    /// Runs pipelines of a shell
    Pipelines { count: usize },
}

#[derive(clap::Args)]
struct Report {
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// The program of server-everything
    #[arg(long)]
    everything: PathBuf,
    /// The program of mcp-proxy; without it nothing is compared
    #[arg(long)]
    proxy: Option<PathBuf>,
    /// How the sensor reads; without it as it sees fit
    #[arg(long)]
    capture: Option<String>,
    /// Only these
    #[arg(long, value_delimiter = ',')]
    parts: Vec<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    RoundTrip,
    Others,
    Sustained,
    Pipelines,
    Unknown,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().role {
        Role::Report(report) => all(&report).map(|text| print!("{text}")),
        Role::Echo => server::echo(),
        Role::Results { bytes } => server::results(bytes),
        Role::Connecting => server::connecting(),
        Role::Others { milliseconds } => others::measure(milliseconds),
        Role::Pipelines { count } => pipelines::run(count),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stdio: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn all(report: &Report) -> Result<String> {
    ensure!(report.rounds > 0, "no rounds: nothing to report");
    // The proxy's port and the servers' connections are nobody else's.
    unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace: needs root")?;
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("cannot start ip")?;
    ensure!(up.success(), "ip link set lo up: {up}");
    let another_before = agent::another();
    let asked = |part| report.parts.is_empty() || report.parts.contains(&part);
    let mut budgets = figures::Budgets::default();
    let mut text = String::new();
    if asked(Part::RoundTrip) {
        text += &round_trip::report(report, &mut budgets)?;
    }
    if asked(Part::Others) {
        text += &others::report(report)?;
    }
    if asked(Part::Sustained) {
        text += &sustained::report(report)?;
    }
    if asked(Part::Pipelines) {
        text += &pipelines::report(report)?;
    }
    if asked(Part::Unknown) {
        text += &unknown::report(report, &mut budgets)?;
    }
    if another_before || agent::another_stays() {
        text += "\nAnother sensor's programs were loaded on this machine: what is said to be without a sensor is not.\n";
    }
    Ok(format!("{}{text}", budgets.table(report)))
}
