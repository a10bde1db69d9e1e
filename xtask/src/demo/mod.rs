//! A real client with two real servers: one is held to `none`, then to a rule
//! that its own denial suggests; the other is not touched.

mod listener;

use std::{fs, process::Command, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use mcp_sensor_tests::{
    bed::Bed,
    events::Event,
    network::ALLOWED_V4,
    policy::Policy,
    run::Running,
    sensor::{SOON, Sensor},
};
use serde_json::{Value, json};

use crate::{
    build, setup,
    step::{self, Step},
    test,
    testbed::{self, Testbed},
};
use listener::{Listener, PORT};

/// The servers take a second to start, the fetch retries; a loaded machine more.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn all() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("not root: the demo makes network namespaces and loads kernel programs; run it with sudo");
    }
    setup::all()?;
    step::headline("build");
    build::all(false)?;
    step::headline("servers");
    let testbed = testbed::install()?;
    test::mount_bpffs()?;
    step::headline("");
    run(&testbed)
}

fn run(testbed: &Testbed) -> Result<()> {
    let bed = Bed::new()?;
    let listener = Listener::new(&bed.network)?;
    println!(
        "two network namespaces, joined by a wire; on the far side http://{ALLOWED_V4}:{PORT}/ and a sniffer"
    );

    let step = Step::start("mcp-sensor run");
    let sensor = Sensor::start(&bed, &policy("none", None))?;
    step.done();
    let step = Step::start("client starts mcp-server-fetch and server-everything");
    let mut client = Client::start(&bed, testbed)?;
    step.done();
    let started = ["fetch", "everything"].map(|server| started(&sensor, server));
    bed.frames()?;

    println!("\n1. fetch is under `none`");
    let refused = client.fetch()?;
    let frames = bed.frames()?;
    println!("   fetch:      {}", refused.shown());
    println!("   sniffer:    {} frames", frames.len());
    println!("   everything: {}", client.echo()?.shown());
    ensure!(refused.error, "the fetch got through under `none`: {}", refused.text);
    ensure!(frames.is_empty(), "frames got through under `none`: {frames:?}");
    ensure!(listener.requests() == 0, "the listener was reached under `none`");
    let denial = sensor
        .events()
        .wait_for("the denial of the fetch", SOON, |event| {
            event.is_denial_of("fetch") && event.number("dst.port") == Some(PORT.into())
        })
        .context("nothing was recorded")?;
    let rule = suggested(&denial)?;

    println!("\n2. the policy gains the line that the denial suggests; the server runs on");
    sensor.reload(&policy("page", Some(rule)))?;
    let fetched = client.fetch()?;
    let frames = bed.frames()?;
    println!("   fetch:      {}", fetched.shown());
    println!("   sniffer:    {} frames, all to or from {ALLOWED_V4}", frames.len());
    println!("   everything: {}", client.echo()?.shown());
    ensure!(!fetched.error && fetched.text.contains(listener::PAGE), "the fetch fails: {}", fetched.text);
    ensure!(listener.requests() > 0 && !frames.is_empty(), "the page came from somewhere else");
    let astray = frames.iter().find(|frame| frame.destination() != Some(ALLOWED_V4.into()));
    ensure!(astray.is_none(), "a frame that no rule allows: {astray:?}");
    let untouched = sensor.events().denials_of("everything")?;
    ensure!(untouched.is_empty(), "server-everything was denied something: {untouched:?}");

    println!("\nrecognised");
    for event in started {
        let event = event?;
        println!(
            "   {:<11} pid {}, by {}; started by {} (pid {}), user {}",
            event.text("server"),
            event.number("pid").unwrap_or(0),
            or(event.text("evidence"), "a rule"),
            or(event.text("client.name"), event.text("client.exe")),
            event.number("client.pid").unwrap_or(0),
            or(event.text("user"), "unknown"),
        );
    }
    println!("denied");
    println!(
        "   {} → {}:{}/{}: {} ({})",
        denial.text("server"),
        denial.text("dst.ip"),
        denial.number("dst.port").unwrap_or(0),
        denial.text("protocol"),
        denial.text("reason"),
        or(denial.text("rule"), "no rule"),
    );
    println!("would be allowed by\n   {}", denial.text("suggestion"));
    client.end()
}

