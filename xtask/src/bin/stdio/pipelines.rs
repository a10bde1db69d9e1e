//! What candidates cost: each program in the middle of a shell's pipeline has
//! pipes for stdin and stdout, and is looked at until it shows that it is none.

use std::{
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mcp_sensor_tests::cgroup::Subtree;

use crate::{
    Report,
    agent::{Agent, policy},
    client::enter,
    figures::median,
};

const PIPELINES: usize = 2000;

/// Prints the seconds that it took.
pub(crate) fn run(count: usize) -> Result<()> {
    let script = format!(
        "i=0; while [ $i -lt {count} ]; do seq 1000 | grep 7 | sort | tail -1 >/dev/null; i=$((i+1)); done"
    );
    let since = Instant::now();
    let status = Command::new("sh").args(["-c", &script]).stdin(Stdio::null()).status()?;
    ensure!(status.success(), "sh: {status}");
    println!("{}", since.elapsed().as_secs_f64());
    Ok(())
}

fn timed(cgroup: &Subtree, count: usize) -> Result<f64> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["pipelines", &count.to_string()]).stdin(Stdio::null()).stderr(Stdio::inherit());
    enter(&mut command, cgroup.entrance()?);
    let said = command.output()?;
    String::from_utf8_lossy(&said.stdout).trim().parse().context("the pipelines did not run")
}

struct Watched {
    seconds: f64,
    /// Of the agent, and of its thread that reads stdio.
    cpu: [f64; 2],
}

fn watched(report: &Report, cgroup: &Subtree, count: usize) -> Result<Watched> {
    let agent = Agent::start(report, cgroup, &policy(None))?;
    let mut events = agent.events();
    let before = agent.cpu()?;
    let seconds = timed(cgroup, count)?;
    ensure!(agent.reads()?, "no candidate was seen");
    // What is left in the rings.
    thread::sleep(Duration::from_millis(300));
    let after = agent.cpu()?;
    let mut found = 0;
    events.read(|e| found += u64::from(e.kind == "finding" || e.kind == "instance_started"))?;
    ensure!(found == 0, "{found} servers were found in shells' pipelines");
    Ok(Watched { seconds, cpu: [0, 1].map(|at| (after[at] - before[at]).as_secs_f64()) })
}

pub(crate) fn report(report: &Report) -> Result<String> {
    let count = PIPELINES.div_ceil(report.rounds);
    let mut rounds = Vec::new();
    for round in 0..report.rounds {
        let cgroup = Subtree::new()?;
        // There and back again: a drift of the machine falls on both.
        rounds.push(if round % 2 == 0 {
            let without = timed(&cgroup, count)?;
            (without, watched(report, &cgroup, count)?)
        } else {
            let with = watched(report, &cgroup, count)?;
            (timed(&cgroup, count)?, with)
        });
    }
    let total = count * report.rounds;
    let sum = |of: fn(&(f64, Watched)) -> f64| rounds.iter().map(of).sum::<f64>();
    let (without, with) = (sum(|r| r.0), sum(|r| r.1.seconds));
    let ratio = median(rounds.iter().map(|r| r.1.seconds / r.0));
    let each = |seconds: f64| seconds / total as f64 * 1e6;
    Ok(format!(
        "\n### Candidates\n\n| {total} times `seq 1000 \\| grep 7 \\| sort \\| tail -1` | no sensor | sensor looks for servers |\n\
         |---|---|---|\n\
         | wall time | {without:.2} s | {with:.2} s ({ratio:.3}) |\n\
         | of one | {:.0} µs | {:.0} µs |\n\
         | CPU time of the agent, of one | – | {:.0} µs (thread that reads stdio: {:.0} µs) |\n\n\
         Two candidates in each; no server was found in them.\n",
        each(without),
        each(with),
        each(sum(|r| r.1.cpu[0])),
        each(sum(|r| r.1.cpu[1]))
    ))
}
