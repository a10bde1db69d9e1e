//! What the file of outputs says of syslog.

use super::message::{FACILITIES, MAX_APP};
use crate::collect::output::file::{Context, RawTls};
use crate::policy::parse::at;
use crate::tls::Client;
use rustls::pki_types::ServerName;
use serde::Deserialize;
use serde_saphyr::Spanned;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Longest message over a stream, and in a datagram of UDP over IPv4.
const MAX_STREAM: u64 = 1 << 20;
const MAX_DATAGRAM: u64 = 65_507;

/// As written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    address: Spanned<String>,
    ca: Option<Spanned<String>>,
    cert: Option<Spanned<String>>,
    key: Option<Spanned<String>>,
    facility: Option<Spanned<String>>,
    app_name: Option<Spanned<String>>,
    framing: Option<Spanned<String>>,
    max_bytes: Option<Spanned<u64>>,
    resend: Option<Spanned<String>>,
}

#[derive(Debug)]
pub struct Settings {
    pub address: Address,
    pub tls: Option<Client>,
    /// Its number.
    pub facility: u8,
    pub app_name: String,
    pub framing: Framing,
    /// Longest message.
    pub max_bytes: u64,
    /// What was taken so long before a connection broke counts as safe.
    pub resend: Duration,
}

/// How messages are told apart on a stream (RFC 6587).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    OctetCounting,
    Newline,
}

/// Where a receiver listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Tls { host: String, port: u16 },
    Tcp { host: String, port: u16 },
    Udp { host: String, port: u16 },
    UnixDatagram(PathBuf),
    UnixStream(PathBuf),
}

impl FromStr for Address {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Address, &'static str> {
        const FORMS: &str = "write tls://HOST[:6514], tcp://HOST[:601], udp://HOST[:514], unix:/PATH (datagrams) or \
                             unix-stream:/PATH";
        let path = |path: &str| {
            let path = path.strip_prefix("//").unwrap_or(path);
            if path.starts_with('/') { Ok(PathBuf::from(path)) } else { Err(FORMS) }
        };
        if let Some(rest) = text.strip_prefix("unix:") {
            return path(rest).map(Address::UnixDatagram);
        }
        if let Some(rest) = text.strip_prefix("unix-stream:") {
            return path(rest).map(Address::UnixStream);
        }
        let (scheme, place) = text.split_once("://").ok_or(FORMS)?;
        let otherwise = match scheme {
            "tls" => 6514,
            "tcp" => 601,
            "udp" => 514,
            _ => return Err(FORMS),
        };
        let (host, port) = split(place, otherwise).ok_or(FORMS)?;
        Ok(match scheme {
            "tls" => Address::Tls { host, port },
            "tcp" => Address::Tcp { host, port },
            _ => Address::Udp { host, port },
        })
    }
}

/// `HOST`, `HOST:PORT`, `[IPV6]` or `[IPV6]:PORT`.
fn split(place: &str, otherwise: u16) -> Option<(String, u16)> {
    let (host, port) = match place.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            host.parse::<std::net::Ipv6Addr>().ok()?;
            (host, if rest.is_empty() { None } else { Some(rest.strip_prefix(':')?) })
        }
        None => place.split_once(':').map_or((place, None), |(host, port)| (host, Some(port))),
    };
    let port = port.map_or(Ok(otherwise), str::parse).ok().filter(|p| *p > 0)?;
    ServerName::try_from(host).ok()?;
    Some((host.to_owned(), port))
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, host, port) = match self {
            Address::UnixDatagram(path) => return write!(f, "unix:{}", path.display()),
            Address::UnixStream(path) => return write!(f, "unix-stream:{}", path.display()),
            Address::Tls { host, port } => ("tls", host, port),
            Address::Tcp { host, port } => ("tcp", host, port),
            Address::Udp { host, port } => ("udp", host, port),
        };
        let brackets = if host.contains(':') { ("[", "]") } else { ("", "") };
        write!(f, "{scheme}://{}{host}{}:{port}", brackets.0, brackets.1)
    }
}

