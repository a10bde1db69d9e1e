//! DNS messages (RFC 1035) as the kernel reads them, one bounded step at a time:
//! the same code runs in `bpf_loop` and on the host. Nothing of a message is
//! trusted; what a plain resolver client would not send is not read.

use crate::addr::Addr;
use crate::name::{NAME_BYTES, NameText};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of messages that are looked at; an answer that goes on beyond is read
/// as far as it goes.
pub const MESSAGE_BYTES: usize = 4096;
/// A query of one question with EDNS and a cookie fits; TCP may hold several.
pub const QUERY_BYTES: u32 = 1024;
/// Steps that one packet may take: a byte or a record each.
pub const STEPS: u32 = 8192;

pub const PORT: u16 = 53;
pub const A: u16 = 1;
pub const AAAA: u16 = 28;
const CNAME: u16 = 5;
const OPT: u16 = 41;
const IN: u16 = 1;
const HEADER: u32 = 12;
const COOKIE: u16 = 10;
/// Longest option part: a cookie (RFC 7873 §4).
const MAX_COOKIE: u32 = 44;
/// CNAMEs that are followed.
const MAX_CHAIN: u32 = 16;
/// Compression pointers within one name.
const MAX_JUMPS: u32 = 32;

/// Where the bytes are: a buffer whose index the verifier can bound.
pub trait Bytes {
    /// Any `at` is in bounds; what lies beyond the message may be anything.
    fn at(&self, at: u32) -> u8;
}

impl Bytes for [u8] {
    fn at(&self, at: u32) -> u8 {
        self.get(at as usize).copied().unwrap_or(0)
    }
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    More,
    /// A question is read ([`Reader::text`] and beside it). Of a query, the whole
    /// message is.
    Question,
    /// An address of the name that was asked ([`Reader::addr`], `ttl`).
    Address,
    /// Everything is read.
    Done,
    /// No plain query, or no answer that can be followed.
    Unread,
}

/// How far a packet has been read. All fields are integers, so that it may lie
/// in a map value.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Reader {
    /// FNV-1a of the name asked, 64 bit.
    pub hash: u64,
    /// The address found last.
    pub addr: Addr,
    /// The least TTL on the way to it, seconds.
    pub ttl: u32,
    pub id: u16,
    pub qtype: u16,
    phase: u32,
    /// 1: two bytes of length stand before each message (TCP).
    framed: u32,
    /// 1: answers are read, not queries.
    answers: u32,
    /// End of what was captured.
    limit: u32,
    /// The message.
    base: u32,
    end: u32,
    pos: u32,
    /// End of the question's name, its terminating zero.
    name_end: u32,
    /// Length of the name as text.
    length: u32,
    index: u32,
    /// Bytes left of a label.
    left: u32,
    records: u32,
    additional: u32,
    /// Where the name lies that the next record must have.
    expected: u32,
    chain: u32,
    chain_ttl: u32,
    /// Comparing a record's name: it, the expected one.
    a: u32,
    b: u32,
    jumps: u32,
    /// Where the record's name ends; 0: not known yet.
    owner_end: u32,
    /// 1: the record has the expected name.
    same: u32,
}

const FRAME: u32 = 0;
const START: u32 = 1;
const HOP: u32 = 2;
const TEXT: u32 = 3;
const QUESTION: u32 = 4;
const RECORDS: u32 = 5;
const COMPARE: u32 = 6;
const SKIP: u32 = 7;
const RECORD: u32 = 8;

impl Reader {
    #[inline(always)]
    pub const fn new(limit: u32, framed: bool, answers: bool) -> Reader {
        Reader {
            hash: 0,
            addr: Addr([0; 4]),
            ttl: 0,
            id: 0,
            qtype: 0,
            phase: FRAME,
            framed: framed as u32,
            answers: answers as u32,
            limit,
            base: 0,
            end: 0,
            pos: 0,
            name_end: 0,
            length: 0,
            index: 0,
            left: 0,
            records: 0,
            additional: 0,
            expected: 0,
            chain: 0,
            chain_ttl: 0,
            a: 0,
            b: 0,
            jumps: 0,
            owner_end: 0,
            same: 0,
        }
    }

    /// One step. `text` takes the name asked, turned around and NUL-padded.
    #[inline(always)]
    pub fn step<B: Bytes + ?Sized>(&mut self, bytes: &B, text: &mut NameText) -> Step {
        match self.phase {
            FRAME => self.frame(bytes),
            START => self.start(bytes),
            HOP => self.hop(bytes, text),
            TEXT => self.copy(bytes, text),
            QUESTION => self.question(bytes),
            RECORDS => self.next_record(),
            COMPARE => self.compare(bytes),
            SKIP => self.skip(bytes),
            _ => self.record(bytes),
        }
    }

