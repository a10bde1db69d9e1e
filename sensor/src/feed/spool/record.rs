//! Bytes of a segment: a header that says whose batches these are, then one
//! record for each batch. All integers little-endian.
//!
//! What is read may be anything: a disk that lied, a file cut short, a foreign
//! file. [`Reader`] finds the next whole record after damage and says how many
//! bytes it skipped.

use crate::feed::MAX_BATCH_BYTES;
use crate::feed::batch::Sealed;
use prost::bytes::Bytes;

/// Of a segment; the last two digits are the version.
const MAGIC: &[u8; 8] = b"MCPSPL01";
/// Of a record: not UTF-8, so that no event holds it by chance.
const MARK: [u8; 4] = [0xf5, b'R', 0xff, 0x0a];
/// Longest name of a sensor or a boot, as the collector has it.
const MAX_NAME: usize = 128;
/// Of a segment's header, at most.
pub(super) const MAX_HEADER: usize = MAGIC.len() + 2 * (1 + MAX_NAME) + 4;
/// Bytes of a record before its payload.
pub(super) const HEAD: usize = 44;
/// A sealed batch and its envelope.
const MAX_PAYLOAD: usize = MAX_BATCH_BYTES + 1024;

/// Whose batches a segment holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    pub sensor: String,
    pub boot: String,
}

/// What a record is beside its batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Meta {
    /// UTC, milliseconds since 1970.
    pub sealed_unix_ms: u64,
    /// Nothing in it can be given up any more but all of it.
    pub thinned: bool,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HeaderError {
    #[error("it does not begin as a spool segment of this version does")]
    Magic,
    #[error("its header is cut short or damaged")]
    Damaged,
}

/// The bytes that a segment begins with.
pub(super) fn header(owner: &Owner) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    for name in [&owner.sensor, &owner.boot] {
        let name = &name.as_bytes()[..name.len().min(MAX_NAME)];
        out.push(name.len() as u8);
        out.extend_from_slice(name);
    }
    let sum = crc32c::crc32c(&out);
    out.extend_from_slice(&sum.to_le_bytes());
    out
}

/// Whose segment this is, and where its records begin.
pub fn read_header(bytes: &[u8]) -> Result<(Owner, usize), HeaderError> {
    if bytes.len() < MAGIC.len() || &bytes[..MAGIC.len()] != MAGIC {
        return Err(HeaderError::Magic);
    }
    let mut at = MAGIC.len();
    let mut name = || {
        let length = usize::from(*bytes.get(at)?);
        let name = bytes.get(at + 1..at + 1 + length)?;
        at += 1 + length;
        (1..=MAX_NAME).contains(&length).then(|| String::from_utf8(name.to_vec()).ok()).flatten()
    };
    let (Some(sensor), Some(boot)) = (name(), name()) else { return Err(HeaderError::Damaged) };
    let sum = bytes.get(at..at + 4).ok_or(HeaderError::Damaged)?;
    if sum != crc32c::crc32c(&bytes[..at]).to_le_bytes() {
        return Err(HeaderError::Damaged);
    }
    Ok((Owner { sensor, boot }, at + 4))
}

