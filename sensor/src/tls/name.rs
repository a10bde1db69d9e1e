//! SPIFFE ids: whose a certificate is. The rules are those of the SPIFFE-ID
//! standard, section 2; an id that breaks one names nobody.

use std::fmt;

/// Of the ids that `mcp-sensor certs` issues. Another is as good where another
/// CA is trusted: the CA decides who is who.
pub const TRUST_DOMAIN: &str = "mcp-sensor";

const SCHEME: &str = "spiffe://";
/// Bytes of an id, and of its trust domain (SPIFFE-ID 2.3).
const MAX_ID: usize = 2048;
const MAX_TRUST_DOMAIN: usize = 255;
/// As the collector takes it in a `Hello`.
const MAX_NAME: usize = 128;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("not a spiffe:// URI")]
    Scheme,
    #[error("longer than {MAX_ID} bytes")]
    Long,
    #[error("its trust domain is empty, too long, or has other characters than a-z 0-9 . - _")]
    TrustDomain,
    #[error("its path has an empty or relative segment, or other characters than a-z A-Z 0-9 . - _")]
    Path,
    #[error("a name is 1 to {MAX_NAME} of the characters a-z A-Z 0-9 . - _")]
    Name,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpiffeId {
    trust_domain: String,
    /// Empty, or with a slash before each segment.
    path: String,
}

impl SpiffeId {
    pub fn parse(uri: &str) -> Result<SpiffeId, NameError> {
        if uri.len() > MAX_ID {
            return Err(NameError::Long);
        }
        let rest = uri.strip_prefix(SCHEME).ok_or(NameError::Scheme)?;
        let (trust_domain, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let good = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'.' | b'-' | b'_');
        if !(1..=MAX_TRUST_DOMAIN).contains(&trust_domain.len()) || !trust_domain.bytes().all(good) {
            return Err(NameError::TrustDomain);
        }
        if !path.is_empty() && !path.split('/').skip(1).all(is_segment) {
            return Err(NameError::Path);
        }
        Ok(SpiffeId { trust_domain: trust_domain.to_owned(), path: path.to_owned() })
    }

    /// `spiffe://mcp-sensor/ROLE/NAME`.
    pub(super) fn issued(role: &str, name: &str) -> Result<SpiffeId, NameError> {
        if name.len() > MAX_NAME || !is_segment(name) {
            return Err(NameError::Name);
        }
        Ok(SpiffeId { trust_domain: TRUST_DOMAIN.to_owned(), path: format!("/{role}/{name}") })
    }

    /// The NAME of `spiffe://ANY/sensor/NAME`: it may send its own events.
    pub fn sensor(&self) -> Option<&str> {
        self.name_as("/sensor/")
    }

    /// The NAME of `spiffe://ANY/reader/NAME`: it may read everybody's events.
    pub fn reader(&self) -> Option<&str> {
        self.name_as("/reader/")
    }

    fn name_as(&self, role: &str) -> Option<&str> {
        self.path.strip_prefix(role).filter(|name| !name.contains('/'))
    }
}

fn is_segment(segment: &str) -> bool {
    let good = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'-' | b'_');
    !matches!(segment, "" | "." | "..") && segment.bytes().all(good)
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}{}", self.trust_domain, self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_sensor_of_an_id_is_its_second_and_last_segment() {
        for (uri, sensor) in [
            ("spiffe://mcp-sensor/sensor/web-1.example", Some("web-1.example")),
            ("spiffe://prod.example.org/sensor/A_b", Some("A_b")),
            ("spiffe://mcp-sensor/collector/web-1", None),
            ("spiffe://mcp-sensor/sensor", None),
            ("spiffe://mcp-sensor/sensor/a/b", None),
            ("spiffe://mcp-sensor/x/sensor/a", None),
            ("spiffe://mcp-sensor", None),
        ] {
            let id = SpiffeId::parse(uri).unwrap();
            assert_eq!((id.sensor(), id.reader()), (sensor, None), "{uri}");
        }
    }

    #[test]
    fn a_reader_is_no_sensor() {
        let id = SpiffeId::parse("spiffe://mcp-sensor/reader/siem").unwrap();
        assert_eq!((id.reader(), id.sensor()), (Some("siem"), None));
    }

    #[test]
    fn what_the_standard_forbids_names_nobody() {
        let long = format!("spiffe://d/sensor/{}", "a".repeat(MAX_ID));
        for (uri, why) in [
            ("", NameError::Scheme),
            ("https://mcp-sensor/sensor/a", NameError::Scheme),
            ("SPIFFE://mcp-sensor/sensor/a", NameError::Scheme),
            ("spiffe:///sensor/a", NameError::TrustDomain),
            ("spiffe://Mcp/sensor/a", NameError::TrustDomain),
            ("spiffe://user@mcp/sensor/a", NameError::TrustDomain),
            ("spiffe://mcp:80/sensor/a", NameError::TrustDomain),
            ("spiffe://mcp/", NameError::Path),
            ("spiffe://mcp/sensor/", NameError::Path),
            ("spiffe://mcp/sensor//a", NameError::Path),
            ("spiffe://mcp/sensor/../a", NameError::Path),
            ("spiffe://mcp/sensor/a?b", NameError::Path),
            ("spiffe://mcp/sensor/a#b", NameError::Path),
            ("spiffe://mcp/sensor/a%62", NameError::Path),
            ("spiffe://mcp/sensor/é", NameError::Path),
            ("spiffe://mcp/sensor/a\0", NameError::Path),
            (&long, NameError::Long),
        ] {
            assert_eq!(SpiffeId::parse(uri), Err(why), "{uri:?}");
        }
    }

    proptest! {
        #[test]
        fn an_id_is_what_was_written_or_nothing(uri in "(spiffe://)?[a-z0-9A-Z./:_@%-]{0,40}|.{0,60}") {
            if let Ok(id) = SpiffeId::parse(&uri) {
                prop_assert_eq!(id.to_string(), uri);
            }
        }

        #[test]
        fn an_issued_name_is_read_back(name in "[a-zA-Z0-9._-]{1,128}") {
            match SpiffeId::issued("sensor", &name) {
                Ok(id) => {
                    let read = SpiffeId::parse(&id.to_string()).unwrap();
                    prop_assert_eq!(read.sensor(), Some(&*name));
                }
                Err(_) => prop_assert!(name == "." || name == ".."),
            }
        }
    }
}
