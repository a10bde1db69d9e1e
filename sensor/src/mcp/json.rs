//! JSON as it passes by (RFC 8259): events out, nothing kept but what a split
//! escape or character needs.

use std::str;

/// Containers within each other, the outermost included.
pub(super) const MAX_DEPTH: u8 = 128;

const REPLACEMENT: &str = "\u{fffd}";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Literal {
    Null,
    True,
    False,
}

impl Literal {
    const fn text(self) -> &'static [u8] {
        match self {
            Self::Null => b"null",
            Self::True => b"true",
            Self::False => b"false",
        }
    }
}

/// What the lexer reports. Offsets count from the text's first byte.
pub(super) trait Events {
    /// `{` or `[` was read.
    fn begin(&mut self, object: bool, offset: u64);
    /// Its partner was; `offset` is behind it.
    fn end(&mut self, offset: u64);
    /// A string begins: a member's name, or a value.
    fn string(&mut self, key: bool);
    /// More of it, unescaped.
    fn text(&mut self, run: &str);
    fn string_end(&mut self);
    fn number(&mut self);
    /// More of a number's text, as written.
    fn digits(&mut self, run: &str);
    fn number_end(&mut self);
    fn literal(&mut self, literal: Literal);
    /// That many bytes of a string were no UTF-8; U+FFFD took their place, as
    /// node and the Python SDK's server have it.
    fn bad_utf8(&mut self, bytes: u64);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Syntax,
    TooDeep,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// All bytes were taken.
    More,
    /// The text's last byte was the one before this.
    Done(usize),
    Broken(Fault),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    Minus,
    Zero,
    Integer,
    Point,
    Fraction,
    E,
    Sign,
    Exponent,
}

impl Number {
    const fn next(self, byte: u8) -> Option<Self> {
        Some(match (self, byte) {
            (Self::Minus, b'0') => Self::Zero,
            (Self::Minus, b'1'..=b'9') | (Self::Integer, b'0'..=b'9') => Self::Integer,
            (Self::Zero | Self::Integer, b'.') => Self::Point,
            (Self::Point | Self::Fraction, b'0'..=b'9') => Self::Fraction,
            (Self::Zero | Self::Integer | Self::Fraction, b'e' | b'E') => Self::E,
            (Self::E, b'+' | b'-') => Self::Sign,
            (Self::E | Self::Sign | Self::Exponent, b'0'..=b'9') => Self::Exponent,
            _ => return None,
        })
    }