    #[inline(always)]
    fn to(&mut self, phase: u32) -> Step {
        self.phase = phase;
        Step::More
    }

    #[inline(always)]
    fn frame<B: Bytes + ?Sized>(&mut self, bytes: &B) -> Step {
        if self.framed == 0 {
            if self.pos != 0 {
                return Step::Done;
            }
            self.end = self.limit;
            return self.to(START);
        }
        if self.pos == self.limit {
            return Step::Done;
        }
        if self.pos + 2 > self.limit {
            return Step::Unread;
        }
        let len = half(bytes, self.pos);
        self.base = self.pos + 2;
        self.pos = self.base;
        self.end = self.base + len as u32;
        if self.end > self.limit {
            if self.answers == 0 {
                return Step::Unread;
            }
            self.end = self.limit;
        }
        self.to(START)
    }

    #[inline(always)]
    fn start<B: Bytes + ?Sized>(&mut self, bytes: &B) -> Step {
        if self.end < self.base + HEADER + 5 {
            return Step::Unread;
        }
        self.id = half(bytes, self.base);
        let flags = half(bytes, self.base + 2);
        let questions = half(bytes, self.base + 4);
        let records = half(bytes, self.base + 6);
        let authority = half(bytes, self.base + 8);
        let additional = half(bytes, self.base + 10);
        if questions != 1 {
            return Step::Unread;
        }
        if self.answers != 0 {
            // A response to a standard query.
            if flags & 0xf800 != 0x8000 {
                return Step::Unread;
            }
        } else if flags & 0xfa0f != 0
            || flags & 0x04c0 != 0
            || records != 0
            || authority != 0
            || additional > 1
        {
            // Only RD, AD and CD may be set.
            return Step::Unread;
        }
        self.records = records as u32;
        self.additional = additional as u32;
        self.pos = self.base + HEADER;
        self.to(HOP)
    }

    /// To the end of the question's name, label by label. It is not compressed:
    /// nothing stands before it.
    #[inline(always)]
    fn hop<B: Bytes + ?Sized>(&mut self, bytes: &B, text: &mut NameText) -> Step {
        if self.pos >= self.end {
            return Step::Unread;
        }
        let label = bytes.at(self.pos) as u32;
        if label > 63 {
            return Step::Unread;
        }
        if label != 0 {
            self.pos += 1 + label;
            return Step::More;
        }
        let wire = self.pos - (self.base + HEADER);
        // The text has one byte less than the labels with their lengths; the
        // root is empty.
        self.length = if wire == 0 { 0 } else { wire - 1 };
        if self.length as usize >= NAME_BYTES {
            return Step::Unread;
        }
        self.name_end = self.pos;
        self.index = 0;
        self.left = bytes.at(self.base + HEADER) as u32;
        self.hash = FNV_OFFSET;
        *text = [0; NAME_BYTES];
        self.to(if self.length == 0 { QUESTION } else { TEXT })
    }

    #[inline(always)]
    fn copy<B: Bytes + ?Sized>(&mut self, bytes: &B, text: &mut NameText) -> Step {
        let byte = bytes.at(self.base + HEADER + 1 + self.index);
        let byte = if self.left == 0 {
            self.left = byte as u32;
            b'.'
        } else {
            self.left -= 1;
            let byte = lower(byte);
            if !plain(byte) {
                return Step::Unread;
            }
            byte
        };
        let at = self.length.wrapping_sub(1).wrapping_sub(self.index) as usize;
        if at >= NAME_BYTES {
            return Step::Unread;
        }
        text[at] = byte;
        self.hash = fnv(self.hash, byte);
        self.index += 1;
        if self.index < self.length { Step::More } else { self.to(QUESTION) }
    }

    #[inline(always)]
    fn question<B: Bytes + ?Sized>(&mut self, bytes: &B) -> Step {
        let at = self.name_end + 1;
        if at + 4 > self.end || half(bytes, at + 2) != IN {
            return Step::Unread;
        }
        self.qtype = half(bytes, at);
        self.pos = at + 4;
        if self.answers != 0 {
            self.expected = self.base + HEADER;
            self.chain = 0;
            self.chain_ttl = u32::MAX;
            self.phase = RECORDS;
            return Step::Question;
        }
        if self.additional == 0 {
            if self.pos != self.end {
                return Step::Unread;
            }
        } else if !self.edns(bytes) {
            return Step::Unread;
        }
        self.pos = self.end;
        self.phase = FRAME;
        Step::Question
    }

