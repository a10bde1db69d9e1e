//! `mcp-sensor fleet`.

use super::output::{self, Table};
use super::status::{age, bundle_json};
use super::{DEFAULT_LISTEN, Output, OutputArgs, TlsArgs, client, collector};
use crate::event::json::Time;
use crate::event::pb;
use crate::event::text::escape;
use clap::Args;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::ExitCode;

/// The sensors that feed a collector: versions, policies, lag and losses.
///
/// NEWEST is the age of a sensor's newest event that is stored; WAITING is how many
/// events it still had to send when it connected. Host, version and policy are what
/// a sensor says of itself. Of each output: how far it is BEHIND in the log, what is
/// LOST to it, and why it takes nothing.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor fleet
  mcp-sensor fleet --collector unix:/run/mcp-sensor/collect.sock
  mcp-sensor fleet --sensor web-1 -o json")]
pub struct FleetArgs {
    /// The collector: https://HOST:PORT, http://127.0.0.1:PORT or unix:/PATH.
    #[arg(long, env = "MCP_SENSOR_COLLECTOR", value_name = "ADDR", default_value = DEFAULT_LISTEN)]
    pub collector: String,
    #[command(flatten)]
    pub tls: TlsArgs,
    #[command(flatten)]
    pub output: OutputArgs,
    /// Only these (several with commas).
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub sensor: Vec<String>,
}

/// Characters of a policy's hash in the table.
const SHORT_HASH: usize = 12;

