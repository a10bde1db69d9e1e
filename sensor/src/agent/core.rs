//! What the parts of the agent share: maps, policies, instances, the bus.

mod lifecycle;

use super::adopt;
use super::canary::{self, Proof};
use super::identity::Identities;
use super::instances::Instances;
use super::names::Names;
use super::process;
use super::program::{self};
use super::reset::Resets;
use super::state::{InForce, Policies};
use super::stdio::{Command, Stdio};
use super::translate::{self, Context};
use crate::event::{Body, Bus, now, pb};
use crate::kernel::maps::{Labels, LearnedNames, Maps, Shared};
use crate::kernel::record::Record;
use crate::kernel::tables;
use crate::mcp::inventory::Inventory;
use crate::policy::explain::name_line;
use crate::policy::recognise::Recogniser;
use sensor_common::addr::Addr;
use sensor_common::identity::FileId;
use sensor_common::kernel::INSTANCE_BY_AGENT;
use sensor_common::label::Label;
use sensor_common::policy::{MODE_ENFORCE, Reason, SERVER_CANARY, SERVER_UNKNOWN};
use sensor_common::record::{INSTANCE_HASHED, NameVerdict, Verdict, VerdictKey};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long facts about a process outside the server's tree are waited for.
pub const PATIENCE: Duration = Duration::from_millis(100);

pub struct Core {
    pub bus: Arc<Bus>,
    pub maps: Mutex<Maps>,
    pub labels: Labels,
    pub names: Names,
    pub resets: Resets,
    pub policies: Mutex<Policies>,
    pub instances: Mutex<Instances>,
    pub identities: Identities,
    pub stdio: Stdio,
    /// Servers that nobody declared and that were told of: program and client.
    pub told: Mutex<VecDeque<(String, u32)>>,
    pub inventory: Mutex<Inventory>,
    /// Losses since the start, for `status`.
    pub losses: Mutex<BTreeMap<(String, String), u64>>,
    pub proof: Mutex<Proof>,
    /// When the rings were looked at last, CLOCK_BOOTTIME.
    pub turned: AtomicI64,
    next_instance: AtomicU32,
}

