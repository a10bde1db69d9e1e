//! One message being read: the lexer's events become facts, kept tools and
//! pieces of values.

use std::fmt::Write;
use std::hash::Hasher;

use siphasher::sip::SipHasher13;

use super::json::{Events, Literal};
use super::message::{Facts, Id, MAX_TEXT, Place, Tools, integer};
use super::session::Session;
use super::stream::Around;
use super::value::{Kept, sha256};
use super::{ListedTool, Output, Sender, Values};

/// A piece of a value at most.
const PIECE_BYTES: usize = 16 * 1024;
/// A JSON pointer is cut here.
const POINTER_BYTES: usize = 256;
/// Of an element's index in it.
const INDEX_BYTES: usize = 11;
/// Longest number that is read as one; its hash covers all of it.
const NUMBER_BYTES: usize = 64;
/// Memory for `capabilities`.
const CAPABILITIES_BYTES: usize = 64 * 1024;
/// Room that is kept between messages.
const IDLE_BYTES: usize = 1024;

/// An open container.
#[derive(Debug)]
struct Frame {
    place: Place,
    object: bool,
    /// Elements that began in it.
    elements: u32,
    /// How much of the pointer leads to it.
    pointer: u16,
}

/// State of the message at hand.
#[derive(Debug)]
pub(super) struct Reading {
    hasher: SipHasher13,
    frames: Vec<Frame>,
    pub(super) facts: Facts,
    begun: u64,
    /// Of the message's JSON text, once it is whole.
    pub(super) bytes: u64,
    /// Of messages in a batch that are done with.
    pub(super) delivered: u64,
    /// The outermost container is an array.
    pub(super) batch: bool,
    /// Something in a batch was no message.
    pub(super) stray: bool,
    /// Bytes of the message at hand, of those delivered, that were no UTF-8.
    bad_utf8: u64,
    pub(super) bad_delivered: u64,
    /// Of the next value.
    place: Place,
    /// The value is below `params`, `result` or `error`.
    within: bool,
    key: String,
    key_cut: bool,
    pointer: String,
    value: Text,
    kept: Option<Kept>,
}

/// The string or number at hand.
#[derive(Debug, Default)]
struct Text {
    is_key: bool,
    /// It goes to `Values`; a string only.
    shown: bool,
    piece: String,
    /// Most bytes of `text`; 0 once it was cut: nothing follows a cut.
    keep: usize,
    text: String,
    hash: Option<SipHasher13>,
}

impl Reading {
    pub(super) fn new(key: &[u8; 16]) -> Self {
        Self {
            hasher: SipHasher13::new_with_key(key),
            frames: Vec::new(),
            facts: Facts::default(),
            begun: 0,
            bytes: 0,
            delivered: 0,
            batch: false,
            stray: false,
            bad_utf8: 0,
            bad_delivered: 0,
            place: Place::Root,
            within: false,
            key: String::new(),
            key_cut: false,
            pointer: String::new(),
            value: Text::default(),
            kept: None,
        }
    }

    /// Ready for the next line or body.
    pub(super) fn reset(&mut self) {
        self.frames.clear();
        self.facts = Facts::default();
        self.delivered = 0;
        self.bad_utf8 = 0;
        self.bad_delivered = 0;
        self.place = Place::Root;
        self.within = false;
        self.kept = None;
        self.batch = false;
        self.stray = false;
        self.value.hash = None;
        for text in [&mut self.key, &mut self.pointer, &mut self.value.text, &mut self.value.piece] {
            text.clear();
            text.shrink_to(IDLE_BYTES);
        }
    }

    pub(super) fn reader<'a>(&'a mut self, sender: Sender, at: i64, around: &'a mut Around) -> Reader<'a> {
        let shown = around.values.wanted();
        Reader {
            reading: self,
            session: around.session,
            values: around.values,
            out: around.out,
            sender,
            at,
            shown,
        }
    }

    /// A value begins: its place, and the way to it if it is an element.
    fn value_begins(&mut self, shown: bool) -> Place {
        let Some(frame) = self.frames.last_mut() else { return Place::Root };
        if frame.object {
            return self.place;
        }
        let element = frame.elements;
        frame.elements = element.saturating_add(1);
        if shown && self.within {
            self.pointer.truncate(frame.pointer.into());
            if self.pointer.len() + INDEX_BYTES <= POINTER_BYTES {
                // Writing to a string cannot fail.
                let _ = write!(self.pointer, "/{element}");
            }
        }
        match frame.place {
            Place::Root => Place::Message,
            Place::Tools => Place::Tool,
            _ => Place::Other,
        }
    }

    /// As [`Reading::value_begins`], of what is no container.
    fn scalar_begins(&mut self, shown: bool) -> Place {
        let place = self.value_begins(shown);
        match place {
            Place::Message => self.stray = true,
            Place::Tool => self.facts.cut_tools(),
            _ => {}
        }
        place
    }

