//! What the agent carries: floods of events, a crowd of processes, large
//! policies. Each is measured once, on the sensor as it is run.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    fs::{self, File},
    io::{BufRead, BufReader, Read as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use super::{Cgroup, load, sensor::Sensor};
use crate::{step::Step, workspace};

/// A limit of DESIGN.md with what was measured.
pub(crate) struct Row {
    pub(crate) what: &'static str,
    pub(crate) limit: &'static str,
    pub(crate) measured: String,
    pub(crate) ok: bool,
}

pub(crate) fn rows() -> Result<Vec<Row>> {
    type Measure = fn() -> Result<Vec<Row>>;
    let all: [(&str, Measure); 8] = [
        ("a flood to the sensor's own collector", || flood(false)),
        ("a flood to another process", || flood(true)),
        ("delay to the sensor's own collector", || delay(false)),
        ("delay to another process", || delay(true)),
        ("memory under execs", memory_under_execs),
        ("memory with nobody to take events", memory_of_backlog),
        ("a large policy", large_policy),
        ("a crowd of processes", crowd),
    ];
    let mut rows = Vec::new();
    for (what, measure) in all {
        let step = Step::start(what);
        rows.extend(measure()?);
        step.done();
    }
    Ok(rows)
}

/// Where floods may go.
const PROFILE: &str = "  flooded: {egress: [{to: [198.51.100.0/24], ports: [9], protocol: udp}]}\n";
const SERVER: &str = "  - {name: bench, profile: flooded, mode: enforce}\n";

fn policy(profiles: &str, servers: &str) -> String {
    format!("version: 1\nprofiles:\n{PROFILE}{profiles}servers:\n{SERVER}{servers}")
}

/// Records a second of one instance: far enough below its quota of telemetry
/// (4096) that a late wake-up stays within it.
const OF_ONE: u64 = 2000;

/// Processes that flood, each an instance of its own, together `per_second`.
/// Returns how many records they made.
fn make(sensor: &Sensor, cgroup: &Path, per_second: u64, time: Duration) -> Result<u64> {
    let instances = per_second.div_ceil(OF_ONE);
    // Until all of them are labelled and wait for the start.
    let ahead = Duration::from_millis(500 + 50 * instances);
    let at = (SystemTime::now() + ahead).duration_since(UNIX_EPOCH)?.as_millis();
    let mut children = Vec::new();
    for _ in 0..instances {
        let mut command = sensor.launch(&load());
        command
            .arg("--cgroup")
            .arg(cgroup)
            .args(["flood", "--per-second", &(per_second / instances).to_string()])
            .args(["--at", &at.to_string(), "--milliseconds", &time.as_millis().to_string()]);
        children.push(command.stdout(Stdio::piped()).spawn()?);
    }
    let mut made = 0;
    for child in children {
        let said = child.wait_with_output()?;
        made += String::from_utf8_lossy(&said.stdout).trim().parse::<u64>().context("a flood failed")?;
    }
    Ok(made)
}

/// What a directory of events holds of a flood.
#[derive(Default)]
struct Stored {
    events: u64,
    /// Told in events of type `loss`, and where.
    lost: u64,
    places: Vec<String>,
    /// Event time of the first, seconds of the day.
    first: f64,
}

impl Stored {
    fn read(dir: &Path) -> Result<Stored> {
        let mut stored = Stored { first: f64::MAX, ..Stored::default() };
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if !path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("events.ndjson")) {
                continue;
            }
            for line in BufReader::new(File::open(path)?).lines() {
                let line = line?;
                if let Some(time) = flood_time(&line) {
                    stored.events += 1;
                    stored.first = stored.first.min(time);
                } else if line.starts_with(r#"{"type":"loss""#) {
                    let loss: Value = serde_json::from_str(&line)?;
                    stored.lost += loss["count"].as_u64().unwrap_or(0);
                    stored.places.push(format!(
                        "{}/{}",
                        loss["where"].as_str().unwrap_or_default(),
                        loss["reason"].as_str().unwrap_or_default()
                    ));
                }
            }
        }
        stored.places.sort();
        stored.places.dedup();
        Ok(stored)
    }
}

/// Seconds of the day at which the kernel made a record of a flood; `None`: the
/// line is another event's.
fn flood_time(line: &str) -> Option<f64> {
    time_of("connection", line)
}

