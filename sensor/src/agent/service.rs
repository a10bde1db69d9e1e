//! What the control service asks of the agent.

use super::adopt;
use super::core::{Core, add_instance, lock};
use super::names;
use super::process;
use super::reload::Reloader;
use super::stdio::Shown;
use crate::control::{self, ControlError, Peer};
use crate::event::{Bus, now, pb};
use crate::feed::Feed;
use crate::health::Health;
use crate::kernel::maps::Shared;
use crate::kernel::{Hook, HookState};
use sensor_common::label::{Label, ROLE_LAUNCHER};
use std::sync::Arc;

pub struct Service {
    pub core: Arc<Core>,
    pub reloader: Arc<Reloader>,
    pub hooks: Vec<pb::Hook>,
    pub degraded: Vec<String>,
    pub cgroup: String,
    pub started: i64,
    pub feed: Option<Feed>,
    pub health: Health,
}

/// A hook as events and `status` show it.
pub fn hook(hook: &Hook) -> pb::Hook {
    let mut shown = pb::Hook { name: hook.name.to_owned(), ..Default::default() };
    match &hook.state {
        HookState::Attached => shown.set_status(pb::HookStatus::Attached),
        HookState::Failed(reason) => {
            shown.set_status(pb::HookStatus::NotEnforced);
            shown.detail = reason.clone();
        }
    }
    shown
}

/// How stdio is read, beside the hooks.
pub fn stdio_hook(shown: &Shown) -> pb::Hook {
    let mut hook = pb::Hook { name: "stdio".to_owned(), ..Default::default() };
    hook.set_status(match shown.backend.as_str() {
        "function" => pb::HookStatus::Attached,
        "none" => pb::HookStatus::NotEnforced,
        _ => pb::HookStatus::Fallback,
    });
    let now = if shown.attached { "attached" } else { "waiting for a server" };
    hook.detail = format!(
        "{} back end, {now}; {} connections, {} candidates",
        shown.backend, shown.connections, shown.candidates
    );
    if shown.looks_missed > 0 {
        hook.detail = format!("{}; {} requests over HTTP not looked at", hook.detail, shown.looks_missed);
    }
    if !shown.notes.is_empty() {
        hook.detail = format!("{} ({})", hook.detail, shown.notes.join("; "));
    }
    hook
}

/// A sentence for each guarantee that does not hold.
pub fn degraded(hooks: &[Hook]) -> Vec<String> {
    hooks
        .iter()
        .filter_map(|h| match &h.state {
            HookState::Attached => None,
            HookState::Failed(reason) => Some(format!("{}: {} ({reason})", h.name, h.without)),
        })
        .collect()
}

pub fn kernel_release() -> String {
    nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default()
}

pub fn host_name() -> String {
    nix::unistd::gethostname().map(|h| h.to_string_lossy().into_owned()).unwrap_or_default()
}

impl Service {
    fn policy_state(&self) -> pb::PolicyState {
        let current = self.core.in_force();
        let path = self.reloader.path().display().to_string();
        let bundle = self.reloader.bundle();
        let Some(p) = current else { return pb::PolicyState { path, bundle, ..Default::default() } };
        pb::PolicyState {
            warnings: p.loaded.warnings.iter().map(|w| w.line(&path)).collect(),
            path,
            hash: p.hash.clone(),
            generation: p.generation.into(),
            loaded_unix_ns: p.loaded_unix_ns,
            error: self.reloader.error(),
            bundle,
        }
    }
}

#[tonic::async_trait]
impl control::Agent for Service {
    fn bus(&self) -> &Arc<Bus> {
        &self.core.bus
    }

    fn health(&self) -> Health {
        self.health.clone()
    }

    fn is_labelled(&self, pid: u32) -> bool {
        self.core.labels.of(pid).is_none_or(Label::is_some)
    }

