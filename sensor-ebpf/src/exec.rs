//! Recognising a server at exec, before the first instruction of the program:
//! by the executable's path, by its arguments, by its cgroup.

use crate::kernel::{self, offset, pointer, read};
use crate::record::{self, Task};
use crate::verdict::take_token;
use crate::{atomic, identity, label, policy, socket, stdio};
use aya_ebpf::helpers::generated::{
    bpf_get_current_comm, bpf_loop, bpf_probe_read_kernel, bpf_probe_read_kernel_str, bpf_probe_read_user,
};
use aya_ebpf::macros::{map, raw_tracepoint};
use aya_ebpf::maps::{LpmTrie, PerCpuArray, lpm_trie::Key};
use aya_ebpf::programs::RawTracePointContext;
use core::ffi::c_void;
use sensor_common::exec::{
    ARGV_BYTES, EXEC_SCOPE_BITS, ExecRule, KEY_BYTES, KIND_ARG, KIND_CGROUP, KIND_EXE, KIND_MODULE,
    KIND_PACKAGE, KIND_SCRIPT, KIND_SCRIPT_PATH, KIND_WORD, MAX_EXEC_KEYS, Match, Scan, Step,
};
use sensor_common::identity::IdentityKey;
use sensor_common::label::{Label, ROLE_LAUNCHER, ROLE_SERVER, on_exec};
use sensor_common::policy::SERVER_LAUNCHES;
use sensor_common::record::{
    ARGV_SAMPLE, COMM_BYTES, EXE_BYTES, EXEC_MOVED, EXEC_NEW_INSTANCE, EXEC_ROLE_CHANGED, EXEC_UNVERIFIED,
    Exec, INSTANCE_HASHED, INSTANCE_NET_ADMIN, Instance, KIND_EXEC, Loss, RING_TELEMETRY, RING_VERDICTS,
};

#[repr(C)]
#[derive(Clone, Copy)]
pub struct ExecText {
    generation: u32,
    kind: u8,
    bytes: [u8; KEY_BYTES],
}

#[map]
static EXEC_RULES: LpmTrie<ExecText, ExecRule> = LpmTrie::with_max_entries(MAX_EXEC_KEYS, 0);

/// One directory or file name of a path.
const NAME_BYTES: usize = 128;

/// Working memory of one exec; the tracepoint runs with preemption off.
#[repr(C)]
pub struct Work {
    argv: [u8; ARGV_BYTES + EXE_BYTES],
    path: [u8; EXE_BYTES + NAME_BYTES],
    name: [u8; EXE_BYTES],
    key: Key<ExecText>,
    scan: Scan,
    found: Match,
    generation: u32,
    argv_len: u32,
    path_len: u32,
    word_seen: u32,
    label: Label,
    /// The executable, looked at where a rule names a hash.
    file: IdentityKey,
    dentry: u64,
    mount: u64,
    node: u64,
    fds: u64,
    argv_beyond: u64,
}

#[map]
static WORK: PerCpuArray<Work> = PerCpuArray::with_max_entries(1, 0);

/// `sched_process_exec(task, old_pid, bprm)` (fs/exec.c, `exec_binprm`): the new
/// image is in place, close-on-exec is done, nothing of it has run.
#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub fn exec(_ctx: RawTracePointContext) -> i32 {
    let task = Task::current();
    let current = label::of(task.tgid);
    let generation = kernel::generation();
    if generation == 0 {
        return 0;
    }
    let launches = match policy::server(generation, current.server()) {
        // What is not verified may start only what `unknown` may: nothing.
        Some(server) if current.is_some() => {
            server.flags & SERVER_LAUNCHES != 0 && !identity::unverified(generation, server, current)
        }
        _ => false,
    };
    let Some(work) = WORK.get_ptr_mut(0) else { return 0 };
    // SAFETY: this CPU's alone while the tracepoint runs.
    let work = unsafe { &mut *work };
    work.generation = generation;
    // A server that may launch nothing keeps its label whatever it runs.
    let settled = current.is_some() && !current.is_launcher() && !launches;
    describe(work);
    if !settled {
        recognise(work);
    } else {
        work.found = Match::NONE;
    }
    let (label, begun) = relabel(work, task, current);
    stdio::executed(task, label, begun);
    0
}

