//! What people have today for the same question (which program ran, what did it
//! connect to): auditd with syslog, and bpftrace. The same load under each, in
//! interleaved rounds.

mod auditd;
mod bpftrace;

use std::{
    fmt::Write as _,
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::unistd::Pid;

use super::{Folder, cpu_seconds};
use crate::{
    bench::{self, Cgroup, Listener, flood, report},
    step::{self, Step, say},
};
use auditd::Auditd;
use bpftrace::Bpftrace;

const EXECS: u64 = 100;
const CONNECTS: u64 = 1000;
const TIME: Duration = Duration::from_secs(5);
/// Nobody on this machine has logged in with this number.
const LOGIN_UID: u32 = 3_999_999_901;
/// For records that are still on their way.
const SETTLE: Duration = Duration::from_secs(3);

/// Who records.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    Nobody,
    Sensor,
    Auditd,
    Bpftrace,
}

const ALL: [Who; 4] = [Who::Nobody, Who::Sensor, Who::Auditd, Who::Bpftrace];

impl Who {
    const fn name(self) -> &'static str {
        match self {
            Who::Nobody => "nothing",
            Who::Sensor => "sensor, collector",
            Who::Auditd => "auditd, syslog",
            Who::Bpftrace => "bpftrace",
        }
    }
}

/// One round under one of them.
struct Round {
    made: u64,
    /// Found where it ends up.
    found: u64,
    /// Of what is not found, so many are told.
    told: u64,
    /// CPU seconds of what makes the load; of what records it.
    load: f64,
    recording: f64,
}

pub(super) fn table(rounds: usize) -> Result<String> {
    let step = Step::start("beside auditd and bpftrace");
    let mut missing = Vec::new();
    let mut figures: Vec<Vec<Round>> = ALL.iter().map(|_| Vec::new()).collect();
    for round in 0..rounds {
        for at in 0..ALL.len() {
            let at = if round % 2 == 0 { at } else { ALL.len() - 1 - at };
            let who = ALL[at];
            if missing.iter().any(|(there, _)| *there == who) {
                continue;
            }
            step.detail(format!("round {} of {rounds}: {}", round + 1, who.name()));
            match one(who) {
                Ok(round) => figures[at].push(round),
                Err(error) if matches!(who, Who::Auditd | Who::Bpftrace) => {
                    say(format!("{} is not measured: {error:#}", who.name()));
                    missing.push((who, format!("{error:#}")));
                    figures[at].clear();
                }
                Err(error) => return Err(error.context(who.name())),
            }
        }
    }
    step.done();
    let mut text = format!(
        "\n### Beside what people have\n\n{EXECS} execs and {CONNECTS} TCP connects a second for {} s, all recorded; {rounds} \
         interleaved rounds. CPU is of an event: of the programs that record it and carry it to a file, and what the load \
         itself took more than with nothing in force (medians of rounds; the system calls pay for what the kernel does). \
         In brackets: to the sensor.\n\n\
         | | events | not in the file | of them told | CPU of what records | more CPU of the load | together |\n\
         |---|---|---|---|---|---|---|\n",
        TIME.as_secs()
    );
    let per_event = |at: usize, of: fn(&Round) -> f64| {
        report::median(&figures[at].iter().map(|r| of(r) / r.made as f64 * 1e6).collect::<Vec<_>>())
    };
    let base = per_event(0, |r| r.load).context("no round without anything")?;
    let cost = |at: usize| {
        let (recording, load) = (per_event(at, |r| r.recording)?, per_event(at, |r| r.load)? - base);
        Some((recording, load, recording + load))
    };
    let (.., ours) = cost(1).context("no round of the sensor")?;
    for (at, who) in ALL.iter().enumerate().skip(1) {
        let Some((recording, load, all)) = cost(at) else { continue };
        let sum = |of: fn(&Round) -> u64| figures[at].iter().map(of).sum::<u64>();
        writeln!(
            text,
            "| {} | {} | {} | {} | {recording:.1} µs | {load:+.1} µs | {all:.1} µs ({:.2}) |",
            who.name(),
            sum(|r| r.made),
            sum(|r| r.made.saturating_sub(r.found)),
            sum(|r| r.told),
            all / ours,
        )?;
    }
    writeln!(
        text,
        "\nThe sensor also judges each connection, names server, client and rule, and its events are numbered and \
         acknowledged; the others write what the system call was given. auditd: its rules for this load alone, backlog of \
         8192, `audisp-syslog` to rsyslogd to a file. bpftrace: two tracepoints of system calls, printed to a file."
    )?;
    for (who, why) in missing {
        writeln!(text, "\n{} was not measured here: {why}.", who.name())?;
    }
    Ok(text)
}

