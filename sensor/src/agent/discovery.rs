//! Servers that nobody declared: from what was heard to a label on a whole tree.

use super::adopt;
use super::core::{Core, PATIENCE, add_instance, lock, program_name};
use super::process;
use super::program::{self, Origin};
use super::stdio::Command;
use super::wires;
use crate::event::{Body, pb};
use crate::kernel::maps::Shared;
use sensor_common::kernel::State;
use sensor_common::label::{Label, ROLE_SERVER};
use sensor_common::policy::SERVER_UNKNOWN;
use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;
use tracing::info;

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

    /// See [`Shown::looks_missed`](super::stdio::Shown).
    pub fn looks_missed(&self) -> u64 {
        lock(&self.maps).counts.get(&0, 0).map_or(0, |c| c.0.looks_missed)
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
            self.bus.publish_now(unknown_server(&actor, &argv, era));
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

/// Looks for servers that ran before the sensor: those that a policy labelled,
/// and programs that nobody declared.
pub fn find_running(core: &Core, cgroup: &Path) {
    let processes = process::all();
    let holders = wires::pipe_holders(&processes);
    let peers = wires::peers();
    let this = std::process::id();
    let mut unnamed: HashMap<std::path::PathBuf, HashSet<u64>> = HashMap::new();
    let mut seen: HashSet<(u64, u64)> = HashSet::new();
    let mut found = 0;
    for pid in processes {
        if pid == this {
            continue;
        }
        let ends = wires::ends(pid);
        if ends.len() < 2 {
            continue;
        }
        let own: HashSet<u64> = ends.iter().map(|e| e.inode).collect();
        let Ok(netns) = std::fs::read_link(format!("/proc/{pid}/ns/net")) else { continue };
        let sockets = unnamed.entry(netns).or_insert_with(|| wires::unnamed_sockets(pid));
        let shared = |inode: u64| holders.get(&inode).is_some_and(|n| *n > 1);
        // Not what a program speaks to itself through.
        let outside = |inode: u64| match peers.get(&inode) {
            Some(peer) => !own.contains(peer),
            // Of another network namespace nobody tells: the two ends of a pair
            // are numbered one after the other.
            None => sockets.contains(&inode) && !own.contains(&(inode + 1)) && !own.contains(&(inode - 1)),
        };
        let Some(pair) = wires::pair(&ends, shared, outside) else { continue };
        if !seen.insert((pair.input.inode, pair.output.inode)) {
            continue;
        }
        let label = core.labels.of(pid).unwrap_or(Label::NONE);
        let looked_at = || core.looks_for_candidates() && crate::kernel::cgroup::holds(cgroup, pid);
        if label.is_some() || looked_at() {
            found += 1;
            core.stdio.tell(Command::Running { label, processes: vec![pid], pair });
        }
    }
    let (done, waiting) = mpsc::sync_channel(1);
    core.stdio.tell(Command::Answer(done));
    // Ends when the other half is dropped.
    let _ = waiting.recv_timeout(Duration::from_secs(5));
    info!(found, "programs that may be servers ran already");
}

/// The finding for a server that nobody declared.
pub fn unknown_server(actor: &pb::Actor, argv: &[String], era: &str) -> Body {
    let client = actor.client.as_ref().map_or("", |c| c.name.as_str());
    let mut finding = pb::Finding {
        kind: "unknown_server".to_owned(),
        server: actor.server.clone(),
        instance: actor.instance.clone(),
        detail: format!(
            "speaks MCP ({era}) and no rule of the policy declares it; started by {}: {}",
            if client.is_empty() { "nobody known" } else { client },
            argv.join(" ")
        ),
        transport: "stdio".to_owned(),
        ..Default::default()
    };
    finding.set_severity(pb::Severity::Medium);
    Body::Finding(finding)
}

/// Whether a label is of a server that nobody declared.
pub fn is_unknown(label: Label) -> bool {
    label.server() == SERVER_UNKNOWN
}
