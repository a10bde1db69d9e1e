//! An AF_PACKET socket on the peer's end of the wire. It takes every frame of
//! every EtherType, and knows when it has them all.

use crate::frame::{Frame, MARKER_ETHERTYPE};
use crate::network::{LINK, Network};
use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Kernel memory for frames not yet read; beyond it they are dropped, which
/// [`Sniffer::frames`] reports as an error.
const BUFFER_BYTES: libc::c_int = 64 << 20;
/// Enough for every header; payload lengths come from the headers.
const SNAP_BYTES: usize = 256;

pub struct Sniffer {
    receive: OwnedFd,
    /// Sends markers from the server's end.
    mark: OwnedFd,
    nonce: AtomicU64,
    seen: Mutex<Vec<Frame>>,
}

impl Sniffer {
    pub fn new(network: &Network) -> Result<Sniffer> {
        let receive = network.peer.within(|| {
            let fd = packet_socket(libc::ETH_P_ALL as u16)?;
            set(&fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, BUFFER_BYTES)?;
            set(&fd, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
            Ok(fd)
        })?;
        let mark = network.server.within(|| packet_socket(0))?;
        Ok(Sniffer { receive, mark, nonce: AtomicU64::new(1), seen: Mutex::new(Vec::new()) })
    }

    /// On the server's end, both ways: what leaves after the server's own hooks,
    /// what comes before them.
    pub fn both_ways(network: &Network) -> Result<Sniffer> {
        let receive = network.server.within(|| {
            let fd = packet_socket(libc::ETH_P_ALL as u16)?;
            set(&fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, BUFFER_BYTES)?;
            Ok(fd)
        })?;
        let mark = network.peer.within(|| packet_socket(0))?;
        Ok(Sniffer { receive, mark, nonce: AtomicU64::new(1), seen: Mutex::new(Vec::new()) })
    }

    /// Every frame since the last call. A marker sent from each CPU and seen on
    /// arrival proves that what was sent before it has arrived as well.
    pub fn frames(&self) -> Result<Vec<Frame>> {
        let mut frames = std::mem::take(&mut *self.seen.lock().expect("sniffer"));
        let nonce = self.nonce.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        let mut markers = self.send_markers(&nonce)?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while markers > 0 {
            match self.next(deadline)? {
                Some(Frame::Marker(bytes)) if bytes.starts_with(&nonce) => markers -= 1,
                Some(Frame::Marker(_)) => {}
                Some(frame) => frames.push(frame),
                None => bail!("the sniffer does not see its own marker"),
            }
        }
        self.check_drops()?;
        Ok(frames)
    }

    /// Waits until a frame arrives that `wanted` accepts; keeps all it saw for
    /// the next [`Sniffer::frames`].
    pub fn wait_for(&self, within: Duration, wanted: impl Fn(&Frame) -> bool) -> Result<Option<Frame>> {
        let deadline = Instant::now() + within;
        loop {
            match self.next(deadline)? {
                Some(Frame::Marker(_)) => {}
                Some(frame) => {
                    self.seen.lock().expect("sniffer").push(frame.clone());
                    if wanted(&frame) {
                        return Ok(Some(frame));
                    }
                }
                None => return Ok(None),
            }
        }
    }

    /// Waits until nothing has arrived for `quiet`.
    pub fn settle(&self, quiet: Duration) -> Result<()> {
        let limit = Instant::now() + Duration::from_secs(10);
        while self.next(Instant::now() + quiet)?.is_some() {
            ensure!(Instant::now() < limit, "the wire does not become quiet");
        }
        Ok(())
    }

    fn next(&self, deadline: Instant) -> Result<Option<Frame>> {
        let mut bytes = [0u8; SNAP_BYTES];
        loop {
            // SAFETY: the buffer outlives the call and its size is passed.
            let n = unsafe {
                libc::recv(
                    self.receive.as_raw_fd(),
                    bytes.as_mut_ptr().cast(),
                    SNAP_BYTES,
                    libc::MSG_DONTWAIT,
                )
            };
            if n >= 0 {
                return Ok(Some(Frame::parse(&bytes[..n as usize])));
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EAGAIN) => {}
                Some(libc::EINTR) => continue,
                _ => return Err(error).context("sniffer: recv"),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let mut poll = libc::pollfd { fd: self.receive.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid pollfd.
            if unsafe { libc::poll(&mut poll, 1, left.as_millis() as libc::c_int) } == 0 {
                return Ok(None);
            }
        }
    }

    fn send_markers(&self, nonce: &[u8]) -> Result<usize> {
        let mut frame = vec![0xff; 6];
        frame.extend([2, 0x4d, 0x43, 0x50, 0, 9]);
        frame.extend(MARKER_ETHERTYPE.to_be_bytes());
        frame.extend(nonce);
        frame.resize(60, 0);
        // veth queues a frame on the sending CPU: order holds per CPU only.
        let me = Pid::from_raw(0);
        let all = sched_getaffinity(me)?;
        let mut sent = 0;
        for cpu in (0..CpuSet::count()).filter(|c| all.is_set(*c).unwrap_or(false)) {
            let mut one = CpuSet::new();
            one.set(cpu)?;
            sched_setaffinity(me, &one)?;
            // SAFETY: the frame outlives the call and its size is passed.
            let n = unsafe { libc::send(self.mark.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
            ensure!(n as usize == frame.len(), "cannot send a marker: {}", io::Error::last_os_error());
            sent += 1;
        }
        sched_setaffinity(me, &all)?;
        Ok(sent)
    }

    fn check_drops(&self) -> Result<()> {
        let mut stats = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut len = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        // SAFETY: `stats` is the structure that PACKET_STATISTICS fills.
        let rc = unsafe {
            libc::getsockopt(
                self.receive.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut stats).cast(),
                &mut len,
            )
        };
        ensure!(rc == 0, "PACKET_STATISTICS: {}", io::Error::last_os_error());
        ensure!(stats.tp_drops == 0, "the sniffer lost {} frames: it proves nothing", stats.tp_drops);
        Ok(())
    }
}

/// Bound to the wire; protocol 0 receives nothing.
fn packet_socket(protocol: u16) -> Result<OwnedFd> {
    // SAFETY: a plain system call.
    let raw = unsafe {
        libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            libc::c_int::from(protocol.to_be()),
        )
    };
    ensure!(raw >= 0, "AF_PACKET socket: {}", io::Error::last_os_error());
    // SAFETY: a fresh descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: all-zero is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = nix::net::if_::if_nametoindex(LINK)? as i32;
    // SAFETY: the address outlives the call and its size is passed.
    let rc = unsafe {
        libc::bind(
            fd.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    ensure!(rc == 0, "bind AF_PACKET: {}", io::Error::last_os_error());
    Ok(fd)
}

fn set(fd: &OwnedFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> Result<()> {
    // SAFETY: an int option, passed with its size.
    let rc = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    ensure!(rc == 0, "setsockopt {option}: {}", io::Error::last_os_error());
    Ok(())
}
