//! Events into the bytes of one `FeedRequest`, once: what is sent again is the
//! same to the byte.

use crate::event::{Event, pb};
use prost::Message;
use prost::bytes::{BufMut, Bytes, BytesMut};
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};
use std::sync::Arc;

pub const MAX_BATCH_EVENTS: usize = 512;
/// Of the encoded batch.
pub const MAX_BATCH_BYTES: usize = 1 << 20;
/// Keys, lengths and the two sequence numbers of a batch.
const OVERHEAD: usize = 64;

// Field numbers of event.proto and collector.proto.
const EVENT_SEQ: u32 = 1;
const EVENT_TIME: u32 = 2;
const BATCH_FIRST: u32 = 1;
const BATCH_LAST: u32 = 2;
const BATCH_EVENTS: u32 = 3;
const REQUEST_BATCH: u32 = 2;

/// A batch that will not change any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    pub first_seq: u64,
    pub last_seq: u64,
    pub events: usize,
    /// A whole `FeedRequest`.
    pub bytes: Bytes,
}

/// A batch that is being filled. `sensor` and `boot` are left out: Hello has
/// said them.
#[derive(Debug, Default)]
pub(super) struct Open {
    events: BytesMut,
    count: usize,
    first_seq: u64,
    last_seq: u64,
}

/// An event does not fit into the open batch (seal it first), or into any.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Full {
    Batch,
    TooLarge,
}

impl Open {
    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub(super) fn push(&mut self, event: &Arc<Event>) -> Result<(), Full> {
        let length = event_length(event);
        let field = 1 + encoded_len_varint(length as u64) + length;
        if field + OVERHEAD > MAX_BATCH_BYTES {
            return Err(Full::TooLarge);
        }
        if self.count == MAX_BATCH_EVENTS || self.events.len() + field + OVERHEAD > MAX_BATCH_BYTES {
            return Err(Full::Batch);
        }
        encode_key(BATCH_EVENTS, WireType::LengthDelimited, &mut self.events);
        encode_varint(length as u64, &mut self.events);
        encode_event(event, &mut self.events);
        if self.count == 0 {
            self.first_seq = event.seq;
        }
        self.last_seq = event.seq;
        self.count += 1;
        Ok(())
    }

    /// The batch so far; empties this. `None`: nothing in it.
    pub(super) fn seal(&mut self) -> Option<Sealed> {
        if self.is_empty() {
            return None;
        }
        let mut head = BytesMut::with_capacity(OVERHEAD);
        prost::encoding::uint64::encode(BATCH_FIRST, &self.first_seq, &mut head);
        prost::encoding::uint64::encode(BATCH_LAST, &self.last_seq, &mut head);
        let mut bytes = BytesMut::with_capacity(self.events.len() + OVERHEAD);
        encode_key(REQUEST_BATCH, WireType::LengthDelimited, &mut bytes);
        encode_varint((head.len() + self.events.len()) as u64, &mut bytes);
        bytes.put(head);
        bytes.put(std::mem::take(&mut self.events));
        let sealed = Sealed {
            first_seq: self.first_seq,
            last_seq: self.last_seq,
            events: self.count,
            bytes: bytes.freeze(),
        };
        self.count = 0;
        Some(sealed)
    }
}

/// Of an event as a batch holds it: without sensor and boot.
pub(crate) fn event_length(event: &Event) -> usize {
    prost::encoding::uint64::encoded_len(EVENT_SEQ, &event.seq)
        + prost::encoding::int64::encoded_len(EVENT_TIME, &event.time_unix_ns)
        + event.body.as_ref().map_or(0, pb::event::Body::encoded_len)
}

pub(crate) fn encode_event(event: &Event, out: &mut impl BufMut) {
    prost::encoding::uint64::encode(EVENT_SEQ, &event.seq, out);
    prost::encoding::int64::encode(EVENT_TIME, &event.time_unix_ns, out);
    if let Some(body) = &event.body {
        body.encode(out);
    }
}

/// A message as bytes for the stream.
pub(super) fn hello(hello: pb::Hello) -> Bytes {
    pb::FeedRequest { message: Some(pb::feed_request::Message::Hello(hello)) }.encode_to_vec().into()
}

pub(super) fn bundle(state: pb::BundleState) -> Bytes {
    pb::FeedRequest { message: Some(pb::feed_request::Message::Bundle(state)) }.encode_to_vec().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Body;

    fn event(seq: u64, detail: usize) -> Arc<Event> {
        Arc::new(Event {
            seq,
            time_unix_ns: -5,
            sensor: "s".to_owned(),
            boot: "b".to_owned(),
            body: Some(Body::Finding(pb::Finding { detail: "x".repeat(detail), ..Default::default() })),
        })
    }

    fn decode(sealed: &Sealed) -> pb::Batch {
        match pb::FeedRequest::decode(&*sealed.bytes).unwrap().message {
            Some(pb::feed_request::Message::Batch(batch)) => batch,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn sealed_bytes_are_the_message_that_the_collector_decodes() {
        let mut open = Open::default();
        open.push(&event(3, 10)).unwrap();
        open.push(&event(5, 300)).unwrap();
        let sealed = open.seal().unwrap();
        let batch = decode(&sealed);
        assert_eq!((batch.first_seq, batch.last_seq, sealed.events), (3, 5, 2));
        let bare = |e: Arc<Event>| Event { sensor: String::new(), boot: String::new(), ..(*e).clone() };
        assert_eq!(batch.events, [bare(event(3, 10)), bare(event(5, 300))]);
        assert_eq!(open.seal(), None);
    }

    #[test]
    fn a_batch_ends_at_512_events_and_below_one_mebibyte() {
        let mut open = Open::default();
        for seq in 1..=512 {
            open.push(&event(seq, 1)).unwrap();
        }
        assert_eq!(open.push(&event(513, 1)), Err(Full::Batch));
        assert_eq!(decode(&open.seal().unwrap()).events.len(), 512);
        let large = MAX_BATCH_BYTES / 3;
        open.push(&event(1, large)).unwrap();
        open.push(&event(2, large)).unwrap();
        assert_eq!(open.push(&event(3, large)), Err(Full::Batch));
        assert!(open.seal().unwrap().bytes.len() <= MAX_BATCH_BYTES);
        assert_eq!(open.push(&event(4, MAX_BATCH_BYTES)), Err(Full::TooLarge));
        assert!(open.is_empty());
    }
}
