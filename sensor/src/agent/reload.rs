//! From the policy file to the kernel, again and again. A file that is bad, or
//! gone, changes nothing.

use super::bundles::{Bundles, Refusal};
use super::core::{Core, in_force, lock};
use crate::event::{Body, pb};
use crate::kernel::tables;
use crate::policy::bundle::Bundle;
use crate::policy::compile::{Compiled, Ids, UNKNOWN};
use crate::policy::exec::ExecEntry;
use crate::policy::load::{self, LoadError, Loaded};
use crate::policy::matching::exe_key;
use sensor_common::exec::{ExecRule, FLAG_OWN, KEY_BYTES, KIND_EXE};
use sensor_common::policy::{MODE_AUDIT, MODE_ENFORCE};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use zerocopy::IntoBytes as _;

pub struct Reloader {
    core: Arc<Core>,
    path: PathBuf,
    /// Where the ids of servers are kept, for an agent that takes over labels.
    ids_file: PathBuf,
    inner: Mutex<Inner>,
}

struct Inner {
    ids: Ids,
    names: BTreeMap<String, u16>,
    /// Why the file as it is now was refused.
    error: String,
    /// `None`: no bundle is taken.
    bundles: Option<Bundles>,
    /// There was no policy file yet; only where bundles are taken.
    absent: bool,
}

/// The policy of a start, and whether the host has a file of its own.
pub fn first(path: &Path, bundles: Option<&Bundles>, ids: &mut Ids) -> Result<(Loaded, bool), LoadError> {
    let absent = bundles.is_some() && !path.exists();
    let loaded = layers(path, absent, bundles.and_then(Bundles::current), ids)?;
    Ok((loaded, absent))
}

fn layers(
    path: &Path,
    absent: bool,
    bundle: Option<Arc<Bundle>>,
    ids: &mut Ids,
) -> Result<Loaded, LoadError> {
    let own = if absent && !path.exists() { None } else { Some(load::read(path)?) };
    match bundle {
        Some(bundle) => load::combined(bundle, own.as_deref(), path, ids),
        None => load::from_bytes(own.as_deref().unwrap_or(NOTHING), path, ids),
    }
}

/// A policy that says nothing.
const NOTHING: &[u8] = b"version: 1\n";

/// What a reload did.
pub struct Reloaded {
    pub changed: bool,
}

/// The ids of servers at a start. `adopted`: an earlier agent's labels may be in
/// the kernel, and they mean what its file says. Without that file a label could
/// come to mean another server, with another profile: no start.
pub fn known_ids(ids_file: &Path, adopted: bool) -> Result<(Ids, BTreeMap<String, u16>), String> {
    let mut ids = Ids::default();
    if !adopted {
        // Before anything is pinned, so that pins without this file are an error.
        write_ids(ids_file, &BTreeMap::new()).map_err(|e| e.to_string())?;
        return Ok((ids, BTreeMap::new()));
    }
    let names = read_ids(ids_file).map_err(|e| e.to_string())?;
    match names.iter().find(|(name, id)| !ids.restore(name, **id)) {
        Some((name, id)) => Err(format!("the id {id} of server `{name}` cannot be, or stands there twice")),
        None => Ok((ids, names)),
    }
}

fn read_ids(path: &Path) -> io::Result<BTreeMap<String, u16>> {
    const LIMIT: u64 = 4 << 20;
    if fs::metadata(path)?.len() > LIMIT {
        return Err(io::Error::other("too large"));
    }
    serde_json::from_slice(&fs::read(path)?).map_err(io::Error::other)
}

impl Reloader {
    pub fn new(
        core: Arc<Core>,
        path: PathBuf,
        ids_file: PathBuf,
        ids: Ids,
        names: BTreeMap<String, u16>,
        (bundles, absent): (Option<Bundles>, bool),
    ) -> Reloader {
        let inner = Inner { ids, names, error: String::new(), bundles, absent };
        Reloader { core, path, ids_file, inner: Mutex::new(inner) }
    }

