//! Fuzz targets, built as libFuzzer programs by the pinned stable compiler.
//!
//! `fuzz/` has the layout of cargo-fuzz; what that program adds (instrumentation
//! flags, the target triple) is done here, because it wants a nightly compiler.

use std::{fs, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, Result, bail};

use crate::{
    step::{self, Step},
    tally::Tally,
    toolchain, workspace,
};

/// The coverage instrumentation of `cargo fuzz`. No sanitizer: the parsers are
/// safe code, what can go wrong in them panics, hangs or eats memory.
const INSTRUMENT: &[&str] = &[
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
];

/// Inputs beyond this say nothing that a shorter one does not.
const MAX_LEN: usize = 64 * 1024;
/// Of one process; a parser that eats more is a finding.
const MEMORY_MIB: u32 = 1024;

fn directory() -> PathBuf {
    workspace::root().join("fuzz")
}

pub(crate) fn targets() -> Result<Vec<String>> {
    let sources = directory().join("fuzz_targets");
    let mut names: Vec<_> = fs::read_dir(&sources)
        .with_context(|| format!("cannot read {}", sources.display()))?
        .flatten()
        .filter_map(|entry| {
            let path = entry.path();
            (path.extension()? == "rs").then(|| path.file_stem().map(|n| n.to_string_lossy().into_owned()))?
        })
        .collect();
    names.sort();
    Ok(names)
}

/// Builds all targets and runs each over its corpus for that long.
pub(crate) fn all(time: Duration) -> Result<Tally> {
    let names = targets()?;
    let programs = build()?;
    let mut tally = Tally::default();
    for name in names {
        let outcome = one(&programs, &name, time);
        tally.count(outcome.is_ok());
        if let Err(error) = outcome {
            eprintln!("fuzz {name}: {error:#}");
        }
    }
    Ok(tally)
}

pub(crate) fn every(time: Duration) -> Result<()> {
    let tally = all(time)?;
    println!("{tally}");
    if tally.failed > 0 {
        bail!("{} of the fuzz targets found something", tally.failed);
    }
    Ok(())
}

pub(crate) fn named(name: &str, time: Duration) -> Result<()> {
    let names = targets()?;
    if !names.iter().any(|there| there == name) {
        bail!("no fuzz target `{name}`; there are: {}", names.join(", "));
    }
    one(&build()?, name, time)
}

/// The folder of the built programs.
fn build() -> Result<PathBuf> {
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let target = workspace::target().join("fuzz");
    step::run_visible(
        toolchain::cargo()
            .current_dir(directory())
            // A triple keeps the flags away from build scripts and macros.
            .args(["build", "--release", "--bins", "--target", &triple, "--target-dir"])
            .arg(&target)
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", INSTRUMENT.join("\u{1f}"))
            .env_remove("RUSTFLAGS"),
    )?;
    Ok(target.join(triple).join("release"))
}

fn one(programs: &std::path::Path, name: &str, time: Duration) -> Result<()> {
    let committed = directory().join("corpus").join(name);
    if fs::read_dir(&committed).map_or(0, Iterator::count) == 0 {
        bail!("{} has no input: commit a corpus", committed.display());
    }
    // libFuzzer adds what it finds to the first folder: not to the committed one.
    let found = workspace::target().join("fuzz/corpus").join(name);
    let artifacts = workspace::target().join("fuzz/artifacts").join(name);
    fs::create_dir_all(&found)?;
    fs::create_dir_all(&artifacts)?;
    let step = Step::start(format!("fuzz {name}, {} s", time.as_secs()));
    let log = artifacts.join("log");
    let status = Command::new(programs.join(name))
        .arg(&found)
        .arg(&committed)
        .arg(format!("-max_total_time={}", time.as_secs()))
        .arg(format!("-max_len={MAX_LEN}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
        .args(["-timeout=10", "-print_final_stats=1"])
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .env("RUST_BACKTRACE", "0")
        .stderr(fs::File::create(&log)?)
        .stdout(fs::File::options().append(true).open(&log)?)
        .status()
        .with_context(|| format!("cannot start fuzz target {name}"))?;
    let said = fs::read(&log).map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default();
    if !status.success() {
        step.failed();
        bail!("found something; the input lies in {}\n{}", artifacts.display(), reason(&said));
    }
    let runs = said
        .lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))
        .map_or("?", str::trim);
    step.detail(runs);
    step.done();
    step::say(format!("  {runs} inputs"));
    Ok(())
}

/// What broke, without the thirty frames of libFuzzer that follow.
fn reason(log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    let from = lines
        .iter()
        .position(|line| line.contains("panicked at") || line.contains("ERROR: "))
        .unwrap_or(lines.len().saturating_sub(12));
    let written = lines.iter().find(|line| line.contains("Test unit written to"));
    lines[from..].iter().take(12).chain(written).copied().collect::<Vec<_>>().join("\n")
}
