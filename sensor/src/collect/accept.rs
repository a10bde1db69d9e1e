//! Connections of sensors, and TLS on them, before any gRPC.

use crate::control::ControlSocket;
use crate::grpc::{Connection, Deadlines};
use crate::tls::{self, Certificate, SpiffeId, Tls};
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// Sensors that may be connected at one time.
const CONNECTIONS: usize = 4096;
/// Of them of one sensor, which needs one: one that went mad keeps out no other.
const OF_ONE: usize = 16;
/// TLS handshakes at one time. One more ends the oldest: who holds them open
/// cannot keep out a sensor, whose handshake takes milliseconds.
const HANDSHAKES: usize = 512;
/// For one handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// For a refused client to read why: a connection closed with bytes unread is
/// reset, and the reason with it.
const FAREWELL: Duration = Duration::from_secs(1);
/// Refusals in the log in this time; others are counted.
const LOGGED: (u32, Duration) = (20, Duration::from_secs(10));

pub(super) enum Bound {
    Tcp(TcpListener),
    Unix(UnixListener, ControlSocket),
}

pub(super) type Incoming = Connection<Stream, Remote, Place>;
type Connections = mpsc::Sender<io::Result<Incoming>>;

/// Where a request comes from, and from whom.
#[derive(Clone, Debug)]
pub(super) struct Remote {
    from: From,
    /// Of its certificate; `Err`: why it names nobody. `None`: no TLS, anyone.
    identity: Option<Arc<Result<SpiffeId, String>>>,
}

#[derive(Clone, Copy, Debug)]
enum From {
    Tcp(SocketAddr),
    Unix,
}

impl Remote {
    pub(super) const UNIX: Remote = Remote { from: From::Unix, identity: None };

    /// Whether it may speak for `sensor`; if not, why.
    pub(super) fn may_be(&self, sensor: &str) -> Result<(), String> {
        match self.identity.as_deref() {
            None => Ok(()),
            Some(Ok(id)) if id.sensor() == Some(sensor) => Ok(()),
            Some(Ok(id)) => Err(format!("this certificate is of {id}, not of the sensor {sensor:?}")),
            Some(Err(why)) => Err(format!("this certificate is of no sensor: {why}")),
        }
    }
}

impl Remote {
    /// Whether it may read what others sent; if not, why.
    pub(super) fn may_read(&self) -> Result<(), String> {
        match self.identity.as_deref() {
            None => Ok(()),
            Some(Ok(id)) if id.reader().is_some() => Ok(()),
            Some(Ok(id)) => {
                Err(format!("this certificate is of {id}, not of a reader (spiffe://DOMAIN/reader/NAME)"))
            }
            Some(Err(why)) => Err(format!("this certificate is of no reader: {why}")),
        }
    }
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.from {
            From::Tcp(address) => address.fmt(f),
            From::Unix => f.write_str("unix"),
        }
    }
}