/// A poisoned lock only means that a thread panicked between two stores of
/// values that stand on their own.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    #[allow(clippy::too_many_arguments, reason = "everything that the parts share")]
    pub fn new(
        bus: Arc<Bus>,
        maps: Maps,
        labels: Labels,
        names: LearnedNames,
        resets: Resets,
        identities: Identities,
        stdio: Stdio,
        inventory: Inventory,
    ) -> Core {
        // Numbers of this run do not meet those an earlier agent gave out.
        let seed = (now() / 1_000_000_000) as u32 & 0x00ff_ffff;
        Core {
            bus,
            maps: Mutex::new(maps),
            labels,
            names: Names::new(names),
            resets,
            policies: Mutex::default(),
            instances: Mutex::default(),
            identities,
            stdio,
            told: Mutex::default(),
            inventory: Mutex::new(inventory),
            losses: Mutex::default(),
            proof: Mutex::default(),
            turned: AtomicI64::new(0),
            next_instance: AtomicU32::new(INSTANCE_BY_AGENT | seed << 4),
        }
    }

    pub fn number(&self) -> u32 {
        self.next_instance.fetch_add(1, Ordering::Relaxed) | INSTANCE_BY_AGENT
    }

    pub fn lose(&self, place: &str, reason: &str, count: u64) {
        *lock(&self.losses).entry((place.to_owned(), reason.to_owned())).or_default() += count;
        self.bus.publish_now(Body::Loss(pb::Loss {
            r#where: place.to_owned(),
            reason: reason.to_owned(),
            count,
            ..Default::default()
        }));
    }

    /// One record of a ring; `time` is its own, UTC.
    pub fn record(&self, time: i64, record: &Record) {
        if canary::is_canary(record.label()) {
            return;
        }
        match record {
            Record::Verdict(r) => {
                let body = self.verdict(r);
                self.bus.publish(time, body);
            }
            Record::Name(r) => {
                self.resets.denied(r);
                let body = self.name(r);
                self.bus.publish(time, body);
            }
            Record::Unix(r) => {
                let policies = lock(&self.policies);
                let mut instances = lock(&self.instances);
                let context = Context { policies: &policies, instances: &instances };
                let body = context.unix(r);
                instances.count(r.header.label.instance(), translate::verdict(r.verdict), 1);
                drop((policies, instances));
                self.bus.publish(time, body);
            }
            Record::Exec(r) => self.exec(time, r),
            Record::Exit(r) => self.ended(time, r.header.label),
            Record::Released(r) => {
                let policies = lock(&self.policies);
                let instances = lock(&self.instances);
                let mut ended = Context { policies: &policies, instances: &instances }.released(r, time);
                drop((policies, instances));
                if ended.direction() == pb::Direction::Egress
                    && let Some(dst) = &mut ended.dst
                {
                    let server = r.header.label.server();
                    dst.name = self
                        .names
                        .of(server, r.netns, r.traffic.remote.addr, r.header.boottime)
                        .unwrap_or_default();
                }
                self.bus.publish(time, Body::ConnectionEnd(ended));
                self.stdio.tell(Command::Closed(r.cookie));
            }
            Record::Candidate(r) => self.stdio.tell(Command::Started(Box::new(*r))),
        }
    }

    fn verdict(&self, r: &Verdict) -> Body {
        let policies = lock(&self.policies);
        let mut instances = lock(&self.instances);
        let mut body = Context { policies: &policies, instances: &instances }.verdict(r);
        instances.count(r.key.instance, translate::verdict(r.key.verdict), 1);
        drop((policies, instances));
        self.add_name(&mut body, &r.key, r.header.boottime);
        body
    }

    fn name(&self, r: &NameVerdict) -> Body {
        let policies = lock(&self.policies);
        let mut instances = lock(&self.instances);
        let mut body = Context { policies: &policies, instances: &instances }.name(r);
        instances.count(r.key.instance, translate::verdict(r.key.verdict), 1);
        drop((policies, instances));
        self.add_name(&mut body, &r.key, r.header.boottime);
        body
    }

    /// The name that the server learned a destination by.
    fn add_name(&self, body: &mut Body, key: &VerdictKey, at: u64) {
        if let Body::Connection(c) = body
            && c.direction() == pb::Direction::Egress
            && let Some(dst) = &mut c.dst
        {
            let netns = c.actor.as_ref().map_or(0, |a| a.netns);
            let Some(name) = self.names.of(key.server, netns, Addr(key.addr), at) else { return };
            if let Some(decision) = &mut c.decision
                && matches!(
                    Reason::from_code(key.reason),
                    Some(Reason::NoRule | Reason::ProfileNone | Reason::NameExpired)
                )
                && let Some(line) = name_line(&name, key.port, key.protocol)
            {
                // A rule for the name outlives the address.
                decision.suggestion = line;
            }
            dst.name = name;
        }
    }

    /// More of a denial that is known.
    pub fn repeat(&self, key: &VerdictKey, count: u64) {
        if key.server == SERVER_CANARY {
            return;
        }
        let policies = lock(&self.policies);
        let mut instances = lock(&self.instances);
        let mut r = Verdict { key: *key, ..Default::default() };
        r.header.label = Label::new(key.server, 0, key.instance);
        r.header.generation = policies.current().map_or(0, |p| p.generation);
        if let Some(i) = instances.get(key.instance) {
            (r.header.tgid, r.header.uid) = (i.actor.pid, i.actor.uid);
        }
        let mut body = Context { policies: &policies, instances: &instances }.verdict(&r);
        instances.count(key.instance, translate::verdict(key.verdict), count);
        drop((policies, instances));
        self.add_name(&mut body, key, 0);
        let decision = match &mut body {
            Body::Connection(c) => c.decision.as_mut(),
            Body::Dns(d) => d.decision.as_mut(),
            Body::Socket(s) => s.decision.as_mut(),
            _ => None,
        };
        if let Some(decision) = decision {
            decision.count = count;
            decision.repeat = true;
        }
        self.bus.publish_now(body);
    }

    /// Mode and profile in force for a server.
    pub fn mode_and_profile(&self, policies: &Policies, id: u16) -> (pb::Mode, String) {
        let Some(policy) = policies.current() else { return (pb::Mode::Unspecified, String::new()) };
        let maps = lock(&self.maps);
        let Some(server) = tables::server(&maps, policy.generation, id) else {
            return (pb::Mode::Unspecified, String::new());
        };
        let profile = policy.compiled().profile_names.get(usize::from(server.profile)).cloned();
        let mode = if server.mode == MODE_ENFORCE { pb::Mode::Enforce } else { pb::Mode::Audit };
        (mode, profile.unwrap_or_default())
    }

    pub fn mode(&self, server: u16) -> pb::Mode {
        let policies = lock(&self.policies);
        self.mode_and_profile(&policies, server).0
    }

    /// Labels what runs already. Returns how many instances were found.
    pub fn adopt_running(&self) -> usize {
        let Some(policy) = lock(&self.policies).current().cloned() else { return 0 };
        let (found, unmarked, missed) = {
            let mut maps = lock(&self.maps);
            let recogniser = Recogniser::new(policy.compiled());
            let (found, unmarked) = adopt::processes(&mut maps, &recogniser, || self.number());
            let labelled = adopt::labelled(&maps);
            for f in &found {
                let tasks = labelled.iter().filter(|(_, l)| l.instance() == f.label.instance()).count();
                // It may have made the namespace it is in: not known is never trusted.
                let netns = match adopt::home_netns(f.pid) {
                    0 => u64::MAX,
                    cookie => cookie,
                };
                let hashed = policy.compiled().matchers.get(f.matched as usize).is_some_and(|m| m.hashed);
                let file = hashed.then(|| self.identities.of_process(f.pid).unwrap_or_default());
                add_instance(&mut maps, f.label, netns, tasks as u64, file);
            }
            let missed = labelled.iter().map(|(pid, label)| adopt::sockets(&mut maps, *pid, *label)).sum();
            (found, unmarked, missed)
        };
        self.unlabelled_sockets(missed);
        if unmarked > 0 {
            self.lose("agent", "label_overflow", unmarked);
        }
        let count = found.len();
        for f in found {
            let parent = process::stat(f.pid).map_or(0, |s| s.ppid);
            let uid = process::uid(f.pid);
            let argv = process::arguments(&f.argv);
            self.begin(now(), f.label, f.pid, uid, parent, &f.exe, argv, policy.evidence(f.matched), 0, true);
            if policy.compiled().matchers.get(f.matched as usize).is_some_and(|m| m.hashed) {
                self.verify_later(f.label, f.pid, &f.exe);
            }
        }
        count
    }

    /// Waits for the record that begins an instance, which another thread reads.
    pub fn await_instance(&self, number: u32) {
        const PASSES: u32 = 200;
        for _ in 0..PASSES {
            if lock(&self.instances).knows(number) {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn has_instance(&self, number: u32) -> bool {
        lock(&self.instances).get(number).is_some()
    }

    /// Who did something; `uid` `u32::MAX`: the instance's own user.
    pub fn actor(&self, label: Label, pid: u32, uid: u32) -> pb::Actor {
        let policies = lock(&self.policies);
        let instances = lock(&self.instances);
        let uid = match instances.get(label.instance()) {
            Some(instance) if uid == u32::MAX => instance.actor.uid,
            _ => uid,
        };
        instances.actor(label, policies.server_name(label.server()), pid, uid, String::new())
    }

    /// Instances that an earlier agent knew, from the labels it left.
    pub fn recover(&self) {
        let labelled = adopt::labelled(&lock(&self.maps));
        self.recount(&labelled);
        let mut first: BTreeMap<u32, (u32, Label)> = BTreeMap::new();
        for (pid, label) in labelled {
            let start = process::stat(pid).map_or(u64::MAX, |s| s.start_time);
            let entry = first.entry(label.instance()).or_insert((pid, label));
            if process::stat(entry.0).is_none_or(|s| s.start_time > start) {
                *entry = (pid, label);
            }
        }
        for (pid, label) in first.into_values() {
            let parent = process::stat(pid).map_or(0, |s| s.ppid);
            let argv = process::within(PATIENCE, move || process::arguments(&process::cmdline(pid)))
                .unwrap_or_default();
            let exe = process::exe(pid);
            self.begin(now(), label, pid, process::uid(pid), parent, &exe, argv, "label".to_owned(), 0, true);
            let noted = tables::instance(&lock(&self.maps), label.instance());
            if noted.is_some_and(|i| i.flags & INSTANCE_HASHED != 0) {
                self.verify_later(label, pid, &exe);
            }
        }
    }

    /// While two agents' programs were attached, forks counted twice.
    fn recount(&self, labelled: &[(u32, Label)]) {
        let mut maps = lock(&self.maps);
        let known: Vec<(u32, sensor_common::record::Instance)> =
            maps.instances.iter().flatten().map(|(n, i)| (n, i.0)).collect();
        for (number, mut instance) in known {
            instance.tasks = labelled.iter().filter(|(_, l)| l.instance() == number).count() as u64;
            let _ = match instance.tasks {
                0 => maps.instances.remove(&number),
                _ => maps.instances.insert(number, Shared(instance), 0),
            };
        }
    }

    /// Since the start.
    pub fn lost(&self) -> Vec<pb::Loss> {
        let losses = lock(&self.losses);
        let loss = |((place, reason), count): (&(String, String), &u64)| pb::Loss {
            r#where: place.clone(),
            reason: reason.clone(),
            count: *count,
            ..Default::default()
        };
        losses.iter().map(loss).collect()
    }

    /// How many declared servers are in enforce, and in audit, as it is now.
    pub fn modes(&self) -> (u32, u32) {
        let policies = lock(&self.policies);
        let Some(policy) = policies.current() else { return (0, 0) };
        let maps = lock(&self.maps);
        let declared = policy.compiled().servers.iter().filter(|(id, ..)| *id != SERVER_UNKNOWN);
        let (mut enforced, mut audited) = (0, 0);
        for (id, ..) in declared {
            match tables::server(&maps, policy.generation, *id) {
                Some(server) if server.mode == MODE_ENFORCE => enforced += 1,
                _ => audited += 1,
            }
        }
        (enforced, audited)
    }

    pub fn in_force(&self) -> Option<Arc<InForce>> {
        lock(&self.policies).current().cloned()
    }
}

/// The kernel's entry of an instance that the agent found or launches. `netns`
/// 0: filled in at its next exec. `file`: what it runs, if a rule with a hash
/// recognised it.
pub fn add_instance(maps: &mut Maps, label: Label, netns: u64, tasks: u64, file: Option<FileId>) {
    let flags = if file.is_some() { INSTANCE_HASHED } else { 0 };
    let file = file.unwrap_or_default();
    let value = sensor_common::record::Instance { netns, tasks, flags, file, ..Default::default() };
    let _ = maps.instances.insert(label.instance(), Shared(value), 0);
}

pub fn program_name(exe: &str, argv: &[String]) -> String {
    let (owned_exe, owned_argv) = (exe.to_owned(), argv.to_vec());
    process::within(PATIENCE, move || program::name(&owned_exe, &owned_argv, program::link))
        .unwrap_or_else(|| program::name(exe, argv, |_| None))
}

fn user_name(uid: u32) -> String {
    nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid))
        .ok()
        .flatten()
        .map(|u| u.name)
        .unwrap_or_default()
}

/// A policy with what the agent derives from it.
pub fn in_force(loaded: crate::policy::load::Loaded, generation: u32, hash: String) -> InForce {
    InForce { loaded, generation, hash, loaded_unix_ns: now() }
}
