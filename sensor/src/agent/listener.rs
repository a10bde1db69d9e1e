//! Programs that nobody declared and that speak MCP over HTTP. What comes of it
//! is a finding and nothing else: an editor may host such a server.

use super::adopt;
use super::core::{Core, PATIENCE, lock, program_name};
use super::exchange;
use super::process;
use super::reset;
use crate::event::{Body, pb};
use crate::kernel::maps::Shared;
use crate::kernel::pidfd::{pidfd_getfd, pidfd_open};
use crate::mcp::http::{Candidate, Said};
use crate::mcp::{Era, Sender};
use crate::policy::compile::UNKNOWN;
use sensor_common::addr::Addr;
use sensor_common::listener::{Look, Looks};
use sensor_common::stdio::FROM_CLIENT;
use std::collections::{HashMap, HashSet, VecDeque};
use std::fs;
use std::io::{self, BufRead as _, Read as _};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use tracing::{debug, warn};

/// Requests that are being read.
const REQUESTS: usize = 1024;
/// Listeners that wait to be told of.
const WAITING: usize = 64;
/// Programs and ports that were told of.
const TOLD: usize = 1024;

/// What is looked at.
pub struct Listeners {
    /// By connection.
    requests: HashMap<u64, Candidate>,
    /// Oldest first.
    order: VecDeque<u64>,
    found: Option<mpsc::SyncSender<Found>>,
    finder: Option<std::thread::JoinHandle<()>>,
}

/// A listener that speaks MCP.
struct Found {
    time: i64,
    /// Cookie of its socket.
    cookie: u64,
    port: u16,
    era: Era,
    peer: IpAddr,
}

impl Listeners {
    pub fn new() -> Listeners {
        Listeners { requests: HashMap::new(), order: VecDeque::new(), found: None, finder: None }
    }

    /// Looking for the process behind a socket may take a while: a thread does.
    pub fn start(&mut self, core: &Arc<Core>) {
        // What an earlier agent found, this one has not told of.
        let mut maps = lock(&core.maps);
        let known: Vec<u64> = maps.listeners.keys().flatten().collect();
        for cookie in known {
            let _ = maps.listeners.remove(&cookie);
        }
        drop(maps);
        let (send, found) = mpsc::sync_channel(WAITING);
        let core = core.clone();
        let spawned = std::thread::Builder::new().name("listeners".to_owned()).spawn(move || {
            let mut told = VecDeque::new();
            for found in found {
                tell(&core, &found, &mut told);
            }
        });
        match spawned {
            Ok(finder) => (self.found, self.finder) = (Some(send), Some(finder)),
            Err(error) => warn!(%error, "undeclared servers are not found over HTTP"),
        }
    }

    pub fn stop(&mut self) {
        self.found = None;
        if let Some(finder) = self.finder.take() {
            let _ = finder.join();
        }
    }

    /// Bytes of a request to a program that nobody declared, or of its answer.
    pub fn take(&mut self, look: &Look, data: &[u8], time: i64) {
        let id = look.connection;
        let sender = if look.direction == FROM_CLIENT { Sender::Client } else { Sender::Server };
        if sender == Sender::Client && look.position == 0 {
            self.begin(id);
        }
        let Some(candidate) = self.requests.get_mut(&id) else { return };
        let said = candidate.bytes(sender, look.position as usize, data);
        if said != Said::More {
            self.requests.remove(&id);
        }
        let (Said::Mcp(era), Some(found)) = (said, &self.found) else { return };
        let peer = IpAddr::from(look.peer);
        // One that finds no place shows itself with its next request.
        let _ = found.try_send(Found { time, cookie: look.listener, port: look.port as u16, era, peer });
    }

    fn begin(&mut self, id: u64) {
        if self.requests.insert(id, Candidate::default()).is_none() {
            self.order.push_back(id);
        }
        while self.requests.len() > REQUESTS || self.order.len() > 2 * REQUESTS {
            let Some(oldest) = self.order.pop_front() else { return };
            self.requests.remove(&oldest);
        }
    }
}

