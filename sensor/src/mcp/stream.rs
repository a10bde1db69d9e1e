//! One direction: bytes to messages, in lines or in bodies.

use super::json::{Fault, Lexer, Step};
use super::reading::Reading;
use super::session::Session;
use super::{Output, Sender, Values};

/// Unread bytes are reported in one sum while they keep coming: about so many
/// of them, for about so long (nanoseconds).
const RUN_BYTES: u64 = 1 << 20;
const RUN_TIME: i64 = 1_000_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing but blanks since the line began.
    Blank,
    Text,
    /// The JSON text is whole.
    Whole,
    /// Nothing of this line is read any more.
    Skip(&'static str),
    /// Behind a gap: nothing of this line can be told from the middle of one.
    Resync,
}

/// Reassembles what one side says.
#[derive(Debug)]
pub(super) struct Stream {
    sender: Sender,
    state: State,
    lexer: Lexer,
    reading: Reading,
    /// Of this line, from its first byte that is not blank; without those that
    /// were reported already.
    bytes: u64,
    /// When the last byte of the text was moved.
    whole_at: i64,
    /// Why bytes are not read just now, how many wait to be reported, since when.
    run: Option<&'static str>,
    run_bytes: u64,
    run_since: i64,
}

/// Everything beside the bytes that a stream needs.
pub(super) struct Around<'a> {
    pub(super) session: &'a mut Session,
    pub(super) values: &'a mut dyn Values,
    pub(super) out: &'a mut Vec<Output>,
    pub(super) at: i64,
}

impl Stream {
    pub(super) fn new(sender: Sender, key: &[u8; 16]) -> Self {
        Self {
            sender,
            state: State::Blank,
            lexer: Lexer::default(),
            reading: Reading::new(key),
            bytes: 0,
            whole_at: 0,
            run: None,
            run_bytes: 0,
            run_since: 0,
        }
    }

    /// More of a wire where each line is a message.
    pub(super) fn lines(&mut self, mut bytes: &[u8], around: &mut Around) {
        while !bytes.is_empty() && !around.session.dismissed() {
            // A candidate's verdict must not depend on how the bytes are cut.
            let until = around.session.until_decision(self.sender).min(bytes.len() as u64) as usize;
            let newline = memchr::memchr(b'\n', &bytes[..until]);
            let (line, rest) = bytes.split_at(newline.map_or(until, |newline| newline + 1));
            self.body(&line[..newline.unwrap_or(line.len())], around);
            if newline.is_some() {
                self.end(around);
            }
            around.session.saw(self.sender, line.len() as u64, around.out);
            bytes = rest;
        }
    }

    /// More of one JSON text.
    pub(super) fn body(&mut self, mut bytes: &[u8], around: &mut Around) {
        let before = self.state;
        if self.state == State::Blank {
            bytes = bytes.trim_ascii_start();
            let Some(first) = bytes.first() else { return };
            self.lexer = Lexer::default();
            self.state = if matches!(first, b'{' | b'[') { State::Text } else { State::Skip("garbage") };
        }
        self.bytes += bytes.len() as u64;
        let mut tail = bytes;
        if self.state == State::Text {
            let mut reader = self.reading.reader(self.sender, around.at, around);
            match self.lexer.feed(bytes, &mut reader) {
                Step::More => return,
                Step::Done(used) => {
                    self.state = State::Whole;
                    self.whole_at = around.at;
                    tail = &bytes[used..];
                }
                Step::Broken(Fault::Syntax) => self.broken("garbage", around),
                Step::Broken(Fault::TooDeep) => self.broken("too_deep", around),
            }
        }
        if self.state == State::Whole && !tail.trim_ascii_start().is_empty() {
            self.broken("garbage", around);
        }
        if let State::Skip(how) = self.state {
            let new = if before == self.state { bytes.len() as u64 } else { self.bytes };
            around.session.foreign(self.sender, new, around.out);
            // A line without an end is reported as it grows.
            while self.bytes >= 2 * RUN_BYTES {
                self.bytes -= RUN_BYTES;
                self.unread(RUN_BYTES, how, around);
            }
        }
    }

    /// Messages of a batch that were whole have been delivered; what was shown
    /// of the one at hand belongs to none.
    fn broken(&mut self, how: &'static str, around: &mut Around) {
        self.state = State::Skip(how);
        self.bytes -= self.reading.delivered;
        let bad = self.reading.bad_delivered;
        self.reading.reset();
        self.unread(bad, "bad_utf8", around);
        around.values.message(self.sender, "", "");
    }

    /// The line, or the body, has ended.
    pub(super) fn end(&mut self, around: &mut Around) {
        match self.state {
            State::Blank => {}
            State::Whole => self.message(around),
            State::Text => {
                self.broken("garbage", around);
                around.session.foreign(self.sender, self.bytes, around.out);
                self.unread(self.bytes, "garbage", around);
            }
            State::Skip(how) => self.unread(self.bytes, how, around),
            State::Resync => self.unread(self.bytes, "garbage", around),
        }
        self.reading.reset();
        self.bytes = 0;
        self.state = State::Blank;
    }

    fn message(&mut self, around: &mut Around) {
        let mut reader = self.reading.reader(self.sender, self.whole_at, around);
        let delivered = reader.reading.batch || reader.deliver();
        if delivered {
            self.report(around);
            self.unread(self.reading.bad_delivered, "bad_utf8", around);
        }
        if !delivered || self.reading.stray {
            let bytes = self.bytes - self.reading.delivered;
            around.session.foreign(self.sender, bytes, around.out);
            self.unread(bytes, "garbage", around);
        }
    }

    /// Bytes that nothing was read from.
    fn unread(&mut self, bytes: u64, how: &'static str, around: &mut Around) {
        if bytes == 0 || around.session.undecided() || around.session.dismissed() {
            return;
        }
        let goes_on = self.run == Some(how)
            && self.run_bytes < RUN_BYTES
            && around.at.saturating_sub(self.run_since) < RUN_TIME;
        if !goes_on {
            self.report(around);
            self.run = Some(how);
            self.run_since = around.at;
            around.out.push(Output::Uninspected { sender: self.sender, bytes, how });
        } else {
            self.run_bytes += bytes;
        }
    }

    /// The sum of what was unread and not reported yet.
    pub(super) fn report(&mut self, around: &mut Around) {
        let bytes = std::mem::take(&mut self.run_bytes);
        if let Some(how) = self.run.take()
            && bytes > 0
        {
            around.out.push(Output::Uninspected { sender: self.sender, bytes, how });
        }
    }

    /// What was read since the last message is none.
    pub(super) fn discard(&mut self, around: &mut Around) {
        if self.state != State::Blank {
            around.values.message(self.sender, "", "");
            self.reading.reset();
            self.bytes = 0;
            self.state = State::Blank;
        }
    }

    /// Bytes are missing here: what follows, up to the next line, cannot be
    /// told from the middle of a message. One that was whole still counts.
    pub(super) fn gap(&mut self, around: &mut Around) {
        match self.state {
            State::Whole => self.message(around),
            State::Blank => {}
            State::Text => {
                self.broken("garbage", around);
                self.unread(self.bytes, "garbage", around);
            }
            State::Skip(how) => self.unread(self.bytes, how, around),
            State::Resync => self.unread(self.bytes, "garbage", around),
        }
        self.reading.reset();
        self.bytes = 0;
        self.state = State::Resync;
    }
}
