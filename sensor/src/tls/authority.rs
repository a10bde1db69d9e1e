//! A small CA for a first fleet: ECDSA P-256, one level, its key in a file.

use super::certificate::{Certificate, CertificateError};
use super::name::{NameError, SpiffeId};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::net::IpAddr;
use time::OffsetDateTime;

#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("the name {0:?} cannot stand in a certificate: {1}")]
    Name(String, NameError),
    #[error("{0:?} is neither a host name nor an IP address")]
    Host(String),
    #[error("a collector needs a host name or an address")]
    NoHost,
    #[error("no certificate can end then")]
    Validity,
    #[error("the CA ended {0}")]
    Ended(OffsetDateTime),
    #[error("the CA's certificate: {0}")]
    Certificate(#[from] CertificateError),
    #[error("this certificate is not of a CA")]
    NotAuthority,
    #[error("the key is not the one of the CA's certificate")]
    OtherKey,
    #[error("{0}")]
    Make(#[from] rcgen::Error),
}

/// A certificate and its key, PEM.
#[derive(Clone)]
pub struct Pair {
    pub certificate: String,
    pub key: String,
}

/// From when to when.
#[derive(Clone, Copy, Debug)]
pub struct Validity {
    pub not_before: OffsetDateTime,
    pub not_after: OffsetDateTime,
}

impl Validity {
    /// From now on, and an hour before: hosts' clocks differ.
    pub fn days(days: u32) -> Result<Validity, AuthorityError> {
        let now = OffsetDateTime::now_utc();
        let not_after = now.checked_add(time::Duration::days(days.into())).ok_or(AuthorityError::Validity)?;
        // X.509 has four digits for the year.
        if not_after.year() > 9999 {
            return Err(AuthorityError::Validity);
        }
        Ok(Validity { not_before: now - time::Duration::HOUR, not_after })
    }
}

/// Whom a certificate is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// By its name (`run --sensor`).
    Sensor(String),
    /// By every name and address that sensors reach it at.
    Collector(Vec<String>),
    /// By its name: it may read what all sensors sent.
    Reader(String),
}

pub struct Authority {
    certificate: String,
    not_after: OffsetDateTime,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn create(validity: Validity) -> Result<Authority, AuthorityError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        // Two CAs with one name would be told apart by nobody.
        let id = hex::encode(&params.key_identifier(&key)[..4]);
        params.distinguished_name.push(DnType::CommonName, format!("mcp-sensor CA {id}"));
        (params.not_before, params.not_after) = (validity.not_before, validity.not_after);
        let certificate = params.self_signed(&key)?.pem();
        Ok(Authority { certificate, not_after: validity.not_after, issuer: Issuer::new(params, key) })
    }

    pub fn open(certificate: &str, key: &str) -> Result<Authority, AuthorityError> {
        let key = KeyPair::from_pem(key)?;
        let der = CertificateDer::from_pem_slice(certificate.as_bytes())
            .map_err(|e| CertificateError::Pem(e.to_string()))?;
        let said = Certificate::parse(&der)?;
        if !said.is_ca {
            return Err(AuthorityError::NotAuthority);
        }
        if !holds(&der, &key) {
            return Err(AuthorityError::OtherKey);
        }
        let not_after =
            OffsetDateTime::from_unix_timestamp(said.not_after).map_err(|_| AuthorityError::Validity)?;
        let issuer = Issuer::from_ca_cert_der(&der, key)?;
        Ok(Authority { certificate: certificate.to_owned(), not_after, issuer })
    }

    /// Its own pair.
    pub fn pair(&self) -> Pair {
        Pair { certificate: self.certificate.clone(), key: self.issuer.key().serialize_pem() }
    }

    /// It ends with the CA at the latest.
    pub fn issue(&self, subject: &Subject, validity: Validity) -> Result<Pair, AuthorityError> {
        if self.not_after <= validity.not_before {
            return Err(AuthorityError::Ended(self.not_after));
        }
        let mut params = CertificateParams::new(Vec::new())?;
        let (role, name, usage) = match subject {
            Subject::Sensor(name) => ("sensor", name.clone(), ExtendedKeyUsagePurpose::ClientAuth),
            Subject::Reader(name) => ("reader", name.clone(), ExtendedKeyUsagePurpose::ClientAuth),
            Subject::Collector(hosts) => {
                for host in hosts {
                    params.subject_alt_names.push(self::host(host)?);
                }
                let first = hosts.first().ok_or(AuthorityError::NoHost)?;
                // No colon may stand in a SPIFFE id.
                ("collector", first.replace(':', "-"), ExtendedKeyUsagePurpose::ServerAuth)
            }
        };
        let id = SpiffeId::issued(role, &name).map_err(|why| AuthorityError::Name(name.clone(), why))?;
        params.subject_alt_names.insert(0, SanType::URI(id.to_string().try_into()?));
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // A sensor's certificate cannot serve as a collector's, nor the other way round.
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        params.not_before = validity.not_before;
        params.not_after = validity.not_after.min(self.not_after);
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Pair { certificate, key: key.serialize_pem() })
    }
}

