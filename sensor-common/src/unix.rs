//! Unix sockets of a labelled server, judged by the name that connect() or
//! sendmsg() gives (`sun_path`; an abstract name starts with NUL, shown as `@`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Longest `sun_path` (linux/un.h).
pub const PATH_BYTES: usize = 108;
pub const MAX_UNIX_RULES: u32 = 65_536;

/// Key of the unix trie: 8 bytes of scope, then the name.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct UnixKey {
    /// 64 + 8 per byte of the name.
    pub prefix_len: u32,
    /// Network byte order.
    pub generation: u32,
    /// Profile, network byte order; [`POWER`] for the built-in list.
    pub profile: u32,
    pub path: [u8; PATH_BYTES],
}

pub const UNIX_SCOPE_BITS: u32 = 64;
/// The scope of the sockets that give power over the host.
pub const POWER: u32 = u32::MAX;

#[cfg(any(test, feature = "user"))]
impl UnixKey {
    /// `name` as in `sun_path`; ends in NUL to match in whole, else a prefix.
    /// `None`: too long.
    pub fn new(generation: u32, profile: u32, name: &[u8]) -> Option<UnixKey> {
        let mut path = [0; PATH_BYTES];
        path.get_mut(..name.len())?.copy_from_slice(name);
        let prefix_len = UNIX_SCOPE_BITS + 8 * name.len() as u32;
        Some(UnixKey { prefix_len, generation: generation.to_be(), profile: profile.to_be(), path })
    }
}

/// Value of the unix trie.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct UnixRule {
    /// Rule that names the socket; 0 in the built-in list.
    pub rule: u32,
}

/// The sockets that a labelled server may not reach by default; a trailing `*`
/// is a prefix, `@` an abstract name. `/var/run` is `/run` on every current
/// distribution, but the name is judged as it is spelled, so both stand here.
pub const POWER_SOCKETS: [&str; 44] = [
    "/run/docker.sock",
    "/var/run/docker.sock",
    "/run/docker/*",
    "/var/run/docker/*",
    "/run/containerd/*",
    "/var/run/containerd/*",
    "/run/podman/*",
    "/var/run/podman/*",
    "/run/crio/*",
    "/var/run/crio/*",
    "/run/buildkit/*",
    "/var/run/buildkit/*",
    "/run/k3s/*",
    "/run/lxd*",
    "/var/lib/lxd/*",
    "/run/incus*",
    "/run/libvirt/*",
    "/var/run/libvirt/*",
    "/run/dbus/*",
    "/var/run/dbus/*",
    "/run/systemd/*",
    "/var/run/systemd/*",
    "/run/varlink/*",
    "/run/nscd/*",
    "/var/run/nscd/*",
    "/run/udev/*",
    "/run/user/*",
    "/var/run/user/*",
    "/run/snapd*",
    "/run/acpid.socket",
    "/run/rpcbind.sock",
    "/run/gssproxy*",
    "/run/sssd/*",
    "/var/lib/sss/*",
    "/var/run/acpid.socket",
    "/tmp/ssh-*",
    "/tmp/.X11-unix/*",
    "/tmp/dbus-*",
    "/tmp/gpg-*",
    "@/tmp/.X11-unix/*",
    "@/tmp/dbus-*",
    "@/org/freedesktop/*",
    "@/containerd-shim/*",
    "@ISCSIADM_ABSTRACT_NAMESPACE",
];

const _: () = assert!(size_of::<UnixKey>() == 120);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_socket_fits_a_key() {
        for name in POWER_SOCKETS {
            assert!(UnixKey::new(1, POWER, name.as_bytes()).is_some(), "{name}");
        }
    }
}
