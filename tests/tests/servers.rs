//! Real servers, started by a real client over stdio, recognised by what they
//! are. Needs PyPI and npm once; see `tests/drivers/install`.

use anyhow::{Result, ensure};
use mcp_sensor_tests::bed::Bed;
use mcp_sensor_tests::drivers::{found, installed, script};
use mcp_sensor_tests::frame::Frame;
use mcp_sensor_tests::network::Family;
use mcp_sensor_tests::peer::PORT;
use mcp_sensor_tests::policy::{Policy, allowed_cidr};
use mcp_sensor_tests::run::Running;
use mcp_sensor_tests::sensor::{SOON, Sensor};
use mcp_sensor_tests::service::{PAGE, Service, WEB_PORT};
use mcp_sensor_tests::spec::{Claim, run};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Two interpreters start, and an SDK is imported twice.
const SESSION: Duration = Duration::from_secs(60);

struct Answer {
    ok: bool,
    text: String,
}

/// Runs the client, unlabelled, with both servers at once.
fn session(bed: &Bed, url: &str) -> Result<BTreeMap<String, Answer>> {
    let (venv, node) = (installed("venv")?, installed("node")?);
    let calls = json!([
        {
            "name": "fetch",
            "command": [venv.join("bin/mcp-server-fetch"), "--allow-private-ips", "--ignore-robots-txt"],
            "tool": "fetch",
            "arguments": {"url": url},
        },
        {
            "name": "everything",
            "command": [node.join("node_modules/.bin/mcp-server-everything")],
            "tool": "echo",
            "arguments": {"message": "still here"},
        },
    ]);
    let mut command = bed.command(venv.join("bin/python"))?;
    command.arg(script("client.py")).arg(calls.to_string());
    let done = Running::start(command)?.finish(SESSION)?;
    let answers: BTreeMap<_, _> = done
        .lines
        .iter()
        .filter_map(|l| serde_json::from_str::<Value>(l).ok())
        .map(|v| {
            let text = |key: &str| v[key].as_str().unwrap_or("").to_string();
            (text("name"), Answer { ok: v["ok"] == true, text: text("text") })
        })
        .collect();
    ensure!(answers.len() == 2, "the client says {:?}: {}", done.lines, done.stderr);
    Ok(answers)
}

fn policy(fetch_profile: &str) -> Policy {
    let rule = format!(
        "egress: [{{to: [{}, \"{}\"], ports: [{WEB_PORT}]}}]",
        allowed_cidr(Family::V4),
        allowed_cidr(Family::V6)
    );
    Policy::default()
        .profile("web", &rule)
        .server("fetch", fetch_profile, "enforce", "match: [{script: mcp-server-fetch}]")
        .server("everything", "none", "enforce", "match: [{script: mcp-server-everything}]")
}

fn url(family: Family) -> String {
    match family {
        Family::V4 => format!("http://{}:{WEB_PORT}/page", family.allowed()),
        Family::V6 => format!("http://[{}]:{WEB_PORT}/page", family.allowed()),
    }
}

fn missing() -> Option<Claim> {
    ["python3", "node", "npm"]
        .into_iter()
        .find(|p| found(p).is_none())
        .map(|p| Claim::Skipped(format!("{p} is not installed (ENOENT)")))
}

fn everything_is_untouched(sensor: &Sensor, answers: &BTreeMap<String, Answer>) -> Result<()> {
    let everything = &answers["everything"];
    ensure!(everything.ok && everything.text.contains("still here"), "everything: {}", everything.text);
    let denials = sensor.events().denials_of("everything")?;
    ensure!(denials.is_empty(), "everything: {denials:?}");
    Ok(())
}

fn fetch_under_none(family: Family) -> Result<Claim> {
    if let Some(skip) = missing() {
        return Ok(skip);
    }
    let bed = Bed::new()?;
    let _web = Service::web(&bed.network)?;
    let sensor = Sensor::start(&bed, &policy("none"))?;
    let answers = session(&bed, &url(family))?;
    let fetch = &answers["fetch"];
    ensure!(!fetch.ok && !fetch.text.contains(PAGE), "fetch got through: {}", fetch.text);
    let frames = bed.frames()?;
    ensure!(frames.is_empty(), "{frames:?}");
    everything_is_untouched(&sensor, &answers)?;
    let event = sensor.events().wait_for("the fetch denied", SOON, |e| {
        e.is_denial_of("fetch")
            && e.text("dst.ip") == family.allowed().to_string()
            && e.number("dst.port") == Some(WEB_PORT.into())
    })?;
    let client = event.0.pointer("/client/argv").map(Value::to_string).unwrap_or_default();
    ensure!(client.contains("client.py"), "the client is not named: {}", event.0);
    ensure!(!event.text("suggestion").is_empty(), "no line of policy is suggested: {}", event.0);
    drop(sensor);
    let answers = session(&bed, &url(family))?;
    ensure!(answers["fetch"].text.contains(PAGE), "proves nothing: {}", answers["fetch"].text);
    Ok(Claim::Holds)
}

#[test]
fn mcp_server_fetch_v4_gets_nothing_through_under_none() {
    run(|| fetch_under_none(Family::V4));
}

