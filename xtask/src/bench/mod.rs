//! What the sensor costs, against nothing, against empty programs on the same
//! hooks, and against what people use today. Rounds are interleaved, because
//! machines drift; figures are medians, ratios are medians of paired rounds.

mod attach;
mod feed;
mod flood;
mod names;
mod programs;
mod report;
mod scale;
mod sensor;
mod stdio;

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, unshare};

use crate::{
    build, setup,
    step::{self, Step, say},
    test, toolchain, workspace,
};
use attach::Attached;

/// What is in force while the operations run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Setting {
    Nothing,
    Empty,
    AddressFilter,
    Nftables,
    Unlabelled,
    Labelled,
}

impl Setting {
    pub(crate) const ALL: [Setting; 6] = [
        Setting::Nothing,
        Setting::Empty,
        Setting::AddressFilter,
        Setting::Nftables,
        Setting::Unlabelled,
        Setting::Labelled,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Setting::Nothing => "no programs",
            Setting::Empty => "empty programs",
            Setting::AddressFilter => "address filter",
            Setting::Nftables => "nftables",
            Setting::Unlabelled => "sensor, unlabelled",
            Setting::Labelled => "sensor, labelled",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Operation {
    /// Look-ups and HTTPS by name, beside a proxy; alone, and in no setting
    Names,
    /// Tool calls of servers whose stdio is read, beside a proxy, and what else
    /// reading costs; alone, and in no setting
    Stdio,
    /// From the kernel to a collector's disk and on to receivers, through an
    /// outage, beside auditd and bpftrace; alone, and in no setting
    Feed,
    TcpConnect,
    UdpConnect,
    UdpSendto,
    TcpThroughput,
    ForkExec,
    /// What the agent carries; takes no setting and no rounds
    Scale,
}

impl Operation {
    /// Those that are timed in rounds.
    pub(crate) const ALL: [Operation; 5] = [
        Operation::TcpConnect,
        Operation::UdpConnect,
        Operation::UdpSendto,
        Operation::TcpThroughput,
        Operation::ForkExec,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Operation::Names => "names",
            Operation::Stdio => "stdio",
            Operation::Feed => "feed",
            Operation::TcpConnect => "tcp-connect",
            Operation::UdpConnect => "udp-connect",
            Operation::UdpSendto => "udp-sendto",
            Operation::TcpThroughput => "tcp-throughput",
            Operation::ForkExec => "fork-exec",
            Operation::Scale => "scale",
        }
    }
}

/// One figure for each round; nanoseconds a call, or bytes a second.
pub(crate) type Figures = BTreeMap<(Operation, Setting), Vec<f64>>;

pub(crate) struct Options {
    /// None: all.
    pub(crate) operations: Vec<Operation>,
    /// None: all.
    pub(crate) settings: Vec<Setting>,
    pub(crate) rounds: usize,
    pub(crate) milliseconds: u64,
    /// How long the collector is away, seconds.
    pub(crate) outage: u64,
    /// Leave `docs/figures.md` as it is.
    pub(crate) print_only: bool,
}

pub(crate) fn all(options: &Options) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("not root: the benchmark makes a cgroup, a network namespace and loads programs");
    }
    if options.operations == [Operation::Names] {
        return names::all(options.rounds, options.print_only);
    }
    if options.operations == [Operation::Stdio] {
        return stdio::all(options.rounds, options.print_only);
    }
    if options.operations == [Operation::Feed] {
        return feed::all(options);
    }
    for apart in [Operation::Names, Operation::Stdio, Operation::Feed] {
        if options.operations.contains(&apart) {
            bail!("`{0}` has a bed of its own: cargo xtask bench {0}", apart.name());
        }
    }
    if std::thread::available_parallelism()?.get() < 2 {
        bail!("one CPU only: client and listener need one each");
    }
    setup::build_tools()?;
    if !setup::on_path("nft") {
        setup::apt(&["nftables"])?;
    }
    build::all(false)?;
    release(&["--package", "xtask", "--bin", "load"])?;
    test::mount_bpffs()?;
    quiet_network()?;

    let everything = options.operations.is_empty() && options.settings.is_empty();
    let scale = everything || options.operations.contains(&Operation::Scale);
    let path = workspace::root().join("docs/figures.md");
    let mut text = if options.operations == [Operation::Scale] {
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?
    } else {
        timed(options)?
    };
    if scale {
        text = report::with_scale(&text, &scale::rows()?)?;
    }
    println!("{text}");
    if !options.print_only && (everything || options.operations == [Operation::Scale]) {
        fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        say(format!("wrote {}", path.display()));
    }
    Ok(())
}

