//! What a certificate says.

use super::name::SpiffeId;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::fmt;
use std::net::IpAddr;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    #[error("no certificate in it (PEM)")]
    None,
    #[error("not PEM: {0}")]
    Pem(String),
    #[error("not an X.509 certificate")]
    Malformed,
    #[error("it has {0} URI names; a SPIFFE certificate has one")]
    Uris(usize),
    #[error("its URI name {0:?} is no SPIFFE id: {1}")]
    Spiffe(String, super::NameError),
}

/// A subject alternative name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum San {
    Dns(String),
    Ip(IpAddr),
    Uri(String),
    Other,
}

impl fmt::Display for San {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            San::Dns(name) => write!(f, "DNS:{name}"),
            San::Ip(address) => write!(f, "IP:{address}"),
            San::Uri(uri) => write!(f, "URI:{uri}"),
            San::Other => f.write_str("other"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    pub subject: String,
    pub issuer: String,
    /// Hexadecimal.
    pub serial: String,
    pub sans: Vec<San>,
    /// UTC, seconds since 1970; both inclusive.
    pub not_before: i64,
    pub not_after: i64,
    pub is_ca: bool,
}

impl Certificate {
    pub fn parse(der: &[u8]) -> Result<Certificate, CertificateError> {
        let (_, x509) = X509Certificate::from_der(der).map_err(|_| CertificateError::Malformed)?;
        let names = x509.subject_alternative_name().map_err(|_| CertificateError::Malformed)?;
        Ok(Certificate {
            subject: x509.subject().to_string(),
            issuer: x509.issuer().to_string(),
            serial: x509.raw_serial_as_string(),
            sans: names.map_or(Vec::new(), |n| n.value.general_names.iter().map(san).collect()),
            not_before: x509.validity().not_before.timestamp(),
            not_after: x509.validity().not_after.timestamp(),
            is_ca: x509.is_ca(),
        })
    }

    /// Whose it is.
    pub fn spiffe(&self) -> Result<SpiffeId, CertificateError> {
        let uris: Vec<&String> =
            self.sans.iter().filter_map(|s| if let San::Uri(uri) = s { Some(uri) } else { None }).collect();
        match uris[..] {
            [uri] => SpiffeId::parse(uri).map_err(|why| CertificateError::Spiffe(uri.clone(), why)),
            _ => Err(CertificateError::Uris(uris.len())),
        }
    }
}

fn san(name: &GeneralName<'_>) -> San {
    match name {
        GeneralName::DNSName(name) => San::Dns((*name).to_owned()),
        GeneralName::URI(uri) => San::Uri((*uri).to_owned()),
        GeneralName::IPAddress(bytes) => match (<[u8; 4]>::try_from(*bytes), <[u8; 16]>::try_from(*bytes)) {
            (Ok(v4), _) => San::Ip(v4.into()),
            (_, Ok(v6)) => San::Ip(v6.into()),
            _ => San::Other,
        },
        _ => San::Other,
    }
}

/// Every certificate of a PEM file; at least one.
pub(super) fn chain(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match chain {
        Ok(chain) if chain.is_empty() => Err(CertificateError::None),
        Ok(chain) => Ok(chain),
        Err(error) => Err(CertificateError::Pem(error.to_string())),
    }
}

/// What every certificate of a PEM file says.
pub fn read_pem(pem: &[u8]) -> Result<Vec<Certificate>, CertificateError> {
    chain(pem)?.iter().map(|der| Certificate::parse(der)).collect()
}
