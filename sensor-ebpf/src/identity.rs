//! Verified files. A rule that names a hash asks for the file that runs, not for
//! its path: the agent compares a file's content with the hash beforehand and
//! writes down what the kernel knows of the inode.

use crate::kernel::{self, offset, pointer, read};
use crate::label;
use aya_ebpf::macros::{map, raw_tracepoint};
use aya_ebpf::maps::{Array, HashMap};
use aya_ebpf::programs::RawTracePointContext;
use sensor_common::identity::{FileId, IdentityKey, MAX_IDENTITIES};
use sensor_common::label::Label;
use sensor_common::policy::{SERVER_HASHED, Server};
use sensor_common::record::INSTANCE_HASHED;

#[map]
static IDENTITIES: HashMap<IdentityKey, u8> = HashMap::with_max_entries(MAX_IDENTITIES, 0);

/// What [`identify`] found.
#[map]
static IDENTIFIED: Array<FileId> = Array::with_max_entries(1, 0);

/// The executable of a task. False: it cannot be read, and `key.file` is no
/// file's.
#[inline(always)]
pub(crate) fn of_task(task: u64, key: &mut IdentityKey) -> bool {
    let file = pointer(task, offset!(task_mm)).and_then(|mm| pointer(mm, offset!(mm_exe_file)));
    match file.and_then(of_file) {
        Some(id) => {
            key.file = id;
            true
        }
        None => {
            key.file = NOBODY;
            false
        }
    }
}

const NOBODY: FileId = FileId { ino: 0, ctime_sec: 0, size: 0, ctime_nsec: 0, dev: 0 };

#[inline(always)]
fn of_file(file: u64) -> Option<FileId> {
    let inode = pointer(file, offset!(file_inode))?;
    let sb = pointer(inode, offset!(inode_sb))?;
    Some(FileId {
        ino: read(inode, offset!(inode_ino))?,
        ctime_sec: read(inode, offset!(inode_ctime_sec))?,
        size: read(inode, offset!(inode_size))?,
        ctime_nsec: read::<u32>(inode, offset!(inode_ctime_nsec))? & FileId::NSEC_MASK,
        dev: read(sb, offset!(sb_dev))?,
    })
}

#[inline(always)]
pub(crate) fn is_verified(key: &IdentityKey) -> bool {
    // SAFETY: only the presence of the entry matters.
    key.file.ino != 0 && unsafe { IDENTITIES.get(key) }.is_some()
}

/// A rule with a hash began the label's instance, and under this policy nobody
/// has verified its file. What is not known of an instance counts as that.
#[inline(always)]
pub(crate) fn unverified(generation: u32, server: &Server, label: Label) -> bool {
    // SAFETY: plain integers, both ways.
    server.flags & SERVER_HASHED != 0 && unsafe { is_unverified(generation as u64, label.0) } != 0
}

/// As [`unverified`], of a label whose server has rules with a hash.
#[inline(always)]
pub(crate) fn is_unverified_now(label: Label) -> bool {
    // SAFETY: plain integers, both ways.
    unsafe { is_unverified(kernel::generation() as u64, label.0) != 0 }
}

/// A global function, which the verifier looks at once: nearly every program
/// asks.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn is_unverified(generation: u64, label: u64) -> u64 {
    let (generation, label) = (generation as u32, Label(label));
    let Some(i) = label::instance(label.instance()) else { return 1 };
    // SAFETY: map value; aligned words.
    unsafe {
        if (*i).flags & INSTANCE_HASHED == 0 || (*i).verified == generation {
            return 0;
        }
        let key = IdentityKey { file: (*i).file, generation, server: label.server() as u32 };
        if !is_verified(&key) {
            return 1;
        }
        (*i).verified = generation;
    }
    0
}

/// Run by the agent itself (BPF_PROG_TEST_RUN), never attached: what the kernel
/// knows of the file behind the caller's descriptor. stat(2) would not do:
/// btrfs and overlayfs show it other numbers than those of the inode.
#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub fn identify(ctx: RawTracePointContext) -> i32 {
    let number: u64 = ctx.arg::<u64>(0);
    let Some(found) = IDENTIFIED.get_ptr_mut(0) else { return 0 };
    let id = descriptor(number).and_then(of_file);
    // SAFETY: the agent makes one call at a time.
    unsafe {
        *found = match id {
            Some(id) => id,
            None => NOBODY,
        }
    };
    0
}

#[inline(always)]
fn descriptor(number: u64) -> Option<u64> {
    let table =
        pointer(kernel::current(), offset!(task_files)).and_then(|f| pointer(f, offset!(files_fdt)))?;
    if number >= read::<u32>(table, offset!(fdtable_max_fds))? as u64 {
        return None;
    }
    let files = pointer(table, offset!(fdtable_fd))?;
    pointer(files, number * 8)
}
