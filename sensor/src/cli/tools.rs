//! `mcp-sensor tools`.

use super::output::{self, Table};
use super::status::age;
use super::{ControlArgs, Output, OutputArgs, client};
use crate::event::json::{Time, era_name};
use crate::event::pb;
use crate::event::text::escape;
use clap::Args;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::ExitCode;

/// What servers listed as their tools, with hashes and when they changed.
///
/// A hash covers a tool's name, description, schemas and annotations, whatever the
/// order of keys; it stays as it is over sessions, protocol eras and restarts of the
/// sensor. Servers may list other tools to other clients: the lists are kept apart.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor tools
  mcp-sensor tools github
  mcp-sensor tools github -o json")]
pub struct ToolsArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    #[command(flatten)]
    pub output: OutputArgs,
    /// Only of this server.
    #[arg(value_name = "SERVER")]
    pub server: Option<String>,
}

/// Characters of a hash in the table.
const SHORT_HASH: usize = 12;

pub(super) fn run(args: &ToolsArgs) -> anyhow::Result<ExitCode> {
    let request = pb::ToolsRequest { server: args.server.clone().unwrap_or_default() };
    let servers = client::block_on(async {
        let mut control = client::connect(&args.control).await?;
        let mut stream = control.tools(request).await.map_err(|s| client::failed(&s))?.into_inner();
        let mut servers = Vec::new();
        while let Some(message) = stream.message().await.map_err(|s| client::failed(&s))? {
            servers.extend(message.server);
        }
        Ok(servers)
    })?;
    match args.output.output {
        Output::Json => output::json(&servers.iter().map(to_json).collect())?,
        Output::Table => table(&servers).print()?,
    }
    Ok(ExitCode::SUCCESS)
}

fn to_json(s: &pb::ServerTools) -> Value {
    let tool = |t: &pb::ListedTool| {
        let none = pb::Tool::default();
        let tool = t.tool.as_ref().unwrap_or(&none);
        json!({
            "name": tool.name, "hash": tool.hash, "description_hash": tool.description_hash,
            "schema_hash": tool.schema_hash, "first_seen": Time(t.first_seen_unix_ns).to_string(),
            "changed": Time(t.changed_unix_ns).to_string(),
        })
    };
    let list = |l: &pb::ToolList| {
        json!({
            "era": era_name(l.era()), "capabilities_hash": l.capabilities_hash, "list_hash": l.list_hash,
            "seen": Time(l.seen_unix_ns).to_string(), "incomplete": l.incomplete,
            "tools": l.tools.iter().map(tool).collect::<Vec<_>>(),
        })
    };
    let said = s.server_info.as_ref().map(|i| json!({"server_info": {"name": i.name, "version": i.version}}));
    json!({
        "server": s.server, "program": s.program, "seen": Time(s.seen_unix_ns).to_string(),
        "self_reported": said, "package_version": s.package_version, "entry_point": s.entry_point,
        "lists": s.lists.iter().map(list).collect::<Vec<_>>(),
    })
}

struct ToolRow<'a> {
    tool: &'a pb::Tool,
    first_seen: i64,
    changed: i64,
    listed: i64,
    eras: Vec<&'static str>,
}

impl<'a> ToolRow<'a> {
    fn of(tool: &'a pb::Tool, listed: &pb::ListedTool) -> ToolRow<'a> {
        let (first_seen, changed) = (listed.first_seen_unix_ns, listed.changed_unix_ns);
        ToolRow { tool, first_seen, changed, listed: 0, eras: Vec::new() }
    }

    fn add(&mut self, list: &pb::ToolList, listed: &pb::ListedTool) {
        self.first_seen = self.first_seen.min(listed.first_seen_unix_ns);
        self.changed = self.changed.min(listed.changed_unix_ns);
        self.listed = self.listed.max(list.seen_unix_ns);
        let era = era_name(list.era());
        if !era.is_empty() && !self.eras.contains(&era) {
            self.eras.push(era);
        }
    }
}

/// A tool that is the same in several lists is one row.
fn table(servers: &[pb::ServerTools]) -> Table {
    let mut table = Table::new([
        "SERVER",
        "PROGRAM",
        "TOOL",
        "HASH",
        "DESCRIPTION",
        "SCHEMA",
        "FIRST SEEN",
        "CHANGED",
        "LISTED",
        "ERA",
    ]);
    for s in servers {
        let mut rows: BTreeMap<(&str, &str), ToolRow> = BTreeMap::new();
        for list in &s.lists {
            for listed in &list.tools {
                let Some(tool) = &listed.tool else { continue };
                let row = rows.entry((&tool.name, &tool.hash)).or_insert_with(|| ToolRow::of(tool, listed));
                row.add(list, listed);
            }
        }
        for ToolRow { tool, first_seen, changed, listed, eras } in rows.into_values() {
            let short = |hash: &str| escape(hash.get(..SHORT_HASH).unwrap_or(hash));
            table.row([
                escape(&s.server),
                escape(&s.program),
                escape(&tool.name),
                short(&tool.hash),
                short(&tool.description_hash),
                short(&tool.schema_hash),
                age(first_seen),
                if changed > first_seen { age(changed) } else { "-".to_owned() },
                age(listed),
                eras.join(", "),
            ]);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_tool_in_two_eras_is_one_row() {
        let tool = |hash: &str| pb::ListedTool {
            tool: Some(pb::Tool { name: "now".to_owned(), hash: hash.repeat(32), ..Default::default() }),
            first_seen_unix_ns: 1,
            changed_unix_ns: 1,
        };
        let list = |era: pb::Era, hash: &str| pb::ToolList {
            era: era.into(),
            tools: vec![tool(hash)],
            ..Default::default()
        };
        let server = |lists| pb::ServerTools { server: "time".to_owned(), lists, ..Default::default() };
        let same = table(&[server(vec![list(pb::Era::Legacy, "ab"), list(pb::Era::Modern, "ab")])]).render();
        assert_eq!(same.lines().count(), 2, "{same}");
        assert!(same.contains("abababababab ") && same.trim_end().ends_with("legacy, modern"), "{same}");
        let other = table(&[server(vec![list(pb::Era::Legacy, "ab"), list(pb::Era::Modern, "cd")])]).render();
        assert_eq!(other.lines().count(), 3, "{other}");
    }
}