    const fn whole(self) -> bool {
        matches!(self, Self::Zero | Self::Integer | Self::Fraction | Self::Exponent)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Value,
    /// Behind `[`.
    FirstElement,
    /// Behind `{`.
    FirstKey,
    /// Behind a comma of an object.
    Key,
    Colon,
    /// Behind a value in a container.
    After,
    Text,
    Escape,
    /// Digits of `\u` to come.
    Hex(u8),
    Number(Number),
    /// Bytes of it that were read.
    Literal(Literal, u8),
}

/// One JSON text at a time, in pieces of any size.
#[derive(Debug)]
pub(super) struct Lexer {
    state: State,
    /// A bit for each open container: it is an object.
    objects: u128,
    depth: u8,
    /// The string at hand is a member's name.
    key: bool,
    /// `\u`: what its digits come to so far; the high half that came before.
    unit: u16,
    high: Option<u16>,
    /// A character whose other bytes are still to come.
    partial: [u8; 4],
    partial_len: usize,
    /// Of the first byte that is fed next.
    offset: u64,
}

impl Default for Lexer {
    fn default() -> Self {
        Self {
            state: State::Value,
            objects: 0,
            depth: 0,
            key: false,
            unit: 0,
            high: None,
            partial: [0; 4],
            partial_len: 0,
            offset: 0,
        }
    }
}

impl Lexer {
    /// Behind `Done` or `Broken`, make a new one.
    pub(super) fn feed(&mut self, bytes: &[u8], events: &mut impl Events) -> Step {
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            match self.state {
                State::Text => match self.string(&bytes[at..], events) {
                    Some(used) => {
                        at += used;
                        continue;
                    }
                    None => return Step::Broken(Fault::Syntax),
                },
                State::Escape => {
                    if !self.escape(byte, events) {
                        return Step::Broken(Fault::Syntax);
                    }
                }
                State::Hex(left) => {
                    let Some(digit) = char::from(byte).to_digit(16) else {
                        return Step::Broken(Fault::Syntax);
                    };
                    self.unit = self.unit << 4 | digit as u16;
                    if left > 1 {
                        self.state = State::Hex(left - 1);
                    } else {
                        self.unicode(events);
                        self.state = State::Text;
                    }
                }
                State::Number(number) => {
                    let rest = &bytes[at..];
                    let mut state = number;
                    let mut used = 0;
                    while let Some(next) = rest.get(used).and_then(|&b| state.next(b)) {
                        state = next;
                        used += 1;
                    }
                    digits(&rest[..used], events);
                    self.state = State::Number(state);
                    at += used;
                    if at < bytes.len() {
                        if !state.whole() {
                            return Step::Broken(Fault::Syntax);
                        }
                        events.number_end();
                        // The byte behind it is looked at again.
                        self.state = State::After;
                    }
                    continue;
                }
                State::Literal(literal, read) => {
                    let left = &literal.text()[usize::from(read)..];
                    let now = left.len().min(bytes.len() - at);
                    if bytes[at..at + now] != left[..now] {
                        return Step::Broken(Fault::Syntax);
                    }
                    at += now;
                    self.state = if now == left.len() {
                        events.literal(literal);
                        State::After
                    } else {
                        State::Literal(literal, read + now as u8)
                    };
                    continue;
                }
                _ if matches!(byte, b' ' | b'\t' | b'\r' | b'\n') => {}
                _ => match self.structure(byte, self.offset + at as u64, events) {
                    Ok(false) => {}
                    Ok(true) => return Step::Done(at + 1),
                    Err(fault) => return Step::Broken(fault),
                },
            }
            at += 1;
        }
        self.offset += bytes.len() as u64;
        Step::More
    }

    /// A byte outside of strings and scalars; true: the text is whole.
    fn structure(&mut self, byte: u8, offset: u64, events: &mut impl Events) -> Result<bool, Fault> {
        match (self.state, byte) {
            (State::FirstKey | State::Key, b'"') => self.begin_string(true, events),
            (State::Colon, b':') => self.state = State::Value,
            (State::FirstKey, b'}') | (State::FirstElement, b']') => return Ok(self.end(offset, events)),
            (State::After, b'}') if self.in_object() => return Ok(self.end(offset, events)),
            (State::After, b']') if !self.in_object() => return Ok(self.end(offset, events)),
            (State::After, b',') => self.state = if self.in_object() { State::Key } else { State::Value },
            (State::Value | State::FirstElement, _) => self.value(byte, offset, events)?,
            _ => return Err(Fault::Syntax),
        }
        Ok(false)
    }

    fn value(&mut self, byte: u8, offset: u64, events: &mut impl Events) -> Result<(), Fault> {
        match byte {
            b'{' | b'[' => {
                if self.depth == MAX_DEPTH {
                    return Err(Fault::TooDeep);
                }
                let object = byte == b'{';
                self.objects = self.objects << 1 | u128::from(object);
                self.depth += 1;
                self.state = if object { State::FirstKey } else { State::FirstElement };
                events.begin(object, offset);
            }
            b'"' => self.begin_string(false, events),
            b'-' | b'0'..=b'9' => {
                self.state = State::Number(match byte {
                    b'-' => Number::Minus,
                    b'0' => Number::Zero,
                    _ => Number::Integer,
                });
                events.number();
                digits(&[byte], events);
            }
            b'n' => self.state = State::Literal(Literal::Null, 1),
            b't' => self.state = State::Literal(Literal::True, 1),
            b'f' => self.state = State::Literal(Literal::False, 1),
            _ => return Err(Fault::Syntax),
        }
        Ok(())
    }

    const fn in_object(&self) -> bool {
        self.objects & 1 == 1
    }

    fn end(&mut self, offset: u64, events: &mut impl Events) -> bool {
        self.objects >>= 1;
        self.depth -= 1;
        self.state = State::After;
        events.end(offset + 1);
        self.depth == 0
    }

