//! One request and its response: whose session they belong to, and what their
//! bodies are read as.

use super::super::session::Session;
use super::super::stream::{Around, Stream};
use super::super::{Output, Sender, Values};
use super::events::{Events, Part};
use super::head::{self, Common, Kind, RequestHead, ResponseHead};
use super::{HttpExchange, HttpOutput, HttpServer, Transport};

/// Requests of one body (a batch) that end with it if it is refused.
const ASKED: usize = 64;

/// Everything beside the connection's own state.
pub(super) struct Setting<'a> {
    pub(super) server: &'a mut HttpServer,
    pub(super) values: &'a mut dyn Values,
    pub(super) out: &'a mut Vec<HttpOutput>,
    pub(super) at: i64,
}

#[derive(Debug)]
enum Place {
    /// It has no name: it ends with the exchange.
    Own(Box<Session>),
    /// One of [`HttpServer`].
    Shared(u64),
}

/// What a body is read as.
#[derive(Debug)]
enum Reader {
    Nothing,
    Json(Box<Stream>),
    Events(Box<(Events, Stream)>),
    Encoded,
}

/// An exchange that is going on.
#[derive(Debug)]
pub(super) struct Open {
    exchange: HttpExchange,
    /// Path and query, for an endpoint that is given relative to it.
    target: String,
    place: Option<Place>,
    request: Reader,
    response: Reader,
    asked: Vec<u64>,
    pub(super) request_over: bool,
    pub(super) response_over: bool,
    /// It is MCP, as far as is known.
    pub(super) mcp: bool,
}

impl Open {
    pub(super) fn new(head: RequestHead, setting: &mut Setting) -> Self {
        let server = &mut *setting.server;
        let path = head::cut(head.target.split('?').next().unwrap_or_default().as_bytes());
        let named = head.common.session.as_deref().map(|id| server.hash(b"session", id));
        let endpoint = server.hash(b"endpoint", head.target.as_bytes());
        let shared = named.or_else(|| server.knows(endpoint).then_some(endpoint));
        let mcp = shared.is_some()
            || server.speaks_at(&path)
            || !head.protocol_version.is_empty()
            || !head.mcp_method.is_empty();
        let place = match shared {
            Some(hash) => Place::Shared(hash),
            None => Place::Own(Box::new(server.lone(mcp))),
        };
        let request = match head.common.kind {
            Kind::Json => Reader::Json(Box::new(Stream::new(Sender::Client, &server.key))),
            Kind::Encoded => Reader::Encoded,
            Kind::Events | Kind::Other => Reader::Nothing,
        };
        Self {
            exchange: HttpExchange {
                method: head.method,
                path,
                host: head.host,
                session: shared,
                protocol_version: head.protocol_version,
                mcp_method: head.mcp_method,
                mcp_name: head.mcp_name,
                ..HttpExchange::default()
            },
            target: head.target,
            place: Some(place),
            request,
            response: Reader::Nothing,
            asked: Vec::new(),
            request_over: false,
            response_over: false,
            mcp,
        }
    }

    /// A response to a request that nobody saw.
    pub(super) fn unasked() -> Self {
        Self {
            exchange: HttpExchange::default(),
            target: String::new(),
            place: None,
            request: Reader::Nothing,
            response: Reader::Nothing,
            asked: Vec::new(),
            request_over: true,
            response_over: false,
            mcp: false,
        }
    }

    pub(super) fn method(&self) -> &str {
        &self.exchange.method
    }

    pub(super) fn respond(&mut self, head: &ResponseHead, setting: &mut Setting) {
        self.exchange.status = head.status;
        let Common { kind, session, .. } = &head.common;
        let key = &setting.server.key;
        self.response = match kind {
            Kind::Json => Reader::Json(Box::new(Stream::new(Sender::Server, key))),
            Kind::Events => Reader::Events(Box::new((Events::new(), Stream::new(Sender::Server, key)))),
            Kind::Encoded => Reader::Encoded,
            Kind::Other => Reader::Nothing,
        };
        if let Some(id) = session
            && head.status / 100 == 2
        {
            self.name_session(setting.server.hash(b"session", id), Transport::Http, setting);
        }
    }

