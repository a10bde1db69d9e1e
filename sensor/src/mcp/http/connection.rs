//! One TCP connection: which bytes are heads, which bodies, of which exchange.

use std::collections::VecDeque;

use super::super::{Output, Sender, Values};
use super::body::{End, Framing};
use super::exchange::{Open, Setting};
use super::head::{self, HEAD_BYTES, RequestHead, ResponseHead};
use super::{HttpOutput, HttpServer, Transport};

/// Requests on their way at a time (pipelining); more are not told apart.
const EXCHANGES: usize = 64;
/// Longest method of a request.
const METHOD_BYTES: usize = 24;
/// Unread bytes are reported in sums of this, and at the end.
const UNREAD_BYTES: u64 = 1 << 20;

#[derive(Debug)]
enum Phase {
    Head,
    Body(Framing),
    /// Behind a gap: until a piece begins with a head.
    Gap,
    /// Nothing more can be read, and why.
    Lost(&'static str),
}

#[derive(Debug)]
struct Side {
    phase: Phase,
    head: Vec<u8>,
    unread: u64,
}

impl Side {
    const fn new() -> Self {
        Self { phase: Phase::Head, head: Vec::new(), unread: 0 }
    }
}

/// What goes over one TCP connection in plain text. [`Sender::Client`] is who
/// opened it.
#[derive(Debug)]
pub struct HttpConnection {
    client: Side,
    server: Side,
    /// In order of their requests.
    open: VecDeque<Open>,
    /// A head was read.
    http: bool,
    /// One of the exchanges was MCP.
    mcp: bool,
    dismissed: bool,
}

impl Default for HttpConnection {
    fn default() -> Self {
        Self::new()
    }
}

impl HttpConnection {
    pub const fn new() -> Self {
        Self {
            client: Side::new(),
            server: Side::new(),
            open: VecDeque::new(),
            http: false,
            mcp: false,
            dismissed: false,
        }
    }

    /// Bytes that `sender` moved, in order. All connections of one server have
    /// the same `server`.
    pub fn bytes(
        &mut self,
        sender: Sender,
        at: i64,
        mut bytes: &[u8],
        server: &mut HttpServer,
        values: &mut dyn Values,
        out: &mut Vec<HttpOutput>,
    ) {
        let mut setting = Setting { server, values, out, at };
        if matches!(self.side(sender).phase, Phase::Gap) && begins_head(sender, bytes) {
            self.resume(sender, &mut setting);
        }
        while !bytes.is_empty() && !self.dismissed {
            let used = match &mut self.side(sender).phase {
                Phase::Head => self.head(sender, bytes, &mut setting),
                Phase::Body(framing) => {
                    let (data, used, end) = framing.take(bytes);
                    self.body(sender, data, end, &mut setting);
                    used
                }
                Phase::Gap | Phase::Lost(_) => {
                    self.lost(sender, bytes.len() as u64, &mut setting);
                    bytes.len()
                }
            };
            bytes = &bytes[used..];
        }
    }

    /// `lost` bytes of `sender` lie between those before and those after; they
    /// are the caller's to report. Also for a connection that is met in the
    /// middle, with 0. Where a body says how long it is, reading goes on behind
    /// it; otherwise with the next bytes that begin with a head, as programs
    /// write them.
    pub fn gap(
        &mut self,
        sender: Sender,
        at: i64,
        lost: u64,
        server: &mut HttpServer,
        values: &mut dyn Values,
        out: &mut Vec<HttpOutput>,
    ) {
        if self.dismissed {
            return;
        }
        let mut setting = Setting { server, values, out, at };
        let end = match &mut self.side(sender).phase {
            Phase::Gap | Phase::Lost(_) => return,
            Phase::Body(framing) => framing.skip(lost),
            Phase::Head => None,
        };
        if let Some(end) = end {
            if let Some(open) = self.at_hand(sender) {
                open.gap(sender, lost, &mut setting);
            }
            self.ends(sender, end, &mut setting);
            return;
        }
        let side = self.side(sender);
        side.unread += std::mem::take(&mut side.head).len() as u64;
        side.phase = Phase::Gap;
        if let Some(open) = self.at_hand(sender) {
            open.cut_short(sender, &mut setting);
        }
        self.forget_ended();
        self.http = true;
    }