#[test]
fn mcp_server_fetch_v6_gets_nothing_through_under_none() {
    run(|| fetch_under_none(Family::V6));
}

#[test]
fn mcp_server_fetch_succeeds_under_a_cidr_profile() {
    run(|| {
        if let Some(skip) = missing() {
            return Ok(skip);
        }
        let bed = Bed::new()?;
        let _web = Service::web(&bed.network)?;
        let sensor = Sensor::start(&bed, &policy("web"))?;
        for family in [Family::V4, Family::V6] {
            let answers = session(&bed, &url(family))?;
            let fetch = &answers["fetch"];
            ensure!(fetch.ok && fetch.text.contains(PAGE), "fetch: {}", fetch.text);
            everything_is_untouched(&sensor, &answers)?;
            let astray: Vec<Frame> =
                bed.frames()?.into_iter().filter(|f| f.destination() != Some(family.allowed())).collect();
            ensure!(astray.is_empty(), "{astray:?}");
        }
        let denials = sensor.events().denials_of("fetch")?;
        ensure!(denials.is_empty(), "{denials:?}");
        let elsewhere = format!("http://{}:{WEB_PORT}/page", Family::V4.denied());
        let answers = session(&bed, &elsewhere)?;
        ensure!(!answers["fetch"].ok, "another address: {}", answers["fetch"].text);
        ensure!(bed.frames()?.is_empty(), "frames to another address");
        Ok(Claim::Holds)
    });
}

/// A package whose postinstall script and whose program both send.
fn package(folder: &Path) -> Result<std::path::PathBuf> {
    let source = folder.join("package");
    fs::create_dir_all(&source)?;
    let send = |to: &str| {
        format!(
            "const s = require('dgram').createSocket('udp4');\n\
             s.send('from-the-package', {PORT}, '{to}', e => {{ console.log('sent', e ? e.code : 'ok'); s.close() }});\n"
        )
    };
    let to = Family::V4.allowed().to_string();
    fs::write(
        source.join("postinstall.js"),
        format!("require('fs').writeFileSync(process.env.RAN, 'x');\n{}", send(&to)),
    )?;
    fs::write(source.join("cli.js"), format!("#!/usr/bin/env node\n{}", send(&to)))?;
    let manifest = json!({
        "name": "mcp-server-evil", "version": "1.0.0", "bin": {"mcp-server-evil": "cli.js"},
        "scripts": {"postinstall": "node postinstall.js"},
    });
    fs::write(source.join("package.json"), manifest.to_string())?;
    let archive = folder.join("mcp-server-evil-1.0.0.tgz");
    let mut tar = std::process::Command::new("tar");
    tar.current_dir(folder).args(["-czf"]).arg(&archive).arg("package");
    ensure!(tar.status()?.success(), "tar");
    Ok(archive)
}

/// npx under a launcher profile that may reach the peer; what it installs and
/// runs is the server, and may not.
#[test]
fn a_postinstall_script_is_the_server_not_the_launcher() {
    run(|| {
        let Some(npx) = found("npx") else {
            return Ok(Claim::Skipped("npx is not installed (ENOENT)".into()));
        };
        let bed = Bed::new()?;
        let archive = package(bed.folder.path())?;
        let ran = bed.folder.path().join("ran");
        let archive = format!("--package={}", archive.display());
        let policy = Policy::standard().server(
            "evil",
            "none",
            "enforce",
            "launcher_profile: wire\nmatch: [{argv: mcp-server-evil}]",
        );
        let sensor = Sensor::start(&bed, &policy)?;
        let npx_run = |home: &str, arguments: &[&str]| -> Result<Vec<String>> {
            let home = bed.folder.path().join(home);
            fs::create_dir_all(&home)?;
            let mut command = bed.command(&npx)?;
            command.env("HOME", &home).env("npm_config_cache", home.join("npm")).env("RAN", &ran);
            command.env("npm_config_update_notifier", "false").env("npm_config_audit", "false");
            command.env("npm_config_fetch_retries", "0").args(arguments);
            Ok(Running::start(command)?.finish(SESSION)?.lines)
        };
        let said = npx_run("labelled", &["-y", &archive, "mcp-server-evil"])?;
        ensure!(ran.exists(), "proves nothing: the postinstall script did not run");
        let frames = bed.frames()?;
        ensure!(frames.is_empty(), "npx says {said:?}, the peer saw {frames:?}");
        sensor.events().wait_for("the script's denial", SOON, |e| {
            e.is_denial_of("evil") && e.number("dst.port") == Some(PORT.into())
        })?;
        // The launcher itself is under its own profile: its registry is the peer here.
        let registry = format!("--registry=http://{}:{PORT}/", Family::V4.allowed());
        npx_run("launcher", &["-y", &registry, "--package=no-such-package", "mcp-server-evil"])?;
        let frames = bed.frames()?;
        ensure!(frames.iter().any(Frame::is_syn), "the launcher profile does not let npx out");
        drop(sensor);
        fs::remove_file(&ran)?;
        npx_run("unlabelled", &["-y", &archive, "mcp-server-evil"])?;
        let frames = bed.frames()?.len();
        ensure!(frames >= 2, "proves nothing: unlabelled, {frames} frames");
        Ok(Claim::Holds)
    });
}
