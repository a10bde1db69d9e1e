//! One conversation between a client and a server: what was said, what was found
//! in it, and what the policy says of it, as events.

use super::content::{Asked, Content};
use super::core::{Core, lock};
use super::exchange;
use crate::event::{Body, pb};
use crate::inspect::{self, Found, Key, Kind, Scanner};
use crate::mcp::inventory::{DriftItem, ListHashes, Pages, Which};
use crate::mcp::{
    Connection, Exchange, Implementation, Limits, Outcome, Output, Parties, Sender, ToolsPage, Values,
};
use crate::policy::{Capture, OnViolation, ToolVerdict};
use sensor_common::label::Label;
use std::collections::HashMap;

/// Lists of tools that are not whole; of one server.
const LISTS: usize = 256;

/// What hashes are made with; from one secret of this sensor.
#[derive(Clone)]
pub struct Keys {
    /// Of ids, URIs and HTTP sessions.
    pub ids: [u8; 16],
    /// Of what was found in content.
    pub values: Key,
}

impl Keys {
    pub fn new(secret: &[u8; 32]) -> Keys {
        let mut ids = [0; 16];
        ids.copy_from_slice(&Key::new(secret).hash(b"ids"));
        Keys { ids, values: Key::new(secret) }
    }
}

/// Who speaks: a server's instance, over which connection.
#[derive(Clone, Copy)]
pub struct Speaker {
    pub label: Label,
    pub connection: u64,
    /// "stdio", "http" or "sse".
    pub transport: &'static str,
    pub pid: u32,
    /// `u32::MAX`: the instance's own.
    pub uid: u32,
    /// Hash of the HTTP session's id.
    pub session: Option<u64>,
}

/// A forbidden call that must not go on.
pub struct Violation {
    pub then: OnViolation,
    pub finding: pb::Finding,
    /// When the kernel saw it, UTC.
    pub at: i64,
}

/// What came of some bytes.
#[derive(Default)]
pub struct Heard {
    pub bodies: Vec<Body>,
    pub violations: Vec<Violation>,
}

/// What is looked for in the messages of one wire.
pub struct Ears {
    scanners: [Scanner; 2],
    /// Findings that wait for the outputs of the same bytes.
    notes: Vec<Note>,
    content: Content,
}

/// What is remembered of a server beside its messages.
pub struct Memory {
    keys: Keys,
    /// Lists of tools whose last page has not come, by conversation.
    pages: HashMap<u64, Pages>,
    said: Implementation,
    asked: Asked,
}

/// One server's stdio.
pub struct Session {
    connection: Connection,
    ears: Ears,
    memory: Memory,
    /// Answers that belong to no request, as far as they were told.
    unpaired: u64,
}

/// A message in which something was found.
struct Note {
    sender: Sender,
    method: String,
    name: String,
    found: Vec<Found>,
}

/// Looks at one side's values.
pub struct Looking<'a> {
    scanner: &'a mut Scanner,
    notes: &'a mut Vec<Note>,
    content: &'a mut Content,
}

impl Values for Looking<'_> {
    fn piece(&mut self, place: &str, piece: &str, last: bool) {
        self.scanner.piece(place, piece, last);
        self.content.piece(place, piece, last);
    }

    fn message(&mut self, sender: Sender, method: &str, name: &str) {
        self.scanner.message(sender, method, name);
        self.content.message(side(sender), method, name);
        let found = self.scanner.take();
        if !found.is_empty() {
            self.notes.push(Note { sender, method: method.to_owned(), name: name.to_owned(), found });
        }
    }
}

fn side(sender: Sender) -> usize {
    match sender {
        Sender::Client => 0,
        Sender::Server => 1,
    }
}

impl Session {
    pub fn new(keys: &Keys, candidate: bool) -> Session {
        let limits = Limits { candidate, ..Limits::default() };
        Session {
            connection: Connection::new(keys.ids, limits),
            ears: Ears::new(keys),
            memory: Memory::new(keys),
            unpaired: 0,
        }
    }

    /// Bytes of one side. A candidate's are not looked into.
    pub fn bytes(&mut self, sender: Sender, at: i64, bytes: &[u8], look: bool, out: &mut Vec<Output>) {
        if look {
            self.connection.bytes(sender, at, bytes, &mut self.ears.looking(sender), out);
        } else {
            self.connection.bytes(sender, at, bytes, &mut (), out);
        }
    }

    pub fn gap(&mut self, sender: Sender, at: i64, lost: u64, out: &mut Vec<Output>) {
        self.connection.gap(sender, at, lost, &mut self.ears.looking(sender), out);
    }

    /// MCP was spoken here.
    pub fn recognised(&self) -> bool {
        self.connection.recognised()
    }

    /// Answers since the last call that belong to no request.
    pub fn take_unpaired(&mut self) -> u64 {
        let now = self.connection.counters().unpaired;
        now.saturating_sub(std::mem::replace(&mut self.unpaired, now))
    }

    pub fn close(&mut self, at: i64, out: &mut Vec<Output>) {
        self.connection.close(at, &mut self.ears.looking(Sender::Server), out);
    }