    /// The server said how the session that began here is called.
    fn name_session(&mut self, hash: u64, transport: Transport, setting: &mut Setting) {
        self.mcp = true;
        self.exchange.session.get_or_insert(hash);
        // A name that is taken: requests of this exchange still end with it.
        if let Some(Place::Own(_)) = self.place
            && !setting.server.knows(hash)
            && let Some(Place::Own(session)) = self.place.replace(Place::Shared(hash))
        {
            setting.server.keep(hash, transport, *session, setting.at, setting.out);
        }
    }

    pub(super) fn data(&mut self, sender: Sender, data: &[u8], setting: &mut Setting) {
        let bytes = match sender {
            Sender::Client => &mut self.exchange.request_bytes,
            Sender::Server => &mut self.exchange.response_bytes,
        };
        *bytes += data.len() as u64;
        // The reader is put back: its parts call for the rest of the exchange.
        let mut reader = std::mem::replace(self.reader(sender), Reader::Nothing);
        match &mut reader {
            Reader::Nothing | Reader::Encoded => {}
            Reader::Json(stream) => self.with_session(setting, |around| stream.body(data, around)),
            Reader::Events(both) => {
                let (events, stream) = &mut **both;
                events.feed(data, &mut |part| match part {
                    Part::Data(data) => self.with_session(setting, |around| stream.body(data, around)),
                    Part::Message => self.with_session(setting, |around| stream.end(around)),
                    Part::Discard => self.with_session(setting, |around| stream.discard(around)),
                    Part::Endpoint(to) => self.endpoint(to, setting),
                });
            }
        }
        *self.reader(sender) = reader;
    }

    const fn reader(&mut self, sender: Sender) -> &mut Reader {
        match sender {
            Sender::Client => &mut self.request,
            Sender::Server => &mut self.response,
        }
    }

    /// An HTTP+SSE session begins: what is posted there is answered here.
    fn endpoint(&mut self, to: &[u8], setting: &mut Setting) {
        let Ok(to) = std::str::from_utf8(to) else { return };
        let to = head::origin(to.trim_ascii());
        let to = match to.as_bytes().first() {
            Some(b'/') => to.to_owned(),
            // Relative to the stream's own path (RFC 3986 5.3, no dots).
            _ => {
                let path = self.target.split('?').next().unwrap_or_default();
                format!("{}/{to}", path.rsplit_once('/').map_or("", |(folder, _)| folder))
            }
        };
        let hash = setting.server.hash(b"endpoint", to.as_bytes());
        self.name_session(hash, Transport::Sse, setting);
    }

    /// Runs something of a stream in the session of this exchange.
    fn with_session(&mut self, setting: &mut Setting, run: impl FnOnce(&mut Around)) {
        let Setting { server, values, out, at } = setting;
        let mut outputs = Vec::new();
        let (transport, hash) = match &mut self.place {
            None => return,
            Some(Place::Own(session)) => {
                session.assume_version(&self.exchange.protocol_version);
                run(&mut Around { session, values: &mut **values, out: &mut outputs, at: *at });
                self.mcp |= session.recognised();
                (Transport::Http, None)
            }
            Some(Place::Shared(hash)) => {
                if !server.knows(*hash) {
                    server.make_room(*at, out);
                }
                let session = server.session(*hash);
                session.assume_version(&self.exchange.protocol_version);
                run(&mut Around { session, values: &mut **values, out: &mut outputs, at: *at });
                (server.transport(*hash).unwrap_or(Transport::Http), Some(*hash))
            }
        };
        let asked = outputs.iter().filter_map(|output| match output {
            Output::Asked { sender: Sender::Client, id_hash, .. } => Some(*id_hash),
            _ => None,
        });
        self.asked.extend(asked.take(ASKED.saturating_sub(self.asked.len())));
        if !matches!(self.exchange.status, 0 | 200..300) {
            // What a refusal says need not be MCP.
            outputs.retain(|output| !matches!(output, Output::Uninspected { .. }));
        }
        server.pass_on(&self.exchange.path, transport, hash, &mut outputs, out);
    }

    pub(super) fn gap(&mut self, sender: Sender, lost: u64, setting: &mut Setting) {
        let bytes = match sender {
            Sender::Client => &mut self.exchange.request_bytes,
            Sender::Server => &mut self.exchange.response_bytes,
        };
        *bytes += lost;
        let mut reader = std::mem::replace(self.reader(sender), Reader::Nothing);
        match &mut reader {
            Reader::Nothing | Reader::Encoded => {}
            Reader::Json(stream) => self.with_session(setting, |around| stream.gap(around)),
            Reader::Events(both) => {
                both.0.gap();
                self.with_session(setting, |around| both.1.gap(around));
            }
        }
        *self.reader(sender) = reader;
    }

