//! The policies that verdicts may refer to: the one in force and a few before
//! it, since a record may have been written just before a switch.

use crate::policy::compile::{Compiled, RuleInfo, UNKNOWN};
use crate::policy::load::Loaded;
use sensor_common::policy::SERVER_UNKNOWN;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// Policies that stay known after they were replaced.
const KEPT: usize = 8;

pub struct InForce {
    pub loaded: Loaded,
    pub generation: u32,
    pub hash: String,
    pub loaded_unix_ns: i64,
}

impl InForce {
    pub fn compiled(&self) -> &Compiled {
        &self.loaded.compiled
    }

    /// By what the `match` with this number recognises a server.
    pub fn evidence(&self, matched: u32) -> String {
        self.compiled().matchers.get(matched as usize).map(|m| m.evidence.clone()).unwrap_or_default()
    }
}

/// What a record may still ask of a policy that was replaced.
struct Past {
    generation: u32,
    hash: String,
    rules: Vec<RuleInfo>,
}

/// Names of servers outlive the policy that declared them: labels hold ids.
#[derive(Default)]
pub struct Policies {
    current: Option<Arc<InForce>>,
    /// Being written; records under it may come before the switch is noted.
    pending: Option<Arc<InForce>>,
    past: VecDeque<Past>,
    names: HashMap<u16, String>,
}

impl Policies {
    /// A policy that is about to be switched to.
    pub fn announce(&mut self, policy: Arc<InForce>) {
        self.pending = Some(policy);
    }

    pub fn withdraw(&mut self) {
        self.pending = None;
    }

    pub fn push(&mut self, policy: Arc<InForce>) {
        self.pending = None;
        for (id, name, _) in &policy.compiled().servers {
            self.names.insert(*id, name.clone());
        }
        if let Some(before) = self.current.replace(policy) {
            let rules = before.compiled().rules.clone();
            self.past.push_front(Past { generation: before.generation, hash: before.hash.clone(), rules });
            self.past.truncate(KEPT);
        }
    }

    pub fn current(&self) -> Option<&Arc<InForce>> {
        self.current.as_ref()
    }

    /// Hash of the policy of a generation, and a rule of it.
    pub fn rule(&self, generation: u32, rule: u32) -> (Option<&str>, Option<&RuleInfo>) {
        let known = self.pending.iter().chain(&self.current).find(|p| p.generation == generation);
        if let Some(policy) = known {
            return (Some(&policy.hash), policy.compiled().rule(rule));
        }
        let Some(past) = self.past.iter().find(|p| p.generation == generation) else { return (None, None) };
        (Some(&past.hash), (rule as usize).checked_sub(1).and_then(|i| past.rules.get(i)))
    }

    pub fn server_name(&self, id: u16) -> &str {
        match self.names.get(&id) {
            Some(name) => name,
            None if id == SERVER_UNKNOWN => UNKNOWN,
            None => "unlabelled",
        }
    }
}
