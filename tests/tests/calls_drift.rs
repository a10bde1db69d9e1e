//! What a server says of its tools and of itself is compared with what it said
//! before.

use anyhow::{Result, ensure};
use mcp_sensor_tests::bed::Bed;
use mcp_sensor_tests::events::Event;
use mcp_sensor_tests::mcp::events::{Mark, shown};
use mcp_sensor_tests::mcp::servers::{self, Server};
use mcp_sensor_tests::mcp::session::{Driver, NODE_1, PYTHON_1, PYTHON_2};
use mcp_sensor_tests::policy::Policy;
use mcp_sensor_tests::sensor::Sensor;
use mcp_sensor_tests::spec::must;
use serde_json::{Value, json};
use std::time::Duration;

const SESSION: Duration = Duration::from_secs(90);

struct World {
    bed: Bed,
    sensor: Sensor,
    server: Server,
}

fn lists() -> Value {
    json!([{"calls": [{"do": "tools"}]}])
}

impl World {
    fn new() -> Result<World> {
        let bed = Bed::new()?;
        let server = servers::echo_python(&bed, lists(), &[])?;
        let sensor = Sensor::start(&bed, &server.declared(Policy::default()))?;
        Ok(World { bed, sensor, server })
    }

    /// A session with these arguments; what drifted in it.
    fn session(&self, driver: Driver, arguments: &[&str]) -> Result<Vec<Event>> {
        self.session_of(driver, arguments, lists())
    }

    fn session_of(&self, driver: Driver, arguments: &[&str], phases: Value) -> Result<Vec<Event>> {
        let mark = self.sensor.mark()?;
        let mut session = self.server.session.clone();
        session.command.extend(arguments.iter().map(|a| (*a).to_owned()));
        session.phases = phases;
        let log = driver.drive(&self.bed, &session, SESSION)?;
        let lists = log.asked("client", "tools/list");
        ensure!(lists > 0, "proves nothing: no list");
        self.sensor.exactly(mark, "tools_listed", self.server.name, lists)?;
        self.drift(mark)
    }

    fn drift(&self, mark: Mark) -> Result<Vec<Event>> {
        self.sensor.since(mark, "drift", self.server.name)
    }
}

fn is_one(drift: &[Event], what: &str) -> Result<()> {
    let said: Vec<&str> = drift.iter().map(|e| e.text("what")).collect();
    ensure!(said == [what], "{said:?} is not {what}");
    let (before, after) = (drift[0].text("before"), drift[0].text("after"));
    ensure!(!after.is_empty() && before != after, "{}", drift[0].0);
    Ok(())
}

fn is_none(drift: &[Event]) -> Result<()> {
    ensure!(drift.is_empty(), "drift: {}", drift.iter().map(|e| e.0.to_string()).collect::<String>());
    Ok(())
}

#[test]
fn a_description_that_changes_between_sessions_is_drift() {
    must(|| {
        let world = World::new()?;
        for driver in [PYTHON_2, NODE_1] {
            is_none(&world.session(driver, &[])?)?;
            let drift = world.session(driver, &["--describe", "Says something else."])?;
            is_one(&drift, "tool_changed")?;
            ensure!(drift[0].text("tool") == "echo", "{}", drift[0].0);
            ensure!(drift[0].0["parts"] == json!(["description"]), "{}", drift[0].0);
            ensure!(!drift[0].0.to_string().contains("something else"), "content: {}", drift[0].0);
            is_none(&world.session(driver, &["--describe", "Says something else."])?)?;
            is_one(&world.session(driver, &[])?, "tool_changed")?;
        }
        Ok(())
    });
}

#[test]
fn a_description_that_changes_within_a_session_is_drift() {
    must(|| {
        let world = World::new()?;
        let change = json!([{"calls": [
            {"do": "tools"},
            {"tool": "change", "arguments": {"text": "Changed under way."}},
            {"do": "tools"},
        ]}]);
        let drift = world.session_of(PYTHON_1, &[], change)?;
        is_one(&drift, "tool_changed")?;
        ensure!(drift[0].text("tool") == "echo", "{}", drift[0].0);
        Ok(())
    });
}

#[test]
fn another_order_of_tools_and_keys_is_no_drift() {
    must(|| {
        let world = World::new()?;
        for driver in [PYTHON_1, PYTHON_2] {
            is_none(&world.session(driver, &[])?)?;
            is_none(&world.session(driver, &["--shuffle"])?)?;
            is_none(&world.session(driver, &[])?)?;
        }
        let mut listed = world.sensor.events();
        let hashes: std::collections::BTreeSet<String> = listed
            .all()?
            .iter()
            .filter(|e| e.text("type") == "tools_listed")
            .map(|e| e.text("list_hash").to_owned())
            .collect();
        ensure!(hashes.len() == 1, "the lists have several hashes: {hashes:?}");
        Ok(())
    });
}

#[test]
fn another_version_is_drift() {
    must(|| {
        let world = World::new()?;
        is_none(&world.session(PYTHON_1, &[])?)?;
        let drift = world.session(PYTHON_1, &["--version", "2.0.0"])?;
        is_one(&drift, "server_version")?;
        ensure!((drift[0].text("before"), drift[0].text("after")) == ("1.0.0", "2.0.0"), "{}", drift[0].0);
        Ok(())
    });
}

#[test]
fn another_content_of_its_program_is_drift() {
    must(|| {
        let world = World::new()?;
        is_none(&world.session(PYTHON_1, &[])?)?;
        let script = &world.server.session.command[1];
        let text = std::fs::read_to_string(script)?;
        std::fs::write(script, format!("{text}\n# Something new.\n"))?;
        is_one(&world.session(PYTHON_1, &[])?, "entry_point")
    });
}

#[test]
fn what_was_said_is_kept_over_restarts() {
    must(|| {
        let world = World::new()?;
        is_none(&world.session(PYTHON_1, &[])?)?;
        world.sensor.stop()?;
        world.sensor.launch(&[])?;
        is_none(&world.session(PYTHON_1, &[])?)?;
        is_one(&world.session(PYTHON_1, &["--describe", "Not as before."])?, "tool_changed")
    });
}

/// What real servers list differs from client to client, not from day to day.
#[test]
fn a_real_server_does_not_drift() {
    must(|| {
        let bed = Bed::new()?;
        let mut server = servers::git(&bed)?;
        server.session.phases = lists();
        let sensor = Sensor::start(&bed, &server.declared(Policy::default()))?;
        let mark = sensor.mark()?;
        for _ in 0..2 {
            for driver in [PYTHON_2, NODE_1] {
                driver.drive(&bed, &server.session, SESSION)?;
            }
        }
        sensor.exactly(mark, "tools_listed", server.name, 4)?;
        let drift = sensor.since(mark, "drift", server.name)?;
        ensure!(drift.is_empty(), "{}", shown(&drift));
        is_none(&drift)
    });
}
