//! How long a server that nobody declared goes free: from the kernel's time
//! stamp of its first message.

use std::{
    collections::HashMap,
    io::Read as _,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use mcp_sensor_tests::{cgroup::Subtree, policy::Policy};

use crate::{
    Report,
    agent::{Agent, Tail, now_of_day, of_day, since},
    client::{Caller, Server, enter, initialize},
    figures::{Budgets, percentile, shown},
};

/// Of all rounds, at least.
const STARTS: usize = 120;

/// Nanoseconds from the first message; infinite: not within two seconds.
struct Start {
    /// Until `instance_started` could be read.
    told: f64,
    /// Until connect() was denied.
    denied: f64,
}

/// What was seen of one process, nanoseconds of the day.
struct Seen {
    /// By the kernel: its first message.
    spoke: i64,
    told: i64,
}

pub(crate) fn report(report: &Report, budgets: &mut Budgets) -> Result<String> {
    let each = STARTS.div_ceil(report.rounds);
    let (mut starts, mut first) = (Vec::new(), Vec::new());
    for _ in 0..report.rounds {
        let mut round = round(report, each)?.into_iter();
        // For this one the programs were attached.
        let cold = round.next().context("no start")?;
        first.push(cold.denied);
        starts.push(cold);
        starts.extend(round);
    }
    let told: Vec<f64> = starts.iter().map(|s| s.told).collect();
    let denied: Vec<f64> = starts.iter().map(|s| s.denied).collect();
    let [p50, p99] = [0.5, 0.99].map(|share| percentile(&denied, share));
    let never = denied.iter().filter(|d| d.is_infinite()).count();
    budgets.add(
        "unknown server contained, from its first message, p99",
        "≤ 50 ms",
        &format!("{} (p50 {}; {never} of {} starts not at all)", shown(p99), shown(p50), starts.len()),
        p99 <= 50e6 && never == 0,
    );
    let row = |what: &str, values: &[f64]| {
        let [p50, p99, most] = [0.5, 0.99, 1.0].map(|share| shown(percentile(values, share)));
        format!("| {what} | {p50} | {p99} | {most} |\n")
    };
    Ok(format!(
        "\n### A server that nobody declared\n\n| from its first message, {} starts | p50 | p99 | most |\n|---|---|---|---|\n{}{}{}\n\
         The message's time is the kernel's; `instance_started` is read from the file of events; connect() is \
         tried every 0.1 ms.\n",
        starts.len(),
        row("`instance_started` can be read", &told),
        row("connect() is denied", &denied),
        row("the same, the first of a sensor's life", &first)
    ))
}

fn round(report: &Report, count: usize) -> Result<Vec<Start>> {
    let cgroup = Subtree::new()?;
    let agent = Agent::start(report, &cgroup, &Policy::default().unknown("none", "enforce"))?;
    let mut events = agent.events();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let watching = scope.spawn(|| watch(&mut events, &stop));
        let denied = (0..count).map(|_| start(&cgroup)).collect::<Result<Vec<_>>>();
        // The last event is on its way.
        thread::sleep(Duration::from_millis(500));
        stop.store(true, Ordering::Relaxed);
        let seen = watching.join().ok().context("a thread panicked")??;
        let starts = denied?.into_iter().map(|(pid, denied)| {
            let from = |spoke, time| since(spoke, time) as f64;
            match (seen.get(&pid), denied) {
                (Some(seen), Some(denied)) => {
                    Ok(Start { told: from(seen.spoke, seen.told), denied: from(seen.spoke, denied) })
                }
                (None, Some(_)) => bail!("process {pid} was denied, and no instance_started tells why"),
                (_, None) => Ok(Start { told: f64::INFINITY, denied: f64::INFINITY }),
            }
        });
        starts.collect()
    })
}

fn watch(events: &mut Tail, stop: &AtomicBool) -> Result<HashMap<u32, Seen>> {
    let mut seen = HashMap::new();
    while !stop.load(Ordering::Relaxed) {
        let mut bad = None;
        events.read(|event| {
            if event.kind == "instance_started" && event.server == "unknown" {
                match (of_day(&event.time), now_of_day()) {
                    (Ok(spoke), Ok(told)) => drop(seen.entry(event.pid).or_insert(Seen { spoke, told })),
                    (Err(error), _) | (_, Err(error)) => bad = Some(error),
                }
            }
        })?;
        if let Some(error) = bad {
            return Err(error);
        }
        thread::sleep(Duration::from_micros(200));
    }
    Ok(seen)
}

/// One server, from its start to its end: its process, and when it was denied.
fn start(cgroup: &Subtree) -> Result<(u32, Option<i64>)> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("connecting").stderr(Stdio::piped());
    enter(&mut command, cgroup.entrance()?);
    let mut server = Server::start(command)?;
    server.exchange(&initialize(1), Some(1))?;
    let mut said = String::new();
    server.child.stderr.take().context("no pipe")?.read_to_string(&mut said)?;
    let denied = match said.trim() {
        "never" => None,
        time => Some(time.parse().with_context(|| format!("a server that nobody declared: {said}"))?),
    };
    Ok((server.child.id(), denied))
}
