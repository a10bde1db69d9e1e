//! Wires of processes that run already, from /proc: which pipes and sockets a
//! program may be speaking MCP through.

use super::process;
use sensor_common::stdio::{FROM_CLIENT, FROM_SERVER, WireKey};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};

/// Descriptors of one process that are looked at.
const LOOKED_AT: usize = 256;

/// A pipe or unix socket that a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    pub fd: u32,
    pub inode: u64,
    pub dev: u32,
    pub socket: bool,
    pub readable: bool,
    pub writable: bool,
}

/// The stdin and stdout of one server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    pub input: End,
    pub output: End,
}

impl Pair {
    /// Keys of the kernel's map: what a socket carries both ways included.
    pub fn keys(&self) -> Vec<WireKey> {
        keys(
            key(&self.input, FROM_CLIENT),
            self.input.socket,
            key(&self.output, FROM_SERVER),
            self.output.socket,
        )
    }
}

fn key(end: &End, direction: u32) -> WireKey {
    WireKey { inode: end.inode, dev: end.dev, direction }
}

pub fn keys(input: WireKey, input_socket: bool, output: WireKey, output_socket: bool) -> Vec<WireKey> {
    let mut keys = vec![input, output];
    if input_socket {
        keys.push(WireKey { direction: FROM_SERVER, ..input });
    }
    if output_socket {
        keys.push(WireKey { direction: FROM_CLIENT, ..output });
    }
    keys.dedup();
    keys
}

/// The kernel's form of a device number (linux/kdev_t.h, MKDEV).
fn kernel_dev(dev: u64) -> u32 {
    (libc::major(dev) << 20) | libc::minor(dev)
}

/// The ends that a process holds, by descriptor. Links are read, nothing is
/// opened.
pub fn ends(pid: u32) -> Vec<End> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let mut numbers: Vec<u32> =
        entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    numbers.into_iter().take(LOOKED_AT).filter_map(|fd| end(pid, fd)).collect()
}

fn end(pid: u32, fd: u32) -> Option<End> {
    let path = format!("/proc/{pid}/fd/{fd}");
    let link = fs::read_link(&path).ok()?;
    let link = link.to_string_lossy();
    let socket = link.starts_with("socket:");
    // A named pipe shows its path.
    if !socket && !link.starts_with("pipe:") && !link.starts_with('/') {
        return None;
    }
    // The permissions of the link are how the file was opened (fs/proc/fd.c).
    let mode = fs::symlink_metadata(&path).ok()?.permissions().mode();
    if !socket && !link.starts_with("pipe:") && !fs::metadata(&path).ok()?.file_type().is_fifo() {
        return None;
    }
    let file = fs::metadata(&path).ok()?;
    Some(End {
        fd,
        inode: file.ino(),
        dev: kernel_dev(file.dev()),
        socket,
        readable: mode & 0o400 != 0,
        writable: mode & 0o200 != 0,
    })
}

/// The other ends of the unix sockets of this network namespace, by inode, as
/// the kernel tells them (linux/unix_diag.h, UDIAG_SHOW_PEER); empty if it does
/// not.
pub fn peers() -> HashMap<u64, u64> {
    ask_peers().unwrap_or_default()
}

fn ask_peers() -> Option<HashMap<u64, u64>> {
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
    use std::os::fd::AsRawFd as _;
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )
    .ok()?;
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const DUMP: u16 = 0x301; // NLM_F_REQUEST | NLM_F_DUMP
    const SHOW_PEER: u32 = 4;
    const ESTABLISHED: u32 = 1 << 1;
    let mut request = Vec::with_capacity(40);
    request.extend(40u32.to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend(DUMP.to_ne_bytes());
    request.extend([0; 8]); // sequence, port
    request.extend([libc::AF_UNIX as u8, 0, 0, 0]);
    request.extend(ESTABLISHED.to_ne_bytes());
    request.extend(0u32.to_ne_bytes());
    request.extend(SHOW_PEER.to_ne_bytes());
    request.extend([0; 8]); // cookie
    send(socket.as_raw_fd(), &request, MsgFlags::empty()).ok()?;
    let mut peers = HashMap::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let len = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).ok()?;
        if len == 0 || !read_peers(&buffer[..len], &mut peers) {
            return Some(peers);
        }
    }
}

