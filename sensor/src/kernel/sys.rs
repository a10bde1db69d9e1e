//! The calls of bpf(2) that aya does not offer.

use std::ffi::{CString, c_char};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

const BPF_MAP_LOOKUP_ELEM: i64 = 1;
const BPF_MAP_UPDATE_ELEM: i64 = 2;
const BPF_OBJ_GET: i64 = 7;
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: i64 = 21;
const BPF_MAP_GET_NEXT_KEY: i64 = 4;
const BPF_PROG_LOAD: i64 = 5;
const BPF_OBJ_PIN: i64 = 6;
const BPF_PROG_TEST_RUN: i64 = 10;
const BPF_RAW_TRACEPOINT_OPEN: i64 = 17;
const BPF_LINK_CREATE: i64 = 28;
const BPF_PROG_QUERY: i64 = 16;
const BPF_OBJ_GET_INFO_BY_FD: i64 = 15;

/// Every command reads at most this much of `union bpf_attr`; the rest is zero.
#[repr(C)]
struct Attr([u64; 18]);

fn bpf(command: i64, attr: &mut Attr) -> io::Result<i64> {
    // SAFETY: the attribute is as long as announced; pointers within it point
    // to memory that callers keep alive over the call.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<Attr>()) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

fn words(pairs: &[(usize, u64)]) -> Attr {
    let mut attr = Attr([0; 18]);
    for (at, value) in pairs {
        attr.0[*at] = *value;
    }
    attr
}

const fn pair(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

/// Loads a program whose attach type aya cannot name. `Err` carries the
/// verifier's log.
pub(super) fn load_sock_addr(
    name: &str,
    instructions: &[aya_obj::generated::bpf_insn],
    attach_type: u32,
) -> Result<OwnedFd, (io::Error, String)> {
    const CGROUP_SOCK_ADDR: u32 = 18;
    let mut log = vec![0u8; 16 * 1024 * 1024];
    let license = c"GPL";
    let mut short = [0u8; 16];
    for (to, from) in short.iter_mut().zip(name.bytes().take(15)) {
        *to = from;
    }
    let mut attr = words(&[
        (0, pair(CGROUP_SOCK_ADDR, instructions.len() as u32)),
        (1, instructions.as_ptr() as u64),
        (2, license.as_ptr() as u64),
        (3, pair(1, log.len() as u32)),
        (4, log.as_mut_ptr() as u64),
        // word 5: kern_version, prog_flags; 6, 7: the name
        (6, u64::from_ne_bytes(short[..8].try_into().unwrap_or_default())),
        (7, u64::from_ne_bytes(short[8..].try_into().unwrap_or_default())),
        // prog_ifindex, expected_attach_type
        (8, pair(0, attach_type)),
    ]);
    // First without a log: one that is too small for it fails a good program.
    let mut silent = Attr(attr.0);
    (silent.0[3], silent.0[4]) = (0, 0);
    match bpf(BPF_PROG_LOAD, &mut silent).or_else(|_| bpf(BPF_PROG_LOAD, &mut attr)) {
        // SAFETY: a descriptor that the kernel just made for us.
        Ok(fd) => Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) }),
        Err(error) => {
            let end = log.iter().position(|b| *b == 0).unwrap_or(log.len());
            Err((error, String::from_utf8_lossy(&log[..end]).into_owned()))
        }
    }
}