type Callback = extern "C" fn(u32, *mut *mut Work) -> i64;

/// bpf_loop, which takes its context from the stack only.
#[inline(always)]
fn each(count: u32, callback: Callback, work: &mut Work) {
    let mut work: *mut Work = work;
    // SAFETY: the callback and its context outlive the call.
    unsafe { bpf_loop(count, callback as *mut c_void, (&raw mut work).cast(), 0) };
}

/// Gathers argv and the executable's path.
#[inline(always)]
fn describe(work: &mut Work) {
    work.argv_len = 0;
    work.argv_beyond = 0;
    work.path_len = 0;
    work.argv[0] = 0;
    work.path[0] = 0;
    let Some(mm) = pointer(kernel::current(), offset!(task_mm)) else {
        record::lost(Loss::ExecUnreadable, 1);
        return;
    };
    let (Some(start), Some(end)) =
        (read::<u64>(mm, offset!(mm_arg_start)), read::<u64>(mm, offset!(mm_arg_end)))
    else {
        record::lost(Loss::ExecUnreadable, 1);
        return;
    };
    let mut len = end.wrapping_sub(start);
    if len > ARGV_BYTES as u64 {
        work.argv_beyond = len - ARGV_BYTES as u64;
        len = ARGV_BYTES as u64;
    }
    // SAFETY: len ≤ ARGV_BYTES, and argv is longer by EXE_BYTES.
    let failed = unsafe { bpf_probe_read_user(work.argv.as_mut_ptr().cast(), len as u32, start as *const _) };
    if failed != 0 {
        record::lost(Loss::ExecUnreadable, 1);
        len = 0;
    }
    work.argv_len = len as u32;
    // An empty argument after the last: no rule has one, so that nothing left
    // over from another exec can complete a match.
    // SAFETY: len ≤ ARGV_BYTES < the buffer's length.
    unsafe { *work.argv.as_mut_ptr().add(len as usize & 0x1fff) = 0 };

    let Some(path) = pointer(mm, offset!(mm_exe_file)).map(|f| f + offset!(file_path)) else {
        record::lost(Loss::ExecUnreadable, 1);
        return;
    };
    work.dentry = pointer(path, offset!(path_dentry)).unwrap_or(0);
    work.mount = match pointer(path, offset!(path_mnt)) {
        Some(mnt) => mnt - offset!(mount_mnt),
        None => 0,
    };
    each(64, path_step, work);
}

/// One name of the executable's path, from the file up to the root of its
/// mount namespace.
extern "C" fn path_step(_index: u32, work: *mut *mut Work) -> i64 {
    // SAFETY: what `each` gave to bpf_loop.
    let work = unsafe { &mut **work };
    if work.dentry == 0 || work.mount == 0 {
        return 1;
    }
    let Some(parent) = pointer(work.dentry, offset!(dentry_parent)) else { return 1 };
    let root = pointer(work.mount + offset!(mount_mnt), offset!(vfsmount_root)).unwrap_or(0);
    if work.dentry == root || work.dentry == parent {
        let Some(above) = pointer(work.mount, offset!(mount_parent)) else { return 1 };
        if above == work.mount {
            return 1;
        }
        work.dentry = pointer(work.mount, offset!(mount_mountpoint)).unwrap_or(0);
        work.mount = above;
        return 0;
    }
    let Some(name) = pointer(work.dentry, offset!(dentry_name)) else { return 1 };
    let at = work.path_len as usize;
    if at >= EXE_BYTES - 1 {
        return 1; // longer than any rule's
    }
    // SAFETY: at < EXE_BYTES, and the buffer is NAME_BYTES longer.
    let n = unsafe {
        bpf_probe_read_kernel_str(work.path.as_mut_ptr().add(at).cast(), NAME_BYTES as u32, name as *const _)
    };
    if n < 2 || n > NAME_BYTES as i64 {
        return 1;
    }
    // The terminator's place; the next name or the final NUL follows.
    // SAFETY: at + n ≤ the buffer's length.
    unsafe {
        *work.path.as_mut_ptr().add(at + (n as usize - 1)) = b'/';
        let end = at + n as usize;
        if end < EXE_BYTES + NAME_BYTES {
            *work.path.as_mut_ptr().add(end) = 0;
        }
        work.path_len = end as u32;
    }
    work.dentry = parent;
    0
}

