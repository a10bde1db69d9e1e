//! The thread that empties the rings: verdicts first, telemetry in turns.

use super::core::Core;
use crate::event::now;
use crate::kernel::record;
use aya::maps::{MapData, RingBuf};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Telemetry records between two looks at the verdicts.
const TURN: usize = 256;

/// Longest wait of telemetry, milliseconds.
const ROUND_MS: u8 = 10;

/// What this thread reads.
pub struct Rings {
    pub verdicts: RingBuf<MapData>,
    pub telemetry: RingBuf<MapData>,
}

/// Reads until `stop`, then what is left.
pub fn run(core: &Arc<Core>, mut rings: Rings, stop: &AtomicBool) {
    loop {
        let stopping = stop.load(Ordering::Acquire);
        let turn = boottime();
        core.turned.store(turn, Ordering::Relaxed);
        let offset = now() - turn;
        let mut more = drain(core, &mut rings.verdicts, offset, usize::MAX) > 0;
        more |= drain(core, &mut rings.telemetry, offset, TURN) > 0;
        if more {
            continue;
        }
        if stopping {
            return;
        }
        wait(&rings);
    }
}

fn wait(rings: &Rings) {
    // SAFETY: the rings outlive the call.
    let (verdicts, telemetry) = unsafe {
        (
            BorrowedFd::borrow_raw(rings.verdicts.as_raw_fd()),
            BorrowedFd::borrow_raw(rings.telemetry.as_raw_fd()),
        )
    };
    let mut fds = [PollFd::new(verdicts, PollFlags::POLLIN), PollFd::new(telemetry, PollFlags::POLLIN)];
    // Verdicts wake this thread, telemetry does not (see `record::emit` in the
    // kernel programs): the time-out bounds how late it is read. An error is the
    // same as a time-out.
    let _ = poll(&mut fds, PollTimeout::from(ROUND_MS));
}

fn drain(core: &Arc<Core>, ring: &mut RingBuf<MapData>, offset: i64, limit: usize) -> usize {
    let mut count = 0;
    while count < limit {
        let Some(item) = ring.next() else { break };
        let parsed = record::parse(&item);
        drop(item); // gives the space back before the record is worked on
        match parsed {
            Ok(record) => {
                let time = offset + i64::try_from(record.header().boottime).unwrap_or(0);
                core.record(time, &record);
            }
            Err(error) => {
                tracing::error!(%error, "a record of the kernel's cannot be read");
                core.lose("kernel", "unreadable_record", 1);
            }
        }
        count += 1;
    }
    count
}

/// CLOCK_BOOTTIME, nanoseconds.
pub(super) fn boottime() -> i64 {
    use nix::time::{ClockId, clock_gettime};
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map_or(0, |t| t.tv_sec().saturating_mul(1_000_000_000).saturating_add(t.tv_nsec()))
}
