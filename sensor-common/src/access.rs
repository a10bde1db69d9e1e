//! What a labelled task may not do beyond the network, where the kernel has BPF
//! LSM: reach into other processes, and take the sensor apart. `VerdictKey::port`
//! says what was tried.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `Hook::Ptrace`: reading (process_vm_readv, `/proc/PID/environ`, …).
pub const READ: u16 = 1;
/// `Hook::Ptrace`: control (attaching, pidfd_getfd, `/proc/PID/mem`).
pub const ATTACH: u16 = 2;

/// `Hook::Pins`.
pub const UNLINK: u16 = 1;
pub const RENAME: u16 = 2;
pub const UNMOUNT: u16 = 3;
/// Mounting something over it.
pub const COVER: u16 = 4;

/// The sensor itself, as it writes itself down; one entry.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Agent {
    /// Its thread group; 0: none.
    pub tgid: u32,
    /// 1 once a hook of BPF LSM has run for it: programs attach to these hooks
    /// also where the kernel was started without them.
    pub seen: u32,
}

/// AF_UNIX, AF_INET and AF_INET6 (linux/socket.h), which have judges of their own.
pub const FAMILIES: [u32; 3] = [1, 2, 10];
pub const NETLINK: u32 = 16;
/// libc asks for interfaces and addresses by it (getaddrinfo, if_nametoindex).
pub const NETLINK_ROUTE: u32 = 0;

/// Whether a held server may make sockets of a family.
#[inline(always)]
pub const fn may_make(family: u32, protocol: u32) -> bool {
    let [unix, inet, inet6] = FAMILIES;
    family == unix || family == inet || family == inet6 || (family == NETLINK && protocol == NETLINK_ROUTE)
}

const _: () = assert!(size_of::<Agent>() == 8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_judged_elsewhere_and_what_libc_needs_is_made() {
        let [unix, inet, inet6] = FAMILIES;
        assert!(may_make(unix, 0) && may_make(inet, 6) && may_make(inet6, 17) && may_make(NETLINK, 0));
        // Packet, vsock, XDP, ALG, SMC, Bluetooth; netlink's audit, netfilter and generic.
        for (family, protocol) in
            [(17, 0), (40, 0), (44, 0), (38, 0), (43, 0), (31, 0), (16, 9), (16, 12), (16, 16)]
        {
            assert!(!may_make(family, protocol), "{family} {protocol}");
        }
    }
}