/// The rule whose key is the longest prefix of what stands at `text`.
#[inline(always)]
fn lookup(work: &mut Work, kind: u8, text: *const u8) -> Option<&'static ExecRule> {
    work.key.prefix_len = EXEC_SCOPE_BITS + 8 * KEY_BYTES as u32;
    work.key.data.generation = work.generation.to_be();
    work.key.data.kind = kind;
    // SAFETY: KEY_BYTES bytes are readable behind every text within `work`.
    let failed = unsafe {
        bpf_probe_read_kernel((&raw mut work.key.data.bytes).cast(), KEY_BYTES as u32, text.cast())
    };
    if failed != 0 {
        return None;
    }
    EXEC_RULES.get(&work.key)
}

#[inline(always)]
fn recognise(work: &mut Work) {
    work.found = Match::NONE;
    work.scan = Scan::default();
    work.word_seen = 0;
    let path = work.path.as_ptr();
    if let Some(rule) = lookup(work, KIND_EXE, path) {
        work.found.exe(rule);
    }
    let len = work.argv_len;
    each(len, argv_step, work);
    if let Some(state) = kernel::state()
        && state.cgroup_rules != 0
    {
        cgroups(work);
    }
}

/// One byte of argv.
extern "C" fn argv_step(index: u32, work: *mut *mut Work) -> i64 {
    // SAFETY: what `each` gave to bpf_loop.
    let work = unsafe { &mut **work };
    if index as usize >= ARGV_BYTES {
        return 1;
    }
    let byte = work.argv[index as usize];
    let Step::Argument { start, base, module, script } = work.scan.step(index, byte) else {
        return 0;
    };
    let (start, base, module) = (start as usize, base as usize, module as usize);
    if start >= ARGV_BYTES || base >= ARGV_BYTES || module >= ARGV_BYTES {
        return 1;
    }
    // SAFETY: each is < ARGV_BYTES, and argv is longer by EXE_BYTES.
    let (start, base, module_text) = unsafe {
        (work.argv.as_ptr().add(start), work.argv.as_ptr().add(base), work.argv.as_ptr().add(module))
    };
    if let Some(rule) = lookup(work, KIND_ARG, start) {
        work.found.other(rule);
    }
    if work.found.interpreter != 0 && script {
        if let Some(rule) = lookup(work, KIND_SCRIPT, base) {
            work.found.script(rule);
        }
        if let Some(rule) = lookup(work, KIND_SCRIPT_PATH, start) {
            work.found.script_path(rule);
        }
        if module != 0
            && let Some(rule) = lookup(work, KIND_MODULE, module_text)
        {
            work.found.other(rule);
        }
    } else if work.found.launcher_like != 0 {
        if work.found.needs_word != 0 && work.word_seen == 0 {
            work.word_seen = lookup(work, KIND_WORD, start).is_some() as u32;
        } else if let Some(rule) = lookup(work, KIND_PACKAGE, start) {
            work.found.other(rule);
        }
    }
    0
}

/// The names of the task's cgroup and those above it, in cgroup v2 and in the
/// pids hierarchy, which is where containers are on a hybrid host.
#[inline(always)]
fn cgroups(work: &mut Work) {
    let Some(set) = pointer(kernel::current(), offset!(task_cgroups)) else { return };
    if let Some(cgroup) = pointer(set, offset!(css_set_dfl_cgrp)) {
        walk(work, cgroup);
    }
    let pids = offset!(css_set_pids);
    if pids != 0
        && let Some(css) = pointer(set, pids)
        && let Some(cgroup) = pointer(css, offset!(css_cgroup))
    {
        walk(work, cgroup);
    }
}

#[inline(always)]
fn walk(work: &mut Work, cgroup: u64) {
    work.node = pointer(cgroup, offset!(cgroup_kn)).unwrap_or(0);
    each(16, cgroup_step, work);
}