/// Messages of the kernel's answer. False: it was the last.
fn read_peers(mut bytes: &[u8], peers: &mut HashMap<u64, u64>) -> bool {
    const HEADER: usize = 16;
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const UNIX_DIAG_MSG: usize = 16;
    const UNIX_DIAG_PEER: u16 = 2;
    let word = |at: &[u8]| at.get(..4).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
    let half = |at: &[u8]| at.get(..2).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes);
    while bytes.len() >= HEADER {
        let (Some(len), Some(kind)) = (word(bytes), half(&bytes[4..])) else { return false };
        let Some(message) = bytes.get(HEADER..len as usize) else { return false };
        if kind != SOCK_DIAG_BY_FAMILY {
            return false; // NLMSG_DONE, or an error
        }
        if let Some(inode) = message.get(4..).and_then(word) {
            let mut attributes = message.get(UNIX_DIAG_MSG..).unwrap_or_default();
            while let (Some(size), Some(name)) = (half(attributes), attributes.get(2..).and_then(half)) {
                if name == UNIX_DIAG_PEER
                    && let Some(peer) = attributes.get(4..).and_then(word)
                {
                    peers.insert(inode.into(), peer.into());
                }
                let next = (usize::from(size).max(4) + 3) & !3;
                attributes = attributes.get(next..).unwrap_or_default();
            }
        }
        bytes = bytes.get((len as usize + 3) & !3..).unwrap_or_default();
    }
    true
}

/// Unnamed, connected stream sockets of a process's network namespace: those
/// that socketpair() makes look like this (net/unix/af_unix.c, `unix_seq_show`).
pub fn unnamed_sockets(pid: u32) -> HashSet<u64> {
    let Ok(text) = fs::read_to_string(format!("/proc/{pid}/net/unix")) else { return HashSet::new() };
    text.lines().skip(1).filter_map(unnamed_socket).collect()
}

fn unnamed_socket(line: &str) -> Option<u64> {
    let mut fields = line.split_ascii_whitespace().skip(4);
    let (kind, state, inode) = (fields.next()?, fields.next()?, fields.next()?);
    (kind == "0001" && state == "03" && fields.next().is_none()).then(|| inode.parse().ok())?
}

/// What a server may speak through: its descriptors 0 and 1; or, where it has
/// moved its wire elsewhere (the Python SDK 2.x does), the first to read from
/// and the first to write to whose other end somebody else holds. `shared`: pipe
/// inodes that several processes hold; `unnamed`: see [`unnamed_sockets`].
pub fn pair(ends: &[End], shared: impl Fn(u64) -> bool, unnamed: impl Fn(u64) -> bool) -> Option<Pair> {
    let fitting = |e: &&End| if e.socket { unnamed(e.inode) } else { shared(e.inode) };
    let at = |fd: u32| ends.iter().find(|e| e.fd == fd).filter(fitting).copied();
    if let (Some(input), Some(output)) = (at(0), at(1))
        && input.readable
        && output.writable
    {
        return Some(Pair { input, output });
    }
    let mut moved = ends.iter().filter(|e| e.fd > 2).filter(fitting);
    let input = *moved.clone().find(|e| e.readable)?;
    let output = *moved.find(|e| e.writable && e.inode != input.inode)?;
    Some(Pair { input, output })
}

/// Pipe inodes, and how many processes hold each.
pub fn pipe_holders(processes: &[u32]) -> HashMap<u64, u32> {
    let mut holders: HashMap<u64, u32> = HashMap::new();
    for pid in processes {
        let mut own: Vec<u64> = ends(*pid).iter().filter(|e| !e.socket).map(|e| e.inode).collect();
        own.sort_unstable();
        own.dedup();
        for inode in own {
            *holders.entry(inode).or_default() += 1;
        }
    }
    holders
}