fn tell(core: &Core, found: &Found, told: &mut VecDeque<(String, u16)>) {
    {
        // Nobody looks any more, whatever comes of it.
        let mut maps = lock(&core.maps);
        if maps.listeners.get(&found.cookie, 0).is_ok_and(|l| l.0.known != 0) {
            return;
        }
        let _ = maps.listeners.insert(found.cookie, Shared(Looks { known: 1, ..Looks::default() }), 0);
    }
    let Some(holder) = holder(found.port, found.cookie) else {
        debug!(port = found.port, "an MCP server ended before it was found");
        return;
    };
    if holder.pid == std::process::id() || core.labels.of(holder.pid).is_none_or(|l| l.is_some()) {
        return; // a policy knows it by now
    }
    let (pid, exe) = (holder.pid, process::exe(holder.pid));
    let argv =
        process::within(PATIENCE, move || process::arguments(&process::cmdline(pid))).unwrap_or_default();
    let name = program_name(&exe, &argv);
    let who = (name.clone(), found.port);
    if told.contains(&who) {
        return;
    }
    if told.len() >= TOLD {
        told.pop_front();
    }
    told.push_back(who);
    core.bus.publish(found.time, finding(found, &holder, name, &argv));
}

fn finding(found: &Found, holder: &Holder, instance: String, argv: &[String]) -> Body {
    let mut finding = pb::Finding {
        kind: "unknown_server".to_owned(),
        server: UNKNOWN.to_owned(),
        instance,
        detail: format!(
            "speaks MCP ({}) over HTTP at {}, to {}, and no rule of the policy declares it; nothing is enforced; \
             process {}: {}",
            exchange::era_name(Some(found.era)),
            holder.address,
            found.peer,
            holder.pid,
            argv.join(" ")
        ),
        transport: "http".to_owned(),
        port: found.port.into(),
        ..Default::default()
    };
    let local = holder.address.ip().to_canonical().is_loopback();
    finding.set_severity(if local { pb::Severity::Low } else { pb::Severity::Medium });
    Body::Finding(finding)
}

/// Who holds a listening socket.
struct Holder {
    pid: u32,
    address: SocketAddr,
}

/// The process that began last, of those that hold the socket: what hands its
/// listeners on (systemd, a pool's master) is older than what serves.
fn holder(port: u16, cookie: u64) -> Option<Holder> {
    let processes = process::all();
    let mut listening: HashMap<u64, SocketAddr> = HashMap::new();
    let mut namespaces: HashSet<PathBuf> = HashSet::new();
    for pid in &processes {
        let Ok(netns) = fs::read_link(format!("/proc/{pid}/ns/net")) else { continue };
        if namespaces.insert(netns) {
            for table in ["tcp", "tcp6"] {
                listeners_at(*pid, table, port, &mut listening);
            }
        }
    }
    let mut holders: Vec<(u64, Holder)> = Vec::new();
    for pid in &processes {
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        let held = entries.flatten().find_map(|entry| {
            let target = fs::read_link(entry.path()).ok()?;
            let inode = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()?;
            let address = *listening.get(&inode)?;
            let number = entry.file_name().to_str()?.parse().ok()?;
            let socket = pidfd_getfd(&pidfd_open(*pid).ok()?, number).ok()?;
            (reset::cookie_of(&socket)? == cookie).then_some(address)
        });
        if let (Some(address), Some(stat)) = (held, process::stat(*pid)) {
            holders.push((stat.start_time, Holder { pid: *pid, address }));
        }
    }
    holders.into_iter().max_by_key(|(start, h)| (*start, h.pid)).map(|(_, holder)| holder)
}

/// Inodes of the sockets that listen at a port of a process's network namespace.
fn listeners_at(pid: u32, table: &str, port: u16, found: &mut HashMap<u64, SocketAddr>) {
    const LIMIT: u64 = 4 << 20;
    let Ok(file) = fs::File::open(format!("/proc/{pid}/net/{table}")) else { return };
    let lines = io::BufReader::new(file.take(LIMIT)).lines().map_while(Result::ok);
    // Those that listen come first (net/ipv4/tcp_ipv4.c, `tcp_seq_start`).
    let listening = lines.skip(1).map_while(|line| listener(&line));
    found.extend(listening.filter(|(_, address)| address.port() == port));
}

/// A line of /proc/net/tcp; `None`: it is of another state.
fn listener(line: &str) -> Option<(u64, SocketAddr)> {
    const LISTEN: &str = "0A";
    let mut fields = line.split_ascii_whitespace();
    let (local, state) = (fields.nth(1)?, fields.nth(1)?);
    let inode = fields.nth(5)?.parse().ok()?;
    let (words, port) = adopt::end(local)?;
    (state == LISTEN).then(|| (inode, SocketAddr::new(IpAddr::from(Addr(words)), port)))
}
