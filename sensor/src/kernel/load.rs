//! Loading and attaching the programs, and taking over what an earlier agent
//! left in place.
//!
//! Maps and links are pinned: they outlive the agent. A start finds them,
//! loads its own programs over the same maps (`carry`: those that are laid out
//! differently now are filled from the old ones), attaches those, and only then
//! drops the old links, so that no call goes unjudged in between.

use super::capture::{Backend, Capture, CaptureError};
use super::carry::{self, CarryError};
use super::gauges::Gauges;
use super::links::{Link, Links};
use super::maps::{Labels, LearnedNames, Maps, MapsError, Rings, Wires};
use super::pins::{Pins, PinsError};
use super::{Identifier, OBJECT, btf, lsm, sys};
use aya::maps::ProgramArray;
use aya::programs::Program;
use aya::{EbpfError, EbpfLoader};
use aya_obj::Object;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use tracing::{debug, info};
use zerocopy::IntoBytes as _;

pub const BPFFS: &str = "/sys/fs/bpf";

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("this binary was built without its kernel programs: build it with `cargo xtask build`")]
    NoObject,
    #[error(transparent)]
    Btf(#[from] btf::BtfError),
    #[error(transparent)]
    Maps(#[from] MapsError),
    #[error("cannot load the kernel programs: {0}")]
    Load(#[from] EbpfError),
    #[error("cannot open the cgroup {path}: {source}")]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("bpffs: {path}: {source}")]
    Bpffs { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Pins(#[from] PinsError),
    #[error(transparent)]
    Carry(#[from] CarryError),
    #[error(
        "core hook `{hook}` cannot be attached: {reason}\n\
         needed: root or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON; `mcp-sensor doctor` shows each hook; \
         `--allow-degraded` runs without it"
    )]
    Hook { hook: &'static str, reason: String },
}

/// Whether a hook works here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HookState {
    Attached,
    /// Not enforced, and why.
    Failed(String),
}

#[derive(Clone, Debug)]
pub struct Hook {
    pub name: &'static str,
    /// The sensor does not start without a core hook.
    pub core: bool,
    /// What is not enforced where it fails.
    pub without: &'static str,
    pub state: HookState,
}

/// A cgroup hook and its number in `enum bpf_attach_type` (linux/bpf.h).
struct Core {
    program: &'static str,
    attach_type: u32,
    without: &'static str,
}

const TRACEPOINTS: [(&str, &str, &str); 4] = [
    ("fork", "sched_process_fork", "children of a server are not labelled"),
    ("exit", "sched_process_exit", "labels are not removed"),
    ("exec", "sched_process_exec", "servers are not recognised at exec"),
    (
        "moved",
        "cgroup_attach_task",
        "processes moved into a unit or container are labelled only by the agent",
    ),
];

const CGROUP: [Core; 11] = [
    Core {
        program: "socket",
        attach_type: 2,
        without: "raw, ping, UDP-Lite and MPTCP sockets are not refused",
    },
    Core { program: "setsockopt", attach_type: 22, without: "group joins are not refused" },
    Core { program: "connect4", attach_type: 10, without: "connect() to IPv4 is not refused at once" },
    Core { program: "connect6", attach_type: 11, without: "connect() to IPv6 is not refused at once" },
    Core { program: "sendmsg4", attach_type: 14, without: "sendto() to IPv4 is not refused at once" },
    Core { program: "sendmsg6", attach_type: 15, without: "sendto() to IPv6 is not refused at once" },
    Core { program: "bind4", attach_type: 8, without: "bind() is not refused at once" },
    Core { program: "bind6", attach_type: 9, without: "bind() is not refused at once" },
    Core { program: "egress", attach_type: 1, without: "packets are not judged" },
    Core { program: "ingress", attach_type: 0, without: "inbound packets are not judged" },
    Core { program: "released", attach_type: 34, without: "the end of connections is not told" },
];

/// Programs that `egress` and `ingress` hand packets to: the array, the place in
/// it, and what is lost without.
const HANDED: [(&str, &str, u32, &str); 3] = [
    ("dns_query", "OUT_PROGRAMS", 0, "DNS of servers whose profile has names is refused"),
    (
        "tls_hello",
        "OUT_PROGRAMS",
        1,
        "TLS to addresses learned by name is refused where its rule asks for SNI",
    ),
    ("dns_answer", "IN_PROGRAMS", 0, "no names are learned, so that none opens an address"),
];

/// Attach types of linux/bpf.h that aya has no name for (Linux 6.7).
const UNIX: [(&str, u32); 2] = [("unix_connect", 49), ("unix_sendmsg", 50)];

pub struct Options {
    pub cgroup: PathBuf,
    /// Where maps and links are pinned.
    pub pins: Pins,
    /// Thread groups that can bear a label without overflow.
    pub label_capacity: u32,
    pub allow_degraded: bool,
    /// Which back end reads stdio; `None`: the best there is.
    pub capture: Option<Backend>,
    /// Of the ring of wires, bytes: a power of two.
    pub stdio_ring: u32,
}

/// What is attached. Dropping it leaves links that are pinned in place.
pub struct Loaded {
    pub maps: Maps,
    pub rings: Rings,
    pub labels: Labels,
    pub names: LearnedNames,
    /// Without it no file is verified.
    pub identifier: Result<Identifier, String>,
    /// Without it no message is seen.
    pub capture: Result<Capture, CaptureError>,
    pub wires: Wires,
    pub hooks: Vec<Hook>,
    /// An earlier agent's maps were found and are in use.
    pub adopted: bool,
    pub attached: Attached,
    /// For whoever looks whether they still are.
    pub links: Links,
    pub gauges: Gauges,
}

/// Programs and links. Dropping it leaves what is pinned in place.
pub struct Attached {
    pins: Pins,
    _ebpf: aya::Ebpf,
    _links: Vec<OwnedFd>,
}

impl Attached {
    /// Takes everything out of the kernel again.
    pub fn release(self) -> Result<(), PinsError> {
        let Attached { pins, _ebpf: ebpf, _links: links } = self;
        drop((ebpf, links));
        pins.release().map(drop)
    }

    /// Ends packet hooks of an earlier version that stayed for sockets which
    /// no descriptor led to. True: there were some.
    pub fn end_lingering(&self) -> Result<bool, PinsError> {
        let any = !self.pins.lingering()?.is_empty();
        self.pins.remove_lingering().map(|()| any)
    }
}

/// Mounts bpffs where it belongs, if nobody has.
pub fn ensure_bpffs() -> Result<(), LoadError> {
    let path = Path::new(BPFFS);
    let fail = |source: io::Error| LoadError::Bpffs { path: path.to_path_buf(), source };
    const BPF_FS_MAGIC: i64 = 0xcafe4a11;
    let stat = nix::sys::statfs::statfs(path).map_err(|e| fail(e.into()))?;
    if stat.filesystem_type().0 as i64 == BPF_FS_MAGIC {
        return Ok(());
    }
    info!(path = BPFFS, "mounting bpffs");
    nix::mount::mount(Some("bpf"), path, Some("bpf"), nix::mount::MsFlags::empty(), None::<&str>)
        .map_err(|e| fail(e.into()))
}

/// Loads and attaches everything. Where that fails, what was in force before
/// stays so.
pub fn load(options: Options) -> Result<Loaded, LoadError> {
    if OBJECT.is_empty() {
        return Err(LoadError::NoObject);
    }
    let mut offsets = btf::offsets()?;
    (offsets.scope_level, offsets.scope) = super::cgroup::place(&options.cgroup)
        .map_err(|source| LoadError::Cgroup { path: options.cgroup.clone(), source })?;
    let taken = options.pins.current()?;
    let building = options.pins.begin()?;
    let wanted = wanted(&options)?;
    let apart = match &taken {
        Some(taken) => carry::share(taken, &building, &wanted)?,
        None => carry::Apart::default(),
    };

    let mut loader = EbpfLoader::new();
    loader
        .override_global("OFFSETS", offsets.as_bytes(), true)
        .map_max_entries("TASKS", options.label_capacity)
        .map_max_entries("STDIO", options.stdio_ring);
    // Without an agent nothing goes into the ring of wires.
    for map in wanted.iter().filter(|map| map.name != "STDIO") {
        loader.map_pin_path(&map.name, building.map(&map.name));
    }
    let mut ebpf = loader.load(OBJECT)?;
    let carried = match &taken {
        Some(taken) => {
            apart.pair(taken, |name| ebpf.map(name).and_then(map_fd)?.try_clone_to_owned().ok())?
        }
        None => None,
    };
    if let Some(carried) = &carried {
        carried.tables()?;
    }

    let cgroup = File::open(&options.cgroup)
        .map_err(|source| LoadError::Cgroup { path: options.cgroup.clone(), source })?;
    let mut hooks = Vec::new();
    let (mut links, mut watched) = (Vec::new(), Vec::new());
    let mut pin = |name: &'static str, link: OwnedFd| -> Result<(), String> {
        sys::pin(link.as_fd(), &building.link(name)).map_err(|e| format!("cannot pin it: {e}"))?;
        match link.try_clone() {
            Ok(again) => watched.push(Link::new(name, again)),
            Err(error) => debug!(%error, hook = name, "not watched"),
        }
        links.push(link);
        Ok(())
    };
    let mut keep = |hook: Hook, pinned: Result<(), String>| -> Result<(), LoadError> {
        let mut hook = hook;
        match pinned {
            Ok(()) => (),
            Err(reason) if hook.core && !options.allow_degraded => {
                return Err(LoadError::Hook { hook: hook.name, reason });
            }
            Err(reason) => hook.state = HookState::Failed(reason),
        }
        hooks.push(hook);
        Ok(())
    };
    let started = std::time::Instant::now();
    let refused = verify(&mut ebpf);
    let mut handed = Vec::new();
    for (name, array, index, without) in HANDED {
        let state = match hand(&mut ebpf, &refused, name, array, index) {
            Ok(()) => HookState::Attached,
            Err(reason) if !options.allow_degraded => return Err(LoadError::Hook { hook: name, reason }),
            Err(reason) => HookState::Failed(reason),
        };
        handed.push(Hook { name, core: true, without, state });
    }
    let guards = lsm::attach(&mut ebpf);
    let program = |name: &str| match refused.get(name) {
        Some(reason) => Err(reason.clone()),
        None => program_fd(&ebpf, name),
    };
    for (name, tracepoint, without) in TRACEPOINTS {
        let link = program(name).and_then(|fd| {
            sys::raw_tracepoint_open(fd, Some(tracepoint)).map_err(|e| format!("cannot attach: {e}"))
        });
        let pinned = link.and_then(|fd| pin(name, fd));
        keep(Hook { name, core: true, without, state: HookState::Attached }, pinned)?;
    }
    for core in CGROUP {
        let link = program(core.program).and_then(|fd| {
            sys::link_create(fd, cgroup.as_fd(), core.attach_type).map_err(|e| format!("cannot attach: {e}"))
        });
        let pinned = link.and_then(|fd| pin(core.program, fd));
        keep(
            Hook { name: core.program, core: true, without: core.without, state: HookState::Attached },
            pinned,
        )?;
    }
    let mut judged_by_socket = false;
    for (group, attached) in guards {
        let pinned =
            attached.and_then(|links| links.into_iter().try_for_each(|(name, link)| pin(name, link)));
        judged_by_socket |= group.name == lsm::UNIX && pinned.is_ok();
        let hook = Hook { name: group.name, core: false, without: group.without, state: HookState::Attached };
        keep(hook, pinned)?;
    }
    // By name only where nothing better is there.
    for (name, attach_type) in UNIX.into_iter().filter(|_| !judged_by_socket) {
        let pinned = attach_unix(&ebpf, name, attach_type, &cgroup).and_then(|fd| pin(name, fd));
        let without = "unix sockets are not judged (unix: open)";
        keep(Hook { name, core: false, without, state: HookState::Attached }, pinned)?;
    }
    debug!(elapsed_ms = started.elapsed().as_millis(), "programs verified and attached");
    if let Some(carried) = &carried {
        carried.labels()?;
    }
    // The new links judge; the old may go.
    options.pins.commit(&building, carried.is_some_and(|carried| carried.sockets_apart()))?;
    hooks.append(&mut handed);
    let labels = Labels::open(&ebpf)?;
    let names = LearnedNames::open(&ebpf)?;
    let identifier = program("identify").and_then(|fd| Identifier::open(&ebpf, fd));
    let capture = Capture::prepare(&mut ebpf, options.capture);
    let wires = Wires::open(&ebpf)?;
    let hooks_of = TRACEPOINTS.iter().map(|t| t.0).chain(CGROUP.iter().map(|c| c.program));
    let programs = hooks_of.chain(HANDED.iter().map(|h| h.0));
    let programs =
        programs.filter_map(|name| Some((name, program_fd(&ebpf, name).ok()?.try_clone_to_owned().ok()?)));
    let gauges = Gauges::open(&ebpf, programs.collect());
    let (maps, rings) = Maps::take(&mut ebpf)?;
    let attached = Attached { pins: options.pins, _ebpf: ebpf, _links: links };
    Ok(Loaded {
        maps,
        rings,
        labels,
        names,
        identifier,
        capture,
        wires,
        hooks,
        adopted: taken.is_some(),
        attached,
        links: Links(watched),
        gauges,
    })
}

/// The object's own maps; the compiler's sections are not shared.
fn wanted(options: &Options) -> Result<Vec<carry::Wanted>, LoadError> {
    let object = Object::parse(OBJECT).map_err(|e| LoadError::Load(e.into()))?;
    let chosen = HashMap::from([("TASKS", options.label_capacity), ("STDIO", options.stdio_ring)]);
    Ok(carry::wanted(&object, &chosen))
}

/// The whole chain: aya's outermost message hides the errno.
pub(super) fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut source = e.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    // A verifier log ends with what matters.
    const LIMIT: usize = 2000;
    if text.len() > LIMIT {
        let from = (text.len() - LIMIT..text.len()).find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        text = format!("…{}", &text[from..]);
    }
    text
}

/// Hands every program to the verifier, on all CPUs: that is nearly all of what
/// a start costs. Returns, by name, why one was refused.
fn verify(ebpf: &mut aya::Ebpf) -> HashMap<String, String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let by_hand = |name: &str| UNIX.iter().any(|(unix, _)| *unix == name);
    let programs: Vec<_> = ebpf.programs_mut().filter(|(name, _)| !by_hand(name)).collect();
    let queue = Mutex::new(programs.into_iter());
    let refused = Mutex::new(HashMap::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
                    let Some((name, program)) = next else { break };
                    let loaded = match program {
                        Program::RawTracePoint(p) => p.load(),
                        Program::CgroupSock(p) => p.load(),
                        Program::CgroupSockAddr(p) => p.load(),
                        Program::CgroupSockopt(p) => p.load(),
                        Program::CgroupSkb(p) => p.load(),
                        _ => continue,
                    };
                    if let Err(e) = loaded {
                        let mut refused = refused.lock().unwrap_or_else(PoisonError::into_inner);
                        refused.insert(name.to_owned(), chain(&e));
                    }
                }
            });
        }
    });
    refused.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Puts a program where the packet hooks look for it. What an earlier agent put
