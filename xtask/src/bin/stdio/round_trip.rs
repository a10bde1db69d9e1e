//! A tool call there and back: without a sensor, of a server that it knows and
//! reads, and behind a proxy. One server process is measured without the
//! sensor, with it, and without it again: two processes of the same program
//! differ more than what is looked for.

use std::{
    fmt::Write as _,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use mcp_sensor_tests::cgroup::Subtree;

use crate::{
    Report,
    agent::{Agent, policy},
    client::{CPU, Caller, OTHER_CPU, OnCpu, Server, Session, enter, on_cpu, pin},
    figures::{Budgets, median, percentile, shown, size},
    proxy::Proxy,
    server::prose,
};

const SIZES: [usize; 2] = [100, 64 * 1024];
/// Of one size, in one setting, in one round.
const TIME: Duration = Duration::from_millis(400);
/// The same where calls are paced, and from one of these to the next. A model
/// thinks between two calls; back to back, a sensor on two CPUs is behind.
const PACED_TIME: Duration = Duration::from_millis(1000);
const PACE: Duration = Duration::from_millis(5);
/// Sensors after each other in one round of paced calls: how soon an idle CPU of a
/// virtual machine wakes moves by more than what is looked for.
const PACED_SENSORS: usize = 6;
/// Until compilers have settled; the most of it is node's, which goes on compiling
/// for seconds.
const SETTLE: Duration = Duration::from_secs(4);
/// Until caches have.
const WARM_UP: Duration = Duration::from_millis(600);

/// Which server is called, how, and where it runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// With a pause after each call; client and server have a CPU each, as else it is
    /// the scheduler's choice of one or two that is measured.
    Paced,
    /// One call after the other.
    BackToBack,
    /// On the client's CPU: no wake-up of another hides anything.
    RealBeside,
    MinimalBeside,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Kind::Paced => "server-everything, 200 calls/s",
            Kind::BackToBack => "server-everything, back to back",
            Kind::RealBeside => "the same on one CPU",
            Kind::MinimalBeside => "minimal, back to back on one CPU",
        }
    }

    const fn is_real(self) -> bool {
        !matches!(self, Kind::MinimalBeside)
    }

    /// Of the server.
    fn place(self, command: &mut Command) {
        match self {
            Kind::Paced => pin(command, OTHER_CPU),
            Kind::BackToBack => {}
            Kind::RealBeside | Kind::MinimalBeside => pin(command, CPU),
        }
    }

    /// Of the client, which is this thread.
    fn here(self) -> Result<Option<OnCpu>> {
        if self == Kind::BackToBack { Ok(None) } else { on_cpu().map(Some) }
    }

    /// How many sensors see one server.
    const fn sensors(self) -> usize {
        if matches!(self, Kind::Paced) { PACED_SENSORS } else { 1 }
    }

    /// How long each took, nanoseconds.
    fn calls<C: Caller>(self, session: &mut Session<C>, message: &str, time: Duration) -> Result<Vec<f64>> {
        match self {
            Kind::Paced => session.call_paced(message, time, PACE),
            _ => session.call_for(message, time),
        }
    }

    fn figure<C: Caller>(self, session: &mut Session<C>, message: &str) -> Result<Figure> {
        let time = if self == Kind::Paced { PACED_TIME } else { TIME };
        Ok(Figure::of(&self.calls(session, message, time)?))
    }

    fn command(self, report: &Report) -> Result<Command> {
        Ok(if self.is_real() {
            let mut command = Command::new("node");
            command.arg(&report.everything);
            command
        } else {
            let mut command = Command::new(std::env::current_exe()?);
            command.arg("echo");
            command
        })
    }

    /// What the policy knows it by.
    fn matched(self, report: &Report) -> Result<String> {
        Ok(if self.is_real() {
            format!("argv: ['{}']", report.everything.display())
        } else {
            format!("exe: '{}'", std::env::current_exe()?.display())
        })
    }
}

/// Nanoseconds.
#[derive(Clone, Copy)]
struct Figure {
    p50: f64,
    p99: f64,
}

impl Figure {
    fn of(times: &[f64]) -> Figure {
        Figure { p50: percentile(times, 0.5), p99: percentile(times, 0.99) }
    }
}

