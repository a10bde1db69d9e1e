//! What both sides of a session have said: requests waiting for their answer,
//! and who the parties say they are.

use std::collections::{BTreeMap, HashMap};

use super::message::{Facts, Id, Params, Reply, Version};
use super::recognise::{Sign, sign};
use super::{Era, Exchange, Limits, Notification, Outcome, Output, Parties, Sender, ToolsPage, Values};

/// What a candidate's server may print before its first message.
pub const BANNER_BYTES: u64 = 1024;
/// Without a message of MCP in so much each way, it is none.
pub const UNDECIDED_BYTES: u64 = 64 * 1024;

/// What a session counts rather than reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Responses that nobody is known to have asked for.
    pub unpaired: u64,
    /// Responses to a request after it was cancelled.
    pub late: u64,
    /// Requests ended to stay within [`Limits::pending`].
    pub evicted: u64,
}

/// The requests of one MCP session, whichever connections they come over.
#[derive(Debug)]
pub struct Session {
    pub(super) limits: Limits,
    pending: HashMap<(Sender, u64), Pending>,
    /// By age.
    order: BTreeMap<u64, (Sender, u64)>,
    next: u64,
    /// Progress token, and the id of the request that it belongs to.
    tokens: HashMap<(Sender, u64), u64>,
    /// Pending tools/list.
    lists: usize,
    parties: Parties,
    recognised: bool,
    dismissed: bool,
    /// Bytes of each side, until it is decided what they are.
    seen: [u64; 2],
    /// Bytes of the server that were no message, likewise.
    foreign: u64,
    counters: Counters,
    /// The latest error of the server whose id is null, and its bytes.
    nameless: Option<(i64, u64)>,
}

#[derive(Debug)]
struct Pending {
    order: u64,
    exchange: Exchange,
    /// tools/list: with a cursor.
    cursor: bool,
    token: Option<u64>,
    /// Its end was reported; a response may still come.
    cancelled: bool,
}

const fn other(sender: Sender) -> Sender {
    match sender {
        Sender::Client => Sender::Server,
        Sender::Server => Sender::Client,
    }
}

