//! A collector, as a process, with one output called `bus`.

use super::DEADLINE;
use super::collector::{collect, events_client};
use super::receiver::free_port;
use mcp_sensor::event::pb;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::process::Child;
use tokio::time::timeout;

pub struct Collector {
    pub dir: tempfile::TempDir,
    port: u16,
}

impl Collector {
    /// `kind`: as in the file of outputs, `nats: {…}`.
    pub fn new(kind: &str) -> Collector {
        let collector = Collector { dir: tempfile::tempdir().unwrap(), port: free_port() };
        collector.write(kind);
        collector
    }

    pub fn write(&self, kind: &str) {
        let text = format!("outputs:\n  - name: bus\n    {kind}\n");
        std::fs::write(self.dir.path().join("outputs.yaml"), text).unwrap();
    }

    pub async fn start(&self) -> Child {
        let outputs = self.dir.path().join("outputs.yaml");
        let more = ["--outputs", outputs.to_str().unwrap()];
        collect(&self.dir.path().join("d"), &format!("127.0.0.1:{}", self.port), &more).await
    }

    pub fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The output's state, once it is so.
    pub async fn until(&self, is: impl Fn(&pb::OutputState) -> bool) -> pb::OutputState {
        let mut last = None;
        let waiting = async {
            loop {
                let fleet = events_client(&self.address()).await.fleet(pb::FleetRequest::default()).await;
                let outputs = fleet.unwrap().into_inner().outputs;
                let state = outputs.into_iter().find(|o| o.name == "bus").unwrap();
                if is(&state) {
                    return state;
                }
                last = Some(state);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let state = timeout(2 * DEADLINE, waiting).await;
        state.unwrap_or_else(|_| panic!("{last:?}"))
    }

    /// Every line that the collector wrote, by sensor, boot and number.
    pub fn lines(&self) -> BTreeMap<String, Value> {
        let text = std::fs::read_to_string(self.dir.path().join("d/events.ndjson")).unwrap();
        text.lines().map(|l| serde_json::from_str(l).unwrap()).map(|v| (id(&v), v)).collect()
    }
}

fn id(line: &Value) -> String {
    let text = |key: &str| line[key].as_str().unwrap().to_owned();
    format!("{}/{}/{}", text("sensor"), text("boot"), line["seq"])
}
