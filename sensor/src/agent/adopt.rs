//! Servers that ran before they were known: their processes are labelled,
//! parents first, until a pass finds nothing new; then their sockets.

use super::process::{self, Stat};
use super::wires;
use crate::kernel::maps::{Maps, Shared};
use crate::kernel::pidfd::{owned, pidfd_open, sockets_of};
use crate::policy::recognise::Recogniser;
use aya::maps::MapError;
use nix::sys::socket::{AddressFamily, SockaddrLike as _, SockaddrStorage, getsockname};
use sensor_common::addr::Addr;
use sensor_common::kernel::State;
use sensor_common::label::{Label, ROLE_LAUNCHER, ROLE_SERVER, on_exec};
use sensor_common::socket::{SOCKET_ADOPTED, SOCKET_INBOUND, Socket, Tuple};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, BufRead as _, Read as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

/// A process as it was seen.
#[derive(Clone, Debug)]
struct Seen {
    ppid: u32,
    exe: String,
    argv: Vec<u8>,
    cgroups: Vec<String>,
}

/// A server's tree that was found running.
#[derive(Clone, Debug)]
pub struct Found {
    pub label: Label,
    pub pid: u32,
    pub argv: Vec<u8>,
    pub exe: String,
    /// Which `match` of the policy.
    pub matched: u32,
}

/// Labels every process that the policy recognises. Returns the new instances,
/// whose numbers `number` gives out, and how many processes are beyond the label
/// map.
pub fn processes(
    maps: &mut Maps,
    recogniser: &Recogniser<'_>,
    mut number: impl FnMut() -> u32,
) -> (Vec<Found>, u64) {
    const PASSES: usize = 8;
    let mut found = Vec::new();
    let mut missed = 0;
    let mut seen: HashMap<u32, (u64, Seen)> = HashMap::new();
    for _ in 0..PASSES {
        let mut new = 0;
        missed = 0;
        let mut parents: HashMap<u32, Vec<u32>> = HashMap::new();
        let mut roots = Vec::new();
        let mut alive = HashSet::new();
        for pid in process::all() {
            let Some(Stat { ppid, start_time, .. }) = process::stat(pid) else { continue };
            alive.insert(pid);
            if seen.get(&pid).is_none_or(|(start, _)| *start != start_time) {
                seen.insert(pid, (start_time, look(pid, ppid)));
            }
            parents.entry(ppid).or_default().push(pid);
            if ppid == 0 {
                roots.push(pid);
            }
        }
        // A parent that ended meanwhile leaves its children to start from.
        roots.extend(
            seen.iter().filter(|(p, (_, s))| alive.contains(p) && !alive.contains(&s.ppid)).map(|(p, _)| *p),
        );
        let mut queue: Vec<(u32, Label)> = roots.into_iter().map(|pid| (pid, Label::NONE)).collect();
        let mut visited = HashSet::new();
        while let Some((pid, parent)) = queue.pop() {
            if !visited.insert(pid) {
                continue;
            }
            let Some((start_time, process)) = seen.get(&pid) else { continue };
            let own = maps.tasks.get(&pid, 0).map_or(Label::NONE, |l| l.0);
            let label = if own.is_some() {
                own
            } else {
                let cgroups = process.cgroups.iter().map(String::as_str);
                let recognised = recogniser.recognise(&process.exe, &process.argv, cgroups);
                let launcher = recognised.launcher_file != 0;
                let matched = match recognised.server {
                    0 => Label::NONE,
                    id => Label::new(id, if launcher { ROLE_LAUNCHER } else { ROLE_SERVER }, 0),
                };
                let mut label = on_exec(parent, matched, launcher, false);
                if label.is_some() && !parent.is_some() {
                    label = Label::new(label.server(), label.role(), number());
                    found.push(Found {
                        label,
                        pid,
                        argv: process.argv.clone(),
                        exe: process.exe.clone(),
                        matched: recognised.priority,
                    });
                }
                if label.is_some() {
                    if mark(maps, pid, *start_time, label) {
                        new += 1;
                    } else {
                        missed += 1;
                    }
                }
                label
            };
            for child in parents.get(&pid).into_iter().flatten() {
                queue.push((*child, label));
            }
        }
        if new == 0 {
            break;
        }
    }
    (found, missed)
}

/// Labels a process and all that descend from it, until a look finds nobody
/// new. Returns who was labelled, and how many are beyond the label map.
pub fn tree(maps: &mut Maps, root: u32, label: Label) -> (Vec<u32>, u64) {
    const PASSES: usize = 16;
    let mut marked = Vec::new();
    let mut missed = 0;
    for _ in 0..PASSES {
        let before = marked.len();
        missed = 0;
        for pid in wires::tree(root) {
            if marked.contains(&pid) || maps.tasks.get(&pid, 0).is_ok_and(|l| l.0.is_some()) {
                continue;
            }
            let Some(Stat { start_time, zombie: false, .. }) = process::stat(pid) else { continue };
            if mark(maps, pid, start_time, label) {
                marked.push(pid);
            } else {
                missed += 1;
            }
        }
        if marked.len() == before {
            break;
        }
    }
    (marked, missed)
}

