//! Certificates on disk, and what TLS is done with until they change. New
//! connections take up what is there; what cannot be used changes nothing.

use super::WARN_BEFORE;
use super::certificate::{self, Certificate, CertificateError};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The files are looked at again this long after the last look.
const CHECK: Duration = Duration::from_secs(1);
/// The same, where no connection asks.
const WATCH: Duration = Duration::from_secs(60);
/// A certificate that ends soon is warned about once in this time.
const WARN_EVERY: Duration = Duration::from_secs(86_400);
/// Of one file.
const MAX_BYTES: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{0}: {1}")]
    File(PathBuf, io::Error),
    #[error("{0}: larger than {MAX_BYTES} bytes")]
    Large(PathBuf),
    #[error("{0}: {1}")]
    Certificate(PathBuf, CertificateError),
    #[error("{0}: no private key in it (PEM, PKCS#8 or SEC1): {1}")]
    Key(PathBuf, String),
    #[error("{certificate} and {key} are of two different pairs")]
    Pair { certificate: PathBuf, key: PathBuf },
    #[error("{0}: {1}")]
    Unusable(PathBuf, String),
    #[error("this system trusts no CA; name one with `ca`")]
    NoSystemRoots,
}

/// PEM files: whom to trust, who we are, and the key to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// The bytes of the three.
#[derive(PartialEq, Eq)]
struct Contents {
    ca: Vec<u8>,
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl Files {
    fn read(&self) -> Result<Contents, TlsError> {
        Ok(Contents { ca: read(&self.ca)?, certificate: read(&self.certificate)?, key: read(&self.key)? })
    }
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |error| TlsError::File(path.to_owned(), error);
    let mut bytes = Vec::new();
    File::open(path).map_err(failed)?.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(TlsError::Large(path.to_owned()));
    }
    Ok(bytes)
}

/// Made of one reading of the files.
pub(crate) struct Loaded {
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
    certificate: Certificate,
}

impl Loaded {
    fn new(files: &Files, contents: &Contents) -> Result<Loaded, TlsError> {
        let of = |path: &Path| {
            let path = path.to_owned();
            move |why: CertificateError| TlsError::Certificate(path, why)
        };
        let unusable = |path: &Path| {
            let path = path.to_owned();
            move |why: String| TlsError::Unusable(path, why)
        };
        let mut roots = RootCertStore::empty();
        for ca in certificate::chain(&contents.ca).map_err(of(&files.ca))? {
            roots.add(ca).map_err(|e| unusable(&files.ca)(e.to_string()))?;
        }
        let roots = Arc::new(roots);
        let chain = certificate::chain(&contents.certificate).map_err(of(&files.certificate))?;
        let said = Certificate::parse(&chain[0]).map_err(of(&files.certificate))?;
        let key = PrivateKeyDer::from_pem_slice(&contents.key)
            .map_err(|e| TlsError::Key(files.key.clone(), e.to_string()))?;
        let pair = |error: rustls::Error| match error {
            rustls::Error::InconsistentKeys(_) => {
                TlsError::Pair { certificate: files.certificate.clone(), key: files.key.clone() }
            }
            other => TlsError::Unusable(files.key.clone(), other.to_string()),
        };
        let provider: Arc<CryptoProvider> = Arc::new(ring::default_provider());
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(pair)?
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(pair)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|e| unusable(&files.ca)(e.to_string()))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(pair)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(pair)?;
        for protocols in [&mut client.alpn_protocols, &mut server.alpn_protocols] {
            *protocols = vec![b"h2".to_vec()];
        }
        // A resumed session is not verified again: its certificate may have
        // expired since, its CA may no longer be trusted.
        client.resumption = rustls::client::Resumption::disabled();
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Loaded { client: Arc::new(client), server: Arc::new(server), certificate: said })
    }
}

/// Who we are to others, and what is wrong with it.
#[derive(Clone, Debug)]
pub struct State {
    pub certificate: Certificate,
    /// Why the files as they are now are not used; empty: they are.
    pub error: String,
}

/// Certificates as they are on disk now, or as they were when they were last of use.
pub struct Tls {
    files: Files,
    inner: Mutex<Inner>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.files.fmt(f)
    }
}

