//! The collector is away for a while, and comes back while events go on.

use std::{
    ffi::OsStr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{
    bench::{
        flood::{Stored, Way, forget_peak, make, memory, settled},
        scale::Row,
    },
    step::{Step, seconds},
};

const PER_SECOND: u64 = 5000;
/// Enough for the longest outage that is asked for.
const SPOOL: u64 = 8 << 30;
/// The load goes on so long after the collector is back.
const AFTER: Duration = Duration::from_secs(60);
/// Until the agent has told what it has: behind by no more than this is not
/// behind.
const BEHIND: u64 = PER_SECOND / 2;
/// For catching up.
const PATIENCE: Duration = Duration::from_secs(1800);

pub(super) fn rows(outage: Duration, step: &Step) -> Result<Vec<Row>> {
    let spool = SPOOL.to_string();
    let mut way = Way::new(true, &["--spool-bytes".as_ref(), OsStr::new(&spool)])?;
    forget_peak(way.sensor.pid())?;
    way.collector.as_mut().context("a collector apart")?.stop()?;
    let Way { sensor, collector, cgroup } = &mut way;
    let sensor = &*sensor;
    let (made, spooled, caught_up) = thread::scope(|scope| -> Result<_> {
        let making = scope.spawn(|| make(sensor, &cgroup.0, PER_SECOND, outage + AFTER));
        let from = Instant::now();
        while from.elapsed() < outage {
            if making.is_finished() {
                bail!("the load ended early: {:?}", making.join());
            }
            step.detail(format!("{} without a collector", seconds(from.elapsed())));
            thread::sleep(Duration::from_millis(500));
        }
        let spooled = feed(&sensor.status()?, "spool", "bytes")?;
        collector.as_mut().context("a collector apart")?.resume()?;
        let back = Instant::now();
        loop {
            let status = sensor.status()?;
            let acked = status["feed"]["acked_seq"].as_u64().unwrap_or(0);
            let last = status["events"].as_u64().context("no number of events")?;
            if acked > 0 && last.saturating_sub(acked) <= BEHIND {
                break;
            }
            if back.elapsed() > PATIENCE {
                bail!("{acked} of {last} events are acknowledged {} after the outage", seconds(PATIENCE));
            }
            step.detail(format!("{acked} of {last} events are acknowledged"));
            thread::sleep(Duration::from_millis(100));
        }
        let caught_up = back.elapsed();
        let made = making.join().ok().context("a thread panicked")??;
        Ok((made, spooled, caught_up))
    })?;
    let peak = memory(way.sensor.pid(), "VmHWM")?;
    let collector = memory(way.collector.as_ref().context("a collector apart")?.pid()?, "VmHWM")?;
    settled(&way.events())?;
    let status = way.sensor.status()?;
    let evicted = feed(&status, "spool", "evicted")?;
    let stored = Stored::read(&way.events())?;
    let missing = made.saturating_sub(stored.events);
    let waited = outage.as_secs() * PER_SECOND;
    let mut measured = format!(
        "{missing} of {made} lost, {evicted} of them evicted; spool {:.0} MiB at its end ({} bytes an event); agent {peak:.0} MiB, collector {collector:.0} MiB",
        spooled as f64 / f64::from(1 << 20),
        spooled / waited.max(1),
    );
    if stored.lost > 0 {
        measured.push_str(&format!(" ({} told: {})", stored.lost, stored.places.join(", ")));
    }
    Ok(vec![
        Row {
            what: "outage of the collector at 5,000 events/s, spool large enough",
            limit: "nothing lost",
            measured: format!("{}: {measured}", seconds(outage)),
            ok: missing == 0,
        },
        Row {
            what: "catching up after it, while 5,000 events/s go on",
            limit: "≤ a tenth of the outage, or 5 s",
            measured: format!(
                "{} ({:.0} events/s)",
                seconds(caught_up),
                (waited as f64 + caught_up.as_secs_f64() * PER_SECOND as f64) / caught_up.as_secs_f64()
            ),
            ok: caught_up <= (outage / 10).max(Duration::from_secs(5)),
        },
    ])
}

fn feed(status: &Value, part: &str, key: &str) -> Result<u64> {
    status["feed"][part][key].as_u64().with_context(|| format!("status says no {part}.{key}: {status}"))
}