fn host(host: &str) -> Result<SanType, AuthorityError> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let bad = || AuthorityError::Host(host.to_owned());
    match rustls::pki_types::DnsName::try_from(host) {
        Ok(name) if !host.starts_with('.') => {
            Ok(SanType::DnsName(name.as_ref().to_owned().try_into().map_err(|_| bad())?))
        }
        _ => Err(bad()),
    }
}

fn holds(der: &CertificateDer<'_>, key: &KeyPair) -> bool {
    use x509_parser::prelude::{FromDer, X509Certificate};
    X509Certificate::from_der(der)
        .is_ok_and(|(_, x509)| x509.public_key().subject_public_key.data == key.public_key_raw())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::{San, read_pem};

    fn authority() -> Authority {
        Authority::create(Validity::days(10).unwrap()).unwrap()
    }

    fn said(pair: &Pair) -> Certificate {
        read_pem(pair.certificate.as_bytes()).unwrap().remove(0)
    }

    #[test]
    fn certificates_name_whom_they_are_for_and_end_with_their_ca() {
        let ca = authority();
        let ca_said = said(&ca.pair());
        assert!(ca_said.is_ca && ca_said.subject == ca_said.issuer);
        // As a later run of the program finds it.
        let ca = Authority::open(&ca.pair().certificate, &ca.pair().key).unwrap();
        let days = Validity::days(90).unwrap();
        let sensor = said(&ca.issue(&Subject::Sensor("web-1".to_owned()), days).unwrap());
        assert_eq!(sensor.sans, [San::Uri("spiffe://mcp-sensor/sensor/web-1".to_owned())]);
        assert_eq!(sensor.spiffe().unwrap().sensor(), Some("web-1"));
        assert_eq!((sensor.is_ca, &sensor.issuer), (false, &ca_said.subject));
        assert_eq!(sensor.not_after, ca_said.not_after);
        let hosts = ["::1", "c.example", "10.0.0.1"].map(str::to_owned).to_vec();
        let collector = said(&ca.issue(&Subject::Collector(hosts), days).unwrap());
        assert_eq!(
            collector.sans.iter().map(San::to_string).collect::<Vec<_>>(),
            ["URI:spiffe://mcp-sensor/collector/--1", "IP:::1", "DNS:c.example", "IP:10.0.0.1"]
        );
        assert_eq!(collector.spiffe().unwrap().sensor(), None);
    }

    #[test]
    fn what_cannot_stand_in_a_certificate_is_refused() {
        let (ca, other, days) = (authority(), authority(), Validity::days(1).unwrap());
        let issue = |subject| ca.issue(&subject, days).err().unwrap().to_string();
        for bad in ["", "a b", "a/b", "..", "é", &"x".repeat(129)] {
            assert!(issue(Subject::Sensor(bad.to_owned())).contains("cannot stand"), "{bad}");
        }
        for bad in ["", "a b", ".a", "http://a", "a:1"] {
            assert!(issue(Subject::Collector(vec![bad.to_owned()])).contains("neither"), "{bad}");
        }
        assert!(issue(Subject::Collector(Vec::new())).contains("needs"));
        assert!(Validity::days(u32::MAX).is_err());
        let open =
            |certificate: &str, key: &str| Authority::open(certificate, key).err().unwrap().to_string();
        let (mine, theirs) = (ca.pair(), other.pair());
        assert!(open(&mine.certificate, &theirs.key).contains("key is not"));
        let leaf = ca.issue(&Subject::Sensor("s".to_owned()), days).unwrap();
        assert!(open(&leaf.certificate, &leaf.key).contains("not of a CA"));
        assert!(open("", &mine.key).contains("PEM"));
    }
}