struct Inner {
    /// What was tried last.
    tried: Option<Contents>,
    loaded: Arc<Loaded>,
    checked: Instant,
    /// Somebody is reading the files.
    checking: bool,
    error: String,
    warned: Option<Instant>,
}

impl Tls {
    pub fn open(files: Files) -> Result<Arc<Tls>, TlsError> {
        let contents = files.read()?;
        let loaded = Loaded::new(&files, &contents)?;
        warn_of_readers(&files.key);
        let inner = Inner {
            tried: Some(contents),
            loaded: Arc::new(loaded),
            checked: Instant::now(),
            checking: false,
            error: String::new(),
            warned: None,
        };
        let tls = Tls { files, inner: Mutex::new(inner) };
        tls.warn_of_end();
        Ok(Arc::new(tls))
    }

    /// Poisoned: a panic between two assignments, each of which leaves it whole.
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn files(&self) -> &Files {
        &self.files
    }

    pub fn state(&self) -> State {
        let inner = self.inner();
        State { certificate: inner.loaded.certificate.clone(), error: inner.error.clone() }
    }

    /// For a new connection.
    pub(crate) async fn current(self: &Arc<Tls>) -> Arc<Loaded> {
        let due = {
            let mut inner = self.inner();
            let due = !inner.checking && inner.checked.elapsed() >= CHECK;
            inner.checking |= due;
            due
        };
        if due {
            let files = self.files.clone();
            // The disk may be slow.
            let read = tokio::task::spawn_blocking(move || files.read()).await;
            self.take_up(read.ok());
        }
        self.inner().loaded.clone()
    }

    /// `None`: they were not read.
    fn take_up(&self, read: Option<Result<Contents, TlsError>>) {
        let mut inner = self.inner();
        inner.checking = false;
        inner.checked = Instant::now();
        let Some(contents) = read else { return };
        let outcome = match contents {
            Ok(contents) if inner.tried.as_ref() == Some(&contents) => return,
            Ok(contents) => {
                let loaded = Loaded::new(&self.files, &contents);
                inner.tried = Some(contents);
                loaded
            }
            Err(error) => {
                // What comes back is tried again.
                inner.tried = None;
                Err(error)
            }
        };
        match outcome {
            Ok(loaded) => {
                tracing::info!(certificate = %self.files.certificate.display(), until = %end(&loaded.certificate),
                    "new connections use the certificates as they are on disk now");
                inner.loaded = Arc::new(loaded);
                inner.error.clear();
                inner.warned = None;
            }
            Err(error) => {
                let error = error.to_string();
                if inner.error != error {
                    tracing::error!(%error, "the certificates on disk cannot be used: those from before stay in use");
                    inner.error = error;
                }
            }
        }
        drop(inner);
        self.warn_of_end();
    }

    /// Takes up new files although nobody connects, and warns in time.
    pub async fn watch(self: Arc<Tls>) {
        loop {
            tokio::time::sleep(WATCH).await;
            self.current().await;
            self.warn_of_end();
        }
    }

    fn warn_of_end(&self) {
        let mut inner = self.inner();
        let left = inner.loaded.certificate.not_after.saturating_sub(now());
        let soon = left <= i64::try_from(WARN_BEFORE.as_secs()).unwrap_or(i64::MAX);
        if !soon || inner.warned.is_some_and(|at| at.elapsed() < WARN_EVERY) {
            return;
        }
        inner.warned = Some(Instant::now());
        let (file, until) = (self.files.certificate.display(), end(&inner.loaded.certificate));
        if left < 0 {
            tracing::error!(certificate = %file, %until, "the certificate has expired: peers refuse it");
        } else {
            tracing::warn!(certificate = %file, %until, days = left / 86_400, "the certificate ends soon: issue another");
        }
    }
}

fn now() -> i64 {
    crate::event::now() / 1_000_000_000
}

fn end(certificate: &Certificate) -> crate::event::json::Time {
    crate::event::json::Time(certificate.not_after.saturating_mul(1_000_000_000))
}

pub(super) fn warn_of_readers(key: &Path) {
    use std::os::unix::fs::MetadataExt;
    if std::fs::metadata(key).is_ok_and(|m| m.mode() & 0o007 != 0) {
        tracing::warn!(key = %key.display(), "anyone on this host may read the private key: chmod o= it");
    }
}
