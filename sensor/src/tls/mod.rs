//! mTLS between sensors and collectors: TLS 1.3 only, certificates on both ends.
//!
//! `name` reads whose a certificate is (a SPIFFE id), `certificate` what it says,
//! `authority` makes a small CA and issues from it, `files` keeps up with what is
//! on disk, `reason` says in words why a peer was refused.

mod authority;
mod certificate;
mod files;
mod name;
mod reason;

pub use authority::{Authority, AuthorityError, Pair, Subject, Validity};
pub use certificate::{Certificate, CertificateError, San, read_pem};
pub use files::{Files, State, Tls, TlsError};
pub use name::{NameError, SpiffeId, TRUST_DOMAIN};
pub(crate) use reason::{of_client, of_collector};

/// From this long before its end, a certificate is warned about.
pub const WARN_BEFORE: std::time::Duration = std::time::Duration::from_secs(14 * 86_400);