    pub fn heard(
        &mut self,
        core: &Core,
        speaker: &Speaker,
        time: i64,
        outputs: impl Iterator<Item = Output>,
    ) -> Heard {
        let heard = self.ears.heard(core, &mut self.memory, speaker, time, outputs);
        self.ears.settle();
        heard
    }

    pub fn ask_policy(&mut self, core: &Core, label: Label) {
        self.ears.ask_policy(core, label);
    }
}

impl Speaker {
    /// One client's talk with the server, as far as that is known.
    fn conversation(&self) -> u64 {
        self.session.unwrap_or(self.connection)
    }
}

impl Memory {
    pub fn new(keys: &Keys) -> Memory {
        Memory {
            keys: keys.clone(),
            pages: HashMap::new(),
            said: Implementation::default(),
            asked: Asked::default(),
        }
    }

    /// Nothing more is said in a conversation.
    pub fn forget(&mut self, conversation: u64) {
        self.pages.remove(&conversation);
    }

    /// The lists that end with a page.
    fn page(&mut self, conversation: u64, page: &ToolsPage) -> Vec<ListHashes> {
        if self.pages.len() >= LISTS && !self.pages.contains_key(&conversation) {
            let any = self.pages.keys().next().copied();
            any.and_then(|any| self.pages.remove(&any));
        }
        let pages = self.pages.entry(conversation).or_default();
        let lists = pages.add(page);
        if page.last {
            self.pages.remove(&conversation);
        }
        lists
    }
}

impl Ears {
    pub fn new(keys: &Keys) -> Ears {
        let scanner = || Scanner::new(keys.values.clone(), inspect::Limits::default());
        Ears { scanners: [scanner(), scanner()], notes: Vec::new(), content: Content::default() }
    }

    /// Whether content is wanted.
    pub fn ask_policy(&mut self, core: &Core, label: Label) {
        self.content.set(match core.in_force().map(|p| p.compiled().capture(label.server())) {
            Some(Capture::Redacted { max_bytes }) => max_bytes as usize,
            Some(Capture::None) | None => 0,
        });
    }

    /// All that came of the bytes at hand was heard.
    pub fn settle(&mut self) {
        self.content.settle();
    }

    pub fn looking(&mut self, sender: Sender) -> Looking<'_> {
        Looking {
            scanner: &mut self.scanners[side(sender)],
            notes: &mut self.notes,
            content: &mut self.content,
        }
    }

    /// What outputs, and what was found meanwhile, come to.
    pub fn heard(
        &mut self,
        core: &Core,
        memory: &mut Memory,
        speaker: &Speaker,
        time: i64,
        outputs: impl Iterator<Item = Output>,
    ) -> Heard {
        let conversation = speaker.conversation();
        let actor = core.actor(speaker.label, speaker.pid, speaker.uid);
        let mut heard = Heard::default();
        for output in outputs {
            if let Output::Asked { method, sender, name, id_hash, .. } = &output {
                let lines = self.content.take(side(*sender), method, name);
                memory.asked.add(conversation, *id_hash, lines);
            }
            if let Output::Asked { method, sender: Sender::Client, name, at, .. } = &output
                && method == "tools/call"
            {
                heard.violations.extend(forbidden(core, speaker.label, &actor, name, *at));
            }
            match output {
                Output::Tools(exchange, page) => {
                    memory.listed(core, speaker, &actor, time, &exchange, &page, &mut heard.bodies);
                }
                output => {
                    let mut contents = Default::default();
                    if let Output::Ended(e) = &output {
                        memory.introduced(core, &actor, time, &e.parties, &mut heard.bodies);
                        let request = memory.asked.take(conversation, e.id_hash);
                        // Asked before its session had a name.
                        let request = request.or_else(|| memory.asked.take(speaker.connection, e.id_hash));
                        let answered = !matches!(e.outcome, Outcome::NoResponse | Outcome::Cancelled);
                        let response =
                            answered.then(|| self.content.take(1 - side(e.sender), &e.method, &e.name));
                        contents = (request.unwrap_or_default(), response.unwrap_or_default());
                    }
                    let mut body = exchange::body(actor.clone(), speaker, &memory.keys.ids, output);
                    if let Some(exchange) = body.as_mut().and_then(exchange_mut) {
                        (exchange.request_content, exchange.response_content) = contents;
                    }
                    heard.bodies.extend(body);
                }
            }
        }
        // The policy may have changed.
        self.ask_policy(core, speaker.label);
        for note in self.notes.drain(..) {
            for found in &note.found {
                let side = match note.sender {
                    Sender::Client => "request",
                    Sender::Server => "response",
                };
                heard.bodies.push(Body::Finding(finding(&actor, found, side, &note.method, &note.name)));
            }
        }
        heard
    }
}

impl Memory {
    /// The server said who it is.
    fn introduced(
        &mut self,
        core: &Core,
        actor: &pb::Actor,
        time: i64,
        parties: &Parties,
        bodies: &mut Vec<Body>,
    ) {
        if parties.server == self.said || parties.server == Implementation::default() {
            return;
        }
        self.said = parties.server.clone();
        let origin = core.origin(actor.pid);
        let drift = lock(&core.inventory).identity(
            &which(actor),
            &self.said,
            &origin.version,
            origin.entry_point,
            time,
        );
        bodies.extend(drifted(drift, actor));
    }

