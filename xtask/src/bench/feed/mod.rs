//! The feed: what a sensor and a collector carry, what a fleet makes of one
//! collector, what an outage leaves, what outputs take, and what people have
//! today. A section of docs/figures.md of its own.

mod fleet;
mod outage;
mod outputs;
mod today;

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use super::{Options, flood, quiet_network, release, report, scale::Row};
use crate::{
    build, setup,
    step::{self, Step, say},
    test, workspace,
};

const SECTION: &str = "## Feed\n";
/// How long the highest rate must go on.
const FLOOD: Duration = Duration::from_secs(10);

pub(super) fn all(options: &Options) -> Result<()> {
    if thread::available_parallelism()?.get() < 2 {
        bail!("one CPU only: sensor and collector need one each");
    }
    setup::build_tools()?;
    build::all(false)?;
    release(&["--package", "xtask", "--bin", "load"])?;
    test::mount_bpffs()?;
    quiet_network()?;

    let step = Step::start("a flood to a collector");
    let mut rows = flood::flood(true, FLOOD)?;
    step.done();
    rows.iter().for_each(told);
    let step = Step::start(format!("an outage of {} s", options.outage));
    let outage = outage::rows(Duration::from_secs(options.outage), &step)?;
    step.done();
    outage.iter().for_each(told);
    let today = today::table(options.rounds)?;
    say(&today);
    release(&["--package", "mcp-sensor", "--example", "fleet"])?;
    let step = Step::start(format!("{} sensors on one collector", fleet::SENSORS));
    let fleet = fleet::rows()?;
    step.done();
    fleet.iter().for_each(told);
    let outputs = outputs::table()?;

    rows.extend(fleet);
    rows.extend(outage);
    let mut section = format!(
        "{}. Whatever makes the load runs on the same CPUs; \"stored\" is on disk (fdatasync).\n\n",
        report::machine()?
    );
    report::table(&mut section, &rows)?;
    section.push_str(&outputs);
    section.push_str(&today);

    report::publish(SECTION, &section, options.print_only)
}

/// At once: all of it takes long.
fn told(row: &Row) {
    say(format!("{}: {}", row.what, row.measured));
}

fn fleet_program() -> PathBuf {
    workspace::target().join("release/examples/fleet")
}

/// Removed when dropped.
struct Folder(PathBuf);

impl Folder {
    /// In memory: no disk is part of what is measured.
    fn in_memory() -> Result<Folder> {
        Folder::at(PathBuf::from(format!("/dev/shm/mcp-sensor-bench-{}", std::process::id())))
    }

    fn on_disk(name: &str) -> Result<Folder> {
        Folder::at(workspace::target().join("bench").join(format!("{name}-{}", std::process::id())))
    }

    fn at(path: PathBuf) -> Result<Folder> {
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Folder(path))
    }

    fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Ended when dropped.
struct Process {
    child: Child,
    /// Where it says that it listens.
    address: String,
}

impl Process {
    /// Reads the line `listening on ADDR` from a file that it writes to.
    fn start(mut command: Command, said: &Path) -> Result<Process> {
        let child =
            command.stdin(Stdio::null()).spawn().with_context(|| format!("cannot start {command:?}"))?;
        let mut process = Process { child, address: String::new() };
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let lines = BufReader::new(File::open(said)?).lines().map_while(Result::ok);
            for line in lines {
                if let Some(address) = line.strip_prefix("listening on ") {
                    address.clone_into(&mut process.address);
                    return Ok(process);
                }
            }
            if Instant::now() > end || process.child.try_wait()?.is_some() {
                bail!("{command:?} does not listen: {}", fs::read_to_string(said).unwrap_or_default());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// A collector with its events in `dir`.
    fn collector(dir: &Path, arguments: &[&str]) -> Result<Process> {
        fs::create_dir_all(dir)?;
        let said = dir.join("said");
        let mut command = Command::new(workspace::sensor_binary(false));
        command.args(["collect", "--quiet", "--log", "error", "--dir"]).arg(dir).args(arguments);
        command.stdout(Stdio::null()).stderr(File::create(&said)?);
        Process::start(command, &said)
    }

    /// What `fleet` receives: `what` is the kind.
    fn receiver(dir: &Path, what: &str) -> Result<Process> {
        let said = dir.join(format!("{what}.said"));
        let mut command = Command::new(fleet_program());
        command.args(["receive", what]).stdout(File::create(&said)?);
        Process::start(command, &said)
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// `mcp-sensor fleet` of a collector.
    fn fleet(&self, more: &[&str]) -> Result<Value> {
        let mut command = Command::new(workspace::sensor_binary(false));
        command.args(["fleet", "-o", "json", "--collector", &self.address]).args(more);
        Ok(serde_json::from_str(&step::output(&mut command)?)?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = kill(self.pid(), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

/// User and system time of a process, seconds.
fn cpu_seconds(pid: Pid) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Behind the name, which may hold anything: state is field 3, utime is 14.
    let (_, rest) = stat.rsplit_once(')').context("no name")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks: u64 =
        fields.get(11..13).context("too short")?.iter().filter_map(|t| t.parse::<u64>().ok()).sum();
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("no clock")?;
    Ok(ticks as f64 / per_second as f64)
}
