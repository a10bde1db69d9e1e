//! How instances come and go: execs, programs that were moved or ran before,
//! their sockets, the client that started them, their end.

use super::{Core, PATIENCE, lock, program_name, user_name};
use crate::agent::instances::{Instance, instance_id};
use crate::agent::state::InForce;
use crate::agent::stdio::Command;
use crate::agent::{adopt, discovery, process};
use crate::event::{Body, pb};
use crate::kernel::{record, tables};
use crate::policy::Compiled;
use sensor_common::identity::FileId;
use sensor_common::label::Label;
use sensor_common::record::{EXEC_MOVED, EXEC_NEW_INSTANCE, EXEC_ROLE_CHANGED, EXEC_UNVERIFIED, Exec};
use sensor_common::socket::Tuple;
use std::collections::HashSet;

/// Behind what an instance was recognised by, where its file is not verified.
const UNVERIFIED: &str = " (not verified)";

impl Core {
    pub(super) fn exec(&self, time: i64, r: &Exec) {
        let label = r.header.label;
        if r.flags & EXEC_MOVED != 0 {
            self.moved(time, r);
            return;
        }
        let exe = record::exe_path(r);
        let (argv, argv_truncated) = record::argv(r);
        if r.flags & EXEC_NEW_INSTANCE != 0 {
            let mut evidence = self.in_force().map(|p| p.evidence(r.matched)).unwrap_or_default();
            if r.flags & EXEC_UNVERIFIED != 0 {
                evidence.push_str(UNVERIFIED);
                self.verify_later(label, r.header.tgid, &exe);
            }
            self.begin(
                time,
                label,
                r.header.tgid,
                r.header.uid,
                r.parent,
                &exe,
                argv.clone(),
                evidence,
                r.netns,
                false,
            );
            // What it inherited; the kernel notes the same sockets, so that
            // nothing is open meanwhile.
            self.label_sockets(r.header.tgid, label);
        }
        let policies = lock(&self.policies);
        let mut instances = lock(&self.instances);
        instances.note_exe(label.instance(), r.header.tgid, exe);
        let server = policies.server_name(label.server());
        let actor = instances.actor(label, server, r.header.tgid, r.header.uid, record::text(&r.comm));
        drop((policies, instances));
        self.bus.publish(
            time,
            Body::Exec(pb::Exec {
                actor: Some(actor),
                parent_pid: r.parent,
                argv,
                argv_truncated,
                role_changed: r.flags & EXEC_ROLE_CHANGED != 0,
                new_instance: r.flags & EXEC_NEW_INSTANCE != 0,
            }),
        );
    }

    pub(super) fn verify_later(&self, label: Label, pid: u32, exe: &str) {
        if !self.identities.look_at(label, pid, exe) {
            self.lose("agent", "identity_queue", 1);
        }
    }

    /// A file was hashed: the kernel takes it for verified, for those servers of
    /// the policy in force that have a rule with that hash.
    pub fn admit(
        &self,
        file: FileId,
        servers: impl FnOnce(&Compiled) -> HashSet<u16>,
        evicted: Option<FileId>,
    ) {
        let Some(policy) = self.in_force() else { return };
        let mut maps = lock(&self.maps);
        if let Some(evicted) = evicted {
            for rule in &policy.compiled().hashes {
                tables::forget_file(&mut maps, policy.generation, evicted, rule.server);
            }
        }
        let missed = servers(policy.compiled())
            .into_iter()
            .filter(|server| tables::verify(&mut maps, policy.generation, file, *server).is_err())
            .count();
        drop(maps);
        if missed > 0 {
            self.lose("agent", "identities_full", missed as u64);
        }
    }

    /// What was hashed while a policy was being switched to.
    pub fn admit_known(&self, policy: &InForce) {
        let verified = self.identities.verified(policy.compiled());
        let mut maps = lock(&self.maps);
        for (file, server) in verified {
            let _ = tables::verify(&mut maps, policy.generation, file, server);
        }
    }

    /// A running process came into a cgroup that the policy names; its children
    /// are labelled as they fork, those it had before are found.
    fn moved(&self, time: i64, r: &Exec) {
        let (label, pid) = (r.header.label, r.header.tgid);
        let parent = process::stat(pid).map_or(0, |s| s.ppid);
        let argv =
            process::within(PATIENCE, move || process::arguments(&process::cmdline(pid))).unwrap_or_default();
        let evidence = self.in_force().map(|p| p.evidence(r.matched)).unwrap_or_default();
        self.begin(
            time,
            label,
            pid,
            process::uid(pid),
            parent,
            &process::exe(pid),
            argv,
            evidence,
            r.netns,
            true,
        );
        self.label_sockets(pid, label);
    }

    /// Labels a process's sockets. Those that cannot be are losses.
    fn label_sockets(&self, pid: u32, label: Label) {
        let missed = adopt::sockets(&mut lock(&self.maps), pid, label);
        self.unlabelled_sockets(missed);
    }