impl Address {
    fn is_datagram(&self) -> bool {
        matches!(self, Address::Udp { .. } | Address::UnixDatagram(_))
    }

    /// Leaves this host unencrypted.
    fn is_exposed(&self) -> bool {
        match self {
            Address::Tcp { host, .. } | Address::Udp { host, .. } => {
                host != "localhost" && !host.parse::<std::net::IpAddr>().is_ok_and(|a| a.is_loopback())
            }
            Address::Tls { .. } | Address::UnixDatagram(_) | Address::UnixStream(_) => false,
        }
    }
}

pub(in crate::collect::output) fn check(context: &mut Context<'_>, raw: &Raw) -> Option<Settings> {
    let address = match raw.address.value.parse::<Address>() {
        Ok(address) => address,
        Err(forms) => {
            let message = format!("`{}` is no address", raw.address.value.escape_debug());
            context.error(at(&raw.address), "address", message).help = Some(forms.to_owned());
            return None;
        }
    };
    if address.is_exposed() {
        context.warning(at(&raw.address), "address", "events leave this host unencrypted").help =
            Some("tls:// does not let others on the way read and change them".to_owned());
    }
    let files = RawTls { ca: raw.ca.as_ref(), cert: raw.cert.as_ref(), key: raw.key.as_ref() };
    let tls = match &address {
        Address::Tls { .. } => Some(context.tls(&files, &[])?),
        _ => {
            if let Some(file) = [files.ca, files.cert, files.key].into_iter().flatten().next() {
                context.error(at(file), "", "certificates are for tls:// only");
            }
            None
        }
    };
    let facility = raw.facility.as_ref().map_or(Some(16), |name| {
        let found = FACILITIES.iter().position(|f| *f == name.value);
        if found.is_none() {
            context.unknown(at(name), "facility", &name.value, &FACILITIES);
        }
        found
    });
    let app_name = raw.app_name.as_ref().map_or_else(|| "mcp-sensor".to_owned(), |n| n.value.clone());
    if let Some(name) = &raw.app_name
        && (name.value.is_empty()
            || name.value.len() > MAX_APP
            || !name.value.chars().all(|c| c.is_ascii_graphic()))
    {
        let message = format!("1 to {MAX_APP} printable ASCII characters without spaces");
        context.error(at(name), "app_name", message);
    }
    let framing = match raw.framing.as_ref().map(|f| (f, f.value.as_str())) {
        None if matches!(address, Address::UnixStream(_)) => Framing::Newline,
        None => Framing::OctetCounting,
        Some((raw, _)) if address.is_datagram() => {
            context.error(at(raw), "framing", "a datagram is one message and needs none");
            Framing::OctetCounting
        }
        Some((_, "octet-counting")) => Framing::OctetCounting,
        Some((_, "newline")) => Framing::Newline,
        Some((raw, other)) => {
            context.unknown(at(raw), "framing", other, &["octet-counting", "newline"]);
            return None;
        }
    };
    let most = if matches!(address, Address::Udp { .. }) { MAX_DATAGRAM } else { MAX_STREAM };
    let max_bytes = context.number(raw.max_bytes.as_ref(), "max_bytes", (480, most, most));
    // A receiver that refuses our certificate says so after we have sent.
    let times = (Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(60));
    let resend = context.duration(raw.resend.as_ref(), "resend", times);
    Some(Settings { address, tls, facility: facility? as u8, app_name, framing, max_bytes, resend })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_shown() {
        for (text, shown) in [
            ("tls://siem.example", "tls://siem.example:6514"),
            ("tcp://10.0.0.1:1514", "tcp://10.0.0.1:1514"),
            ("udp://[2001:db8::1]", "udp://[2001:db8::1]:514"),
            ("unix:///dev/log", "unix:/dev/log"),
            ("unix-stream:/run/x", "unix-stream:/run/x"),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), shown);
            assert_eq!(shown.parse(), Ok(address));
        }
        for bad in [
            "",
            "siem:6514",
            "tls://",
            "tls://a:0",
            "tls://a:b",
            "udp://::1",
            "unix:x",
            "http://a",
            "tls://a b",
        ] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }
}