/// Labels a process that was looked at. False: it has no place in the label map.
fn mark(maps: &mut Maps, pid: u32, start_time: u64, label: Label) -> bool {
    if maps.tasks.set(pid, Shared(label), 0).is_err() {
        return false;
    }
    if process::stat(pid).is_none_or(|s| s.start_time != start_time) {
        // It ended, and its number may be another's by now.
        let _ = maps.tasks.set(pid, Shared(Label::NONE), 0);
    }
    true
}

fn look(pid: u32, ppid: u32) -> Seen {
    let argv = process::within(Duration::from_millis(100), move || process::cmdline(pid)).unwrap_or_default();
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    Seen { ppid, exe: process::exe(pid), argv, cgroups: process::cgroup_names(&cgroups) }
}

/// Processes that bear a server's label, with it.
pub fn labelled(maps: &Maps) -> Vec<(u32, Label)> {
    process::all()
        .into_iter()
        .filter_map(|pid| {
            let label = maps.tasks.get(&pid, 0).ok()?.0;
            (label.is_some() && !super::canary::is_canary(label)).then_some((pid, label))
        })
        .collect()
}

/// Gives the process's IP sockets its label, those that have one excepted.
/// Returns how many could not be given it: sockets that nothing judges.
pub fn sockets(maps: &mut Maps, pid: u32, label: Label) -> u64 {
    let Ok(pidfd) = pidfd_open(pid) else { return u64::from(is_alive(pid)) };
    let Ok(sockets) = sockets_of(pid, &pidfd) else { return u64::from(is_alive(pid)) };
    let mut open = Vec::new();
    let mut missed = 0;
    for copied in sockets {
        match copied {
            Ok(fd) => open.push(fd),
            // Closed, or gone, since it was listed.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EBADF | libc::ESRCH)) => {}
            Err(_) => missed += 1,
        }
    }
    let described: Vec<(OwnedFd, Kind)> =
        open.into_iter().filter_map(|fd| kind(&fd).map(|kind| (fd, kind))).collect();
    let listening: HashSet<u16> = described.iter().filter(|(_, k)| k.listens).map(|(_, k)| k.port).collect();
    let uid = process::uid(pid);
    let mut relabelled = HashSet::new();
    for (fd, kind) in described {
        let mut flags = SOCKET_ADOPTED;
        if kind.listens || (kind.connected_tcp && listening.contains(&kind.port)) {
            flags |= SOCKET_INBOUND;
        }
        let value = Socket { label, tgid: pid, uid, flags, netns: kind.netns, ..Socket::default() };
        const NO_EXIST: u64 = 1;
        match maps.sockets.insert(&fd, Shared(value), NO_EXIST) {
            Ok(()) if kind.listens => {
                relabelled.insert(kind.port);
            }
            Ok(()) => {}
            Err(error) if has_one(&error) => {}
            Err(_) => missed += 1,
        }
    }
    if !relabelled.is_empty() {
        // From here on the listener hands its label on; these came before.
        missed += note_queued(maps, pid, label, &relabelled);
    }
    missed
}

fn is_alive(pid: u32) -> bool {
    process::stat(pid).is_some_and(|s| !s.zombie)
}

fn has_one(error: &MapError) -> bool {
    matches!(error, MapError::SyscallError(e) if e.io_error.raw_os_error() == Some(libc::EEXIST))
}

/// Connections that wait in the accept queues of these ports, of whichever
/// process: /proc shows them without an inode. `None`: no such line.
pub fn queued_ends(line: &str) -> Option<(Tuple, u16)> {
    const ESTABLISHED: &str = "01";
    let mut fields = line.split_ascii_whitespace();
    let (local, remote, state) = (fields.nth(1)?, fields.next()?, fields.next()?);
    let inode = fields.nth(5)?;
    if state != ESTABLISHED || inode != "0" {
        return None;
    }
    let (local, local_port) = end(local)?;
    let (remote, remote_port) = end(remote)?;
    let ends = Tuple { local, remote, local_port: local_port.into(), remote_port: remote_port.into() };
    Some((ends, local_port))
}

/// `0100007F:1F90`, or the 32 digits of IPv6: words as they lie in memory.
pub fn end(text: &str) -> Option<([u32; 4], u16)> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| u32::from_str_radix(address.get(at..at + 8)?, 16).ok();
    let words = match address.len() {
        8 => Addr::v4(word(0)?).0,
        32 => [word(0)?, word(8)?, word(16)?, word(24)?],
        _ => return None,
    };
    Some((words, port))
}

