//! An Ethernet frame as far as a test needs it: who sent what to whom.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// IEEE "local experimental" EtherType: the sniffer's own markers.
pub const MARKER_ETHERTYPE: u16 = 0x88b5;

const ETH_HEADER: usize = 14;
const FIN: u8 = 0x01;
const RST: u8 = 0x04;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    Ip {
        src: IpAddr,
        dst: IpAddr,
        routed: bool,
        options: bool,
        /// Of the packet, IP header included.
        len: usize,
        l4: L4,
    },
    Arp,
    Marker(Vec<u8>),
    /// Some other EtherType, or bytes that are no IP although they claim it.
    Other {
        ethertype: u16,
        len: usize,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum L4 {
    Tcp {
        src: u16,
        dst: u16,
        flags: u8,
        payload: usize,
        mptcp: bool,
    },
    Udp {
        src: u16,
        dst: u16,
        payload: usize,
    },
    UdpLite {
        src: u16,
        dst: u16,
    },
    /// ICMP or ICMPv6, by type.
    Icmp(u8),
    Icmp6(u8),
    Igmp(u8),
    /// Not the first piece: `protocol` without its header.
    Fragment(u8),
    Other(u8),
}

impl Frame {
    pub fn parse(bytes: &[u8]) -> Frame {
        let Some(ethertype) = be16(bytes, 12) else {
            return Frame::Other { ethertype: 0, len: bytes.len() };
        };
        let other = Frame::Other { ethertype, len: bytes.len() };
        let payload = &bytes[ETH_HEADER..];
        match ethertype {
            0x0800 => ipv4(payload).unwrap_or(other),
            0x86dd => ipv6(payload).unwrap_or(other),
            0x0806 => Frame::Arp,
            MARKER_ETHERTYPE => Frame::Marker(payload.to_vec()),
            _ => other,
        }
    }

    /// What the kernel answers for a socket that is gone: no byte of the
    /// server's is in it.
    pub fn is_bare_reset(&self) -> bool {
        matches!(self, Frame::Ip { l4: L4::Tcp { flags, payload: 0, .. }, .. } if flags & RST != 0)
    }

    /// No payload and nothing but ACK: what TIME-WAIT answers with.
    pub fn is_bare_ack(&self) -> bool {
        matches!(self, Frame::Ip { l4: L4::Tcp { flags, payload: 0, .. }, .. } if *flags == ACK)
    }

    pub fn is_syn(&self) -> bool {
        matches!(self, Frame::Ip { l4: L4::Tcp { flags, .. }, .. } if flags & (SYN | ACK) == SYN)
    }

    pub fn is_fin(&self) -> bool {
        matches!(self, Frame::Ip { l4: L4::Tcp { flags, .. }, .. } if flags & FIN != 0)
    }

    pub fn destination(&self) -> Option<IpAddr> {
        match self {
            Frame::Ip { dst, .. } => Some(*dst),
            _ => None,
        }
    }

    /// Bytes above TCP or UDP.
    pub fn payload(&self) -> usize {
        match self {
            Frame::Ip { l4: L4::Tcp { payload, .. } | L4::Udp { payload, .. }, .. } => *payload,
            _ => 0,
        }
    }
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn ipv4(packet: &[u8]) -> Option<Frame> {
    let header = usize::from(packet.first()? & 0xf) * 4;
    let total = usize::from(be16(packet, 2)?);
    let fragment = be16(packet, 6)? & 0x1fff;
    let protocol = *packet.get(9)?;
    let address = |at: usize| -> Option<IpAddr> {
        let octets: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
        Some(Ipv4Addr::from(octets).into())
    };
    // A GSO frame over 64 KiB carries 0 here.
    let end = if total == 0 { packet.len() } else { total };
    let rest = packet.get(header..)?;
    let l4 =
        if fragment != 0 { L4::Fragment(protocol) } else { l4(protocol, rest, end.saturating_sub(header)) };
    Some(Frame::Ip {
        src: address(12)?,
        dst: address(16)?,
        routed: false,
        options: header > 20,
        len: end,
        l4,
    })
}

fn ipv6(packet: &[u8]) -> Option<Frame> {
    let mut left = usize::from(be16(packet, 4)?);
    let len = 40 + left;
    let mut next = *packet.get(6)?;
    let address = |at: usize| -> Option<IpAddr> {
        let octets: [u8; 16] = packet.get(at..at + 16)?.try_into().ok()?;
        Some(Ipv6Addr::from(octets).into())
    };
    let (src, dst) = (address(8)?, address(24)?);
    let mut at = 40;
    let (mut routed, mut options) = (false, false);
    // RFC 8200 section 4.1: hop-by-hop, destination options, routing, fragment.
    while matches!(next, 0 | 43 | 44 | 60) {
        routed |= next == 43;
        options |= matches!(next, 0 | 60);
        let size = if next == 44 { 8 } else { 8 + 8 * usize::from(*packet.get(at + 1)?) };
        if next == 44 && be16(packet, at + 2)? & 0xfff8 != 0 {
            let l4 = L4::Fragment(*packet.get(at)?);
            return Some(Frame::Ip { src, dst, routed, options, len, l4 });
        }
        next = *packet.get(at)?;
        at += size;
        left = left.checked_sub(size)?;
    }
    let l4 = l4(next, packet.get(at..)?, left);
    Some(Frame::Ip { src, dst, routed, options, len, l4 })
}

/// `len`: of the whole segment, of which `bytes` may be only the start.
fn l4(protocol: u8, bytes: &[u8], len: usize) -> L4 {
    let ports = || Some((be16(bytes, 0)?, be16(bytes, 2)?));
    match (protocol, ports()) {
        (6, Some((src, dst))) if bytes.len() >= 20 => {
            let header = usize::from(bytes[12] >> 4) * 4;
            let options = bytes.get(20..header).unwrap_or(&[]);
            let payload = len.saturating_sub(header);
            L4::Tcp { src, dst, flags: bytes[13], payload, mptcp: has_mptcp(options) }
        }
        (17, Some((src, dst))) => L4::Udp { src, dst, payload: len.saturating_sub(8) },
        (136, Some((src, dst))) => L4::UdpLite { src, dst },
        (1, Some(_)) => L4::Icmp(bytes[0]),
        (58, Some(_)) => L4::Icmp6(bytes[0]),
        (2, Some(_)) => L4::Igmp(bytes[0]),
        _ => L4::Other(protocol),
    }
}

/// TCP option kind 30 (RFC 8684).
fn has_mptcp(mut options: &[u8]) -> bool {
    loop {
        match options {
            [] | [0, ..] => return false,
            [1, rest @ ..] => options = rest,
            [30, ..] => return true,
            [_, len, ..] if *len >= 2 => options = options.get(usize::from(*len)..).unwrap_or(&[]),
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ethernet(ethertype: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend(ethertype.to_be_bytes());
        frame.extend(payload);
        frame
    }

    fn v4(protocol: u8, body: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0];
        packet.extend((20 + body.len() as u16).to_be_bytes());
        packet.extend([0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        packet.extend(body);
        ethernet(0x0800, &packet)
    }

    #[test]
    fn a_reset_with_payload_is_not_bare() {
        let mut segment = vec![0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, RST | ACK, 0, 0, 0, 0, 0, 0];
        assert!(Frame::parse(&v4(6, &segment)).is_bare_reset());
        segment.push(b'x');
        assert!(!Frame::parse(&v4(6, &segment)).is_bare_reset());
    }

    #[test]
    fn ethernet_padding_is_no_payload() {
        let segment = [0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, ACK, 0, 0, 0, 0, 0, 0];
        let mut bytes = v4(6, &segment);
        bytes.extend([0; 6]);
        assert!(Frame::parse(&bytes).is_bare_ack());
    }

    #[test]
    fn mld_is_found_behind_hop_by_hop() {
        let mut packet = vec![0x60, 0, 0, 0, 0, 16, 0, 1];
        packet.extend([0xfd; 16]);
        packet.extend([0xff; 16]);
        packet.extend([58, 0, 5, 2, 0, 0, 1, 0]);
        packet.extend([143, 0, 0, 0, 0, 0, 0, 0]);
        let Frame::Ip { l4, options, routed, .. } = Frame::parse(&ethernet(0x86dd, &packet)) else {
            panic!("not IP")
        };
        assert_eq!((l4, options, routed), (L4::Icmp6(143), true, false));
    }

    #[test]
    fn cut_frames_are_other_and_never_panic() {
        let whole = v4(17, &[0, 1, 0, 2, 0, 8, 0, 0]);
        for end in 0..whole.len() {
            let _ = Frame::parse(&whole[..end]);
        }
        assert!(matches!(Frame::parse(&whole[..20]), Frame::Other { ethertype: 0x0800, .. }));
    }

    #[test]
    fn mptcp_is_an_option_not_a_protocol() {
        assert!(has_mptcp(&[2, 4, 5, 0xb4, 1, 30, 4, 0, 0]));
        assert!(!has_mptcp(&[2, 4, 30, 30, 0]));
        assert!(!has_mptcp(&[8, 0, 30]));
    }
}
