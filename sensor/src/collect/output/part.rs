//! How far a batch has come that comes again after an error, so that what a
//! receiver has acknowledged is not sent twice.

use super::{Batch, Refused};

#[derive(Debug, Default)]
pub struct Part {
    /// Which batch: its cursors and its length.
    of: Option<(u64, u64, usize)>,
    /// The first so many events of it are dealt with.
    pub taken: usize,
    pub refused: Vec<Refused>,
}

impl Part {
    /// Begins anew with a batch that did not come before.
    pub fn begin(&mut self, batch: &Batch<'_>) {
        let of = Some((batch.from, batch.next, batch.events.len()));
        if self.of != of {
            *self = Part { of, ..Part::default() };
        }
    }

    /// All of it is dealt with; what was refused of it.
    pub fn end(&mut self) -> Vec<Refused> {
        std::mem::take(self).refused
    }
}