    /// A head was found behind a gap. Of the responses in the gap nobody knows
    /// how many they were: the one here is to the latest request.
    fn resume(&mut self, sender: Sender, setting: &mut Setting) {
        self.report(sender, setting);
        let side = self.side(sender);
        side.unread = 0;
        side.phase = Phase::Head;
        if sender == Sender::Server && self.open.len() > 1 {
            let latest = self.open.pop_back();
            for open in std::mem::take(&mut self.open) {
                open.aborted(setting);
            }
            self.open.extend(latest);
        }
    }

    /// The connection is over: exchanges end with what came of them.
    pub fn close(
        &mut self,
        at: i64,
        server: &mut HttpServer,
        values: &mut dyn Values,
        out: &mut Vec<HttpOutput>,
    ) {
        let mut setting = Setting { server, values, out, at };
        if matches!(self.server.phase, Phase::Body(Framing::Close)) {
            self.ends(Sender::Server, End::Yes, &mut setting);
        }
        for open in std::mem::take(&mut self.open) {
            open.aborted(&mut setting);
        }
        for sender in [Sender::Client, Sender::Server] {
            self.report(sender, &mut setting);
        }
        *self = Self { dismissed: true, ..Self::new() };
    }

    const fn side(&mut self, sender: Sender) -> &mut Side {
        match sender {
            Sender::Client => &mut self.client,
            Sender::Server => &mut self.server,
        }
    }

    /// The exchange whose request, or response, is going on.
    fn at_hand(&mut self, sender: Sender) -> Option<&mut Open> {
        match sender {
            Sender::Client => self.open.back_mut().filter(|open| !open.request_over),
            Sender::Server => self.open.iter_mut().find(|open| !open.response_over),
        }
    }

    fn head(&mut self, sender: Sender, bytes: &[u8], setting: &mut Setting) -> usize {
        let mut head = std::mem::take(&mut self.side(sender).head);
        if head.is_empty() && matches!(bytes[0], b'\r' | b'\n') {
            // RFC 9112 2.2: an empty line before a request means nothing.
            return 1;
        }
        let before = head.len();
        head.extend_from_slice(&bytes[..bytes.len().min(HEAD_BYTES - before)]);
        let end = head::end(&head, before);
        let text = &head[..end.unwrap_or(head.len())];
        let possible = match sender {
            Sender::Client => may_be_request(text),
            Sender::Server => may_be_response(text),
        };
        let read = match (end, sender) {
            (None, _) if possible && head.len() < HEAD_BYTES => {
                self.side(sender).head = head;
                return bytes.len();
            }
            (Some(_), Sender::Client) if possible => {
                head::request(text).is_some_and(|head| self.request(head, setting))
            }
            (Some(_), Sender::Server) if possible => {
                head::response(text).is_some_and(|head| self.response(&head, setting))
            }
            _ => false,
        };
        if let Some(end) = end.filter(|_| read) {
            self.http = true;
            return end - before;
        }
        if self.http {
            self.side(sender).phase = Phase::Lost("garbage");
            self.lost(sender, before as u64, setting);
        } else {
            self.dismissed = true;
            setting.out.push(HttpOutput::NotHttp);
        }
        // The bytes at hand are counted by the phase that they are in now.
        0
    }

    fn request(&mut self, head: RequestHead, setting: &mut Setting) -> bool {
        if self.open.len() >= EXCHANGES {
            // Without responses none of them ends by itself.
            if !matches!(self.server.phase, Phase::Gap | Phase::Lost(_)) {
                return false;
            }
            if let Some(oldest) = self.open.pop_front() {
                oldest.aborted(setting);
            }
        }
        let Some(framing) = head.common.framing else { return false };
        let open = Open::new(head, setting);
        self.mcp |= open.mcp;
        self.open.push_back(open);
        self.client.phase = Phase::Body(framing);
        if framing.is_over() {
            self.ends(Sender::Client, End::Yes, setting);
        }
        true
    }