    async fn status(&self) -> Result<pb::StatusResponse, ControlError> {
        let core = self.core.clone();
        let labelled = blocking(move || adopt::labelled(&lock(&core.maps)).len()).await?;
        let servers = self.core.in_force().map_or(0, |p| p.compiled().servers.len());
        Ok(pb::StatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started_unix_ns: self.started,
            kernel: kernel_release(),
            host: host_name(),
            cgroup: self.cgroup.clone(),
            policy: Some(self.policy_state()),
            hooks: self.hooks.iter().cloned().chain([stdio_hook(&self.core.stdio.shown())]).collect(),
            degraded: self.degraded.clone(),
            losses: self.core.lost(),
            servers: servers as u32,
            instances: lock(&self.core.instances).len() as u32,
            labelled_tasks: labelled as u32,
            feed: self.feed.as_ref().map(Feed::state),
            ..Default::default()
        })
    }

    async fn servers(&self, server: Option<&str>) -> Result<Vec<pb::Server>, ControlError> {
        let policy =
            self.core.in_force().ok_or_else(|| ControlError::Unavailable("no policy is in force".into()))?;
        let core = self.core.clone();
        let labelled = blocking(move || adopt::labelled(&lock(&core.maps))).await?;
        let policies = lock(&self.core.policies);
        let instances = lock(&self.core.instances);
        let mut servers = Vec::new();
        for (id, name, compiled) in &policy.compiled().servers {
            if server.is_some_and(|wanted| wanted != name) {
                continue;
            }
            let (mode, profile) = self.core.mode_and_profile(&policies, *id);
            let profile_name = |index: u16| policy.compiled().profile_names.get(usize::from(index)).cloned();
            let mut shown = pb::Server {
                name: name.clone(),
                profile,
                launcher_profile: profile_name(compiled.launcher_profile).unwrap_or_default(),
                unix: ["default", "strict", "open"]
                    .get(usize::from(compiled.unix))
                    .copied()
                    .unwrap_or("?")
                    .to_owned(),
                ..Default::default()
            };
            shown.set_mode(mode);
            for (number, i) in instances.iter().filter(|(_, i)| i.server == *id) {
                let processes = labelled.iter().filter(|(_, l)| l.instance() == *number).count();
                shown.allowed += i.counts.allowed;
                shown.denied += i.counts.denied;
                shown.would_denied += i.counts.would_denied;
                shown.instances.push(pb::Instance {
                    id: i.id.clone(),
                    actor: Some(i.actor.clone()),
                    argv: i.argv.clone(),
                    processes: processes as u32,
                    started_unix_ns: i.started_unix_ns,
                    evidence: i.evidence.clone(),
                    allowed: i.counts.allowed,
                    denied: i.counts.denied,
                    would_denied: i.counts.would_denied,
                });
            }
            shown.instances.sort_by_key(|i| i.started_unix_ns);
            servers.push(shown);
        }
        match server {
            Some(name) if servers.is_empty() => Err(unknown_server(name, policy.compiled())),
            _ => Ok(servers),
        }
    }

    async fn names(&self, server: Option<&str>) -> Result<Vec<pb::LearnedName>, ControlError> {
        let policy =
            self.core.in_force().ok_or_else(|| ControlError::Unavailable("no policy is in force".into()))?;
        let id = match server {
            None => None,
            Some(name) => match policy.compiled().server(name) {
                Some((id, _)) => Some(id),
                None => return Err(unknown_server(name, policy.compiled())),
            },
        };
        let core = self.core.clone();
        blocking(move || {
            let entries = core.names.all(id);
            names::shown(entries, &lock(&core.policies), policy.compiled())
        })
        .await
    }

    async fn tools(&self, server: Option<&str>) -> Result<Vec<pb::ServerTools>, ControlError> {
        let policy =
            self.core.in_force().ok_or_else(|| ControlError::Unavailable("no policy is in force".into()))?;
        let shown = lock(&self.core.inventory).shown(server);
        match server {
            // One that the policy no longer declares may still be known.
            Some(name) if shown.is_empty() && policy.compiled().server(name).is_none() => {
                Err(unknown_server(name, policy.compiled()))
            }
            _ => Ok(shown),
        }
    }

    async fn policy(&self) -> Result<pb::PolicyShowResponse, ControlError> {
        let policy =
            self.core.in_force().ok_or_else(|| ControlError::Unavailable("no policy is in force".into()))?;
        Ok(pb::PolicyShowResponse {
            state: Some(self.policy_state()),
            text: policy.loaded.source.clone(),
            bundle: policy.loaded.bundle.as_ref().map(|b| b.signed.clone()).unwrap_or_default(),
        })
    }

    async fn reload(&self) -> Result<pb::PolicyReloadResponse, ControlError> {
        let (reloader, core) = (self.reloader.clone(), self.core.clone());
        let reloaded = blocking(move || {
            let reloaded = reloader.reload("control")?;
            core.adopt_running();
            Ok::<_, String>(reloaded)
        })
        .await?
        .map_err(ControlError::Invalid)?;
        Ok(pb::PolicyReloadResponse { state: Some(self.policy_state()), changed: reloaded.changed })
    }

    async fn set_mode(&self, server: &str, mode: pb::Mode) -> Result<pb::Mode, ControlError> {
        let policy =
            self.core.in_force().ok_or_else(|| ControlError::Unavailable("no policy is in force".into()))?;
        if policy.compiled().server(server).is_none() {
            return Err(unknown_server(server, policy.compiled()));
        }
        let (reloader, server) = (self.reloader.clone(), server.to_owned());
        blocking(move || reloader.set_mode(&server, mode)).await?.map_err(ControlError::Invalid)
    }

    async fn launch(
        &self,
        caller: &Peer,
        server: &str,
        argv: &[String],
    ) -> Result<pb::LaunchResponse, ControlError> {
        let policy =
            self.core.in_force().ok_or_else(|| ControlError::Unavailable("no policy is in force".into()))?;
        let Some((id, _)) = policy.compiled().server(server) else {
            return Err(unknown_server(server, policy.compiled()));
        };
        let (core, caller, argv, server) =
            (self.core.clone(), caller.clone(), argv.to_vec(), server.to_owned());
        blocking(move || launch(&core, &caller, id, &server, argv)).await?
    }
}

