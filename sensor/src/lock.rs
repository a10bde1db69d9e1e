//! Files that one process at a time holds.

use nix::Error;
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::time::{Duration, Instant};

/// A process that was killed holds its files until its last thread is gone.
const PATIENCE: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_millis(20);

/// Until the lock is dropped. `EWOULDBLOCK`: somebody holds it, and still does
/// after a while.
pub(crate) fn exclusively(mut file: File) -> Result<Flock<File>, Error> {
    let end = Instant::now() + PATIENCE;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((unlocked, Error::EWOULDBLOCK)) if Instant::now() < end => file = unlocked,
            Err((_, errno)) => return Err(errno),
        }
        std::thread::sleep(AGAIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_is_on_its_way_out_is_waited_for_and_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let file = || File::create(dir.path().join("lock")).unwrap();
        let held = exclusively(file()).unwrap();
        let leaving = std::thread::spawn(move || {
            std::thread::sleep(PATIENCE / 10);
            drop(held);
        });
        let held = exclusively(file()).unwrap();
        leaving.join().unwrap();
        let from = Instant::now();
        assert_eq!(exclusively(file()).unwrap_err(), Error::EWOULDBLOCK);
        assert!(from.elapsed() >= PATIENCE);
        drop(held);
    }
}
