//! `collect --outputs`: what is said of the file before anything starts, and the
//! metrics of outputs as Prometheus takes them.

mod support;

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};
use support::collector::{batches, feed};
use support::receiver::{Collecting, certificates, free_port, missing, spawn, until};

fn check(file: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mcp-sensor"))
        .args(["collect", "--check", "--outputs"])
        .arg(file)
        .env("TERM", "dumb")
        .output()
        .unwrap()
}

#[test]
fn a_wrong_file_is_told_with_its_lines_and_nothing_starts() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("o.yaml");
    std::fs::write(&file, "outputs:\n  - name: siem\n    syslog: {address: 'siem:514'}\n").unwrap();
    let output = check(&file);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("o.yaml:3:23") && said.contains("tls://HOST"), "{said}");
    let started = Command::new(env!("CARGO_BIN_EXE_mcp-sensor"))
        .args(["collect", "--listen", "127.0.0.1:0", "--dir"])
        .arg(dir.path().join("events"))
        .arg("--outputs")
        .arg(&file)
        .output()
        .unwrap();
    assert_eq!(started.status.code(), Some(3));
    assert!(!dir.path().join("events").exists());
    assert_eq!(check(&dir.path().join("none.yaml")).status.code(), Some(7));
}

#[test]
fn the_example_in_the_documentation_is_a_file_of_outputs() {
    let text = include_str!("../../docs/feed.md");
    let (_, example) = text.split_once("```yaml\noutputs:").unwrap();
    let example = format!("outputs:{}", example.split_once("```").unwrap().0);
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    std::fs::write(dir.path().join("token"), "Bearer x\n").unwrap();
    let file = dir.path().join("outputs.yaml");
    std::fs::write(&file, &example).unwrap();
    let output = check(&file);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(said.lines().count() - 1, example.matches("- name:").count(), "{said}");
}

#[tokio::test]
async fn prometheus_reads_how_each_output_does() {
    if missing("prometheus", "prometheus") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (metrics, web) = (free_port(), free_port());
    let outputs = format!(
        "outputs:
  - name: lines
    format: ocsf
    ndjson: {{path: lines}}
  - name: down
    syslog: {{address: 'unix:{}'}}
",
        dir.path().join("nobody").display()
    );
    let more = ["--metrics", &metrics.to_string()];
    let collecting = Collecting::start(dir.path(), &outputs, &more).await;
    feed(&collecting.address, "web-1", "b1", batches(1..=250, 100)).await;
    let config = dir.path().join("prometheus.yaml");
    let scrape = format!(
        "global: {{scrape_interval: 1s}}\nscrape_configs:\n  - job_name: mcp-sensor-collector\n    \
         static_configs: [{{targets: ['127.0.0.1:{metrics}']}}]\n"
    );
    std::fs::write(&config, scrape).unwrap();
    let address = format!("127.0.0.1:{web}");
    let _prometheus = spawn(
        "prometheus",
        &[
            &format!("--config.file={}", config.display()),
            &format!("--storage.tsdb.path={}", dir.path().join("tsdb").display()),
            &format!("--web.listen-address={address}"),
        ],
    );
    let query = |metric: &str| -> Vec<(Value, String)> {
        let Some(text) = get(&address, &format!("/api/v1/query?query={metric}")) else { return Vec::new() };
        let Ok(answer) = serde_json::from_str::<Value>(&text) else { return Vec::new() };
        let results = answer["data"]["result"].as_array().cloned().unwrap_or_default();
        let value = |r: &Value| r["value"][1].as_str().unwrap().to_owned();
        results.iter().map(|r| (r["metric"].clone(), value(r))).collect()
    };
    let of = |metric: &str, output: &str| {
        let found = query(metric).into_iter().find(|(labels, _)| labels["output"] == output);
        found.map(|(_, value)| value)
    };
    let name = |end: &str| format!("mcp_sensor_collector_{end}");
    until("it was scraped", || {
        of(&name("output_delivered_events_total"), "lines").as_deref() == Some("250")
            && of(&name("output_lag_events"), "down").as_deref() == Some("250")
            && of(&name("output_failing"), "down").as_deref() == Some("1")
    })
    .await;
    assert_eq!(of(&name("output_lag_events"), "lines").as_deref(), Some("0"));
    assert_eq!(query(&name("events_stored_total"))[0].1, "250");
    assert_eq!(query(&name("sensor_last_event_timestamp_seconds"))[0].0["sensor"], "web-1");
    let lines = std::fs::read_to_string(dir.path().join("lines/events.ndjson")).unwrap();
    let first: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!((lines.lines().count(), &first["metadata"]["uid"]), (250, &Value::from("web-1/b1/1")));
}

fn get(address: &str, path: &str) -> Option<String> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(address).ok()?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned())
}
