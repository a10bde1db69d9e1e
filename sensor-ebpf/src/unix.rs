//! Unix sockets that a labelled task connects or sends to. Where the kernel has
//! BPF LSM, judged by the socket that is reached (`reached`). Where not, from
//! Linux 6.7 on by the name that connect() or sendmsg() gives: a name is not an
//! inode, and an alias of a refused socket passes the default list; `strict`
//! names what may be reached and refuses the rest.

mod reached;

use crate::kernel::offset;
use crate::record::{self, Task};
use crate::verdict::{count, take_token};
use crate::{identity, kernel, label, policy};
use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::{bpf_get_current_comm, bpf_probe_read_kernel};
use aya_ebpf::macros::{cgroup_sock_addr, map};
use aya_ebpf::maps::{LpmTrie, lpm_trie::Key};
use aya_ebpf::programs::SockAddrContext;
use sensor_common::label::Label;
use sensor_common::policy::{MODE_AUDIT, Reason, SERVER_UNKNOWN, Server, UNIX_OPEN, UNIX_STRICT};
use sensor_common::record::{
    COMM_BYTES, Hook, KIND_UNIX, RING_VERDICTS, UnixVerdict, VERDICT_DENY, VERDICT_WOULD_DENY,
};
use sensor_common::unix::{MAX_UNIX_RULES, PATH_BYTES, POWER, UNIX_SCOPE_BITS, UnixRule};

#[repr(C)]
#[derive(Clone, Copy)]
pub struct UnixName {
    generation: u32,
    profile: u32,
    path: [u8; PATH_BYTES],
}

#[map]
static UNIX: LpmTrie<UnixName, UnixRule> = LpmTrie::with_max_entries(2 * MAX_UNIX_RULES, 0);

// Loaded by the agent with the attach types of cgroup/unix, which the section
// names cannot say.
#[cgroup_sock_addr(connect4)]
pub fn unix_connect(ctx: SockAddrContext) -> i32 {
    judge_unix(|| name(&ctx), Owner::Unknown, Hook::UnixConnect)
}

#[cgroup_sock_addr(sendmsg4)]
pub fn unix_sendmsg(ctx: SockAddrContext) -> i32 {
    judge_unix(|| name(&ctx), Owner::Unknown, Hook::UnixSendmsg)
}

/// Who made the socket that is reached.
#[derive(Clone, Copy)]
enum Owner {
    /// The hook sees its name only.
    Unknown,
    /// The instance itself.
    Own,
    Another,
}

/// As a cgroup hook: 0 refuses.
#[inline(always)]
fn judge_unix(name: impl FnOnce() -> Option<Key<UnixName>>, owner: Owner, hook: Hook) -> i32 {
    let label = label::of_current();
    if !label.is_some() {
        return 1;
    }
    let generation = kernel::generation();
    let Some(server) = policy::server(generation, label.server()) else {
        return conclude(label, hook, Reason::NoPolicy, false, None);
    };
    let profile = policy::profile_of(server, label);
    // What is not verified, `unknown` must allow as well.
    let mut unknown = None;
    if identity::unverified(generation, server, label) {
        unknown = policy::server(generation, SERVER_UNKNOWN);
        if unknown.is_none() {
            return conclude(label, hook, Reason::NoPolicy, false, None);
        }
    }
    let unknown_is_open = match unknown {
        Some(unknown) => is_open(generation, unknown, unknown.profile),
        None => true,
    };
    let open = is_open(generation, server, profile);
    if open && unknown_is_open {
        return 1;
    }
    let audit = server.mode == MODE_AUDIT
        && match unknown {
            Some(unknown) => unknown.mode == MODE_AUDIT,
            None => true,
        };
    let Some(mut key) = name() else {
        return conclude(label, hook, Reason::Malformed, audit, None);
    };
    key.data.generation = generation.to_be();
    if !open && let Some(reason) = refused(&mut key, server, profile, owner) {
        return conclude(label, hook, reason, audit, Some(&key.data.path));
    }
    if !unknown_is_open
        && let Some(unknown) = unknown
        && refused(&mut key, unknown, unknown.profile, owner).is_some()
    {
        return conclude(label, hook, Reason::Unverified, audit, Some(&key.data.path));
    }
    1
}

/// No name is looked at.
#[inline(always)]
fn is_open(generation: u32, server: &Server, profile: u16) -> bool {
    server.unix == UNIX_OPEN || (server.unix != UNIX_STRICT && policy::is_unrestricted(generation, profile))
}

#[inline(always)]
fn refused(key: &mut Key<UnixName>, server: &Server, profile: u16, owner: Owner) -> Option<Reason> {
    key.data.profile = (profile as u32).to_be();
    if UNIX.get(&*key).is_some() {
        return None;
    }
    if server.unix == UNIX_STRICT {
        return Some(Reason::UnixStrict);
    }
    if matches!(owner, Owner::Own) {
        return None;
    }
    key.data.profile = POWER.to_be();
    if UNIX.get(&*key).is_some() {
        return Some(Reason::UnixPath);
    }
    matches!(owner, Owner::Another).then_some(Reason::UnixForeign)
}

/// `sun_path` of the address in the kernel's copy, zero padded.
#[inline(always)]
fn name(ctx: &SockAddrContext) -> Option<Key<UnixName>> {
    // The context of these attach types shows the program no address of its
    // own; the kernel's structure behind it does.
    let kernel = ctx.as_ptr() as u64;
    let address = kernel::pointer(kernel, offset!(sock_addr_uaddr))?;
    let at = offset!(sock_addr_uaddrlen);
    if at == 0 {
        return None;
    }
    read_name(address, kernel::read(kernel, at)?)
}

/// Offset of `sun_path`.
const SUN_PATH: u32 = 2;

/// The name in a kernel's `sockaddr_un` of `len` bytes, zero padded.
#[inline(always)]
fn read_name(address: u64, len: u32) -> Option<Key<UnixName>> {
    // What lies beyond the length that was given is not part of the name.
    let len = len.saturating_sub(SUN_PATH).min(PATH_BYTES as u32);
    let mut key = Key::new(
        UNIX_SCOPE_BITS + 8 * PATH_BYTES as u32,
        UnixName { generation: 0, profile: 0, path: [0; PATH_BYTES] },
    );
    // SAFETY: PATH_BYTES bytes are there; the kernel checks what it reads.
    let failed = unsafe {
        bpf_probe_read_kernel((&raw mut key.data.path).cast(), len, (address + SUN_PATH as u64) as *const _)
    };
    if failed != 0 {
        return None;
    }
    Some(key)
}

#[inline(always)]
fn conclude(label: Label, hook: Hook, reason: Reason, audit: bool, path: Option<&[u8; PATH_BYTES]>) -> i32 {
    let verdict = if audit { VERDICT_WOULD_DENY } else { VERDICT_DENY };
    count(label.server(), verdict);
    if take_token(label, true) {
        record::emit_of::<UnixVerdict>(RING_VERDICTS, KIND_UNIX, label, Task::current(), |r| {
            r.rule = 0;
            r.reason = reason as u8;
            r.verdict = verdict;
            r.hook = hook as u8;
            r._pad = 0;
            r.path_len = PATH_BYTES as u32;
            match path {
                Some(path) => r.path = *path,
                None => r.path = [0; PATH_BYTES],
            }
            r.comm = [0; COMM_BYTES];
            // SAFETY: 16 bytes are there.
            unsafe { bpf_get_current_comm(r.comm.as_mut_ptr().cast(), COMM_BYTES as u32) };
        });
    }
    audit as i32
}