/// there is replaced in one step.
fn hand(
    ebpf: &mut aya::Ebpf,
    refused: &HashMap<String, String>,
    name: &str,
    array: &str,
    index: u32,
) -> Result<(), String> {
    if let Some(reason) = refused.get(name) {
        return Err(reason.clone());
    }
    let fd = match ebpf.program(name) {
        Some(Program::CgroupSkb(p)) => p.fd().and_then(|fd| Ok(fd.try_clone()?)).map_err(|e| chain(&e))?,
        _ => return Err("not in the kernel object".into()),
    };
    let map = ebpf.map_mut(array).ok_or("its array is not in the kernel object")?;
    let mut programs = ProgramArray::try_from(map).map_err(|e| chain(&e))?;
    programs.set(index, &fd, 0).map_err(|e| chain(&e))
}

fn program_fd<'a>(ebpf: &'a aya::Ebpf, name: &str) -> Result<BorrowedFd<'a>, String> {
    let fd = match ebpf.program(name).ok_or("not in the kernel object")? {
        Program::RawTracePoint(p) => p.fd(),
        Program::CgroupSock(p) => p.fd(),
        Program::CgroupSockAddr(p) => p.fd(),
        Program::CgroupSockopt(p) => p.fd(),
        Program::CgroupSkb(p) => p.fd(),
        _ => return Err("of another type in the kernel object".into()),
    };
    fd.map(|fd| fd.as_fd()).map_err(|e| chain(&e))
}

