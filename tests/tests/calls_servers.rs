//! Real servers under every real client: the sensor's list of calls is the
//! client's own. Needs PyPI and npm once; see `tests/drivers/install`.

use anyhow::{Context, Result, ensure};
use mcp_sensor_tests::bed::Bed;
use mcp_sensor_tests::drivers::found;
use mcp_sensor_tests::mcp::servers::{self, Server};
use mcp_sensor_tests::mcp::session::{ALL, Driver};
use mcp_sensor_tests::network::Family;
use mcp_sensor_tests::policy::Policy;
use mcp_sensor_tests::sensor::Sensor;
use mcp_sensor_tests::service::{Service, WEB_PORT};
use mcp_sensor_tests::spec::{Claim, run};
use std::time::Duration;

/// Two interpreters start on a machine that runs other tests as well.
const SESSION: Duration = Duration::from_secs(90);

fn is_recorded_as_its_clients_know_it(server: impl FnOnce(&Bed) -> Result<Server>) {
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
        for driver in ALL {
            compare(&bed, &sensor, &server, driver).with_context(|| format!("{driver:?}"))?;
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
    let events = sensor.knows(mark, server.name, &log)?;
    let progress: u64 = events.iter().filter_map(|e| e.number("progress")).sum();
    ensure!(progress == log.progress as u64, "{progress} of {} progress notifications", log.progress);
    let lists = sensor.exactly(mark, "tools_listed", server.name, log.asked("client", "tools/list"))?;
    // Whoever begins with `initialize` speaks the older era.
    let era = if log.asked("client", "initialize") > 0 { "legacy" } else { "modern" };
    for event in events.iter().chain(&lists) {
        ensure!(event.text("era") == era, "not {era}: {}", event.0);
        ensure!(event.number("client.pid") == Some(client), "not client {client}: {}", event.0);
        ensure!(event.text("transport") == "stdio", "{}", event.0);
        ensure!(!event.text("instance").is_empty(), "{}", event.0);
    }
    Ok(())
}

#[test]
fn server_everything_is_recorded_as_its_clients_know_it() {
    is_recorded_as_its_clients_know_it(|_| servers::everything());
}

#[test]
fn server_filesystem_is_recorded_as_its_clients_know_it() {
    is_recorded_as_its_clients_know_it(servers::filesystem);
}

#[test]
fn context7_is_recorded_as_its_clients_know_it() {
    is_recorded_as_its_clients_know_it(|_| servers::context7());
}

#[test]
fn notion_is_recorded_as_its_clients_know_it() {
    is_recorded_as_its_clients_know_it(|_| servers::notion());
}

#[test]
fn mcp_server_fetch_is_recorded_as_its_clients_know_it() {
    let url = format!("http://{}:{WEB_PORT}/page", Family::V4.allowed());
    is_recorded_as_its_clients_know_it(move |_| servers::fetch(&url));
}

#[test]
fn mcp_server_git_is_recorded_as_its_clients_know_it() {
    is_recorded_as_its_clients_know_it(servers::git);
}

#[test]
fn mcp_server_time_is_recorded_as_its_clients_know_it() {
    is_recorded_as_its_clients_know_it(|_| servers::time());
}

#[test]
fn mcp_server_sqlite_is_recorded_as_its_clients_know_it() {
    is_recorded_as_its_clients_know_it(servers::sqlite);
}