    fn begin_string(&mut self, key: bool, events: &mut impl Events) {
        self.key = key;
        self.state = State::Text;
        events.string(key);
    }

    /// Bytes of a string: how many were taken, `None` if one may not stand there.
    fn string(&mut self, bytes: &[u8], events: &mut impl Events) -> Option<usize> {
        let stop = memchr::memchr2(b'"', b'\\', bytes);
        let run = &bytes[..stop.unwrap_or(bytes.len())];
        if !run.is_empty() {
            if run.iter().fold(false, |control, &byte| control | (byte < b' ')) {
                return None;
            }
            self.run(run, events);
        }
        let Some(stop) = stop else { return Some(run.len()) };
        self.settle(events);
        if bytes[stop] == b'"' {
            self.flush_high(events);
            self.state = if self.key { State::Colon } else { State::After };
            events.string_end();
        } else {
            self.state = State::Escape;
        }
        Some(stop + 1)
    }

    fn run(&mut self, mut run: &[u8], events: &mut impl Events) {
        self.flush_high(events);
        while self.partial_len > 0 {
            let Some((&byte, rest)) = run.split_first() else { return };
            self.partial[self.partial_len] = byte;
            match str::from_utf8(&self.partial[..=self.partial_len]) {
                Ok(character) => {
                    events.text(character);
                    self.partial_len = 0;
                    run = rest;
                }
                Err(error) if error.error_len().is_none() => {
                    self.partial_len += 1;
                    run = rest;
                }
                // What came before was the beginning of a character; this byte is not of it.
                Err(_) => self.settle(events),
            }
        }
        if let Ok(text) = simdutf8::basic::from_utf8(run) {
            if !text.is_empty() {
                events.text(text);
            }
            return;
        }
        let end = run.as_ptr_range().end;
        for chunk in run.utf8_chunks() {
            if !chunk.valid().is_empty() {
                events.text(chunk.valid());
            }
            let bad = chunk.invalid();
            if bad.is_empty() {
                continue;
            }
            let unfinished = bad.as_ptr_range().end == end
                && str::from_utf8(bad).is_err_and(|error| error.error_len().is_none());
            if unfinished {
                self.partial[..bad.len()].copy_from_slice(bad);
                self.partial_len = bad.len();
            } else {
                events.bad_utf8(bad.len() as u64);
                events.text(REPLACEMENT);
            }
        }
    }

    /// The rest of a character did not come.
    fn settle(&mut self, events: &mut impl Events) {
        if self.partial_len > 0 {
            events.bad_utf8(self.partial_len as u64);
            events.text(REPLACEMENT);
            self.partial_len = 0;
        }
    }

    fn flush_high(&mut self, events: &mut impl Events) {
        if self.high.take().is_some() {
            events.text(REPLACEMENT);
        }
    }

    fn escape(&mut self, byte: u8, events: &mut impl Events) -> bool {
        if byte == b'u' {
            self.unit = 0;
            self.state = State::Hex(4);
            return true;
        }
        let text = match byte {
            b'"' => "\"",
            b'\\' => "\\",
            b'/' => "/",
            b'b' => "\u{8}",
            b'f' => "\u{c}",
            b'n' => "\n",
            b'r' => "\r",
            b't' => "\t",
            _ => return false,
        };
        self.flush_high(events);
        events.text(text);
        self.state = State::Text;
        true
    }

    /// A `\u` is whole. Half a pair becomes U+FFFD.
    fn unicode(&mut self, events: &mut impl Events) {
        let units = match self.high {
            Some(high) if (0xdc00..0xe000).contains(&self.unit) => {
                self.high = None;
                [high, self.unit]
            }
            _ => {
                self.flush_high(events);
                if (0xd800..0xdc00).contains(&self.unit) {
                    self.high = Some(self.unit);
                    return;
                }
                [self.unit, 0]
            }
        };
        let character =
            char::decode_utf16(units).next().and_then(Result::ok).unwrap_or(char::REPLACEMENT_CHARACTER);
        events.text(character.encode_utf8(&mut [0; 4]));
    }
}

fn digits(run: &[u8], events: &mut impl Events) {
    if let Ok(run) = str::from_utf8(run)
        && !run.is_empty()
    {
        events.digits(run);
    }
}