    pub fn unlabelled_sockets(&self, missed: u64) {
        if missed > 0 {
            self.lose("agent", "socket_label", missed);
        }
    }

    /// Sockets that came to labelled processes unseen: passed to them, or out
    /// of an accept queue that is older than the label.
    pub fn adopt_sockets(&self, queued: &mut HashSet<Tuple>) {
        adopt::forget_queued(&mut lock(&self.maps), queued);
        let labelled = adopt::labelled(&lock(&self.maps));
        for (pid, label) in labelled {
            self.label_sockets(pid, label);
        }
    }

    /// Notes a new instance and says so.
    #[allow(clippy::too_many_arguments, reason = "the facts of one instance")]
    pub fn begin(
        &self,
        time: i64,
        label: Label,
        pid: u32,
        uid: u32,
        parent: u32,
        exe: &str,
        argv: Vec<String>,
        evidence: String,
        netns: u64,
        adopted: bool,
    ) {
        let client = self.client(parent, label);
        let place = process::place(pid);
        let user = process::within(PATIENCE, move || user_name(uid)).unwrap_or_default();
        let policies = lock(&self.policies);
        let server = policies.server_name(label.server()).to_owned();
        let id = if discovery::is_unknown(label) {
            instance_id(&program_name(exe, &argv), label.instance())
        } else {
            instance_id(&server, label.instance())
        };
        let mut actor = pb::Actor {
            server: server.clone(),
            instance: id.clone(),
            pid,
            uid,
            user,
            login_uid: process::login_uid(pid),
            exe: exe.to_owned(),
            client,
            unit: place.unit,
            container: place.container,
            netns,
            ..Default::default()
        };
        if label.is_launcher() {
            actor.set_role(pb::Role::Launcher);
        } else {
            actor.set_role(pb::Role::Server);
        }
        let (mode, profile) = self.mode_and_profile(&policies, label.server());
        drop(policies);
        let finding_instance = id.clone();
        lock(&self.instances).insert(
            label.instance(),
            Instance {
                id,
                server: label.server(),
                actor: actor.clone(),
                argv: argv.clone(),
                evidence: evidence.clone(),
                started_unix_ns: time,
                counts: Default::default(),
            },
        );
        self.stdio.tell(Command::Began(label.instance()));
        let mut started = pb::InstanceStarted {
            actor: Some(actor),
            argv,
            evidence,
            adopted,
            profile,
            ..Default::default()
        };
        started.set_mode(mode);
        self.bus.publish(time, Body::InstanceStarted(started));
        if process::has_net_raw(pid) {
            let mut finding = pb::Finding {
                kind: "bypassable".to_owned(),
                server,
                instance: finding_instance,
                detail:
                    "it holds CAP_NET_RAW: packet sockets pass every cgroup hook; run it as an ordinary user"
                        .to_owned(),
                ..Default::default()
            };
            finding.set_severity(pb::Severity::Medium);
            self.bus.publish_now(Body::Finding(finding));
        }
    }

    /// The nearest ancestor outside the server's tree.
    fn client(&self, parent: u32, label: Label) -> Option<pb::Client> {
        const GENERATIONS: usize = 64;
        let mut pid = parent;
        for _ in 0..GENERATIONS {
            if pid == 0 {
                return None;
            }
            let own = self
                .labels
                .of(pid)
                .is_some_and(|l| l.server() == label.server() && l.instance() == label.instance());
            if !own {
                break;
            }
            pid = process::stat(pid)?.ppid;
        }
        let exe = process::exe(pid);
        let argv =
            process::within(PATIENCE, move || process::arguments(&process::cmdline(pid))).unwrap_or_default();
        let name = process::client_name(&exe, &argv);
        (pid != 0).then_some(pb::Client { pid, exe, argv, name })
    }

    pub fn ended(&self, time: i64, label: Label) {
        let Some(instance) = lock(&self.instances).remove(label.instance()) else { return };
        self.forget_inherited(label);
        tables::release(&mut lock(&self.maps), label.instance());
        self.stdio.tell(Command::Ended(label.instance()));
        self.bus.publish(
            time,
            Body::InstanceEnded(pb::InstanceEnded {
                actor: Some(instance.actor),
                started_unix_ns: instance.started_unix_ns,
                allowed: instance.counts.allowed,
                denied: instance.counts.denied,
                would_denied: instance.counts.would_denied,
            }),
        );
    }

    /// Sockets that were noted at exec and never showed themselves.
    fn forget_inherited(&self, label: Label) {
        let mut maps = lock(&self.maps);
        if maps.counts.get(&0, 0).is_ok_and(|c| c.0.inherited == 0) {
            return;
        }
        let stale: Vec<u64> = maps
            .inherited
            .iter()
            .flatten()
            .filter(|(_, l)| l.0.instance() == label.instance())
            .map(|(cookie, _)| cookie)
            .collect();
        for cookie in stale {
            let _ = maps.inherited.remove(&cookie);
        }
    }
}
