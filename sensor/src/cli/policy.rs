//! `mcp-sensor policy …`.

use super::output::{self};
use super::status::policy_json;
use super::{ControlArgs, DEFAULT_POLICY, Exit, Failure, Output, OutputArgs, bundle, client, events};
use crate::event::text::{escape, escape_lines};
use crate::event::{json as event_json, pb};
use crate::policy::bundle::Bundle;
use crate::policy::command::{self, Format, Question, Status};
use crate::policy::explain::{Query, Target};
use crate::policy::model::Direction;
use crate::policy::suggest::Suggester;
use clap::{Args, Subcommand};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use time::OffsetDateTime;

/// Check, explain, derive, load and sign policies.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    Keygen(bundle::KeygenArgs),
    Sign(bundle::SignArgs),
    Verify(bundle::VerifyArgs),
    Check(PolicyCheckArgs),
    Explain(PolicyExplainArgs),
    Suggest(PolicySuggestArgs),
    Schema(PolicySchemaArgs),
    Show(PolicyShowArgs),
    Reload(PolicyReloadArgs),
}

/// Whether a policy file is valid; if not, where and why.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor policy check policy.yaml")]
pub struct PolicyCheckArgs {
    /// The policy file.
    #[arg(value_name = "FILE", env = "MCP_SENSOR_POLICY", default_value = DEFAULT_POLICY)]
    pub file: PathBuf,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Which rule decides about a destination, or about a tool.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor policy explain --server github --to 10.20.0.7:5432
  mcp-sensor policy explain --policy policy.yaml --server dns --to 9.9.9.9:53/udp
  mcp-sensor policy explain --server github --tool delete_repository")]
pub struct PolicyExplainArgs {
    /// The policy file; without it the one in force is asked for.
    #[arg(long, env = "MCP_SENSOR_POLICY", value_name = "FILE")]
    pub policy: Option<PathBuf>,
    #[command(flatten)]
    pub control: ControlArgs,
    /// The server, as the policy names it.
    #[arg(long, value_name = "NAME")]
    pub server: String,
    /// HOST_OR_IP:PORT, with /udp or /tcp after it if it is not TCP.
    #[arg(long, value_name = "ADDR", required_unless_present = "tool", conflicts_with = "tool")]
    pub to: Option<String>,
    /// Whether this tool may be called.
    #[arg(long, value_name = "TOOL")]
    pub tool: Option<String>,
    /// Under the launcher's profile.
    #[arg(long, conflicts_with = "tool")]
    pub launcher: bool,
    /// The address is a peer, with the server's own port.
    #[arg(long, conflicts_with = "tool")]
    pub inbound: bool,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// A minimal profile from what audit recorded.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor policy suggest --server github --since 1d
  mcp-sensor policy suggest --server github --events events.ndjson")]
pub struct PolicySuggestArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    /// The server, as the policy names it.
    #[arg(long, value_name = "NAME")]
    pub server: String,
    /// Records not older than this: 10m, 2h, 1d, or a time as in events.
    #[arg(long, value_name = "AGE|TIME")]
    pub since: Option<String>,
    /// Read the records from this file (as written by `run --events` or `collect`), not from the agent.
    #[arg(long, value_name = "FILE")]
    pub events: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// The JSON Schema of policy files.
#[derive(Args, Debug, Clone)]
pub struct PolicySchemaArgs {}

/// The policy in force.
#[derive(Args, Debug, Clone)]
pub struct PolicyShowArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Read the policy file again now (needs root).
#[derive(Args, Debug, Clone)]
pub struct PolicyReloadArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

pub(super) fn run(command: &PolicyCommand) -> anyhow::Result<ExitCode> {
    match command {
        PolicyCommand::Check(args) => finish(&command::check(&args.file, format(args.output.output))),
        PolicyCommand::Explain(args) => explain(args),
        PolicyCommand::Suggest(args) => suggest(args),
        PolicyCommand::Schema(_) => finish(&command::schema()),
        PolicyCommand::Show(args) => show(args),
        PolicyCommand::Reload(args) => reload(args),
        PolicyCommand::Keygen(args) => bundle::keygen(args),
        PolicyCommand::Sign(args) => bundle::sign(args),
        PolicyCommand::Verify(args) => bundle::verify(args),
    }
}

fn format(output: Output) -> Format {
    match output {
        Output::Table => Format::Text { color: output::color() },
        Output::Json => Format::Json,
    }
}

fn finish(done: &command::Output) -> anyhow::Result<ExitCode> {
    output::text(&done.text)?;
    let exit = match done.status {
        Status::Ok => Exit::Ok,
        Status::Invalid => Exit::PolicyInvalid,
        Status::NotFound | Status::NoServer => Exit::NotFound,
        Status::Denied => Exit::Denied,
    };
    Ok(exit.into())
}

fn explain(args: &PolicyExplainArgs) -> anyhow::Result<ExitCode> {
    let format = format(args.output.output);
    if let Some(tool) = &args.tool {
        return asked(args, Question::Tool { server: &args.server, tool }, format);
    }
    // The parser asks for one of the two.
    let to = args.to.as_deref().unwrap_or_default();
    let target: Target = to.parse().map_err(|error| {
        Failure::new(Exit::Usage, format!("--to: {error}"))
            .hint("an address is HOST_OR_IP:PORT, with /udp if it is UDP")
    })?;
    let query = Query {
        server: args.server.clone(),
        launcher: args.launcher,
        direction: if args.inbound { Direction::Inbound } else { Direction::Egress },
        target,
    };
    asked(args, Question::Destination(&query), format)
}

fn asked(args: &PolicyExplainArgs, question: Question<'_>, format: Format) -> anyhow::Result<ExitCode> {
    if let Some(file) = &args.policy {
        return finish(&command::explain(file, question, format));
    }
    let shown = show_from(&args.control)?;
    let path = shown.state.unwrap_or_default().path;
    let path = Path::new(&path);
    if shown.bundle.is_empty() {
        return finish(&command::explain_text(&shown.text, path, question, format));
    }
    // The agent has verified it.
    let bundle = Bundle::parse(&shown.bundle).map_err(|e| Failure::new(Exit::Failure, e.to_string()))?;
    finish(&command::explain_combined(Arc::new(bundle), &shown.text, path, question, format))
}

fn suggest(args: &PolicySuggestArgs) -> anyhow::Result<ExitCode> {
    let since = args.since.as_deref().map(events::since).transpose()?;
    let moment = |ns: i64| OffsetDateTime::from_unix_timestamp_nanos(ns.into());
    let from = since.map(moment).transpose()?;
    let format = format(args.output.output);
    if let Some(file) = &args.events {
        return finish(&command::suggest(file, &args.server, from, format));
    }
    let request = pb::EventsRequest {
        server: args.server.clone(),
        since_unix_ns: since.unwrap_or(0),
        ..Default::default()
    };
    let mut suggester = Suggester::new(args.server.as_str(), from);
    client::block_on(events::each(&args.control, request, |event| {
        let mut line = Vec::new();
        event_json::write_line(event, &mut line)?;
        suggester.line(&line);
        Ok(())
    }))?;
    finish(&command::suggested(&suggester.finish(), format))
}

pub(super) fn show_from(control: &ControlArgs) -> anyhow::Result<pb::PolicyShowResponse> {
    client::block_on(async {
        let mut control = client::connect(control).await?;
        let shown = control.policy_show(pb::PolicyShowRequest {}).await;
        Ok(shown.map_err(|s| client::failed(&s))?.into_inner())
    })
}

fn show(args: &PolicyShowArgs) -> anyhow::Result<ExitCode> {
    let shown = show_from(&args.control)?;
    match args.output.output {
        Output::Json => {
            let state = shown.state.as_ref().map(policy_json);
            let bundle = Bundle::parse(&shown.bundle).ok().map(|bundle| {
                let (name, text) = bundle.policy();
                json!({"version": bundle.version, "hash": bundle.hash, "file": name, "text": String::from_utf8_lossy(text)})
            });
            output::json(&json!({"state": state, "text": shown.text, "bundle": bundle}))?;
        }
        Output::Table => {
            let state = shown.state.unwrap_or_default();
            let mut text =
                format!("# {} (generation {}, {})\n", escape(&state.path), state.generation, state.hash);
            for warning in &state.warnings {
                text.push_str(&format!("# warning: {}\n", escape(warning)));
            }
            if let Ok(bundle) = Bundle::parse(&shown.bundle) {
                let (name, policy) = bundle.policy();
                text.push_str(&format!("# from bundle {}, {}:\n", bundle.version, escape(name)));
                text.push_str(&escape_lines(&String::from_utf8_lossy(policy)));
                text.push_str("\n# of this host:\n");
            }
            text.push_str(&escape_lines(&shown.text));
            if !text.ends_with('\n') {
                text.push('\n');
            }
            output::text(&text)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn reload(args: &PolicyReloadArgs) -> anyhow::Result<ExitCode> {
    let answer = client::block_on(async {
        let mut control = client::connect(&args.control).await?;
        let answer = control.policy_reload(pb::PolicyReloadRequest {}).await;
        Ok(answer
            .map_err(|status| match status.code() {
                tonic::Code::InvalidArgument => Failure::new(
                    Exit::PolicyInvalid,
                    escape_lines(status.message()),
                )
                .hint(
                    "the policy before it stays in force; `mcp-sensor policy check FILE` shows every finding",
                ),
                _ => client::failed(&status),
            })?
            .into_inner())
    })?;
    let state = answer.state.unwrap_or_default();
    match args.output.output {
        Output::Json => output::json(&json!({"changed": answer.changed, "state": policy_json(&state)}))?,
        Output::Table => {
            let what = if answer.changed { "in force" } else { "unchanged" };
            output::text(&format!("{}: generation {} {what}\n", escape(&state.path), state.generation))?;
            for warning in &state.warnings {
                output::text(&format!("warning: {}\n", escape(warning)))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
