//! Ends TCP connections whose DNS query or TLS hello was denied. The kernel
//! drops the segment that carries it, and TCP would send it again for minutes
//! before the program hears of it; disconnected, it is told at once.

use super::core::Core;
use super::process;
use crate::kernel::pidfd::{pidfd_open, sockets_of};
use sensor_common::TCP;
use sensor_common::record::{NameVerdict, VERDICT_DENY};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Weak;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

/// Connections that wait for their end.
const QUEUE: usize = 1024;
/// Descriptors looked at for one connection: a server with a million of them
/// must not keep the others waiting.
const MAX_LOOKED: usize = 16_384;

/// A connection to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// The process that made the socket; another of its instance may hold it.
    tgid: u32,
    instance: u32,
    /// SO_COOKIE.
    cookie: u64,
}

/// `None`: nothing hangs (UDP, audit), or the socket is not known.
fn job(r: &NameVerdict) -> Option<Job> {
    let hangs = r.key.verdict == VERDICT_DENY && r.key.protocol == TCP && r.cookie != 0;
    hangs.then_some(Job { tgid: r.header.tgid, instance: r.key.instance, cookie: r.cookie })
}

/// The way to the worker.
pub struct Resets {
    queue: SyncSender<Job>,
    /// Connections that were not ended since this was last asked.
    missed: AtomicU64,
}

impl Resets {
    pub fn new() -> (Resets, Receiver<Job>) {
        let (queue, jobs) = sync_channel(QUEUE);
        (Resets { queue, missed: AtomicU64::new(0) }, jobs)
    }

