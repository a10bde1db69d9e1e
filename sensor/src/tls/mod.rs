//! mTLS between sensors and collectors: TLS 1.3 only, certificates on both ends.
//!
//! `name` reads whose a certificate is (a SPIFFE id), `certificate` what it says,
//! `authority` makes a small CA and issues from it, `files` keeps up with what is
//! on disk, `client` does so for receivers of other kinds, `reason` says in words
//! why a peer was refused.

mod authority;
mod certificate;
mod client;
mod files;
mod name;
mod reason;

pub use authority::{Authority, AuthorityError, Pair, Subject, Validity};
pub use certificate::{Certificate, CertificateError, San, read_pem};
pub use client::{Client, ClientFiles};
pub use files::{Files, State, Tls, TlsError};
pub use name::{NameError, SpiffeId, TRUST_DOMAIN};
pub(crate) use reason::{of_client, of_collector, of_receiver};

/// From this long before its end, a certificate is warned about.
pub const WARN_BEFORE: std::time::Duration = std::time::Duration::from_secs(14 * 86_400);

#[cfg(test)]
pub(crate) mod tests {
    use super::{Authority, Files, Subject, Tls, Validity};
    use std::sync::Arc;

    /// A sensor's certificates, of a CA of their own; the files are gone.
    pub(crate) fn sensor(name: &str) -> Arc<Tls> {
        let dir = tempfile::tempdir().unwrap();
        let days = Validity::days(1).unwrap();
        let ca = Authority::create(days).unwrap();
        let pair = ca.issue(&Subject::Sensor(name.to_owned()), days).unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let files = Files {
            ca: write("ca.pem", &ca.pair().certificate),
            certificate: write("s.pem", &pair.certificate),
            key: write("s-key.pem", &pair.key),
        };
        Tls::open(files).unwrap()
    }
}
