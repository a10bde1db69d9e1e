//! The thread that reads what servers say: it empties the ring of wires, keeps
//! one [`mcp::Connection`] for each server's stdio, and turns what comes out
//! into events. It also decides which undeclared programs are servers.

use super::core::{Core, lock};
use super::exchange;
use super::http::Http;
use super::listener::Listeners;
use super::live::Live;
use super::places::Places;
use super::printed::Printed;
use super::session::{Keys, Session, Speaker};
use super::wires::{self, Pair};
use crate::event::now;
use crate::kernel::capture::{Capture, CaptureError};
use crate::kernel::maps::Wires;
use crate::kernel::record::{self, WireRecord};
use crate::mcp::Output;
use aya::maps::{MapData, RingBuf};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use sensor_common::label::Label;
use sensor_common::stdio::{
    CANDIDATE_BYTES, CONNECTION_BY_AGENT, CONNECTION_OVER_TCP, Candidate, Chunk, FROM_CLIENT, FROM_SERVER,
    WIRE_JOINED, Wire, WireKey,
};
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};
use tracing::{debug, warn};

/// Longest wait of a server's messages, milliseconds (see `stdio::waking` in the
/// kernel programs).
const ROUND_MS: u8 = 10;
/// Records between two looks at the commands.
const TURN: usize = 1024;
/// How often ends that nobody announced are looked for.
const SWEEP: Duration = Duration::from_secs(1);
/// Connections at once, candidates included.
const CONNECTIONS: usize = 16384;
/// Connections that are remembered as forgotten.
const FORGOTTEN: usize = 4096;
/// Processes of one connection that are remembered.
const PROCESSES: usize = 64;

/// What the rest of the agent tells this thread.
pub enum Command {
    /// The kernel saw a program start with a wire.
    Started(Box<Candidate>),
    /// A server, or a candidate, that ran before; its processes.
    Running { label: Label, processes: Vec<u32>, pair: Pair },
    /// There is a server.
    Began(u32),
    /// The last process of an instance is gone.
    Ended(u32),
    /// A server closed a TCP socket with this cookie.
    Closed(u64),
    /// Say when everything before this is done.
    Answer(mpsc::SyncSender<()>),
}

/// What `status` shows.
#[derive(Clone, Debug, Default)]
pub struct Shown {
    pub backend: String,
    pub notes: Vec<String>,
    pub attached: bool,
    pub connections: usize,
    pub candidates: usize,
    /// Requests to undeclared listeners that nobody looked at: there were more
    /// than the limits allow.
    pub looks_missed: u64,
}

/// The way to the thread.
pub struct Stdio {
    commands: mpsc::Sender<Command>,
    wake: Arc<EventFd>,
    shown: Arc<Mutex<Shown>>,
}

impl Stdio {
    pub fn tell(&self, command: Command) {
        // The thread lives as long as the agent.
        let _ = self.commands.send(command);
        let _ = self.wake.write(1);
    }

    pub fn shown(&self) -> Shown {
        lock(&self.shown).clone()
    }
}

/// What [`Reader::run`] works with.
pub struct Reader {
    commands: mpsc::Receiver<Command>,
    wake: Arc<EventFd>,
    shown: Arc<Mutex<Shown>>,
    ring: RingBuf<MapData>,
    wires: Wires,
    capture: Option<Capture>,
    /// How long the programs stay attached when there is nothing to read: attaching
    /// stops every CPU for a moment, and shells make candidates all the time.
    linger: Duration,
    keys: Keys,
    live: HashMap<u64, Live>,
    http: Http,
    listeners: Listeners,
    /// Instances that run.
    instances: HashSet<u32>,
    /// Nothing was attached yet.
    fresh: bool,
    /// When there was last something to read.
    needed: Instant,
    swept: Instant,
    next: u64,
    dropped: u64,
    /// Connections that were just forgotten.
    forgotten: VecDeque<u64>,
}

