//! One operation of io_uring at a time.

use io_uring::{IoUring, squeue};
use std::io;

pub(crate) struct Ring(IoUring);

impl Ring {
    pub(crate) fn new() -> io::Result<Ring> {
        IoUring::new(4).map(Ring)
    }

    /// Submits and waits.
    ///
    /// # Safety
    /// What the entry points to is valid until this returns.
    pub(crate) unsafe fn run(&mut self, entry: &squeue::Entry) -> io::Result<usize> {
        // SAFETY: the caller's promise.
        unsafe { self.0.submission().push(entry) }.map_err(io::Error::other)?;
        self.0.submit_and_wait(1)?;
        let result = self.0.completion().next().map_or(-libc::EIO, |c| c.result());
        if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result as usize) }
    }
}