    /// An OPT record (RFC 6891 §6.1.2) that ends the message and carries at most
    /// a cookie: other options could carry anything.
    #[inline(always)]
    fn edns<B: Bytes + ?Sized>(&self, bytes: &B) -> bool {
        let at = self.pos;
        if at + 11 > self.end || bytes.at(at) != 0 || half(bytes, at + 1) != OPT {
            return false;
        }
        // Extended RCODE and version are 0; of the flags only DO.
        if half(bytes, at + 5) != 0 || half(bytes, at + 7) & 0x7fff != 0 {
            return false;
        }
        let data = half(bytes, at + 9) as u32;
        if at + 11 + data != self.end {
            return false;
        }
        data == 0
            || (data > 4
                && data <= MAX_COOKIE
                && half(bytes, at + 11) == COOKIE
                && half(bytes, at + 13) as u32 == data - 4)
    }

    #[inline(always)]
    fn next_record(&mut self) -> Step {
        if self.records == 0 {
            self.pos = self.end;
            return self.to(FRAME);
        }
        self.records -= 1;
        self.a = self.pos;
        self.b = self.expected;
        self.left = 0;
        self.jumps = 0;
        self.owner_end = 0;
        self.same = 0;
        self.to(COMPARE)
    }

    /// One byte of two names, compression pointers (RFC 1035 §4.1.4) followed
    /// backwards only.
    #[inline(always)]
    fn compare<B: Bytes + ?Sized>(&mut self, bytes: &B) -> Step {
        if self.a >= self.end || self.b >= self.end {
            return Step::Unread;
        }
        let (a, b) = (bytes.at(self.a), bytes.at(self.b));
        if self.left > 0 {
            if lower(a) != lower(b) {
                return self.differs();
            }
            self.left -= 1;
            self.a += 1;
            self.b += 1;
            return Step::More;
        }
        if a >= 0xc0 {
            let target = self.base + ((a as u32 & 0x3f) << 8 | bytes.at(self.a + 1) as u32);
            if self.owner_end == 0 {
                self.owner_end = self.a + 2;
            }
            if target >= self.a || !self.may_jump() {
                return Step::Unread;
            }
            self.a = target;
            if self.a == self.b {
                return self.is_same();
            }
            return Step::More;
        }
        if b >= 0xc0 {
            let target = self.base + ((b as u32 & 0x3f) << 8 | bytes.at(self.b + 1) as u32);
            if target >= self.b || !self.may_jump() {
                return Step::Unread;
            }
            self.b = target;
            return Step::More;
        }
        if a > 63 || b > 63 {
            return Step::Unread;
        }
        if a != b {
            return self.differs();
        }
        if a == 0 {
            if self.owner_end == 0 {
                self.owner_end = self.a + 1;
            }
            return self.is_same();
        }
        self.left = a as u32;
        self.a += 1;
        self.b += 1;
        Step::More
    }

    #[inline(always)]
    fn may_jump(&mut self) -> bool {
        self.jumps += 1;
        self.jumps <= MAX_JUMPS
    }

    #[inline(always)]
    fn is_same(&mut self) -> Step {
        self.same = 1;
        self.pos = self.owner_end;
        self.to(RECORD)
    }

    #[inline(always)]
    fn differs(&mut self) -> Step {
        if self.owner_end != 0 {
            self.pos = self.owner_end;
            return self.to(RECORD);
        }
        self.to(SKIP)
    }

    #[inline(always)]
    fn skip<B: Bytes + ?Sized>(&mut self, bytes: &B) -> Step {
        if self.pos >= self.end {
            return Step::Unread;
        }
        let label = bytes.at(self.pos) as u32;
        if label >= 0xc0 {
            self.pos += 2;
            return self.to(RECORD);
        }
        if label > 63 {
            return Step::Unread;
        }
        self.pos += 1 + label;
        if label == 0 { self.to(RECORD) } else { Step::More }
    }

