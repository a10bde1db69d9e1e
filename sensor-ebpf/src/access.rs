//! What a labelled task may not do beyond the network, where the kernel has BPF
//! LSM: reach into processes outside its instance, call bpf(), end the sensor,
//! take away what it keeps in bpffs. Programs that the kernel refuses, or never
//! runs, are said to be not enforced.

use crate::kernel::{Typed, offset, read};
use crate::record::Task;
use crate::verdict::{self, Facts};
use crate::{label, policy};
use aya_ebpf::macros::{lsm, map};
use aya_ebpf::maps::Array;
use aya_ebpf::programs::LsmContext;
use sensor_common::access::{ATTACH, Agent, COVER, READ, RENAME, UNLINK, UNMOUNT, may_make};
use sensor_common::label::Label;
use sensor_common::policy::Reason;
use sensor_common::record::Hook;

/// The sensor itself.
#[map]
static AGENT: Array<Agent> = Array::with_max_entries(1, 0);

/// From what a cgroup hook returns to what a hook of LSM does: −EPERM, or 0.
#[inline(always)]
pub(crate) fn answer(go_on: i32) -> i32 {
    let mut errno: u64 = 0;
    if go_on == 0 {
        // The verifier wants to see the number (since Linux 6.12); the compiler
        // would negate a flag.
        // SAFETY: one instruction on a register.
        unsafe { core::arch::asm!("{0} = -1", out(reg) errno, options(nomem, nostack, preserves_flags)) };
    }
    errno as i32
}

#[inline(always)]
fn refuse(label: Label, hook: Hook, what: u16, target: u32, reason: Reason) -> i32 {
    let mut facts = Facts::of(label, hook, Task::current());
    facts.key.port = what;
    facts.key.addr[0] = target;
    answer(verdict::refuse(&mut facts, reason))
}

/// `socket_create(int family, int type, int protocol, int kern)`: cgroup hooks
/// see IP only.
#[lsm(hook = "socket_create")]
pub fn family(ctx: LsmContext) -> i32 {
    let label = label::of_current();
    let (family, kind, protocol) = (ctx.arg::<u32>(0), ctx.arg::<u32>(1), ctx.arg::<u32>(2));
    // The kernel's own, on the way of a call that was judged: kern.
    if !label.is_some() || ctx.arg::<u32>(3) != 0 || may_make(family, protocol) || policy::unrestricted(label)
    {
        return 0;
    }
    let mut facts = Facts::of(label, Hook::Socket, Task::current());
    facts.key.protocol = protocol as u8;
    facts.key.addr[0] = family;
    facts.family = family as u16;
    facts.kind = kind as u16;
    answer(verdict::refuse(&mut facts, Reason::SocketFamily))
}

/// `ptrace_access_check(struct task_struct *child, unsigned int mode)`: also of
/// process_vm_readv, pidfd_getfd, and most of `/proc/PID`.
#[lsm(hook = "ptrace_access_check")]
pub fn ptrace(ctx: LsmContext) -> i32 {
    /// linux/ptrace.h
    const MODE_ATTACH: u32 = 2;
    const MODE_NOAUDIT: u32 = 4;
    let label = label::of_current();
    if !label.is_some() {
        return 0;
    }
    let task = Task::current();
    let target: u32 = Typed::at(ctx.arg(0)).field(offset!(task_tgid));
    let its = label::of(target);
    let own = target == task.tgid || (its.is_some() && its.instance() == label.instance());
    if own || policy::unrestricted(label) {
        return 0;
    }
    let mode: u32 = ctx.arg(1);
    if mode & MODE_NOAUDIT != 0 {
        // Asked only for what may be shown: `ps` does so of every process.
        return answer(verdict::in_audit(label) as i32);
    }
    let what = if mode & MODE_ATTACH != 0 { ATTACH } else { READ };
    refuse(label, Hook::Ptrace, what, target, Reason::OtherProcess)
}

