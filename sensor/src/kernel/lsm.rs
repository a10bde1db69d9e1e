//! Programs on hooks of BPF LSM, where the kernel has it: tried at every start,
//! never needed for one.

use super::load::chain;
use super::maps::{MapsError, Shared, second};
use super::sys;
use aya::maps::Array;
use aya::programs::Program;
use aya::{Btf, Ebpf};
use sensor_common::access::Agent;
use std::os::fd::{AsFd as _, OwnedFd};

/// What is enforced together, and what is not where one of its programs fails.
pub(super) struct Group {
    pub name: &'static str,
    pub without: &'static str,
    /// The program, and the kernel's name for the hook it belongs on.
    programs: &'static [(&'static str, &'static str)],
}

/// Whoever judges unix sockets by it needs no cgroup hook for them.
pub(super) const UNIX: &str = "lsm_unix";

pub(super) const GROUPS: [Group; 6] = [
    Group {
        name: UNIX,
        without: "unix sockets are not judged by what is reached",
        // A socket has its owner before anybody is judged by it.
        programs: &[
            ("unix_made", "socket_post_create"),
            ("unix_reached", "unix_stream_connect"),
            ("unix_sent", "unix_may_send"),
        ],
    },
    Group {
        name: "lsm_family",
        without: "packet, vsock, netlink and other families of sockets are not refused",
        programs: &[("family", "socket_create")],
    },
    Group {
        name: "lsm_ptrace",
        without: "other processes are not closed to ptrace, process_vm_readv and pidfd_getfd",
        programs: &[("ptrace", "ptrace_access_check")],
    },
    Group { name: "lsm_bpf", without: "bpf() is not refused", programs: &[(WITNESS, "bpf")] },
    Group {
        name: "lsm_kill",
        without: "servers that are root may end the sensor",
        programs: &[("kill", "task_kill")],
    },
    Group {
        name: "lsm_pins",
        without: "servers that are root may take away what the sensor keeps in bpffs",
        programs: &[
            ("unlink", "inode_unlink"),
            ("remove", "inode_rmdir"),
            ("rename", "inode_rename"),
            ("unmount", "sb_umount"),
            ("cover", "sb_mount"),
            ("move_over", "move_mount"),
        ],
    },
];

/// The program that says whether the kernel runs any.
const WITNESS: &str = "bpf";

/// A program's name and its link.
pub(super) type Link = (&'static str, OwnedFd);

/// Verifies and attaches every group, or says why not.
pub(super) fn attach(ebpf: &mut Ebpf) -> Vec<(&'static Group, Result<Vec<Link>, String>)> {
    let links: Vec<_> = match Btf::from_sys_fs().map_err(|e| chain(&e)) {
        Ok(btf) => GROUPS.iter().map(|group| links(ebpf, &btf, group)).collect(),
        Err(reason) => GROUPS.iter().map(|_| Err(reason.clone())).collect(),
    };
    let has_witness = GROUPS.iter().zip(&links).any(|(g, l)| l.is_ok() && g.programs[0].0 == WITNESS);
    let runs = if has_witness { runs(ebpf) } else { Ok(()) };
    GROUPS
        .iter()
        .zip(links)
        .map(|(group, links)| (group, links.and_then(|l| runs.clone().map(|()| l))))
        .collect()
}

fn links(ebpf: &mut Ebpf, btf: &Btf, group: &Group) -> Result<Vec<Link>, String> {
    let link = |(name, hook): &(&'static str, &'static str)| {
        let Some(Program::Lsm(program)) = ebpf.program_mut(name) else {
            return Err("not in the kernel object".to_owned());
        };
        program.load(hook, btf).map_err(|e| format!("{hook}: {}", chain(&e)))?;
        let fd = program.fd().map_err(|e| chain(&e))?;
        let link = sys::raw_tracepoint_open(fd.as_fd(), None);
        Ok((*name, link.map_err(|e| format!("{hook}: cannot attach: {e}"))?))
    };
    group.programs.iter().map(link).collect()
}

/// Writes down who the sensor is, and looks whether the kernel runs programs on
/// these hooks: they attach also where it was started without.
fn runs(ebpf: &Ebpf) -> Result<(), String> {
    let ask = || -> Result<bool, MapsError> {
        let mut map: Array<_, Shared<Agent>> = second(ebpf, "AGENT")?;
        let failed = |source| MapsError::Kind { name: "AGENT", source };
        map.set(0, Shared(Agent { tgid: std::process::id(), seen: 0 }), 0).map_err(failed)?;
        // A look-up is a call of bpf() too, which the program sees.
        map.get(&0, 0).map_err(failed)?;
        Ok(map.get(&0, 0).map_err(failed)?.0.seen == 1)
    };
    match ask() {
        Ok(true) => Ok(()),
        Ok(false) => Err("the kernel runs no BPF LSM: start it with `bpf` among its `lsm=`".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
