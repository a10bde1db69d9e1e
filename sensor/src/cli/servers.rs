//! `mcp-sensor servers` and `mcp-sensor mode`.

use super::output::{self, Table};
use super::status::age;
use super::{ModeArg, ModeArgs, Output, ServersArgs, client};
use crate::event::json::{Time, mode_name, role_name};
use crate::event::pb;
use crate::event::text::escape;
use serde_json::{Value, json};
use std::process::ExitCode;

pub(super) fn run(args: &ServersArgs) -> anyhow::Result<ExitCode> {
    let request = pb::ServersRequest { server: args.server.clone().unwrap_or_default() };
    let servers = client::block_on(async {
        let mut control = client::connect(&args.control).await?;
        Ok(control.servers(request).await.map_err(|s| client::failed(&s))?.into_inner().servers)
    })?;
    match args.output.output {
        Output::Json => output::json(&servers.iter().map(to_json).collect())?,
        Output::Table => print(&servers)?,
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn mode(args: &ModeArgs) -> anyhow::Result<ExitCode> {
    let mode = match args.mode {
        ModeArg::Audit => pb::Mode::Audit,
        ModeArg::Enforce => pb::Mode::Enforce,
    };
    let request = pb::SetModeRequest { server: args.server.clone(), mode: mode.into() };
    let previous = client::block_on(async {
        let mut control = client::connect(&args.control).await?;
        Ok(control.set_mode(request).await.map_err(|s| client::failed(&s))?.into_inner().previous())
    })?;
    let (mode, previous) = (mode_name(mode), mode_name(previous));
    match args.output.output {
        Output::Json => output::json(&json!({"server": args.server, "mode": mode, "previous": previous}))?,
        Output::Table => output::text(&format!(
            "{}: {mode} (was {previous}), until a policy is loaded\n",
            escape(&args.server)
        ))?,
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn to_json(s: &pb::Server) -> Value {
    json!({
        "name": s.name, "profile": s.profile, "launcher_profile": s.launcher_profile,
        "mode": mode_name(s.mode()), "unix": s.unix,
        "allowed": s.allowed, "denied": s.denied, "would_denied": s.would_denied,
        "instances": s.instances.iter().map(instance_json).collect::<Vec<_>>(),
    })
}

fn instance_json(i: &pb::Instance) -> Value {
    let none = pb::Actor::default();
    let a = i.actor.as_ref().unwrap_or(&none);
    let client =
        a.client.as_ref().map(|c| json!({"pid": c.pid, "exe": c.exe, "argv": c.argv, "name": c.name}));
    json!({
        "id": i.id, "pid": a.pid, "role": role_name(a.role()), "uid": a.uid, "user": a.user,
        "login_uid": a.login_uid, "exe": a.exe, "argv": i.argv, "client": client, "unit": a.unit,
        "container": a.container, "netns": a.netns, "processes": i.processes,
        "started": Time(i.started_unix_ns).to_string(), "evidence": i.evidence,
        "allowed": i.allowed, "denied": i.denied, "would_denied": i.would_denied,
    })
}

fn print(servers: &[pb::Server]) -> anyhow::Result<()> {
    let mut table = Table::new([
        "SERVER",
        "MODE",
        "PROFILE",
        "PID",
        "USER",
        "CLIENT",
        "AGE",
        "ALLOWED",
        "DENIED",
        "WOULD",
        "RECOGNISED BY",
    ]);
    for s in servers {
        let head = [escape(&s.name), mode_name(s.mode()).to_owned(), escape(&s.profile)];
        if s.instances.is_empty() {
            let [name, mode, profile] = head.clone();
            let counts = [s.allowed, s.denied, s.would_denied].map(|n| n.to_string());
            let [allowed, denied, would] = counts;
            let none = || "-".to_owned();
            table.row([
                name,
                mode,
                profile,
                none(),
                none(),
                none(),
                none(),
                allowed,
                denied,
                would,
                "not running".to_owned(),
            ]);
        }
        for i in &s.instances {
            let [name, mode, profile] = head.clone();
            let none = pb::Actor::default();
            let a = i.actor.as_ref().unwrap_or(&none);
            table.row([
                name,
                mode,
                profile,
                format!(
                    "{}{}",
                    a.pid,
                    if i.processes > 1 { format!(" +{}", i.processes - 1) } else { String::new() }
                ),
                if a.user.is_empty() { a.uid.to_string() } else { escape(&a.user) },
                a.client.as_ref().map_or("-".to_owned(), |c| format!("{} ({})", escape(&c.name), c.pid)),
                age(i.started_unix_ns),
                i.allowed.to_string(),
                i.denied.to_string(),
                i.would_denied.to_string(),
                escape(&i.evidence),
            ]);
        }
    }
    table.print()
}
