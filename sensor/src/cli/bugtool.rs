//! `mcp-sensor bugtool`: one archive for a maintainer, and no secret in it.
//!
//! Arguments of programs are left out, whatever they are; from the rest goes
//! what the rules for secrets and personal data find ([`crate::inspect`]).

use super::{BugtoolArgs, Exit, Failure, Output, client, doctor, output, policy, servers, status};
use crate::event::{json::to_json, pb};
use crate::inspect::{REDACTED_BYTES, redact, redact_json};
use crate::kernel;
use anyhow::Context as _;
use aya::programs::loaded_programs;
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use time::OffsetDateTime;

/// The newest of these types.
const EVENTS: u64 = 500;
const TYPES: [&str; 3] = ["sensor_state", "loss", "finding"];
const LOG_LINES: &str = "2000";
const UNITS: [&str; 2] = ["mcp-sensor.service", "mcp-sensor-collector.service"];

/// What the kernel says of itself.
const FILES: [&str; 11] = [
    "/etc/os-release",
    "/proc/cmdline",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/self/mountinfo",
    "/proc/sys/kernel/bpf_stats_enabled",
    "/proc/sys/kernel/pid_max",
    "/proc/sys/kernel/unprivileged_bpf_disabled",
    "/proc/sys/net/core/bpf_jit_enable",
    "/proc/version",
    "/sys/kernel/security/lsm",
];

/// A file of the archive; or why it is not there.
struct Part {
    name: String,
    text: anyhow::Result<String>,
}

impl Part {
    fn text(name: &str, text: anyhow::Result<String>) -> Part {
        Part { name: name.to_owned(), text: text.map(|text| redact(end(&text))) }
    }

    fn json(name: &str, value: anyhow::Result<Value>) -> Part {
        let text = value.map(|mut value| {
            without_arguments(&mut value);
            redact_json(&mut value);
            format!("{value:#}\n")
        });
        Part { name: name.to_owned(), text }
    }
}

