//! A connection with deadlines: a client that says nothing, or stops reading,
//! holds its place only for so long.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};
use tonic::transport::server::Connected;

/// HTTP/2 preface and an empty SETTINGS frame (RFC 9113 3.4): what every
/// client sends first. After it, HTTP/2 keepalive finds silent clients.
const GREETING: usize = 24 + 9;

#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// For the client to greet.
    pub greeting: Duration,
    /// For the client to read on, when its buffer is full.
    pub stall: Duration,
    /// For the whole connection.
    pub end: Option<Duration>,
}

impl Default for Deadlines {
    fn default() -> Self {
        Deadlines { greeting: Duration::from_secs(5), stall: Duration::from_secs(30), end: None }
    }
}

/// `info` is what requests know of their connection; `_place` is held as long
/// as it is open.
pub(crate) struct Connection<S, C, P> {
    stream: S,
    info: C,
    _place: P,
    /// Bytes of the greeting still to come, and until when.
    greeting: usize,
    greet_by: Pin<Box<Sleep>>,
    /// Set while a write waits for the client.
    stalled: bool,
    write_by: Pin<Box<Sleep>>,
    stall: Duration,
    end: Option<Pin<Box<Sleep>>>,
}

impl<S, C, P> Connection<S, C, P> {
    pub(crate) fn new(stream: S, info: C, place: P, deadlines: Deadlines) -> Self {
        let after = |duration| Box::pin(tokio::time::sleep(duration));
        Connection {
            stream,
            info,
            _place: place,
            greeting: GREETING,
            greet_by: after(deadlines.greeting),
            stalled: false,
            write_by: after(deadlines.stall),
            stall: deadlines.stall,
            end: deadlines.end.map(after),
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
        Poll::Ready(Err(timed_out("the client does not read")))
    }
}

fn timed_out(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, why)
}

impl<S, C: Clone + Send + Sync + 'static, P> Connected for Connection<S, C, P> {
    type ConnectInfo = C;

    fn connect_info(&self) -> C {
        self.info.clone()
    }
}

impl<S: AsyncRead + Unpin, C: Unpin, P: Unpin> AsyncRead for Connection<S, C, P> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Some(end) = &mut this.end
            && end.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(timed_out("the connection has ended")));
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(cx, buf);
        if this.greeting > 0 {
            this.greeting = this.greeting.saturating_sub(buf.filled().len() - before);
            // Looked at whatever was read, so that dribbling bytes does not help.
            if this.greeting > 0 && this.greet_by.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(timed_out("the client does not greet")));
            }
        }
        read
    }
}

impl<S: AsyncWrite + Unpin, C: Unpin, P: Unpin> AsyncWrite for Connection<S, C, P> {
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
