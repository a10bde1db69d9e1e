//! Servers that nobody declared: from what was heard to a label on a whole tree.

use super::adopt;
use super::core::{Core, PATIENCE, add_instance, lock, program_name};
use super::process;
use super::program::{self, Origin};
use super::stdio;
use crate::kernel::maps::Shared;
use sensor_common::kernel::State;
use sensor_common::label::{Label, ROLE_SERVER};
use sensor_common::policy::SERVER_UNKNOWN;

impl Core {
    /// Whether programs that nobody declared are looked at.
    pub fn looks_for_candidates(&self) -> bool {
        lock(&self.maps).state.get(&0, 0).is_ok_and(|s| s.0.candidates != 0)
    }

    pub fn look_for_candidates(&self, yes: bool) {
        let mut maps = lock(&self.maps);
        if let Ok(state) = maps.state.get(&0, 0) {
            let _ = maps.state.set(0, Shared(State { candidates: yes.into(), ..state.0 }), 0);
        }
    }

    /// A program that nobody declared speaks MCP: its tree becomes an instance
    /// of `unknown`. `speaker`: the process that was heard, one of `processes`.
    pub fn discovered(&self, time: i64, processes: &[u32], speaker: u32, era: &str) -> Option<Label> {
        if let Some(label) = processes.iter().find_map(|pid| self.labels.of(*pid).filter(|l| l.is_some())) {
            return Some(label); // a policy that has just come into force
        }
        if process::stat(speaker).is_none_or(|s| s.zombie) {
            return None; // it has ended
        }
        let mut root = speaker;
        while let Some(parent) = process::stat(root).map(|s| s.ppid).filter(|p| processes.contains(p)) {
            root = parent;
        }
        let label = Label::new(SERVER_UNKNOWN, ROLE_SERVER, self.number());
        let netns = match adopt::home_netns(speaker) {
            0 => u64::MAX,
            cookie => cookie,
        };
        let (marked, unmarked, missed) = {
            let mut maps = lock(&self.maps);
            let (marked, unmarked) = adopt::tree(&mut maps, root, label);
            add_instance(&mut maps, label, netns, marked.len() as u64, None);
            let missed = marked.iter().map(|pid| adopt::sockets(&mut maps, *pid, label)).sum();
            (marked, unmarked, missed)
        };
        self.unlabelled_sockets(missed);
        if unmarked > 0 {
            self.lose("agent", "label_overflow", unmarked);
        }
        if marked.is_empty() {
            let _ = lock(&self.maps).instances.remove(&label.instance());
            return None; // it has ended
        }
        let exe = process::exe(speaker);
        let argv = process::within(PATIENCE, move || process::arguments(&process::cmdline(speaker)))
            .unwrap_or_default();
        let parent = process::stat(speaker).map_or(0, |s| s.ppid);
        let evidence = format!("speaks MCP ({era})");
        self.begin(
            time,
            label,
            speaker,
            process::uid(speaker),
            parent,
            &exe,
            argv.clone(),
            evidence,
            0,
            true,
        );
        let actor = self.actor(label, speaker, u32::MAX);
        // A client that probes a server and starts it again has one server.
        let who = (program_name(&exe, &argv), actor.client.as_ref().map_or(0, |c| c.pid));
        let mut told = lock(&self.told);
        if !told.contains(&who) {
            const TOLD: usize = 1024;
            if told.len() >= TOLD {
                told.pop_front();
            }
            told.push_back(who);
            self.bus.publish_now(stdio::unknown_server(&actor, &argv, era));
        }
        Some(label)
    }

    /// The files that a process comes from, where it sees the same ones as the
    /// agent does.
    pub fn origin(&self, pid: u32) -> Origin {
        let read = move || {
            let link = |name: &str| std::fs::read_link(format!("/proc/{pid}/{name}")).ok();
            if link("ns/mnt").is_none() || link("ns/mnt") != std::fs::read_link("/proc/self/ns/mnt").ok() {
                return Origin::default();
            }
            let argv = process::arguments(&process::cmdline(pid));
            program::origin(&process::exe(pid), &argv, &link("cwd").unwrap_or_default())
        };
        process::within(PATIENCE * 3, read).unwrap_or_default()
    }
}
