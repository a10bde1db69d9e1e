//! Batches that are sealed and not yet acknowledged, in order.

use super::batch::Sealed;
use std::collections::VecDeque;

/// Batches under way at most, whatever credit the collector gives: at 1 MiB
/// each, the most memory that sealed batches take.
pub(super) const MOST: usize = 16;

#[derive(Debug)]
pub(super) struct Window {
    batches: VecDeque<Sealed>,
    /// How many of them, from the front, were sent on this stream.
    sent: usize,
    credit: usize,
    acked_seq: u64,
}

impl Window {
    pub(super) fn new() -> Window {
        Window { batches: VecDeque::new(), sent: 0, credit: MOST, acked_seq: 0 }
    }

    pub(super) fn has_room(&self) -> bool {
        self.batches.len() < self.credit
    }

    pub(super) fn len(&self) -> usize {
        self.batches.len()
    }

    pub(super) fn acked_seq(&self) -> u64 {
        self.acked_seq
    }

    /// The oldest event that may be sent again; `None`: nothing waits.
    pub(super) fn oldest(&self) -> Option<u64> {
        self.batches.front().map(|b| b.first_seq)
    }

    pub(super) fn push(&mut self, batch: Sealed) {
        self.batches.push_back(batch);
    }

    /// The next batch to send on this stream.
    pub(super) fn next(&mut self) -> Option<Sealed> {
        let batch = self.batches.get(self.sent)?.clone();
        self.sent += 1;
        Some(batch)
    }

    /// A new stream: what the collector has not stored is sent again.
    pub(super) fn restart(&mut self, committed_seq: u64, credit: u32) {
        self.sent = self.batches.len();
        self.ack(committed_seq);
        self.sent = 0;
        self.credit = (credit as usize).clamp(1, MOST);
    }

    /// Cumulative; of what was not sent nothing can have been stored.
    pub(super) fn ack(&mut self, seq: u64) {
        while self.sent > 0 && self.batches.front().is_some_and(|b| b.last_seq <= seq) {
            self.batches.pop_front();
            self.sent -= 1;
        }
        self.acked_seq = self.acked_seq.max(seq);
    }

    /// Takes out a batch that will never be accepted.
    pub(super) fn reject(&mut self, first_seq: u64) -> Option<Sealed> {
        let at = self.batches.iter().position(|b| b.first_seq == first_seq)?;
        if at < self.sent {
            self.sent -= 1;
        }
        self.batches.remove(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::bytes::Bytes;

    fn batch(first_seq: u64, last_seq: u64) -> Sealed {
        Sealed { first_seq, last_seq, events: 1, bytes: Bytes::new() }
    }

    #[test]
    fn what_was_not_acknowledged_is_sent_again_on_the_next_stream() {
        let mut window = Window::new();
        for first in [1, 11, 21] {
            window.push(batch(first, first + 9));
        }
        let sent: Vec<u64> = std::iter::from_fn(|| window.next()).map(|b| b.first_seq).collect();
        assert_eq!(sent, [1, 11, 21]);
        window.ack(10);
        assert!(window.next().is_none());
        window.restart(20, 8);
        assert_eq!(window.next().unwrap(), batch(21, 30));
        assert_eq!((window.len(), window.acked_seq(), window.oldest()), (1, 20, Some(21)));
    }

    #[test]
    fn an_ack_within_a_batch_does_not_release_it() {
        let mut window = Window::new();
        window.push(batch(1, 10));
        window.ack(10);
        assert_eq!(window.len(), 1, "not even sent");
        window.next();
        window.ack(9);
        assert_eq!(window.len(), 1);
        window.ack(10);
        assert_eq!(window.len(), 0);
    }

    #[test]
    fn room_ends_at_the_credit_and_a_rejected_batch_makes_some() {
        let mut window = Window::new();
        window.restart(0, 2);
        window.push(batch(1, 1));
        assert!(window.has_room());
        window.push(batch(2, 2));
        assert!(!window.has_room());
        window.next();
        assert_eq!(window.reject(1).unwrap().first_seq, 1);
        assert!(window.reject(1).is_none());
        assert_eq!(window.next().unwrap().first_seq, 2);
        window.restart(0, u32::MAX);
        for seq in 3..=MOST as u64 + 1 {
            assert!(window.has_room());
            window.push(batch(seq, seq));
        }
        assert!(!window.has_room(), "no credit goes beyond the limit");
    }
}