pub(super) fn run(args: &FleetArgs) -> anyhow::Result<ExitCode> {
    let fleet = client::block_on(async {
        let mut collector = collector::connect(&args.collector, &args.tls).await?;
        let request = pb::FleetRequest { sensors: args.sensor.clone() };
        Ok(collector.fleet(request).await.map_err(|s| collector::failed(&s))?.into_inner())
    })?;
    match args.output.output {
        Output::Json => output::json(&to_json(&fleet))?,
        Output::Table => print(&fleet)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn time(unix_ns: i64) -> Value {
    if unix_ns == 0 { Value::Null } else { Time(unix_ns).to_string().into() }
}

/// Events that the sensor numbered and this collector does not have; as of its
/// last connection.
fn waiting(s: &pb::FleetSensor) -> u64 {
    s.next_seq.saturating_sub(s.committed_seq + 1)
}

fn to_json(fleet: &pb::FleetResponse) -> Value {
    let sensor = |s: &pb::FleetSensor| {
        json!({
            "sensor": s.sensor, "boot": s.boot, "boots": s.boots, "version": s.version, "host": s.host,
            "kernel": s.kernel, "policy": s.policy, "degraded": s.degraded, "connected": s.connected,
            "first_seen": time(s.first_seen_unix_ns), "last_seen": time(s.last_seen_unix_ns),
            "newest": time(s.newest_unix_ns), "committed_seq": s.committed_seq, "next_seq": s.next_seq,
            "waiting": waiting(s), "lost": s.lost, "lost_denials": s.lost_denials,
            "bundle": s.bundle.as_ref().map(bundle_json),
        })
    };
    let output = |o: &pb::OutputState| {
        json!({
            "name": o.name, "kind": o.kind, "delivered": o.delivered, "retries": o.retries, "lost": o.lost,
            "lost_by_reason": o.lost_by_reason.iter().collect::<BTreeMap<_, _>>(), "lag": o.lag,
            "last_delivered": time(o.delivered_unix_ns), "error": o.error,
        })
    };
    let policy = |p: &pb::ServedPolicy| json!({"file": p.file, "version": p.version, "group": p.group, "hash": p.hash, "error": p.error});
    let log = fleet.log.as_ref().map(|l| {
        json!({
            "bytes": l.bytes, "segments": l.segments, "oldest": l.oldest, "next": l.next,
            "oldest_stored": time(l.oldest_unix_ns), "subscribers": l.subscribers,
        })
    });
    json!({
        "sensors": fleet.sensors.iter().map(sensor).collect::<Vec<_>>(),
        "log": log,
        "outputs": fleet.outputs.iter().map(output).collect::<Vec<_>>(),
        "policies": fleet.policies.iter().map(policy).collect::<Vec<_>>(),
    })
}

/// The version of the policy that it was given; `!`: it refused another.
fn bundle(bundle: &pb::BundleState) -> String {
    let refused = if bundle.error.is_empty() { "" } else { "!" };
    match bundle.version {
        0 => refused.to_owned(),
        version => format!("{version}{refused}"),
    }
}

fn print(fleet: &pb::FleetResponse) -> anyhow::Result<()> {
    let mut table = Table::new([
        "SENSOR",
        "HOST",
        "VERSION",
        "POLICY",
        "BUNDLE",
        "CONNECTED",
        "SEEN",
        "NEWEST",
        "STORED",
        "WAITING",
        "LOST",
    ]);
    for s in &fleet.sensors {
        let or_dash = |text: String| if text.is_empty() { "-".to_owned() } else { escape(&text) };
        table.row([
            escape(&s.sensor),
            or_dash(s.host.clone()),
            or_dash(s.version.clone()),
            or_dash(s.policy.chars().take(SHORT_HASH).collect()),
            or_dash(s.bundle.as_ref().map_or(String::new(), bundle)),
            if s.connected { "yes" } else { "no" }.to_owned(),
            age(s.last_seen_unix_ns),
            if s.newest_unix_ns == 0 { "-".to_owned() } else { age(s.newest_unix_ns) },
            s.committed_seq.to_string(),
            waiting(s).to_string(),
            s.lost.to_string(),
        ]);
    }
    table.print()?;
    for (s, bundle) in fleet.sensors.iter().filter_map(|s| Some((s, s.bundle.as_ref()?))) {
        if !bundle.error.is_empty() {
            output::text(&format!("{} REFUSED a policy: {}\n", escape(&s.sensor), escape(&bundle.error)))?;
        }
    }
    for policy in fleet.policies.iter().filter(|p| !p.error.is_empty()) {
        output::text(&format!("{} is NOT SERVED: {}\n", escape(&policy.file), escape(&policy.error)))?;
    }
    if !fleet.outputs.is_empty() {
        output::text("\n")?;
        outputs(&fleet.outputs).print()?;
    }
    Ok(())
}

fn outputs(outputs: &[pb::OutputState]) -> Table {
    let mut table = Table::new(["OUTPUT", "KIND", "DELIVERED", "LAST", "BEHIND", "LOST", "RETRIES", "ERROR"]);
    for o in outputs {
        let last = if o.delivered_unix_ns == 0 { "-".to_owned() } else { age(o.delivered_unix_ns) };
        let mut lost = o.lost.to_string();
        let reasons: BTreeMap<_, _> = o.lost_by_reason.iter().collect();
        if !reasons.is_empty() {
            let reasons: Vec<String> =
                reasons.into_iter().map(|(r, n)| format!("{} {n}", escape(r))).collect();
            lost = format!("{lost} ({})", reasons.join(", "));
        }
        table.row([
            escape(&o.name),
            escape(&o.kind),
            o.delivered.to_string(),
            last,
            o.lag.to_string(),
            lost,
            o.retries.to_string(),
            escape(&o.error),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_is_a_row_with_what_is_lost_and_why_it_fails() {
        let state = pb::OutputState {
            name: "siem".to_owned(),
            kind: "syslog".to_owned(),
            delivered: 9,
            lag: 4,
            lost: 3,
            lost_by_reason: [("refused".to_owned(), 2), ("damaged".to_owned(), 1)].into(),
            retries: 5,
            error: "it\u{1b}broke".to_owned(),
            ..Default::default()
        };
        assert_eq!(
            outputs(&[state]).render().lines().nth(1),
            Some(
                "siem    syslog  9          -     4       3 (damaged 1, refused 2)  5        it\\u{1b}broke"
            )
        );
    }
}
