//! Addresses, CIDRs and ports as rules write them.

use ipnet::{IpNet, Ipv4Net};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

/// Why a text is no destination, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct AddressError {
    pub message: String,
    pub help: Option<String>,
}

impl AddressError {
    fn new(message: impl Into<String>, help: Option<String>) -> AddressError {
        AddressError { message: message.into(), help }
    }
}

/// A CIDR or a bare address. `None`: it is neither (a host name, then).
pub fn net(text: &str) -> Option<Result<IpNet, AddressError>> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(usable(IpNet::from(address)));
    }
    let (address, bits) = text.split_once('/')?;
    let Ok(address) = address.parse::<IpAddr>() else {
        let help = "host names take no prefix length; an IPv6 address takes no brackets".to_owned();
        return Some(Err(AddressError::new(format!("`{text}` is not a CIDR"), Some(help))));
    };
    let most = if address.is_ipv4() { 32 } else { 128 };
    let plain = !bits.is_empty() && bits.len() <= 3 && bits.bytes().all(|b| b.is_ascii_digit());
    let Some(bits) = bits.parse::<u8>().ok().filter(|bits| plain && *bits <= most) else {
        let message = format!("`{text}`: the prefix length is a number from 0 to {most}");
        return Some(Err(AddressError::new(message, None)));
    };
    let net = match IpNet::new(address, bits) {
        Ok(net) => net,
        Err(e) => return Some(Err(AddressError::new(format!("`{text}`: {e}"), None))),
    };
    if net.trunc() != net {
        let message = format!("`{text}` has bits set behind its prefix");
        let help = format!("write `{}` for the network or `{address}` for the one address", net.trunc());
        return Some(Err(AddressError::new(message, Some(help))));
    }
    Some(usable(net))
}

/// Addresses are normalised before they are matched (`sensor_common::addr`), so
/// a rule for a form that never reaches the comparison would silently not hold.
fn usable(net: IpNet) -> Result<IpNet, AddressError> {
    let never = |what: &str, instead: Option<String>| {
        let help = instead.map(|i| format!("write `{i}`"));
        Err(AddressError::new(format!("`{net}` never matches: {what}"), help))
    };
    match net {
        IpNet::V4(v4) if v4.addr().is_unspecified() && v4.prefix_len() == 32 => {
            never("Linux connects to loopback instead", Some("127.0.0.1".into()))
        }
        IpNet::V4(_) => Ok(net),
        IpNet::V6(v6) => {
            let (address, bits) = (v6.addr(), v6.prefix_len());
            if address.is_unspecified() && bits == 128 {
                return never("Linux connects to loopback instead", Some("::1".into()));
            }
            let segments = address.segments();
            let embedded = if segments[..6] == [0, 0, 0, 0, 0, 0xffff] && bits >= 96 {
                Some(("v4-mapped", low_v4(address), bits - 96))
            } else if segments[..6] == [0x64, 0xff9b, 0, 0, 0, 0] && bits >= 96 {
                Some(("NAT64", low_v4(address), bits - 96))
            } else if segments[0] == 0x2002 && bits >= 16 {
                let v4 = (u32::from(segments[1]) << 16) | u32::from(segments[2]);
                Some(("6to4", Ipv4Addr::from(v4), (bits - 16).min(32)))
            } else {
                None
            };
            match embedded {
                Some((form, v4, bits)) => {
                    let instead = Ipv4Net::new(v4, bits).map(|n| n.trunc().to_string()).ok();
                    never(&format!("{form} addresses are judged as the IPv4 address inside"), instead)
                }
                None => Ok(net),
            }
        }
    }
}

fn low_v4(address: Ipv6Addr) -> Ipv4Addr {
    let octets = address.octets();
    Ipv4Addr::new(octets[12], octets[13], octets[14], octets[15])
}

/// `443` or `6000-6010`.
pub fn ports(text: &str) -> Result<RangeInclusive<u16>, AddressError> {
    let number = |text: &str| -> Option<u16> {
        let plain = !text.is_empty() && text.len() <= 5 && text.bytes().all(|b| b.is_ascii_digit());
        text.parse::<u16>().ok().filter(|port| plain && *port > 0)
    };
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    let (Some(low), Some(high)) = (number(low.trim()), number(high.trim())) else {
        let help = "a port is a number from 1 to 65535, a range is `6000-6010`".to_owned();
        return Err(AddressError::new(format!("`{text}` is not a port"), Some(help)));
    };
    if low > high {
        let help = Some(format!("write `{high}-{low}`"));
        return Err(AddressError::new(format!("`{text}` is an empty range"), help));
    }
    Ok(low..=high)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sensor_common::addr::Addr;

    fn refused(text: &str) -> (String, String) {
        let e = net(text).expect("an address").expect_err(text);
        (e.message, e.help.unwrap_or_default())
    }

    #[test]
    fn a_form_that_is_normalised_away_is_refused_with_the_form_to_write() {
        for (written, instead) in [
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            ("::ffff:10.1.2.3", "10.1.2.3/32"),
            ("64:ff9b::a00:0/104", "10.0.0.0/8"),
            ("2002:a01:203::/48", "10.1.2.3/32"),
            ("2002::/16", "0.0.0.0/0"),
            ("2002:a01:203:4::1", "10.1.2.3/32"),
            ("0.0.0.0", "127.0.0.1"),
            ("::", "::1"),
        ] {
            assert_eq!(refused(written).1, format!("write `{instead}`"), "{written}");
        }
        assert!(net("::/0").unwrap().is_ok() && net("0.0.0.0/0").unwrap().is_ok());
    }

    #[test]
    fn host_bits_are_refused_with_the_network() {
        assert!(refused("10.1.2.3/8").1.contains("`10.0.0.0/8`"));
        assert!(refused("2001:db8::1/32").1.contains("`2001:db8::/32`"));
    }

    #[test]
    fn odd_prefix_lengths_are_refused() {
        for text in
            ["10.0.0.0/33", "::/129", "10.0.0.0/", "10.0.0.0/+8", "10.0.0.0/0008", "10.0.0.0/8/8", "a/8"]
        {
            assert!(net(text).unwrap().is_err(), "{text}");
        }
        assert!(net("example.com").is_none());
    }

    #[test]
    fn ports_are_1_to_65535() {
        assert_eq!(ports("443").unwrap(), 443..=443);
        assert_eq!(ports("6000-6010").unwrap(), 6000..=6010);
        for text in ["0", "65536", "-1", "", "443-", "-", "10-9", "0x1bb", "4 43", "443.0", "1-2-3", "+1"] {
            assert!(ports(text).is_err(), "{text}");
        }
    }

    proptest! {
        /// What is accepted can match: its first or last address normalises
        /// to something inside.
        #[test]
        fn an_accepted_net_matches_something(bytes: [u8; 16], bits in 0u8..=128) {
            let written = ipnet::Ipv6Net::new(Ipv6Addr::from(bytes), bits).unwrap().trunc();
            if let Some(Ok(IpNet::V6(accepted))) = net(&written.to_string()) {
                let ends = [accepted.network(), accepted.broadcast()];
                let met = ends.into_iter().any(|a| {
                    let normal: IpAddr = Addr::from(IpAddr::V6(a)).normalise().into();
                    IpNet::V6(accepted).contains(&normal)
                });
                prop_assert!(met, "{accepted}");
            }
        }
    }
}
