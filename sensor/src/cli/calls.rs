//! `mcp-sensor calls`.

use super::{ControlArgs, Output, OutputArgs, client, events};
use crate::event::json::{Time, outcome_name};
use crate::event::text::{bytes, escape, milliseconds};
use crate::event::{Body, Event, exchange, json, pb};
use clap::{Args, ValueEnum};
use std::io::{self, Write};
use std::process::ExitCode;

/// Calls of tools, prompts and resources: who, what, how it ended, how long it took.
///
/// Sizes and times are of the messages as they went over the wire; what was said in
/// them is not recorded. A call appears when it has ended.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor calls
  mcp-sensor calls --follow --server github
  mcp-sensor calls --outcome tool_error,rpc_error --since 1h
  mcp-sensor calls --tool read_file -n 20 -o json")]
pub struct CallsArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    #[command(flatten)]
    pub output: OutputArgs,
    /// Then those to come, until interrupted.
    #[arg(short, long)]
    pub follow: bool,
    /// Only of this server.
    #[arg(long, value_name = "NAME")]
    pub server: Option<String>,
    /// Only of these tools (several with commas).
    #[arg(long, value_name = "TOOL", value_delimiter = ',')]
    pub tool: Vec<String>,
    /// Only those that ended so (several with commas).
    #[arg(long, value_enum, value_delimiter = ',')]
    pub outcome: Vec<OutcomeArg>,
    /// Not older than this: 90s, 10m, 2h, 1d, or a time as in events.
    #[arg(long, value_name = "AGE|TIME")]
    pub since: Option<String>,
    /// At most so many past ones, the newest.
    #[arg(short = 'n', long, value_name = "N")]
    pub limit: Option<u64>,
}

/// As events name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum OutcomeArg {
    Ok,
    ToolError,
    RpcError,
    Cancelled,
    NoResponse,
    InputRequired,
    Task,
}

impl OutcomeArg {
    fn outcome(self) -> pb::Outcome {
        match self {
            OutcomeArg::Ok => pb::Outcome::Ok,
            OutcomeArg::ToolError => pb::Outcome::ToolError,
            OutcomeArg::RpcError => pb::Outcome::RpcError,
            OutcomeArg::Cancelled => pb::Outcome::Cancelled,
            OutcomeArg::NoResponse => pb::Outcome::NoResponse,
            OutcomeArg::InputRequired => pb::Outcome::InputRequired,
            OutcomeArg::Task => pb::Outcome::Task,
        }
    }
}

/// Of the events that are calls.
const TYPES: [&str; 3] = ["tool_call", "prompt", "resource"];

pub(super) fn run(args: &CallsArgs) -> anyhow::Result<ExitCode> {
    let types: &[&str] = if args.tool.is_empty() { &TYPES } else { &TYPES[..1] };
    let request = pb::EventsRequest {
        follow: args.follow,
        server: args.server.clone().unwrap_or_default(),
        since_unix_ns: args.since.as_deref().map(events::since).transpose()?.unwrap_or(0),
        limit: args.limit.unwrap_or(0),
        types: types.iter().map(|t| (*t).to_owned()).collect(),
        tools: args.tool.clone(),
        outcomes: args.outcome.iter().map(|o| o.outcome().into()).collect(),
        ..Default::default()
    };
    let mut out = io::stdout().lock();
    if args.output.output == Output::Table {
        let headings = ["TIME", "SERVER", "CLIENT", "CALL", "OUTCOME", "MS", "IN", "OUT"];
        write_line(&mut out, &headings.map(str::to_owned))?;
    }
    client::block_on(events::each(&args.control, request, |event| {
        match args.output.output {
            Output::Json => json::write_line(event, &mut out)?,
            Output::Table => match event.body.as_ref() {
                // Told by the agent where this reader was too slow for it.
                Some(Body::Loss(l)) => writeln!(out, "… {} calls were not read in time", l.count)?,
                Some(body) => {
                    if let Some(cells) = cells(event, body) {
                        write_line(&mut out, &cells)?;
                    }
                }
                None => (),
            },
        }
        Ok(())
    }))?;
    Ok(ExitCode::SUCCESS)
}

/// `None`: it is no call.
fn cells(event: &Event, body: &Body) -> Option<[String; 8]> {
    let what = match body {
        Body::ToolCall(t) => t.tool.clone(),
        Body::Prompt(p) => format!("prompt {}", p.name),
        Body::Resource(r) => format!("resource {}://{}", r.scheme, r.host),
        _ => return None,
    };
    let none = pb::Exchange::default();
    let e = exchange(body).unwrap_or(&none);
    let actor = e.actor.clone().unwrap_or_default();
    let outcome = match e.outcome() {
        pb::Outcome::RpcError => format!("rpc_error {}", e.error_code),
        other => outcome_name(other).to_owned(),
    };
    Some([
        Time(event.time_unix_ns).to_string()[11..23].to_owned(),
        escape(&actor.server),
        actor.client.as_ref().map_or("-".to_owned(), |c| escape(&c.name)),
        escape(&what),
        outcome,
        milliseconds(e.duration_ns),
        bytes(e.request_bytes),
        bytes(e.response_bytes),
    ])
}

/// Widths stay as they are: lines come one by one.
fn write_line(out: &mut impl Write, cells: &[String; 8]) -> io::Result<()> {
    let [time, server, client, what, outcome, ms, request, response] = cells;
    writeln!(
        out,
        "{time:<12}  {server:<16}  {client:<16}  {what:<28}  {outcome:<16}  {ms:>8}  {request:>8}  {response:>8}"
    )
}
