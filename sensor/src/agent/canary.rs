//! Proof that servers are held: a child of the sensor's own is labelled and
//! tries what must be refused, in every network namespace that servers use.
//! What is not refused is an alarm.

pub mod child;

use self::child::Tried;
use super::adopt;
use super::core::{Core, add_instance, lock};
use crate::event::{Body, now, pb};
use crate::kernel::cgroup;
use crate::kernel::maps::Shared;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use sensor_common::label::{Label, ROLE_SERVER};
use sensor_common::policy::SERVER_CANARY;
use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

/// The child says so when its sockets are made.
const PREPARED: &str = "prepared";
/// For one child.
const LIMIT: Duration = Duration::from_secs(10);
/// Namespaces in one round; with more, each round takes others.
const NAMESPACES: usize = 32;
const ANSWER_BYTES: usize = 4096;

/// What the last round found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proof {
    /// When everything was refused; 0: never yet.
    pub proven_unix_ns: i64,
    pub namespaces: u32,
    /// What was not refused, in sentences.
    pub broken: Vec<String>,
}

/// The processes and records of a canary are nobody's.
pub fn is_canary(label: Label) -> bool {
    label.server() == SERVER_CANARY
}

/// A network namespace, and a process in it; `None`: the sensor's own.
struct Place {
    pid: Option<u32>,
    netns: File,
}

impl Place {
    fn name(&self) -> String {
        match self.pid {
            None => "the sensor's network namespace".to_owned(),
            Some(pid) => format!("the network namespace of process {pid}"),
        }
    }
}

/// One look at every namespace. `round` counts.
pub fn round(core: &Core, cgroup: &Path, round: usize) {
    let mut broken = Vec::new();
    let mut proven = 0;
    for place in places(core, round) {
        match attempt(core, cgroup, &place) {
            Ok(tried) if tried.is_empty() => broken.push(format!("in {}: nothing was tried", place.name())),
            Ok(tried) => {
                let through: Vec<String> = tried.iter().filter_map(not_refused).collect();
                if through.is_empty() {
                    proven += 1;
                } else {
                    broken.push(format!("in {}: {}", place.name(), through.join(", ")));
                }
            }
            // The process that led there may have ended, or the sensor may not
            // enter: no proof, and nothing that was let through.
            Err(error) if place.pid.is_some() => {
                tracing::warn!(%error, place = place.name(), "whether servers there are held is not tried");
            }
            Err(error) => broken.push(format!("whether servers are held cannot be tried: {error}")),
        }
    }
    let mut proof = lock(&core.proof);
    let news = broken != proof.broken && !broken.is_empty();
    if broken.is_empty() {
        (proof.proven_unix_ns, proof.namespaces) = (now(), proven);
    }
    proof.broken.clone_from(&broken);
    drop(proof);
    if news {
        core.bus.publish_now(Body::Finding(alarm("not_enforced", &broken.join("; "))));
    }
}

/// Something that is to be enforced is not.
pub fn alarm(kind: &str, detail: &str) -> pb::Finding {
    let mut finding = pb::Finding { kind: kind.to_owned(), detail: detail.to_owned(), ..Default::default() };
    finding.set_severity(pb::Severity::Critical);
    finding
}

fn not_refused(tried: &Tried) -> Option<String> {
    match tried.errno {
        libc::EPERM => None,
        0 => Some(format!("{} of a server whose profile is `none` went through", tried.what)),
        errno => Some(format!(
            "{} of a server whose profile is `none` was not refused where it should be ({})",
            tried.what,
            io::Error::from_raw_os_error(errno)
        )),
    }
}

/// The sensor's own namespace, and those of labelled processes.
fn places(core: &Core, round: usize) -> Vec<Place> {
    let Ok(own) = File::open("/proc/self/ns/net") else { return Vec::new() };
    let inode = |file: &File| file.metadata().map_or(0, |m| m.ino());
    let mut seen = HashSet::from([inode(&own)]);
    let mut others = Vec::new();
    for (pid, _) in adopt::labelled(&lock(&core.maps)) {
        let Ok(netns) = File::open(format!("/proc/{pid}/ns/net")) else { continue };
        if seen.insert(inode(&netns)) {
            others.push(Place { pid: Some(pid), netns });
        }
    }
    others.sort_by_key(|place| inode(&place.netns));
    if others.len() > NAMESPACES {
        let start = round.wrapping_mul(NAMESPACES) % others.len();
        others.rotate_left(start);
        others.truncate(NAMESPACES);
    }
    std::iter::once(Place { pid: None, netns: own }).chain(others).collect()
}