/// A handle, and the thread's own half.
pub fn prepare(
    ring: RingBuf<MapData>,
    wires: Wires,
    capture: Result<Capture, CaptureError>,
    keys: Keys,
    linger: Duration,
) -> std::io::Result<(Stdio, Reader)> {
    let (send, commands) = mpsc::channel();
    let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
    let shown = match &capture {
        Ok(c) => Shown { backend: c.backend.to_string(), notes: c.notes.clone(), ..Shown::default() },
        Err(error) => {
            warn!(%error, "what servers say on stdio is not seen");
            Shown { backend: "none".to_owned(), notes: vec![error.to_string()], ..Shown::default() }
        }
    };
    let shown = Arc::new(Mutex::new(shown));
    let reader = Reader {
        commands,
        wake: wake.clone(),
        shown: shown.clone(),
        ring,
        wires,
        capture: capture.ok(),
        linger,
        http: Http::new(&keys),
        listeners: Listeners::new(),
        keys,
        live: HashMap::new(),
        instances: HashSet::new(),
        fresh: true,
        needed: Instant::now(),
        swept: Instant::now(),
        // Numbers of this run do not meet those of an earlier agent.
        next: CONNECTION_BY_AGENT | (now() as u64 >> 20 << 20 & !CONNECTION_BY_AGENT),
        dropped: 0,
        forgotten: VecDeque::new(),
    };
    Ok((Stdio { commands: send, wake, shown }, reader))
}

impl Reader {
    pub fn run(mut self, core: &Arc<Core>, stop: &AtomicBool) {
        self.clean(core);
        self.listeners.start(core);
        // The first server is heard from its first byte.
        self.attach(core);
        loop {
            let stopping = stop.load(Ordering::Acquire);
            let told = self.obey(core);
            // What moved before an end was announced is in the ring by then.
            let ends = !told.ended.is_empty() || !told.closed.is_empty();
            let more = self.drain(core, if ends { usize::MAX } else { TURN }) > 0;
            for cookie in told.closed {
                self.http.close(core, cookie);
            }
            for instance in told.ended {
                self.ended(core, instance);
            }
            if self.swept.elapsed() >= SWEEP {
                self.sweep(core);
            }
            if more {
                continue;
            }
            if stopping {
                let ids: Vec<u64> = self.live.keys().copied().collect();
                for id in ids {
                    self.close(core, id);
                }
                self.listeners.stop();
                return;
            }
            self.wait();
        }
    }

    /// What an earlier agent left: candidates, and wires of servers that ended
    /// while nobody listened.
    fn clean(&mut self, core: &Core) {
        let left: Vec<(WireKey, Wire)> = self.wires.iter().collect();
        for (key, wire) in left {
            let alive = wire.label.is_some() && core.has_instance(wire.label.instance());
            if !alive && !self.live.contains_key(&wire.connection) {
                self.wires.remove(&key);
            }
        }
    }

