//! Servers that nobody declared and that speak HTTP are found by what they are
//! asked; nothing else is done about them. What is not MCP is not found.

use anyhow::{Context, Result, ensure};
use mcp_sensor_tests::bed::Bed;
use mcp_sensor_tests::drivers::{found, installed};
use mcp_sensor_tests::mcp::events::{Mark, shown};
use mcp_sensor_tests::mcp::servers::own;
use mcp_sensor_tests::network::Family;
use mcp_sensor_tests::peer::PORT as ELSEWHERE;
use mcp_sensor_tests::policy::Policy;
use mcp_sensor_tests::run::Running;
use mcp_sensor_tests::sensor::{SOON, Sensor};
use mcp_sensor_tests::spec::{Claim, must, run};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const PORT: u16 = 3901;
const SESSION: Duration = Duration::from_secs(90);
const UNKNOWN: &str = "unknown";

/// A connection to the server, from its own namespace.
fn dial(bed: &Bed, port: u16) -> Result<TcpStream> {
    bed.network.server.within(move || Ok(TcpStream::connect((Ipv4Addr::LOCALHOST, port))?))
}

/// Starts a server and waits until it listens.
fn listening(bed: &Bed, command: Command, port: u16) -> Result<Running> {
    let mut server = Running::start(command)?;
    let deadline = Instant::now() + SESSION;
    while dial(bed, port).is_err() {
        ensure!(!server.is_over()?, "the server ended: {:?}", server.finish(SOON)?.stderr);
        ensure!(Instant::now() < deadline, "the server does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(server)
}

fn everything(bed: &Bed, transport: &str) -> Result<Running> {
    let modules = installed("mcp-node")?.join("node_modules/.bin/mcp-server-everything");
    let mut command = bed.command(modules)?;
    command.arg(transport).env("PORT", PORT.to_string());
    listening(bed, command, PORT)
}

/// A script of the tests' own, in an environment with one of the SDKs.
fn python(bed: &Bed, venv: &str, script: &str) -> Result<Running> {
    let mut command = bed.command(installed(venv)?.join("bin/python"))?;
    command.arg(own(script)).arg(PORT.to_string());
    listening(bed, command, PORT)
}

fn web(bed: &Bed, port: u16) -> Result<Running> {
    let mut command = bed.command(found("python3").context("python3")?)?;
    command.arg(own("web.py")).arg(port.to_string());
    listening(bed, command, port)
}

/// A session of a real client; what it says of it.
fn session(bed: &Bed, venv: &str, kind: &str, arguments: &[&str]) -> Result<Vec<String>> {
    let client = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/over_http.py");
    let path = if kind == "sse" { "sse" } else { "mcp" };
    let mut command = bed.command(installed(venv)?.join("bin/python"))?;
    command.arg(client).arg(kind).arg(format!("http://127.0.0.1:{PORT}/{path}")).args(arguments);
    let done = Running::start(command)?.finish(SESSION)?;
    ensure!(done.status.success() && done.lines.iter().any(|l| l.starts_with("listed")), "{}", done.stderr);
    Ok(done.lines)
}

/// One finding that names the program and its port, and no instance.
fn is_found(sensor: &Sensor, mark: Mark, port: u16, name: &str) -> Result<()> {
    let deadline = Instant::now() + SESSION;
    while sensor.since(mark, "finding", UNKNOWN)?.is_empty() {
        ensure!(Instant::now() < deadline, "no finding: {}", sensor.summary(mark)?);
        std::thread::sleep(Duration::from_millis(20));
    }
    let finding = &sensor.exactly(mark, "finding", UNKNOWN, 1)?[0];
    ensure!(finding.text("kind") == "unknown_server" && finding.text("transport") == "http", "{}", finding.0);
    ensure!(finding.text("instance").contains(name), "{}", finding.0);
    ensure!(finding.number("port") == Some(port.into()), "{}", finding.0);
    ensure!(["low", "medium"].contains(&finding.text("severity")), "{}", finding.0);
    let started = sensor.since(mark, "instance_started", UNKNOWN)?;
    ensure!(started.is_empty(), "it is labelled: {}", shown(&started));
    Ok(())
}

fn skipped() -> Option<Claim> {
    let missing = ["python3", "node", "npm"].into_iter().find(|p| found(p).is_none())?;
    Some(Claim::Skipped(format!("{missing} is not installed (ENOENT)")))
}

fn undeclared(server: impl FnOnce(&Bed) -> Result<Running>, venv: &str, kind: &str, name: &str) {
    run(|| {
        if let Some(claim) = skipped() {
            return Ok(claim);
        }
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::default())?;
        let mark = sensor.mark()?;
        let server = server(&bed)?;
        // More than one session is still one finding.
        for _ in 0..2 {
            session(&bed, venv, kind, &[])?;
        }
        is_found(&sensor, mark, PORT, name)?;
        drop(server);
        Ok(Claim::Holds)
    });
}

#[test]
fn an_undeclared_server_of_npm_over_streamable_http_is_found_by_its_package() {
    undeclared(|bed| everything(bed, "streamableHttp"), "mcp-v1", "streamable", "server-everything");
}

#[test]
fn an_undeclared_server_over_http_and_sse_is_found_by_its_package() {
    undeclared(|bed| everything(bed, "sse"), "mcp-v1", "sse", "server-everything");
}

#[test]
fn an_undeclared_server_over_http_that_a_newer_client_asks_for_its_era_is_found() {
    undeclared(|bed| everything(bed, "streamableHttp"), "mcp-v2", "streamable", "server-everything");
}

#[test]
fn an_undeclared_server_on_the_python_sdk_1_over_http_is_found_by_its_script() {
    undeclared(|bed| python(bed, "mcp-v1", "over_http.py"), "mcp-v1", "streamable", "over_http");
}

#[test]
fn an_undeclared_server_on_the_python_sdk_2_over_http_is_found_by_its_script() {
    undeclared(|bed| python(bed, "mcp-v2", "over_http.py"), "mcp-v2", "streamable", "over_http");
}

/// An editor may host such a server: whatever the policy says of unknown ones.
#[test]
fn an_undeclared_server_over_http_is_not_enforced() {
    run(|| {
        if let Some(claim) = skipped() {
            return Ok(claim);
        }
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::default().unknown("none", "enforce"))?;
        let mark = sensor.mark()?;
        let server = python(&bed, "mcp-v1", "over_http.py")?;
        session(&bed, "mcp-v1", "streamable", &[])?;
        is_found(&sensor, mark, PORT, "over_http")?;
        bed.frames()?;
        let to = [Family::V4.allowed().to_string(), ELSEWHERE.to_string()];
        let said = session(&bed, "mcp-v1", "streamable", &[&to[0], &to[1]])?;
        ensure!(said.iter().any(|l| l == "connect: ok"), "{said:?}");
        ensure!(!bed.frames()?.is_empty(), "nothing arrives");
        drop(server);
        Ok(Claim::Holds)
    });
}

