//! Whether this sensor holds its servers to the policy: its hooks are where they
//! were attached, its rings are read, a policy is in force.

use super::canary::alarm;
use super::core::{Core, lock};
use crate::event::Body;
use crate::health::{self, Health, State};
use crate::kernel::links::Links;
use crate::kernel::{Hook, HookState};
use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;

/// The rings' thread takes a turn every few milliseconds.
const TURN: Duration = Duration::from_secs(30);

pub struct Checks {
    core: Arc<Core>,
    links: Links,
    /// Core hooks that never were attached.
    missing: Vec<String>,
    state: watch::Sender<State>,
    /// Hooks whose end was told.
    told: Mutex<HashSet<&'static str>>,
}

impl Checks {
    pub fn new(core: Arc<Core>, links: Links, hooks: &[Hook]) -> Checks {
        let missing = hooks.iter().filter(|hook| hook.core).filter_map(|hook| match &hook.state {
            HookState::Attached => None,
            HookState::Failed(reason) => Some(format!("{}: {} ({reason})", hook.name, hook.without)),
        });
        let checks = Checks {
            core,
            links,
            missing: missing.collect(),
            state: watch::Sender::default(),
            told: Mutex::default(),
        };
        checks.look();
        checks
    }

    pub fn health(&self) -> Health {
        self.state.subscribe()
    }

    pub fn look(&self) {
        let mut state = State { not_ready: self.missing.clone(), ..State::default() };
        let turned = self.core.turned.load(Ordering::Relaxed);
        let since = Duration::from_nanos(u64::try_from(super::reader::boottime() - turned).unwrap_or(0));
        if turned > 0 && since > TURN {
            state.not_live.push(format!("the rings are not read for {} seconds", since.as_secs()));
        }
        if self.core.in_force().is_none() {
            state.not_ready.push("no policy is in force".to_owned());
        }
        for hook in self.links.detached() {
            state.not_ready.push(format!(
                "the hook `{hook}` is not attached any more: somebody detached it, or its cgroup is gone; \
                 restart the sensor"
            ));
            if lock(&self.told).insert(hook) {
                let detail = format!("the hook `{hook}` is not attached any more");
                self.core.bus.publish_now(Body::Finding(alarm("hook_detached", &detail)));
            }
        }
        state.not_ready.extend(lock(&self.core.proof).broken.iter().cloned());
        health::change(&self.state, |shown| *shown = state);
    }
}
