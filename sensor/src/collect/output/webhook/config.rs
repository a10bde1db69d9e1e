//! What the file of outputs says of a webhook.

use crate::collect::output::Secret;
use crate::collect::output::file::{Context, RawTls};
use crate::policy::parse::at;
use crate::tls::Client;
use hyper::Uri;
use hyper::header::{HeaderName, HeaderValue};
use rustls::pki_types::ServerName;
use serde::Deserialize;
use serde_saphyr::Spanned;
use std::collections::BTreeMap;
use std::time::Duration;

const MAX_HEADERS: usize = 32;
/// Headers that hold secrets by their nature.
const SECRET: [&str; 4] = ["authorization", "cookie", "proxy-authorization", "x-api-key"];
/// Those that are ours.
const OURS: [&str; 8] = [
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "host",
    "idempotency-key",
    "te",
    "transfer-encoding",
];

/// As written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    url: Spanned<String>,
    ca: Option<Spanned<String>>,
    cert: Option<Spanned<String>>,
    key: Option<Spanned<String>>,
    #[serde(default)]
    headers: BTreeMap<String, Spanned<String>>,
    body: Option<Spanned<String>>,
    #[serde(default)]
    gzip: bool,
    max_bytes: Option<Spanned<u64>>,
    timeout: Option<Spanned<String>>,
}

#[derive(Debug)]
pub struct Settings {
    pub place: Place,
    pub tls: Option<Client>,
    pub headers: Vec<(HeaderName, Text)>,
    pub body: Body,
    pub gzip: bool,
    /// Of a request's body before compression.
    pub max_bytes: usize,
    /// For one request.
    pub timeout: Duration,
}

/// Of a URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub host: String,
    pub port: u16,
    /// The header `Host`.
    pub authority: String,
    pub path: String,
    pub secure: bool,
}

/// What a header says.
#[derive(Debug)]
pub enum Text {
    Plain(HeaderValue),
    Secret(Secret),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// A line for each event.
    Ndjson,
    /// One JSON array.
    Array,
}

impl Place {
    /// `Err`: what is wrong, and what to do about it.
    pub fn parse(url: &str) -> Result<Place, (&'static str, &'static str)> {
        let form = "write https://HOST[:PORT]/PATH";
        let uri: Uri = url.parse().map_err(|_| ("no URL", form))?;
        let secure = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(("no URL of http or https", form)),
        };
        let authority = uri.authority().ok_or(("no host", form))?;
        if authority.as_str().contains('@') {
            let why = "a password does not stand in this file";
            return Err((why, "give a header `authorization: file:PATH`"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        ServerName::try_from(host.as_str()).map_err(|_| ("no name of a host", form))?;
        let port = match authority.port() {
            Some(port) => port.as_u16(),
            None if secure => 443,
            None => 80,
        };
        let path = uri.path_and_query().map_or("/", |p| p.as_str()).to_owned();
        Ok(Place { host, port, authority: authority.to_string(), path, secure })
    }
}

pub(in crate::collect::output) fn check(context: &mut Context<'_>, raw: &Raw) -> Option<Settings> {
    let place = match Place::parse(&raw.url.value) {
        Ok(place) => place,
        Err((message, help)) => {
            context.error(at(&raw.url), "url", message).help = Some(help.to_owned());
            return None;
        }
    };
    let local = place.host == "localhost"
        || place.host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
    if !place.secure && !local {
        context.warning(at(&raw.url), "url", "events and headers leave this host unencrypted").help =
            Some("https:// does not let others on the way read and change them".to_owned());
    }
    let files = RawTls { ca: raw.ca.as_ref(), cert: raw.cert.as_ref(), key: raw.key.as_ref() };
    let tls = if place.secure {
        Some(context.tls(&files, &[b"http/1.1"])?)
    } else {
        if let Some(file) = [files.ca, files.cert, files.key].into_iter().flatten().next() {
            context.error(at(file), "", "certificates are for https:// only");
        }
        None
    };
    if let Some(value) = raw.headers.values().nth(MAX_HEADERS) {
        context.error(at(value), "headers", format!("more than {MAX_HEADERS}"));
    }
    let headers = raw.headers.iter().filter_map(|(name, value)| header(context, name, value)).collect();
    let body = match raw.body.as_ref().map(|b| (b, b.value.as_str())) {
        None | Some((_, "ndjson")) => Body::Ndjson,
        Some((_, "array")) => Body::Array,
        Some((raw, other)) => {
            context.unknown(at(raw), "body", other, &["ndjson", "array"]);
            return None;
        }
    };
    let max_bytes =
        context.number(raw.max_bytes.as_ref(), "max_bytes", (4 << 10, 1 << 20, 64 << 20)) as usize;
    let times = (Duration::from_millis(100), Duration::from_secs(10), Duration::from_secs(60));
    let timeout = context.duration(raw.timeout.as_ref(), "timeout", times);
    Some(Settings { place, tls, headers, body, gzip: raw.gzip, max_bytes, timeout })
}

fn header(context: &mut Context<'_>, name: &str, value: &Spanned<String>) -> Option<(HeaderName, Text)> {
    let key = format!("headers.{}", name.escape_debug());
    let Ok(header) = name.parse::<HeaderName>() else {
        context.error(at(value), &key, "no name of a header");
        return None;
    };
    if OURS.contains(&header.as_str()) {
        context.error(at(value), &key, "this header is set by the collector");
        return None;
    }
    let is_secret = value.value.starts_with("file:") || value.value.starts_with("env:");
    if is_secret || SECRET.contains(&header.as_str()) {
        let secret = context.secret(value, &key)?;
        return Some((header, Text::Secret(secret)));
    }
    match HeaderValue::from_str(&value.value) {
        Ok(text) => Some((header, Text::Plain(text))),
        Err(_) => {
            context.error(at(value), &key, "no value of a header: printable characters only");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_where_to_and_how() {
        let place = Place::parse("https://[2001:db8::1]:8443/a/b?c=d").unwrap();
        assert_eq!((place.host.as_str(), place.port, place.path.as_str()), ("2001:db8::1", 8443, "/a/b?c=d"));
        assert_eq!(place.authority, "[2001:db8::1]:8443");
        let place = Place::parse("http://siem.example").unwrap();
        assert_eq!((place.port, place.path.as_str(), place.secure), (80, "/", false));
        assert_eq!(Place::parse("https://siem.example").unwrap().port, 443);
        for bad in
            ["", "siem.example", "ftp://a/", "https://u:p@a/", "https://", "https:///x", "https://a b/"]
        {
            assert!(Place::parse(bad).is_err(), "{bad}");
        }
    }
}
