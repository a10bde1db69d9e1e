//! A panic anywhere ends the process, so that nothing goes on half alive: a
//! sensor whose rings are not read, a collector whose log takes nothing. What is
//! enforced stays in force, and whoever started the process starts it again.

use crate::cli::Exit;
use std::backtrace::Backtrace;
use std::io::Write as _;
use std::panic;
use std::thread;

/// From here on, for every thread and task.
pub fn end_the_process() {
    panic::set_hook(Box::new(|info| {
        let thread = thread::current();
        let report = format!(
            "mcp-sensor {}: a defect ended it: {info}\nthread `{}`\n{}",
            env!("CARGO_PKG_VERSION"),
            thread.name().unwrap_or("unnamed"),
            Backtrace::force_capture(),
        );
        let _ = writeln!(std::io::stderr().lock(), "{report}");
        // SAFETY: no destructors are to run: they may wait for the thread that
        // just ended.
        unsafe { libc::_exit(Exit::Panic as i32) }
    }));
}
