//! What one labelled process does, step by step, and what came of each step:
//! the language between a test and `attempt steps`.

use crate::report::Report;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// A query with EDNS; every answer that comes is believed.
    Ask {
        name: String,
        kind: u16,
        to: SocketAddr,
        tcp: bool,
    },
    /// Bytes of the test's own over a fresh socket, each piece one call.
    Bytes {
        pieces: Vec<Vec<u8>>,
        to: SocketAddr,
        tcp: bool,
        trick: Trick,
    },
    /// TCP, one message there and back.
    Connect {
        to: SocketAddr,
    },
    /// UDP, one message there and back.
    Datagram {
        to: SocketAddr,
    },
    /// A ClientHello made by hand; answered: by a handshake record.
    Hello {
        to: SocketAddr,
        hello: Hello,
    },
    /// A page over TLS, by a complete client. `sni`: sent; empty for none.
    Get {
        to: SocketAddr,
        sni: String,
        ca: PathBuf,
    },
    /// Connects and keeps the connection for every [`Step::Talk`].
    Open {
        to: SocketAddr,
    },
    /// Over the connection that is kept.
    Talk,
    /// Names `N.suffix`, one after the other; answered: all were.
    AskMany {
        suffix: String,
        count: u32,
        to: SocketAddr,
    },
    /// Each thread resolves a fresh name and connects at once, over and over.
    Race {
        suffix: String,
        threads: u32,
        rounds: u32,
        to: SocketAddr,
        port: u16,
    },
    /// The same with the C library's resolver.
    SystemRace {
        suffix: String,
        threads: u32,
        rounds: u32,
        port: u16,
    },
    /// In user, network and mount namespaces of its own, takes the resolver's
    /// address, has the C library ask it for `name`, and answers `address`.
    AnswerItself {
        name: String,
        resolver: SocketAddr,
        address: IpAddr,
    },
    /// `getaddrinfo` and connect, as Rust's standard library does.
    System {
        name: String,
        port: u16,
    },
    Sleep {
        seconds: u64,
    },
    /// Says that it is ready, and waits for a line.
    Pause,
}

/// How the pieces leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trick {
    None,
    /// All but the last with `MSG_MORE`.
    More,
    /// One send, cut by the kernel into datagrams of this size.
    Segment(u16),
    /// `MSG_ZEROCOPY`
    Zerocopy,
    /// A `splice` out of a pipe.
    Splice,
    /// TCP: in the SYN.
    Fastopen,
    /// A moment between the pieces, so that each is a segment of its own.
    Slow,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// In this order, in one extension; none: no extension.
    pub names: Vec<String>,
    /// Encrypted ClientHello (RFC 9849).
    pub ech: bool,
    /// Bytes of padding (RFC 7685): as long as with a post-quantum share.
    pub padding: usize,
    pub cut: Cut,
    /// Sent after the first, whatever was answered.
    pub second: Option<Box<Hello>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cut {
    #[default]
    Whole,
    /// Two segments, cut here.
    At(usize),
    /// One segment, two TLS records, cut here.
    Records(usize),
    /// Two calls, the first with `MSG_MORE`.
    More(usize),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    pub report: Report,
    /// Of every answer to a question.
    pub addresses: Vec<IpAddr>,
    /// A page; what went wrong.
    pub text: String,
}

/// What a connection ends with when it is closed on purpose: an error at once,
/// never a wait.
const ENDED: [i32; 5] = [libc::EPERM, libc::ECONNRESET, libc::EPIPE, libc::ECONNABORTED, libc::ECONNREFUSED];

impl Outcome {
    pub fn answered(&self) -> bool {
        self.report.answered()
    }

    pub fn is_refused(&self) -> bool {
        self.report.errno() == Some(libc::EPERM)
    }

    pub fn has_ended(&self) -> bool {
        self.report.errno().is_some_and(|e| ENDED.contains(&e))
    }
}
