//! What the file of outputs says of OTLP.

use crate::collect::output::Secret;
use crate::collect::output::file::{Context, RawTls};
use crate::policy::parse::at;
use crate::tls::Client;
use rustls::pki_types::ServerName;
use serde::Deserialize;
use serde_saphyr::Spanned;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tonic::metadata::AsciiMetadataKey;
use tonic::transport::Uri;

const MAX_HEADERS: usize = 32;
/// Of gRPC and HTTP/2 themselves.
const RESERVED: [&str; 4] = ["content-type", "te", "host", "user-agent"];

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    endpoint: Spanned<String>,
    ca: Option<Spanned<String>>,
    cert: Option<Spanned<String>>,
    key: Option<Spanned<String>>,
    #[serde(default)]
    headers: BTreeMap<String, Spanned<String>>,
    compression: Option<Spanned<String>>,
    timeout: Option<Spanned<String>>,
    metrics: Option<Spanned<String>>,
}

#[derive(Clone, Debug)]
pub struct Settings {
    /// `HOST:PORT`
    pub authority: String,
    pub tls: Option<(ServerName<'static>, Arc<Client>)>,
    pub headers: Vec<(AsciiMetadataKey, Secret)>,
    pub gzip: bool,
    /// For one request.
    pub timeout: Duration,
    /// How often sums are sent; `None`: never.
    pub metrics: Option<Duration>,
}

pub fn check(context: &mut Context<'_>, raw: &Raw) -> Option<Settings> {
    let (authority, host, secured) = endpoint(context, &raw.endpoint)?;
    let tls = if secured {
        let files = RawTls { ca: raw.ca.as_ref(), cert: raw.cert.as_ref(), key: raw.key.as_ref() };
        let client = context.tls(&files, &[b"h2"])?;
        let Ok(name) = ServerName::try_from(host) else {
            context.error(at(&raw.endpoint), "endpoint", "neither a host name nor an IP address");
            return None;
        };
        Some((name, Arc::new(client)))
    } else {
        if let Some(of_tls) = [&raw.ca, &raw.cert, &raw.key].into_iter().flatten().next() {
            context.error(at(of_tls), "", "certificates are for https://; http:// is not encrypted");
        }
        None
    };
    let gzip = match raw.compression.as_ref().map_or("gzip", |c| &c.value) {
        "gzip" => true,
        "none" => false,
        other => {
            context.unknown(raw.compression.as_ref().and_then(at), "compression", other, &["gzip", "none"]);
            false
        }
    };
    let (second, minute) = (Duration::from_secs(1), Duration::from_secs(60));
    let timeout = context.duration(raw.timeout.as_ref(), "timeout", (second, 10 * second, minute));
    let every = raw.metrics.as_ref();
    let metrics = every.map(|_| context.duration(every, "metrics", (second, minute, 60 * minute)));
    Some(Settings { authority, tls, headers: headers(context, &raw.headers), gzip, timeout, metrics })
}

fn endpoint(context: &mut Context<'_>, raw: &Spanned<String>) -> Option<(String, String, bool)> {
    let uri = raw.value.parse::<Uri>().ok();
    let parts = uri.as_ref().and_then(|uri| {
        let secured = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        // gRPC has paths of its own.
        let bare = matches!(uri.path(), "" | "/") && uri.query().is_none();
        let authority = uri.authority().filter(|a| bare && !a.as_str().contains('@'))?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let port = authority.port_u16().unwrap_or(4317);
        let authority = format!("{}:{port}", authority.host());
        (!host.is_empty()).then(|| (authority, host.to_owned(), secured))
    });
    if parts.is_none() {
        let message = format!("`{}` is no endpoint of OTLP over gRPC", raw.value.escape_debug());
        context.error(at(raw), "endpoint", message).help =
            Some("write `https://HOST:4317`, or `http://HOST:4317` where it has no TLS".to_owned());
    }
    parts
}

fn headers(
    context: &mut Context<'_>,
    raw: &BTreeMap<String, Spanned<String>>,
) -> Vec<(AsciiMetadataKey, Secret)> {
    let mut headers = Vec::new();
    if raw.len() > MAX_HEADERS {
        context.error(None, "headers", format!("more than {MAX_HEADERS}"));
        return headers;
    }
    for (name, value) in raw {
        let key = name.to_ascii_lowercase();
        let free = !key.starts_with("grpc-") && !RESERVED.contains(&key.as_str());
        match AsciiMetadataKey::from_bytes(key.as_bytes()) {
            Ok(key) if free => headers.extend(context.secret(value, "headers").map(|secret| (key, secret))),
            _ => {
                let message = format!("`{}` is no header that may be set", name.escape_debug());
                context.error(at(value), "headers", message);
            }
        }
    }
    headers
}
