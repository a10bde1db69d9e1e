//! How much can be read without loss, and that what is lost is told.

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use mcp_sensor_tests::cgroup::Subtree;

use crate::{
    Report,
    agent::{Agent, Event, Tail, policy},
    client::{Caller as _, INITIALIZED, Server, call, enter, initialize},
    figures::size,
    server::FIRST_ID,
};

/// Bytes of a result, and the first rate that is tried, results a second.
const SIZES: [(usize, f64); 3] = [(1024, 8000.0), (16 * 1024, 1500.0), (1 << 20, 25.0)];
const TIME: Duration = Duration::from_millis(1500);
/// Between the highest rate without loss and the lowest with it, at most.
const CLOSE: f64 = 1.15;

/// What one server and its client moved, and what came of it.
struct Run {
    results: u64,
    /// Of both directions, newlines included.
    moved: u64,
    seconds: f64,
    told: Told,
    /// CPUs' worth of the agent, and of its thread that reads stdio.
    cpu: [f64; 2],
    peak: f64,
}

/// Bytes by what the events say of them, newlines included.
#[derive(Default)]
struct Told {
    calls: u64,
    read: u64,
    /// By how.
    uninspected: BTreeMap<String, u64>,
    /// Events that did not come, by where.
    losses: BTreeMap<String, u64>,
}

impl Told {
    fn add(&mut self, event: &Event) {
        match event.kind.as_str() {
            "tool_call" | "mcp_message" => {
                self.calls += u64::from(event.kind == "tool_call");
                let newlines = u64::from(event.request_bytes > 0) + u64::from(event.response_bytes > 0);
                self.read += event.request_bytes + event.response_bytes + newlines;
            }
            "uninspected" => *self.uninspected.entry(event.how.clone()).or_default() += event.bytes,
            // Its count are bytes, the same that are told as `lost`.
            "loss" if event.reason == "stdio_ring_full" => {}
            "loss" => {
                *self.losses.entry(format!("{}/{}", event.place, event.reason)).or_default() += event.count;
            }
            _ => {}
        }
    }

    fn accounted(&self) -> u64 {
        self.read + self.uninspected.values().sum::<u64>()
    }
}

impl Run {
    fn is_whole(&self) -> bool {
        self.told.uninspected.is_empty() && self.told.losses.is_empty() && self.told.calls == self.results
    }

    /// Bytes a second.
    fn rate(&self) -> f64 {
        self.moved as f64 / self.seconds
    }

    fn shown(&self) -> String {
        format!(
            "{:.0} MB/s, {:.0} messages/s, agent {:.0} % of a CPU (reading {:.0} %), {:.0} MiB",
            self.rate() / 1e6,
            2.0 * self.results as f64 / self.seconds,
            self.cpu[0] * 100.0,
            self.cpu[1] * 100.0,
            self.peak
        )
    }

    fn lost(&self) -> String {
        let share = |bytes: u64| format!("{:.2} %", bytes as f64 / self.moved as f64 * 100.0);
        let mut parts: Vec<String> =
            self.told.uninspected.iter().map(|(how, bytes)| format!("{how} {}", share(*bytes))).collect();
        parts.extend(self.told.losses.iter().map(|(place, count)| format!("{count} events at {place}")));
        let missing = self.moved.abs_diff(self.told.accounted());
        let how = if self.told.accounted() > self.moved { "told twice" } else { "in no event" };
        if missing > 0 {
            parts.push(format!("{how} {missing} bytes ({})", share(missing)));
        }
        if parts.is_empty() { "nothing".to_owned() } else { parts.join(", ") }
    }
}

/// `per_second`: none: as fast as it goes.
fn run(
    agent: &Agent,
    cgroup: &Subtree,
    events: &mut Tail,
    bytes: usize,
    per_second: Option<f64>,
) -> Result<Run> {
    let mut command = agent.launch(&std::env::current_exe()?)?;
    command.args(["results", &bytes.to_string()]);
    enter(&mut command, cgroup.entrance()?);
    let mut server = Server::start(command)?;
    let hello = initialize(1);
    server.exchange(&hello, Some(1))?;
    server.exchange(INITIALIZED, None)?;
    let hello = (hello.len() + INITIALIZED.len() + 2 + server.said()) as u64;
    agent.forget_peak()?;
    let before = agent.cpu()?;
    let mut input = server.input.take().context("no stdin")?;
    let (output, since) = (server.output.get_mut(), Instant::now());
    let (asked, (results, came)) = thread::scope(|scope| -> Result<_> {
        let reading = scope.spawn(move || -> io::Result<(u64, u64)> {
            let (mut lines, mut bytes, mut buffer) = (0, 0, vec![0; 256 * 1024]);
            loop {
                match output.read(&mut buffer)? {
                    0 => return Ok((lines, bytes)),
                    n => {
                        bytes += n as u64;
                        lines += buffer[..n].iter().filter(|b| **b == b'\n').count() as u64;
                    }
                }
            }
        });
        let asked = ask(&mut input, since, per_second);
        // The server ends with its stdin, and the reader with it.
        drop(input);
        let came = reading.join().ok().context("a thread panicked")??;
        Ok((asked?, came))
    })?;
    let seconds = since.elapsed().as_secs_f64();
    server.finish(Duration::from_secs(5))?;
    let moved = hello + asked + came;
    let told = settled(events, moved)?;
    let after = agent.cpu()?;
    let cpu = [0, 1].map(|at| (after[at] - before[at]).as_secs_f64() / seconds);
    Ok(Run { results, moved, seconds, told, cpu, peak: agent.peak()? })
}

