//! Everything at once, in an order that a seed gives: forks, execs, thousands
//! of sockets, threads, daemons. Each of them sends one datagram.

use crate::Target;
use crate::process::in_child;
use crate::wire::*;
use mcp_sensor_tests::report::PAYLOAD;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::wait::wait;
use nix::unistd::{ForkResult, fork, setsid};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) const ALL: &[(&str, Attempt)] = &[("storm", storm)];

/// Held at once.
const SOCKETS: usize = 10_000;

/// xorshift64*: the same order for the same seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % sides
    }
}

/// For `rest[0]` seconds by the seed `rest[1]`. Done: something was sent.
fn storm(t: &Target) -> Tried {
    let number = |at: usize| t.rest.get(at).and_then(|text| text.parse::<u64>().ok());
    let (Some(seconds), Some(seed)) = (number(0), number(1)) else {
        return Err(Stop { step: "no seconds and seed after --", errno: libc::EINVAL });
    };
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let mut dice = Dice(seed | 1);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut held = Vec::new();
    while Instant::now() < end {
        let tried = match dice.roll(5) {
            0 => bomb(t, 2 + dice.roll(6)),
            1 => execs(t, 1 + dice.roll(16)),
            2 => sockets(t, &mut held),
            3 => threads(t, 1 + dice.roll(16)),
            _ => daemon(t),
        };
        if tried? {
            return Ok(true);
        }
    }
    Err(Stop { step: "send", errno: libc::EPERM })
}

/// Whether it went.
fn send(t: &Target) -> Tried {
    sent(t, &socket(family(t.to), libc::SOCK_DGRAM, 0)?)
}

fn sent(t: &Target, s: &OwnedFd) -> Tried {
    let to = raw(t.address());
    // SAFETY: payload and address outlive the call and their lengths are passed.
    let n =
        unsafe { libc::sendto(s.as_raw_fd(), PAYLOAD.as_ptr().cast(), PAYLOAD.len(), 0, to.ptr(), to.len) };
    match check("sendto", n) {
        Ok(_) => Ok(true),
        Err(Stop { errno: libc::EPERM, .. }) => Ok(false),
        Err(other) => Err(other),
    }
}

/// A child that sends, exits with what came of it.
fn child(t: &Target, deeper: u64) -> Result<bool, Stop> {
    // SAFETY: this program has one thread here.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            let below = if deeper > 0 { bomb(t, deeper) } else { Ok(false) };
            let went = below.unwrap_or(false) || send(t).unwrap_or(false);
            // SAFETY: no destructors of the parent are to run.
            unsafe { libc::_exit(i32::from(went)) }
        }
        Ok(ForkResult::Parent { .. }) => Ok(true),
        Err(_) => Ok(false), // as many as there may be
    }
}

/// `breadth` children, each with half as many of its own.
fn bomb(t: &Target, breadth: u64) -> Tried {
    let mut running = 0;
    for _ in 0..breadth {
        running += u64::from(child(t, breadth / 2)?);
    }
    reap(running)
}

fn reap(running: u64) -> Tried {
    let mut went = false;
    for _ in 0..running {
        went |= matches!(wait(), Ok(nix::sys::wait::WaitStatus::Exited(_, code)) if code != 0);
    }
    Ok(went)
}

fn execs(t: &Target, count: u64) -> Tried {
    let started = (0..count).filter_map(|_| {
        let mut again = Command::new("/proc/self/exe");
        again.args(["udp-sendto", "--to", &t.to.to_string(), "--port", &t.port.to_string()]);
        again.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().ok()
    });
    let mut went = false;
    for child in started.collect::<Vec<_>>() {
        let said = child.wait_with_output().map_err(|_| stop("wait"))?;
        went |= String::from_utf8_lossy(&said.stdout).contains("\"done\"");
    }
    Ok(went)
}

/// A thousand more; all of them go when there are enough.
fn sockets(t: &Target, held: &mut Vec<OwnedFd>) -> Tried {
    if held.len() >= SOCKETS {
        held.clear();
    }
    let mut went = false;
    for _ in 0..1000 {
        let Ok(s) = socket(family(t.to), libc::SOCK_DGRAM, 0) else { break };
        went |= sent(t, &s)?;
        held.push(s);
    }
    Ok(went)
}

fn threads(t: &Target, count: u64) -> Tried {
    let senders: Vec<_> = (0..count)
        .map(|_| {
            let t = t.clone();
            std::thread::spawn(move || (0..32).try_fold(false, |went, _| Ok(send(&t)? || went)))
        })
        .collect();
    let mut went = false;
    for sender in senders {
        went |= sender.join().unwrap_or(Err(Stop { step: "thread", errno: libc::EIO }))?;
    }
    Ok(went)
}

/// Whose parent does not wait.
fn daemon(t: &Target) -> Tried {
    in_child(|| {
        let _ = setsid();
        // SAFETY: this program has one thread here.
        if unsafe { fork() }.is_ok_and(|f| f.is_parent()) {
            // SAFETY: ends the middle process without a word.
            unsafe { libc::_exit(0) }
        }
        send(t)
    })
}