    fn wait(&self) {
        // SAFETY: the ring outlives the call.
        let ring = unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) };
        let mut fds =
            [PollFd::new(ring, PollFlags::POLLIN), PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        let attached = self.capture.as_ref().is_some_and(Capture::attached);
        let timeout = if attached { PollTimeout::from(ROUND_MS) } else { PollTimeout::from(250u8) };
        // An error is the same as a time-out.
        let _ = poll(&mut fds, timeout);
        let _ = self.wake.read();
    }

    fn obey(&mut self, core: &Arc<Core>) -> Told {
        let mut told = Told::default();
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Started(r) => self.started(core, &r),
                Command::Running { label, processes, pair } => self.running(core, label, processes, &pair),
                Command::Began(instance) => {
                    self.instances.insert(instance);
                    self.attach(core);
                }
                Command::Ended(instance) => told.ended.push(instance),
                Command::Answer(waiting) => drop(waiting),
                Command::Closed(cookie) => {
                    if self.http.is_open(cookie) {
                        told.closed.push(cookie);
                    }
                }
            }
        }
        told
    }

    fn attach(&mut self, core: &Core) {
        self.needed = Instant::now();
        let Some(capture) = &mut self.capture else { return };
        if capture.attached() {
            return;
        }
        if !std::mem::take(&mut self.fresh) {
            // Its first bytes may have gone by.
            core.lose("agent", "attached_late", 1);
        }
        if let Err(error) = capture.attach() {
            warn!(%error, "what servers say on stdio is not seen");
            core.lose("agent", "capture_attach", 1);
        }
    }

    fn started(&mut self, core: &Arc<Core>, r: &Candidate) {
        self.attach(core);
        let id = r.connection;
        let keys = wires::keys(r.input, self.is_socket(&r.input), r.output, self.is_socket(&r.output));
        if let Some(live) = self.live.get_mut(&id) {
            // Its first bytes may come before this does; what was a candidate
            // may become a server with another exec (a shell's wrapper).
            live.keys = keys;
            if r.header.label.is_some() {
                live.label = r.header.label;
            }
            if !live.processes.contains(&r.header.tgid) && live.processes.len() < PROCESSES {
                live.processes.push(r.header.tgid);
            }
            return;
        }
        self.open(core, id, r.header.label, keys, vec![r.header.tgid]);
    }

    /// Sockets have a wire each way.
    fn is_socket(&self, key: &WireKey) -> bool {
        let other = WireKey { direction: FROM_CLIENT + FROM_SERVER - key.direction, ..*key };
        let own = self.wires.get(key).map(|w| w.connection);
        own.is_some() && self.wires.get(&other).map(|w| w.connection) == own
    }

    fn open(&mut self, core: &Core, id: u64, label: Label, keys: Vec<WireKey>, processes: Vec<u32>) {
        if self.live.len() >= CONNECTIONS {
            self.dropped += 1;
            return;
        }
        let mut session = Session::new(&self.keys, !label.is_some());
        session.ask_policy(core, label);
        self.live.insert(
            id,
            Live {
                label,
                keys,
                places: Places::default(),
                session,
                printed: Printed::default(),
                processes,
                seen: [0; 2],
                joined: [false; 2],
            },
        );
    }

    /// It ran before: bytes may be under way.
    fn running(&mut self, core: &Arc<Core>, label: Label, processes: Vec<u32>, pair: &Pair) {
        let keys = pair.keys();
        if let Some(known) = keys.iter().find_map(|k| self.wires.get(k)).map(|w| w.connection)
            && let Some(live) = self.live.get_mut(&known)
        {
            if label.is_some() && !live.label.is_some() {
                self.admit(core, known, label);
            }
            return;
        }
        self.attach(core);
        self.next += 1;
        let id = self.next;
        let wire = Wire { label, connection: id, position: 0, flags: WIRE_JOINED };
        if !keys.iter().all(|key| self.wires.set(key, &wire)) {
            core.lose("agent", "wires_full", 1);
        }
        if !label.is_some() {
            for pid in &processes {
                self.wires.set_candidate(*pid, true);
            }
        }
        self.open(core, id, label, keys, processes);
        if let Some(live) = self.live.get_mut(&id) {
            live.joined = [true; 2];
        }
    }

    fn drain(&mut self, core: &Arc<Core>, limit: usize) -> usize {
        let offset = now() - super::reader::boottime();
        let mut count = 0;
        let mut out = Vec::new();
        while count < limit {
            // The item keeps its place in the ring until it is read.
            let Some(item) = self.ring.next() else { break };
            count += 1;
            let (chunk, data) = match record::wire(&item) {
                Ok(WireRecord::Chunk(chunk, data)) => (chunk, data),
                Ok(WireRecord::Met(met)) => {
                    drop(item);
                    self.http.met(&met);
                    continue;
                }
                Ok(WireRecord::Look(look, data)) => {
                    let time = offset + i64::try_from(look.header.boottime).unwrap_or(0);
                    self.listeners.take(&look, data, time);
                    continue;
                }
                Err(error) => {
                    tracing::error!(%error, "a record of a wire cannot be read");
                    core.lose("kernel", "unreadable_record", 1);
                    continue;
                }
            };
            let time = offset + i64::try_from(chunk.header.boottime).unwrap_or(0);
            let id = chunk.connection;
            if id & CONNECTION_OVER_TCP != 0 && id & CONNECTION_BY_AGENT == 0 {
                self.http.take(core, &chunk, data, time);
                continue;
            }
            if chunk.header.label.is_some() && !self.live.contains_key(&id) {
                core.await_instance(chunk.header.label.instance());
            }
            let live = match self.live.entry(id) {
                Entry::Occupied(live) => live.into_mut(),
                Entry::Vacant(_) if self.forgotten.contains(&id) => continue,
                Entry::Vacant(vacant) => {
                    let label = chunk.header.label;
                    let mut session = Session::new(&self.keys, !label.is_some());
                    session.ask_policy(core, label);
                    vacant.insert(Live {
                        label,
                        keys: Vec::new(),
                        places: Places::default(),
                        session,
                        printed: Printed::default(),
                        processes: vec![chunk.header.tgid],
                        seen: [0; 2],
                        // It began while nobody listened.
                        joined: [chunk.position > 0; 2],
                    })
                }
            };
            if chunk.header.label.is_some() && !live.label.is_some() {
                live.label = chunk.header.label;
            }
            live.take(&chunk, data, time, &mut out);
            drop(item);
            self.act(core, id, &chunk, time, &mut out);
        }
        if count > 0 {
            self.needed = Instant::now();
        }
        count
    }

    fn act(&mut self, core: &Arc<Core>, id: u64, chunk: &Chunk, time: i64, out: &mut Vec<Output>) {
        let mut outputs = std::mem::take(out).into_iter().peekable();
        while let Some(output) = outputs.next_if(|o| matches!(o, Output::NotMcp | Output::Recognised(_))) {
            let Some(live) = self.live.get_mut(&id) else { return };
            if live.label.is_some() {
                continue;
            }
            let label = match output {
                Output::Recognised(era) => {
                    let processes = live.processes.clone();
                    let era = exchange::era_name(Some(era));
                    core.discovered(time, &processes, chunk.header.tgid, era)
                }
                _ => None,
            };
            match label {
                Some(label) => self.admit(core, id, label),
                None => {
                    self.forget(id);
                    return;
                }
            }
        }
        let Some(live) = self.live.get_mut(&id) else { return };
        if live.label.is_some() {
            let unpaired = live.session.take_unpaired();
            if unpaired > 0 {
                // Their requests were lost, or never asked.
                core.lose("agent", "unpaired_answers", unpaired);
            }
            self.say(core, id, chunk.header.tgid, chunk.header.uid, time, outputs);
        } else if live.seen.iter().all(|seen| *seen >= CANDIDATE_BYTES) {
            self.forget(id);
        }
    }

    fn say(
        &mut self,
        core: &Arc<Core>,
        id: u64,
        pid: u32,
        uid: u32,
        time: i64,
        outputs: impl Iterator<Item = Output>,
    ) {
        let Some(live) = self.live.get_mut(&id) else { return };
        let speaker =
            Speaker { label: live.label, connection: id, transport: "stdio", pid, uid, session: None };
        let mut outputs: Vec<Output> = outputs.collect();
        let over_http = self.http.speaks(live.label.instance());
        live.printed.hold(live.session.recognised(), over_http, &mut outputs);
        let heard = live.session.heard(core, &speaker, time, outputs.into_iter());
        for violation in heard.violations {
            core.contain(live.label, violation);
        }
        for body in heard.bodies {
            core.bus.publish(time, body);
        }
    }

    /// A candidate is a server.
    fn admit(&mut self, core: &Core, id: u64, label: Label) {
        if !self.wires.admit(id, Some(label)) {
            core.lose("agent", "wires_full", 1);
        }
        if let Some(live) = self.live.get_mut(&id) {
            live.label = label;
            live.session.ask_policy(core, label);
        }
    }

    /// A candidate is none, or nothing more comes.
    fn forget(&mut self, id: u64) {
        let Some(live) = self.live.remove(&id) else { return };
        // Records of it may still be in the ring.
        if self.forgotten.len() >= FORGOTTEN {
            self.forgotten.pop_front();
        }
        self.forgotten.push_back(id);
        for key in &live.keys {
            if self.wires.get(key).is_some_and(|w| w.connection == id) {
                self.wires.remove(key);
            }
        }
        if live.label.is_some() {
            self.wires.admit(id, None);
        }
        for pid in live.processes {
            self.wires.set_candidate(pid, false);
        }
    }

    fn ended(&mut self, core: &Arc<Core>, instance: u32) {
        let ids: Vec<u64> =
            self.live.iter().filter(|(_, l)| l.label.instance() == instance).map(|(id, _)| *id).collect();
        for id in ids {
            self.close(core, id);
        }
        self.http.ended(core, instance);
        self.instances.remove(&instance);
    }

    /// Nothing more comes over a connection.
    fn close(&mut self, core: &Arc<Core>, id: u64) {
        // Twice: what is missing at both looks is lost.
        self.look(core, id);
        self.look(core, id);
        let Some(live) = self.live.get_mut(&id) else { return };
        let (label, pid) = (live.label, live.processes.first().copied().unwrap_or(0));
        let mut out = Vec::new();
        let time = now();
        live.session.close(time, &mut out);
        live.printed.end();
        if label.is_some() {
            self.say(core, id, pid, u32::MAX, time, out.into_iter());
        }
        self.forget(id);
    }

    /// Bytes that moved and whose records did not come, though the ring was
    /// emptied since they were seen to have moved: it was full, and nothing has
    /// moved since.
    fn look(&mut self, core: &Arc<Core>, id: u64) {
        let Some(live) = self.live.get_mut(&id) else { return };
        if !live.label.is_some() {
            return;
        }
        let mut out = Vec::new();
        let time = now();
        for key in live.keys.clone() {
            let Some(wire) = self.wires.get(&key).filter(|w| w.connection == id) else { continue };
            let missing = live.places.look(&key, wire.position);
            if missing > 0 {
                live.lost(key.direction, time, missing, &mut out);
            }
        }
        let pid = live.processes.first().copied().unwrap_or(0);
        if !out.is_empty() {
            self.say(core, id, pid, u32::MAX, time, out.into_iter());
        }
    }

    /// HTTP connections whose end nobody told: that record can be lost.
    fn close_gone(&mut self, core: &Arc<Core>) {
        let gone = self.http.gone(|key| self.wires.get(key).is_none());
        if !gone.is_empty() {
            // What moved before the end is in the ring by then.
            self.drain(core, usize::MAX);
        }
        for cookie in gone {
            self.http.close(core, cookie);
        }
    }

    fn sweep(&mut self, core: &Arc<Core>) {
        self.swept = Instant::now();
        let alive = |pid: &u32| Path::new(&format!("/proc/{pid}")).exists();
        let (mut gone, mut promoted, mut labelled) = (Vec::new(), Vec::new(), Vec::new());
        for (id, live) in &mut self.live {
            if live.label.is_some() {
                labelled.push(*id);
                continue;
            }
            live.processes.retain(alive);
            // A policy may have come to know it.
            let label = live.processes.iter().find_map(|pid| core.labels.of(*pid).filter(|l| l.is_some()));
            match label {
                Some(label) => promoted.push((*id, label)),
                None if live.processes.is_empty() => gone.push(*id),
                None => {}
            }
        }
        for id in gone {
            self.forget(id);
        }
        for (id, label) in promoted {
            self.admit(core, id, label);
        }
        // Only where nothing waits in the ring is what is missing lost.
        if self.drain(core, TURN) < TURN {
            for id in labelled {
                self.look(core, id);
            }
            self.close_gone(core);
        }
        if self.dropped > 0 {
            core.lose("agent", "connections_full", std::mem::take(&mut self.dropped));
        }
        if self.live.is_empty() && self.instances.is_empty() {
            if self.needed.elapsed() >= self.linger
                && let Some(capture) = &mut self.capture
                && capture.attached()
            {
                debug!("nothing to read on stdio");
                capture.detach();
            }
        } else {
            self.needed = Instant::now();
        }
        let mut shown = lock(&self.shown);
        shown.looks_missed = core.looks_missed();
        shown.attached = self.capture.as_ref().is_some_and(Capture::attached);
        shown.candidates = self.live.values().filter(|l| !l.label.is_some()).count();
        shown.connections = self.live.len() - shown.candidates;
    }
}

#[derive(Default)]
struct Told {
    /// Instances.
    ended: Vec<u32>,
    /// Cookies of sockets.
    closed: Vec<u64>,
}