/// Two servers; `fetch` under the named profile.
fn policy(profile: &str, rule: Option<&str>) -> Policy {
    let policy = Policy::default()
        .server("fetch", profile, "enforce", "match: [{package: mcp-server-fetch}]")
        .server("everything", "unrestricted", "enforce", "match: [{script: mcp-server-everything}]");
    match rule {
        Some(rule) => policy.profile(profile, &format!("egress:\n  - {rule}")),
        None => policy,
    }
}

/// The rule in a suggestion, as it would stand below `egress:`.
fn suggested(denial: &Event) -> Result<&str> {
    let text = denial.text("suggestion");
    let (from, to) = (text.find('{'), text.rfind('}'));
    match (from, to) {
        (Some(from), Some(to)) if from < to => Ok(&text[from..=to]),
        _ => bail!("the denial suggests no rule: {}", denial.0),
    }
}

fn started(sensor: &Sensor, server: &str) -> Result<Event> {
    sensor.events().wait_for(&format!("the start of {server}"), SOON, |event| {
        event.text("type") == "instance_started" && event.text("server") == server
    })
}

fn or<'a>(text: &'a str, otherwise: &'a str) -> &'a str {
    if text.is_empty() { otherwise } else { text }
}

/// The Python SDK's client, holding both servers.
struct Client(Running);

struct Answer {
    error: bool,
    text: String,
}

impl Client {
    fn start(bed: &Bed, testbed: &Testbed) -> Result<Self> {
        let servers = json!({
            "fetch": {"command": testbed.fetch, "args": ["--allow-private-ips", "--ignore-robots-txt"]},
            "everything": {"command": testbed.everything, "args": ["stdio"]},
        });
        let mut command: Command = bed.command(&testbed.python)?;
        let script = bed.folder.path().join("client.py");
        fs::write(&script, include_str!("client.py"))?;
        command.arg(script).arg(servers.to_string());
        let mut client = Self(Running::start(command)?);
        let tools = client.answer().context("the client cannot start its servers")?;
        for name in ["fetch", "everything"] {
            ensure!(tools.get(name).is_some(), "no tools of {name}: {tools}");
        }
        Ok(client)
    }

    fn call(&mut self, server: &str, tool: &str, arguments: &Value) -> Result<Answer> {
        self.0.say(&json!({"server": server, "tool": tool, "arguments": arguments}).to_string())?;
        let answer = self.answer()?;
        Ok(Answer {
            error: answer["error"].as_bool().context("no `error` in the answer")?,
            text: answer["text"].as_str().unwrap_or_default().to_owned(),
        })
    }

    fn answer(&mut self) -> Result<Value> {
        let line = self.0.line(PATIENCE)?;
        serde_json::from_str(&line).with_context(|| format!("the client said {line:?}"))
    }

    fn fetch(&mut self) -> Result<Answer> {
        self.call("fetch", "fetch", &json!({"url": format!("http://{ALLOWED_V4}:{PORT}/")}))
    }

    fn echo(&mut self) -> Result<Answer> {
        let answer = self.call("everything", "echo", &json!({"message": "hello"}))?;
        ensure!(!answer.error && answer.text.contains("hello"), "server-everything: {}", answer.text);
        Ok(answer)
    }

    fn end(self) -> Result<()> {
        let finished = self.0.finish(PATIENCE)?;
        ensure!(finished.status.success(), "the client ended with {}: {}", finished.status, finished.stderr);
        Ok(())
    }
}

impl Answer {
    /// One line, short.
    fn shown(&self) -> String {
        const MOST: usize = 100;
        let text = self.text.split_whitespace().collect::<Vec<_>>().join(" ");
        let cut: String = text.chars().take(MOST).collect();
        let dots = if cut.len() < text.len() { "…" } else { "" };
        format!("{}{cut}{dots}", if self.error { "error: " } else { "" })
    }
}