    #[allow(clippy::too_many_arguments, reason = "who said it, and what")]
    fn listed(
        &mut self,
        core: &Core,
        speaker: &Speaker,
        actor: &pb::Actor,
        time: i64,
        e: &Exchange,
        page: &ToolsPage,
        bodies: &mut Vec<Body>,
    ) {
        self.introduced(core, actor, time, &e.parties, bodies);
        let which = which(actor);
        let lists = self.page(speaker.conversation(), page);
        let exchange = exchange::exchange(actor.clone(), speaker, e);
        if lists.is_empty() {
            bodies.push(Body::McpMessage(Box::new(pb::McpMessage {
                exchange: Some(exchange.clone()),
                count: 1,
            })));
        }
        for list in lists {
            let (era, capabilities) = (e.parties.era, e.parties.client_capabilities);
            let drift = lock(&core.inventory).listed(&which, era, capabilities, &list, time);
            bodies.push(Body::ToolsListed(Box::new(tools_listed(exchange.clone(), &list, capabilities))));
            bodies.extend(drifted(drift, actor));
        }
        let others = lock(&core.inventory).tools_of_others(&which);
        for tool in &page.tools {
            for found in inspect::tool::check(&tool.tool, &others, &self.keys.values) {
                bodies.push(Body::Finding(finding(actor, &found, "response", "tools/list", &tool.name)));
            }
        }
    }
}

fn exchange_mut(body: &mut Body) -> Option<&mut pb::Exchange> {
    match body {
        Body::ToolCall(t) => t.exchange.as_mut(),
        Body::Prompt(p) => p.exchange.as_mut(),
        Body::Resource(r) => r.exchange.as_mut(),
        Body::McpMessage(m) => m.exchange.as_mut(),
        _ => None,
    }
}

/// By which the inventory knows a server: those that nobody declared differ by
/// their program, which their instances are called by.
pub fn which(actor: &pb::Actor) -> Which {
    let program = actor.instance.rsplit_once('.').map_or("", |(program, _)| program);
    Which::new(&actor.server, if program == actor.server { "" } else { program })
}

pub fn drifted<'a>(drift: Vec<DriftItem>, actor: &'a pb::Actor) -> impl Iterator<Item = Body> + 'a {
    drift.into_iter().map(|item| Body::Drift(item.event(actor.clone())))
}

fn tools_listed(
    exchange: pb::Exchange,
    list: &ListHashes,
    capabilities: Option<[u8; 32]>,
) -> pb::ToolsListed {
    pb::ToolsListed {
        exchange: Some(exchange),
        tools: list.tools.iter().map(|t| t.event()).collect(),
        list_hash: list.hash.to_string(),
        capabilities_hash: capabilities.map(hex::encode).unwrap_or_default(),
        incomplete: list.incomplete,
    }
}

fn finding(actor: &pb::Actor, found: &Found, side: &str, method: &str, name: &str) -> pb::Finding {
    let what = match found.kind {
        Kind::Secret => "what looks like a secret",
        Kind::PersonalData => "personal data",
        Kind::ToolPoisoning => "text that is meant to steer the model",
    };
    let method_text = if method.is_empty() { "a message" } else { method };
    let times = if found.count > 1 { format!(", {} times", found.count) } else { String::new() };
    let mut finding = pb::Finding {
        kind: found.kind.name().to_owned(),
        server: actor.server.clone(),
        instance: actor.instance.clone(),
        detail: format!(
            "{what} ({}) in the {side} of {method_text}{}{times}",
            found.rule,
            if name.is_empty() { String::new() } else { format!(" {name}") }
        ),
        place: inspect::redact_place(&found.place),
        method: method.to_owned(),
        length: found.length,
        value_hash: hex::encode(found.value_hash),
        rule: found.rule.to_owned(),
        tool: name.to_owned(),
        ..Default::default()
    };
    finding.set_severity(found.severity);
    finding
}

/// A call that the policy forbids.
fn forbidden(core: &Core, label: Label, actor: &pb::Actor, tool: &str, at: i64) -> Option<Violation> {
    let policy = core.in_force()?;
    let ToolVerdict::Forbidden { rule, line } = policy.compiled().tool_verdict(label.server(), tool) else {
        return None;
    };
    let enforced = core.mode(label.server()) == pb::Mode::Enforce;
    let then = if enforced { policy.compiled().on_violation(label.server()) } else { OnViolation::Report };
    let mut finding = pb::Finding {
        kind: "forbidden_tool".to_owned(),
        server: actor.server.clone(),
        instance: actor.instance.clone(),
        detail: format!("{tool} was called, which {rule} (line {line}) does not allow"),
        method: "tools/call".to_owned(),
        rule: rule.to_owned(),
        tool: tool.to_owned(),
        action: "reported".to_owned(),
        ..Default::default()
    };
    finding.set_severity(pb::Severity::High);
    Some(Violation { then, finding, at })
}