impl Session {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            pending: HashMap::new(),
            order: BTreeMap::new(),
            next: 0,
            tokens: HashMap::new(),
            lists: 0,
            parties: Parties::default(),
            recognised: false,
            dismissed: false,
            seen: [0; 2],
            foreign: 0,
            counters: Counters::default(),
            nameless: None,
        }
    }

    pub const fn counters(&self) -> Counters {
        self.counters
    }

    pub const fn parties(&self) -> &Parties {
        &self.parties
    }

    /// What an HTTP header says of the version, where no message did.
    pub(super) fn assume_version(&mut self, version: &str) {
        if self.parties.protocol_version.is_empty() {
            version.clone_into(&mut self.parties.protocol_version);
        }
    }

    pub const fn recognised(&self) -> bool {
        self.recognised
    }

    /// It is not MCP: nothing more comes out.
    pub const fn dismissed(&self) -> bool {
        self.dismissed
    }

    pub(super) const fn undecided(&self) -> bool {
        self.limits.candidate && !self.recognised
    }

    /// How many of the bytes to come can be taken before it must be decided.
    pub(super) fn until_decision(&self, sender: Sender) -> u64 {
        let seen = self.seen[sender as usize];
        if self.undecided() && seen < UNDECIDED_BYTES { UNDECIDED_BYTES - seen } else { u64::MAX }
    }

    pub(super) fn saw(&mut self, sender: Sender, bytes: u64, out: &mut Vec<Output>) {
        if self.undecided() {
            self.seen[sender as usize] += bytes;
            if self.seen.iter().all(|&seen| seen >= UNDECIDED_BYTES) {
                self.dismiss(out);
            }
        }
    }

    /// Bytes that are no message. A client never sends such; servers print
    /// banners, but not with the header that frames other protocols.
    pub(super) fn foreign(&mut self, sender: Sender, bytes: u64, out: &mut Vec<Output>) {
        if self.undecided() {
            self.foreign += bytes;
            if sender == Sender::Client || self.foreign > BANNER_BYTES {
                self.dismiss(out);
            }
        }
    }

    pub(super) fn dismiss(&mut self, out: &mut Vec<Output>) {
        if !self.dismissed {
            self.dismissed = true;
            out.push(Output::NotMcp);
            self.pending.clear();
            self.order.clear();
            self.tokens.clear();
        }
    }

    /// That side may be answering a tools/list.
    pub(super) const fn lists_wanted(&self, sender: Sender) -> bool {
        self.lists > 0 && matches!(sender, Sender::Server)
    }

    /// A whole message. False: it is no JSON-RPC.
    pub(super) fn deliver(
        &mut self,
        sender: Sender,
        facts: Facts,
        bytes: u64,
        at: i64,
        values: &mut dyn Values,
        out: &mut Vec<Output>,
    ) -> bool {
        if self.dismissed {
            return true;
        }
        let answer = facts.method.is_none();
        if !facts.rpc
            || (answer && (facts.id == Id::Absent || facts.result.is_none() && facts.error.is_none()))
        {
            values.message(sender, "", "");
            return false;
        }
        let sign = sign(sender, &facts);
        match sign {
            Sign::Mcp(era) if !self.recognised => {
                self.recognised = true;
                out.push(Output::Recognised(era));
            }
            Sign::Foreign if self.undecided() => self.dismiss(out),
            _ => {}
        }
        if self.undecided() {
            values.message(sender, "", "");
            return true;
        }
        match (facts.method, facts.id) {
            (Some(method), id) => {
                self.meet(&method, &facts.params);
                let params = facts.params;
                values.message(sender, &method, &params.name);
                match id.known() {
                    Some(id) => self.ask(sender, method, id, params, bytes, at, out),
                    None => self.notify(sender, method, &params, bytes, at, out),
                }
            }
            (None, id) => {
                let initialize = sign == Sign::Mcp(Era::Legacy);
                let reply = facts.result.unwrap_or_default();
                self.answer(sender, id, reply, facts.error, initialize, bytes, at, values, out);
            }
        }
        true
    }

    /// What a client says of itself.
    fn meet(&mut self, method: &str, params: &Params) {
        if let Version::Text(version) = &params.meta.version {
            self.parties.era = Some(Era::Modern);
            self.parties.protocol_version.clone_from(version);
            if let Some(client) = &params.meta.client {
                self.parties.client.clone_from(client);
            }
            if let Some(capabilities) = params.meta.capabilities {
                self.parties.client_capabilities = capabilities;
            }
        } else if method == "initialize"
            && let Version::Text(version) = &params.version
        {
            self.parties.era = Some(Era::Legacy);
            self.parties.protocol_version.clone_from(version);
            self.parties.client = params.client.clone().unwrap_or_default();
            self.parties.client_capabilities = params.capabilities.flatten();
        } else if method == "server/discover" {
            self.parties.era = Some(Era::Modern);
        } else if self.parties.era.is_none() && self.recognised {
            // Found in the middle: the other era says so in every request.
            self.parties.era = Some(Era::Legacy);
        }
    }

    #[expect(clippy::too_many_arguments)]
    fn ask(
        &mut self,
        sender: Sender,
        method: String,
        id: u64,
        params: Params,
        bytes: u64,
        at: i64,
        out: &mut Vec<Output>,
    ) {
        // The id is used again: nothing can tell the answers apart.
        if let Some(before) = self.forget((sender, id)) {
            self.end(before, Outcome::NoResponse, 0, at, None, out);
        }
        while self.pending.len() >= self.limits.pending.max(1) {
            let Some((_, key)) = self.order.pop_first() else { break };
            if let Some(oldest) = self.forget(key) {
                self.counters.evicted += u64::from(!oldest.cancelled);
                self.end(oldest, Outcome::NoResponse, 0, at, None, out);
            }
        }
        let token = params.meta.progress.known().or(params.progress.known());
        if let Some(token) = token {
            self.tokens.insert((sender, token), id);
        }
        self.lists += usize::from(method == "tools/list");
        self.order.insert(self.next, (sender, id));
        out.push(Output::Asked {
            method: method.clone(),
            sender,
            name: params.name.clone(),
            id_hash: id,
            at,
        });
        let exchange = Exchange {
            method,
            sender,
            id_hash: id,
            name: params.name,
            uri: params.uri,
            request_bytes: bytes,
            response_bytes: 0,
            asked: at,
            answered: at,
            outcome: Outcome::NoResponse,
            progress: 0,
            parties: Parties::default(),
        };
        let pending = Pending { order: self.next, exchange, cursor: params.cursor, token, cancelled: false };
        self.next += 1;
        self.pending.insert((sender, id), pending);
    }

    fn notify(
        &mut self,
        sender: Sender,
        method: String,
        params: &Params,
        bytes: u64,
        at: i64,
        out: &mut Vec<Output>,
    ) {
        match method.as_str() {
            "notifications/progress" => {
                let asker = other(sender);
                if let Some(token) = params.progress.known()
                    && let Some(id) = self.tokens.get(&(asker, token))
                    && let Some(pending) = self.pending.get_mut(&(asker, *id))
                {
                    pending.exchange.progress += 1;
                }
            }
            "notifications/cancelled" => {
                if let Some(id) = params.request.known()
                    && let Some(pending) = self.pending.get_mut(&(sender, id))
                    && !pending.cancelled
                {
                    // It stays known: a response that crosses the notification
                    // is not a second end, nor one that nobody asked for.
                    pending.cancelled = true;
                    let mut exchange = Box::new(pending.exchange.clone());
                    exchange.outcome = Outcome::Cancelled;
                    exchange.answered = at;
                    exchange.parties = self.parties.clone();
                    out.push(Output::Ended(exchange));
                }
            }
            _ => {}
        }
        let parties = self.parties.clone();
        out.push(Output::Notified(Box::new(Notification { method, sender, bytes, at, parties })));
    }

    #[expect(clippy::too_many_arguments)]
    fn answer(
        &mut self,
        sender: Sender,
        id: Id,
        reply: Reply,
        error: Option<i64>,
        initialize: bool,
        bytes: u64,
        at: i64,
        values: &mut dyn Values,
        out: &mut Vec<Output>,
    ) {
        let pending = id.known().and_then(|id| self.forget((other(sender), id)));
        let asked = pending.as_ref().filter(|pending| !pending.cancelled).map(|pending| &pending.exchange);
        let (method, name) = asked.map_or(("", ""), |asked| (&asked.method, &asked.name));
        values.message(sender, method, name);
        if sender == Sender::Server {
            if initialize || method == "initialize" {
                if let Version::Text(version) = reply.version {
                    self.parties.protocol_version = version;
                }
                self.parties.era.get_or_insert(Era::Legacy);
                if let Some(server) = reply.server {
                    self.parties.server = server;
                }
            }
            if let Some(server) = reply.meta_server {
                self.parties.server = server;
            }
        }
        let Some(pending) = pending else {
            self.counters.unpaired += 1;
            if sender == Sender::Server && id == Id::Null {
                self.nameless = error.map(|code| (code, bytes));
            }
            return;
        };
        if pending.cancelled {
            self.counters.late += 1;
            return;
        }
        let outcome = match error {
            Some(code) => Outcome::RpcError(code),
            None if reply.kind == "input_required" => Outcome::InputRequired,
            None if reply.kind == "task" || (reply.task && pending.exchange.method == "tools/call") => {
                Outcome::Task
            }
            None if reply.is_error => Outcome::ToolError,
            None => Outcome::Ok,
        };
        let page = reply.tools.filter(|_| outcome == Outcome::Ok && pending.exchange.method == "tools/list");
        let page = page.map(|tools| ToolsPage {
            first: !pending.cursor,
            last: !reply.cursor,
            tools: tools.tools,
            cut: tools.cut,
        });
        self.end(pending, outcome, bytes, at, page, out);
    }

    fn forget(&mut self, key: (Sender, u64)) -> Option<Pending> {
        let pending = self.pending.remove(&key)?;
        self.order.remove(&pending.order);
        self.lists -= usize::from(pending.exchange.method == "tools/list");
        if let Some(token) = pending.token
            && self.tokens.get(&(key.0, token)) == Some(&key.1)
        {
            self.tokens.remove(&(key.0, token));
        }
        Some(pending)
    }

    fn end(
        &self,
        pending: Pending,
        outcome: Outcome,
        bytes: u64,
        at: i64,
        page: Option<ToolsPage>,
        out: &mut Vec<Output>,
    ) {
        if pending.cancelled {
            return;
        }
        let mut exchange = Box::new(pending.exchange);
        exchange.outcome = outcome;
        exchange.response_bytes = bytes;
        exchange.answered = at;
        exchange.parties = self.parties.clone();
        out.push(match page {
            Some(page) => Output::Tools(exchange, page),
            None => Output::Ended(exchange),
        });
    }

    /// No answer will come to these requests of the client: they came in one
    /// HTTP body. An error without an id was about it, if it is about one.
    pub(super) fn abandon(&mut self, ids: &[u64], at: i64, out: &mut Vec<Output>) {
        let (outcome, bytes) = match self.nameless.take() {
            Some((code, bytes)) if ids.len() == 1 => (Outcome::RpcError(code), bytes),
            _ => (Outcome::NoResponse, 0),
        };
        for id in ids {
            if let Some(pending) = self.forget((Sender::Client, *id)) {
                self.counters.unpaired -= u64::from(outcome != Outcome::NoResponse);
                self.end(pending, outcome, bytes, at, None, out);
            }
        }
    }

    /// Nothing more will come: what is pending ends without an answer.
    pub fn close(&mut self, at: i64, out: &mut Vec<Output>) {
        while let Some((_, key)) = self.order.pop_first() {
            if let Some(pending) = self.forget(key) {
                self.end(pending, Outcome::NoResponse, 0, at, None, out);
            }
        }
    }
}