fn time_of(kind: &str, line: &str) -> Option<f64> {
    let rest = line.strip_prefix(r#"{"type":""#)?.strip_prefix(kind)?.strip_prefix(r#"","time":""#)?;
    let (hours, minutes, seconds) = (rest.get(11..13)?, rest.get(14..16)?, rest.get(17..29)?);
    let number = |text: &str| text.parse::<f64>().ok();
    Some(number(hours)? * 3600.0 + number(minutes)? * 60.0 + number(seconds)?)
}

fn seconds_of_day(time: SystemTime) -> Result<f64> {
    Ok(time.duration_since(UNIX_EPOCH)?.as_secs_f64() % 86_400.0)
}

/// Waits until nothing is written any more; when that began.
fn settled(dir: &Path) -> Result<SystemTime> {
    const QUIET: Duration = Duration::from_millis(1500);
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let written = fs::metadata(dir.join("events.ndjson"))?.modified()?;
        if SystemTime::now().duration_since(written).unwrap_or_default() > QUIET {
            return Ok(written);
        }
        if Instant::now() > end {
            bail!("events are still written a minute after the last was made");
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// A collector in a process of its own.
struct Collector {
    child: Child,
    dir: PathBuf,
}

impl Collector {
    fn start() -> Result<Collector> {
        let dir = workspace::target().join("bench").join(format!("collector-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir)?;
        let collector = Collector {
            child: Command::new(workspace::sensor_binary(false))
                .arg("collect")
                .arg("--listen")
                .arg(format!("unix:{}", dir.join("collector.sock").display()))
                .arg("--dir")
                .arg(dir.join("events"))
                .arg("--quiet")
                .stdin(Stdio::null())
                .spawn()?,
            dir,
        };
        let end = Instant::now() + Duration::from_secs(10);
        while !collector.dir.join("collector.sock").exists() {
            if Instant::now() > end {
                bail!("the collector does not listen");
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(collector)
    }

    fn address(&self) -> String {
        format!("unix:{}", self.dir.join("collector.sock").display())
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A sensor with its collector, for floods.
struct Way {
    sensor: Sensor,
    collector: Option<Collector>,
    cgroup: Cgroup,
}

impl Way {
    /// `apart`: the collector is another process.
    fn new(apart: bool) -> Result<Way> {
        let cgroup = Cgroup::new()?;
        let collector = if apart { Some(Collector::start()?) } else { None };
        let address = collector.as_ref().map(Collector::address);
        let more: Vec<&OsStr> = match &address {
            Some(address) => vec!["--collector".as_ref(), address.as_ref()],
            None => vec![],
        };
        let sensor = Sensor::with(&cgroup.0, &policy("", ""), &more)?;
        Ok(Way { sensor, collector, cgroup })
    }

    fn events(&self) -> PathBuf {
        self.collector.as_ref().map_or_else(|| self.sensor.events(), |c| c.dir.join("events"))
    }
}

/// The highest rate of those tried at which nothing is lost on the way from the
/// ring to the collector's disk.
fn flood(apart: bool) -> Result<Vec<Row>> {
    const RATES: [u64; 7] = [100_000, 80_000, 60_000, 40_000, 30_000, 20_000, 10_000];
    const TIME: Duration = Duration::from_secs(3);
    let mut tried = Vec::new();
    let mut best = 0;
    for rate in RATES {
        let way = Way::new(apart)?;
        let agent = way.sensor.pid();
        forget_peak(agent)?;
        let made = make(&way.sensor, &way.cgroup.0, rate, TIME)?;
        let until = seconds_of_day(settled(&way.events())?)?;
        let peak = memory(agent, "VmHWM")?;
        let stored = Stored::read(&way.events())?;
        let lost = made.saturating_sub(stored.events);
        let mut text = format!(
            "{:.0}/s made, {:.0}/s stored, {lost} of {made} lost, agent {peak:.0} MiB",
            made as f64 / TIME.as_secs_f64(),
            stored.events as f64 / (until - stored.first),
        );
        if stored.lost > 0 {
            write!(text, " ({} told: {})", stored.lost, stored.places.join(", "))?;
        }
        tried.push(text);
        if lost == 0 {
            best = rate;
            break;
        }
    }
    let what = if apart {
        "kernel to a collector in another process, without loss"
    } else {
        "kernel to the sensor's own collector, without loss"
    };
    Ok(vec![Row {
        what,
        limit: "≥ 100,000 events/s on 2 CPUs",
        measured: tried.join("; "),
        ok: best >= RATES[0],
    }])
}

/// From the record in the ring to the line on disk, at a tenth of the highest
/// rate.
fn delay(apart: bool) -> Result<Vec<Row>> {
    const TIME: Duration = Duration::from_secs(5);
    let way = Way::new(apart)?;
    let path = way.events().join("events.ndjson");
    let (made, mut delays) = thread::scope(|scope| -> Result<(u64, Vec<f64>)> {
        let making = scope.spawn(|| make(&way.sensor, &way.cgroup.0, 10_000, TIME));
        let mut delays = Vec::new();
        let mut tail = Tail::open(&path)?;
        let mut quiet = Instant::now();
        while !making.is_finished() || quiet.elapsed() < Duration::from_secs(1) {
            if tail.read(&mut delays)? {
                quiet = Instant::now();
            }
            thread::sleep(Duration::from_millis(2));
        }
        let made = making.join().ok().context("a thread panicked")??;
        Ok((made, delays))
    })?;
    delays.sort_by(f64::total_cmp);
    let at = |share: f64| {
        delays.get((delays.len() as f64 * share) as usize).map_or(f64::NAN, |seconds| seconds * 1000.0)
    };
    let (p50, p99) = (at(0.5), at(0.99));
    let what = if apart {
        "kernel to the disk of a collector in another process, 10,000 events/s, p99"
    } else {
        "kernel to the disk of the sensor's own collector, 10,000 events/s, p99"
    };
    Ok(vec![Row {
        what,
        limit: "≤ 50 ms",
        measured: format!("{p99:.0} ms (p50 {p50:.0} ms; {} of {made} events)", delays.len()),
        ok: p99 <= 50.0 && delays.len() as u64 == made,
    }])
}

/// Follows a file that is appended to and rotated.
struct Tail {
    path: PathBuf,
    file: File,
    /// Half a line.
    rest: Vec<u8>,
}

impl Tail {
    fn open(path: &Path) -> Result<Tail> {
        Ok(Tail { path: path.to_owned(), file: File::open(path)?, rest: Vec::new() })
    }

    /// Adds the delay of each record of a flood that is on disk now. True: there
    /// was something to read.
    fn read(&mut self, delays: &mut Vec<f64>) -> Result<bool> {
        let before = self.rest.len();
        self.file.read_to_end(&mut self.rest)?;
        if self.rest.len() == before {
            if fs::metadata(&self.path)
                .is_ok_and(|now| self.file.metadata().is_ok_and(|m| m.ino() != now.ino()))
            {
                self.file = File::open(&self.path)?;
            }
            return Ok(false);
        }
        // What is readable may be in memory only; behind this it is on disk.
        self.file.sync_data()?;
        let now = seconds_of_day(SystemTime::now())?;
        let end = self.rest.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        for line in self.rest[..end].split(|b| *b == b'\n') {
            if let Some(time) = std::str::from_utf8(line).ok().and_then(flood_time) {
                delays.push(now - time);
            }
        }
        self.rest.drain(..end);
        Ok(true)
    }
}

/// `VmRSS` or `VmHWM` of a process, MiB.
fn memory(pid: Pid, field: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix(field)).context("no such line")?;
    let kib: f64 = line.trim_matches([':', ' ', '\t', 'k', 'B']).parse()?;
    Ok(kib / 1024.0)
}

/// `VmHWM` begins anew.
fn forget_peak(pid: Pid) -> Result<()> {
    Ok(fs::write(format!("/proc/{pid}/clear_refs"), "5")?)
}

/// A thousand servers, each with a profile and a match of its own; with CIDRs, in
/// rules of a thousand, none within another, each profile also has ten names.
fn large(cidrs: usize) -> Result<String> {
    let (mut profiles, mut servers) = (String::new(), String::new());
    for n in 0..1000 {
        let names = if cidrs > 0 {
            let names: Vec<String> = (0..10).map(|i| format!("n{i}.s{n}.example.test")).collect();
            format!("{{to: [{}], ports: [443]}}, ", names.join(", "))
        } else {
            String::new()
        };
        let (high, low) = (n >> 8, n & 255);
        writeln!(profiles, "  p{n}: {{egress: [{names}{{to: [172.16.{high}.{low}], ports: [443]}}]}}")?;
        writeln!(
            servers,
            "  - {{name: s{n}, profile: p{n}, mode: enforce, match: [{{package: '@bench/server-{n}'}}]}}"
        )?;
    }
    if cidrs > 0 {
        profiles.push_str("  large:\n    egress:\n");
        servers.push_str("  - {name: large, profile: large, mode: enforce}\n");
    }
    for rule in 0..cidrs / 1000 {
        write!(profiles, "      - {{ports: [{}], to: [", 1000 + rule)?;
        for at in rule * 1000..(rule + 1) * 1000 {
            write!(profiles, "10.{}.{}.{}/28, ", at >> 12, at >> 4 & 255, (at & 15) << 4)?;
        }
        profiles.push_str("]}\n");
    }
    let text = policy(&profiles, &servers);
    Ok(if cidrs > 0 { format!("{text}resolvers: [192.0.2.53]\n") } else { text })
}

/// Starts itself again and again, as cheaply as can be: in children that end at
/// once; with arguments, in its own place.
const RESTLESS: &str = r#"
#include <sys/wait.h>
#include <unistd.h>
int main(int count, char **arguments) {
    if (count > 2) return execv(arguments[0], arguments);
    if (count == 2) return 0;
    for (;;) {
        if (!vfork()) { execl(arguments[0], arguments[0], "child", (char *)0); _exit(127); }
        wait(0);
    }
}
"#;

fn restless(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("restless");
    let mut cc = Command::new("cc")
        .args(["-O2", "-static", "-x", "c", "-", "-o"])
        .arg(&path)
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot start cc")?;
    cc.stdin.take().context("no pipe")?.write_all(RESTLESS.as_bytes())?;
    if !cc.wait()?.success() {
        bail!("cc refused the program that starts itself");
    }
    Ok(path)
}

/// With its buffers full of events that nobody takes: floods, and execs with the
/// arguments that take the most memory.
fn memory_of_backlog() -> Result<Vec<Row>> {
    let cgroup = Cgroup::new()?;
    let nobody = workspace::target().join("bench/nobody.sock");
    let address = format!("unix:{}", nobody.display());
    let sensor = Sensor::with(&cgroup.0, &large(0)?, &["--collector".as_ref(), address.as_ref()])?;
    forget_peak(sensor.pid())?;
    let made = make(&sensor, &cgroup.0, 20_000, Duration::from_secs(2))?;
    exec_for(&sensor, Duration::from_secs(5), &["x"; 250])?;
    let peak = memory(sensor.pid(), "VmHWM")?;
    Ok(vec![Row {
        what: "memory of the agent, its collector away",
        limit: "≤ 64 MiB",
        measured: format!(
            "{peak:.0} MiB at most (behind {made} connections and 5 s of execs with 250 arguments)"
        ),
        ok: peak <= 64.0,
    }])
}

/// Instances of a server that start themselves all the time.
fn exec_for(sensor: &Sensor, time: Duration, arguments: &[&str]) -> Result<()> {
    const INSTANCES: usize = 3;
    let program = restless(&workspace::target().join("bench"))?;
    let mut children = Vec::new();
    for _ in 0..INSTANCES {
        children.push(sensor.launch(&program).args(arguments).spawn()?);
    }
    thread::sleep(time);
    for child in &mut children {
        child.kill()?;
        child.wait()?;
    }
    Ok(())
}

fn memory_under_execs() -> Result<Vec<Row>> {
    const TIME: Duration = Duration::from_secs(8);
    let cgroup = Cgroup::new()?;
    let sensor = Sensor::with(&cgroup.0, &large(0)?, &[])?;
    let idle = memory(sensor.pid(), "VmRSS")?;
    forget_peak(sensor.pid())?;
    let from = Instant::now();
    exec_for(&sensor, TIME, &[])?;
    let took = from.elapsed().as_secs_f64();
    settled(&sensor.events())?;
    let peak = memory(sensor.pid(), "VmHWM")?;
    let (mut execs, mut lost) = (0_u64, 0);
    for entry in fs::read_dir(sensor.events())? {
        for line in BufReader::new(File::open(entry?.path())?).lines().map_while(Result::ok) {
            execs += u64::from(line.starts_with(r#"{"type":"exec""#));
            if line.starts_with(r#"{"type":"loss""#) {
                lost += serde_json::from_str::<Value>(&line)?["count"].as_u64().unwrap_or(0);
            }
        }
    }
    let rate = (execs + lost) as f64 / took;
    Ok(vec![Row {
        what: "memory of the agent, 1,000 servers, 5,000 execs/s",
        limit: "≤ 64 MiB",
        measured: format!(
            "{peak:.0} MiB at most (idle {idle:.0} MiB; {rate:.0} execs/s, {lost} of {} records lost and told)",
            execs + lost
        ),
        ok: peak <= 64.0,
    }])
}

fn large_policy() -> Result<Vec<Row>> {
    let cgroup = Cgroup::new()?;
    let sensor = Sensor::with(&cgroup.0, &policy("", ""), &[])?;
    let (mut times, mut steady, mut peak) = (Vec::new(), 0.0_f64, 0.0_f64);
    let text = large(100_000)?;
    for round in 0..3 {
        let new = sensor.policy().with_extension("new");
        // Another text each time: the same policy is not switched to again.
        fs::write(&new, format!("{text}# {round}\n"))?;
        forget_peak(sensor.pid())?;
        let from = seconds_of_day(SystemTime::now())?;
        fs::rename(new, sensor.policy())?;
        kill(sensor.pid(), Signal::SIGHUP)?;
        times.push(switched(&sensor, round + 2)? - from);
        settled(&sensor.events())?;
        steady = steady.max(memory(sensor.pid(), "VmRSS")?);
        peak = peak.max(memory(sensor.pid(), "VmHWM")?);
    }
    times.sort_by(f64::total_cmp);
    let [fast, median, slow] = times[..] else { bail!("not three rounds") };
    Ok(vec![
        Row {
            what: "policy with 1,000 servers, 10,000 names and 100,000 CIDRs, from SIGHUP to in force",
            limit: "< 1 s",
            measured: format!("{median:.2} s ({fast:.2} – {slow:.2} s)"),
            ok: median < 1.0,
        },
        Row {
            what: "memory of the agent after reloads of 1,000 servers, 10,000 names and 100,000 CIDRs",
            limit: "≤ 64 MiB",
            measured: format!("{steady:.0} MiB ({peak:.0} MiB at most while it reads one)"),
            ok: steady <= 64.0,
        },
    ])
}

/// When a generation came into force, seconds of the day.
fn switched(sensor: &Sensor, generation: u64) -> Result<f64> {
    let end = Instant::now() + Duration::from_secs(30);
    while Instant::now() < end {
        let text = fs::read_to_string(sensor.events().join("events.ndjson"))?;
        for line in text.lines() {
            let Some(time) = time_of("policy_change", line) else { continue };
            let change: Value = serde_json::from_str(line)?;
            if change["ok"] != true {
                bail!("the policy was refused: {line}");
            }
            if change["generation"].as_u64() == Some(generation) {
                return Ok(time);
            }
        }
        thread::sleep(Duration::from_millis(50));
    }
    bail!("generation {generation} did not come into force")
}

fn crowd() -> Result<Vec<Row>> {
    const CHILDREN: usize = 10_000;
    let cgroup = Cgroup::new()?;
    let mut crowd = Command::new(load())
        .args(["crowd", &CHILDREN.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(crowd.stdout.take().context("no pipe")?).read_line(&mut line)?;
    let started = (line.trim() == "ready").then(|| Sensor::start(&cgroup.0));
    drop(crowd.stdin.take());
    crowd.wait()?;
    let start = started.context("the crowd did not gather: is pids.max or pid_max too low?")??.start;
    let alone = Sensor::start(&cgroup.0)?.start;
    Ok(vec![Row {
        what: "start to enforcing with 10,000 running processes",
        limit: "< 3 s",
        measured: format!("{:.2} s ({:.2} s without them)", start.as_secs_f64(), alone.as_secs_f64()),
        ok: start.as_secs_f64() < 3.0,
    }])
}
