//! What a sensor is at the moment of a scrape.

use super::gauge::{Family, flag, number, seconds};
use crate::event::pb;
use crate::kernel::gauges::{Filling, RunTime};
use prometheus_client::registry::Unit;

#[derive(Clone, Debug, Default)]
pub struct Present {
    pub kernel: String,
    pub ready: bool,
    /// Guarantees that do not hold.
    pub degraded: usize,
    pub policy: Option<InForce>,
    /// The file as it is now.
    pub file_refused: bool,
    /// The last that was offered; `None`: none is taken.
    pub bundle_refused: Option<bool>,
    pub rings: Vec<Filling>,
    pub tables: Vec<Filling>,
    /// `None`: the kernel does not measure.
    pub run_times: Option<Vec<RunTime>>,
    /// `None`: the collector is in this process.
    pub feed: Option<pb::FeedState>,
}

#[derive(Clone, Debug, Default)]
pub struct InForce {
    pub hash: String,
    pub loaded_unix_ns: i64,
    /// Version and hash.
    pub bundle: Option<(u64, String)>,
}

impl Present {
    pub fn families(&self) -> Vec<Family> {
        let mut families = vec![
            Family::gauge("mcp_sensor_build_info", "Always 1").with(
                vec![("version", env!("CARGO_PKG_VERSION").to_owned()), ("kernel", self.kernel.clone())],
                1.0,
            ),
            Family::gauge(
                "mcp_sensor_ready",
                "Whether hooks are attached, rings are read and a policy is in force",
            )
            .is(flag(self.ready)),
            Family::gauge("mcp_sensor_degraded", "Guarantees that do not hold here")
                .is(number(self.degraded as u64)),
        ];
        self.policy(&mut families);
        self.kernel(&mut families);
        self.feed(&mut families);
        families
    }

    fn policy(&self, families: &mut Vec<Family>) {
        if let Some(policy) = &self.policy {
            let (version, bundle) = policy.bundle.clone().unwrap_or_default();
            let labels = vec![
                ("hash", policy.hash.clone()),
                ("bundle_version", version.to_string()),
                ("bundle", bundle),
            ];
            families.push(
                Family::gauge("mcp_sensor_policy_info", "The policy in force: always 1").with(labels, 1.0),
            );
            families.push(
                Family::gauge("mcp_sensor_policy_loaded_timestamp", "When the policy in force was loaded")
                    .unit(Unit::Seconds)
                    .is(seconds(policy.loaded_unix_ns)),
            );
        }
        let refused = "Whether the policy as it is now was refused; the one before it is in force";
        let mut family = Family::gauge("mcp_sensor_policy_refused", refused)
            .with(vec![("from", "file".to_owned())], flag(self.file_refused));
        if let Some(refused) = self.bundle_refused {
            family = family.with(vec![("from", "bundle".to_owned())], flag(refused));
        }
        families.push(family);
    }

    fn kernel(&self, families: &mut Vec<Family>) {
        let all = |name, help, label, of: Vec<Filling>, value: fn(&Filling) -> u64| {
            of.into_iter().fold(Family::gauge(name, help), |family, filling| {
                let value = number(value(&filling));
                family.with(vec![(label, filling.name)], value)
            })
        };
        let (rings, tables) = (self.rings.clone(), self.tables.clone());
        families.push(
            all("mcp_sensor_ring_used", "What waits to be read", "ring", rings.clone(), |f| f.used)
                .unit(Unit::Bytes),
        );
        families.push(
            all("mcp_sensor_ring_size", "What a ring holds", "ring", rings, |f| f.capacity).unit(Unit::Bytes),
        );
        families.push(all(
            "mcp_sensor_map_entries",
            "Entries of kernel maps that can fill",
            "map",
            tables.clone(),
            |f| f.used,
        ));
        families
            .push(all("mcp_sensor_map_capacity", "Entries that they take", "map", tables, |f| f.capacity));
        let Some(times) = &self.run_times else { return };
        let mut runs =
            Family::counter("mcp_sensor_hook_runs", "How often programs ran, where the kernel counts it");
        let mut time = Family::counter("mcp_sensor_hook_run_time", "How long they ran").unit(Unit::Seconds);
        for t in times {
            runs = runs.with(vec![("hook", t.hook.to_owned())], number(t.runs));
            time = time.with(vec![("hook", t.hook.to_owned())], number(t.nanoseconds) / 1e9);
        }
        families.extend([runs, time]);
    }

    fn feed(&self, families: &mut Vec<Family>) {
        let Some(feed) = &self.feed else { return };
        families.push(
            Family::gauge("mcp_sensor_feed_connected", "Whether a collector takes events")
                .is(flag(feed.connected)),
        );
        if feed.last_ack_unix_ns > 0 {
            families.push(
                Family::gauge(
                    "mcp_sensor_feed_last_export_timestamp",
                    "When a collector last acknowledged events",
                )
                .unit(Unit::Seconds)
                .is(seconds(feed.last_ack_unix_ns)),
            );
        }
        let Some(spool) = &feed.spool else { return };
        families.push(
            Family::gauge("mcp_sensor_spool", "What waits on the disk for a collector")
                .unit(Unit::Bytes)
                .is(number(spool.bytes)),
        );
        if spool.oldest_unix_ns > 0 {
            families.push(
                Family::gauge("mcp_sensor_spool_oldest_timestamp", "When the oldest of it was sealed")
                    .unit(Unit::Seconds)
                    .is(seconds(spool.oldest_unix_ns)),
            );
        }
        families.push(
            Family::gauge("mcp_sensor_spool_failing", "Whether the disk takes nothing")
                .is(flag(!spool.error.is_empty())),
        );
    }
}