pub(super) async fn accept(bound: &Bound, tls: Option<Arc<Tls>>, connections: Connections) {
    let places = Arc::new(Places::default());
    let log = Arc::new(Log::default());
    let mut handshakes = Handshakes::default();
    loop {
        let accepted = match bound {
            Bound::Tcp(listener) => listener.accept().await.map(|(stream, from)| {
                // Acks are small and a sensor waits for them.
                let _ = stream.set_nodelay(true);
                (Stream::Tcp(stream), From::Tcp(from))
            }),
            Bound::Unix(listener, _) => {
                listener.accept().await.map(|(stream, _)| (Stream::Unix(stream), From::Unix))
            }
        };
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let remote = Remote { from, identity: None };
        match (&tls, stream) {
            (Some(tls), Stream::Tcp(stream)) => {
                let handshake = Handshake {
                    remote,
                    tls: tls.clone(),
                    places: places.clone(),
                    connections: connections.clone(),
                    log: log.clone(),
                };
                if handshakes.add(tokio::spawn(handshake.run(stream)).abort_handle()) {
                    log.refused("the oldest of them", "too many unfinished TLS handshakes");
                }
            }
            (_, stream) => {
                let place = match places.take(None) {
                    Ok(place) => place,
                    Err(why) => {
                        log.refused(&remote, why);
                        continue;
                    }
                };
                let connection = Connection::new(stream, remote, place, Deadlines::default());
                if connections.send(Ok(connection)).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Room for connections.
struct Places {
    all: Arc<Semaphore>,
    /// Connections by whose they are.
    each: Counts,
}

type Counts = Arc<Mutex<HashMap<String, usize>>>;

impl Default for Places {
    fn default() -> Self {
        Places { all: Arc::new(Semaphore::new(CONNECTIONS)), each: Arc::default() }
    }
}

/// A connection's room, until it is dropped.
pub(super) struct Place {
    _permit: OwnedSemaphorePermit,
    whose: Option<(String, Counts)>,
}

impl Places {
    /// For a connection of `whose`, where that is known; or why there is none.
    fn take(&self, whose: Option<String>) -> Result<Place, &'static str> {
        let permit = self.all.clone().try_acquire_owned().map_err(|_| "too many connections")?;
        let Some(whose) = whose else { return Ok(Place { _permit: permit, whose: None }) };
        let mut each = self.each.lock().unwrap_or_else(PoisonError::into_inner);
        let count = each.entry(whose.clone()).or_default();
        if *count >= OF_ONE {
            return Err("too many connections of one sensor");
        }
        *count += 1;
        Ok(Place { _permit: permit, whose: Some((whose, self.each.clone())) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some((whose, each)) = &self.whose else { return };
        let mut each = each.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = each.get_mut(whose) {
            *count -= 1;
            if *count == 0 {
                each.remove(whose);
            }
        }
    }
}

/// Those that are not done, oldest first.
#[derive(Default)]
struct Handshakes(VecDeque<AbortHandle>);

impl Handshakes {
    /// True: another had to end for it.
    fn add(&mut self, handshake: AbortHandle) -> bool {
        while self.0.front().is_some_and(AbortHandle::is_finished) {
            self.0.pop_front();
        }
        if self.0.len() >= HANDSHAKES {
            self.0.retain(|h| !h.is_finished());
        }
        let oldest = if self.0.len() >= HANDSHAKES { self.0.pop_front() } else { None };
        self.0.push_back(handshake);
        oldest.inspect(AbortHandle::abort).is_some()
    }
}

impl Drop for Handshakes {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

struct Handshake {
    remote: Remote,
    tls: Arc<Tls>,
    places: Arc<Places>,
    connections: Connections,
    log: Arc<Log>,
}

impl Handshake {
    async fn run(self, stream: TcpStream) {
        let deadline = Instant::now() + HANDSHAKE;
        let shaking = async {
            let config = self.tls.current().await.server.clone();
            TlsAcceptor::from(config).accept(stream).into_fallible().await
        };
        let stream = match tokio::time::timeout_at(deadline, shaking).await {
            Ok(Ok(stream)) => stream,
            Ok(Err((error, stream))) => {
                self.log.refused(&self.remote, &tls::of_client(&error));
                let _ = timeout(FAREWELL, farewell(stream)).await;
                return;
            }
            Err(_) => return self.log.refused(&self.remote, "its TLS handshake takes too long"),
        };
        let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let certificate = certificate.and_then(|der| Certificate::parse(der).ok());
        // The verifier has seen one.
        let Some(certificate) = certificate else { return };
        let left = certificate.not_after.saturating_sub(crate::event::now() / 1_000_000_000);
        let deadlines = Deadlines {
            // Nobody is verified once for ever: it comes back with another.
            end: Some(Duration::from_secs(u64::try_from(left).unwrap_or(0) + 1)),
            ..Deadlines::default()
        };
        let identity = certificate.spiffe().map_err(|why| why.to_string());
        let whose = identity.as_ref().map_or_else(|_| certificate.subject.clone(), SpiffeId::to_string);
        let place = match self.places.take(Some(whose)) {
            Ok(place) => place,
            Err(why) => return self.log.refused(&self.remote, why),
        };
        let remote = Remote { from: self.remote.from, identity: Some(Arc::new(identity)) };
        let connection = Connection::new(Stream::Tls(Box::new(stream)), remote, place, deadlines);
        let _ = self.connections.send(Ok(connection)).await;
    }
}

async fn farewell(mut stream: TcpStream) {
    let _ = stream.shutdown().await;
    let mut rest = [0; 1024];
    while stream.read(&mut rest).await.is_ok_and(|n| n > 0) {}
}

/// Of refusals: a flood of them does not fill the log.
#[derive(Default)]
struct Log(Mutex<Span>);

#[derive(Default)]
struct Span {
    began: Option<Instant>,
    logged: u32,
    /// Not logged since the last that was.
    more: u64,
}

impl Log {
    fn refused(&self, from: impl fmt::Display, reason: &str) {
        let (most, time) = LOGGED;
        let mut span = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if span.began.is_none_or(|at| at.elapsed() >= time) {
            (span.began, span.logged) = (Some(Instant::now()), 0);
        }
        if span.logged >= most {
            span.more += 1;
            return;
        }
        span.logged += 1;
        let more = std::mem::take(&mut span.more);
        drop(span);
        tracing::warn!(%from, reason, more, "a connection was refused");
    }
}

pub(super) enum Stream {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Unix(UnixStream),
}

macro_rules! each {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            Stream::Tcp($stream) => $call,
            Stream::Tls($stream) => $call,
            Stream::Unix($stream) => $call,
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self, s => Pin::new(s).poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, s => Pin::new(s).poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, s => Pin::new(s).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, s => Pin::new(s).poll_shutdown(cx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sensor_has_a_few_places_and_gives_them_back() {
        let places = Places::default();
        let take = |whose: &str| places.take(Some(whose.to_owned()));
        let mut held: Vec<Place> = (0..OF_ONE).map(|_| take("a").unwrap()).collect();
        assert_eq!(take("a").err(), Some("too many connections of one sensor"));
        assert!(take("b").is_ok() && places.take(None).is_ok());
        held.pop();
        held.push(take("a").unwrap());
        drop(held);
        assert!(places.each.lock().unwrap().is_empty());
        assert_eq!(places.all.available_permits(), CONNECTIONS);
        let _all: Vec<Place> = (0..CONNECTIONS).map(|_| places.take(None).unwrap()).collect();
        assert_eq!(take("c").err(), Some("too many connections"));
    }

    #[test]
    fn only_the_sensor_of_the_certificate_may_speak_for_itself() {
        let of = |uri: &str| {
            let identity = SpiffeId::parse(uri).map_err(|why| why.to_string());
            Remote { from: From::Unix, identity: Some(Arc::new(identity)) }
        };
        assert_eq!(Remote::UNIX.may_be("anyone"), Ok(()));
        assert_eq!(of("spiffe://any.example/sensor/a").may_be("a"), Ok(()));
        for uri in [
            "spiffe://mcp-sensor/sensor/A",
            "spiffe://mcp-sensor/collector/a",
            "spiffe://mcp-sensor/sensor/a/b",
            "a",
        ] {
            assert!(of(uri).may_be("a").is_err(), "{uri}");
        }
    }

    #[tokio::test]
    async fn the_oldest_handshake_ends_when_there_are_too_many() {
        let mut handshakes = Handshakes::default();
        let tasks: Vec<_> = (0..=HANDSHAKES).map(|_| tokio::spawn(std::future::pending::<()>())).collect();
        let over: Vec<bool> = tasks.iter().map(|t| handshakes.add(t.abort_handle())).collect();
        assert_eq!(over.iter().position(|o| *o), Some(HANDSHAKES));
        let mut tasks = tasks.into_iter();
        assert!(tasks.next().unwrap().await.unwrap_err().is_cancelled());
        tokio::task::yield_now().await;
        assert!(tasks.all(|t| !t.is_finished()));
    }
}
