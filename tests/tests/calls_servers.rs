//! Real servers under every real client: the sensor's list of calls is the
//! client's own. Needs PyPI and npm once; see `tests/drivers/install`.

use anyhow::{Context, Result, ensure};
use mcp_sensor_tests::bed::Bed;
use mcp_sensor_tests::drivers::found;
use mcp_sensor_tests::mcp::events::Of;
use mcp_sensor_tests::mcp::servers::{self, Server};
use mcp_sensor_tests::mcp::session::{ALL, Driver, NODE_1, NODE_2, PYTHON_1, PYTHON_2};
use mcp_sensor_tests::network::Family;
use mcp_sensor_tests::policy::Policy;
use mcp_sensor_tests::sensor::Sensor;
use mcp_sensor_tests::service::{Service, WEB_PORT};
use mcp_sensor_tests::spec::{Claim, run};
use std::time::Duration;

/// Two interpreters start on a machine that runs other tests as well.
const SESSION: Duration = Duration::from_secs(90);

/// The newest of each SDK; with what else they can be told in `--full`.
const USUAL: [Driver; 4] = [PYTHON_1, PYTHON_2, NODE_1, NODE_2];

fn recorded(server: impl FnOnce(&Bed) -> Result<Server>, drivers: &[Driver]) {
    run(|| {
        for program in ["python3", "node", "npm", "git"] {
            if found(program).is_none() {
                return Ok(Claim::Skipped(format!("{program} is not installed (ENOENT)")));
            }
        }
        let bed = Bed::new()?;
        let _web = Service::web(&bed.network)?;
        let server = server(&bed)?;
        let sensor = Sensor::start(&bed, &server.declared(Policy::default()))?;
        for driver in drivers {
            compare(&bed, &sensor, &server, *driver).with_context(|| format!("{driver:?}"))?;
        }
        Ok(Claim::Holds)
    });
}

fn compare(bed: &Bed, sensor: &Sensor, server: &Server, driver: Driver) -> Result<()> {
    let mark = sensor.mark()?;
    let driven = driver.start(bed, &server.session)?;
    let client = u64::from(driven.running.pid());
    let log = driven.finish(SESSION)?;
    ensure!(!log.calls.is_empty() && log.asked("client", "tools/list") > 0, "proves nothing: {log:?}");
    let of = Of { server: server.name, client: Some(client) };
    let started = sensor.exactly(mark, "instance_started", of, log.processes)?;
    let events = sensor.knows(mark, of, &log)?;
    let progress: u64 = events.iter().filter_map(|e| e.number("progress")).sum();
    ensure!(progress == log.progress as u64, "{progress} of {} progress notifications", log.progress);
    let lists = sensor.exactly(mark, "tools_listed", of, log.asked("client", "tools/list"))?;
    // Whoever begins with `initialize` speaks the older era.
    let era = if log.asked("client", "initialize") > 0 { "legacy" } else { "modern" };
    for event in events.iter().chain(&lists) {
        ensure!(event.text("era") == era, "not {era}: {}", event.0);
        ensure!(event.number("client.pid") == Some(client), "not client {client}: {}", event.0);
        ensure!(event.text("transport") == "stdio", "{}", event.0);
        let known = started.iter().any(|s| s.text("instance") == event.text("instance"));
        ensure!(known, "of no instance: {}", event.0);
    }
    Ok(())
}

fn page() -> String {
    format!("http://{}:{WEB_PORT}/page", Family::V4.allowed())
}

macro_rules! servers {
    ($($name:ident: $server:expr;)+) => {$(
        mod $name {
            use super::*;

            #[test]
            fn is_recorded_as_its_clients_know_it() {
                recorded($server, &USUAL);
            }

            #[test]
            #[ignore = "a minute each"]
            fn is_recorded_as_clients_in_every_mode_know_it() {
                recorded($server, &ALL);
            }
        }
    )+};
}

servers! {
    server_everything: |_| servers::everything();
    server_filesystem: servers::filesystem;
    context7: |_| servers::context7();
    notion: |_| servers::notion();
    mcp_server_fetch: |_| servers::fetch(&page());
    mcp_server_git: servers::git;
    mcp_server_time: |_| servers::time();
    mcp_server_sqlite: servers::sqlite;
}