    /// The request, or the response, is whole.
    pub(super) fn over(&mut self, sender: Sender, setting: &mut Setting) {
        self.read_out(sender, setting);
        match sender {
            Sender::Client => {
                self.request_over = true;
                self.exchange.asked = setting.at;
            }
            Sender::Server => {
                self.response_over = true;
                self.exchange.answered = setting.at;
            }
        }
        if self.request_over && self.response_over {
            self.finish(setting);
        }
    }

    /// Nobody can tell what else the request, or the response, said.
    pub(super) fn cut_short(&mut self, sender: Sender, setting: &mut Setting) {
        self.discard(sender, setting);
        if sender == Sender::Server {
            self.abandon(setting);
        }
        self.over(sender, setting);
    }

    /// The connection ended before both were.
    pub(super) fn aborted(mut self, setting: &mut Setting) {
        if !self.request_over {
            self.discard(Sender::Client, setting);
            self.exchange.asked = setting.at;
        }
        if !self.response_over {
            self.discard(Sender::Server, setting);
            self.exchange.answered = setting.at;
        }
        self.finish(setting);
    }

    /// A body has ended.
    fn read_out(&mut self, sender: Sender, setting: &mut Setting) {
        match std::mem::replace(self.reader(sender), Reader::Nothing) {
            Reader::Nothing => {}
            // An event that no blank line ends is none.
            Reader::Events(mut both) => self.with_session(setting, |around| both.1.discard(around)),
            Reader::Json(mut stream) => {
                self.with_session(setting, |around| {
                    stream.end(around);
                    stream.report(around);
                });
                self.answered_at_once(sender, setting);
            }
            Reader::Encoded => {
                let bytes = match sender {
                    Sender::Client => self.exchange.request_bytes,
                    Sender::Server => self.exchange.response_bytes,
                };
                if self.mcp && bytes > 0 {
                    let unread = Output::Uninspected { sender, bytes, how: "encoded" };
                    self.with_session(setting, |around| around.out.push(unread));
                }
                self.answered_at_once(sender, setting);
            }
        }
    }

    /// Streamable HTTP: a response that is no stream answers all it ever will.
    fn answered_at_once(&mut self, sender: Sender, setting: &mut Setting) {
        let sse =
            self.exchange.session.and_then(|hash| setting.server.transport(hash)) == Some(Transport::Sse);
        if sender == Sender::Server && self.exchange.response_bytes > 0 && !sse {
            self.abandon(setting);
        }
    }

    fn discard(&mut self, sender: Sender, setting: &mut Setting) {
        match std::mem::replace(self.reader(sender), Reader::Nothing) {
            Reader::Json(mut stream) => self.with_session(setting, |around| stream.discard(around)),
            Reader::Events(mut both) => self.with_session(setting, |around| both.1.discard(around)),
            Reader::Nothing | Reader::Encoded => {}
        }
    }

    fn abandon(&mut self, setting: &mut Setting) {
        let asked = std::mem::take(&mut self.asked);
        self.with_session(setting, |around| around.session.abandon(&asked, around.at, around.out));
    }

    fn finish(&mut self, setting: &mut Setting) {
        let success = self.exchange.status / 100 == 2;
        if !success {
            self.abandon(setting);
        }
        match &self.place {
            Some(Place::Own(_)) => {
                self.with_session(setting, |around| around.session.close(around.at, around.out));
            }
            Some(Place::Shared(hash)) => {
                let hash = *hash;
                let over = match self.exchange.method.as_str() {
                    // The stream that an HTTP+SSE session lives by.
                    "GET" => setting.server.transport(hash) == Some(Transport::Sse),
                    "DELETE" => success,
                    _ => false,
                };
                // 404: the server has forgotten it.
                if over || self.exchange.status == 404 {
                    setting.server.end(hash, setting.at, setting.out);
                }
            }
            None => {}
        }
        setting.out.push(HttpOutput::Exchange(Box::new(std::mem::take(&mut self.exchange))));
    }
}
