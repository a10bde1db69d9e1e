//! Bytes of a segment of the collector's log: a header, then one record for each
//! stored batch. All integers little-endian.
//!
//! What is read may be anything: a disk that lied, a file cut short, a foreign
//! file. [`Items`] finds the next whole record after damage and says how many
//! bytes it skipped.

use crate::event::{Event, pb};
use crate::feed::{MAX_BATCH_BYTES, encode_event, event_length};
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};

/// Of a segment; the last two digits are the version.
const MAGIC: &[u8; 8] = b"MCPLOG01";
pub(super) const HEADER: usize = Header::LENGTH;
/// Of a record: not UTF-8, so that no event holds it by chance.
const MARK: [u8; 4] = [0xf5, b'L', 0xff, 0x0a];
/// Bytes of a record before its payload.
pub(super) const HEAD: usize = 64;
/// A record is closed when it would grow beyond [`MAX_BATCH_BYTES`]; one event
/// with a newer sensor's fields may be larger.
const MAX_PAYLOAD: usize = 2 * MAX_BATCH_BYTES;
/// Field number of `Batch.events`.
const BATCH_EVENTS: u32 = 3;

/// What stands at the start of every segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Of the log, in every cursor into it.
    pub log: u64,
    /// Number of the segment's first event.
    pub base: u64,
    pub created_unix_ms: u64,
}

impl Header {
    /// Where the first record begins.
    pub const LENGTH: usize = 36;

    pub(super) fn to_bytes(self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        for n in [self.log, self.base, self.created_unix_ms] {
            out.extend_from_slice(&n.to_le_bytes());
        }
        let sum = crc32c::crc32c(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        out
    }

    /// `None`: no segment of this version begins so.
    pub fn read(bytes: &[u8]) -> Option<Header> {
        let head = bytes.get(..HEADER)?;
        if &head[..8] != MAGIC || u32_at(head, 32) != crc32c::crc32c(&head[..32]) {
            return None;
        }
        let base = u64_at(head, 16);
        Some(Header { log: u64_at(head, 8), base, created_unix_ms: u64_at(head, 24) })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// What is known of a record without its payload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Head {
    pub events: u32,
    /// Number of the first event among all that this log ever held.
    pub offset: u64,
    pub first_seq: u64,
    pub last_seq: u64,
    /// UTC, milliseconds since 1970, by the collector's clock.
    pub stored_unix_ms: u64,
    /// Times of its oldest and newest event.
    pub oldest: i64,
    pub newest: i64,
}

impl Head {
    /// Number of the event after it.
    pub fn end(&self) -> u64 {
        self.offset + u64::from(self.events)
    }
}

/// Appends one record of some of `events` (ascending, at least one) to `out`;
/// gives its head and how many it took.
pub(super) fn write(
    out: &mut Vec<u8>,
    (sensor, boot): (&str, &str),
    events: &[&Event],
    offset: u64,
    stored_unix_ms: u64,
) -> (Head, usize) {
    let start = out.len();
    out.resize(start + HEAD, 0);
    for name in [sensor, boot] {
        let name = &name.as_bytes()[..name.len().min(usize::from(u8::MAX))];
        out.push(name.len() as u8);
        out.extend_from_slice(name);
    }
    let mut head = Head { offset, stored_unix_ms, oldest: i64::MAX, newest: i64::MIN, ..Head::default() };
    for event in events {
        let length = event_length(event);
        let field = 1 + encoded_len_varint(length as u64) + length;
        if head.events > 0 && out.len() - start - HEAD + field > MAX_BATCH_BYTES {
            break;
        }
        encode_key(BATCH_EVENTS, WireType::LengthDelimited, out);
        encode_varint(length as u64, out);
        encode_event(event, out);
        if head.events == 0 {
            head.first_seq = event.seq;
        }
        head.last_seq = event.seq;
        head.oldest = head.oldest.min(event.time_unix_ns);
        head.newest = head.newest.max(event.time_unix_ns);
        head.events += 1;
    }
    let payload = (out.len() - start - HEAD) as u32;
    let bytes = &mut out[start..];
    bytes[..4].copy_from_slice(&MARK);
    bytes[8..12].copy_from_slice(&payload.to_le_bytes());
    bytes[12..16].copy_from_slice(&head.events.to_le_bytes());
    let words =
        [offset, head.first_seq, head.last_seq, stored_unix_ms, head.oldest as u64, head.newest as u64];
    for (n, word) in words.into_iter().enumerate() {
        bytes[16 + 8 * n..24 + 8 * n].copy_from_slice(&word.to_le_bytes());
    }
    let sum = crc32c::crc32c(&bytes[8..]);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
    (head, head.events as usize)
}

/// A whole record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    pub head: Head,
    payload: &'a [u8],
}

impl<'a> Record<'a> {
    /// The record at the start of `bytes`, and how long it is; `None`: there is
    /// no whole one.
    fn parse(bytes: &'a [u8]) -> Option<(Record<'a>, usize)> {
        let head = bytes.get(..HEAD)?;
        let length = u32_at(head, 8) as usize;
        if head[..4] != MARK || length > MAX_PAYLOAD {
            return None;
        }
        let payload = bytes.get(HEAD..HEAD + length)?;
        if crc32c::crc32c(&bytes[8..HEAD + length]) != u32_at(head, 4) {
            return None;
        }
        let head = Head {
            events: u32_at(head, 12),
            offset: u64_at(head, 16),
            first_seq: u64_at(head, 24),
            last_seq: u64_at(head, 32),
            stored_unix_ms: u64_at(head, 40),
            oldest: u64_at(head, 48) as i64,
            newest: u64_at(head, 56) as i64,
        };
        let sound = head.events > 0 && head.offset.checked_add(u64::from(head.events)).is_some();
        sound.then_some((Record { head, payload }, HEAD + length))
    }

