//! What follows a call that the policy forbids.

use super::adopt;
use super::core::{Core, lock};
use super::process;
use super::session::Violation;
use crate::event::{Body, now};
use crate::kernel::{pidfd, tables};
use crate::policy::OnViolation;
use sensor_common::label::Label;
use std::sync::Arc;

impl Core {
    /// A forbidden call was seen: what the policy wants of it.
    pub fn contain(self: &Arc<Self>, label: Label, violation: Violation) {
        let Violation { then, mut finding, at } = violation;
        let contained = match then {
            OnViolation::Report => false,
            OnViolation::Kill => self.kill(label),
            OnViolation::Quarantine => self.quarantine(label),
        };
        if contained {
            finding.action = "contained".to_owned();
            finding.contained_after_ns = u64::try_from(now() - at).unwrap_or(0);
        }
        self.bus.publish(at, Body::Finding(finding));
    }

    /// Ends every process of an instance. False: some live on.
    fn kill(&self, label: Label) -> bool {
        const PASSES: usize = 32;
        for _ in 0..PASSES {
            let alive: Vec<u32> = adopt::labelled(&lock(&self.maps))
                .into_iter()
                .filter(|(_, l)| l.instance() == label.instance())
                .map(|(pid, _)| pid)
                .filter(|pid| process::stat(*pid).is_some_and(|s| !s.zombie))
                .collect();
            if alive.is_empty() {
                return true;
            }
            for pid in alive {
                // By descriptor, and only while the label is still there: its
                // number may be another's by now.
                let Ok(pidfd) = pidfd::pidfd_open(pid) else { continue };
                if self.labels.of(pid).is_some_and(|l| l.instance() == label.instance()) {
                    pidfd::kill(&pidfd);
                }
            }
        }
        false
    }

    /// The instance reaches nothing any more.
    fn quarantine(&self, label: Label) -> bool {
        let mut maps = lock(&self.maps);
        tables::quarantine(&mut maps, label.instance())
    }
}
