//! TLS to receivers that are no collectors: outputs of a collector to a SIEM or
//! a bus. A certificate of our own only where they ask for one; TLS 1.2 as well.

use super::certificate::{self, Certificate, CertificateError};
use super::files::{TlsError, read, warn_of_readers};
use rustls::crypto::ring;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// PEM files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientFiles {
    /// Whom to trust; `None`: whom the system trusts.
    pub ca: Option<PathBuf>,
    /// Our certificate and its key.
    pub pair: Option<(PathBuf, PathBuf)>,
}

#[derive(PartialEq, Eq)]
struct Contents {
    ca: Option<Vec<u8>>,
    pair: Option<(Vec<u8>, Vec<u8>)>,
}

/// The files as they are on disk, or as they were when they were last of use.
pub struct Client {
    files: ClientFiles,
    alpn: Vec<Vec<u8>>,
    system: Option<Arc<RootCertStore>>,
    inner: Mutex<(Contents, Arc<ClientConfig>)>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.files.fmt(f)
    }
}

impl ClientFiles {
    fn read(&self) -> Result<Contents, TlsError> {
        let ca = self.ca.as_deref().map(read).transpose()?;
        let pair = match &self.pair {
            Some((certificate, key)) => Some((read(certificate)?, read(key)?)),
            None => None,
        };
        Ok(Contents { ca, pair })
    }
}

impl Client {
    /// Reads the files. `alpn`: what is spoken over TLS; may be empty.
    pub fn open(files: ClientFiles, alpn: &[&[u8]]) -> Result<Client, TlsError> {
        let system = files.ca.is_none().then(system_roots).transpose()?.map(Arc::new);
        let alpn: Vec<Vec<u8>> = alpn.iter().map(|p| p.to_vec()).collect();
        let contents = files.read()?;
        let config = config(&files, &contents, system.as_ref(), &alpn)?;
        if let Some((_, key)) = &files.pair {
            warn_of_readers(key);
        }
        Ok(Client { files, alpn, system, inner: Mutex::new((contents, Arc::new(config))) })
    }

    /// Ours, where a receiver asks for one.
    pub fn certificate(&self) -> Option<&Path> {
        self.files.pair.as_ref().map(|(certificate, _)| certificate.as_path())
    }

    /// For a new connection. Files that cannot be used change nothing.
    pub fn current(&self) -> Arc<ClientConfig> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = self.files.read().and_then(|contents| {
            if contents == inner.0 {
                return Ok(());
            }
            let config = config(&self.files, &contents, self.system.as_ref(), &self.alpn)?;
            *inner = (contents, Arc::new(config));
            Ok(())
        });
        if let Err(error) = fresh {
            tracing::error!(%error, "the certificates on disk cannot be used: those from before stay in use");
        }
        inner.1.clone()
    }
}

fn system_roots() -> Result<RootCertStore, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        return Err(TlsError::NoSystemRoots);
    }
    Ok(roots)
}

fn config(
    files: &ClientFiles,
    contents: &Contents,
    system: Option<&Arc<RootCertStore>>,
    alpn: &[Vec<u8>],
) -> Result<ClientConfig, TlsError> {
    let of = |path: &Path| {
        let path = path.to_owned();
        move |why: CertificateError| TlsError::Certificate(path, why)
    };
    let roots = match (&files.ca, &contents.ca) {
        (Some(path), Some(bytes)) => {
            let mut roots = RootCertStore::empty();
            for ca in certificate::chain(bytes).map_err(of(path))? {
                roots.add(ca).map_err(|e| TlsError::Unusable(path.clone(), e.to_string()))?;
            }
            Arc::new(roots)
        }
        _ => system.cloned().ok_or(TlsError::NoSystemRoots)?,
    };
    let unusable = |why: rustls::Error| TlsError::Unusable(PathBuf::from("TLS"), why.to_string());
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_root_certificates(roots);
    let mut config = match (&files.pair, &contents.pair) {
        (Some((certificate, key)), Some((certificate_bytes, key_bytes))) => {
            let chain = certificate::chain(certificate_bytes).map_err(of(certificate))?;
            Certificate::parse(&chain[0]).map_err(of(certificate))?;
            let private = PrivateKeyDer::from_pem_slice(key_bytes)
                .map_err(|e| TlsError::Key(key.clone(), e.to_string()))?;
            builder.with_client_auth_cert(chain, private).map_err(|error| match error {
                rustls::Error::InconsistentKeys(_) => {
                    TlsError::Pair { certificate: certificate.clone(), key: key.clone() }
                }
                other => TlsError::Unusable(key.clone(), other.to_string()),
            })?
        }
        _ => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.to_vec();
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::{Authority, Subject, Validity};

    #[test]
    fn files_that_change_are_taken_up_and_bad_ones_change_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let days = Validity::days(1).unwrap();
        let ca = Authority::create(days).unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let issue = || {
            let pair = ca.issue(&Subject::Reader("siem".to_owned()), days).unwrap();
            (write("c.pem", &pair.certificate), write("k.pem", &pair.key))
        };
        let files = ClientFiles { ca: Some(write("ca.pem", &ca.pair().certificate)), pair: Some(issue()) };
        let client = Client::open(files.clone(), &[]).unwrap();
        let first = client.current();
        assert!(Arc::ptr_eq(&first, &client.current()));
        issue();
        let second = client.current();
        assert!(!Arc::ptr_eq(&first, &second));
        write("k.pem", "no key");
        assert!(Arc::ptr_eq(&second, &client.current()));
        let error = Client::open(files, &[]).unwrap_err().to_string();
        assert!(error.contains("k.pem") && error.contains("no private key"), "{error}");
        let absent = ClientFiles { ca: Some(dir.path().join("none.pem")), pair: None };
        assert!(Client::open(absent, &[]).unwrap_err().to_string().contains("none.pem"));
    }
}
