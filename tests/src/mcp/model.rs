//! Agents that are whole programs, talked through a script by a model that is
//! none (`tests/servers/model.py`).

use super::servers::own;
use super::session::Session;
use crate::bed::Bed;
use crate::drivers::{found, installed};
use crate::run::Running;
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const PORT: u16 = 4001;
/// Hundreds of megabytes of program start.
const TURN: Duration = Duration::from_secs(180);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agent {
    ClaudeCode,
    Codex,
}

/// What the model asked for and was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    pub tool: String,
    pub error: bool,
}

#[derive(Deserialize)]
struct Line {
    #[serde(default)]
    id: String,
    asked: Option<String>,
    told: Option<String>,
    #[serde(default)]
    error: bool,
}

/// Has the agent start `session`'s server as `name` and call `calls`
/// (`[{"tool", "arguments"}]`), one after the other.
pub fn converse(bed: &Bed, agent: Agent, name: &str, session: &Session, calls: &Value) -> Result<Vec<Told>> {
    let folder = bed.folder.path();
    let log = folder.join(format!("{agent:?}.model"));
    let mut model = bed.command(found("python3").context("python3")?)?;
    model.arg(own("model.py")).arg(PORT.to_string()).arg(&log).arg(calls.to_string());
    let mut model = Running::start(model)?;
    model.wait_for_line("ready", TURN)?;
    let home = folder.join(format!("{agent:?}.home"));
    std::fs::create_dir_all(&home)?;
    let command = match agent {
        Agent::ClaudeCode => claude_code(bed, &home, name, session, calls)?,
        Agent::Codex => codex(bed, &home, name, session)?,
    };
    let done = Running::start(command)?.finish(TURN)?;
    ensure!(done.status.success(), "{agent:?}: {} {:?} {}", done.status, done.lines, done.stderr);
    let lines: Vec<Line> =
        std::fs::read_to_string(&log)?.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let outcome = |id: &str| lines.iter().find(|l| l.told.as_deref() == Some(id)).map(|l| l.error);
    let told = |l: &Line| {
        let error = outcome(&l.id).with_context(|| format!("no result for {}", l.id))?;
        Ok(Told { tool: l.asked.clone().unwrap_or_default(), error })
    };
    let told: Vec<Told> = lines.iter().filter(|l| l.asked.is_some()).map(told).collect::<Result<_>>()?;
    ensure!(Some(told.len()) == calls.as_array().map(Vec::len), "{told:?}: {:?} {}", done.lines, done.stderr);
    Ok(told)
}

fn claude_code(bed: &Bed, home: &Path, name: &str, session: &Session, calls: &Value) -> Result<Command> {
    let config = home.join("mcp.json");
    let (program, arguments) = session.command.split_first().context("a command")?;
    let servers = json!({"mcpServers": {name: {"command": program, "args": arguments}}});
    std::fs::write(&config, servers.to_string())?;
    let tools: Vec<String> = calls
        .as_array()
        .context("calls")?
        .iter()
        .filter_map(|c| Some(format!("mcp__{name}__{}", c["tool"].as_str()?)))
        .collect();
    let mut command = bed.command(installed("claude")?.join("node_modules/.bin/claude"))?;
    command.current_dir(home).env("HOME", home);
    command.env("ANTHROPIC_BASE_URL", format!("http://127.0.0.1:{PORT}")).env("ANTHROPIC_API_KEY", "x");
    for switch in ["DISABLE_TELEMETRY", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "DISABLE_AUTOUPDATER"] {
        command.env(switch, "1");
    }
    command.env("ENABLE_TOOL_SEARCH", "false");
    command.args(["-p", "go on", "--strict-mcp-config", "--mcp-config"]).arg(&config);
    command.arg("--allowedTools").arg(tools.join(","));
    Ok(command)
}

fn codex(bed: &Bed, home: &Path, name: &str, session: &Session) -> Result<Command> {
    let (program, arguments) = session.command.split_first().context("a command")?;
    let mut config =
        String::from("model = \"stub\"\nmodel_provider = \"stub\"\napproval_policy = \"never\"\n");
    write!(
        config,
        "[model_providers.stub]\nname = \"stub\"\nbase_url = \"http://127.0.0.1:{PORT}/v1\"\n\
         wire_api = \"responses\"\n[mcp_servers.{name}]\ncommand = {}\nargs = {}\n\
         default_tools_approval_mode = \"approve\"\nrequired = true\nstartup_timeout_sec = 60\n",
        json!(program),
        json!(arguments)
    )?;
    std::fs::write(home.join("config.toml"), config)?;
    let mut command = bed.command(installed("codex")?.join("node_modules/.bin/codex"))?;
    command.current_dir(home).env("HOME", home).env("CODEX_HOME", home);
    command.args(["exec", "--skip-git-repo-check", "go on"]);
    Ok(command)
}
