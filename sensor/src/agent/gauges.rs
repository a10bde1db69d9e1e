//! What a scrape of this sensor's metrics shows beside what events count.

use super::core::Core;
use super::reload::Reloader;
use crate::feed::Feed;
use crate::health::Health;
use crate::kernel::gauges::Gauges;
use crate::metrics::present::{InForce, Present};
use std::sync::Arc;

pub struct Sources {
    pub core: Arc<Core>,
    pub reloader: Arc<Reloader>,
    pub gauges: Gauges,
    pub feed: Option<Feed>,
    pub health: Health,
    pub degraded: usize,
}

impl Sources {
    pub fn look(&self) -> Present {
        let policy = self.core.in_force().map(|policy| InForce {
            hash: policy.hash.clone(),
            loaded_unix_ns: policy.loaded_unix_ns,
            bundle: policy.loaded.bundle.as_ref().map(|b| (b.version, b.hash.clone())),
        });
        Present {
            kernel: super::service::kernel_release(),
            ready: self.health.borrow().is_ready(),
            degraded: self.degraded,
            policy,
            file_refused: !self.reloader.error().is_empty(),
            bundle_refused: self.reloader.bundle().map(|bundle| !bundle.kind.is_empty()),
            rings: self.gauges.rings().collect(),
            tables: self.gauges.tables().collect(),
            run_times: self.gauges.run_times(),
            feed: self.feed.as_ref().map(Feed::state),
        }
    }
}
