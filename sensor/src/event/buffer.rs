//! A bounded buffer of events that gives up telemetry and essential events
//! apart, so that neither crowds out the other, and knows what it gave up.

use super::{Class, Event, class, is_denial};
use std::collections::VecDeque;
use std::sync::Arc;

/// What was dropped since it was last told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Lost {
    pub count: u64,
    pub denials: u64,
    pub first_seq: u64,
    pub last_seq: u64,
}

#[derive(Clone, Debug)]
pub(super) enum Item {
    Event(Arc<Event>),
    /// Stands at `last_seq`, a number that no event of this buffer has.
    Lost(Lost),
}

/// What the events of one class may weigh. Slow readers keep the newest, which
/// are the same ones in each buffer: it bounds all of them together.
const MAX_BYTES: usize = 12 << 20;

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<(Arc<Event>, usize)>,
    bytes: usize,
}

impl Queue {
    fn push(&mut self, event: Arc<Event>, weight: usize) {
        self.bytes += weight;
        self.events.push_back((event, weight));
    }

    fn pop(&mut self) -> Option<Arc<Event>> {
        let (event, weight) = self.events.pop_front()?;
        self.bytes -= weight;
        Some(event)
    }

    /// Of the oldest.
    fn seq(&self) -> u64 {
        self.events.front().map_or(u64::MAX, |(e, _)| e.seq)
    }
}

#[derive(Debug)]
pub(super) struct Buffer {
    essential: Queue,
    telemetry: Queue,
    /// Of each class.
    capacity: usize,
    lost: Lost,
    lost_total: u64,
}

impl Buffer {
    pub(super) fn new(capacity: usize) -> Buffer {
        Buffer {
            essential: Queue::default(),
            telemetry: Queue::default(),
            capacity: capacity.max(1),
            lost: Lost::default(),
            lost_total: 0,
        }
    }

    /// Appends an event with a higher number than any before and what it weighs
    /// ([`super::weight`]); the oldest of its class make room.
    pub(super) fn push(&mut self, event: Arc<Event>, weight: usize) {
        let kind = event.body.as_ref().map_or(Class::Telemetry, class);
        let queue = match kind {
            Class::Essential => &mut self.essential,
            Class::Telemetry => &mut self.telemetry,
        };
        while (queue.events.len() == self.capacity || queue.bytes + weight > MAX_BYTES)
            && let Some(oldest) = queue.pop()
        {
            self.lost_total += 1;
            self.lost.count += 1;
            self.lost.denials += u64::from(oldest.body.as_ref().is_some_and(is_denial));
            if self.lost.first_seq == 0 || oldest.seq < self.lost.first_seq {
                self.lost.first_seq = oldest.seq;
            }
            self.lost.last_seq = self.lost.last_seq.max(oldest.seq);
        }
        queue.push(event, weight);
    }

    /// The next in order of numbers.
    pub(super) fn pop(&mut self) -> Option<Item> {
        let (essential, telemetry) = (self.essential.seq(), self.telemetry.seq());
        if self.lost.count > 0 && self.lost.last_seq < essential.min(telemetry) {
            return Some(Item::Lost(std::mem::take(&mut self.lost)));
        }
        let queue = if essential < telemetry { &mut self.essential } else { &mut self.telemetry };
        queue.pop().map(Item::Event)
    }

    /// What it holds, in order of numbers, without taking it out.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Event>> {
        let mut essential = self.essential.events.iter().map(|(e, _)| e).peekable();
        let mut telemetry = self.telemetry.events.iter().map(|(e, _)| e).peekable();
        std::iter::from_fn(move || match (essential.peek(), telemetry.peek()) {
            (Some(e), Some(t)) if e.seq < t.seq => essential.next(),
            (Some(_), None) => essential.next(),
            _ => telemetry.next(),
        })
    }

    pub(super) fn len(&self) -> usize {
        self.essential.events.len() + self.telemetry.events.len()
    }

    pub(super) fn lost_total(&self) -> u64 {
        self.lost_total
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Body, pb};
    use super::*;
    use proptest::prelude::*;

    fn event(seq: u64, essential: bool) -> Arc<Event> {
        let verdict = if essential { pb::Verdict::Deny } else { pb::Verdict::Allow };
        let decision = pb::Decision { verdict: verdict.into(), ..Default::default() };
        let body = Body::Connection(pb::Connection { decision: Some(decision), ..Default::default() });
        Arc::new(Event { seq, body: Some(body), ..Default::default() })
    }

    proptest! {
        /// However pushes and pops interleave: numbers rise strictly, and what
        /// came out plus what was told lost is what went in.
        #[test]
        fn nothing_vanishes_untold(
            capacity in 1usize..6,
            steps in prop::collection::vec((any::<bool>(), any::<bool>()), 0..200),
        ) {
            let mut buffer = Buffer::new(capacity);
            let (mut pushed, mut out, mut told, mut last) = (0u64, 0u64, 0u64, 0u64);
            let mut take = |item: Item| -> Result<(), TestCaseError> {
                let seq = match item {
                    Item::Event(e) => { out += 1; e.seq }
                    Item::Lost(l) => {
                        prop_assert!(l.first_seq <= l.last_seq && l.count > 0);
                        told += l.count;
                        l.last_seq
                    }
                };
                prop_assert!(seq > last, "{seq} after {last}");
                last = seq;
                Ok(())
            };
            for (push, essential) in steps {
                if push {
                    pushed += 1;
                    buffer.push(event(pushed, essential), 1);
                } else if let Some(item) = buffer.pop() {
                    take(item)?;
                }
                prop_assert!(buffer.len() <= 2 * capacity);
            }
            while let Some(item) = buffer.pop() {
                take(item)?;
            }
            prop_assert_eq!(out + told, pushed);
            prop_assert_eq!(buffer.lost_total(), told);
        }
    }

    #[test]
    fn a_flood_of_telemetry_costs_no_denial() {
        let mut buffer = Buffer::new(4);
        buffer.push(event(1, true), 1);
        for seq in 2..100 {
            buffer.push(event(seq, false), 1);
        }
        assert!(matches!(buffer.pop(), Some(Item::Event(e)) if e.seq == 1));
        assert!(matches!(
            buffer.pop(),
            Some(Item::Lost(Lost { count: 94, denials: 0, first_seq: 2, last_seq: 95 }))
        ));
        assert!(matches!(buffer.pop(), Some(Item::Event(e)) if e.seq == 96));
    }

    #[test]
    fn heavy_events_make_room_by_what_they_weigh() {
        let mut buffer = Buffer::new(100);
        for seq in 1..=10 {
            buffer.push(event(seq, false), MAX_BYTES / 4);
        }
        assert_eq!((buffer.len(), buffer.lost_total()), (4, 6));
        buffer.push(event(11, false), 2 * MAX_BYTES);
        assert_eq!((buffer.len(), buffer.lost_total()), (1, 10), "a single one has room whatever it weighs");
    }
}
