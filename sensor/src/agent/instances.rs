//! The instances that run, what is known of each, and their verdict counts.
//! Sans-IO: records go in, facts come out.

use crate::event::pb;
use sensor_common::label::{Label, ROLE_LAUNCHER};
use std::collections::{HashMap, VecDeque};

/// As many as the kernel's own table holds.
pub const MAX_INSTANCES: usize = 16_384;
/// Instances that ended and are remembered.
const MAX_ENDED: usize = 1024;
/// Processes whose executable is remembered.
const MAX_PROCESSES: usize = 65_536;

#[derive(Clone, Debug, Default)]
pub struct Counts {
    pub allowed: u64,
    pub denied: u64,
    pub would_denied: u64,
}

impl Counts {
    pub fn add(&mut self, verdict: pb::Verdict, count: u64) {
        match verdict {
            pb::Verdict::Allow => self.allowed += count,
            pb::Verdict::Deny => self.denied += count,
            pb::Verdict::WouldDeny => self.would_denied += count,
            pb::Verdict::Unspecified => {}
        }
    }
}

#[derive(Clone, Debug)]
pub struct Instance {
    pub id: String,
    pub server: u16,
    /// The first process.
    pub actor: pb::Actor,
    pub argv: Vec<String>,
    pub evidence: String,
    pub started_unix_ns: i64,
    pub counts: Counts,
}

#[derive(Default)]
pub struct Instances {
    by_number: HashMap<u32, Instance>,
    /// Those that ended last: what they said may be read later.
    ended: VecDeque<(u32, pb::Actor)>,
    exes: HashMap<u32, (u32, String)>,
    /// Instances that found no place.
    pub dropped: u64,
}

/// The text of an instance: the server's name and a number of this host boot.
pub fn instance_id(server: &str, number: u32) -> String {
    use sensor_common::kernel::INSTANCE_BY_AGENT;
    if number & INSTANCE_BY_AGENT != 0 {
        format!("{server}.a{}", number & !INSTANCE_BY_AGENT)
    } else {
        format!("{server}.{number}")
    }
}

impl Instances {
    pub fn insert(&mut self, number: u32, instance: Instance) {
        if self.by_number.len() >= MAX_INSTANCES && !self.by_number.contains_key(&number) {
            self.dropped += 1;
            return;
        }
        self.by_number.insert(number, instance);
    }

    pub fn get(&self, number: u32) -> Option<&Instance> {
        self.by_number.get(&number)
    }

    pub fn remove(&mut self, number: u32) -> Option<Instance> {
        self.exes.retain(|_, (instance, _)| *instance != number);
        let instance = self.by_number.remove(&number)?;
        if self.ended.len() >= MAX_ENDED {
            self.ended.pop_front();
        }
        self.ended.push_back((number, instance.actor.clone()));
        Some(instance)
    }

    /// It runs, or has just ended.
    pub fn knows(&self, number: u32) -> bool {
        self.by_number.contains_key(&number) || self.ended(number).is_some()
    }

    fn ended(&self, number: u32) -> Option<&pb::Actor> {
        self.ended.iter().rev().find(|(n, _)| *n == number).map(|(_, actor)| actor)
    }

    pub fn len(&self) -> usize {
        self.by_number.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_number.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&u32, &Instance)> {
        self.by_number.iter()
    }

    pub fn count(&mut self, number: u32, verdict: pb::Verdict, count: u64) {
        if let Some(instance) = self.by_number.get_mut(&number) {
            instance.counts.add(verdict, count);
        }
    }

    /// The program that a process of an instance runs now.
    pub fn note_exe(&mut self, number: u32, tgid: u32, exe: String) {
        if self.exes.len() >= MAX_PROCESSES {
            self.exes.clear(); // only a cache of names
        }
        self.exes.insert(tgid, (number, exe));
    }

    /// Who did it: the instance's facts with those of the process at hand.
    pub fn actor(&self, label: Label, server: &str, tgid: u32, uid: u32, comm: String) -> pb::Actor {
        let number = label.instance();
        let mut actor = match self.by_number.get(&number) {
            Some(instance) => instance.actor.clone(),
            None if let Some(actor) = self.ended(number) => actor.clone(),
            None => pb::Actor { instance: instance_id(server, number), ..Default::default() },
        };
        server.clone_into(&mut actor.server);
        actor.set_role(if label.role() == ROLE_LAUNCHER { pb::Role::Launcher } else { pb::Role::Server });
        if let Some((_, exe)) = self.exes.get(&tgid).filter(|(n, _)| *n == number) {
            exe.clone_into(&mut actor.exe);
        }
        actor.pid = tgid;
        if uid != actor.uid {
            actor.uid = uid;
            actor.user = String::new();
        }
        if !comm.is_empty() {
            actor.comm = comm;
        }
        actor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(server: &str) -> Instance {
        Instance {
            id: instance_id(server, 3),
            server: 2,
            actor: pb::Actor {
                server: server.into(),
                instance: instance_id(server, 3),
                pid: 10,
                uid: 1000,
                user: "dev".into(),
                unit: "x.service".into(),
                ..Default::default()
            },
            argv: vec![],
            evidence: String::new(),
            started_unix_ns: 0,
            counts: Counts::default(),
        }
    }

    #[test]
    fn an_actor_has_the_instance_s_place_and_the_process_s_own_numbers() {
        let mut all = Instances::default();
        all.insert(3, instance("github"));
        all.note_exe(3, 11, "/usr/bin/git".into());
        let actor = all.actor(Label::new(2, ROLE_LAUNCHER, 3), "github", 11, 1000, "git".into());
        assert_eq!((actor.pid, actor.exe.as_str(), actor.unit.as_str()), (11, "/usr/bin/git", "x.service"));
        assert_eq!((actor.user.as_str(), actor.role()), ("dev", pb::Role::Launcher));
        let other = all.actor(Label::new(2, 0, 3), "github", 11, 0, String::new());
        assert_eq!(other.user, "", "another uid is not called by the instance's user");
    }

    #[test]
    fn the_table_is_bounded_and_counts_what_it_drops() {
        let mut all = Instances::default();
        for number in 0..MAX_INSTANCES as u32 + 5 {
            all.insert(number, instance("x"));
        }
        assert_eq!((all.len(), all.dropped), (MAX_INSTANCES, 5));
        assert!(all.remove(0).is_some() && all.get(0).is_none());
    }

    #[test]
    fn instances_of_the_agent_and_of_the_kernel_never_share_a_name() {
        assert_ne!(instance_id("a", 1), instance_id("a", 1 | sensor_common::kernel::INSTANCE_BY_AGENT));
    }
}