/// Builds a program that makes load.
fn release(which: &[&str]) -> Result<()> {
    step::run_visible(toolchain::cargo().args(["build", "--release", "--target-dir", "target"]).args(which))
}

/// A namespace of its own: an empty rule set, quiet interfaces.
fn quiet_network() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
    step::output(Command::new("ip").args(["link", "set", "lo", "up"])).map(drop)
}

/// Operations under settings, in rounds.
fn timed(options: &Options) -> Result<String> {
    let objects = attach::Objects::build()?;
    let asked = |o: &Operation| options.operations.is_empty() || options.operations.contains(o);
    let operations: Vec<Operation> = Operation::ALL.into_iter().filter(asked).collect();
    let settings = if options.settings.is_empty() { &Setting::ALL[..] } else { &options.settings };
    let mut figures = Figures::new();
    let mut starts = Vec::new();
    let step = Step::start(format!("{} interleaved rounds", options.rounds));
    for round in 0..options.rounds {
        // There and back again: a drift of the machine falls on all alike.
        let there = round % 2 == 0;
        for at in 0..settings.len() {
            let setting = if there { settings[at] } else { settings[settings.len() - 1 - at] };
            step.detail(format!("round {} of {}: {}", round + 1, options.rounds, setting.name()));
            let bed = Bed::new(setting, &objects)?;
            starts.extend(bed.attached.start_seconds());
            for operation in &operations {
                let figure = bed.run(*operation, options.milliseconds)?;
                figures.entry((*operation, setting)).or_default().push(figure);
            }
        }
    }
    step.done();
    let mut programs = Vec::new();
    if settings.contains(&Setting::Labelled) {
        let step = Step::start("cost of each program");
        programs = programs::cost(|| {
            let bed = Bed::new(Setting::Labelled, &objects)?;
            for operation in Operation::ALL {
                bed.run(operation, options.milliseconds)?;
            }
            Ok(bed)
        })?;
        step.done();
    }
    report::write(&figures, &starts, &programs, options.rounds)
}

/// A cgroup of our own with a setting in force and a listener in it.
pub(crate) struct Bed {
    listener: Listener,
    attached: Attached,
    cgroup: Cgroup,
}

impl Bed {
    fn new(setting: Setting, objects: &attach::Objects) -> Result<Self> {
        let cgroup = Cgroup::new()?;
        let attached = Attached::new(setting, &cgroup.0, objects)
            .with_context(|| format!("setting `{}`", setting.name()))?;
        let listener = Listener::new(&cgroup.0)?;
        Ok(Self { listener, attached, cgroup })
    }

    fn run(&self, operation: Operation, milliseconds: u64) -> Result<f64> {
        let mut command = self.attached.launch(&load());
        command
            .arg("--cgroup")
            .arg(&self.cgroup.0)
            .args(["--cpu", "1", "run", operation.name()])
            .args(["--tcp", &self.listener.tcp.to_string()])
            .args(["--drain", &self.listener.drain.to_string()])
            .args(["--udp", &self.listener.udp.to_string()])
            .args(["--milliseconds", &milliseconds.to_string()]);
        let said = step::output(&mut command)?;
        said.lines()
            .last()
            .and_then(|line| line.parse().ok())
            .with_context(|| format!("`load` said no figure but {said:?}"))
    }
}

fn load() -> PathBuf {
    workspace::target().join("release/load")
}

/// Removed when dropped, and with it whatever is attached there.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new() -> Result<Self> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let next = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = cgroup2()?.join(format!("mcp-sensor-bench-{}-{next}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The last process of it may still be on its way out.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        eprintln!("cannot remove {}", self.0.display());
    }
}

/// Where cgroup v2 is mounted: its own place, or `unified` on hybrid hosts.
pub(crate) fn cgroup2() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    mounts
        .lines()
        .find(|line| line.contains(" - cgroup2 "))
        .and_then(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .context("cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup")
}

struct Listener {
    child: Child,
    tcp: u16,
    drain: u16,
    udp: u16,
}

impl Listener {
    fn new(cgroup: &Path) -> Result<Self> {
        let mut child = Command::new(load())
            .arg("--cgroup")
            .arg(cgroup)
            .args(["--cpu", "0", "listen"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("no pipe")?).read_line(&mut line)?;
        let ports: Vec<u16> = line.split_whitespace().filter_map(|port| port.parse().ok()).collect();
        let [tcp, drain, udp] = ports[..] else { bail!("the listener said {line:?}") };
        Ok(Self { child, tcp, drain, udp })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Its end of life is the end of its stdin.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}