pub(super) fn run(args: &BugtoolArgs) -> anyhow::Result<ExitCode> {
    let now = OffsetDateTime::now_utc();
    let name = format!(
        "mcp-sensor-bugtool-{:04}{:02}{:02}T{:02}{:02}{:02}Z",
        now.year(),
        u8::from(now.month()),
        now.day(),
        now.hour(),
        now.minute(),
        now.second()
    );
    let path = args.file.clone().unwrap_or_else(|| PathBuf::from(format!("{name}.tar.gz")));
    // Before anything is gathered: it may not be possible.
    let out: Box<dyn Write> = if path == Path::new("-") { Box::new(io::stdout()) } else { create(&path)? };
    let parts = gather(args);
    let manifest = manifest(&parts, now);
    pack(out, &name, &manifest, &parts, now).with_context(|| format!("cannot write {}", path.display()))?;
    if path == Path::new("-") {
        return Ok(ExitCode::SUCCESS);
    }
    match args.output.output {
        Output::Json => output::json(&json!({"file": path, "manifest": manifest}))?,
        Output::Table => output::text(&said(&path, &parts))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// For its owner alone, and never over another.
fn create(path: &Path) -> anyhow::Result<Box<dyn Write>> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    match file {
        Ok(file) => Ok(Box::new(file)),
        Err(error) => Err(Failure::new(Exit::Failure, format!("cannot make {}: {error}", path.display()))
            .hint("name another file with --file; `-` is stdout")
            .into()),
    }
}

fn gather(args: &BugtoolArgs) -> Vec<Part> {
    let mut parts = agent(args);
    parts.push(Part::json("doctor.json", doctor::checks()));
    parts.push(Part::json("kernel/programs.json", programs()));
    parts.push(Part::text("kernel/pins.txt", Ok(pins())));
    for path in FILES {
        let text = fs::read_to_string(path).map_err(Into::into);
        parts.push(Part::text(&format!("host{path}"), text));
    }
    for unit in UNITS {
        parts.push(Part::text(&format!("log/{unit}.txt"), journal(unit)));
    }
    parts
}

/// What the agent says, and its process.
fn agent(args: &BugtoolArgs) -> Vec<Part> {
    let status = client::block_on(async {
        let mut control = client::connect(&args.control).await?;
        Ok(control.status(pb::StatusRequest {}).await.map_err(|s| client::failed(&s))?.into_inner())
    });
    let servers = client::block_on(async {
        let mut control = client::connect(&args.control).await?;
        let asked = control.servers(pb::ServersRequest::default()).await;
        Ok(asked.map_err(|s| client::failed(&s))?.into_inner().servers)
    });
    let mut events = Vec::new();
    let request = pb::EventsRequest {
        limit: EVENTS,
        types: TYPES.map(str::to_owned).to_vec(),
        ..pb::EventsRequest::default()
    };
    let told = client::block_on(super::events::each(&args.control, request, |event| {
        events.push(to_json(event));
        Ok(())
    }));
    let process = match &status {
        Ok(status) => fs::read_to_string(format!("/proc/{}/status", status.pid)).map_err(Into::into),
        Err(_) => Err(anyhow::anyhow!("no agent answers")),
    };
    vec![
        Part::text("agent/process.txt", process),
        Part::json("agent/status.json", status.map(|s| status::to_json(&s))),
        Part::json("agent/servers.json", servers.map(|s| s.iter().map(servers::to_json).collect())),
        Part::json("agent/events.json", told.map(|()| events.into())),
        Part::text("policy/in-force.yaml", policy::show_from(&args.control).map(|shown| shown.text)),
        Part::text("policy/file.yaml", fs::read_to_string(&args.policy).map_err(Into::into)),
    ]
}

/// Programs of every owner: one that rewrites addresses may be another's.
fn programs() -> anyhow::Result<Value> {
    let mut programs = Vec::new();
    for program in loaded_programs() {
        // One that goes away meanwhile is none.
        let Ok(program) = program else { continue };
        programs.push(json!({
            "id": program.id(), "name": program.name_as_str(), "tag": format!("{:016x}", program.tag()),
            "type": program.program_type() as u32, "memory": program.memory_locked().ok(),
            "verified_instructions": program.verified_instruction_count(),
        }));
    }
    Ok(programs.into())
}

/// Every pin of every sensor here.
fn pins() -> String {
    fn below(dir: &Path, text: &mut String) {
        let mut entries: Vec<_> =
            fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        entries.sort();
        for path in entries {
            let _ = writeln!(text, "{}", path.display());
            if path.is_dir() {
                below(&path, text);
            }
        }
    }
    let mut text = String::new();
    below(&kernel::pins::all(), &mut text);
    text
}

fn journal(unit: &str) -> anyhow::Result<String> {
    let mut command = Command::new("journalctl");
    command.args(["--unit", unit, "--lines", LOG_LINES, "--no-pager", "--output", "short-iso-precise"]);
    let done = command.stdin(Stdio::null()).output().context("cannot start journalctl")?;
    anyhow::ensure!(done.status.success(), "journalctl: {}", String::from_utf8_lossy(&done.stderr).trim());
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// The newest of a text that is too long: whole lines.
fn end(text: &str) -> &str {
    if text.len() <= REDACTED_BYTES {
        return text;
    }
    let from = text.ceil_char_boundary(text.len() - REDACTED_BYTES);
    text[from..].split_once('\n').map_or("", |(_, rest)| rest)
}

/// What a program was given may be a secret that no rule knows.
fn without_arguments(value: &mut Value) {
    match value {
        Value::Object(members) => {
            for (name, value) in members {
                match value {
                    Value::Array(argv) if name == "argv" => {
                        let left_out = argv.len().saturating_sub(1);
                        argv.truncate(1);
                        if left_out > 0 {
                            argv.push(format!("[{left_out} LEFT OUT]").into());
                        }
                    }
                    value => without_arguments(value),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(without_arguments),
        _ => {}
    }
}

fn manifest(parts: &[Part], now: OffsetDateTime) -> Value {
    let part = |part: &Part| match &part.text {
        Ok(text) => json!({"name": part.name, "bytes": text.len()}),
        Err(error) => json!({"name": part.name, "error": redact(&format!("{error:#}"))}),
    };
    json!({
        "version": env!("CARGO_PKG_VERSION"), "made_unix_s": now.unix_timestamp(),
        "parts": parts.iter().map(part).collect::<Vec<_>>(),
    })
}

fn pack(
    out: Box<dyn Write>,
    name: &str,
    manifest: &Value,
    parts: &[Part],
    now: OffsetDateTime,
) -> io::Result<()> {
    let mut archive = tar::Builder::new(GzEncoder::new(out, Compression::default()));
    let manifest = format!("{manifest:#}\n");
    let there = parts.iter().filter_map(|part| Some((part.name.as_str(), part.text.as_ref().ok()?)));
    for (part, text) in [("manifest.json", &manifest)].into_iter().chain(there) {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(u64::try_from(now.unix_timestamp()).unwrap_or(0));
        archive.append_data(&mut header, format!("{name}/{part}"), text.as_bytes())?;
    }
    archive.into_inner()?.finish()?.flush()
}

fn said(path: &Path, parts: &[Part]) -> String {
    let mut text = format!("{}: {} files\n", path.display(), parts.iter().filter(|p| p.text.is_ok()).count());
    for part in parts {
        if let Err(error) = &part.text {
            let _ = writeln!(text, "  not there: {}: {error:#}", part.name);
        }
    }
    text += "Look into it before you hand it on: tar -xzf FILE -O | less\n";
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_stay_out_wherever_they_are() {
        let mut value = json!([{"argv": ["npx", "--token", "hunter2"], "client": {"argv": ["code"]}}]);
        without_arguments(&mut value);
        assert_eq!(value, json!([{"argv": ["npx", "[2 LEFT OUT]"], "client": {"argv": ["code"]}}]));
    }

    #[test]
    fn of_a_long_text_the_newest_whole_lines_are_kept() {
        let text = format!("{}\nlast\n", "é".repeat(REDACTED_BYTES));
        assert_eq!(end(&text), "last\n");
        assert_eq!(end("short"), "short");
    }
}