    /// Sensor and boot, and where the events begin.
    fn names(&self) -> Option<(&'a str, &'a str, usize)> {
        let mut at = 0;
        let mut name = || {
            let length = usize::from(*self.payload.get(at)?);
            let name = self.payload.get(at + 1..at + 1 + length)?;
            at += 1 + length;
            std::str::from_utf8(name).ok()
        };
        Some((name()?, name()?, at))
    }

    /// Whose events these are.
    pub fn origin(&self) -> Option<(&'a str, &'a str)> {
        self.names().map(|(sensor, boot, _)| (sensor, boot))
    }

    /// `None`: it is no batch of as many events as its head says.
    pub fn events(&self) -> Option<Vec<Event>> {
        let (sensor, boot, at) = self.names()?;
        let mut events = pb::Batch::decode(&self.payload[at..]).ok()?.events;
        for event in &mut events {
            sensor.clone_into(&mut event.sensor);
            boot.clone_into(&mut event.boot);
        }
        (events.len() == self.head.events as usize).then_some(events)
    }
}

/// What [`Items`] finds.
#[derive(Debug, PartialEq, Eq)]
pub enum Item<'a> {
    /// A record; it ends before this position.
    Record(Record<'a>, usize),
    /// Bytes that are no whole record, up to the next one or the end.
    Damage(usize),
}

/// Reads records one after the other.
pub struct Items<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Items<'a> {
    /// `at`: where the first record begins.
    pub fn new(bytes: &'a [u8], at: usize) -> Items<'a> {
        Items { bytes, at: at.min(bytes.len()) }
    }
}

impl<'a> Iterator for Items<'a> {
    type Item = Item<'a>;

    fn next(&mut self) -> Option<Item<'a>> {
        let rest = &self.bytes[self.at..];
        if rest.is_empty() {
            return None;
        }
        if let Some((record, length)) = Record::parse(rest) {
            self.at += length;
            return Some(Item::Record(record, self.at));
        }
        // At most one look at each mark: the whole costs a pass over the bytes
        // and one sum for each mark that a hostile file holds.
        let skipped = memchr::memmem::find_iter(&rest[1..], &MARK)
            .map(|at| at + 1)
            .find(|at| Record::parse(&rest[*at..]).is_some())
            .unwrap_or(rest.len());
        self.at += skipped;
        Some(Item::Damage(skipped))
    }
}