/// The bytes of one record.
pub(super) fn record(batch: &Sealed, meta: Meta) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEAD + batch.bytes.len());
    out.extend_from_slice(&MARK);
    out.extend_from_slice(&[0; 4]); // the sum
    out.extend_from_slice(&(batch.bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(&(batch.events as u32).to_le_bytes());
    out.extend_from_slice(&batch.first_seq.to_le_bytes());
    out.extend_from_slice(&batch.last_seq.to_le_bytes());
    out.extend_from_slice(&meta.sealed_unix_ms.to_le_bytes());
    out.extend_from_slice(&u32::from(meta.thinned).to_le_bytes());
    out.extend_from_slice(&batch.bytes);
    let sum = crc32c::crc32c(&out[8..]);
    out[4..8].copy_from_slice(&sum.to_le_bytes());
    out
}

/// The record at the start of `bytes`, and how long it is; `None`: there is no
/// whole one.
fn parse(bytes: &[u8]) -> Option<(Sealed, Meta, usize)> {
    let head = bytes.get(..HEAD)?;
    if head[..4] != MARK {
        return None;
    }
    let u32_at = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    let length = u32_at(8) as usize;
    if length > MAX_PAYLOAD {
        return None;
    }
    let payload = bytes.get(HEAD..HEAD + length)?;
    if crc32c::crc32c_append(crc32c::crc32c(&head[8..]), payload) != u32_at(4) {
        return None;
    }
    let (first_seq, last_seq) = (u64_at(16), u64_at(24));
    if first_seq == 0 || first_seq > last_seq {
        return None;
    }
    let meta = Meta { sealed_unix_ms: u64_at(32), thinned: u32_at(40) != 0 };
    let batch =
        Sealed { first_seq, last_seq, events: u32_at(12) as usize, bytes: Bytes::copy_from_slice(payload) };
    Some((batch, meta, HEAD + length))
}

/// What [`Reader::next`] finds.
#[derive(Debug, PartialEq, Eq)]
pub enum Item {
    /// A batch; it ends before this offset.
    Batch(Sealed, usize),
    /// Bytes that are no whole record, up to the next one or the end.
    Damage(usize),
}

/// Reads records one after the other.
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// `at`: where the first record begins.
    pub fn new(bytes: &'a [u8], at: usize) -> Reader<'a> {
        Reader { bytes, at: at.min(bytes.len()) }
    }

    pub(super) fn next_with_meta(&mut self) -> Option<(Item, Meta)> {
        let rest = &self.bytes[self.at..];
        if rest.is_empty() {
            return None;
        }
        if let Some((batch, meta, length)) = parse(rest) {
            self.at += length;
            return Some((Item::Batch(batch, self.at), meta));
        }
        // At most one look at each mark: the whole costs a pass over the bytes
        // and one sum for each mark that a hostile file holds.
        let skipped = memchr::memmem::find_iter(&rest[1..], &MARK)
            .map(|at| at + 1)
            .find(|at| parse(&rest[*at..]).is_some())
            .unwrap_or(rest.len());
        self.at += skipped;
        Some((Item::Damage(skipped), Meta::default()))
    }
}

impl Iterator for Reader<'_> {
    type Item = Item;

    fn next(&mut self) -> Option<Item> {
        self.next_with_meta().map(|(item, _)| item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn batch(seq: u64, length: usize) -> Sealed {
        Sealed { first_seq: seq, last_seq: seq + 2, events: 3, bytes: vec![seq as u8; length].into() }
    }

    fn owner() -> Owner {
        Owner { sensor: "host".to_owned(), boot: "18f".to_owned() }
    }

    #[test]
    fn what_was_written_is_read() {
        let mut bytes = header(&owner());
        let batches: Vec<_> = (1..5).map(|n| batch(n * 10, n as usize * 100)).collect();
        for batch in &batches {
            bytes.extend(record(batch, Meta { sealed_unix_ms: 7, thinned: true }));
        }
        let (who, at) = read_header(&bytes).unwrap();
        assert_eq!(who, owner());
        let read: Vec<_> = Reader::new(&bytes, at)
            .map(|item| match item {
                Item::Batch(batch, _) => batch,
                Item::Damage(n) => panic!("{n}"),
            })
            .collect();
        assert_eq!(read, batches);
        let mut reader = Reader::new(&bytes, at);
        let (_, meta) = reader.next_with_meta().unwrap();
        assert_eq!(meta, Meta { sealed_unix_ms: 7, thinned: true });
    }

    #[test]
    fn a_header_of_something_else_is_refused() {
        assert_eq!(read_header(b"{\"seq\":1}").unwrap_err(), HeaderError::Magic);
        let whole = header(&owner());
        for cut in MAGIC.len()..whole.len() {
            assert_eq!(read_header(&whole[..cut]).unwrap_err(), HeaderError::Damaged);
        }
        let mut damaged = whole;
        damaged[10] ^= 1;
        assert_eq!(read_header(&damaged).unwrap_err(), HeaderError::Damaged);
    }

    proptest! {
        /// Whatever happens to some bytes, the records that they do not touch
        /// are read, and every byte is either in a record or told as damage.
        #[test]
        fn damage_costs_what_it_hits(
            lengths in prop::collection::vec(0usize..300, 1..12),
            hits in prop::collection::vec((0usize..4000, any::<u8>()), 0..6),
            cut in 0usize..400,
        ) {
            let mut bytes = header(&owner());
            let start = bytes.len();
            let mut places = Vec::new();
            for (n, length) in lengths.iter().enumerate() {
                let batch = batch(n as u64 * 10 + 1, *length);
                let from = bytes.len();
                bytes.extend(record(&batch, Meta::default()));
                places.push((from..bytes.len(), batch));
            }
            let whole = bytes.clone();
            bytes.truncate(bytes.len() - cut.min(bytes.len() - start));
            for (at, value) in hits {
                let at = start + at % (bytes.len() - start).max(1);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            let untouched: Vec<_> = places
                .into_iter()
                .filter(|(range, _)| bytes.get(range.clone()) == Some(&whole[range.clone()]))
                .map(|(_, batch)| batch)
                .collect();
            let (mut read, mut told) = (Vec::new(), 0);
            for item in Reader::new(&bytes, start) {
                match item {
                    Item::Batch(batch, _) => {
                        told += HEAD + batch.bytes.len();
                        read.push(batch);
                    }
                    Item::Damage(skipped) => told += skipped,
                }
            }
            prop_assert_eq!(told, bytes.len() - start);
            prop_assert_eq!(read, untouched);
        }

        #[test]
        fn anything_may_be_read(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = read_header(&bytes);
            let mut at = 0;
            for item in Reader::new(&bytes, 0) {
                at = match item {
                    Item::Batch(_, end) => end,
                    Item::Damage(skipped) => at + skipped,
                };
            }
            prop_assert_eq!(at, bytes.len());
        }
    }
}
