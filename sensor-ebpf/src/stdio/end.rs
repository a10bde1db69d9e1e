//! What a descriptor of the current task leads to.

use crate::kernel::{Typed, offset, pointer, read};
use sensor_common::stdio::{TCP_WIRE, WireKey};

const S_IFMT: u16 = 0xf000;
const S_IFIFO: u16 = 0x1000;
const S_IFSOCK: u16 = 0xc000;
const AF_UNIX: u16 = 1;
pub(super) const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// What a descriptor leads to, if that can be a wire.
#[derive(Clone, Copy)]
pub(super) struct End {
    /// Or, of TCP, the socket's cookie.
    pub(super) inode: u64,
    pub(super) dev: u32,
    /// Both directions go over it.
    pub(super) socket: bool,
    /// `struct sock` of a TCP connection, else 0.
    pub(super) tcp: u64,
}

impl End {
    #[inline(always)]
    pub(super) fn key(self, direction: u32) -> WireKey {
        WireKey { inode: self.inode, dev: self.dev, direction }
    }
}

/// `struct file *` of a descriptor of the current task.
#[inline(always)]
pub(super) fn file(fd: u32) -> Option<u64> {
    let table = Typed::current().to(offset!(task_files))?.to(offset!(files_fdt))?;
    if fd >= table.field::<u32>(offset!(fdtable_max_fds)) {
        return None;
    }
    pointer(table.field::<u64>(offset!(fdtable_fd)), fd as u64 * 8)
}

/// The first words of a `struct inode`.
const INODE_WORDS: usize = 9;

/// Mode, superblock and number.
#[inline(always)]
fn inode(inode: u64) -> Option<(u16, u64, u64)> {
    let (mode, sb, ino) = (offset!(inode_mode), offset!(inode_sb), offset!(inode_ino));
    const LAST: u64 = (INODE_WORDS as u64 - 1) * 8;
    // As they lie in every kernel that is known: one read costs little more for all
    // of them. The verifier knows the offsets, and which way is dead.
    if mode <= LAST && sb <= LAST && ino <= LAST {
        let words = read::<[u64; INODE_WORDS]>(inode, 0)?;
        let at = |offset: u64| (&raw const words).cast::<u8>().wrapping_add(offset as usize);
        // SAFETY: within the words, each at its own alignment.
        return Some(unsafe {
            (at(mode).cast::<u16>().read(), at(sb).cast::<u64>().read(), at(ino).cast::<u64>().read())
        });
    }
    Some((read::<u16>(inode, mode)?, read::<u64>(inode, sb)?, read::<u64>(inode, ino)?))
}

/// Pipes, named ones included, unix sockets, and TCP sockets that have a cookie:
/// every labelled one has, with its first packet at the latest.
#[inline(always)]
pub(super) fn end(file: u64) -> Option<End> {
    let (mode, sb, inode) = inode(pointer(file, offset!(file_inode))?)?;
    let kind = mode & S_IFMT;
    if kind == S_IFSOCK {
        let sk = pointer(file, offset!(file_private_data)).and_then(|s| pointer(s, offset!(socket_sk)))?;
        if read::<u16>(sk, offset!(sock_family))? != AF_UNIX {
            return tcp(sk);
        }
    } else if kind != S_IFIFO {
        return None;
    }
    let dev = read::<u32>(sb, offset!(sb_dev))?;
    Some(End { inode, dev, socket: kind == S_IFSOCK, tcp: 0 })
}

#[inline(always)]
pub(super) fn tcp(sk: u64) -> Option<End> {
    const SOCK_STREAM: u16 = 1;
    let family = read::<u16>(sk, offset!(sock_family))?;
    if (family != AF_INET && family != AF_INET6) || read::<u16>(sk, offset!(sock_type))? != SOCK_STREAM {
        return None;
    }
    match read::<u64>(sk, offset!(sock_cookie)) {
        Some(0) | None => None,
        Some(cookie) => Some(End { inode: cookie, dev: TCP_WIRE, socket: true, tcp: sk }),
    }
}
