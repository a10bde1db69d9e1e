//! `mcp-sensor status`.

use super::output::{self, Table};
use super::{Exit, Output, StatusArgs, client};
use crate::event::json::{Hook, Time, hook_status_name};
use crate::event::text::escape;
use crate::event::{now, pb};
use serde_json::{Value, json};
use std::process::ExitCode;

pub(super) fn run(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let status = client::block_on(async {
        let mut control = client::connect(&args.control).await?;
        Ok(control.status(pb::StatusRequest {}).await.map_err(|s| client::failed(&s))?.into_inner())
    })?;
    let health = status.health.clone().unwrap_or_default();
    if args.check {
        let reasons: Vec<&String> = health.not_live.iter().chain(&health.not_ready).collect();
        match args.output.output {
            Output::Json => output::json(&health_json(&health))?,
            Output::Table => reasons.iter().try_for_each(|r| output::text(&format!("{}\n", escape(r))))?,
        }
        return Ok(if reasons.is_empty() { Exit::Ok } else { Exit::NotReady }.into());
    }
    match args.output.output {
        Output::Json => output::json(&to_json(&status))?,
        Output::Table => print(&status)?,
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn policy_json(policy: &pb::PolicyState) -> Value {
    json!({
        "path": policy.path,
        "hash": policy.hash,
        "generation": policy.generation,
        "loaded": Time(policy.loaded_unix_ns).to_string(),
        "error": policy.error,
        "warnings": policy.warnings,
        "bundle": policy.bundle.as_ref().map(bundle_json),
    })
}

pub(super) fn bundle_json(bundle: &pb::BundleState) -> Value {
    json!({
        "version": bundle.version, "hash": bundle.hash, "group": bundle.group,
        "refused_hash": bundle.refused_hash, "kind": bundle.kind, "error": bundle.error,
    })
}

fn health_json(health: &pb::HealthState) -> Value {
    json!({
        "live": health.not_live.is_empty(), "ready": health.not_live.is_empty() && health.not_ready.is_empty(),
        "not_live": health.not_live, "not_ready": health.not_ready,
    })
}

pub(super) fn to_json(s: &pb::StatusResponse) -> Value {
    let loss = |l: &pb::Loss| json!({"where": l.r#where, "reason": l.reason, "count": l.count});
    let subscriber = |s: &pb::Subscriber| json!({"name": s.name, "queued": s.queued, "lost": s.lost, "capacity": s.capacity});
    let feed = s.feed.as_ref().map(|f| {
        json!({
            "address": f.address, "addresses": f.addresses, "connected": f.connected, "acked_seq": f.acked_seq,
            "unacked_batches": f.unacked_batches, "reconnects": f.reconnects, "rejected": f.rejected,
            "error": f.error,
            "tls": f.tls.as_ref().map(|t| json!({
                "certificate": t.certificate, "id": t.id, "error": t.error,
                "not_after": Time(t.not_after_unix_ns).to_string(),
            })),
            "spool": f.spool.as_ref().map(|s| json!({
                "bytes": s.bytes, "oldest": (s.oldest_unix_ns != 0).then(|| Time(s.oldest_unix_ns).to_string()),
                "evicted": s.evicted, "damaged": s.damaged, "error": s.error,
            })),
        })
    });
    json!({
        "version": s.version, "sensor": s.sensor, "boot": s.boot, "pid": s.pid,
        "started": Time(s.started_unix_ns).to_string(),
        "kernel": s.kernel, "host": s.host, "cgroup": s.cgroup,
        "policy": s.policy.as_ref().map(policy_json),
        "hooks": s.hooks.iter().map(Hook).collect::<Vec<_>>(),
        "degraded": s.degraded,
        "losses": s.losses.iter().map(loss).collect::<Vec<_>>(),
        "subscribers": s.subscribers.iter().map(subscriber).collect::<Vec<_>>(),
        "events": s.events, "servers": s.servers, "instances": s.instances,
        "labelled_tasks": s.labelled_tasks,
        "feed": feed,
        "health": s.health.as_ref().map(health_json),
    })
}

/// A span of time as people say it.
pub(super) fn age(since_unix_ns: i64) -> String {
    let seconds = u64::try_from(now().saturating_sub(since_unix_ns)).unwrap_or(0) / 1_000_000_000;
    match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, minutes) => format!("{minutes}m"),
        (0, hours, minutes) => format!("{hours}h {minutes}m"),
        (days, hours, _) => format!("{days}d {hours}h"),
    }
}

fn certificate(tls: &pb::TlsState) -> String {
    let who = if tls.id.is_empty() { &tls.certificate } else { &tls.id };
    let left = tls.not_after_unix_ns.saturating_sub(now());
    let until = Time(tls.not_after_unix_ns);
    let soon = i64::try_from(crate::tls::WARN_BEFORE.as_nanos()).unwrap_or(i64::MAX);
    match left {
        ..0 => format!("{}: EXPIRED {until}", escape(who)),
        left if left < soon => format!("{}: ENDS SOON, {until}", escape(who)),
        _ => format!("{}, until {until}", escape(who)),
    }
}

fn print(s: &pb::StatusResponse) -> anyhow::Result<()> {
    let mut table = Table::default();
    let mut line = |name: &str, text: String| table.row([name.to_owned(), text]);
    line("sensor", format!("{} ({}), version {}", escape(&s.sensor), escape(&s.host), s.version));
    line("running", format!("pid {} for {}, kernel {}", s.pid, age(s.started_unix_ns), escape(&s.kernel)));
    let health = s.health.clone().unwrap_or_default();
    for reason in health.not_live.iter().chain(&health.not_ready) {
        line("NOT READY", escape(reason));
    }
    line("cgroup", escape(&s.cgroup));
    if let Some(policy) = &s.policy {
        let short = policy.hash.get(..12).unwrap_or(&policy.hash);
        line(
            "policy",
            format!(
                "{} (generation {}, {short}), loaded {} ago",
                escape(&policy.path),
                policy.generation,
                age(policy.loaded_unix_ns)
            ),
        );
        if !policy.error.is_empty() {
            line("", format!("the file as it is now was REFUSED: {}", escape(&policy.error)));
        }
        if let Some(bundle) = &policy.bundle {
            let short = bundle.hash.get(..12).unwrap_or(&bundle.hash);
            line(
                "bundle",
                match bundle.version {
                    0 => "none yet".to_owned(),
                    version => format!("version {version}, {short}"),
                },
            );
            if !bundle.error.is_empty() {
                line("", format!("the last one was REFUSED: {}", escape(&bundle.error)));
            }
        }
        for warning in &policy.warnings {
            line("", format!("warning: {}", escape(warning)));
        }
    }
    line(
        "servers",
        format!("{} declared, {} instances, {} labelled tasks", s.servers, s.instances, s.labelled_tasks),
    );
    line("events", s.events.to_string());
    for loss in &s.losses {
        line("LOST", format!("{} ({}, {})", loss.count, escape(&loss.reason), escape(&loss.r#where)));
    }
    for reader in s.subscribers.iter().filter(|r| r.lost > 0) {
        line("LOST", format!("{} (slow reader {})", reader.lost, escape(&reader.name)));
    }
    match &s.feed {
        None => line("collector", "in this process".to_owned()),
        Some(f) if f.connected => line(
            "collector",
            format!(
                "{}: stored up to event {}, {} batches under way",
                escape(&f.address),
                f.acked_seq,
                f.unacked_batches
            ),
        ),
        Some(f) => line("collector", format!("{}: NOT CONNECTED: {}", escape(&f.address), escape(&f.error))),
    }
    let others = s.feed.iter().flat_map(|f| f.addresses.iter().filter(|a| **a != f.address));
    for other in others {
        line("", format!("also: {}", escape(other)));
    }
    if let Some(tls) = s.feed.as_ref().and_then(|f| f.tls.as_ref()) {
        line("certificate", certificate(tls));
        if !tls.error.is_empty() {
            line("", format!("the files as they are now CANNOT BE USED: {}", escape(&tls.error)));
        }
    }
    if let Some(spool) = s.feed.as_ref().and_then(|f| f.spool.as_ref()) {
        if spool.oldest_unix_ns != 0 {
            line(
                "spool",
                format!("{} bytes, the oldest of them {} old", spool.bytes, age(spool.oldest_unix_ns)),
            );
        }
        for (what, count) in
            [("no room in the spool", spool.evicted), ("the spool was damaged", spool.damaged)]
        {
            if count > 0 {
                line("LOST", format!("{count} ({what})"));
            }
        }
        if !spool.error.is_empty() {
            line("spool", format!("TAKES NOTHING: {}", escape(&spool.error)));
        }
    }
    for degraded in &s.degraded {
        line("DEGRADED", escape(degraded));
    }
    for hook in &s.hooks {
        line(
            "hook",
            format!("{:<24} {:<13} {}", hook.name, hook_status_name(hook.status()), escape(&hook.detail)),
        );
    }
    table.print()
}