extern "C" fn cgroup_step(_index: u32, work: *mut *mut Work) -> i64 {
    // SAFETY: what `each` gave to bpf_loop.
    let work = unsafe { &mut **work };
    if work.node == 0 {
        return 1;
    }
    let Some(name) = pointer(work.node, offset!(kernfs_name)) else { return 1 };
    // SAFETY: the buffer is as long.
    let n = unsafe {
        bpf_probe_read_kernel_str(work.name.as_mut_ptr().cast(), EXE_BYTES as u32, name as *const _)
    };
    if n > 1 {
        let text = work.name.as_ptr();
        if let Some(rule) = lookup(work, KIND_CGROUP, text) {
            work.found.other(rule);
        }
    }
    work.node = pointer(work.node, offset!(kernfs_parent)).unwrap_or(0);
    0
}

/// `cgroup_attach_task(cgroup, path, task, threadgroup)`
/// (kernel/cgroup/cgroup.c): a process that is moved into a unit or container
/// after its exec.
#[raw_tracepoint(tracepoint = "cgroup_attach_task")]
pub fn moved(ctx: RawTracePointContext) -> i32 {
    let (cgroup, task) = (ctx.arg::<u64>(0), ctx.arg::<u64>(2));
    let Some(state) = kernel::state() else { return 0 };
    if state.cgroup_rules == 0 {
        return 0;
    }
    let Some(tgid) = read::<u32>(task, offset!(task_tgid)) else { return 0 };
    if label::of(tgid).is_some() {
        return 0;
    }
    let Some(work) = WORK.get_ptr_mut(0) else { return 0 };
    // SAFETY: this CPU's alone while the tracepoint runs.
    let work = unsafe { &mut *work };
    work.generation = kernel::generation();
    work.found = Match::NONE;
    walk(work, cgroup);
    if work.found.server == 0 {
        return 0;
    }
    let label = Label::new(work.found.server, ROLE_SERVER, next_instance());
    let netns = kernel::netns(task);
    begin(work, label, netns, task);
    label::set(tgid, label);
    let matched = work.found.priority;
    record::emit_of::<Exec>(RING_VERDICTS, KIND_EXEC, label, Task { tgid, tid: 0, uid: 0 }, |r| {
        r.parent = 0;
        r.flags = EXEC_NEW_INSTANCE | EXEC_MOVED;
        r.netns = netns;
        r.argv_len = 0;
        r.exe_len = 0;
        r.matched = matched;
        r._pad = 0;
        r.comm = [0; COMM_BYTES];
    });
    0
}

#[inline(always)]
fn relabel(work: &mut Work, task: Task, current: Label) -> (Label, bool) {
    let found = work.found;
    let matched = if found.server != 0 {
        let role = if found.launcher_file != 0 { ROLE_LAUNCHER } else { ROLE_SERVER };
        Label::new(found.server, role, 0)
    } else {
        Label::NONE
    };
    let may_launch = current.is_some()
        && matched.is_some()
        && policy::may_launch(work.generation, current.server(), matched.server());
    let mut label = on_exec(current, matched, found.launcher_file != 0, may_launch);
    if !label.is_some() {
        return (label, false);
    }
    let netns = kernel::netns(kernel::current());
    let mut flags = 0;
    let mut begun = false;
    if label.instance() == 0 {
        label = Label::new(label.server(), label.role(), next_instance());
        flags |= EXEC_NEW_INSTANCE | begin(work, label, netns, kernel::current());
    } else if label != current {
        flags |= EXEC_ROLE_CHANGED;
    }
    if label != current {
        label::set(task.tgid, label);
    }
    if let Some(i) = label::instance(label.instance()) {
        // SAFETY: aligned words in a map value.
        unsafe {
            if (*i).netns == 0 {
                (*i).netns = netns; // an explicit launch: this is its first exec
                begun = true;
            }
            if kernel::has_net_admin(kernel::current()) {
                atomic::or(&raw mut (*i).flags, INSTANCE_NET_ADMIN);
            }
        }
    }
    report(work, task, label, netns, flags);
    (label, begun || flags & EXEC_NEW_INSTANCE != 0)
}

#[inline(always)]
fn next_instance() -> u32 {
    match kernel::counts() {
        // 0 is "not given yet".
        Some(counts) => {
            // SAFETY: an aligned word in a map value.
            let word = unsafe { &raw mut (*counts).next_instance };
            (atomic::fetch_add(word, 1) as u32 & 0x3fff_ffff) + 1
        }
        None => 0,
    }
}

