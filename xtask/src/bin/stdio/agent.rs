//! A sensor on a cgroup of the benchmark's own: what it says, and what it uses.

use std::{
    fs::{self, File},
    io::{Read as _, Seek as _, SeekFrom},
    ops::Range,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use aya::programs::{ProgramInfo, loaded_programs};
use mcp_sensor_tests::{
    cgroup::Subtree,
    policy::Policy,
    sensor::{Sensor, binary},
};
use serde::Deserialize;

use crate::Report;

/// The server that is declared.
pub(crate) const SERVER: &str = "bench";

/// Under the profile `none`; `matched`: what it is known by, or by `exec` only.
pub(crate) fn policy(matched: Option<&str>) -> Policy {
    let rule = matched.map(|rule| format!("match: [{{{rule}}}]")).unwrap_or_default();
    Policy::default().server(SERVER, "none", "enforce", &rule)
}

pub(crate) struct Agent {
    pub(crate) sensor: Sensor,
    pid: u32,
}

impl Agent {
    pub(crate) fn start(report: &Report, cgroup: &Subtree, policy: &Policy) -> Result<Agent> {
        Agent::start_with(report, cgroup, policy, &[])
    }

    pub(crate) fn start_with(
        report: &Report,
        cgroup: &Subtree,
        policy: &Policy,
        options: &[&str],
    ) -> Result<Agent> {
        let mut arguments = options.to_vec();
        if let Some(back_end) = &report.capture {
            arguments.extend(["--capture", back_end]);
        }
        let sensor = Sensor::start_on(cgroup.path(), policy, &arguments)?;
        let pid = sensor.pid().context("the sensor has ended")?;
        Ok(Agent { sensor, pid })
    }

    /// A command that runs `program` as the declared server.
    pub(crate) fn launch(&self, program: &Path) -> Result<Command> {
        let mut command = Command::new(binary()?);
        command.arg("exec").arg("--control").arg(self.sensor.control_path());
        command.args(["--server", SERVER, "--"]).arg(program);
        Ok(command)
    }

    pub(crate) fn events(&self) -> Tail {
        Tail { path: self.sensor.events_path(), offset: 0, rest: Vec::new() }
    }

    /// Whether the programs that read stdio are in the way of system calls.
    pub(crate) fn reads(&self) -> Result<bool> {
        for entry in fs::read_dir(format!("/proc/{}/fdinfo", self.pid))? {
            let text = fs::read_to_string(entry?.path()).unwrap_or_default();
            if text.contains("link_type:\ttracing") || text.contains("tp_name:\tsys_exit") {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// CPU time so far, user and system: of the process, and of the thread that
    /// reads stdio.
    pub(crate) fn cpu(&self) -> Result<[Duration; 2]> {
        let mut reader = Duration::ZERO;
        for entry in fs::read_dir(format!("/proc/{}/task", self.pid))? {
            let task = entry?.path();
            if fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "stdio") {
                reader += cpu_time(&task.join("stat"))?;
            }
        }
        Ok([cpu_time(Path::new(&format!("/proc/{}/stat", self.pid)))?, reader])
    }

    /// The most memory since [`Agent::forget_peak`], MiB.
    pub(crate) fn peak(&self) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).context("no VmHWM")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
    }

    pub(crate) fn forget_peak(&self) -> Result<()> {
        Ok(fs::write(format!("/proc/{}/clear_refs", self.pid), "5")?)
    }
}

/// Whether a sensor that is not the benchmark's may read system calls here.
pub(crate) fn another() -> bool {
    let reads = |p: ProgramInfo| matches!(p.name_as_str(), Some("syscall" | "pipe_write"));
    // One that goes away meanwhile is none.
    loaded_programs().filter_map(Result::ok).any(reads)
}

/// The same, but not of programs that are going away: the kernel frees those of a
/// sensor that has ended a moment later.
pub(crate) fn another_stays() -> bool {
    const PATIENCE: Duration = Duration::from_secs(5);
    let end = Instant::now() + PATIENCE;
    while another() {
        if Instant::now() > end {
            return true;
        }
        thread::sleep(Duration::from_millis(50));
    }
    false
}

/// proc_pid_stat(5): fields 14 and 15, behind the name in brackets.
fn cpu_time(stat: &Path) -> Result<Duration> {
    let text = fs::read_to_string(stat)?;
    let (_, rest) = text.rsplit_once(") ").context("no name")?;
    let fields: Vec<&str> = rest.split(' ').collect();
    let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("no CLK_TCK")?;
    Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}

/// What the benchmark reads in an event.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Event {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) time: String,
    pub(crate) server: String,
    pub(crate) pid: u32,
    pub(crate) request_bytes: u64,
    pub(crate) response_bytes: u64,
    pub(crate) bytes: u64,
    pub(crate) how: String,
    pub(crate) count: u64,
    #[serde(rename = "where")]
    pub(crate) place: String,
    pub(crate) reason: String,
}

/// Follows the sensor's file of events.
pub(crate) struct Tail {
    path: PathBuf,
    offset: u64,
    rest: Vec<u8>,
}

impl Tail {
    /// What has been written since.
    pub(crate) fn read(&mut self, mut each: impl FnMut(Event)) -> Result<()> {
        let Ok(mut file) = File::open(&self.path) else { return Ok(()) };
        file.seek(SeekFrom::Start(self.offset))?;
        self.offset += file.read_to_end(&mut self.rest)? as u64;
        let end = self.rest.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        for line in self.rest[..end].split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            each(serde_json::from_slice(line).with_context(|| String::from_utf8_lossy(line).into_owned())?);
        }
        self.rest.drain(..end);
        Ok(())
    }

    /// Reads until `done` says so of what came.
    pub(crate) fn wait(&mut self, what: &str, mut done: impl FnMut(Event) -> bool) -> Result<()> {
        const LIMIT: Duration = Duration::from_secs(10);
        let end = Instant::now() + LIMIT;
        let mut seen = false;
        loop {
            self.read(|event| seen |= done(event))?;
            if seen {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("no event within {LIMIT:?}: {what}");
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Nanoseconds of the day of an event's time (`2026-11-21T15:04:05.123456789Z`).
pub(crate) fn of_day(time: &str) -> Result<i64> {
    let part = |range: Range<usize>| -> Result<i64> {
        Ok(time.get(range).context("a time that is too short")?.parse()?)
    };
    let seconds = (part(11..13)? * 60 + part(14..16)?) * 60 + part(17..19)?;
    Ok(seconds * 1_000_000_000 + part(20..29)?)
}

pub(crate) fn now_of_day() -> Result<i64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(i64::try_from(now.as_nanos() % 86_400_000_000_000)?)
}

/// From one time of the day to a later one, at most half a day.
pub(crate) fn since(before: i64, after: i64) -> i64 {
    const DAY: i64 = 86_400_000_000_000;
    (after - before + DAY / 2).rem_euclid(DAY) - DAY / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_the_day_go_over_midnight() {
        let (before, after) = (
            of_day("2026-11-21T23:59:59.999999999Z").unwrap(),
            of_day("2026-11-22T00:00:00.000000004Z").unwrap(),
        );
        assert_eq!(since(before, after), 5);
        assert_eq!(since(after, before), -5);
    }
}