    /// Never waits.
    pub fn denied(&self, r: &NameVerdict) {
        if let Some(job) = job(r)
            && self.queue.try_send(job).is_err()
        {
            self.missed.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn take_missed(&self) -> u64 {
        self.missed.swap(0, Ordering::Relaxed)
    }
}

/// Until the agent is gone.
pub fn run(core: &Weak<Core>, jobs: &Receiver<Job>) {
    while let Ok(job) = jobs.recv() {
        let Some(core) = core.upgrade() else { return };
        let others = || {
            process::all().into_iter().filter(|pid| {
                *pid != job.tgid
                    && core.labels.of(*pid).is_some_and(|l| l.is_some() && l.instance() == job.instance)
            })
        };
        match end(std::iter::once(job.tgid).chain(std::iter::once_with(others).flatten()), job.cookie) {
            Ok(true) => {}
            // Closed since, as programs do that ask with a deadline.
            Ok(false) => tracing::debug!(cookie = job.cookie, pid = job.tgid, "nobody holds the connection"),
            Err(error) => {
                tracing::debug!(cookie = job.cookie, pid = job.tgid, %error, "a connection was not ended");
                core.resets.missed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Ends the connection with this cookie, whichever of the processes holds it.
/// False: none does.
fn end(pids: impl Iterator<Item = u32>, cookie: u64) -> io::Result<bool> {
    let mut looked = 0;
    for pid in pids {
        // Gone.
        let Ok(pidfd) = pidfd_open(pid) else { continue };
        let Ok(sockets) = sockets_of(pid, &pidfd) else { continue };
        for socket in sockets.flatten() {
            looked += 1;
            if looked > MAX_LOOKED {
                return Err(io::Error::other("too many descriptors"));
            }
            if cookie_of(&socket) == Some(cookie) {
                disconnect(&socket)?;
                return Ok(true);
            }
        }
    }
    Ok(false)
}

pub fn cookie_of(socket: &OwnedFd) -> Option<u64> {
    let mut value = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: value and length belong together.
    let ret = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_COOKIE,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    (ret == 0).then_some(value)
}

/// connect() to AF_UNSPEC: the kernel resets the peer, throws away what waits
/// to be sent, and gives ECONNRESET to whoever polls or uses the socket
/// (`tcp_disconnect`, net/ipv4/tcp.c). A thread that waits in recv() itself gets
/// EPIPE from Linux 6.7 on.
fn disconnect(socket: &OwnedFd) -> io::Result<()> {
    const TRIES: u32 = 5;
    let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    for _ in 0..TRIES {
        // SAFETY: the address is as long as said.
        let ret = unsafe {
            libc::connect(
                socket.as_raw_fd(),
                &raw const nowhere,
                size_of::<libc::sockaddr>() as libc::socklen_t,
            )
        };
        if ret == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EBUSY) {
            return Err(error);
        }
        // Some kernels from 6.4 to 6.6 refuse while a thread waits in recv().
        std::thread::sleep(Duration::from_millis(2));
    }
    // Wakes the thread with the end of the stream; what was denied still waits
    // to be sent, and goes with the socket.
    // SAFETY: no memory is passed.
    if unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) } == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use sensor_common::record::VERDICT_WOULD_DENY;
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::process::{Child, Command, Stdio};
    use std::time::Instant;
    use zerocopy::FromZeros as _;

    const DEADLINE: Duration = Duration::from_secs(20);

    fn denied() -> NameVerdict {
        let mut r = NameVerdict::new_zeroed();
        (r.key.verdict, r.key.protocol, r.key.instance, r.cookie) = (VERDICT_DENY, TCP, 3, 9);
        r.header.tgid = 4;
        r
    }

    #[test]
    fn only_what_would_hang_is_ended() {
        assert_eq!(job(&denied()), Some(Job { tgid: 4, instance: 3, cookie: 9 }));
        for change in [
            (|r: &mut NameVerdict| r.key.verdict = VERDICT_WOULD_DENY) as fn(&mut NameVerdict),
            |r| r.key.protocol = sensor_common::UDP,
            |r| r.cookie = 0,
        ] {
            let mut r = denied();
            change(&mut r);
            assert_eq!(job(&r), None);
        }
    }

    #[test]
    fn a_full_queue_counts_and_never_waits() {
        let (resets, jobs) = Resets::new();
        for _ in 0..QUEUE + 3 {
            resets.denied(&denied());
        }
        assert_eq!((resets.take_missed(), resets.take_missed()), (3, 0));
        assert_eq!(jobs.try_iter().count(), QUEUE);
    }

    /// A process that reads from a connection, and the connection's other end.
    struct Reading {
        child: Child,
        cookie: u64,
        peer: TcpStream,
    }

    fn reading() -> Reading {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let stream = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
        let (mut peer, _) = listener.accept().expect("accept");
        peer.set_read_timeout(Some(DEADLINE)).expect("timeout");
        let socket = OwnedFd::from(stream);
        let cookie = cookie_of(&socket).expect("cookie");
        let mut child = Command::new("cat")
            .env("LC_ALL", "C")
            .stdin(socket)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("cat");
        // Once it has passed a byte on, it waits for the next.
        peer.write_all(b"x").expect("write");
        let mut byte = [0];
        child.stdout.as_mut().expect("stdout").read_exact(&mut byte).expect("read");
        wait_until(|| process_waits(child.id()));
        Reading { child, cookie, peer }
    }

    fn process_waits(pid: u32) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('S'))
    }

    fn wait_until(mut done: impl FnMut() -> bool) {
        let end = Instant::now() + DEADLINE;
        while !done() {
            assert!(Instant::now() < end, "it did not happen");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Copying another process's descriptor is not everybody's.
    fn may_copy() -> bool {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().expect("cat");
        let copied = pidfd_open(child.id()).and_then(|pidfd| crate::kernel::pidfd::pidfd_getfd(&pidfd, 0));
        drop(child.stdin.take());
        child.wait().expect("end");
        match copied {
            Ok(_) => true,
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}");
                eprintln!("skipped: pidfd_getfd() is refused here ({error}); run as root");
                false
            }
        }
    }

    #[test]
    fn a_read_that_waits_fails_at_once_and_the_peer_is_reset() {
        if !may_copy() {
            return;
        }
        let mut r = reading();
        let nobody = u32::MAX >> 2;
        assert!(end([nobody, r.child.id()].into_iter(), r.cookie).expect("ended"));
        wait_until(|| r.child.try_wait().expect("wait").is_some());
        let mut said = String::new();
        r.child.stderr.take().expect("stderr").read_to_string(&mut said).expect("read");
        assert_eq!(r.child.wait().expect("wait").code(), Some(1), "{said}");
        // EPIPE or ECONNRESET, see `disconnect`.
        assert!(said.contains("Broken pipe") || said.contains("Connection reset by peer"), "{said}");
        let error = r.peer.read(&mut [0]).expect_err("reset");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn whoever_polls_is_told_that_the_connection_was_reset() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let mut stream = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
        let (_peer, _) = listener.accept().expect("accept");
        let cookie = cookie_of(&OwnedFd::from(stream.try_clone().expect("copy"))).expect("cookie");
        let polling = std::thread::spawn(move || {
            let mut poll =
                [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&stream), nix::poll::PollFlags::POLLIN)];
            let ready = nix::poll::poll(&mut poll, 20_000u16).expect("poll");
            assert_eq!(ready, 1);
            stream.read(&mut [0]).expect_err("reset")
        });
        // A process may always copy its own descriptors.
        assert!(end(std::iter::once(std::process::id()), cookie).expect("ended"));
        assert_eq!(polling.join().expect("polled").kind(), io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn another_connection_of_the_process_is_left_alone() {
        if !may_copy() {
            return;
        }
        let mut r = reading();
        assert!(!end(std::iter::once(r.child.id()), r.cookie + 1_000_000).expect("looked"));
        r.peer.write_all(b"y").expect("still open");
        let mut byte = [0];
        r.child.stdout.as_mut().expect("stdout").read_exact(&mut byte).expect("read");
        assert_eq!(&byte, b"y");
        drop(r.peer);
        assert!(r.child.wait().expect("end").success());
    }
}
