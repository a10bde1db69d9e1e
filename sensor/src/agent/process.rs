//! Facts about processes from /proc. Nothing here follows what a server
//! controls: links are read, never opened, and texts are bounded.

use std::fs::{self, File};
use std::io::Read as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

/// Longest argv that is kept of a client, bytes.
const ARGV_MAX: u64 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    pub ppid: u32,
    /// Clock ticks since boot.
    pub start_time: u64,
    /// Ended, and not waited for.
    pub zombie: bool,
}

/// Fields of /proc/PID/stat; the command's name may hold anything.
pub fn parse_stat(text: &str) -> Option<Stat> {
    let rest = &text[text.rfind(')')? + 1..];
    let mut fields = rest.split_ascii_whitespace();
    let zombie = matches!(fields.next()?, "Z" | "X");
    let ppid = fields.next()?.parse().ok()?;
    let start_time = fields.nth(17)?.parse().ok()?;
    Some(Stat { ppid, start_time, zombie })
}

pub fn stat(pid: u32) -> Option<Stat> {
    parse_stat(&read_text(&format!("/proc/{pid}/stat"), 4096)?)
}

fn read_text(path: &str, limit: u64) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(limit).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

pub fn exe(pid: u32) -> String {
    fs::read_link(format!("/proc/{pid}/exe")).map(|p| p.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Raw argv, NUL after each argument. Reading it touches the process's memory,
/// which may be a file system of its own: use [`within`].
pub fn cmdline(pid: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Ok(file) = File::open(format!("/proc/{pid}/cmdline")) {
        let _ = file.take(ARGV_MAX).read_to_end(&mut bytes);
    }
    bytes
}

pub fn arguments(cmdline: &[u8]) -> Vec<String> {
    let bytes = cmdline.strip_suffix(&[0]).unwrap_or(cmdline);
    if bytes.is_empty() {
        return Vec::new();
    }
    bytes.split(|b| *b == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect()
}

/// Login uid; `None` if nobody logged in.
pub fn login_uid(pid: u32) -> Option<u32> {
    let uid: u32 = read_text(&format!("/proc/{pid}/loginuid"), 32)?.trim().parse().ok()?;
    (uid != u32::MAX).then_some(uid)
}

pub fn uid(pid: u32) -> u32 {
    let status = read_text(&format!("/proc/{pid}/status"), 8192).unwrap_or_default();
    status
        .lines()
        .find_map(|l| l.strip_prefix("Uid:"))
        .and_then(|l| l.split_ascii_whitespace().nth(1)?.parse().ok())
        .unwrap_or(u32::MAX)
}

/// CAP_NET_RAW, permitted: packet sockets pass the cgroup hooks by.
pub fn has_net_raw(pid: u32) -> bool {
    const CAP_NET_RAW: u64 = 13;
    let status = read_text(&format!("/proc/{pid}/status"), 8192).unwrap_or_default();
    status
        .lines()
        .find_map(|l| l.strip_prefix("CapPrm:"))
        .and_then(|l| u64::from_str_radix(l.trim(), 16).ok())
        .is_some_and(|set| set & (1 << CAP_NET_RAW) != 0)
}

/// systemd unit and container id of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    pub unit: String,
    pub container: String,
}

pub fn place(pid: u32) -> Place {
    read_text(&format!("/proc/{pid}/cgroup"), 16 * 1024).map(|t| parse_cgroup(&t)).unwrap_or_default()
}

/// From /proc/PID/cgroup, any hierarchy: the innermost systemd unit, and the
/// 64 hex digits that container engines name their cgroups by.
pub fn parse_cgroup(text: &str) -> Place {
    let mut place = Place::default();
    for line in text.lines() {
        let Some(path) = line.splitn(3, ':').nth(2) else { continue };
        for name in path.split('/') {
            if let Some(id) = container_id(name) {
                place.container = id.to_owned();
            } else if name.ends_with(".service") || name.ends_with(".scope") {
                place.unit = name.to_owned();
            }
        }
    }
    place
}

/// Names of the cgroups of /proc/PID/cgroup, innermost first.
pub fn cgroup_names(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    for line in text.lines() {
        let Some(path) = line.splitn(3, ':').nth(2) else { continue };
        names.extend(path.rsplit('/').filter(|n| !n.is_empty()).map(str::to_owned));
    }
    names
}

fn container_id(name: &str) -> Option<&str> {
    let name = name.strip_suffix(".scope").unwrap_or(name);
    let id = name.rsplit(['-', ':']).next()?;
    (id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit())).then_some(id)
}

/// Every process that /proc shows.
pub fn all() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}

