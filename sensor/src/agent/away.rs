//! What the programs did while no agent ran, from their counters.

use super::reader::boottime;
use super::state::Policies;
use crate::event::{now, pb};
use crate::kernel::maps::Maps;
use sensor_common::kernel::verdicts_of;
use sensor_common::policy::SERVER_UNKNOWN;
use sensor_common::record::{VERDICT_DENY, VERDICT_WOULD_DENY};

/// The entry of no server: when the counters were looked at.
const LOOKED: u32 = 0;

/// Notes what has been seen up to now.
pub fn seen(maps: &mut Maps, policies: &Policies) {
    for id in servers(policies) {
        for verdict in [VERDICT_DENY, VERDICT_WOULD_DENY] {
            let at = verdicts_of(id, verdict);
            let (Ok(count), Ok(before)) = (maps.verdicts_of.get(&at, 0), maps.verdicts_seen.get(&at, 0))
            else {
                continue;
            };
            if count != before {
                let _ = maps.verdicts_seen.set(at, count, 0);
            }
        }
    }
    let _ = maps.verdicts_seen.set(LOOKED, boottime() as u64, 0);
}

/// `None`: no agent looked before.
pub fn told(maps: &Maps, policies: &Policies) -> Option<pb::Away> {
    let looked = maps.verdicts_seen.get(&LOOKED, 0).ok().filter(|at| *at != 0)?;
    let since = boottime().saturating_sub(i64::try_from(looked).ok()?);
    let more = |id, verdict| {
        let at = verdicts_of(id, verdict);
        let count = maps.verdicts_of.get(&at, 0).unwrap_or(0);
        count.saturating_sub(maps.verdicts_seen.get(&at, 0).unwrap_or(0))
    };
    let servers = servers(policies).into_iter().map(|id| pb::AwayServer {
        server: policies.server_name(id).to_owned(),
        denied: more(id, VERDICT_DENY),
        would_denied: more(id, VERDICT_WOULD_DENY),
    });
    Some(pb::Away {
        since_unix_ns: now() - since,
        servers: servers.filter(|s| s.denied + s.would_denied > 0).collect(),
    })
}

fn servers(policies: &Policies) -> Vec<u16> {
    let declared =
        policies.current().into_iter().flat_map(|p| p.compiled().servers.iter().map(|(id, ..)| *id));
    let mut ids: Vec<u16> = declared.chain([SERVER_UNKNOWN]).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}