#[test]
fn an_undeclared_server_over_http_that_ran_before_the_sensor_is_found() {
    run(|| {
        if let Some(claim) = skipped() {
            return Ok(claim);
        }
        let bed = Bed::new()?;
        let server = everything(&bed, "streamableHttp")?;
        session(&bed, "mcp-v1", "streamable", &[])?;
        let sensor = Sensor::start(&bed, &Policy::default())?;
        let mark = sensor.mark()?;
        session(&bed, "mcp-v1", "streamable", &[])?;
        is_found(&sensor, mark, PORT, "server-everything")?;
        drop(server);
        Ok(Claim::Holds)
    });
}

/// The next agent tells of it again.
#[test]
fn a_new_agent_finds_an_undeclared_server_over_http_again() {
    run(|| {
        if let Some(claim) = skipped() {
            return Ok(claim);
        }
        let bed = Bed::new()?;
        let server = python(&bed, "mcp-v1", "over_http.py")?;
        let sensor = Sensor::start(&bed, &Policy::default())?;
        let mark = sensor.mark()?;
        session(&bed, "mcp-v1", "streamable", &[])?;
        is_found(&sensor, mark, PORT, "over_http")?;
        sensor.kill()?;
        sensor.launch(&[])?;
        let again = sensor.mark()?;
        session(&bed, "mcp-v1", "streamable", &[])?;
        is_found(&sensor, again, PORT, "over_http")?;
        drop(server);
        Ok(Claim::Holds)
    });
}