/// Labels the caller. It is a launcher until its next exec decides: npx and
/// uvx stay one, anything else becomes the server.
fn launch(
    core: &Core,
    caller: &Peer,
    id: u16,
    server: &str,
    argv: Vec<String>,
) -> Result<pb::LaunchResponse, ControlError> {
    let label = Label::new(id, ROLE_LAUNCHER, core.number());
    let missed = {
        let mut maps = lock(&core.maps);
        // The caller is `mcp-sensor exec`, and where it execs is its server's home.
        add_instance(&mut maps, label, 0, 1, None);
        maps.tasks.set(caller.pid, Shared(label), 0).map_err(|_| {
            ControlError::Exhausted(format!(
                "process {} is beyond the label map; start the sensor with a larger --label-capacity",
                caller.pid
            ))
        })?;
        let missed = adopt::sockets(&mut maps, caller.pid, label);
        if !caller.is_alive() {
            let _ = maps.tasks.set(caller.pid, Shared(Label::NONE), 0);
            let _ = maps.instances.remove(&label.instance());
            return Err(ControlError::Refused("the caller ended before it was labelled".into()));
        }
        missed
    };
    core.unlabelled_sockets(missed);
    let parent = process::stat(caller.pid).map_or(0, |s| s.ppid);
    let exe = process::exe(caller.pid);
    core.begin(now(), label, caller.pid, caller.uid, parent, &exe, argv, "launch".to_owned(), 0, false);
    let (mode, profile) = core.mode_and_profile(&lock(&core.policies), id);
    let mut response = pb::LaunchResponse {
        instance: super::instances::instance_id(server, label.instance()),
        profile,
        ..Default::default()
    };
    response.set_mode(mode);
    Ok(response)
}

fn unknown_server(name: &str, compiled: &crate::policy::Compiled) -> ControlError {
    let known: Vec<&str> = compiled.servers.iter().map(|(_, n, _)| n.as_str()).collect();
    ControlError::NotFound(format!("no server `{name}` in the policy; there are: {}", known.join(", ")))
}

async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> Result<T, ControlError> {
    tokio::task::spawn_blocking(f).await.map_err(|e| ControlError::Internal(e.to_string()))
}