/// What a client is called: the program that people know, or its file name.
pub fn client_name(exe: &str, argv: &[String]) -> String {
    const KNOWN: [(&str, &str); 10] = [
        ("claude", "claude-code"),
        ("codex", "codex"),
        ("gemini", "gemini-cli"),
        ("code", "vscode"),
        ("code-server", "vscode"),
        ("cursor", "cursor"),
        ("windsurf", "windsurf"),
        ("zed", "zed"),
        ("goose", "goose"),
        ("opencode", "opencode"),
    ];
    let file = |path: &str| path.rsplit('/').next().unwrap_or(path).to_owned();
    let own = file(exe);
    // An interpreter is known by its script.
    let script = argv.iter().skip(1).find(|a| !a.starts_with('-')).map(|a| file(a));
    let candidates = [Some(own.clone()), script];
    for name in candidates.into_iter().flatten() {
        let stem = name.trim_end_matches(".js").trim_end_matches(".py");
        if let Some((_, known)) = KNOWN.iter().find(|(file, _)| *file == stem) {
            return (*known).to_owned();
        }
    }
    own
}

/// Reads that hang (a FUSE mount behind a process's memory) hold up nobody:
/// `None` after `limit`, or while too many such reads hang. One thread makes
/// them all; when a read hangs it is left to it, and the next finds another.
pub fn within<T: Send + 'static>(limit: Duration, read: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    static IDLE: Mutex<Option<Reader>> = Mutex::new(None);
    let idle = || IDLE.lock().unwrap_or_else(PoisonError::into_inner);
    let waiting = idle().take();
    let reader = waiting.or_else(reader)?;
    let (send, receive) = mpsc::sync_channel(1);
    reader.send(Box::new(move || drop(send.send(read())))).ok()?;
    let value = receive.recv_timeout(limit).ok()?;
    *idle() = Some(reader);
    Some(value)
}

/// To a thread that ends when this is dropped and its last read is done.
type Reader = mpsc::Sender<Box<dyn FnOnce() + Send>>;

fn reader() -> Option<Reader> {
    const MOST: usize = 8;
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    if THREADS.fetch_add(1, Ordering::Relaxed) >= MOST {
        THREADS.fetch_sub(1, Ordering::Relaxed);
        return None;
    }
    let (send, reads) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
    let spawned = std::thread::Builder::new().name("proc".to_owned()).spawn(move || {
        reads.into_iter().for_each(|read| read());
        THREADS.fetch_sub(1, Ordering::Relaxed);
    });
    if spawned.is_err() {
        THREADS.fetch_sub(1, Ordering::Relaxed);
        return None;
    }
    Some(send)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_command_name_does_not_move_the_fields() {
        let text = "77 (a) S 1 (b) R 42 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 9876 0 0";
        assert_eq!(parse_stat(text), Some(Stat { ppid: 42, start_time: 9876, zombie: false }));
        assert_eq!(parse_stat("77 (x"), None);
    }

    #[test]
    fn containers_and_units_of_both_hierarchies() {
        let id = "a".repeat(64);
        for (text, unit, container) in [
            (format!("0::/system.slice/docker-{id}.scope\n"), "", id.as_str()),
            (format!("8:pids:/docker/{id}\n0::/\n"), "", id.as_str()),
            ("0::/system.slice/foo.service\n".to_owned(), "foo.service", ""),
            (format!("0::/kubepods.slice/pod1.slice/cri-containerd-{id}.scope\n"), "", id.as_str()),
            ("0::/user.slice/user-1000.slice/session-2.scope\n".to_owned(), "session-2.scope", ""),
            ("garbage".to_owned(), "", ""),
        ] {
            let place = parse_cgroup(&text);
            assert_eq!((place.unit.as_str(), place.container.as_str()), (unit, container), "{text}");
        }
    }

    #[test]
    fn cgroups_from_the_inside_out() {
        assert_eq!(cgroup_names("0::/a/b\n8:pids:/c\n"), ["b", "a", "c"]);
    }

    #[test]
    fn a_read_that_hangs_is_given_up() {
        let (send, receive) = mpsc::channel::<()>();
        assert_eq!(within(Duration::from_millis(20), move || receive.recv().is_ok()), None);
        assert_eq!(within(Duration::from_secs(5), || 7), Some(7));
        drop(send);
    }

    #[test]
    fn reads_share_one_thread() {
        let thread = || within(Duration::from_secs(5), || std::thread::current().id());
        // Other tests read too, and may take its place once.
        let seen: std::collections::HashSet<_> = (0..100).map(|_| thread()).collect();
        assert!(seen.len() < 10 && !seen.contains(&None), "{}", seen.len());
    }

    #[test]
    fn clients_are_known_by_program_or_script() {
        let argv = |t: &[&str]| t.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        assert_eq!(client_name("/opt/x/claude", &argv(&["claude"])), "claude-code");
        assert_eq!(client_name("/usr/bin/node", &argv(&["node", "/a/gemini.js"])), "gemini-cli");
        assert_eq!(client_name("/usr/bin/python3.11", &argv(&["python3", "drive.py"])), "python3.11");
    }
}