fn post(path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json, text/event-stream\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// Sends a request and reads the answer, whose length its head says.
fn ask(stream: &mut TcpStream, request: &[u8]) -> Result<String> {
    stream.set_read_timeout(Some(SESSION))?;
    stream.write_all(request)?;
    let mut text = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let so_far = String::from_utf8_lossy(&text).into_owned();
        if let Some((head, body)) = so_far.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|l| l.strip_prefix("Content-Length: ")?.trim().parse().ok());
            if body.len() >= length.unwrap_or(0) {
                return Ok(so_far);
            }
        }
        let n = stream.read(&mut piece)?;
        ensure!(n > 0, "the server hangs up: {so_far}");
        text.extend_from_slice(&piece[..n]);
    }
}

fn message(method: &str, params: &Value) -> Vec<u8> {
    json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).to_string().into_bytes()
}

fn handshake() -> Vec<u8> {
    let client = json!({"name": "tests", "version": "1"});
    message("initialize", &json!({"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": client}))
}

/// Another server, which is found afterwards, is the only one: the sensor looks,
/// and has looked at all that came before.
fn is_not_mcp(play: impl FnOnce(&Bed) -> Result<()>) {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::default())?;
        let mark = sensor.mark()?;
        let servers = (web(&bed, PORT)?, web(&bed, PORT + 1)?);
        play(&bed)?;
        ask(&mut dial(&bed, PORT + 1)?, &post("/any", &message("tools/list", &json!({}))))?;
        is_found(&sensor, mark, PORT + 1, "web")?;
        drop(servers);
        Ok(())
    });
}

#[test]
fn json_rpc_over_http_is_no_mcp_server() {
    is_not_mcp(|bed| {
        let mut stream = dial(bed, PORT)?;
        let call = json!([{"to": "0x0", "data": "0x"}, "latest"]);
        for (method, params) in [
            ("eth_call", call),
            ("eth_blockNumber", json!([])),
            ("initialize", json!({"processId": 1, "rootUri": null, "capabilities": {}})),
            ("textDocument/hover", json!({})),
        ] {
            let answer = ask(&mut stream, &post("/rpc", &message(method, &params)))?;
            ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
        Ok(())
    });
}

/// Keep-alive: large bodies, then what only looks like a request within one.
#[test]
fn a_web_server_that_takes_large_posts_is_no_mcp_server() {
    is_not_mcp(|bed| {
        for _ in 0..3 {
            let mut stream = dial(bed, PORT)?;
            ask(&mut stream, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
            ask(&mut stream, &post("/form", &vec![b'x'; 1 << 20]))?;
            ask(&mut stream, &post("/form", &post("/", &vec![b'{'; 100_000])))?;
            ask(&mut stream, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
        }
        Ok(())
    });
}

/// Who looks for MCP servers asks everybody: the answer tells.
#[test]
fn a_web_server_that_is_asked_for_mcp_is_none() {
    is_not_mcp(|bed| {
        for path in ["/rpc", "/any", "/none"] {
            ask(&mut dial(bed, PORT)?, &post(path, &handshake()))?;
        }
        ask(&mut dial(bed, PORT)?, &post("/none", &message("tools/list", &json!({}))))?;
        Ok(())
    });
}

/// A handshake that is taken, and nothing after it; head and body apart.
#[test]
fn an_undeclared_server_is_found_by_its_answer_to_one_request() {
    run(|| {
        if let Some(claim) = skipped() {
            return Ok(claim);
        }
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::default())?;
        let mark = sensor.mark()?;
        let server = everything(&bed, "streamableHttp")?;
        let mut stream = dial(&bed, PORT)?;
        stream.set_nodelay(true)?;
        let request = post("/mcp", &handshake());
        let (head, body) =
            request.split_at(request.windows(4).position(|w| w == b"\r\n\r\n").context("head")? + 4);
        stream.write_all(head)?;
        stream.write_all(&body[..60])?;
        ask(&mut stream, &body[60..])?;
        is_found(&sensor, mark, PORT, "server-everything")?;
        drop(server);
        Ok(Claim::Holds)
    });
}