/// Under whoever was started before: how many events, and the CPU seconds.
fn chores(mut command: Command, cgroup: &Cgroup) -> Result<(u64, f64)> {
    let listener = Listener::new(&cgroup.0)?;
    command.arg("--cgroup").arg(&cgroup.0).args(["chores", "--execs", &EXECS.to_string()]);
    command.args(["--connects", &CONNECTS.to_string(), "--tcp", &listener.tcp.to_string()]);
    command.args(["--milliseconds", &TIME.as_millis().to_string()]);
    let said = step::output(command.args(["--login-uid", &LOGIN_UID.to_string()]))?;
    let numbers: Vec<f64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [execs, connects, cpu] = numbers[..] else { bail!("chores said {said:?}") };
    Ok(((execs + connects) as u64, cpu))
}

fn one(who: Who) -> Result<Round> {
    if who == Who::Sensor {
        return sensor();
    }
    let (cgroup, folder) = (Cgroup::new()?, Folder::on_disk("today")?);
    match who {
        Who::Auditd => {
            let auditd = Auditd::start(&folder.0)?;
            let (made, load) = chores(Command::new(bench::load()), &cgroup)?;
            thread::sleep(SETTLE);
            let (found, told, recording) = auditd.end()?;
            Ok(Round { made, found, told, load, recording })
        }
        Who::Bpftrace => {
            let bpftrace = Bpftrace::start(&folder.0, &cgroup.0)?;
            let (made, load) = chores(Command::new(bench::load()), &cgroup)?;
            thread::sleep(SETTLE);
            let (found, told, recording) = bpftrace.end()?;
            Ok(Round { made, found, told, load, recording })
        }
        Who::Nobody | Who::Sensor => {
            let (made, load) = chores(Command::new(bench::load()), &cgroup)?;
            Ok(Round { made, found: 0, told: 0, load, recording: 0.0 })
        }
    }
}

const POLICY: &str = "\
version: 1
profiles:
  loopback: {egress: [{to: [127.0.0.0/8], ports: [1-65535]}]}
servers:
  - {name: bench, profile: loopback, mode: enforce}
";

fn sensor() -> Result<Round> {
    let way = flood::Way::with(true, POLICY, &[])?;
    let agent = way.sensor.pid();
    let collector = way.collector.as_ref().context("a collector apart")?.pid()?;
    let cpu = || Ok::<_, anyhow::Error>(cpu_seconds(agent)? + cpu_seconds(collector)?);
    let before = cpu()?;
    let (made, load) = chores(way.sensor.launch(&bench::load()), &way.cgroup)?;
    flood::settled(&way.events())?;
    let recording = cpu()? - before;
    let (mut found, mut told) = (0, 0);
    each_line(&way.events().join("events.ndjson"), |line| {
        let exec = line.starts_with(r#"{"type":"exec""#) && line.contains(r#""/bin/true""#);
        found += u64::from(exec || line.starts_with(r#"{"type":"connection""#));
        if line.starts_with(r#"{"type":"loss""#) {
            let loss: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
            told += loss["count"].as_u64().unwrap_or(0);
        }
    })?;
    Ok(Round { made, found, told, load, recording })
}

fn each_line(path: &Path, mut take: impl FnMut(&str)) -> Result<()> {
    let file = fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    for line in BufReader::new(file).split(b'\n') {
        take(&String::from_utf8_lossy(&line?));
    }
    Ok(())
}

/// Of a process and those that it started.
fn tree_cpu_seconds(parent: Pid) -> Result<f64> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
    let mut sum = cpu_seconds(parent)?;
    for child in children.split_whitespace().filter_map(|pid| pid.parse().ok()) {
        sum += tree_cpu_seconds(Pid::from_raw(child))?;
    }
    Ok(sum)
}
