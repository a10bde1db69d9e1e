//! Event streams (WHATWG HTML section 9.2): their data passes by, unbuffered.

/// Longest name of a field, type of an event that has a meaning here.
const NAME_BYTES: usize = 16;
/// Of an `endpoint` event.
const ENDPOINT_BYTES: usize = 2048;

/// What is in an event stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part<'a> {
    /// Of a message's JSON text.
    Data(&'a [u8]),
    /// The message is whole.
    Message,
    /// What was given as data is no message after all.
    Discard,
    /// Where an HTTP+SSE client is to post to.
    Endpoint(&'a [u8]),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Data,
    Event,
    /// It changes nothing.
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Bytes of the byte order mark that may come first.
    Mark(u8),
    Name,
    /// A blank here is not of the value.
    Colon(Field),
    Value(Field),
}

#[derive(Debug)]
pub(super) struct Events {
    state: State,
    name: Vec<u8>,
    /// The type of the event at hand.
    event: Vec<u8>,
    data: bool,
    /// The beginning of its data, and whether that is all.
    begin: Vec<u8>,
    cut: bool,
    /// The line before ended with a carriage return: a newline is of its end.
    carriage: bool,
}

impl Events {
    pub(super) const fn new() -> Self {
        Self {
            state: State::Mark(0),
            name: Vec::new(),
            event: Vec::new(),
            data: false,
            begin: Vec::new(),
            cut: false,
            carriage: false,
        }
    }

    pub(super) fn feed(&mut self, mut bytes: &[u8], part: &mut impl FnMut(Part)) {
        const MARK: &[u8] = b"\xef\xbb\xbf";
        while let Some((&byte, rest)) = bytes.split_first() {
            if std::mem::take(&mut self.carriage) && byte == b'\n' {
                bytes = rest;
                continue;
            }
            match self.state {
                State::Mark(read) => {
                    let read = usize::from(read);
                    if MARK.get(read) == Some(&byte) {
                        self.state =
                            if read + 1 == MARK.len() { State::Name } else { State::Mark(read as u8 + 1) };
                        bytes = rest;
                    } else {
                        // It was the beginning of a name.
                        self.name.extend_from_slice(&MARK[..read]);
                        self.state = State::Name;
                    }
                }
                State::Name => {
                    match byte {
                        b'\r' | b'\n' => {
                            if self.name.is_empty() {
                                self.dispatch(part);
                            } else {
                                // A name alone has an empty value.
                                self.begin_value(part);
                                self.line_ends();
                            }
                            self.carriage = byte == b'\r';
                        }
                        b':' => self.begin_value(part),
                        _ if self.name.len() <= NAME_BYTES => self.name.push(byte),
                        _ => {}
                    }
                    bytes = rest;
                }
                State::Colon(field) => {
                    self.state = State::Value(field);
                    if byte == b' ' {
                        bytes = rest;
                    }
                }
                State::Value(field) => {
                    let end = memchr::memchr2(b'\r', b'\n', bytes);
                    let value = &bytes[..end.unwrap_or(bytes.len())];
                    match field {
                        Field::Data => self.data(value, part),
                        Field::Event => {
                            let room = (NAME_BYTES + 1).saturating_sub(self.event.len());
                            self.event.extend_from_slice(&value[..value.len().min(room)]);
                        }
                        Field::Other => {}
                    }
                    bytes = &bytes[value.len()..];
                    if let Some((&end, rest)) = bytes.split_first() {
                        self.carriage = end == b'\r';
                        self.line_ends();
                        bytes = rest;
                    }
                }
            }
        }
    }

    /// Bytes are missing here: the event at hand is none.
    pub(super) fn gap(&mut self) {
        self.name.clear();
        self.event = b"lost".to_vec();
        self.carriage = false;
        self.state = State::Value(Field::Other);
    }

    fn begin_value(&mut self, part: &mut impl FnMut(Part)) {
        let field = match self.name.as_slice() {
            b"data" => {
                if self.data {
                    self.data(b"\n", part);
                }
                self.data = true;
                Field::Data
            }
            b"event" => {
                self.event.clear();
                Field::Event
            }
            _ => Field::Other,
        };
        self.state = State::Colon(field);
    }

    fn line_ends(&mut self) {
        self.name.clear();
        self.state = State::Name;
    }

    fn data(&mut self, bytes: &[u8], part: &mut impl FnMut(Part)) {
        let room = ENDPOINT_BYTES - self.begin.len();
        self.cut |= bytes.len() > room;
        self.begin.extend_from_slice(&bytes[..bytes.len().min(room)]);
        if matches!(self.event.as_slice(), b"" | b"message") && !bytes.is_empty() {
            part(Part::Data(bytes));
        }
    }

    fn dispatch(&mut self, part: &mut impl FnMut(Part)) {
        // An event's type may stand behind its data.
        match self.event.as_slice() {
            b"" | b"message" if self.data => part(Part::Message),
            b"endpoint" if self.data && !self.cut => {
                part(Part::Discard);
                part(Part::Endpoint(&self.begin));
            }
            _ => part(Part::Discard),
        }
        self.event.clear();
        self.data = false;
        self.cut = false;
        self.begin = Vec::new();
    }
}
