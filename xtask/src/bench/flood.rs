//! Floods of events, from the kernel's rings to a collector's disk.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    fs::{self, File},
    io::{BufRead, BufReader},
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

use super::{Cgroup, load, scale::Row, sensor::Sensor};
use crate::workspace;

/// Where floods may go.
const PROFILE: &str = "  flooded: {egress: [{to: [198.51.100.0/24], ports: [9], protocol: udp}]}\n";
const SERVER: &str = "  - {name: bench, profile: flooded, mode: enforce}\n";

pub(super) fn policy(profiles: &str, servers: &str) -> String {
    format!("version: 1\nprofiles:\n{PROFILE}{profiles}servers:\n{SERVER}{servers}")
}

/// Records a second of one instance: far enough below its quota of telemetry
/// (4096) that a late wake-up stays within it.
const OF_ONE: u64 = 2000;

/// Processes that flood, each an instance of its own, together `per_second`.
/// Returns how many records they made.
pub(super) fn make(sensor: &Sensor, cgroup: &Path, per_second: u64, time: Duration) -> Result<u64> {
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
pub(super) struct Stored {
    pub(super) events: u64,
    /// Told in events of type `loss`, and where.
    pub(super) lost: u64,
    pub(super) places: Vec<String>,
    /// Event time of the first, seconds of the day.
    first: f64,
}

impl Stored {
    pub(super) fn read(dir: &Path) -> Result<Stored> {
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
pub(super) fn flood_time(line: &str) -> Option<f64> {
    time_of("connection", line)
}

pub(super) fn time_of(kind: &str, line: &str) -> Option<f64> {
    let rest = line.strip_prefix(r#"{"type":""#)?.strip_prefix(kind)?.strip_prefix(r#"","time":""#)?;
    let (hours, minutes, seconds) = (rest.get(11..13)?, rest.get(14..16)?, rest.get(17..29)?);
    let number = |text: &str| text.parse::<f64>().ok();
    Some(number(hours)? * 3600.0 + number(minutes)? * 60.0 + number(seconds)?)
}

pub(super) fn seconds_of_day(time: SystemTime) -> Result<f64> {
    Ok(time.duration_since(UNIX_EPOCH)?.as_secs_f64() % 86_400.0)
}

/// Waits until nothing is written any more; when that began.
pub(super) fn settled(dir: &Path) -> Result<SystemTime> {
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
pub(super) struct Collector {
    child: Option<Child>,
    dir: PathBuf,
}

impl Collector {
    fn start() -> Result<Collector> {
        let dir = workspace::target().join("bench").join(format!("collector-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir)?;
        let mut collector = Collector { child: None, dir };
        collector.resume()?;
        Ok(collector)
    }

    /// It goes on with what it had.
    pub(super) fn resume(&mut self) -> Result<()> {
        let child = Command::new(workspace::sensor_binary(false))
            .args(["collect", "--quiet", "--listen", &self.address(), "--dir"])
            .arg(self.dir.join("events"))
            .stdin(Stdio::null())
            .spawn()?;
        self.child = Some(child);
        let end = Instant::now() + Duration::from_secs(10);
        while !self.dir.join("collector.sock").exists() {
            if Instant::now() > end {
                bail!("the collector does not listen");
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    pub(super) fn stop(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM)?;
            child.wait()?;
        }
        Ok(())
    }

    fn address(&self) -> String {
        format!("unix:{}", self.dir.join("collector.sock").display())
    }

    pub(super) fn pid(&self) -> Result<Pid> {
        let child = self.child.as_ref().context("the collector does not run")?;
        Ok(Pid::from_raw(child.id() as i32))
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        let _ = self.stop();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A sensor with its collector, for floods.
pub(super) struct Way {
    pub(super) sensor: Sensor,
    pub(super) collector: Option<Collector>,
    pub(super) cgroup: Cgroup,
}

impl Way {
    /// `apart`: the collector is another process; `more` are arguments of `run`.
    pub(super) fn new(apart: bool, more: &[&OsStr]) -> Result<Way> {
        Way::with(apart, &policy("", ""), more)
    }

    /// Under another policy.
    pub(super) fn with(apart: bool, policy: &str, more: &[&OsStr]) -> Result<Way> {
        let cgroup = Cgroup::new()?;
        let collector = if apart { Some(Collector::start()?) } else { None };
        let address = collector.as_ref().map(Collector::address);
        let mut arguments: Vec<&OsStr> = Vec::new();
        if let Some(address) = &address {
            arguments.extend(["--collector".as_ref(), address.as_ref() as &OsStr]);
        }
        arguments.extend(more);
        let sensor = Sensor::with(&cgroup.0, policy, &arguments)?;
        Ok(Way { sensor, collector, cgroup })
    }

    pub(super) fn events(&self) -> PathBuf {
        self.collector.as_ref().map_or_else(|| self.sensor.events(), |c| c.dir.join("events"))
    }
}

/// The highest rate of those tried at which nothing is lost on the way from the
/// ring to the collector's disk.
pub(super) fn flood(apart: bool, time: Duration) -> Result<Vec<Row>> {
    const RATES: [u64; 7] = [100_000, 80_000, 60_000, 40_000, 30_000, 20_000, 10_000];
    let mut tried = Vec::new();
    let mut best = 0;
    for rate in RATES {
        let way = Way::new(apart, &[])?;
        let agent = way.sensor.pid();
        forget_peak(agent)?;
        let made = make(&way.sensor, &way.cgroup.0, rate, time)?;
        let until = seconds_of_day(settled(&way.events())?)?;
        let peak = memory(agent, "VmHWM")?;
        let stored = Stored::read(&way.events())?;
        let lost = made.saturating_sub(stored.events);
        let mut text = format!(
            "{:.0}/s made, {:.0}/s stored, {lost} of {made} lost, agent {peak:.0} MiB",
            made as f64 / time.as_secs_f64(),
            stored.events as f64 / (until - stored.first),
        );
        if let Some(collector) = &way.collector {
            write!(text, ", collector {:.0} MiB", memory(collector.pid()?, "VmHWM")?)?;
        }
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

/// `VmRSS` or `VmHWM` of a process, MiB.
pub(super) fn memory(pid: Pid, field: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix(field)).context("no such line")?;
    let kib: f64 = line.trim_matches([':', ' ', '\t', 'k', 'B']).parse()?;
    Ok(kib / 1024.0)
}

/// `VmHWM` begins anew.
pub(super) fn forget_peak(pid: Pid) -> Result<()> {
    Ok(fs::write(format!("/proc/{pid}/clear_refs"), "5")?)
}