/// `bpf(int cmd, union bpf_attr *attr, unsigned int size)`
#[lsm(hook = "bpf")]
pub fn bpf(ctx: LsmContext) -> i32 {
    let label = label::of_current();
    if !label.is_some() {
        witness();
        return 0;
    }
    refuse(label, Hook::Bpf, ctx.arg::<u32>(0) as u16, 0, Reason::Bpf)
}

/// The agent's own call shows that the kernel runs these programs.
#[inline(always)]
fn witness() {
    let Some(agent) = AGENT.get_ptr_mut(0) else { return };
    // SAFETY: map value; aligned words.
    unsafe {
        if (*agent).seen == 0 && (*agent).tgid == Task::current().tgid {
            (*agent).seen = 1;
        }
    }
}

/// `task_kill(struct task_struct *p, struct kernel_siginfo *info, int sig, …)`
#[lsm(hook = "task_kill")]
pub fn kill(ctx: LsmContext) -> i32 {
    let label = label::of_current();
    let signal: u32 = ctx.arg(2);
    // Signal 0 asks whether it is there.
    if !label.is_some() || signal == 0 {
        return 0;
    }
    let target: u32 = Typed::at(ctx.arg(0)).field(offset!(task_tgid));
    match AGENT.get(0) {
        Some(agent) if agent.tgid == target && !label::of(target).is_some() => {
            refuse(label, Hook::Kill, signal as u16, target, Reason::Sensor)
        }
        _ => 0,
    }
}

/// `inode_unlink(struct inode *dir, struct dentry *dentry)`
#[lsm(hook = "inode_unlink")]
pub fn unlink(ctx: LsmContext) -> i32 {
    pins(superblock_of_inode(ctx.arg(0)), UNLINK)
}

/// `inode_rename(struct inode *old_dir, struct dentry *old, …)`
#[lsm(hook = "inode_rename")]
pub fn rename(ctx: LsmContext) -> i32 {
    pins(superblock_of_inode(ctx.arg(0)), RENAME)
}

/// `inode_rmdir(struct inode *dir, struct dentry *dentry)`
#[lsm(hook = "inode_rmdir")]
pub fn remove(ctx: LsmContext) -> i32 {
    pins(superblock_of_inode(ctx.arg(0)), UNLINK)
}

/// `sb_umount(struct vfsmount *mnt, int flags)`
#[lsm(hook = "sb_umount")]
pub fn unmount(ctx: LsmContext) -> i32 {
    pins(read(ctx.arg(0), offset!(vfsmount_sb)), UNMOUNT)
}

/// `sb_mount(const char *dev, const struct path *path, …)`
#[lsm(hook = "sb_mount")]
pub fn cover(ctx: LsmContext) -> i32 {
    pins(superblock_of_path(ctx.arg(1)), COVER)
}

/// `move_mount(const struct path *from, const struct path *to)`
#[lsm(hook = "move_mount")]
pub fn move_over(ctx: LsmContext) -> i32 {
    let from = superblock_of_path(ctx.arg(0));
    let moved = pins(from, UNMOUNT);
    if moved != 0 { moved } else { pins(superblock_of_path(ctx.arg(1)), COVER) }
}

#[inline(always)]
fn superblock_of_inode(inode: u64) -> Option<u64> {
    read(inode, offset!(inode_sb))
}

#[inline(always)]
fn superblock_of_path(path: u64) -> Option<u64> {
    read(read(path, offset!(path_mnt))?, offset!(vfsmount_sb))
}

/// A labelled task takes nothing out of any bpffs, and hides none.
#[inline(always)]
fn pins(superblock: Option<u64>, what: u16) -> i32 {
    const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
    let label = label::of_current();
    if !label.is_some() {
        return 0;
    }
    match superblock.and_then(|sb| read::<u64>(sb, offset!(sb_magic))) {
        Some(BPF_FS_MAGIC) => refuse(label, Hook::Pins, what, 0, Reason::Sensor),
        _ => 0,
    }
}