    fn response(&mut self, head: &ResponseHead, setting: &mut Setting) -> bool {
        // 100 Continue and the like: the response is still to come.
        if (100..200).contains(&head.status) && head.status != 101 {
            return true;
        }
        if self.at_hand(Sender::Server).is_none() {
            self.open.push_back(Open::unasked());
        }
        let Some(open) = self.at_hand(Sender::Server) else { return false };
        let tunnel = head.status == 101 || (open.method() == "CONNECT" && head.status / 100 == 2);
        let empty = open.method() == "HEAD" || matches!(head.status, 101 | 204 | 304) || tunnel;
        open.respond(head, setting);
        self.mcp |= self.at_hand(Sender::Server).is_some_and(|open| open.mcp);
        let framing = if empty { Framing::Length(0) } else { head.common.framing.unwrap_or(Framing::Close) };
        self.server.phase = Phase::Body(framing);
        if framing.is_over() {
            self.ends(Sender::Server, End::Yes, setting);
        }
        if tunnel {
            self.client.phase = Phase::Lost("upgrade");
            self.server.phase = Phase::Lost("upgrade");
        }
        true
    }

    fn body(&mut self, sender: Sender, data: &[u8], end: End, setting: &mut Setting) {
        if let Some(open) = self.at_hand(sender)
            && !data.is_empty()
        {
            open.data(sender, data, setting);
            let mcp = open.mcp;
            self.mcp |= mcp;
        }
        self.ends(sender, end, setting);
    }

    fn ends(&mut self, sender: Sender, end: End, setting: &mut Setting) {
        match end {
            End::No => {}
            End::Broken => self.side(sender).phase = Phase::Lost("garbage"),
            End::Yes => {
                self.side(sender).phase = Phase::Head;
                if let Some(open) = self.at_hand(sender) {
                    open.over(sender, setting);
                    let mcp = open.mcp;
                    self.mcp |= mcp;
                }
                self.forget_ended();
            }
        }
    }

    fn forget_ended(&mut self) {
        self.open.retain(|open| !(open.request_over && open.response_over));
    }

    fn lost(&mut self, sender: Sender, bytes: u64, setting: &mut Setting) {
        let side = self.side(sender);
        side.unread += bytes;
        while self.side(sender).unread >= UNREAD_BYTES && self.mcp {
            self.side(sender).unread -= UNREAD_BYTES;
            self.unread(sender, UNREAD_BYTES, setting);
        }
    }

    fn report(&mut self, sender: Sender, setting: &mut Setting) {
        let bytes = std::mem::take(&mut self.side(sender).unread);
        if bytes > 0 && self.mcp {
            self.unread(sender, bytes, setting);
        }
    }

    fn unread(&mut self, sender: Sender, bytes: u64, setting: &mut Setting) {
        let how = match self.side(sender).phase {
            Phase::Lost(how) => how,
            Phase::Head | Phase::Body(_) | Phase::Gap => "garbage",
        };
        let output = Output::Uninspected { sender, bytes, how };
        setting.out.push(HttpOutput::Mcp { transport: Transport::Http, session: None, output });
    }
}

fn begins_head(sender: Sender, bytes: &[u8]) -> bool {
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default().trim_ascii_end();
    match sender {
        Sender::Client => {
            may_be_request(line) && (line.ends_with(b" HTTP/1.1") || line.ends_with(b" HTTP/1.0"))
        }
        Sender::Server => line.len() > 8 && may_be_response(line),
    }
}

fn may_be_request(head: &[u8]) -> bool {
    let method = head.split(|byte| *byte == b' ').next().unwrap_or_default();
    method.len() <= METHOD_BYTES && method.iter().all(|byte| byte.is_ascii_uppercase() || *byte == b'-')
}

fn may_be_response(head: &[u8]) -> bool {
    const BEGIN: &[u8] = b"HTTP/1.";
    let known = head.len().min(BEGIN.len());
    head[..known] == BEGIN[..known]
}
