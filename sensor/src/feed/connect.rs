//! Where a collector is, and the way there: TLS, plain TCP on this host, or a
//! unix socket.

use crate::tls::{self, Tls};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

#[derive(Debug, thiserror::Error)]
#[error("collector address {0:?}: {1}")]
pub struct AddressError(String, String);

const FORMS: &str = "give https://HOST:PORT, http://127.0.0.1:PORT or unix:/PATH";
/// First byte of a TLS record that is an alert; no HTTP/2 server begins so.
const TLS_ALERT: u8 = 0x15;

/// A collector's address.
#[derive(Clone)]
pub struct Target {
    address: String,
    endpoint: Endpoint,
    way: Way,
}

#[derive(Clone)]
enum Way {
    Unix,
    /// `HOST:PORT`
    Plain(String),
    Tls(String, ServerName<'static>, Arc<Tls>),
}

impl Target {
    /// `https://HOST:PORT`, `http://HOST:PORT` or `unix:/PATH`; without a scheme
    /// it is https where there are certificates. Without TLS only this host is
    /// taken, unless `plaintext` allows all.
    pub fn new(address: &str, tls: Option<Arc<Tls>>, plaintext: bool) -> Result<Target, AddressError> {
        let bad = |why: &str| AddressError(address.to_owned(), why.to_owned());
        let endpoint = |uri: String| Endpoint::from_shared(uri).map_err(|e| bad(&e.to_string()));
        let target = |endpoint, way| Target { address: address.to_owned(), endpoint, way };
        if let Some(path) = address.strip_prefix("unix:") {
            if !path.trim_start_matches("//").starts_with('/') {
                return Err(bad("the path must be absolute"));
            }
            return Ok(target(endpoint(address.to_owned())?, Way::Unix));
        }
        let (scheme, rest) = match address.split_once("://") {
            Some(("https", rest)) => (Some(true), rest),
            Some(("http", rest)) => (Some(false), rest),
            Some(_) => return Err(bad(&format!("unknown scheme; {FORMS}"))),
            None => (None, address),
        };
        let authority = rest.trim_end_matches('/');
        let (host, port) = authority.rsplit_once(':').unwrap_or_default();
        if host.is_empty() || port.parse::<u16>().is_err() {
            return Err(bad(&format!("no port; {FORMS}")));
        }
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let at = endpoint(format!("http://{authority}"))?;
        match (scheme, tls) {
            (Some(true), None) => Err(bad("TLS needs certificates: give --tls-ca, --tls-cert and --tls-key")),
            (Some(true) | None, Some(tls)) => {
                let name = ServerName::try_from(host.to_owned())
                    .map_err(|_| bad("neither a host name nor an IP address"))?;
                let origin = format!("https://{authority}").parse().map_err(|_| bad(FORMS))?;
                Ok(target(at.origin(origin), Way::Tls(authority.to_owned(), name, tls)))
            }
            (Some(false), Some(_)) => Err(bad("certificates are for https://; http:// is not encrypted")),
            (Some(false) | None, None) if plaintext || is_loopback(host) => {
                Ok(target(at, Way::Plain(authority.to_owned())))
            }
            (Some(false) | None, None) => Err(bad(
                "without TLS events go only to this host: write https:// and give --tls-ca, --tls-cert and \
                 --tls-key, or, where the network is trusted, --insecure-plaintext",
            )),
        }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// Whether others on the way can read what is sent.
    pub fn is_exposed(&self) -> bool {
        matches!(&self.way, Way::Plain(at) if !is_loopback(at.rsplit_once(':').unwrap_or_default().0))
    }

    /// On another host, as far as its address says.
    pub(super) fn is_remote(&self) -> bool {
        match &self.way {
            Way::Unix => false,
            Way::Plain(at) | Way::Tls(at, ..) => !is_loopback(at.rsplit_once(':').unwrap_or_default().0),
        }
    }

    pub fn tls(&self) -> Option<&Arc<Tls>> {
        match &self.way {
            Way::Tls(_, _, tls) => Some(tls),
            Way::Unix | Way::Plain(_) => None,
        }
    }

    /// With deadlines for connecting and for a silent peer.
    pub(super) fn within(mut self, connect: Duration) -> Target {
        self.endpoint = self
            .endpoint
            .connect_timeout(connect)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true);
        self
    }

    /// A connection for whoever reads; an error says why there is none.
    pub async fn open(&self, connect: Duration) -> Result<Channel, String> {
        let heard = Heard::default();
        self.clone().within(connect).connect(&heard).await.map_err(|error| {
            heard.take().unwrap_or_else(|| {
                let mut cause: &dyn std::error::Error = &error;
                while let Some(source) = cause.source() {
                    cause = source;
                }
                cause.to_string()
            })
        })
    }

