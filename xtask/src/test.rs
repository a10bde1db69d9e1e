//! Every test, and one closing line that sums them.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    mount::{MsFlags, mount},
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use crate::{
    build, dist, fuzz, setup,
    step::{self, say},
    tally::Tally,
    toolchain, vm, workspace,
};

/// How long each target is fuzzed.
const SMOKE: Duration = Duration::from_secs(3);
const FULL: Duration = Duration::from_secs(60);

pub(crate) struct Options {
    pub(crate) full: bool,
    pub(crate) filter: Option<String>,
}

pub(crate) fn all(options: &Options) -> Result<()> {
    let since = Instant::now();
    setup::all()?;
    step::headline("build");
    build::all(false)?;
    let mut sum = Tally::default();
    step::headline("unit and property tests");
    stage(&mut sum, "unit and property tests", unit(options));
    step::headline("end-to-end tests");
    stage(&mut sum, "end-to-end tests", end_to_end(options));
    if options.filter.is_none() {
        step::headline("fuzz targets");
        let time = if options.full { FULL } else { SMOKE };
        stage(&mut sum, "fuzz targets", fuzz::all(time));
    }
    if !options.full && options.filter.is_none() {
        step::headline("a kernel in a virtual machine");
        stage(&mut sum, "a kernel in a virtual machine", vm::quick());
    }
    if options.full && options.filter.is_none() {
        step::headline("kernels in virtual machines");
        stage(&mut sum, "kernels in virtual machines", vm::all());
        step::headline("the package in a clean system");
        stage(&mut sum, "the package in a clean system", dist::test());
    }
    if !sum.reasons.is_empty() {
        println!("skipped:");
        for reason in &sum.reasons {
            println!("  {reason}");
        }
    }
    say(format!("took {}", step::seconds(since.elapsed())));
    println!("{sum}");
    if sum.failed > 0 {
        bail!("{} failed", sum.failed);
    }
    Ok(())
}

/// A stage that cannot even run counts as one failure and stops no other.
fn stage(sum: &mut Tally, what: &str, outcome: Result<Tally>) {
    match outcome {
        Ok(tally) => {
            say(format!("{what}: {tally}"));
            sum.add(tally);
        }
        Err(error) => {
            eprintln!("{what}: {error:#}");
            sum.failed += 1;
        }
    }
}

const UNIT: &[&str] = &["--workspace", "--exclude", "sensor-ebpf", "--exclude", "mcp-sensor-tests"];

fn unit(options: &Options) -> Result<Tally> {
    let kinds = ["--lib", "--bins", "--tests"];
    step::run_visible(toolchain::cargo().args(["test", "--no-run"]).args(UNIT).args(kinds))?;
    let mut command = toolchain::cargo();
    if setup::on_path("cargo-nextest") {
        command.args(["nextest", "run", "--no-fail-fast", "--status-level", "fail", "--no-tests", "pass"]);
        command.args(UNIT).args(kinds);
        if options.full {
            command.args(["--run-ignored", "all"]);
        }
        command.args(&options.filter);
    } else {
        command.args(["test", "--no-fail-fast"]).args(UNIT).args(kinds).arg("--").arg("--quiet");
        if options.full {
            command.arg("--include-ignored");
        }
        command.args(&options.filter);
    }
    run(&mut command, options.full)
}

fn end_to_end(options: &Options) -> Result<Tally> {
    let package = ["--package", "mcp-sensor-tests"];
    step::run_visible(toolchain::cargo().args(["test", "--no-run"]).args(package))?;
    // The attempts that tests start and the clock that they step are of the same package.
    step::run_visible(toolchain::cargo().args(["build", "--bins", "--examples"]).args(package))?;
    let mut command = toolchain::cargo();
    command.args(["test", "--no-fail-fast"]).args(package).args(["--lib", "--bins", "--tests", "--"]);
    if !nix::unistd::geteuid().is_root() {
        let list = step::output(command.arg("--list").args(&options.filter))?;
        let mut tally = Tally::default();
        for name in list.lines().filter_map(|line| line.strip_suffix(": test")) {
            tally.skip(format!("{name}: not root (it makes namespaces and loads kernel programs)"));
        }
        return Ok(tally);
    }
    mount_bpffs()?;
    command.arg("--show-output");
    if options.full {
        command.arg("--include-ignored").env("MCP_SENSOR_OTHER_BIN", build::other_layout(false)?);
    }
    command.args(&options.filter).env("MCP_SENSOR_BIN", workspace::sensor_binary(false));
    run(&mut command, options.full)
}

/// A runner that takes longer hangs; without this, so would whoever waits.
const LIMIT: Duration = Duration::from_secs(40 * 60);
const FULL_LIMIT: Duration = Duration::from_secs(90 * 60);

/// Runs a test runner, shows its output and counts what it reports.
fn run(command: &mut Command, full: bool) -> Result<Tally> {
    let limit = if full { FULL_LIMIT } else { LIMIT };
    // nextest reports on stderr, libtest on stdout: one pipe for both.
    let (reader, writer) = std::io::pipe()?;
    let mut child = command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()
        .context("cargo")?;
    let group = Pid::from_raw(child.id() as i32);
    let (done, waits) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        let expired = waits.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout);
        if expired {
            let _ = killpg(group, Signal::SIGKILL);
        }
        expired
    });
    // The command holds the write ends; the pipe must end with the child.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut tally = Tally::default();
    for line in BufReader::new(reader).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        tally.read(&line);
        println!("{line}");
    }
    let status = child.wait()?;
    drop(done);
    if watchdog.join().unwrap_or(false) {
        bail!("no end within {}: killed; so far {tally}", step::seconds(limit));
    }
    if !status.success() && tally.failed == 0 {
        bail!("the test runner ended with {status} before it could report");
    }
    Ok(tally.close())
}

/// Pinned maps and links live in bpffs; containers and rescue systems come
/// without it.
pub(crate) fn mount_bpffs() -> Result<()> {
    const WHERE: &str = "/sys/fs/bpf";
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    if mounts
        .lines()
        .any(|line| line.split(' ').nth(1) == Some(WHERE) && line.split(' ').nth(2) == Some("bpf"))
    {
        return Ok(());
    }
    say(format!("mounting bpffs at {WHERE}"));
    mount(Some("bpf"), Path::new(WHERE), Some("bpf"), MsFlags::empty(), Some("mode=700"))
        .with_context(|| format!("cannot mount bpffs at {WHERE}: mount -t bpf bpf {WHERE}"))
}
