//! Two network namespaces and the veth pair between them. They live as long as
//! the descriptors held here: nothing is named, so nothing is left behind.
//!
//! Nothing moves on the wire by itself: no DAD, no router solicitation, no
//! link-local address, and no neighbour discovery, since both ends are NOARP
//! and have one and the same MAC address.

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns, unshare};
use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};

pub const SERVER_V4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
pub const SERVER_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1);
/// The peer, in the networks that the profile `wire` allows.
pub const ALLOWED_V4: Ipv4Addr = Ipv4Addr::new(10, 77, 1, 2);
pub const ALLOWED_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 1, 0, 0, 0, 2);
/// The same peer, where no profile allows it.
pub const DENIED_V4: Ipv4Addr = Ipv4Addr::new(10, 77, 2, 2);
pub const DENIED_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 2, 0, 0, 0, 2);

/// Name of the interface on both sides.
pub const LINK: &str = "wire0";
const MAC: &str = "02:4d:43:50:00:01";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub fn allowed(self) -> IpAddr {
        match self {
            Family::V4 => ALLOWED_V4.into(),
            Family::V6 => ALLOWED_V6.into(),
        }
    }

    pub fn denied(self) -> IpAddr {
        match self {
            Family::V4 => DENIED_V4.into(),
            Family::V6 => DENIED_V6.into(),
        }
    }

    pub fn server(self) -> IpAddr {
        match self {
            Family::V4 => SERVER_V4.into(),
            Family::V6 => SERVER_V6.into(),
        }
    }
}

/// A network namespace without a name.
pub struct Netns(OwnedFd);

impl Netns {
    pub fn new() -> Result<Netns> {
        let made = std::thread::spawn(|| -> Result<OwnedFd> {
            unshare(CloneFlags::CLONE_NEWNET).context("unshare(CLONE_NEWNET): needs root")?;
            Ok(fs::File::open("/proc/thread-self/ns/net")?.into())
        });
        Ok(Netns(made.join().expect("namespace thread")?))
    }

    /// Runs `f` on a thread inside the namespace: what it opens stays there.
    pub fn within<T: Send + 'static>(&self, f: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        let fd = self.0.try_clone()?;
        let inside = std::thread::spawn(move || {
            setns(&fd, CloneFlags::CLONE_NEWNET).context("setns")?;
            f()
        });
        inside.join().expect("thread inside the namespace")
    }

    pub fn try_clone(&self) -> Result<OwnedFd> {
        Ok(self.0.try_clone()?)
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Runs a program of iproute2 or nftables inside, fed with `input`.
    pub fn tool(&self, program: &str, args: &[&str], input: &str) -> Result<String> {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        enter(&mut command, self.try_clone()?, None);
        let mut child = command.spawn().with_context(|| format!("cannot start {program}"))?;
        child.stdin.take().expect("piped").write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("{program} {args:?}: {}\n{input}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Makes `command` join the cgroup, then the namespace, before its exec.
pub fn enter(command: &mut Command, netns: OwnedFd, cgroup: Option<OwnedFd>) {
    use std::os::unix::process::CommandExt;
    let hook = move || {
        if let Some(procs) = &cgroup {
            nix::unistd::write(procs, b"0")?;
        }
        setns(&netns, CloneFlags::CLONE_NEWNET)?;
        Ok(())
    };
    // SAFETY: between fork and exec only two system calls on descriptors that
    // the closure owns: async-signal-safe, no allocation.
    unsafe { command.pre_exec(hook) };
}

/// Written before any interface exists, so that each takes them as defaults.
const QUIET: [(&str, &str); 15] = [
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/default/dad_transmits", "0"),
    ("ipv6/conf/default/router_solicitations", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv6/conf/default/autoconf", "0"),
    ("ipv6/conf/default/addr_gen_mode", "1"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    // Group reports leave at once, so that a test sees them.
    ("ipv4/igmp_qrv", "1"),
    ("ipv4/conf/default/igmpv3_unsolicited_report_interval", "1"),
    ("ipv6/conf/default/mldv2_unsolicited_report_interval", "1"),
    // Any user may open ping sockets.
    ("ipv4/ping_group_range", "0 2147483647"),
    // TCP Fast Open on both sides, data in the first SYN, no cookie needed.
    ("ipv4/tcp_fastopen", "1543"),
    // Programs of another user may listen on any port.
    ("ipv4/ip_unprivileged_port_start", "0"),
];

pub struct Network {
    pub server: Netns,
    pub peer: Netns,
}

impl Network {
    pub fn new() -> Result<Network> {
        Network::with_arp(false)
    }

    /// With `arp`, the wire carries neighbour discovery and, once at the start,
    /// the group reports of the solicited-node addresses.
    pub fn with_arp(arp: bool) -> Result<Network> {
        let network = Network { server: Netns::new()?, peer: Netns::new()? };
        for side in [&network.server, &network.peer] {
            side.within(quieten)?;
        }
        let noarp = if arp { "on" } else { "off" };
        let server = format!(
            "link set lo up\n\
             link add {LINK} address {MAC} type veth peer name {LINK} address {peer_mac} netns {peer}\n\
             link set {LINK} arp {noarp}\n\
             addr add {SERVER_V4}/16 broadcast 10.77.255.255 dev {LINK}\n\
             addr add {SERVER_V6}/48 dev {LINK} nodad\n\
             link set {LINK} up\n",
            peer_mac = if arp { "02:4d:43:50:00:02" } else { MAC },
            peer = network.peer.path(),
        );
        network.server.tool("ip", &["-batch", "-"], &server)?;
        let peer = format!(
            "link set lo up\n\
             link set {LINK} arp {noarp}\n\
             addr add {ALLOWED_V4}/16 dev {LINK}\n\
             addr add {DENIED_V4}/16 dev {LINK}\n\
             addr add {ALLOWED_V6}/48 dev {LINK} nodad\n\
             addr add {DENIED_V6}/48 dev {LINK} nodad\n\
             link set {LINK} up\n"
        );
        network.peer.tool("ip", &["-batch", "-"], &peer)?;
        // Whatever is not on the link goes to the peer too: no address is
        // unreachable, so none is "blocked" for want of a route.
        let routes = format!(
            "route add default via {DENIED_V4} dev {LINK}\nroute add default via {DENIED_V6} dev {LINK}\n"
        );
        network.server.tool("ip", &["-batch", "-"], &routes)?;
        Ok(network)
    }
}

/// Networks for documentation (RFC 5737, RFC 3849): public, as far as anybody
/// who judges addresses can tell.
const PUBLIC: [&str; 4] = ["198.51.100.0/24", "203.0.113.0/24", "192.0.2.0/24", "2001:db8::/32"];

impl Network {
    /// The peer has every public address, and those of `more`.
    pub fn with_public_addresses(more: &[&str]) -> Result<Network> {
        let network = Network::new()?;
        let routes: String =
            PUBLIC.iter().chain(more).map(|net| format!("route add local {net} dev lo\n")).collect();
        network.peer.tool("ip", &["-batch", "-"], &routes)?;
        Ok(network)
    }
}

fn quieten() -> Result<()> {
    for (name, value) in QUIET {
        let path = format!("/proc/sys/net/{name}");
        fs::write(&path, value).with_context(|| format!("cannot set {path} to {value}"))?;
    }
    Ok(())
}