pub(super) fn link_create(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    let mut attr =
        words(&[(0, pair(program.as_raw_fd() as u32, cgroup.as_raw_fd() as u32)), (1, pair(attach_type, 0))]);
    let fd = bpf(BPF_LINK_CREATE, &mut attr)?;
    // SAFETY: a descriptor that the kernel just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Without a name: a tracing program, which knows where it belongs.
pub(super) fn raw_tracepoint_open(program: BorrowedFd<'_>, tracepoint: Option<&str>) -> io::Result<OwnedFd> {
    let name = tracepoint.map(CString::new).transpose()?;
    let name = name.as_ref().map_or(0, |n| n.as_ptr() as u64);
    let mut attr = words(&[(0, name), (1, pair(program.as_raw_fd() as u32, 0))]);
    let fd = bpf(BPF_RAW_TRACEPOINT_OPEN, &mut attr)?;
    // SAFETY: a descriptor that the kernel just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Runs a raw tracepoint program once, in this task, with one argument.
pub(super) fn run_raw_tracepoint(program: BorrowedFd<'_>, argument: u64) -> io::Result<()> {
    let mut attr = words(&[
        (0, pair(program.as_raw_fd() as u32, 0)),
        // words 1 to 4: data, repeat and duration, all of which must be 0
        (5, pair(size_of::<u64>() as u32, 0)),
        (6, (&raw const argument) as u64),
    ]);
    bpf(BPF_PROG_TEST_RUN, &mut attr).map(drop)
}

/// Ids of the programs of one type that are attached to a cgroup itself.
pub(super) fn attached(cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<Vec<u32>> {
    const MOST: usize = 64; // BPF_CGROUP_MAX_PROGS
    let mut ids = [0u32; MOST];
    let mut attr = words(&[
        (0, pair(cgroup.as_raw_fd() as u32, attach_type)),
        // word 1: query flags (0: attached here), attach flags out
        (2, ids.as_mut_ptr() as u64),
        (3, pair(MOST as u32, 0)),
    ]);
    bpf(BPF_PROG_QUERY, &mut attr)?;
    let count = (attr.0[3] as u32 as usize).min(MOST);
    Ok(ids[..count].to_vec())
}

/// What `struct bpf_link_info` (linux/bpf.h) says of every link, and of those
/// to cgroups.
#[repr(C)]
pub(super) struct LinkInfo {
    kind: u32,
    id: u32,
    pub program: u32,
    _pad: u32,
    /// 0: it was detached.
    cgroup: u64,
    rest: [u64; 8],
}

impl LinkInfo {
    pub fn is_attached(&self) -> bool {
        const BPF_LINK_TYPE_CGROUP: u32 = 3;
        self.kind != BPF_LINK_TYPE_CGROUP || self.cgroup != 0
    }
}

/// Of the kernel's answer as much as it has.
fn info<T>(object: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = std::mem::MaybeUninit::<T>::zeroed();
    let mut attr =
        words(&[(0, pair(object.as_raw_fd() as u32, size_of::<T>() as u32)), (1, info.as_mut_ptr() as u64)]);
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    // SAFETY: structures of linux/bpf.h, of which zeroes and whatever the kernel
    // writes are values.
    Ok(unsafe { info.assume_init() })
}

pub(super) fn map_info(map: BorrowedFd<'_>) -> io::Result<aya_obj::generated::bpf_map_info> {
    info(map)
}

pub(super) fn program_info(program: BorrowedFd<'_>) -> io::Result<aya_obj::generated::bpf_prog_info> {
    info(program)
}

/// Entries of a hash map, `most` at most: one that changes meanwhile may begin
/// again and again.
pub(super) fn count(map: BorrowedFd<'_>, key_size: usize, most: u64) -> u64 {
    let (mut key, mut next) = (vec![0u8; key_size], vec![0u8; key_size]);
    let mut count = 0;
    while count < most {
        let before = if count == 0 { 0 } else { key.as_ptr() as u64 };
        let mut attr =
            words(&[(0, pair(map.as_raw_fd() as u32, 0)), (1, before), (2, next.as_mut_ptr() as u64)]);
        if bpf(BPF_MAP_GET_NEXT_KEY, &mut attr).is_err() {
            break;
        }
        std::mem::swap(&mut key, &mut next);
        count += 1;
    }
    count
}

pub(super) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    info(link)
}

pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let pathname: *const c_char = path.as_ptr();
    let mut attr = words(&[(0, pathname as u64), (1, pair(object.as_raw_fd() as u32, 0))]);
    bpf(BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Takes an element out of a hash map in one step, so that what a program adds
/// meanwhile is not lost. `false`: it was gone.
pub(super) fn take(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let mut attr = words(&[
        (0, pair(map.as_raw_fd() as u32, 0)),
        (1, key.as_ptr() as u64),
        (2, value.as_mut_ptr() as u64),
    ]);
    match bpf(BPF_MAP_LOOKUP_AND_DELETE_ELEM, &mut attr) {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// A map or link by its path in bpffs.
pub(super) fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let pathname: *const c_char = path.as_ptr();
    let fd = bpf(BPF_OBJ_GET, &mut words(&[(0, pathname as u64)]))?;
    // SAFETY: a descriptor that the kernel just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// `value` holds at least as much as the map's values (of a per-CPU map: those
/// of all CPUs).
pub(super) fn lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<()> {
    let mut attr = words(&[
        (0, pair(map.as_raw_fd() as u32, 0)),
        (1, key.as_ptr() as u64),
        (2, value.as_mut_ptr() as u64),
    ]);
    bpf(BPF_MAP_LOOKUP_ELEM, &mut attr).map(drop)
}

/// As [`lookup`].
pub(super) fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    let mut attr =
        words(&[(0, pair(map.as_raw_fd() as u32, 0)), (1, key.as_ptr() as u64), (2, value.as_ptr() as u64)]);
    bpf(BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// The key after `key`, or the first; `None`: there is no other.
pub(super) fn next_key(map: BorrowedFd<'_>, key: Option<&[u8]>, size: usize) -> io::Result<Option<Vec<u8>>> {
    let mut next = vec![0; size];
    let mut attr = words(&[
        (0, pair(map.as_raw_fd() as u32, 0)),
        (1, key.map_or(0, |key| key.as_ptr() as u64)),
        (2, next.as_mut_ptr() as u64),
    ]);
    match bpf(BPF_MAP_GET_NEXT_KEY, &mut attr) {
        Ok(_) => Ok(Some(next)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}
