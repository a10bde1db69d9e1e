//! What the agent carries: floods of events, a crowd of processes, large
//! policies. Each is measured once, on the sensor as it is run.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{BufRead, BufReader, Read as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use super::{
    Cgroup,
    flood::{Way, flood, flood_time, forget_peak, make, memory, policy, seconds_of_day, settled, time_of},
    load,
    sensor::Sensor,
};
use crate::{step::Step, workspace};

/// A limit of DESIGN.md with what was measured.
pub(crate) struct Row {
    pub(crate) what: &'static str,
    pub(crate) limit: &'static str,
    pub(crate) measured: String,
    pub(crate) ok: bool,
}

/// How long the highest rate must go on.
const FLOOD: Duration = Duration::from_secs(3);

pub(crate) fn rows() -> Result<Vec<Row>> {
    type Measure = fn() -> Result<Vec<Row>>;
    let all: [(&str, Measure); 8] = [
        ("a flood to the sensor's own collector", || flood(false, FLOOD)),
        ("a flood to another process", || flood(true, FLOOD)),
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

/// From the record in the ring to the line on disk, at a tenth of the highest
/// rate.
fn delay(apart: bool) -> Result<Vec<Row>> {
    const TIME: Duration = Duration::from_secs(5);
    let way = Way::new(apart, &[])?;
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