/// Loads a program by hand, over the maps that are loaded already.
fn attach_unix(ebpf: &aya::Ebpf, name: &str, attach_type: u32, cgroup: &File) -> Result<OwnedFd, String> {
    let mut object = Object::parse(OBJECT).map_err(|e| chain(&e))?;
    let text: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
    let fds: Vec<(String, i32)> = ebpf
        .maps()
        .filter_map(|(name, map)| map_fd(map).map(|fd| (name.to_owned(), fd.as_raw_fd())))
        .collect();
    let maps = object.maps.clone();
    object
        .relocate_maps(
            fds.iter().filter_map(|(name, fd)| maps.get(name).map(|map| (name.as_str(), *fd, map))),
            &text,
        )
        .map_err(|e| chain(&e))?;
    object.relocate_calls(&text).map_err(|e| chain(&e))?;
    let program = object.programs.get(name).ok_or("not in the kernel object")?;
    let function = object.functions.get(&program.function_key()).ok_or("not in the kernel object")?;
    let fd = sys::load_sock_addr(name, &function.instructions, attach_type).map_err(|(e, log)| {
        let last = log.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or_default();
        format!("the kernel refused the program: {e} {last}")
    })?;
    sys::link_create(fd.as_fd(), cgroup.as_fd(), attach_type).map_err(|e| format!("cannot attach: {e}"))
}

pub(super) fn map_fd(map: &aya::maps::Map) -> Option<BorrowedFd<'_>> {
    use aya::maps::Map;
    let data = match map {
        Map::Array(m)
        | Map::PerCpuArray(m)
        | Map::HashMap(m)
        | Map::LruHashMap(m)
        | Map::LpmTrie(m)
        | Map::RingBuf(m)
        | Map::SkStorage(m)
        | Map::ProgramArray(m)
        | Map::Unsupported(m) => m,
        _ => return None,
    };
    Some(data.fd().as_fd())
}
