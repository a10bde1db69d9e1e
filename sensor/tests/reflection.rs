//! A client in another language that has nothing but the collector's reflection.

mod support;

use std::process::Stdio;
use support::DEADLINE;
use support::collector::{InProcess, LARGE, batches, feed};
use support::driver::{installed, script};
use tokio::process::Command;
use tokio::time::timeout;

#[tokio::test]
async fn python_with_only_reflection_reads_what_the_log_holds_and_resumes_by_its_cursor() {
    let Some(python) = installed("grpc") else { return };
    let dir = tempfile::tempdir().unwrap();
    let collector =
        InProcess::start(&dir.path().join("d"), "127.0.0.1:0", LARGE, mcp_sensor::collect::Limits::default())
            .await;
    let address = collector.address.clone();
    let read = async |count: usize| {
        let mut command = Command::new(python.join("bin/python3"));
        command.arg(script("subscribe.py")).arg(address.trim_start_matches("http://"));
        command.arg(dir.path().join("cursor")).arg(count.to_string());
        command.stdin(Stdio::null()).kill_on_drop(true);
        let done = timeout(2 * DEADLINE, command.output()).await.expect("an end").unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let text = String::from_utf8(done.stdout).unwrap();
        text.lines().map(str::to_owned).collect::<Vec<String>>()
    };
    feed(&address, "a", "b", batches(1..=1000, 100)).await;
    let mut lines = read(1).await;
    assert!(!lines.is_empty());
    feed(&address, "c", "d", batches(1..=200, 100)).await;
    lines.extend(read(1200 - lines.len()).await);
    let of = |sensor: &str, boot: &str, seqs: std::ops::RangeInclusive<u64>| {
        seqs.map(|seq| format!("{sensor} {boot} {seq} exec")).collect::<Vec<String>>()
    };
    assert_eq!(lines, [of("a", "b", 1..=1000), of("c", "d", 1..=200)].concat());
    collector.stop().await;
    let log: Vec<String> = std::fs::read_to_string(dir.path().join("d/events.ndjson"))
        .unwrap()
        .lines()
        .map(|line| {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            let word = |key: &str| value[key].as_str().unwrap().to_owned();
            format!("{} {} {} {}", word("sensor"), word("boot"), value["seq"], word("type"))
        })
        .collect();
    assert_eq!(lines, log);
}
