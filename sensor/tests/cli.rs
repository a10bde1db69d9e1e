//! The program as people and scripts call it, against a stand-in for the agent.

mod support;

use mcp_sensor::control::Limits;
use mcp_sensor::event::{Body, pb};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Output, Stdio};
use support::{Control, DEADLINE, denial};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::time::timeout;

fn command(control: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mcp-sensor"));
    command.args(args).env("MCP_SENSOR_CONTROL", control).env_remove("MCP_SENSOR_OUTPUT");
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

async fn run(control: &Path, args: &[&str]) -> Output {
    timeout(DEADLINE, command(control, args).output()).await.unwrap().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reading_commands_print_json_and_tables() {
    let control = Control::start(Limits::default());
    control.agent.bus_publish(denial("time", 1));
    let status = json(&run(&control.path, &["status", "-o", "json"]).await);
    assert_eq!((&status["sensor"], &status["events"]), (&Value::from("host"), &Value::from(1)));
    let servers = json(&run(&control.path, &["servers", "-o", "json"]).await);
    assert_eq!(servers[0]["name"], "time");
    let events = run(&control.path, &["events", "--verdict", "deny,would_deny", "-o", "json"]).await;
    let event: Value = serde_json::from_slice(&events.stdout).unwrap();
    assert_eq!((&event["type"], &event["server"]), (&Value::from("connection"), &Value::from("time")));
    let shown = json(&run(&control.path, &["policy", "show", "-o", "json"]).await);
    assert_eq!(shown["text"], "version: 1\n");
    let names = json(&run(&control.path, &["names", "--server", "time", "-o", "json"]).await);
    assert_eq!(names.as_array().map(Vec::len), Some(support::NAMES), "every message of the answer");
    let first = &names[0];
    assert_eq!((&first["address"], &first["expired"]), (&Value::from("192.0.2.1"), &Value::from(true)));
    assert_eq!(first["rules"][0], "profiles.time.egress[0]");
    for args in [["status"], ["servers"], ["events"], ["names"]] {
        let table = run(&control.path, &args).await;
        assert!(table.status.success() && !table.stdout.is_empty());
        assert!(!table.stdout.contains(&0x1b), "no colours into a pipe");
    }
    let none = run(&control.path, &["events", "--verdict", "allow", "-o", "json"]).await;
    assert!(none.status.success() && none.stdout.is_empty());
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_have_the_format_that_is_asked_for() {
    let control = Control::start(Limits::default());
    control.agent.bus_publish(denial("time", 1));
    let ocsf = json(&run(&control.path, &["events", "--format", "ocsf"]).await);
    assert_eq!((&ocsf["class_uid"], &ocsf["action"]), (&Value::from(4001), &Value::from("Denied")));
    assert_eq!(ocsf["metadata"]["uid"], "host/boot-1/1");
    // Whatever form people read by default.
    let ecs = json(&run(&control.path, &["events", "--format", "ecs", "-o", "table"]).await);
    assert_eq!((&ecs["event"]["id"], &ecs["service"]["name"]), (&ocsf["metadata"]["uid"], &"time".into()));
    let native = run(&control.path, &["events", "-o", "json"]).await.stdout;
    assert_eq!(run(&control.path, &["events", "--format", "ndjson"]).await.stdout, native);
    let unknown = run(&control.path, &["events", "--format", "cef"]).await;
    assert_eq!(unknown.status.code(), Some(2), "{}", text(&unknown.stderr));
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exit_codes_are_those_of_the_table() {
    let control = Control::start(Limits::default());
    let dir = tempfile::tempdir().unwrap();
    let nobody = dir.path().join("nobody.sock");
    let bad_policy = dir.path().join("bad.yaml");
    std::fs::write(&bad_policy, "version: 1\nbogus: true\n").unwrap();
    let bad_policy = bad_policy.to_str().unwrap();
    let path = &*control.path;
    let dir_text = dir.path().join("new").to_str().unwrap().to_owned();
    for (control, args, expected, says) in [
        (path, &["status", "--bogus"][..], 2, "--bogus"),
        (path, &["events", "--since", "yesterday"], 2, "--since"),
        (path, &["policy", "check", bad_policy], 3, ""),
        (path, &["policy", "reload"], 3, "policy.yaml:3:1"),
        (&nobody, &["status"], 4, "mcp-sensor run"),
        (path, &["servers", "--server", "x"], 7, "no server x"),
        (path, &["names", "--server", "x"], 7, "no such server"),
        (path, &["tools", "x"], 7, "no such server"),
        (path, &["calls", "--since", "yesterday"], 2, "--since"),
        (path, &["calls", "--outcome", "fine"], 2, "tool_error"),
        (path, &["top", "-n", "0"], 2, "ROUNDS"),
        (&nobody, &["top"], 4, "mcp-sensor run"),
        (path, &["run", "--metrics", "everywhere"], 2, "--metrics"),
        (path, &["run", "--otlp", "ftp://x"], 2, "http://HOST:4317"),
        (path, &["policy", "check", "/nonexistent.yaml"], 7, ""),
        (path, &["exec", "--server", "x", "--", "true"], 7, "no server x"),
        (path, &["collect", "--dir", "/dev/null/x"], 1, "/dev/null/x"),
        (path, &["collect", "--listen", "nowhere", "--dir", "/tmp"], 2, "nowhere"),
        (path, &["collect", "--dir", &dir_text, "--listen", "0.0.0.0:0"], 2, "--insecure-plaintext"),
        (path, &["collect", "--dir", "/tmp", "--tls-ca", "x"], 2, "--tls-cert"),
        (
            path,
            &["collect", "--dir", "/tmp", "--tls-ca", "x", "--tls-cert", "x", "--tls-key", "x"],
            1,
            "certs",
        ),
        (path, &["certs", "issue", "sensor", "x", "--dir", &dir_text], 7, "certs init"),
        (path, &["certs", "show", "/nonexistent.pem"], 7, ""),
        (path, &["--log", "mcp_sensor=loud", "status"], 2, "--log"),
    ] {
        let output = run(control, args).await;
        assert_eq!(output.status.code(), Some(expected), "{args:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(says), "{args:?}: {}", text(&output.stderr));
    }
    control.agent.label_all();
    let refused = run(path, &["status"]).await;
    assert_eq!(refused.status.code(), Some(5), "{}", text(&refused.stderr));
    let refused = run(path, &["exec", "--server", "time", "--", "true"]).await;
    assert_eq!(refused.status.code(), Some(5));
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certs_makes_a_ca_once_issues_from_it_and_shows_what_it_issued() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let certs = async |args: &[&str]| {
        let mut command = command(Path::new("/nonexistent"), &[&["certs"], args].concat());
        command.env("MCP_SENSOR_CERTS_DIR", dir.path()).output().await.unwrap()
    };
    assert!(certs(&["init"]).await.status.success());
    let ca = std::fs::read(file("ca.pem")).unwrap();
    let again = certs(&["init"]).await;
    assert_eq!(again.status.code(), Some(1), "{}", text(&again.stderr));
    assert!(std::fs::read(file("ca.pem")).unwrap() == ca, "it stays as it is");
    assert!(certs(&["issue", "sensor", "web-1"]).await.status.success());
    assert!(certs(&["issue", "collector", "c.example", "10.0.0.1", "--days", "5"]).await.status.success());
    for key in ["ca-key.pem", "sensor-web-1-key.pem", "collector-c.example-key.pem"] {
        assert_eq!(std::fs::metadata(file(key)).unwrap().permissions().mode() & 0o777, 0o600, "{key}");
    }
    let shown = async |name: &str| json(&certs(&["show", file(name).to_str().unwrap(), "-o", "json"]).await);
    let sensor = shown("sensor-web-1.pem").await;
    assert_eq!(sensor[0]["sans"], serde_json::json!(["URI:spiffe://mcp-sensor/sensor/web-1"]));
    assert_eq!(sensor[0]["ca"], false);
    assert!(matches!(sensor[0]["days_left"].as_i64(), Some(89 | 90)), "{sensor}");
    let collector = shown("collector-c.example.pem").await;
    let sans = ["URI:spiffe://mcp-sensor/collector/c.example", "DNS:c.example", "IP:10.0.0.1"];
    assert_eq!(collector[0]["sans"], serde_json::json!(sans));
    assert_eq!(collector[0]["issuer"], shown("ca.pem").await[0]["subject"]);
    let before = std::fs::read(file("sensor-web-1.pem")).unwrap();
    assert!(certs(&["issue", "sensor", "web-1"]).await.status.success(), "another in its place");
    assert!(std::fs::read(file("sensor-web-1.pem")).unwrap() != before);
    for bad in ["a/b", "..", "a b"] {
        assert_eq!(certs(&["issue", "sensor", bad]).await.status.code(), Some(2), "{bad}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exec_labels_itself_closes_stray_descriptors_and_becomes_the_command() {
    let control = Control::start(Limits::default());
    let stray = File::open("/dev/null").unwrap();
    let number = stray.as_raw_fd();
    let script = "echo $$; ls /proc/$$/fd; grep SigIgn /proc/$$/status; exit 42";
    let mut command = command(&control.path, &["exec", "--server", "time", "--", "sh", "-c", script]);
    // SAFETY: fcntl is async-signal-safe.
    unsafe {
        command.pre_exec(move || match libc::fcntl(number, libc::F_SETFD, 0) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        })
    };
    let child = command.stdout(Stdio::piped()).spawn().unwrap();
    let pid = child.id().unwrap();
    let output = timeout(DEADLINE, child.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(output.status.code(), Some(42), "the command's own end");
    let text = text(&output.stdout);
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some(pid.to_string().as_str()), "the same process");
    let fds: Vec<i32> = lines.by_ref().map_while(|l| l.parse().ok()).collect();
    assert!(!fds.contains(&number), "descriptor {number} is closed: {fds:?}");
    assert!(fds.iter().all(|fd| *fd <= 2 || *fd == 255 || *fd == 10), "{fds:?}");
    let ignored = text.lines().find_map(|l| l.strip_prefix("SigIgn:")).unwrap().trim();
    let sigpipe = 1 << (libc::SIGPIPE - 1);
    assert_eq!(u64::from_str_radix(ignored, 16).unwrap() & sigpipe, 0, "SIGPIPE is not ignored");
    assert!(mcp_sensor::control::Agent::is_labelled(&*control.agent, pid));
    let missing = run(&control.path, &["exec", "--server", "time", "--", "/nonexistent/program"]).await;
    assert_eq!(missing.status.code(), Some(127));
    let plain = tempfile::NamedTempFile::new().unwrap();
    let plain = plain.path().to_str().unwrap();
    let not_executable = run(&control.path, &["exec", "--server", "time", "--", plain]).await;
    assert_eq!(not_executable.status.code(), Some(126));
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followed_events_come_while_they_happen_until_the_agent_ends() {
    let control = Control::start(Limits::default());
    let mut command = command(&control.path, &["events", "--follow", "-o", "json"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for seq in 1..=3u64 {
        control.agent.bus_publish(denial("time", 1));
        let line = timeout(DEADLINE, lines.next_line()).await.unwrap().unwrap().unwrap();
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["seq"], seq);
    }
    control.agent.close();
    let status = timeout(DEADLINE, child.wait()).await.unwrap().unwrap();
    assert!(status.success());
    control.stop().await;
}

fn call(server: &str, tool: &str, outcome: pb::Outcome) -> Body {
    let actor = pb::Actor {
        server: server.to_owned(),
        client: Some(pb::Client { name: "codex".to_owned(), ..Default::default() }),
        ..Default::default()
    };
    let exchange = pb::Exchange {
        actor: Some(actor),
        method: "tools/call".to_owned(),
        id_hash: "1".to_owned(),
        request_bytes: 120,
        response_bytes: 2000,
        duration_ns: 4_000_000,
        outcome: outcome.into(),
        error_code: -32602,
        ..Default::default()
    };
    Body::ToolCall(Box::new(pb::ToolCall { exchange: Some(exchange), tool: tool.to_owned() }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_are_listed_by_server_tool_and_outcome() {
    let control = Control::start(Limits::default());
    control.agent.bus_publish(denial("time", 1));
    control.agent.bus_publish(call("time", "now\u{1b}[2J", pb::Outcome::Ok));
    control.agent.bus_publish(call("files", "read", pb::Outcome::RpcError));
    control.agent.bus_publish(call("files", "write", pb::Outcome::Ok));
    let table = text(&run(&control.path, &["calls"]).await.stdout);
    let rows: Vec<Vec<&str>> =
        table.lines().map(|l| l.split("  ").map(str::trim).filter(|c| !c.is_empty()).collect()).collect();
    assert_eq!(rows[0], ["TIME", "SERVER", "CLIENT", "CALL", "OUTCOME", "MS", "IN", "OUT"]);
    assert_eq!(rows[1][1..], ["time", "codex", "now\\u{1b}[2J", "ok", "4.00", "120 B", "2.0 kB"]);
    assert_eq!(rows[2][1..5], ["files", "codex", "read", "rpc_error -32602"]);
    assert_eq!(rows.len(), 4);
    for (args, tools) in [
        (&["calls", "-o", "json", "--server", "files"][..], &["read", "write"][..]),
        (&["calls", "-o", "json", "--tool", "write,read", "-n", "1"], &["write"]),
        (&["calls", "-o", "json", "--outcome", "rpc_error,tool_error"], &["read"]),
        (&["calls", "-o", "json", "--since", "1h", "--tool", "gone"], &[]),
    ] {
        let output = run(&control.path, args).await;
        assert!(output.status.success(), "{}", text(&output.stderr));
        let found: Vec<String> = text(&output.stdout)
            .lines()
            .map(|l| serde_json::from_str::<Value>(l).unwrap()["tool"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(found, tools, "{args:?}");
    }
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tools_are_listed_with_their_hashes() {
    let control = Control::start(Limits::default());
    let tools = json(&run(&control.path, &["tools", "time", "-o", "json"]).await);
    let list = &tools[0]["lists"][0];
    assert_eq!(
        (&tools[0]["program"], &list["era"]),
        (&Value::from("mcp-server-time"), &Value::from("modern"))
    );
    assert_eq!(list["tools"][0]["hash"], "ab".repeat(32));
    assert_eq!(list["tools"][0]["changed"], "1970-01-01T00:00:00.000000002Z");
    let table = run(&control.path, &["tools"]).await;
    assert!(text(&table.stdout).contains("now\\u{1b}  abababababab  cdcdcdcdcdcd  efefefefefef"));
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn top_prints_a_round_a_second_and_ends_with_the_agent() {
    let control = Control::start(Limits::default());
    let mut command = command(&control.path, &["top", "-o", "json"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    // Only what happens while it looks counts: until it does, nothing is there.
    while control.agent.readers() == 0 {
        tokio::task::yield_now().await;
    }
    control.agent.bus_publish(call("time", "now", pb::Outcome::ToolError));
    control.agent.bus_publish(denial("time", 1));
    let line = timeout(DEADLINE, lines.next_line()).await.unwrap().unwrap().unwrap();
    let round: Value = serde_json::from_str(&line).unwrap();
    let time = &round["servers"][0];
    assert_eq!(time["server"], "time");
    assert_eq!((&time["calls"], &time["errors"], &time["denied"]), (&1.into(), &1.into(), &1.into()));
    assert_eq!((&time["p50_ms"], &round["lost"]), (&Value::from(4.0), &Value::from(0)));
    control.agent.close();
    let output = timeout(DEADLINE, child.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(output.status.code(), Some(4), "{}", text(&output.stderr));
    let once = run(&control.path, &["top", "-n", "1"]).await;
    assert_eq!(once.status.code(), Some(4), "the bus is closed");
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn top_without_a_terminal_is_a_plain_table() {
    let control = Control::start(Limits::default());
    let output = run(&control.path, &["top", "-n", "2"]).await;
    assert!(output.status.success(), "{}", text(&output.stderr));
    let table = text(&output.stdout);
    assert_eq!(table.lines().filter(|l| l.starts_with("SERVER  MODE")).count(), 2, "{table}");
    assert!(!table.contains('\u{1b}'));
    control.stop().await;
}

/// Everything that comes until the other end is closed, or `until` has come.
fn read_terminal(terminal: &mut File, until: &str) -> String {
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    while !String::from_utf8_lossy(&seen).contains(until) {
        match terminal.read(&mut buffer) {
            // EIO: nobody has the terminal open any more.
            Ok(0) | Err(_) => break,
            Ok(n) => seen.extend_from_slice(&buffer[..n]),
        }
    }
    String::from_utf8_lossy(&seen).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn top_gives_the_terminal_back_when_q_is_pressed() {
    let control = Control::start(Limits::default());
    let pty = nix::pty::openpty(None, None).unwrap();
    let before = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
    let (slave, mut terminal) = (pty.slave, File::from(pty.master));
    let mut command = command(&control.path, &["top"]);
    command.env("TERM", "xterm").env_remove("NO_COLOR");
    command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    drop(command);
    let (mut terminal, seen) = tokio::task::spawn_blocking(move || {
        let seen = read_terminal(&mut terminal, "SERVER");
        (terminal, seen)
    })
    .await
    .unwrap();
    assert!(seen.starts_with("\u{1b}[?1049h") && seen.contains("P99 MS"), "{seen:?}");
    assert!(nix::sys::termios::tcgetattr(&slave).unwrap() != before, "keys come one by one");
    terminal.write_all(b"xq").unwrap();
    let output = timeout(DEADLINE, child.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(nix::sys::termios::tcgetattr(&slave).unwrap(), before);
    drop(slave);
    let rest =
        tokio::task::spawn_blocking(move || read_terminal(&mut terminal, "\u{1b}[?1049l")).await.unwrap();
    assert!(rest.ends_with("\u{1b}[?25h\u{1b}[?1049l"), "{rest:?}");
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_has_seen_enough_is_no_error() {
    let control = Control::start(Limits::default());
    for _ in 0..2000 {
        control.agent.bus_publish(denial("time", 500));
    }
    let mut command = command(&control.path, &["events", "-o", "json"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = timeout(DEADLINE, child.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(output.status.code(), Some(0), "{:?} {}", output.status.signal(), text(&output.stderr));
    assert_eq!(text(&output.stderr), "");
    control.stop().await;
}

#[tokio::test]
async fn help_completions_and_man_pages_are_whole() {
    let nobody = Path::new("/nonexistent");
    let help = run(nobody, &["--help"]).await;
    assert!(text(&help.stdout).contains("Exit codes:"));
    for name in
        ["run", "collect", "fleet", "exec", "status", "servers", "events", "calls", "tools", "top", "certs"]
    {
        let help = text(&run(nobody, &[name, "--help"]).await.stdout);
        assert!(help.contains("Examples:"), "{name}");
        assert!(help.contains("MCP_SENSOR_"), "{name}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = run(nobody, &["completions", shell]).await;
        assert!(text(&script.stdout).contains("mcp-sensor"));
    }
    let dir = tempfile::tempdir().unwrap();
    let man = run(nobody, &["man", dir.path().to_str().unwrap()]).await;
    assert!(man.status.success());
    assert!(dir.path().join("mcp-sensor-run.1").exists());
}

/// Files of an archive by their names, without the folder that all are in.
fn unpacked(archive: &[u8]) -> BTreeMap<String, String> {
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(flate2::read::GzDecoder::new(archive)).entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().into_owned();
        let (folder, name) = path.to_str().unwrap().split_once('/').unwrap();
        assert!(folder.starts_with("mcp-sensor-bugtool-"), "{folder}");
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        files.insert(name.to_owned(), text);
    }
    files
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bugtool_has_what_the_sensor_says_and_no_secret() {
    const TOKEN: &str = "ghp_0123456789abcdefghijABCDEFGHIJ012345";
    let control = Control::start(Limits::default());
    let dir = tempfile::tempdir().unwrap();
    let policy = dir.path().join("policy.yaml");
    std::fs::write(&policy, format!("version: 1\n# {TOKEN}, ann@example.org\n")).unwrap();
    let file = dir.path().join("sensor.tar.gz");
    let args =
        ["bugtool", "--policy", policy.to_str().unwrap(), "--file", file.to_str().unwrap(), "-o", "json"];
    let done = json(&run(&control.path, &args).await);
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);

    let files = unpacked(&std::fs::read(&file).unwrap());
    let manifest: Value = serde_json::from_str(&files["manifest.json"]).unwrap();
    assert_eq!(done["manifest"], manifest);
    for part in manifest["parts"].as_array().unwrap() {
        let name = part["name"].as_str().unwrap();
        assert_eq!(files.contains_key(name), part["error"].is_null(), "{part}");
        assert!(part["error"].is_null() || !part["error"].as_str().unwrap().is_empty(), "{part}");
    }
    let status: Value = serde_json::from_str(&files["agent/status.json"]).unwrap();
    assert_eq!(status["sensor"], "host");
    let doctor: Value = serde_json::from_str(&files["doctor.json"]).unwrap();
    assert!(doctor.as_array().is_some_and(|checks| checks.iter().any(|c| c["name"] == "kernel")), "{doctor}");
    assert_eq!(files["policy/in-force.yaml"], "version: 1\n");
    assert_eq!(files["policy/file.yaml"], "version: 1\n# [REDACTED:github-pat], [email]\n");
    let servers: Value = serde_json::from_str(&files["agent/servers.json"]).unwrap();
    assert_eq!(servers[0]["name"], "time");

    // Another is not written over, and without an agent there is still the host.
    let again = run(&control.path, &args).await;
    assert_eq!(again.status.code(), Some(1), "{}", text(&again.stderr));
    control.stop().await;
    let nobody = dir.path().join("nobody.sock");
    let done = run(&nobody, &["bugtool", "--file", "-"]).await;
    let files = unpacked(&done.stdout);
    assert!(files.contains_key("host/proc/version") && !files.contains_key("agent/status.json"));
    assert!(files["manifest.json"].contains("no agent answers"), "{}", files["manifest.json"]);
}
