//! A thousand sensors on one collector, over mTLS.

use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::{Folder, Process, cpu_seconds, fleet_program};
use crate::{
    bench::{flood::memory, scale::Row},
    step, workspace,
};

pub(super) const SENSORS: usize = 1000;
const SECONDS: u64 = 10;
/// Events a second of all of them; the highest is kept to at which every event is
/// stored and acknowledged within a second of the last.
const RATES: [u64; 6] = [60_000, 40_000, 30_000, 20_000, 10_000, 5_000];

pub(super) fn rows() -> Result<Vec<Row>> {
    let (mut tried, mut best) = (Vec::new(), None);
    for rate in RATES {
        let run = Run::new(rate)?;
        tried.push(run.said());
        if run.keeps_up() {
            best = Some(run);
            break;
        }
    }
    // Half of it: how long an acknowledgement takes where nothing is in a hurry.
    let mut rows = vec![Row {
        what: "1,000 sensors over mTLS to one collector, without loss",
        limit: "every event stored and acknowledged",
        measured: tried.join("; "),
        ok: best.is_some(),
    }];
    if let Some(best) = best {
        let half = Run::new(best.rate / 2)?;
        rows.push(Row {
            what: "the same at half the rate: from publishing to acknowledged, p99",
            limit: "≤ 250 ms",
            measured: half.said(),
            ok: half.number("ack_p99_ms") <= 250.0 && half.keeps_up(),
        });
    }
    Ok(rows)
}

struct Run {
    rate: u64,
    result: Value,
    /// Events in the collector's log.
    stored: u64,
    memory: f64,
    /// CPU of the collector, seconds.
    cpu: f64,
}

impl Run {
    fn new(rate: u64) -> Result<Run> {
        let (memory_folder, disk) = (Folder::in_memory()?, Folder::on_disk("fleet")?);
        let ca = memory_folder.join("ca");
        let ca = ca.to_str().context("a path of ours")?;
        let binary = workspace::sensor_binary(false);
        step::output(Command::new(&binary).args(["certs", "init", "--dir", ca]))?;
        step::output(Command::new(&binary).args(["certs", "issue", "collector", "127.0.0.1", "--dir", ca]))?;
        step::output(Command::new(&binary).args(["certs", "issue", "reader", "bench", "--dir", ca]))?;
        let file = |name: &str| format!("{ca}/{name}.pem");
        let tls = |name: &str| {
            [
                "--tls-ca".to_owned(),
                file("ca"),
                "--tls-cert".to_owned(),
                file(name),
                "--tls-key".to_owned(),
                file(&format!("{name}-key")),
            ]
        };
        let own = tls("collector-127.0.0.1");
        let mut arguments: Vec<&str> = own.iter().map(String::as_str).collect();
        arguments.extend(["--listen", "127.0.0.1:0"]);
        let collector = Process::collector(&disk.join("events"), &arguments)?;
        let said = step::output(
            Command::new(fleet_program())
                .args(["feed", "--collector", &collector.address, "--ca", ca, "--dir"])
                .arg(memory_folder.join("sensors"))
                .args(["--sensors", &SENSORS.to_string(), "--per-second", &rate.to_string()])
                .args(["--seconds", &SECONDS.to_string()]),
        )?;
        let reader = tls("reader-bench");
        let fleet = collector.fleet(&reader.iter().map(String::as_str).collect::<Vec<_>>())?;
        Ok(Run {
            rate,
            result: serde_json::from_str(&said)?,
            stored: fleet["log"]["next"].as_u64().context("the log says no number")?,
            memory: memory(collector.pid(), "VmHWM")?,
            cpu: cpu_seconds(collector.pid())?,
        })
    }

    fn number(&self, key: &str) -> f64 {
        self.result[key].as_f64().unwrap_or(f64::NAN)
    }

    fn keeps_up(&self) -> bool {
        let all = self.result["lost"] == 0 && self.result["numbered"].as_u64() == Some(self.stored);
        all && self.number("acked_seconds") <= SECONDS as f64 + 1.0
    }

    fn said(&self) -> String {
        format!(
            "{:.0} events/s made, {:.0}/s acknowledged, {} of {} stored, {} lost; collector {:.0} MiB, {:.1} µs CPU an event; \
             ack p50 {:.0} ms, p99 {:.0} ms",
            self.number("published") / self.number("made_seconds"),
            self.number("numbered") / self.number("acked_seconds"),
            self.stored,
            self.result["numbered"],
            self.result["lost"],
            self.memory,
            self.cpu * 1e6 / self.stored as f64,
            self.number("ack_p50_ms"),
            self.number("ack_p99_ms"),
        )
    }
}