/// Sends requests for [`TIME`]; returns their bytes.
fn ask(input: &mut impl Write, since: Instant, per_second: Option<f64>) -> Result<u64> {
    let (mut made, mut bytes) = (0, 0);
    while since.elapsed() < TIME {
        let due = per_second.map_or(made + 64, |rate| (since.elapsed().as_secs_f64() * rate) as u64);
        let mut batch = String::new();
        for at in made..due {
            batch += &call(FIRST_ID + at, "next");
            batch.push('\n');
        }
        made = due;
        bytes += batch.len() as u64;
        input.write_all(batch.as_bytes())?;
        if per_second.is_some() {
            thread::sleep(Duration::from_micros(500));
        }
    }
    Ok(bytes)
}

/// What the events say, when they say it all or nothing more.
fn settled(events: &mut Tail, moved: u64) -> Result<Told> {
    // What is lost is told by the second look after the end, a second apart.
    const QUIET: Duration = Duration::from_millis(2500);
    const POLL: Duration = Duration::from_millis(20);
    let (mut told, mut last) = (Told::default(), Instant::now());
    while last.elapsed() < QUIET && told.accounted() < moved {
        let mut came = false;
        events.read(|event| {
            came |= matches!(event.kind.as_str(), "tool_call" | "uninspected");
            told.add(&event);
        })?;
        if came {
            last = Instant::now();
        }
        thread::sleep(POLL);
    }
    // The instance's end, so that it is no part of what follows.
    thread::sleep(POLL);
    events.read(|event| told.add(&event))?;
    Ok(told)
}

struct Found {
    bytes: usize,
    best: Option<Run>,
    /// The lowest rate with loss; none: the load goes no faster.
    worst: Option<Run>,
    flat_out: Run,
}

fn search(agent: &Agent, cgroup: &Subtree, bytes: usize, first: f64) -> Result<Found> {
    let mut events = agent.events();
    events.read(|_| {})?;
    let (mut best, mut worst): (Option<Run>, Option<Run>) = (None, None);
    let (mut low, mut high, mut rate) = (0.0, f64::INFINITY, first);
    while high / low > CLOSE {
        let run = run(agent, cgroup, &mut events, bytes, Some(rate))?;
        let reached = run.results as f64 / run.seconds;
        if run.is_whole() {
            low = rate;
            best = Some(run);
            if reached < 0.8 * rate {
                break;
            }
        } else {
            high = rate;
            worst = Some(run);
            if rate < first / 64.0 {
                break;
            }
        }
        rate = match (low > 0.0, high.is_finite()) {
            (true, true) => (low * high).sqrt(),
            (true, false) => low * 2.0,
            _ => high / 2.0,
        };
    }
    let flat_out = run(agent, cgroup, &mut events, bytes, None)?;
    Ok(Found { bytes, best, worst, flat_out })
}

pub(crate) fn report(report: &Report) -> Result<String> {
    let cgroup = Subtree::new()?;
    let agent = Agent::start(report, &cgroup, &policy(None))?;
    let mut text = String::from(
        "\n### How much can be read\n\n| results of | the most without loss | the least with loss | as fast as it goes | \
         of that not read |\n|---|---|---|---|---|\n",
    );
    for (bytes, first) in SIZES {
        let found =
            search(&agent, &cgroup, bytes, first).with_context(|| format!("results of {}", size(bytes)))?;
        let best = found.best.as_ref().map_or_else(|| "none of those tried".to_owned(), Run::shown);
        let worst = found.worst.as_ref().map_or_else(
            || "the load goes no faster".to_owned(),
            |run| format!("{:.0} MB/s: {}", run.rate() / 1e6, run.lost()),
        );
        text += &format!(
            "| {} | {best} | {worst} | {} | {} |\n",
            size(found.bytes),
            found.flat_out.shown(),
            found.flat_out.lost()
        );
    }
    Ok(text
        + &format!(
            "\nOne labelled server, its client drains, each rate for {:.1} s on the same CPUs; each measured once. \
             Bytes are of both directions, and those that the client counted are held against those in events: \
             of a message, or `uninspected` (`lost`: the ring was full; `garbage`: the rest of a message of which \
             something was lost). Bytes in no event were read: they answer a request that was lost.\n",
            TIME.as_secs_f64()
        ))
}
