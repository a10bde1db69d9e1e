//! Clients that a server refuses (401, 403): each refusal is an event, many of
//! one client are a finding.

use anyhow::{Result, ensure};
use mcp_sensor_tests::bed::Bed;
use mcp_sensor_tests::drivers::found;
use mcp_sensor_tests::events::Event;
use mcp_sensor_tests::mcp::events::Mark;
use mcp_sensor_tests::mcp::listening::{Listener, PORT};
use mcp_sensor_tests::network::Family;
use mcp_sensor_tests::peer::Client;
use mcp_sensor_tests::policy::Policy;
use mcp_sensor_tests::sensor::Sensor;
use mcp_sensor_tests::spec::{Claim, run};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

const ANSWER: Duration = Duration::from_secs(20);

struct World {
    bed: Bed,
    sensor: Sensor,
    listener: Listener,
    _running: mcp_sensor_tests::run::Running,
}

impl World {
    fn new(name: &'static str) -> Result<World> {
        let bed = Bed::new()?;
        let listener = Listener::plain(&bed, name, "statuses.py", &[])?;
        let sensor = Sensor::start(&bed, &listener.declared(Policy::default()))?;
        let running = listener.start(&bed)?;
        Ok(World { bed, sensor, listener, _running: running })
    }

    /// Over one connection, one after the other.
    fn ask(&self, from: IpAddr, statuses: &[u16]) -> Result<()> {
        let client = Client::tcp(&self.bed.network, from, SocketAddr::new(Family::V4.server(), PORT))?;
        for status in statuses {
            let request = format!("GET /{status} HTTP/1.1\r\nhost: server\r\n\r\n");
            let answer = client.ask(request.as_bytes(), ANSWER)?.unwrap_or_default();
            let line = format!("HTTP/1.1 {status}");
            ensure!(answer.starts_with(line.as_bytes()), "{:?}", String::from_utf8_lossy(&answer));
        }
        Ok(())
    }

    /// The statuses that a client got, by the sensor, when it has them all.
    fn statuses(&self, mark: Mark, from: IpAddr, all: usize) -> Result<Vec<u64>> {
        let events = self.sensor.exactly(mark, "http", self.listener.name, all)?;
        let own =
            events.iter().filter(|e| e.text("peer.ip").trim_start_matches("::ffff:") == from.to_string());
        Ok(own.filter_map(|e| e.number("status")).collect())
    }

    fn findings(&self, mark: Mark) -> Result<Vec<Event>> {
        let all = self.sensor.since(mark, "finding", self.listener.name)?;
        Ok(all.into_iter().filter(|e| e.text("kind") == "authentication_failures").collect())
    }
}

fn with_python(test: impl FnOnce() -> Result<()>) {
    run(|| match found("python3") {
        Some(_) => test().map(|()| Claim::Holds),
        None => Ok(Claim::Skipped("python3 is not installed (ENOENT)".into())),
    });
}

#[test]
fn five_refusals_of_one_client_are_one_finding() {
    with_python(|| {
        let world = World::new("refuses")?;
        let (one, other) = (Family::V4.allowed(), Family::V4.denied());
        let mark = world.sensor.mark()?;
        let few = [401, 403, 401, 403];
        world.ask(one, &few)?;
        world.ask(other, &few)?;
        ensure!(world.statuses(mark, one, 8)? == few.map(u64::from), "statuses of {one}");
        ensure!(world.findings(mark)?.is_empty(), "four of each are too few: {:?}", world.findings(mark)?);
        // The fifth; over another connection, which is the same client.
        world.ask(one, &[401])?;
        world.statuses(mark, one, 9)?;
        let found = world.findings(mark)?;
        ensure!(found.len() == 1, "{found:?}");
        let detail = found[0].text("detail");
        ensure!(detail.contains(&format!("{one} was refused 5 times")), "{detail}");
        ensure!(found[0].text("severity") == "medium" && !found[0].text("instance").is_empty(), "{found:?}");
        // More within the same minute are events, no more findings.
        world.ask(one, &[401; 20])?;
        world.statuses(mark, one, 29)?;
        ensure!(world.findings(mark)?.len() == 1, "{:?}", world.findings(mark)?);
        world.ask(other, &[403])?;
        world.statuses(mark, other, 30)?;
        let found = world.findings(mark)?;
        ensure!(found.len() == 2 && found[1].text("detail").contains(&other.to_string()), "{found:?}");
        Ok(())
    });
}

#[test]
fn what_is_answered_or_fails_otherwise_is_no_refusal() {
    with_python(|| {
        let world = World::new("answers")?;
        let client = Family::V4.allowed();
        let mark = world.sensor.mark()?;
        let statuses = [200, 404, 500, 200, 400, 429, 407, 302, 503, 201];
        world.ask(client, &statuses)?;
        ensure!(world.statuses(mark, client, statuses.len())? == statuses.map(u64::from), "statuses");
        ensure!(world.findings(mark)?.is_empty(), "{:?}", world.findings(mark)?);
        Ok(())
    });
}