    fn key_ends(&mut self, shown: bool) {
        let Some(frame) = self.frames.last_mut() else { return };
        self.place = if self.key_cut { Place::Other } else { frame.place.member(&self.key) };
        if frame.place == Place::Message {
            self.within = matches!(self.place, Place::Params | Place::Result | Place::Error);
        }
        if shown && self.within {
            self.pointer.truncate(frame.pointer.into());
            push_cut(&mut self.pointer, "/", POINTER_BYTES);
            for part in self.key.split_inclusive(['~', '/']) {
                let (plain, escaped) = match part.as_bytes() {
                    [.., b'~'] => (&part[..part.len() - 1], "~0"),
                    [.., b'/'] => (&part[..part.len() - 1], "~1"),
                    _ => (part, ""),
                };
                push_cut(&mut self.pointer, plain, POINTER_BYTES);
                push_cut(&mut self.pointer, escaped, POINTER_BYTES);
            }
        }
        self.facts.clear(self.place);
    }
}

/// Appends as much as `most` bytes have room for. False: not all of it.
fn push_cut(to: &mut String, text: &str, most: usize) -> bool {
    let fits = text.floor_char_boundary(most.saturating_sub(to.len()));
    to.push_str(&text[..fits]);
    fits == text.len()
}

impl Text {
    fn show(&mut self, mut run: &str, pointer: &str, values: &mut dyn Values) {
        loop {
            let fits = run.floor_char_boundary(PIECE_BYTES - self.piece.len());
            self.piece.push_str(&run[..fits]);
            run = &run[fits..];
            if run.is_empty() {
                return;
            }
            values.piece(pointer, &self.piece, false);
            self.piece.clear();
        }
    }
}

/// A message being read, and where what it comes to goes.
pub(super) struct Reader<'a> {
    pub(super) reading: &'a mut Reading,
    pub(super) session: &'a mut Session,
    pub(super) values: &'a mut dyn Values,
    pub(super) out: &'a mut Vec<Output>,
    pub(super) sender: Sender,
    pub(super) at: i64,
    pub(super) shown: bool,
}

impl Reader<'_> {
    /// The message is whole: what it comes to. False: it is no JSON-RPC.
    pub(super) fn deliver(&mut self) -> bool {
        let facts = std::mem::take(&mut self.reading.facts);
        let bad = std::mem::take(&mut self.reading.bad_utf8);
        let delivered =
            self.session.deliver(self.sender, facts, self.reading.bytes, self.at, self.values, self.out);
        if delivered {
            self.reading.bad_delivered += bad;
        }
        delivered
    }

    fn kept_ends(&mut self, kept: &Kept, value: Option<serde_json::Value>) {
        let facts = &mut self.reading.facts;
        match self.reading.frames.last().map(|frame| frame.place) {
            Some(Place::Params) => facts.params.capabilities = Some(value.as_ref().map(sha256)),
            Some(Place::ParamsMeta) => facts.params.meta.capabilities = Some(value.as_ref().map(sha256)),
            Some(Place::Tools) => {
                let Some(tools) = facts.result.as_mut().and_then(|result| result.tools.as_mut()) else {
                    return;
                };
                tools.spent += kept.spent();
                match value {
                    Some(tool) if tool.is_object() => {
                        let name = tool.get("name").and_then(|name| name.as_str()).unwrap_or_default();
                        tools.tools.push(ListedTool { name: name.to_owned(), tool });
                    }
                    _ => tools.cut = true,
                }
            }
            _ => {}
        }
    }
}

