//! A seccomp filter for what `mcp-sensor exec --confine` starts: what the
//! sensor's LSM programs refuse, on kernels without them, as far as a filter
//! can see it. It knows numbers only: no other process from an own child, no
//! unix socket from another. Nothing of it is recorded.

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use sensor_common::access;
use std::collections::BTreeMap;

/// Refused with EPERM whatever their arguments. io_uring makes sockets that no
/// filter sees.
const REFUSED: [libc::c_long; 6] = [
    libc::SYS_bpf,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_io_uring_setup,
];

/// Applies to this thread, and to all that comes of it. Sets no_new_privs.
pub(super) fn apply() -> Result<(), String> {
    let program = program().map_err(|e| e.to_string())?;
    seccompiler::apply_filter(&program).map_err(|e| e.to_string())
}

fn program() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_socket, families()?);
    #[cfg(target_arch = "x86_64")]
    {
        // The same calls by their numbers of the x32 interface.
        const X32: i64 = 0x4000_0000;
        rules.extend(rules.clone().into_iter().map(|(call, rules)| (call | X32, rules)));
    }
    let errno = SeccompAction::Errno(libc::EPERM as u32);
    SeccompFilter::new(rules, SeccompAction::Allow, errno, std::env::consts::ARCH.try_into()?)?.try_into()
}

/// What `access::may_make` does not name: any of these rules refuses.
fn families() -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let is_not = |argument, value: u32| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, value.into())
    };
    let others = access::FAMILIES.iter().chain([&access::NETLINK]).map(|family| is_not(0, *family));
    let netlink = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, access::NETLINK.into());
    Ok(vec![
        SeccompRule::new(others.collect::<Result<_, _>>()?)?,
        SeccompRule::new(vec![netlink?, is_not(2, access::NETLINK_ROUTE)?])?,
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    /// In a child, which stays confined: the errno of each call, or 0.
    fn confined(call: fn() -> i64) -> i32 {
        // SAFETY: the child makes plain system calls, and ends.
        match unsafe { fork() }.expect("fork") {
            ForkResult::Child => {
                let code = match apply() {
                    Err(_) => 255,
                    Ok(()) if call() >= 0 => 0,
                    Ok(()) => std::io::Error::last_os_error().raw_os_error().unwrap_or(254),
                };
                // SAFETY: ends this process at once.
                unsafe { libc::_exit(code) }
            }
            ForkResult::Parent { child } => match waitpid(child, None) {
                Ok(WaitStatus::Exited(_, code)) => code,
                other => panic!("{other:?}"),
            },
        }
    }

    fn socket(family: i32, kind: i32, protocol: i32) -> i64 {
        // SAFETY: a plain system call.
        unsafe { libc::socket(family, kind, protocol) }.into()
    }

    fn call(number: libc::c_long, first: i64, second: i64) -> i64 {
        // SAFETY: a plain system call on numbers and null pointers.
        unsafe { libc::syscall(number, first, second, 0, 0, 0, 0) }
    }

    fn parent_pid() -> i64 {
        nix::unistd::getppid().as_raw().into()
    }

    #[test]
    fn what_lsm_would_refuse_is_refused() {
        let calls: [fn() -> i64; 8] = [
            || socket(libc::AF_PACKET, libc::SOCK_RAW, 0),
            || socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0),
            || socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_GENERIC),
            || call(libc::SYS_bpf, 0, 0),
            || call(libc::SYS_ptrace, libc::PTRACE_SEIZE.into(), parent_pid()),
            || call(libc::SYS_process_vm_readv, parent_pid(), 0),
            || call(libc::SYS_pidfd_getfd, -1, 0),
            || call(libc::SYS_io_uring_setup, 1, 0),
        ];
        for (number, call) in calls.into_iter().enumerate() {
            assert_eq!(confined(call), libc::EPERM, "call {number}");
        }
    }

    #[test]
    fn what_servers_need_is_left() {
        let calls: [fn() -> i64; 4] = [
            || socket(libc::AF_UNIX, libc::SOCK_STREAM, 0),
            || socket(libc::AF_INET, libc::SOCK_STREAM, 0),
            || socket(libc::AF_INET6, libc::SOCK_DGRAM, 0),
            || socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE),
        ];
        for (number, call) in calls.into_iter().enumerate() {
            assert_eq!(confined(call), 0, "call {number}");
        }
    }
}
