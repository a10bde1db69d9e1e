//! One connection to a receiver, HTTP/1.1.

use super::config::{Body, Settings, Text};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{self, HeaderValue};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use std::io;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Of an answer.
const MAX_ANSWER: usize = 64 << 10;

pub struct Client {
    runtime: Runtime,
    connection: Option<Connection>,
}

struct Connection {
    requests: SendRequest<Full<Bytes>>,
    task: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub struct Response {
    pub status: StatusCode,
    pub retry_after: Option<String>,
    pub location: Option<String>,
    pub body: Bytes,
}

impl Client {
    pub fn new() -> io::Result<Client> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Client { runtime, connection: None })
    }

    /// `key`: the same for the same events.
    pub fn post(&mut self, settings: &Settings, key: &str, body: &Bytes) -> io::Result<Response> {
        let request = || request(settings, key, body);
        let Client { runtime, connection } = self;
        runtime.block_on(async {
            let patience = settings.timeout;
            // One that was kept may have ended meanwhile: that is no error yet.
            if let Some(mut kept) = connection.take()
                && let Ok(Ok((response, reusable))) = timeout(patience, exchange(&mut kept, request()?)).await
            {
                *connection = reusable.then_some(kept);
                return Ok(response);
            }
            let mut fresh = within(patience, connect(settings)).await?;
            let (response, reusable) = within(patience, exchange(&mut fresh, request()?)).await?;
            *connection = reusable.then_some(fresh);
            Ok(response)
        })
    }
}

async fn within<T>(patience: Duration, doing: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let late = || io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {patience:?}"));
    timeout(patience, doing).await.unwrap_or_else(|_| Err(late()))
}

fn request(settings: &Settings, key: &str, body: &Bytes) -> io::Result<Request<Full<Bytes>>> {
    let kind = match settings.body {
        Body::Ndjson => "application/x-ndjson",
        Body::Array => "application/json",
    };
    let mut request = Request::post(settings.place.path.as_str())
        .header(header::HOST, settings.place.authority.as_str())
        .header(header::USER_AGENT, concat!("mcp-sensor/", env!("CARGO_PKG_VERSION")))
        .header(header::CONTENT_TYPE, kind)
        .header("idempotency-key", key);
    if settings.gzip {
        request = request.header(header::CONTENT_ENCODING, "gzip");
    }
    let mut request = request.body(Full::new(body.clone())).map_err(io::Error::other)?;
    for (name, text) in &settings.headers {
        let value = match text {
            Text::Plain(value) => value.clone(),
            Text::Secret(secret) => {
                let bad = |_| io::Error::other(format!("{secret}: no value of a header"));
                let mut value = HeaderValue::from_str(&secret.read()?).map_err(bad)?;
                value.set_sensitive(true);
                value
            }
        };
        request.headers_mut().insert(name, value);
    }
    Ok(request)
}

async fn connect(settings: &Settings) -> io::Result<Connection> {
    let place = &settings.place;
    let socket = TcpStream::connect((place.host.as_str(), place.port)).await?;
    socket.set_nodelay(true)?;
    let Some(tls) = &settings.tls else { return speak(socket).await };
    let name = ServerName::try_from(place.host.clone()).map_err(io::Error::other)?;
    let connector = tokio_rustls::TlsConnector::from(tls.current());
    let stream = connector.connect(name, socket).await.map_err(in_words)?;
    speak(stream).await
}

async fn speak<S>(stream: S) -> io::Result<Connection>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (requests, connection) = handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    let task = tokio::spawn(async move {
        // Who sent a request hears of it.
        let _ = connection.await;
    });
    Ok(Connection { requests, task })
}

/// The answer, and whether the connection may be used again.
async fn exchange(
    connection: &mut Connection,
    request: Request<Full<Bytes>>,
) -> io::Result<(Response, bool)> {
    connection.requests.ready().await.map_err(failed)?;
    let response = connection.requests.send_request(request).await.map_err(failed)?;
    let (head, body) = response.into_parts();
    let text = |name| head.headers.get(name).and_then(|v: &HeaderValue| v.to_str().ok()).map(str::to_owned);
    let (retry_after, location) = (text(header::RETRY_AFTER), text(header::LOCATION));
    // What an answer says beyond its status is for the log only.
    let body = Limited::new(body, MAX_ANSWER).collect().await;
    let reusable = body.is_ok();
    let body = body.map_or_else(|_| Bytes::new(), |b| b.to_bytes());
    Ok((Response { status: head.status, retry_after, location, body }, reusable))
}

/// The cause says more than that a connection failed.
fn failed(error: hyper::Error) -> io::Error {
    use std::error::Error as _;
    match error.source().and_then(|e| e.downcast_ref::<io::Error>()) {
        Some(cause) => in_words(match cause.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
            Some(tls) => io::Error::other(tls.clone()),
            None => io::Error::new(cause.kind(), cause.to_string()),
        }),
        None => io::Error::other(error),
    }
}

fn in_words(error: io::Error) -> io::Error {
    crate::tls::of_receiver(&error).map_or(error, io::Error::other)
}
