//! What `run` does with events: the file of `--events` and the collector in
//! its own process.

mod support;

use clap::Parser;
use mcp_sensor::cli::{Cli, Command, RunArgs};
use mcp_sensor::event::{Bus, Identity, Limits, json};
use mcp_sensor::outputs::Outputs;
use std::path::Path;
use support::{DEADLINE, denial};
use tokio::time::timeout;

fn args(state: &Path, more: &[&str]) -> RunArgs {
    let state = state.to_str().unwrap();
    let all = [&["mcp-sensor", "run", "--state-dir", state], more].concat();
    match Cli::try_parse_from(all).unwrap().command {
        Command::Run(args) => *args,
        other => panic!("{other:?}"),
    }
}

fn bus() -> std::sync::Arc<Bus> {
    Bus::new(Identity { sensor: "host".to_owned(), boot: "b".to_owned() }, Limits::default())
}

#[tokio::test]
async fn an_address_for_metrics_that_is_taken_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let args = args(dir.path(), &["--metrics", &address]);
    let error = Outputs::start(&bus(), &args, None).err().unwrap();
    assert!(format!("{error:#}").contains(&format!("--metrics: cannot listen on {address}")), "{error:#}");
}

#[tokio::test]
async fn every_event_is_in_the_file_and_in_the_local_store_when_the_sensor_ends() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("events.ndjson");
    let args = args(&dir.path().join("state"), &["--events", file.to_str().unwrap()]);
    let bus = bus();
    let outputs = Outputs::start(&bus, &args, None).unwrap();
    assert_eq!(outputs.feed_state(), None);
    for _ in 0..5000 {
        bus.publish_now(denial("time", 10));
    }
    bus.close();
    timeout(DEADLINE, outputs.finish()).await.unwrap();
    let expected: String = bus
        .history(|_| true)
        .iter()
        .map(|e| format!("{}\n", serde_json::to_string(&json::Json(e)).unwrap()))
        .collect();
    for path in [file, dir.path().join("state/events/events.ndjson")] {
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 5000, "{}", path.display());
        assert!(text.ends_with(&expected), "the newest are what the history holds");
    }
}

#[tokio::test]
async fn what_cannot_be_opened_is_an_error_at_the_start_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let args_file = args(dir.path(), &["--events", "/nonexistent/x.ndjson"]);
    let error = Outputs::start(&bus(), &args_file, None).err().unwrap();
    assert!(format!("{error:#}").contains("/nonexistent/x.ndjson"), "{error:#}");
    let args_address = args(dir.path(), &["--collector", "nowhere"]);
    let error = Outputs::start(&bus(), &args_address, None).err().unwrap();
    assert!(format!("{error:#}").contains("https://HOST:PORT"), "{error:#}");
}