/// Notes what waits in the queues of a process's listeners. Returns how many
/// connections found no place.
fn note_queued(maps: &mut Maps, pid: u32, label: Label, listening: &HashSet<u16>) -> u64 {
    const LIMIT: u64 = 16 << 20;
    let (mut noted, mut missed) = (false, 0);
    for table in ["tcp", "tcp6"] {
        let Ok(file) = fs::File::open(format!("/proc/{pid}/net/{table}")) else { continue };
        for line in io::BufReader::new(file.take(LIMIT)).lines().map_while(Result::ok) {
            let Some((ends, port)) = queued_ends(&line) else { continue };
            if listening.contains(&port) {
                match maps.queued.insert(Shared(ends), Shared(label), 0) {
                    Ok(()) => noted = true,
                    Err(_) => missed += 1,
                }
            }
        }
    }
    if noted && let Ok(state) = maps.state.get(&0, 0) {
        let state = State { queued: 1, ..state.0 };
        let _ = maps.state.set(0, Shared(state), 0);
    }
    missed
}

/// Entries that no packet has asked for within one round are of connections
/// that ended; `before` are those of the round before.
pub fn forget_queued(maps: &mut Maps, before: &mut HashSet<Tuple>) {
    let now: HashSet<Tuple> = maps.queued.keys().flatten().map(|k| k.0).collect();
    let (old, new): (HashSet<Tuple>, HashSet<Tuple>) = now.into_iter().partition(|t| before.contains(t));
    for ends in old {
        let _ = maps.queued.remove(&Shared(ends));
    }
    *before = new;
    if before.is_empty()
        && let Ok(state) = maps.state.get(&0, 0)
        && state.0.queued != 0
    {
        let _ = maps.state.set(0, Shared(State { queued: 0, ..state.0 }), 0);
    }
}

struct Kind {
    listens: bool,
    connected_tcp: bool,
    port: u16,
    netns: u64,
}

/// `None`: no IP socket.
fn kind(fd: &OwnedFd) -> Option<Kind> {
    let domain = option(fd, libc::SOL_SOCKET, libc::SO_DOMAIN)?;
    if domain != libc::AF_INET && domain != libc::AF_INET6 {
        return None;
    }
    let listens = option(fd, libc::SOL_SOCKET, libc::SO_ACCEPTCONN).unwrap_or(0) != 0;
    let stream = option(fd, libc::SOL_SOCKET, libc::SO_TYPE) == Some(libc::SOCK_STREAM);
    let name: Option<SockaddrStorage> = getsockname(fd.as_raw_fd()).ok();
    let port = name
        .and_then(|n| match n.family()? {
            AddressFamily::Inet => n.as_sockaddr_in().map(|a| a.port()),
            AddressFamily::Inet6 => n.as_sockaddr_in6().map(|a| a.port()),
            _ => None,
        })
        .unwrap_or(0);
    Some(Kind { listens, connected_tcp: stream && !listens && port != 0, port, netns: netns_cookie(fd) })
}

fn option(fd: &OwnedFd, level: i32, name: i32) -> Option<i32> {
    let mut value = 0i32;
    let mut len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: value and length belong together.
    let ret = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut len) };
    (ret == 0).then_some(value)
}

/// Cookie of a socket's network namespace (SO_NETNS_COOKIE, Linux 5.14); 0 if
/// the kernel does not tell.
pub fn netns_cookie(fd: &OwnedFd) -> u64 {
    const SO_NETNS_COOKIE: i32 = 71;
    let mut value = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: value and length belong together.
    let ret = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if ret == 0 { value } else { 0 }
}

/// Cookie of the network namespace that a process is in, seen without entering
/// it where it is our own; 0: another one, which is never trusted with
/// translation.
pub fn home_netns(pid: u32) -> u64 {
    let link = |path: &str| fs::read_link(path).ok();
    if link("/proc/self/ns/net").is_none()
        || link("/proc/self/ns/net") != link(&format!("/proc/{pid}/ns/net"))
    {
        return 0;
    }
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    owned(fd.into()).map_or(0, |fd| netns_cookie(&fd))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_proc_net_tcp_names_both_ends() {
        let line = "   4: 0100007F:1F90 0202007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 0 1 0";
        let (ends, port) = queued_ends(line).expect("waiting");
        assert_eq!((port, ends.local_port, ends.remote_port), (8080, 8080, 50000));
        assert_eq!(std::net::IpAddr::from(Addr(ends.remote)).to_string(), "127.0.2.2");
        let taken = line.replace("        0 0 1 0", "        0 4711 1 0");
        assert_eq!(queued_ends(&taken), None, "accepted: a descriptor leads to it");
        for garbage in
            ["", "sl local_address", "1: x:y z:w 01 a b c d e 0", "1: 0100007F 0100007F 01 a b c d 0"]
        {
            assert_eq!(queued_ends(garbage), None);
        }
    }
}