#[inline(always)]
fn begin(work: &mut Work, label: Label, netns: u64, task: u64) -> u32 {
    let mut instance = Instance { netns, tasks: 1, ..instance_zeroed() };
    let mut flags = 0;
    if work.found.hashed != 0 {
        instance.flags = INSTANCE_HASHED;
        if identity::of_task(task, &mut work.file) {
            instance.file = work.file.file;
        }
        work.file.generation = work.generation;
        work.file.server = label.server() as u32;
        if identity::is_verified(&work.file) {
            instance.verified = work.generation;
        } else {
            flags = EXEC_UNVERIFIED;
        }
    }
    if !label::add_instance(label.instance(), &instance) {
        record::lost(Loss::InstancesFull, 1);
    }
    // What it inherited is its own from now on.
    let Some(table) = pointer(task, offset!(task_files)).and_then(|f| pointer(f, offset!(files_fdt))) else {
        return flags;
    };
    let max = read::<u32>(table, offset!(fdtable_max_fds)).unwrap_or(0);
    const LOOKED_AT: u32 = 1024;
    if max > LOOKED_AT {
        record::lost(Loss::InheritedUnseen, (max - LOOKED_AT) as u64);
    }
    work.fds = pointer(table, offset!(fdtable_fd)).unwrap_or(0);
    work.label = label;
    let count = if max > LOOKED_AT { LOOKED_AT } else { max };
    each(count, fd_step, work);
    flags
}

#[inline(always)]
const fn instance_zeroed() -> Instance {
    // SAFETY: every field is an integer.
    unsafe { core::mem::MaybeUninit::<Instance>::zeroed().assume_init() }
}

extern "C" fn fd_step(index: u32, work: *mut *mut Work) -> i64 {
    const S_IFMT: u16 = 0xf000;
    const S_IFSOCK: u16 = 0xc000;
    // SAFETY: what `each` gave to bpf_loop.
    let work = unsafe { &mut **work };
    if work.fds == 0 {
        return 1;
    }
    let Some(file) = pointer(work.fds, index as u64 * 8) else { return 0 };
    let mode = pointer(file, offset!(file_inode)).and_then(|i| read::<u16>(i, offset!(inode_mode)));
    if mode.unwrap_or(0) & S_IFMT != S_IFSOCK {
        return 0;
    }
    let Some(sk) = pointer(file, offset!(file_private_data)).and_then(|s| pointer(s, offset!(socket_sk)))
    else {
        return 0;
    };
    let family = read::<u16>(sk, offset!(sock_family)).unwrap_or(0);
    if family != 2 && family != 10 {
        return 0;
    }
    match read::<u64>(sk, offset!(sock_cookie)) {
        Some(cookie) if cookie != 0 => socket::note_inherited(cookie, work.label),
        _ => record::lost(Loss::InheritedUnseen, 1),
    }
    0
}

#[inline(always)]
fn report(work: &mut Work, task: Task, label: Label, netns: u64, flags: u32) {
    if work.argv_beyond != 0 {
        record::lost(Loss::ArgvTruncated, work.argv_beyond);
    }
    let ring = if flags != 0 { RING_VERDICTS } else { RING_TELEMETRY };
    if flags == 0 && !take_token(label, false) {
        return;
    }
    let parent = pointer(kernel::current(), offset!(task_real_parent))
        .and_then(|p| read::<u32>(p, offset!(task_tgid)))
        .unwrap_or(0);
    record::emit_of::<Exec>(ring, KIND_EXEC, label, task, |r| {
        r.parent = parent;
        r.flags = flags;
        r.netns = netns;
        r.argv_len = work.argv_len;
        r.exe_len = work.path_len;
        r.matched = work.found.priority;
        r._pad = 0;
        // SAFETY: each buffer of `work` is at least as long as the record's.
        unsafe {
            bpf_get_current_comm(r.comm.as_mut_ptr().cast(), COMM_BYTES as u32);
            bpf_probe_read_kernel(r.exe.as_mut_ptr().cast(), EXE_BYTES as u32, work.path.as_ptr().cast());
            bpf_probe_read_kernel(r.argv.as_mut_ptr().cast(), ARGV_SAMPLE as u32, work.argv.as_ptr().cast());
        }
    });
}
