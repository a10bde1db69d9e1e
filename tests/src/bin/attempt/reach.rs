//! Beyond the network: other processes, bpf(), what lies in bpffs, families of
//! sockets. `rest` says which: a process, a path, three numbers.

use crate::Target;
use crate::wire::*;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pause};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

pub(crate) const ALL: &[(&str, Attempt)] = &[
    ("ptrace-attach", attach),
    ("ptrace-own-child", attach_to_child),
    ("vm-read", vm_read),
    ("pidfd-getfd", take_descriptor),
    ("read-environ", read_environ),
    ("bpf-map", bpf_map),
    ("verified", verified),
    ("signal", signal),
    ("unlink", unlink),
    ("rename", rename),
    ("unmount", unmount),
    ("cover", cover),
    ("open-socket", open_socket),
];

fn first(t: &Target) -> Result<&str, Stop> {
    t.rest.first().map(String::as_str).ok_or(Stop { step: "nothing after --", errno: libc::EINVAL })
}

fn number(t: &Target, at: usize) -> Result<i32, Stop> {
    let text = t.rest.get(at).and_then(|text| text.parse().ok());
    text.ok_or(Stop { step: "no number after --", errno: libc::EINVAL })
}

fn done(step: &'static str, result: nix::Result<()>) -> Tried {
    result.map(|()| true).map_err(|e| Stop { step, errno: e as i32 })
}

fn seize(pid: Pid) -> Tried {
    // SAFETY: plain numbers.
    check("ptrace", unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid.as_raw(), 0, 0) } as isize)?;
    Ok(true)
}

fn attach(t: &Target) -> Tried {
    seize(Pid::from_raw(number(t, 0)?))
}

fn attach_to_child(_: &Target) -> Tried {
    // SAFETY: this program has one thread.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => loop {
            pause();
        },
        Ok(ForkResult::Parent { child }) => {
            let tried = seize(child);
            let _ = kill(child, Signal::SIGKILL);
            let _ = waitpid(child, None);
            tried
        }
        Err(e) => Err(Stop { step: "fork", errno: e as i32 }),
    }
}

/// Of an address that nobody has: EFAULT comes after the permission.
fn vm_read(t: &Target) -> Tried {
    let mut buffer = [0u8; 8];
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote = libc::iovec { iov_base: 8 as *mut _, iov_len: buffer.len() };
    // SAFETY: the buffer outlives the call and its length is passed.
    let n = unsafe { libc::process_vm_readv(number(t, 0)?, &raw const local, 1, &raw const remote, 1, 0) };
    match check("process_vm_readv", n) {
        Err(Stop { errno: libc::EFAULT, .. }) | Ok(_) => Ok(true),
        Err(other) => Err(other),
    }
}

fn take_descriptor(t: &Target) -> Tried {
    // SAFETY: plain system calls, on numbers.
    unsafe {
        let process = check("pidfd_open", libc::syscall(libc::SYS_pidfd_open, number(t, 0)?, 0) as isize)?;
        let process = OwnedFd::from_raw_fd(process as i32);
        let taken = libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), 0, 0);
        drop(OwnedFd::from_raw_fd(check("pidfd_getfd", taken as isize)? as i32));
    }
    Ok(true)
}

/// Without CAP_PERFMON and CAP_SYS_ADMIN, by which newer kernels let it through
/// whatever a BPF LSM says (`may_access_mm` in kernel/fork.c).
fn read_environ(t: &Target) -> Tried {
    const SYS_ADMIN: u32 = 21;
    const PERFMON: u32 = 38;
    // Version 3 of linux/capability.h: this thread, two words of each set.
    let header = [0x2008_0522_u32, 0];
    let mut sets = [0_u32; 6];
    // SAFETY: both are as large as the version says and outlive the calls.
    let call = |which, sets: *mut u32| unsafe { libc::syscall(which, header.as_ptr(), sets) };
    check("capget", call(libc::SYS_capget, sets.as_mut_ptr()) as isize)?;
    for cap in [SYS_ADMIN, PERFMON] {
        sets[cap as usize / 32 * 3] &= !(1 << (cap % 32));
    }
    check("capset", call(libc::SYS_capset, sets.as_mut_ptr()) as isize)?;
    let path = format!("/proc/{}/environ", number(t, 0)?);
    let read = || -> io::Result<usize> {
        let mut text = Vec::new();
        std::fs::File::open(path)?.read_to_end(&mut text)
    };
    match read() {
        Ok(bytes) => Ok(bytes > 0),
        Err(e) => Err(Stop { step: "read", errno: e.raw_os_error().unwrap_or(0) }),
    }
}