type Percentile = (&'static str, fn(&Figure) -> f64);
const PERCENTILES: [Percentile; 2] = [("p50", |f| f.p50), ("p99", |f| f.p99)];

/// Calls that the sensor was to see.
#[derive(Clone, Copy, Default)]
struct Seen {
    calls: u64,
    read: u64,
    /// Bytes that the sensor could not read, and told.
    unread: u64,
    /// Their events made room for others; the sensor says how many.
    dropped: u64,
}

impl Seen {
    fn add(&mut self, more: Seen) {
        self.calls += more.calls;
        self.read += more.read;
        self.unread += more.unread;
        self.dropped += more.dropped;
    }
}

/// Of one server, one size and one sensor.
struct Round {
    before: Figure,
    with: Figure,
    after: Figure,
    proxied: Option<Figure>,
}

impl Round {
    /// Without a sensor.
    fn without(&self, of: fn(&Figure) -> f64) -> f64 {
        f64::midpoint(of(&self.before), of(&self.after))
    }
}

const KINDS: [Kind; 4] = [Kind::Paced, Kind::BackToBack, Kind::RealBeside, Kind::MinimalBeside];

pub(crate) fn report(report: &Report, budgets: &mut Budgets) -> Result<String> {
    let mut all = Seen::default();
    let mut rounds: Vec<Vec<Round>> = (0..KINDS.len() * SIZES.len()).map(|_| Vec::new()).collect();
    for _ in 0..report.rounds {
        for (at, kind) in KINDS.into_iter().enumerate() {
            let (made, seen) =
                round(report, kind).with_context(|| format!("round trips of {}", kind.name()))?;
            for made in made {
                for (figures, made) in rounds[at * SIZES.len()..].iter_mut().zip(made) {
                    figures.push(made);
                }
            }
            all.add(seen);
        }
    }
    let mut text = format!(
        "\n### Tool calls\n\n| server, arguments | | no sensor | labelled and captured | {} |\n|---|---|---|---|---|\n",
        if report.proxy.is_some() { "behind mcp-proxy" } else { "no proxy to compare with" }
    );
    for (at, rounds) in rounds.iter().enumerate() {
        let (kind, bytes) = (KINDS[at / SIZES.len()], SIZES[at % SIZES.len()]);
        for (name, of) in PERCENTILES {
            write!(text, "| {}, {} | {name} |", kind.name(), size(bytes))?;
            let again = median(rounds.iter().map(|r| of(&r.after) / of(&r.before)));
            write!(text, " {} (again {again:.2}) |", shown(median(rounds.iter().map(|r| r.without(of)))))?;
            let ratio = median(rounds.iter().map(|r| of(&r.with) / r.without(of)));
            write!(text, " {} ({ratio:.2}) |", shown(median(rounds.iter().map(|r| of(&r.with)))))?;
            let proxied = || rounds.iter().filter_map(|r| Some((r, r.proxied.as_ref()?)));
            if proxied().next().is_some() {
                let ratio = median(proxied().map(|(r, p)| of(p) / r.without(of)));
                write!(text, " {} ({ratio:.2})", shown(median(proxied().map(|(_, p)| of(p)))))?;
            }
            text.push_str(" |\n");
        }
        let more = (median(rounds.iter().map(|r| r.with.p50 / r.without(|f| f.p50))) - 1.0) * 100.0;
        let added = median(rounds.iter().map(|r| r.with.p50 - r.without(|f| f.p50)));
        // The others are shown, not judged. Back to back, three busy programs share two CPUs; on
        // one CPU a program that does nothing takes 5 %.
        if kind == Kind::Paced {
            budgets.add(
                &format!("tool call, {}, {}, labelled and captured", kind.name(), size(bytes)),
                "≤ +5 %",
                &format!("{more:+.1} % ({:+.1} µs)", added / 1e3),
                more <= 5.0,
            );
        }
    }
    write!(
        text,
        "\nIn brackets: to no sensor, of the same round; \"again\" is no sensor after the sensor to before it, \
         which is what the machine does by itself. \"200 calls/s\": a call every 5 ms, client and server on a CPU \
         each, {PACED_SENSORS} sensors after each other in each round; \"back to back\": the next at once, where \
         the scheduler puts them, which with the sensor makes three busy programs; \"one CPU\": client and server \
         share it, which makes the shortest round trips. The sensor runs where the scheduler puts it. The proxy \
         speaks streamable HTTP to the client and stdio to the server; no sensor runs then. The \
         sensor saw {} of {} calls; {:.2} MB were too fast for it and are told as uninspected, {} events were \
         dropped before the file and told.\n",
        all.read,
        all.calls,
        all.unread as f64 / 1e6,
        all.dropped
    )?;
    Ok(text)
}

fn round(report: &Report, kind: Kind) -> Result<(Vec<[Round; SIZES.len()]>, Seen)> {
    let messages = SIZES.map(prose);
    let cgroup = Subtree::new()?;
    let mut command = kind.command(report)?;
    enter(&mut command, cgroup.entrance()?);
    kind.place(&mut command);
    let mut session = Session::open(Server::start(command)?)?;
    if kind.is_real() {
        for message in &messages {
            session.call_for(message, SETTLE / 2)?;
        }
    }
    let mut without = vec![measure(kind, &mut session, &messages)?];
    let mut with = Vec::new();
    let mut seen = Seen::default();
    for _ in 0..kind.sensors() {
        let agent = Agent::start(report, &cgroup, &policy(Some(&kind.matched(report)?)))?;
        let (figures, more) = watched(kind, &agent, &mut session, &messages)?;
        with.push(figures);
        seen.add(more);
        drop(agent);
        without.push(measure(kind, &mut session, &messages)?);
    }
    drop(session);
    let proxied = match &report.proxy {
        Some(proxy) => {
            let start = |command: &mut Command| kind.place(command);
            let mut session = Session::open(Proxy::start(proxy, &kind.command(report)?, start)?)?;
            measure(kind, &mut session, &messages)?.map(Some)
        }
        None => [None; SIZES.len()],
    };
    let rounds = with.iter().zip(without.windows(2)).map(|(with, without)| {
        std::array::from_fn(|at| Round {
            before: without[0][at],
            with: with[at],
            after: without[1][at],
            proxied: proxied[at],
        })
    });
    Ok((rounds.collect(), seen))
}

fn measure<C: Caller>(kind: Kind, session: &mut Session<C>, messages: &[String; 2]) -> Result<[Figure; 2]> {
    // Not longer: a sensor that is started would inherit it.
    let _here = kind.here()?;
    for message in messages {
        kind.calls(session, message, WARM_UP / 2)?;
    }
    let [small, large] = messages;
    Ok([kind.figure(session, small)?, kind.figure(session, large)?])
}

/// The same when the sensor has found the server; each call must be seen.
fn watched(
    kind: Kind,
    agent: &Agent,
    session: &mut Session<Server>,
    messages: &[String; 2],
) -> Result<([Figure; 2], Seen)> {
    const LIMIT: Duration = Duration::from_secs(10);
    // What is lost is told by a look every second.
    const QUIET: Duration = Duration::from_millis(2500);
    let mut events = agent.events();
    let mut found = false;
    let end = Instant::now() + LIMIT;
    while !found {
        ensure!(Instant::now() < end, "the sensor does not find the server that runs");
        session.call("found?")?;
        thread::sleep(Duration::from_millis(50));
        events.read(|e| found |= e.kind == "tool_call")?;
    }
    // What is under way.
    thread::sleep(Duration::from_millis(100));
    events.read(|_| {})?;
    let from = session.calls();
    let figures = measure(kind, session, messages)?;
    let calls = session.calls() - from;
    let mut seen = Seen { calls, ..Seen::default() };
    let mut last = Instant::now();
    while seen.read + seen.dropped < calls && last.elapsed() < QUIET {
        events.read(|e| {
            match e.kind.as_str() {
                "tool_call" => seen.read += 1,
                "loss" if e.place == "subscriber:file" => seen.dropped += e.count,
                "uninspected" => seen.unread += e.bytes,
                _ => return,
            }
            last = Instant::now();
        })?;
        thread::sleep(Duration::from_millis(10));
    }
    ensure!(
        seen.read + seen.dropped >= calls || seen.unread > 0,
        "{} of {calls} calls were seen, and nothing is told of the others",
        seen.read
    );
    Ok((figures, seen))
}
