//! `mcp-sensor top`.

mod load;
mod screen;

use super::client::{self, connect};
use super::output::{self, Table};
use super::{ControlArgs, Exit, Failure, Output, OutputArgs};
use crate::event::json::{Time, mode_name};
use crate::event::text::{bytes, escape};
use crate::event::{now, pb};
use clap::Args;
use load::{Loads, Row};
use screen::Screen;
use serde_json::{Value, json};
use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};

/// What servers do right now: calls, errors, bytes, denials, response times.
///
/// Calls and bytes are those of the last second, errors and denials those since it
/// began, times those of the last minute (at most 1,000 calls of each server). `q`
/// or Ctrl-C ends it. Without a terminal the table is printed again and again.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor top
  mcp-sensor top -n 1
  mcp-sensor top -o json | jq -c '.servers[] | select(.denied > 0)'")]
pub struct TopArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    #[command(flatten)]
    pub output: OutputArgs,
    /// End after so many rounds.
    #[arg(short = 'n', long, value_name = "ROUNDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub rounds: Option<u64>,
}

const ROUND: Duration = Duration::from_secs(1);

/// Of events, all that something is counted of.
const TYPES: [&str; 10] = [
    "tool_call",
    "prompt",
    "resource",
    "mcp_message",
    "tools_listed",
    "connection",
    "socket",
    "unix_connection",
    "dns",
    "repeat",
];

pub(super) fn run(args: &TopArgs) -> anyhow::Result<ExitCode> {
    client::block_on(follow(args))?;
    Ok(ExitCode::SUCCESS)
}

async fn follow(args: &TopArgs) -> anyhow::Result<()> {
    let mut control = connect(&args.control).await?;
    let request = pb::EventsRequest {
        follow: true,
        since_unix_ns: now(),
        types: TYPES.map(str::to_owned).to_vec(),
        ..Default::default()
    };
    let mut events = control.events(request).await.map_err(|s| client::failed(&s))?.into_inner();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let live = args.output.output == Output::Table && io::stdout().is_terminal();
    let mut screen = if live { Some(Screen::take()?) } else { None };
    let mut keys = screen.as_mut().and_then(Screen::keys);
    let mut loads = Loads::default();
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + ROUND, ROUND);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut last = Instant::now();
    let mut rounds = 0;
    loop {
        tokio::select! {
            _ = interrupt.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
            () = screen::quit(&mut keys) => return Ok(()),
            message = events.message() => match message.map_err(|s| client::failed(&s))? {
                Some(message) => message.events.iter().for_each(|event| loads.event(event)),
                None => {
                    return Err(Failure::new(Exit::NoAgent, "the agent has ended").into());
                }
            },
            _ = ticks.tick() => {
                let servers = control.servers(pb::ServersRequest::default()).await;
                let servers = servers.map_err(|s| client::failed(&s))?.into_inner().servers;
                let seconds = last.elapsed().as_secs_f64();
                last = Instant::now();
                let rows = loads.round(&servers, seconds, now());
                show(args, screen.as_mut(), &rows, loads.lost(), seconds)?;
                rounds += 1;
                if args.rounds == Some(rounds) {
                    return Ok(());
                }
            }
        }
    }
}

fn show(
    args: &TopArgs,
    screen: Option<&mut Screen>,
    rows: &[Row],
    lost: u64,
    seconds: f64,
) -> anyhow::Result<()> {
    if args.output.output == Output::Json {
        // One line a round.
        return output::text(&format!("{}\n", to_json(rows, lost, seconds)));
    }
    let mut text = table(rows).render();
    if lost > 0 {
        text.push_str(&format!("… {lost} events were not read in time\n"));
    }
    match screen {
        Some(screen) => Ok(screen.draw(&text)?),
        None => {
            output::text(&format!("{text}\n"))?;
            Ok(io::stdout().flush()?)
        }
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new([
        "SERVER", "MODE", "RUNNING", "CALLS/S", "CALLS", "ERRORS", "BYTES/S", "DENIED", "P50 MS", "P99 MS",
    ]);
    for row in rows {
        let ms = |ms: Option<f64>| ms.map_or("-".to_owned(), |ms| format!("{ms:.1}"));
        table.row([
            escape(&row.server),
            mode_name(row.mode).to_owned(),
            row.instances.to_string(),
            format!("{:.1}", row.calls_per_second),
            row.calls.to_string(),
            row.errors.to_string(),
            bytes(row.bytes_per_second.round() as u64),
            row.denied.to_string(),
            ms(row.p50_ms),
            ms(row.p99_ms),
        ]);
    }
    table
}

fn to_json(rows: &[Row], lost: u64, seconds: f64) -> Value {
    let row = |row: &Row| {
        json!({
            "server": row.server, "mode": mode_name(row.mode), "instances": row.instances,
            "calls_per_second": row.calls_per_second, "calls": row.calls, "errors": row.errors,
            "bytes_per_second": row.bytes_per_second, "denied": row.denied,
            "p50_ms": row.p50_ms, "p99_ms": row.p99_ms,
        })
    };
    json!({
        "time": Time(now()).to_string(), "seconds": seconds, "lost": lost,
        "servers": rows.iter().map(row).collect::<Vec<_>>(),
    })
}