    #[inline(always)]
    fn record<B: Bytes + ?Sized>(&mut self, bytes: &B) -> Step {
        if self.pos + 10 > self.end {
            return Step::Unread;
        }
        let kind = half(bytes, self.pos);
        let class = half(bytes, self.pos + 2);
        let ttl = word(bytes, self.pos + 4);
        let len = half(bytes, self.pos + 8) as u32;
        let data = self.pos + 10;
        if data + len > self.end {
            return Step::Unread;
        }
        self.pos = data + len;
        self.phase = RECORDS;
        if self.same == 0 || class != IN {
            return Step::More;
        }
        // RFC 2181 §8: the top bit set means zero.
        let ttl = if ttl >> 31 != 0 { 0 } else { ttl };
        let ttl = if ttl < self.chain_ttl { ttl } else { self.chain_ttl };
        if kind == CNAME {
            self.chain += 1;
            if self.chain > MAX_CHAIN || len == 0 {
                return Step::Unread;
            }
            self.expected = data;
            self.chain_ttl = ttl;
            return Step::More;
        }
        if kind != self.qtype {
            return Step::More;
        }
        self.addr = if kind == A && len == 4 {
            Addr::v4(word(bytes, data).to_be())
        } else if kind == AAAA && len == 16 {
            Addr::v6([
                word(bytes, data).to_be(),
                word(bytes, data + 4).to_be(),
                word(bytes, data + 8).to_be(),
                word(bytes, data + 12).to_be(),
            ])
        } else {
            return Step::More;
        };
        self.ttl = ttl;
        Step::Address
    }
}

#[inline(always)]
fn half<B: Bytes + ?Sized>(bytes: &B, at: u32) -> u16 {
    (bytes.at(at) as u16) << 8 | bytes.at(at + 1) as u16
}

#[inline(always)]
fn word<B: Bytes + ?Sized>(bytes: &B, at: u32) -> u32 {
    (half(bytes, at) as u32) << 16 | half(bytes, at + 2) as u32
}

#[inline(always)]
pub(crate) fn lower(byte: u8) -> u8 {
    if byte.wrapping_sub(b'A') < 26 { byte | 0x20 } else { byte }
}

/// What host names are made of, `_` included. Anything else in a label (a dot, a
/// NUL) could pass for another name.
#[inline(always)]
pub(crate) fn plain(byte: u8) -> bool {
    byte.wrapping_sub(b'a') < 26 || byte.wrapping_sub(b'0') < 10 || byte == b'-' || byte == b'_'
}

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

#[inline(always)]
fn fnv(hash: u64, byte: u8) -> u64 {
    (hash ^ byte as u64).wrapping_mul(0x0100_0000_01b3)
}

/// A question as [`read`] hands it out.
#[cfg(any(test, feature = "user"))]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    pub id: u16,
    pub name: String,
    pub qtype: u16,
    /// Addresses that an answer gives for it, with their TTL.
    pub addresses: Vec<(Addr, u32)>,
}

/// All messages of a packet, read as the kernel does. The second part is whether
/// it could be read to its end.
#[cfg(any(test, feature = "user"))]
pub fn read(bytes: &[u8], framed: bool, answers: bool) -> (Vec<Question>, bool) {
    let most = if answers { MESSAGE_BYTES } else { QUERY_BYTES as usize };
    let (bytes, whole) = (&bytes[..bytes.len().min(most)], bytes.len() <= most);
    if !whole && !answers {
        return (Vec::new(), false);
    }
    let mut reader = Reader::new(bytes.len() as u32, framed, answers);
    let mut text = [0; NAME_BYTES];
    let mut questions: Vec<Question> = Vec::new();
    for _ in 0..STEPS {
        match reader.step(bytes, &mut text) {
            Step::More => {}
            Step::Done => return (questions, whole),
            Step::Unread => return (questions, false),
            Step::Question => questions.push(Question {
                id: reader.id,
                name: crate::name::readable(&text),
                qtype: reader.qtype,
                addresses: Vec::new(),
            }),
            Step::Address => {
                if let Some(question) = questions.last_mut() {
                    question.addresses.push((reader.addr, reader.ttl));
                }
            }
        }
    }
    (questions, false)
}

/// A query that a socket sent and whose answer may be learned from.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Asked {
    /// [`Reader::hash`]; 0: none.
    pub hash: u64,
    pub resolver: Addr,
    pub id: u16,
    pub qtype: u16,
    /// [`ASKED_TRUSTED`].
    pub flags: u32,
}

/// The resolver is pinned, and a rule covers the name: its addresses may be
/// learned as the name's. Else they are names for events only, or nothing.
pub const ASKED_TRUSTED: u32 = 1;
/// For the search list only: nothing is learned.
pub const ASKED_ONLY: u32 = 2;

/// Queries that one socket may have open; the oldest makes room.
pub const ASKED: u32 = 64;

/// What a socket asked last.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Queries {
    pub next: u64,
    pub asked: [Asked; ASKED as usize],
}

const _: () = {
    assert!(size_of::<Asked>() == 32);
    assert!(size_of::<Queries>() == 8 + 32 * ASKED as usize);
};

#[cfg(test)]
mod tests;
