//! Coding agents, with a scripted model behind them: what the model asked for
//! and was told is what the sensor records. Several hundred megabytes each:
//! `cargo xtask test --full`.

use anyhow::{Result, ensure};
use mcp_sensor_tests::bed::Bed;
use mcp_sensor_tests::drivers::found;
use mcp_sensor_tests::mcp::events::shown;
use mcp_sensor_tests::mcp::log::Call;
use mcp_sensor_tests::mcp::model::{Agent, Told, converse};
use mcp_sensor_tests::mcp::servers::{self, Server};
use mcp_sensor_tests::policy::Policy;
use mcp_sensor_tests::sensor::Sensor;
use mcp_sensor_tests::spec::{Claim, run};
use serde_json::{Value, json};

fn is_recorded(agent: Agent, server: &Server, calls: &Value) -> Result<Claim> {
    for program in ["python3", "node", "npm"] {
        if found(program).is_none() {
            return Ok(Claim::Skipped(format!("{program} is not installed (ENOENT)")));
        }
    }
    let bed = Bed::new()?;
    let sensor = Sensor::start(&bed, &server.declared(Policy::default()))?;
    let mark = sensor.mark()?;
    let told = converse(&bed, agent, server.name, &server.session, calls)?;
    let events = sensor.exactly(mark, "tool_call", server.name, told.len())?;
    let seen: Vec<Told> =
        events.iter().map(Call::of_event).map(|c| Told { tool: c.tool, error: c.outcome != "ok" }).collect();
    ensure!(seen == told, "the model: {told:?}, the sensor: {seen:?}");
    let wanted = if agent == Agent::Codex { "codex" } else { "claude" };
    let other = events.iter().find(|e| !e.0["client"].to_string().contains(wanted));
    ensure!(other.is_none(), "another client: {other:?}");
    let unread = sensor.since(mark, "uninspected", server.name)?;
    ensure!(unread.is_empty(), "unread: {}", shown(&unread));
    Ok(Claim::Holds)
}

fn time_calls() -> Value {
    json!([
        {"tool": "get_current_time", "arguments": {"timezone": "Etc/UTC"}},
        {"tool": "convert_time", "arguments": {
            "source_timezone": "Etc/UTC", "time": "12:30", "target_timezone": "Asia/Tokyo"}},
        {"tool": "get_current_time", "arguments": {"timezone": "Mars/Olympus"}},
    ])
}

fn everything_calls() -> Value {
    json!([
        {"tool": "echo", "arguments": {"message": "from the model"}},
        {"tool": "get-sum", "arguments": {"a": 1, "b": 2}},
    ])
}

#[test]
#[ignore = "361 MB"]
fn claude_code_with_mcp_server_time_is_recorded() {
    run(|| is_recorded(Agent::ClaudeCode, &servers::time()?, &time_calls()));
}

#[test]
#[ignore = "361 MB"]
fn claude_code_with_server_everything_is_recorded() {
    run(|| is_recorded(Agent::ClaudeCode, &servers::everything()?, &everything_calls()));
}

#[test]
#[ignore = "404 MB"]
fn codex_with_mcp_server_time_is_recorded() {
    run(|| is_recorded(Agent::Codex, &servers::time()?, &time_calls()));
}

#[test]
#[ignore = "404 MB"]
fn codex_with_server_everything_is_recorded() {
    run(|| is_recorded(Agent::Codex, &servers::everything()?, &everything_calls()));
}
