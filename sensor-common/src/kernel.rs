//! Where the fields of kernel structures lie, and the few words that switch
//! the programs. Offsets come from `/sys/kernel/btf/vmlinux` at start, since
//! Rust emits no CO-RE relocations.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Byte offsets, all within the structure that the first part names.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Offsets {
    pub task_tgid: u32,
    pub task_signal: u32,
    pub task_real_parent: u32,
    pub task_mm: u32,
    pub task_nsproxy: u32,
    pub task_cred: u32,
    pub task_files: u32,
    pub task_cgroups: u32,
    pub task_exit_code: u32,
    pub signal_live: u32,
    pub mm_arg_start: u32,
    pub mm_arg_end: u32,
    pub mm_exe_file: u32,
    pub file_path: u32,
    pub file_inode: u32,
    pub file_private_data: u32,
    pub path_mnt: u32,
    pub path_dentry: u32,
    pub dentry_name: u32,
    pub dentry_parent: u32,
    pub dentry_inode: u32,
    pub mount_mnt: u32,
    pub mount_parent: u32,
    pub mount_mountpoint: u32,
    pub vfsmount_root: u32,
    pub nsproxy_net: u32,
    pub net_cookie: u32,
    pub cred_cap_permitted: u32,
    pub css_set_dfl_cgrp: u32,
    /// `css_set.subsys[pids_cgrp_id]`, the cgroup v1 (or v2) of the pids
    /// controller: containers on hybrid hosts have no other. 0: none.
    pub css_set_pids: u32,
    pub css_cgroup: u32,
    pub cgroup_kn: u32,
    pub kernfs_name: u32,
    pub kernfs_parent: u32,
    pub files_fdt: u32,
    pub fdtable_max_fds: u32,
    pub fdtable_fd: u32,
    pub inode_mode: u32,
    pub inode_ino: u32,
    pub inode_sb: u32,
    pub inode_size: u32,
    pub inode_ctime_sec: u32,
    pub inode_ctime_nsec: u32,
    pub sb_dev: u32,
    pub socket_sk: u32,
    pub sock_family: u32,
    pub sock_cookie: u32,
    pub sock_type: u32,
    pub sock_socket: u32,
    pub sock_daddr: u32,
    pub sock_dport: u32,
    pub sock_v6_daddr: u32,
    /// `bpf_sock_addr_kern`; the length came with Linux 6.7 (0: not there).
    pub sock_addr_uaddr: u32,
    pub sock_addr_uaddrlen: u32,
    /// `thread_info.status` within the task: the 32-bit interface's mark.
    pub task_status: u32,
    pub kiocb_filp: u32,
    pub socket_file: u32,
    pub msghdr_iter: u32,
    pub msghdr_flags: u32,
    pub iter_type: u32,
    pub iter_offset: u32,
    /// `ubuf`, or the array of segments.
    pub iter_data: u32,
    pub iter_segments: u32,
    /// Values of `enum iter_type`; `u32::MAX`: the kernel has none.
    pub iter_ubuf: u32,
    pub iter_iovec: u32,
    pub uring_file: u32,
    pub uring_opcode: u32,
    /// Parameters of the tracepoint `io_uring_complete`, which lost two when it
    /// came to pass a `struct io_uring_cqe *` (Linux 6.16).
    pub uring_complete_args: u32,
    /// Of unix sockets: who is at the other end, and the name it is bound to.
    pub unix_peer: u32,
    pub unix_addr: u32,
    pub unix_address_len: u32,
    pub unix_address_name: u32,
    /// The task that called listen().
    pub sock_peer_pid: u32,
    /// `pid.tasks[PIDTYPE_TGID]`, and the number in the first namespace.
    pub pid_task: u32,
    pub pid_number: u32,
    pub sb_magic: u32,
    pub vfsmount_sb: u32,
    /// Not an offset: where the sensor's cgroup is in the tree of cgroup v2 (0:
    /// the root), and its id. Programs elsewhere are nobody's candidates.
    pub scope_level: u32,
    pub scope: u64,
}

/// The one entry of the state map: what the agent writes and the programs read.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct State {
    /// The policy in force. 0: none yet; labelled tasks are denied.
    pub generation: u32,
    /// 1: the policy matches by cgroup, so that exec looks at it.
    pub cgroup_rules: u32,
    /// Accepted connections that nobody has taken yet, see `socket::Tuple`.
    pub queued: u32,
    /// 1: programs that nobody declared are looked at, see `stdio::Candidate`.
    pub candidates: u32,
    /// 1: some instance is in quarantine.
    pub quarantined: u32,
}

/// The one entry of another map: what the programs write. Apart, since a map's
/// value is written whole: the agent would undo what they count meanwhile.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Counts {
    /// 1: there are inherited sockets that no packet has shown yet.
    pub inherited: u64,
    /// Next instance number; the agent's own have the top bit set.
    pub next_instance: u64,
    /// Next number of a connection over stdio.
    pub next_connection: u64,
    /// HTTP requests to undeclared programs that were not looked at, see `listener`.
    pub looks_missed: u64,
}

/// Two counters for each server.
pub const VERDICTS_OF_ENTRIES: u32 = 2 * crate::policy::MAX_SERVERS;

/// Where denials of a server are counted; those in audit apart. The first two
/// are of no server.
#[inline(always)]
pub const fn verdicts_of(server: u16, verdict: u8) -> u32 {
    2 * server as u32 + (verdict == crate::record::VERDICT_WOULD_DENY) as u32
}

/// Set in the instance numbers that user space gives out.
pub const INSTANCE_BY_AGENT: u32 = 1 << 31;

/// Thread group ids never reach this (`PID_MAX_LIMIT`, linux/threads.h).
pub const PID_LIMIT: u32 = 4 * 1024 * 1024;

/// Repeats of one denial.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Denial {
    pub count: u64,
    /// How many of them went into the ring as records.
    pub sent: u64,
}

const _: () = {
    assert!(size_of::<Offsets>() == 320);
    assert!(size_of::<State>() == 20);
};