/// A process and all that descend from it, parents first.
pub fn tree(root: u32) -> Vec<u32> {
    const MOST: usize = 4096;
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() && found.len() < MOST {
        for child in children(found[next]) {
            if !found.contains(&child) {
                found.push(child);
            }
        }
        next += 1;
    }
    found
}

fn children(pid: u32) -> Vec<u32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let mut children = Vec::new();
    for thread in threads.flatten() {
        match fs::read_to_string(thread.path().join("children")) {
            Ok(text) => children.extend(text.split_ascii_whitespace().filter_map(|p| p.parse::<u32>().ok())),
            // CONFIG_PROC_CHILDREN is not set.
            Err(_) => {
                return process::all()
                    .into_iter()
                    .filter(|p| process::stat(*p).is_some_and(|s| s.ppid == pid))
                    .collect();
            }
        }
    }
    children
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(fd: u32, inode: u64, socket: bool, readable: bool, writable: bool) -> End {
        End { fd, inode, dev: 9, socket, readable, writable }
    }

    #[test]
    fn stdio_is_taken_where_it_is_a_wire_else_what_was_moved() {
        let plain = [made(0, 10, false, true, false), made(1, 11, false, false, true)];
        let found = pair(&plain, |_| true, |_| true).expect("a pair");
        assert_eq!((found.input.fd, found.output.fd), (0, 1));
        let moved = [
            made(1, 5, false, false, true), // stderr's
            made(2, 5, false, false, true),
            made(3, 7, false, true, true), // to itself
            made(6, 20, true, true, true),
            made(7, 21, true, true, true),
        ];
        let found = pair(&moved, |inode| inode != 7, |_| true).expect("a pair");
        assert_eq!((found.input.fd, found.output.fd), (6, 7));
        assert_eq!(pair(&moved[..3], |inode| inode != 7, |_| true), None);
    }

    #[test]
    fn the_kernel_tells_the_other_end_of_a_socketpair() {
        use std::os::fd::AsRawFd as _;
        let (a, b) = std::os::unix::net::UnixStream::pair().expect("pair");
        let own = ends(std::process::id());
        let inode = |fd: i32| own.iter().find(|e| e.fd == fd as u32).expect("listed").inode;
        let peers = peers();
        assert_eq!(peers.get(&inode(a.as_raw_fd())), Some(&inode(b.as_raw_fd())));
    }

    #[test]
    fn a_damaged_answer_ends_the_reading() {
        let mut peers = HashMap::new();
        for bytes in [&[0xff; 40][..], &[0; 40], &[17, 0, 0, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]] {
            let _ = read_peers(bytes, &mut peers);
        }
        assert!(peers.is_empty());
    }

    #[test]
    fn a_line_of_proc_net_unix_tells_unnamed_sockets() {
        let line = "0000000000000000: 00000003 00000000 00000000 0001 03 18412";
        assert_eq!(unnamed_socket(line), Some(18412));
        assert_eq!(unnamed_socket(&format!("{line} /run/x")), None);
        assert_eq!(unnamed_socket(&line.replace(" 0001 ", " 0002 ")), None);
        assert_eq!(unnamed_socket("garbage"), None);
    }

    #[test]
    fn own_pipes_are_seen_as_they_were_opened() {
        let (reader, writer) = std::io::pipe().expect("pipe");
        use std::os::fd::AsRawFd as _;
        let own = ends(std::process::id());
        let at = |fd: i32| own.iter().find(|e| e.fd == fd as u32).copied().expect("listed");
        let (r, w) = (at(reader.as_raw_fd()), at(writer.as_raw_fd()));
        assert_eq!(r.inode, w.inode);
        assert!(r.readable && !r.writable && w.writable && !w.readable && !r.socket);
    }
}
