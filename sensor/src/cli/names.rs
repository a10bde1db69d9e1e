//! `mcp-sensor names`.

use super::output::{self, Table};
use super::status::age;
use super::{NamesArgs, Output, client};
use crate::event::json::Time;
use crate::event::text::escape;
use crate::event::{now, pb};
use serde_json::{Value, json};
use std::process::ExitCode;

pub(super) fn run(args: &NamesArgs) -> anyhow::Result<ExitCode> {
    let request = pb::NamesRequest { server: args.server.clone().unwrap_or_default() };
    let names = client::block_on(async {
        let mut control = client::connect(&args.control).await?;
        let mut stream = control.names(request).await.map_err(|s| client::failed(&s))?.into_inner();
        let mut names = Vec::new();
        while let Some(message) = stream.message().await.map_err(|s| client::failed(&s))? {
            names.extend(message.names);
        }
        Ok(names)
    })?;
    match args.output.output {
        Output::Json => output::json(&names.iter().map(to_json).collect())?,
        Output::Table => print(&names)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn to_json(n: &pb::LearnedName) -> Value {
    json!({
        "server": n.server, "name": n.name, "address": n.address, "netns": n.netns,
        "resolver": n.resolver, "ttl": n.ttl, "learned": Time(n.learned_unix_ns).to_string(),
        "until": Time(n.until_unix_ns).to_string(), "expired": n.expired, "rules": n.rules,
    })
}

/// How long a name still opens its address.
fn left(n: &pb::LearnedName, now: i64) -> String {
    if n.expired {
        return "expired".to_owned();
    }
    let seconds = n.until_unix_ns.saturating_sub(now).max(0) / 1_000_000_000;
    match (seconds / 3600, seconds / 60 % 60) {
        (0, 0) => format!("{seconds}s"),
        (0, minutes) => format!("{minutes}m {}s", seconds % 60),
        (hours, minutes) => format!("{hours}h {minutes}m"),
    }
}

fn print(names: &[pb::LearnedName]) -> anyhow::Result<()> {
    let mut table = Table::new(["SERVER", "NAME", "ADDRESS", "LEFT", "TTL", "RESOLVER", "AGE", "RULES"]);
    let now = now();
    for n in names {
        table.row([
            escape(&n.server),
            escape(&n.name),
            escape(&n.address),
            left(n, now),
            n.ttl.to_string(),
            escape(&n.resolver),
            age(n.learned_unix_ns),
            if n.rules.is_empty() { "none".to_owned() } else { escape(&n.rules.join(", ")) },
        ]);
    }
    table.print()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_told_as_people_say_it() {
        let name = |until: i64, expired| pb::LearnedName {
            until_unix_ns: until * 1_000_000_000,
            expired,
            ..Default::default()
        };
        assert_eq!(left(&name(42, false), 0), "42s");
        assert_eq!(left(&name(185, false), 0), "3m 5s");
        assert_eq!(left(&name(7260, false), 0), "2h 1m");
        assert_eq!(left(&name(42, true), 0), "expired");
        assert_eq!(left(&name(1, false), i64::MAX), "0s");
    }
}
