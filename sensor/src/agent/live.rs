//! One server's stdio, or a candidate's, while it lives.

use super::places::Places;
use super::printed::Printed;
use super::session::Session;
use crate::mcp::{Output, Sender};
use sensor_common::label::Label;
use sensor_common::stdio::{Chunk, FROM_CLIENT, HOW_DATA, WireKey, how_name, may_begin};

/// One server's stdio, or a candidate's.
pub(super) struct Live {
    /// [`Label::NONE`]: a candidate's.
    pub label: Label,
    pub keys: Vec<WireKey>,
    pub places: Places,
    pub session: Session,
    pub printed: Printed,
    pub processes: Vec<u32>,
    /// Bytes of a candidate that were looked at, each way.
    pub seen: [u64; 2],
    /// Met in the middle: the first bytes, each way, may be the end of a line.
    pub joined: [bool; 2],
}

fn sender(direction: u32) -> Sender {
    if direction == FROM_CLIENT { Sender::Client } else { Sender::Server }
}

impl Live {
    /// The next bytes of a wire, as the kernel recorded them.
    pub fn take(&mut self, chunk: &Chunk, data: &[u8], time: i64, out: &mut Vec<Output>) {
        let sender = sender(chunk.direction);
        let moved = u64::from(chunk.moved);
        if let Some(seen) = self.seen.get_mut(chunk.direction as usize) {
            *seen += moved;
        }
        let Some(lost) = self.places.take(chunk) else { return };
        if lost > 0 {
            self.lost(chunk.direction, time, lost, out);
        }
        let joined = self.joined.get_mut(chunk.direction as usize).is_some_and(std::mem::take);
        if joined && !data.first().is_some_and(|b| may_begin(*b)) {
            // No message begins like this. One that seems to begin and does not
            // is no whole JSON either.
            self.session.gap(sender, time, 0, out);
        }
        if chunk.how == HOW_DATA {
            self.session.bytes(sender, time, data, self.label.is_some(), out);
        } else {
            out.push(Output::Uninspected { sender, bytes: moved, how: how_name(chunk.how) });
            self.session.gap(sender, time, moved, out);
        }
    }

    pub(super) fn lost(&mut self, direction: u32, time: i64, bytes: u64, out: &mut Vec<Output>) {
        let sender = sender(direction);
        out.push(Output::Uninspected { sender, bytes, how: "lost" });
        self.session.gap(sender, time, bytes, out);
    }
}