    pub(super) async fn connect(&self, heard: &Heard) -> Result<Channel, tonic::transport::Error> {
        if matches!(self.way, Way::Unix) {
            return self.endpoint.connect().await;
        }
        let (way, heard) = (self.way.clone(), heard.clone());
        let dial = tower::service_fn(move |_| {
            let (way, heard) = (way.clone(), heard.clone());
            async move { Ok::<_, io::Error>(TokioIo::new(dial(way, heard).await?)) }
        });
        self.endpoint.connect_with_connector(dial).await
    }
}

fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|a| a.is_loopback())
}

async fn dial(way: Way, heard: Heard) -> io::Result<Stream> {
    let (at, secured) = match way {
        Way::Unix => return Err(io::ErrorKind::Unsupported.into()),
        Way::Plain(at) => (at, None),
        Way::Tls(at, name, tls) => (at, Some((name, tls))),
    };
    let stream = TcpStream::connect(at).await?;
    stream.set_nodelay(true)?;
    let Some((name, tls)) = secured else { return Ok(Stream::Plain { stream, began: false, heard }) };
    let config = tls.current().await.client.clone();
    match TlsConnector::from(config).connect(name, stream).await {
        Ok(stream) => Ok(Stream::Tls { stream: Box::new(stream), heard }),
        Err(error) => {
            heard.note(&error);
            Err(error)
        }
    }
}

/// What the peer said about TLS. HTTP/2 in between keeps no causes, and a
/// collector verifies a sensor only after the handshake is done on this side.
#[derive(Clone, Default)]
pub(super) struct Heard(Arc<Mutex<Option<String>>>);

impl Heard {
    fn note(&self, error: &io::Error) {
        if let Some(reason) = tls::of_collector(error) {
            self.say(reason);
        }
    }

    fn say(&self, reason: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
    }

    pub(super) fn take(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

enum Stream {
    Plain {
        stream: TcpStream,
        /// Something was read.
        began: bool,
        heard: Heard,
    },
    Tls {
        stream: Box<TlsStream<TcpStream>>,
        heard: Heard,
    },
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain { stream, began, heard } => {
                let before = buf.filled().len();
                let read = Pin::new(stream).poll_read(cx, buf);
                if let (false, Some(first)) = (*began, buf.filled().get(before)) {
                    *began = true;
                    if *first == TLS_ALERT {
                        heard.say("the collector speaks TLS: write https://".to_owned());
                    }
                }
                read
            }
            Stream::Tls { stream, heard } => {
                let read = Pin::new(stream).poll_read(cx, buf);
                if let Poll::Ready(Err(error)) = &read {
                    heard.note(error);
                }
                read
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain { stream, .. } => Pin::new(stream).poll_write(cx, buf),
            Stream::Tls { stream, heard } => {
                let written = Pin::new(&mut *stream).poll_write(cx, buf);
                if let Poll::Ready(Err(_)) = &written {
                    // The peer closed; what it said before is still to be read.
                    let mut byte = [0; 1];
                    let mut last = ReadBuf::new(&mut byte);
                    if let Poll::Ready(Err(error)) = Pin::new(stream).poll_read(cx, &mut last) {
                        heard.note(&error);
                    }
                }
                written
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain { stream, .. } => Pin::new(stream).poll_flush(cx),
            Stream::Tls { stream, .. } => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain { stream, .. } => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls { stream, .. } => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_or_refused_with_the_reason() {
        let tls = tls::tests::sensor("s");
        let open = |address: &str| Target::new(address, None, false);
        for good in [
            "http://127.0.0.1:7117",
            "localhost:7117",
            "[::1]:7117",
            "127.0.0.2:1",
            "unix:/run/c.sock",
            "unix:///run/c.sock",
        ] {
            assert!(open(good).is_ok_and(|t| !t.is_exposed()), "{good}");
        }
        for (bad, why) in [
            ("127.0.0.1", "no port"),
            (":7117", "no port"),
            ("http://host", "no port"),
            ("host:70000", "no port"),
            ("https://host:1", "--tls-ca"),
            ("http://192.0.2.1:7117", "--insecure-plaintext"),
            ("collector.example:7117", "https://"),
            ("ftp://host:1", "scheme"),
            ("unix:relative", "absolute"),
        ] {
            let error = open(bad).err().unwrap().to_string();
            assert!(error.contains(why), "{bad}: {error}");
        }
        assert!(Target::new("http://192.0.2.1:7117", None, true).unwrap().is_exposed());
        for good in
            ["https://c.example:7117", "c.example:7117", "https://[2001:db8::1]:7117", "https://10.0.0.1:1/"]
        {
            let target = Target::new(good, Some(tls.clone()), false).unwrap();
            assert!(target.tls().is_some() && !target.is_exposed(), "{good}");
        }
        for (bad, why) in [("http://127.0.0.1:1", "https://"), ("https://a_b c:1", "")] {
            let error = Target::new(bad, Some(tls.clone()), true).err().unwrap().to_string();
            assert!(error.contains(why), "{bad}: {error}");
        }
    }
}
