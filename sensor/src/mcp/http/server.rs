//! What the HTTP connections of one server share: its sessions.

use std::collections::{HashMap, HashSet};
use std::hash::Hasher;

use siphasher::sip::SipHasher13;

use super::super::session::Session;
use super::super::{Era, Limits, Output};
use super::{HttpOutput, Transport};

/// Sessions that are known at a time; beyond, the one that was used longest ago
/// ends.
const SESSIONS: usize = 1024;
/// Paths that MCP was seen at.
const PATHS: usize = 64;

/// One server that listens, or that is spoken to, over HTTP.
#[derive(Debug)]
pub struct HttpServer {
    pub(super) key: [u8; 16],
    limits: Limits,
    sessions: HashMap<u64, Shared>,
    /// Where MCP was seen: what is said there is MCP from the first byte.
    paths: HashSet<String>,
    recognised: bool,
    uses: u64,
    ended_early: u64,
}

#[derive(Debug)]
struct Shared {
    session: Session,
    transport: Transport,
    used: u64,
}

impl HttpServer {
    /// `key` as in [`super::super::Connection::new`]. [`Limits::candidate`] is
    /// not looked at: a server may serve anything beside MCP.
    pub fn new(key: [u8; 16], limits: Limits) -> Self {
        Self {
            key,
            limits,
            sessions: HashMap::new(),
            paths: HashSet::new(),
            recognised: false,
            uses: 0,
            ended_early: 0,
        }
    }

    pub const fn recognised(&self) -> bool {
        self.recognised
    }

    /// Sessions that ended to make room for others.
    pub const fn ended_early(&self) -> u64 {
        self.ended_early
    }

    /// The server is gone: what is pending ends without an answer.
    pub fn close(&mut self, at: i64, out: &mut Vec<HttpOutput>) {
        let mut hashes: Vec<_> = self.sessions.keys().copied().collect();
        hashes.sort_unstable();
        for hash in hashes {
            self.end(hash, at, out);
        }
    }

    pub(super) fn hash(&self, kind: &[u8], text: &[u8]) -> u64 {
        let mut hasher = SipHasher13::new_with_key(&self.key);
        hasher.write(kind);
        hasher.write(text);
        hasher.finish()
    }

    pub(super) fn speaks_at(&self, path: &str) -> bool {
        self.paths.contains(path)
    }

    /// A session for as long as one exchange.
    pub(super) fn lone(&self, certain: bool) -> Session {
        Session::new(Limits { candidate: !certain, ..self.limits })
    }

    pub(super) fn knows(&self, hash: u64) -> bool {
        self.sessions.contains_key(&hash)
    }

    pub(super) fn transport(&self, hash: u64) -> Option<Transport> {
        self.sessions.get(&hash).map(|shared| shared.transport)
    }

    /// The session of that hash; one that is not known, or was forgotten, begins.
    pub(super) fn session(&mut self, hash: u64) -> &mut Session {
        self.uses += 1;
        let limits = Limits { candidate: false, ..self.limits };
        let shared = self.sessions.entry(hash).or_insert_with(|| Shared {
            session: Session::new(limits),
            transport: Transport::Http,
            used: 0,
        });
        shared.used = self.uses;
        &mut shared.session
    }

    /// Gives a session a name.
    pub(super) fn keep(
        &mut self,
        hash: u64,
        transport: Transport,
        mut session: Session,
        at: i64,
        out: &mut Vec<HttpOutput>,
    ) {
        self.make_room(at, out);
        session.limits.candidate = false;
        self.uses += 1;
        let used = self.uses;
        self.sessions.entry(hash).or_insert(Shared { session, transport, used });
    }

    pub(super) fn make_room(&mut self, at: i64, out: &mut Vec<HttpOutput>) {
        while self.sessions.len() >= SESSIONS {
            let oldest = self.sessions.iter().min_by_key(|(_, shared)| shared.used).map(|(hash, _)| *hash);
            let Some(oldest) = oldest else { return };
            self.ended_early += 1;
            self.end(oldest, at, out);
        }
    }

    pub(super) fn end(&mut self, hash: u64, at: i64, out: &mut Vec<HttpOutput>) {
        let Some(mut shared) = self.sessions.remove(&hash) else { return };
        let mut ended = Vec::new();
        shared.session.close(at, &mut ended);
        let transport = shared.transport;
        out.extend(ended.into_iter().map(|output| HttpOutput::Mcp {
            transport,
            session: Some(hash),
            output,
        }));
    }

    /// MCP was seen at a path; true for the first time.
    pub(super) fn recognise(&mut self, path: &str) -> bool {
        if self.paths.len() < PATHS {
            self.paths.insert(path.to_owned());
        }
        !std::mem::replace(&mut self.recognised, true)
    }

    /// Passes on what a session came to.
    pub(super) fn pass_on(
        &mut self,
        path: &str,
        transport: Transport,
        session: Option<u64>,
        outputs: &mut Vec<Output>,
        out: &mut Vec<HttpOutput>,
    ) {
        for output in outputs.drain(..) {
            let pass = match output {
                Output::NotMcp => false,
                Output::Recognised(Era::Legacy | Era::Modern) => self.recognise(path),
                _ => true,
            };
            if pass {
                out.push(HttpOutput::Mcp { transport, session, output });
            }
        }
    }
}