impl Events for Reader<'_> {
    fn begin(&mut self, object: bool, offset: u64) {
        let reading = &mut *self.reading;
        let mut place = reading.value_begins(self.shown);
        if place == Place::Root {
            reading.batch = !object;
            if object {
                place = Place::Message;
            }
        }
        let limits = &self.session.limits;
        match (&mut reading.kept, place) {
            (Some(kept), _) => kept.begin(object),
            (None, Place::Message) => {
                reading.begun = offset;
                reading.bad_utf8 = 0;
                reading.facts = Facts::default();
            }
            (None, Place::Capabilities | Place::MetaCapabilities) if object => {
                reading.kept.insert(Kept::new(CAPABILITIES_BYTES)).begin(object);
            }
            (None, Place::Tools) if !object && self.session.lists_wanted(self.sender) => {
                if let Some(result) = &mut reading.facts.result {
                    result.tools = Some(Tools::default());
                }
            }
            (None, Place::Tool) => {
                let spent = reading
                    .facts
                    .result
                    .as_ref()
                    .and_then(|result| result.tools.as_ref())
                    .map_or(limits.list_bytes, |tools| tools.spent);
                let left = limits.list_bytes.saturating_sub(spent).min(limits.tool_bytes);
                reading.kept.insert(Kept::new(left)).begin(object);
            }
            (None, _) if object => reading.facts.object(place),
            (None, _) => {}
        }
        // A place's members have a meaning only in a container of the right kind.
        let array = matches!(place, Place::Root | Place::Tools);
        let place = if reading.kept.is_some() || array == object { Place::Other } else { place };
        let pointer = if place == Place::Message {
            reading.within = false;
            0
        } else {
            reading.pointer.len() as u16
        };
        reading.frames.push(Frame { place, object, elements: 0, pointer });
    }

    fn end(&mut self, offset: u64) {
        let frame = self.reading.frames.pop();
        if let Some(mut kept) = self.reading.kept.take() {
            match kept.end() {
                Some(value) => self.kept_ends(&kept, value),
                None => self.reading.kept = Some(kept),
            }
        }
        if frame.is_some_and(|frame| frame.place == Place::Message) {
            self.reading.bytes = offset - self.reading.begun;
            if self.reading.batch {
                if self.deliver() {
                    self.reading.delivered += self.reading.bytes;
                } else {
                    self.reading.stray = true;
                }
            }
        } else if self.reading.batch && self.reading.frames.len() == 1 {
            self.reading.stray = true;
        }
    }

    fn string(&mut self, key: bool) {
        let reading = &mut *self.reading;
        reading.value.is_key = key;
        if key {
            reading.key.clear();
            reading.key_cut = false;
            return;
        }
        let place = reading.scalar_begins(self.shown);
        reading.place = place;
        let value = &mut reading.value;
        value.shown = self.shown && reading.within;
        if reading.kept.is_some() {
            value.keep = 0;
            value.hash = None;
            return;
        }
        value.keep = place.keeps();
        value.text.clear();
        value.hash = place.is_id().then(|| {
            let mut hash = reading.hasher;
            hash.write(b"s");
            hash
        });
    }

    fn text(&mut self, run: &str) {
        let reading = &mut *self.reading;
        if let Some(kept) = &mut reading.kept {
            kept.text(run);
        }
        let value = &mut reading.value;
        if value.is_key {
            if !reading.key_cut {
                reading.key_cut = !push_cut(&mut reading.key, run, MAX_TEXT);
            }
            return;
        }
        if value.shown {
            value.show(run, &reading.pointer, self.values);
        }
        if value.keep > 0 && !push_cut(&mut value.text, run, value.keep) {
            value.keep = 0;
        }
        if let Some(hash) = &mut value.hash {
            hash.write(run.as_bytes());
        }
    }

    fn string_end(&mut self) {
        let reading = &mut *self.reading;
        if reading.value.is_key {
            if let Some(kept) = &mut reading.kept {
                kept.key_end();
            }
            reading.key_ends(self.shown);
            return;
        }
        let value = &mut reading.value;
        if value.shown {
            self.values.piece(&reading.pointer, &value.piece, true);
            value.piece.clear();
        }
        if let Some(kept) = &mut reading.kept {
            kept.string_end();
            return;
        }
        if let Some(hash) = value.hash.take() {
            reading.facts.identify(reading.place, Id::Of(hash.finish()));
        } else {
            reading.facts.string(reading.place, &value.text);
        }
    }

    fn number(&mut self) {
        let reading = &mut *self.reading;
        reading.place = reading.scalar_begins(false);
        let value = &mut reading.value;
        value.keep = if reading.place.counts() { NUMBER_BYTES } else { 0 };
        if value.keep > 0 {
            value.text.clear();
            value.hash = Some(reading.hasher);
        }
    }

    fn digits(&mut self, run: &str) {
        let reading = &mut *self.reading;
        if let Some(kept) = &mut reading.kept {
            kept.text(run);
            return;
        }
        let value = &mut reading.value;
        if let Some(hash) = &mut value.hash {
            hash.write(run.as_bytes());
            if value.keep > 0 && !push_cut(&mut value.text, run, value.keep) {
                value.keep = 0;
            }
        }
    }

    fn number_end(&mut self) {
        let reading = &mut *self.reading;
        if let Some(kept) = &mut reading.kept {
            kept.number_end();
            return;
        }
        let Some(hash) = reading.value.hash.take() else { return };
        // A number that was cut is told from others by its hash alone.
        let text = if reading.value.keep > 0 { reading.value.text.as_str() } else { "" };
        if reading.place.is_id() {
            let mut hasher = reading.hasher;
            match integer(text) {
                Some(integer) => {
                    hasher.write(b"i");
                    hasher.write(&integer.to_le_bytes());
                }
                None => {
                    hasher.write(b"n");
                    hasher.write(&hash.finish().to_le_bytes());
                }
            }
            reading.facts.identify(reading.place, Id::Of(hasher.finish()));
        }
        reading.facts.number(reading.place, text);
    }

    fn literal(&mut self, literal: Literal) {
        let reading = &mut *self.reading;
        let place = reading.scalar_begins(false);
        if let Some(kept) = &mut reading.kept {
            kept.scalar(match literal {
                Literal::Null => serde_json::Value::Null,
                Literal::True => true.into(),
                Literal::False => false.into(),
            });
        } else if literal == Literal::Null {
            reading.facts.null(place);
        } else {
            reading.facts.boolean(place, literal == Literal::True);
        }
    }

    fn bad_utf8(&mut self, bytes: u64) {
        self.reading.bad_utf8 += bytes;
    }
}