    /// `None`: no bundle is taken.
    pub fn bundle(&self) -> Option<pb::BundleState> {
        lock(&self.inner).bundles.as_ref().map(Bundles::state)
    }

    /// A bundle that the collector offers. True: it is in force now.
    pub fn offer(&self, bytes: &[u8]) -> bool {
        let mut inner = lock(&self.inner);
        let Some(mut bundles) = inner.bundles.take() else { return false };
        let taken = match bundles.admit(bytes) {
            Ok(None) => {
                bundles.settled();
                Ok(false)
            }
            Ok(Some(bundle)) => self.take(&mut inner, &mut bundles, bundle).map(|()| true),
            Err(refusal) => Err(refusal),
        };
        let taken = taken.unwrap_or_else(|refusal| {
            bundles.refuse(&self.core.bus, refusal);
            false
        });
        inner.bundles = Some(bundles);
        drop(inner);
        give_back();
        taken
    }

    fn take(&self, inner: &mut Inner, bundles: &mut Bundles, bundle: Bundle) -> Result<(), Refusal> {
        let bundle = Arc::new(bundle);
        let refusal = |kind, text: String| Refusal { kind, hash: bundle.hash.clone(), text };
        let mut loaded = layers(&self.path, inner.absent, Some(bundle.clone()), &mut inner.ids)
            .map_err(|e| refusal("policy_bundle_invalid", format!("version {}: {e}", bundle.version)))?;
        exempt_own_binary(&mut loaded);
        let staged = bundles.stage(&bundle).map_err(|e| {
            refusal("policy_bundle_not_kept", format!("it cannot be written to the disk: {e}"))
        })?;
        self.install(inner, loaded, "bundle")
            .map_err(|e| refusal("policy_bundle_invalid", format!("version {}: {e}", bundle.version)))?;
        if let Err(error) = bundles.keep(bundle.clone(), &staged) {
            tracing::error!(%error, "the policy bundle is in force, but would not outlive the sensor");
        }
        Ok(())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The policy file and those that the policy in force refers to.
    pub fn files(&self) -> BTreeSet<PathBuf> {
        let mut files = BTreeSet::from([self.path.clone()]);
        if let Some(policy) = self.core.in_force() {
            files.extend(policy.loaded.files.iter().map(PathBuf::from));
        }
        files
    }

    pub fn error(&self) -> String {
        lock(&self.inner).error.clone()
    }

    /// Puts a policy that was read already in force.
    pub fn start(&self, mut loaded: Loaded) -> Result<(), String> {
        exempt_own_binary(&mut loaded);
        let mut inner = lock(&self.inner);
        let started = self.install(&mut inner, loaded, "start");
        if let Some(bundles) = &mut inner.bundles {
            bundles.report_unkept(&self.core.bus);
        }
        give_back();
        started
    }

    /// Reads the file and, if it is good, switches to it.
    pub fn reload(&self, trigger: &str) -> Result<Reloaded, String> {
        let reloaded = self.switch(trigger);
        give_back();
        reloaded
    }

    fn switch(&self, trigger: &str) -> Result<Reloaded, String> {
        let mut inner = lock(&self.inner);
        let (absent, bundle) = (inner.absent, inner.bundles.as_ref().and_then(Bundles::current));
        let mut loaded = match layers(&self.path, absent, bundle, &mut inner.ids) {
            Ok(loaded) => {
                inner.absent = absent && !self.path.exists();
                loaded
            }
            Err(error) => {
                let text = error.to_string();
                // The watcher sees one change several times.
                if inner.error != text || trigger != "file" {
                    tracing::error!(error = %text, "the policy file is refused; the old policy stays in force");
                    self.refused(trigger, &text);
                }
                inner.error.clone_from(&text);
                return Err(text);
            }
        };
        exempt_own_binary(&mut loaded);
        let same = self.core.in_force().is_some_and(|p| p.hash == hash(&loaded));
        if same && trigger == "file" {
            inner.error.clear();
            return Ok(Reloaded { changed: false });
        }
        match self.install(&mut inner, loaded, trigger) {
            Ok(()) => Ok(Reloaded { changed: !same }),
            Err(error) => {
                inner.error.clone_from(&error);
                self.refused(trigger, &error);
                Err(error)
            }
        }
    }

    /// Writes down what the labels of this policy will mean, before any task can
    /// bear one.
    fn keep_ids(&self, inner: &mut Inner, loaded: &Loaded) -> Result<(), String> {
        let mut names = inner.names.clone();
        names.extend(loaded.compiled.servers.iter().map(|(id, name, _)| (name.clone(), *id)));
        names.remove(UNKNOWN);
        if names != inner.names {
            write_ids(&self.ids_file, &names)
                .map_err(|e| format!("{}: {e}; the old policy stays in force", self.ids_file.display()))?;
            inner.names = names;
        }
        Ok(())
    }

    fn refused(&self, trigger: &str, error: &str) {
        let current = self.core.in_force();
        self.core.bus.publish_now(Body::PolicyChange(pb::PolicyChange {
            ok: false,
            hash: current.as_ref().map(|p| p.hash.clone()).unwrap_or_default(),
            generation: current.map_or(0, |p| p.generation.into()),
            path: self.path.display().to_string(),
            error: error.to_owned(),
            trigger: trigger.to_owned(),
            ..Default::default()
        }));
    }

    fn install(&self, inner: &mut Inner, loaded: Loaded, trigger: &str) -> Result<(), String> {
        let hash = hash(&loaded);
        let warnings: Vec<String> =
            loaded.warnings.iter().map(|w| w.line(&self.path.display().to_string())).collect();
        self.keep_ids(inner, &loaded)?;
        self.core.identities.survey(&loaded.compiled);
        let before = tables::generation(&lock(&self.core.maps));
        let generation = tables::next_generation(before);
        let policy = Arc::new(in_force(loaded, generation, hash.clone()));
        lock(&self.core.policies).announce(policy.clone());
        {
            let mut maps = lock(&self.core.maps);
            let verified = self.core.identities.verified(policy.compiled());
            let installed = verified
                .into_iter()
                .try_for_each(|(file, server)| tables::verify(&mut maps, generation, file, server))
                .and_then(|()| tables::install(&mut maps, generation, policy.compiled()));
            if let Err(error) = installed {
                tables::sweep(&mut maps, before);
                drop(maps);
                lock(&self.core.policies).withdraw();
                return Err(error.to_string());
            }
        }
        lock(&self.core.policies).push(policy.clone());
        self.core.admit_known(&policy);
        inner.error.clear();
        tracing::info!(generation, %hash, trigger, servers = policy.compiled().servers.len(), "policy in force");
        self.core.bus.publish_now(Body::PolicyChange(pb::PolicyChange {
            ok: true,
            hash,
            generation: generation.into(),
            path: self.path.display().to_string(),
            trigger: trigger.to_owned(),
            warnings,
            bundle_version: policy.loaded.bundle.as_ref().map_or(0, |b| b.version),
            ..Default::default()
        }));
        // Programs that began under the old generation have ended long before.
        std::thread::sleep(Duration::from_millis(20));
        tables::sweep(&mut lock(&self.core.maps), generation);
        Ok(())
    }

    /// Switches one server until the next policy. Returns the mode before.
    pub fn set_mode(&self, name: &str, mode: pb::Mode) -> Result<pb::Mode, String> {
        let _serial = lock(&self.inner);
        let policy = self.core.in_force().ok_or("no policy is in force")?;
        let (id, _) =
            policy.compiled().server(name).ok_or_else(|| format!("no server `{name}` in the policy"))?;
        if mode == pb::Mode::Enforce && unresolved(policy.compiled(), name) {
            return Err(format!(
                "`{name}` cannot be enforced: its profile allows host names, and no resolver is known to ask for \
                 them; write `resolvers: [ADDRESS, …]` into the policy, or leave it in audit"
            ));
        }
        let mut maps = lock(&self.core.maps);
        let before =
            tables::server(&maps, policy.generation, id).ok_or("the server has no entry in the kernel")?;
        let code = if mode == pb::Mode::Enforce { MODE_ENFORCE } else { MODE_AUDIT };
        tables::set_mode(&mut maps, policy.generation, id, code).map_err(|e| e.to_string())?;
        drop(maps);
        let mut change = pb::PolicyChange {
            ok: true,
            hash: policy.hash.clone(),
            generation: policy.generation.into(),
            path: self.path.display().to_string(),
            trigger: "control".to_owned(),
            server: name.to_owned(),
            ..Default::default()
        };
        change.set_mode(mode);
        self.core.bus.publish_now(Body::PolicyChange(change));
        Ok(if before.mode == MODE_ENFORCE { pb::Mode::Enforce } else { pb::Mode::Audit })
    }
}

/// A large policy that was read leaves large holes behind, also one that is not
/// switched to.
fn give_back() {
    // SAFETY: no preconditions.
    unsafe { libc::malloc_trim(0) };
}

/// `mcp-sensor exec -- CMD` has CMD's arguments, and is not CMD.
fn exempt_own_binary(loaded: &mut Loaded) {
    let Ok(own) = std::env::current_exe() else { return };
    let text = exe_key(&own.to_string_lossy());
    let rule = ExecRule { server: 0, flags: FLAG_OWN, exe: 0, priority: u32::MAX };
    match loaded.compiled.exec.iter_mut().find(|e| e.kind == KIND_EXE && e.text == text) {
        Some(entry) => entry.rule = rule,
        None if text.len() <= KEY_BYTES => {
            loaded.compiled.exec.push(ExecEntry { kind: KIND_EXE, text, rule });
        }
        None => {}
    }
}

/// Whether a server may reach host names and none can be asked for.
fn unresolved(compiled: &Compiled, server: &str) -> bool {
    compiled.server(server).is_some_and(|(_, s)| {
        [s.profile, s.launcher_profile].iter().any(|profile| compiled.unresolved.contains(profile))
    })
}

/// Over everything that the policy was made of: its text and what it compiled
/// to, since files it refers to and launchers of the host are part of it.
fn hash(loaded: &Loaded) -> String {
    let mut hash = Sha256::new();
    hash.update(loaded.source.as_bytes());
    if let Some(bundle) = &loaded.bundle {
        hash.update(bundle.hash.as_bytes());
    }
    let compiled = &loaded.compiled;
    for profile in &compiled.profiles {
        hash.update(profile.as_bytes());
    }
    for c in &compiled.cidrs {
        hash.update(c.addr.as_bytes());
        hash.update([c.direction, c.bits as u8]);
        hash.update(c.port_set.to_ne_bytes());
    }
    for set in &compiled.port_sets {
        hash.update(set.as_bytes());
    }
    for entry in &compiled.names {
        hash.update(entry.profile.to_ne_bytes());
        hash.update(&entry.text);
        hash.update(entry.rule.as_bytes());
    }
    for entry in &compiled.exec {
        hash.update([entry.kind]);
        hash.update(&entry.text);
    }
    hex::encode(hash.finalize())
}

fn write_ids(path: &Path, names: &BTreeMap<String, u16>) -> io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let new = path.with_extension("new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&serde_json::to_vec(names).map_err(io::Error::other)?)?;
    file.sync_all()?;
    fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_in_the_kernel_without_their_names_are_no_start() {
        let dir = tempfile::tempdir().expect("dir");
        let file = dir.path().join("servers.json");
        assert!(known_ids(&file, true).is_err(), "nothing says what the labels mean");
        known_ids(&file, false).expect("a first start");
        known_ids(&file, true).expect("a start after a crash before the first policy");
        write_ids(&file, &BTreeMap::from([("a".into(), 2), ("b".into(), 3)])).expect("write");
        let (ids, names) = known_ids(&file, true).expect("a start after a crash");
        assert_eq!((ids.get("a"), ids.get("b"), names.len()), (Some(2), Some(3), 2));
        for bad in ["", "{", "{\"a\":2,\"b\":2}", "{\"a\":0}", "{\"a\":70000}"] {
            fs::write(&file, bad).expect("write");
            assert!(known_ids(&file, true).is_err(), "{bad}");
        }
    }
}
