//! One connection to the control socket, and how many there may be. A client
//! that says nothing, or stops reading, holds its place only for so long.

use super::Peer;
use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::{Instant, Sleep};
use tonic::transport::server::Connected;

/// HTTP/2 preface and an empty SETTINGS frame (RFC 9113 3.4): what every
/// client sends first.
const GREETING: usize = 24 + 9;

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub connections: usize,
    /// Of these, for one user other than root: one user cannot lock out others.
    pub per_user: usize,
    /// Connections of labelled callers, which are only told that they are
    /// refused: a server must not use up its user's places.
    pub refused: usize,
    /// For the client to greet.
    pub greeting: Duration,
    /// For the client to read on, when its buffer is full.
    pub stall: Duration,
    /// Life of a connection that is only told that it is refused.
    pub refusal: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: 64,
            per_user: 16,
            refused: 4,
            greeting: Duration::from_secs(5),
            stall: Duration::from_secs(30),
            refusal: Duration::from_secs(5),
        }
    }
}

/// Places for connections.
#[derive(Debug)]
pub(super) struct Places {
    limits: Limits,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    refused: usize,
    by_user: HashMap<u32, usize>,
}

/// One place; dropping it frees it.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    /// `None`: among the refused.
    uid: Option<u32>,
}

impl Places {
    pub(super) fn new(limits: Limits) -> Arc<Places> {
        Arc::new(Places { limits, taken: Mutex::default() })
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// `None`: all taken.
    pub(super) fn take(self: &Arc<Self>, uid: u32, refused: bool) -> Option<Place> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if refused {
            if taken.refused >= self.limits.refused {
                return None;
            }
            taken.refused += 1;
            return Some(Place { places: self.clone(), uid: None });
        }
        let of_user = taken.by_user.get(&uid).copied().unwrap_or(0);
        if taken.all >= self.limits.connections || (uid != 0 && of_user >= self.limits.per_user) {
            return None;
        }
        taken.all += 1;
        taken.by_user.insert(uid, of_user + 1);
        Some(Place { places: self.clone(), uid: Some(uid) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(uid) = self.uid else {
            taken.refused -= 1;
            return;
        };
        taken.all -= 1;
        if let Some(count) = taken.by_user.get_mut(&uid) {
            *count -= 1;
            if *count == 0 {
                taken.by_user.remove(&uid);
            }
        }
    }
}

/// What a request knows of its connection.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    pub peer: Arc<Peer>,
    /// Labelled when it connected: refused whatever happens later.
    pub refused: bool,
}

/// A connection with its place and its deadlines.
pub(super) struct Connection {
    stream: UnixStream,
    caller: Caller,
    _place: Place,
    /// Bytes of the greeting still to come, and until when.
    greeting: usize,
    greet_by: Pin<Box<Sleep>>,
    /// Set while a write waits for the client.
    stalled: bool,
    write_by: Pin<Box<Sleep>>,
    stall: Duration,
    /// End of a refused connection.
    end: Option<Pin<Box<Sleep>>>,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, caller: Caller, place: Place) -> Connection {
        let limits = *place.places.limits();
        let end = caller.refused.then(|| Box::pin(tokio::time::sleep(limits.refusal)));
        Connection {
            stream,
            caller,
            _place: place,
            greeting: GREETING,
            greet_by: Box::pin(tokio::time::sleep(limits.greeting)),
            stalled: false,
            write_by: Box::pin(tokio::time::sleep(limits.stall)),
            stall: limits.stall,
            end,
        }
    }

    /// Remembers that a write waits, and fails it when it has waited too long.
    fn watch<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = false;
            return written;
        }
        if !self.stalled {
            self.stalled = true;
            self.write_by.as_mut().reset(Instant::now() + self.stall);
        }
        ready!(self.write_by.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read")))
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Some(end) = &mut this.end
            && end.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "refused")));
        }
        let before = buf.filled().len();
        match Pin::new(&mut this.stream).poll_read(cx, buf) {
            Poll::Pending if this.greeting > 0 => {
                ready!(this.greet_by.as_mut().poll(cx));
                Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not greet")))
            }
            Poll::Pending => Poll::Pending,
            done => {
                this.greeting = this.greeting.saturating_sub(buf.filled().len() - before);
                done
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(cx, buf);
        this.watch(cx, written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write_vectored(cx, bufs);
        this.watch(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_user_and_no_server_takes_every_place() {
        let places = Places::new(Limits { connections: 3, per_user: 2, refused: 1, ..Limits::default() });
        let first = places.take(1000, false).unwrap();
        let _second = places.take(1000, false).unwrap();
        assert!(places.take(1000, false).is_none());
        let refused = places.take(1000, true).unwrap();
        assert!(places.take(1001, true).is_none(), "one place for the refused");
        let _root = places.take(0, false).unwrap();
        assert!(places.take(0, false).is_none(), "three places in all");
        drop(first);
        drop(refused);
        assert!(places.take(1000, false).is_some());
        assert!(places.take(1000, true).is_some());
    }
}
