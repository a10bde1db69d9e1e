//! The options of TLS, which are the same on both ends.

use super::{Exit, Failure};
use crate::tls::{Files, Tls};
use clap::Args;
use std::path::PathBuf;
use std::sync::Arc;

// No doc comment: clap would take it for what the command does.
#[derive(Args, Debug, Clone, Default)]
pub struct TlsArgs {
    /// CA certificates that the other end's must be from (PEM; `mcp-sensor certs` makes them).
    #[arg(long, env = "MCP_SENSOR_TLS_CA", value_name = "FILE", requires_all = ["tls_cert", "tls_key"])]
    pub tls_ca: Option<PathBuf>,

    /// Certificate of this end, for TLS 1.3 (PEM). Files that change are taken up by new
    /// connections; what cannot be used changes nothing.
    #[arg(long, env = "MCP_SENSOR_TLS_CERT", value_name = "FILE", requires_all = ["tls_ca", "tls_key"])]
    pub tls_cert: Option<PathBuf>,

    /// Its private key (PEM).
    #[arg(long, env = "MCP_SENSOR_TLS_KEY", value_name = "FILE", requires_all = ["tls_ca", "tls_cert"])]
    pub tls_key: Option<PathBuf>,

    /// Allow TCP beyond this host without TLS: whoever is on the way can read and change events.
    #[arg(long, env = "MCP_SENSOR_INSECURE_PLAINTEXT")]
    pub insecure_plaintext: bool,
}

impl TlsArgs {
    /// Reads the files, if there are any.
    pub(crate) fn open(&self) -> anyhow::Result<Option<Arc<Tls>>> {
        let (Some(ca), Some(certificate), Some(key)) = (&self.tls_ca, &self.tls_cert, &self.tls_key) else {
            return Ok(None);
        };
        let files = Files { ca: ca.clone(), certificate: certificate.clone(), key: key.clone() };
        let tls = Tls::open(files).map_err(|error| {
            Failure::new(Exit::Failure, format!("--tls-…: {error}"))
                .hint("`mcp-sensor certs --help` says how to make certificates")
        })?;
        Ok(Some(tls))
    }
}