/// Starts a child there, labels it, and hears what came of it.
fn attempt(core: &Core, cgroup: &Path, place: &Place) -> io::Result<Vec<Tried>> {
    let deadline = Instant::now() + LIMIT;
    let mut child = start(cgroup, place)?;
    let label = Label::new(SERVER_CANARY, ROLE_SERVER, core.number());
    let heard = hear(core, &mut child, label, deadline);
    let _ = child.kill();
    let _ = child.wait();
    // Where its end was not seen, its number must not be denied to another.
    let mut maps = lock(&core.maps);
    if maps.tasks.get(&child.id(), 0).is_ok_and(|l| l.0 == label) {
        let _ = maps.tasks.set(child.id(), Shared(Label::NONE), 0);
    }
    let _ = maps.instances.remove(&label.instance());
    drop(maps);
    heard
}

fn start(cgroup: &Path, place: &Place) -> io::Result<Child> {
    // Programs that are attached further down judge nobody else.
    let procs = match cgroup::place(cgroup)? {
        (0, _) => None,
        _ if cgroup::holds(cgroup, std::process::id()) => None,
        _ => Some(OpenOptions::new().write(true).open(cgroup.join("cgroup.procs"))?),
    };
    let netns = place.pid.is_some().then(|| place.netns.try_clone()).transpose()?;
    let mut command = Command::new("/proc/self/exe");
    command.arg("canary").env_clear().stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    // SAFETY: system calls alone, on descriptors that were opened before.
    unsafe {
        command.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            if let Some(mut procs) = procs.as_ref() {
                procs.write_all(b"0")?;
            }
            if let Some(netns) = &netns {
                setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
            }
            Ok(())
        });
    }
    command.spawn()
}

fn hear(core: &Core, child: &mut Child, label: Label, deadline: Instant) -> io::Result<Vec<Tried>> {
    let (Some(mut go), Some(mut said)) = (child.stdin.take(), child.stderr.take()) else {
        return Err(io::Error::other("no pipes"));
    };
    if line(&mut said, deadline)? != PREPARED {
        return Err(io::Error::other("the child says something else"));
    }
    let missed = {
        let mut maps = lock(&core.maps);
        add_instance(&mut maps, label, 0, 1, None);
        maps.tasks.set(child.id(), Shared(label), 0).map_err(|_| {
            io::Error::other("there is no place in the label map: give a larger --label-capacity")
        })?;
        adopt::sockets(&mut maps, child.id(), label)
    };
    if missed > 0 {
        return Err(io::Error::other("its sockets cannot be labelled"));
    }
    go.write_all(b"go\n")?;
    serde_json::from_str(&line(&mut said, deadline)?).map_err(io::Error::other)
}

/// One line, within the time and of a bounded length.
fn line(from: &mut ChildStderr, deadline: Instant) -> io::Result<String> {
    let mut text = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        if poll(&mut [PollFd::new(from.as_fd(), PollFlags::POLLIN)], timeout)? == 0 {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the child does not answer"));
        }
        let mut byte = [0];
        match from.read(&mut byte)? {
            0 => {
                return Err(io::Error::other(format!("the child ended: {}", String::from_utf8_lossy(&text))));
            }
            _ if byte[0] == b'\n' => return Ok(String::from_utf8_lossy(&text).into_owned()),
            _ if text.len() >= ANSWER_BYTES => return Err(io::Error::other("the child says too much")),
            _ => text.push(byte[0]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_refusal_by_the_hooks_is_a_refusal() {
        let said = |errno| not_refused(&Tried { what: "a UDP send over IPv4".to_owned(), errno });
        assert_eq!(said(libc::EPERM), None);
        assert!(said(0).is_some_and(|text| text.contains("went through")));
        for errno in [libc::ETIMEDOUT, libc::ENETUNREACH, libc::ECONNREFUSED, libc::EACCES] {
            assert!(said(errno).is_some_and(|text| text.contains("not refused")), "{errno}");
        }
    }
}
