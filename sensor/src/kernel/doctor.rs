//! What this host can enforce.

use crate::event::pb::HookStatus;
use std::path::Path;

/// One prerequisite, or one hook.
#[derive(Clone, Debug)]
pub struct Check {
    pub name: String,
    /// `Attached`: works.
    pub status: HookStatus,
    /// The sensor does not start without it (but for `--allow-degraded`).
    pub required: bool,
    /// What was found, and why it is so.
    pub detail: String,
    /// What to do about it; empty if nothing.
    pub fix: String,
}

pub fn report(_cgroup: Option<&Path>) -> anyhow::Result<Vec<Check>> {
    anyhow::bail!("this build has no kernel half")
}
