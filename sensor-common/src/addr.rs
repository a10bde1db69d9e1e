//! One form for every IP address, so that no spelling of an address escapes a
//! rule that names it.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// An address as IPv6 in network byte order (each word as it stands in
/// memory); IPv4 is `::ffff:a.b.c.d` (RFC 4291 §2.5.5.2).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Addr(pub [u32; 4]);

const MAPPED: u32 = 0x0000_ffff_u32.to_be();
const NAT64: u32 = 0x0064_ff9b_u32.to_be();
const LOOPBACK4: u32 = 0x7f00_0001_u32.to_be();
const LOW_ONE: u32 = 1_u32.to_be();

impl Addr {
    pub const LOOPBACK6: Addr = Addr([0, 0, 0, LOW_ONE]);

    /// `be` is the address in network byte order, as the kernel hands it out.
    #[inline(always)]
    pub const fn v4(be: u32) -> Addr {
        Addr([0, 0, MAPPED, be])
    }

    /// `be` are the four words in network byte order.
    #[inline(always)]
    pub const fn v6(be: [u32; 4]) -> Addr {
        Addr(be)
    }

    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }

    /// The address that a packet to `self` really reaches: v4-mapped stays,
    /// NAT64 (64:ff9b::/96, RFC 6052) and 6to4 (2002::/16, RFC 3056) become the
    /// IPv4 address inside, and the unspecified address becomes loopback, which
    /// is where Linux sends it (`ip_route_output_key_hash`, `ip6_route_output`).
    #[inline(always)]
    pub const fn normalise(self) -> Addr {
        let w = self.0;
        let top = u32::from_be(w[0]);
        let inside = if self.is_v4() || (w[0] == NAT64 && w[1] == 0 && w[2] == 0) {
            w[3]
        } else if top >> 16 == 0x2002 {
            ((top << 16) | (u32::from_be(w[1]) >> 16)).to_be()
        } else {
            return if w[0] == 0 && w[1] == 0 && w[2] == 0 && w[3] == 0 { Addr::LOOPBACK6 } else { self };
        };
        Addr::v4(if inside == 0 { LOOPBACK4 } else { inside })
    }

    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            return u32::from_be(self.0[3]) >> 24 == 127;
        }
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0 && self.0[3] == LOW_ONE
    }

    /// 224.0.0.0/4 or ff00::/8.
    #[inline(always)]
    pub const fn is_multicast(&self) -> bool {
        if self.is_v4() {
            return u32::from_be(self.0[3]) >> 28 == 0xe;
        }
        u32::from_be(self.0[0]) >> 24 == 0xff
    }

    /// An address of the host or its own network: loopback, private (RFC 1918,
    /// RFC 4193), link-local with the clouds' metadata addresses (RFC 3927), shared
    /// (RFC 6598), site-local, "this network". A name that leads there is
    /// rebinding. `self` is normalised.
    #[inline(always)]
    pub const fn is_local(&self) -> bool {
        let top = u32::from_be(self.0[if self.is_v4() { 3 } else { 0 }]);
        if self.is_v4() {
            return matches!(top >> 24, 0 | 10 | 127)
                || top >> 20 == 0xac1
                || top >> 16 == 0xc0a8
                || top >> 16 == 0xa9fe
                || top >> 22 == 0x6440_0000 >> 22;
        }
        self.is_loopback() || top >> 25 == 0xfc00_0000 >> 25 || top >> 23 == 0xfe80_0000 >> 23
    }

    /// 255.255.255.255. A subnet's own broadcast address cannot be told from
    /// the address alone; `SO_BROADCAST` is refused instead.
    #[inline(always)]
    pub const fn is_broadcast(&self) -> bool {
        self.is_v4() && self.0[3] == u32::MAX
    }
}

#[cfg(any(test, feature = "user"))]
impl From<std::net::IpAddr> for Addr {
    fn from(ip: std::net::IpAddr) -> Addr {
        match ip {
            std::net::IpAddr::V4(v4) => Addr::v4(u32::from_ne_bytes(v4.octets())),
            std::net::IpAddr::V6(v6) => {
                let mut words = [0; 4];
                for (word, bytes) in words.iter_mut().zip(v6.octets().chunks_exact(4)) {
                    *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                }
                Addr(words)
            }
        }
    }
}

#[cfg(any(test, feature = "user"))]
impl From<Addr> for std::net::IpAddr {
    fn from(addr: Addr) -> std::net::IpAddr {
        let mut octets = [0u8; 16];
        for (bytes, word) in octets.chunks_exact_mut(4).zip(addr.0) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        if addr.is_v4() {
            return std::net::IpAddr::from([octets[12], octets[13], octets[14], octets[15]]);
        }
        std::net::IpAddr::from(octets)
    }
}

#[cfg(test)]
mod tests {
    use super::Addr;
    use std::net::IpAddr;

    fn normal(text: &str) -> IpAddr {
        Addr::from(text.parse::<IpAddr>().unwrap()).normalise().into()
    }

    #[test]
    fn every_spelling_of_one_address_is_one_address() {
        for (spelling, meant) in [
            ("::ffff:10.1.2.3", "10.1.2.3"),
            ("64:ff9b::a01:203", "10.1.2.3"),
            ("2002:a01:203::1", "10.1.2.3"),
            ("2002:a01:203:ffff:1::", "10.1.2.3"),
            ("0.0.0.0", "127.0.0.1"),
            ("::", "::1"),
            ("::ffff:0.0.0.0", "127.0.0.1"),
            ("64:ff9b:1::a01:203", "64:ff9b:1::a01:203"),
            ("64:ff9b::", "127.0.0.1"),
            ("2002::1", "127.0.0.1"),
            ("2001:db8::1", "2001:db8::1"),
        ] {
            assert_eq!(normal(spelling), meant.parse::<IpAddr>().unwrap(), "{spelling}");
        }
    }

    #[test]
    fn classes() {
        let a = |t: &str| Addr::from(t.parse::<IpAddr>().unwrap());
        for local in [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.9.9",
            "169.254.169.254",
            "100.64.0.1",
            "100.127.255.255",
            "0.1.2.3",
            "::1",
            "fd00::1",
            "fc00::1",
            "fe80::1",
            "fec0::1",
        ] {
            assert!(a(local).is_local(), "{local}");
        }
        for public in [
            "8.8.8.8",
            "172.15.0.1",
            "172.32.0.1",
            "100.63.0.1",
            "100.128.0.1",
            "203.0.113.1",
            "2001:db8::1",
            "fb00::1",
        ] {
            assert!(!a(public).is_local(), "{public}");
        }
        assert!(a("127.9.9.9").is_loopback() && a("::1").is_loopback() && !a("128.0.0.1").is_loopback());
        assert!(a("224.0.0.251").is_multicast() && a("ff02::fb").is_multicast());
        assert!(!a("223.255.255.255").is_multicast() && !a("fe80::1").is_multicast());
        assert!(a("255.255.255.255").is_broadcast() && !a("255.255.255.254").is_broadcast());
    }
}