/// BPF_MAP_CREATE of an array of one word.
fn bpf_map(_: &Target) -> Tried {
    const MAP_CREATE: i64 = 0;
    let mut attr = [0u32; 32];
    attr[..4].copy_from_slice(&[2, 4, 4, 1]);
    // SAFETY: the attribute outlives the call and its length is passed.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, MAP_CREATE, attr.as_mut_ptr(), size_of_val(&attr)) };
    // SAFETY: a fresh descriptor that nobody else owns.
    check("bpf", fd as isize).map(|fd| drop(unsafe { OwnedFd::from_raw_fd(fd as i32) }))?;
    Ok(true)
}

/// Prints every program of the kernel with the instructions that its verifier
/// looked at (0 before Linux 5.16).
fn verified(_: &Target) -> Tried {
    const PROG_GET_NEXT_ID: i64 = 11;
    const PROG_GET_FD_BY_ID: i64 = 13;
    const OBJ_GET_INFO_BY_FD: i64 = 15;
    /// In `struct bpf_prog_info` (linux/bpf.h).
    const NAME: usize = 64;
    const VERIFIED_INSNS: usize = 216;
    let bpf = |command: i64, attr: &mut [u32; 32]| {
        // SAFETY: the attribute outlives the call and its length is passed; what
        // it points to outlives the call too.
        check("bpf", unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of_val(attr)) }
            as isize)
    };
    let mut id = 0;
    loop {
        let mut attr = [0u32; 32];
        attr[0] = id;
        if bpf(PROG_GET_NEXT_ID, &mut attr).is_err() {
            return Ok(true);
        }
        id = attr[1];
        let mut attr = [0u32; 32];
        attr[0] = id;
        // SAFETY: a fresh descriptor that nobody else owns.
        let program = unsafe { OwnedFd::from_raw_fd(bpf(PROG_GET_FD_BY_ID, &mut attr)? as i32) };
        let mut info = [0u8; 232];
        let at = info.as_mut_ptr() as u64;
        let mut attr = [0u32; 32];
        attr[..4].copy_from_slice(&[
            program.as_raw_fd() as u32,
            info.len() as u32,
            at as u32,
            (at >> 32) as u32,
        ]);
        bpf(OBJ_GET_INFO_BY_FD, &mut attr)?;
        let name = info[NAME..NAME + 16].split(|b| *b == 0).next().unwrap_or_default();
        let count = info[VERIFIED_INSNS..VERIFIED_INSNS + 4].try_into().map_or(0, u32::from_ne_bytes);
        println!("VERIFIED {} {count}", String::from_utf8_lossy(name));
    }
}

/// `rest[1]`: its number.
fn signal(t: &Target) -> Tried {
    // SAFETY: plain numbers.
    check("kill", unsafe { libc::kill(number(t, 0)?, number(t, 1)?) } as isize)?;
    Ok(true)
}

fn unlink(t: &Target) -> Tried {
    done("unlink", nix::unistd::unlink(first(t)?))
}

fn rename(t: &Target) -> Tried {
    let from = first(t)?;
    match std::fs::rename(from, format!("{from}_moved")) {
        Ok(()) => Ok(true),
        Err(e) => Err(Stop { step: "rename", errno: e.raw_os_error().unwrap_or(0) }),
    }
}

fn unmount(t: &Target) -> Tried {
    done("umount2", umount2(first(t)?, MntFlags::MNT_DETACH))
}

fn cover(t: &Target) -> Tried {
    done("mount", mount(Some("tmpfs"), first(t)?, Some("tmpfs"), MsFlags::empty(), None::<&str>))
}

/// Family, type, protocol.
fn open_socket(t: &Target) -> Tried {
    socket(number(t, 0)?, number(t, 1)?, number(t, 2)?)?;
    Ok(true)
}
