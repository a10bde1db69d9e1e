//! How far events were numbered and how far they are safe on a disk, in a file
//! that is mapped into memory: after a `kill -9` the next run knows how many
//! events of the last one went with it.

use super::{Body, Event, Identity, now, pb};
use memmap2::MmapMut;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: &[u8; 8] = b"MCPLDG01";
/// Of a name, with its length before it.
const NAME: usize = 160;
const PUBLISHED: usize = 8;
const SAFE: usize = 16;
const SENSOR: usize = 24;
const BOOT: usize = SENSOR + NAME;
const SIZE: usize = BOOT + NAME;

/// Events that the last run numbered and did not bring to a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsafe {
    pub identity: Identity,
    pub first_seq: u64,
    pub last_seq: u64,
}

impl Unsafe {
    /// The event that tells it, in that run's own stream.
    pub fn told(&self) -> Event {
        let loss = pb::Loss {
            r#where: "agent".to_owned(),
            reason: "killed".to_owned(),
            count: self.last_seq - self.first_seq + 1,
            first_seq: self.first_seq,
            last_seq: self.last_seq,
            ..Default::default()
        };
        Event {
            seq: self.last_seq,
            time_unix_ns: now(),
            sensor: self.identity.sensor.clone(),
            boot: self.identity.boot.clone(),
            body: Some(Body::Loss(loss)),
        }
    }
}

#[derive(Debug)]
pub struct Ledger {
    map: MmapMut,
}

impl Ledger {
    /// Begins a file for this run. What the last one left is read first; a file
    /// that is none counts as no last run.
    pub fn begin(path: &Path, identity: &Identity) -> io::Result<(Ledger, Option<Unsafe>)> {
        let left = fs::read(path).ok().and_then(|bytes| read(&bytes));
        let mut bytes = vec![0; SIZE];
        bytes[..MAGIC.len()].copy_from_slice(MAGIC);
        for (at, name) in [(SENSOR, &identity.sensor), (BOOT, &identity.boot)] {
            let name = &name.as_bytes()[..name.len().min(NAME - 1)];
            bytes[at] = name.len() as u8;
            bytes[at + 1..at + 1 + name.len()].copy_from_slice(name);
        }
        let new = path.with_extension("new");
        fs::write(&new, &bytes)?;
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(&new)?;
        fs::rename(&new, path)?;
        // SAFETY: nobody else maps or cuts a file that was just made, 0700 around it.
        let map = unsafe { MmapMut::map_mut(&file)? };
        Ok((Ledger { map }, left))
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        // SAFETY: within the map, aligned to 8 as the map is to a page, and only
        // ever used as an atomic.
        unsafe { &*self.map.as_ptr().add(at).cast::<AtomicU64>() }
    }

    /// An event got this number.
    pub fn published(&self, seq: u64) {
        self.word(PUBLISHED).store(seq, Ordering::Relaxed);
    }

    /// Every event up to this number is on a disk, or told as lost there.
    pub fn safe(&self, seq: u64) {
        self.word(SAFE).fetch_max(seq, Ordering::Relaxed);
    }
}

/// What a file says; `None`: nothing, or nothing is missing.
fn read(bytes: &[u8]) -> Option<Unsafe> {
    let bytes: &[u8; SIZE] = bytes.try_into().ok()?;
    if &bytes[..MAGIC.len()] != MAGIC {
        return None;
    }
    let word = |at: usize| bytes[at..at + 8].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
    let name = |at: usize| {
        let length = usize::from(bytes[at]);
        let name = bytes.get(at + 1..at + 1 + length.min(NAME - 1))?;
        String::from_utf8(name.to_vec()).ok().filter(|n| !n.is_empty())
    };
    let (published, safe) = (word(PUBLISHED), word(SAFE));
    let identity = Identity { sensor: name(SENSOR)?, boot: name(BOOT)? };
    (published > safe).then(|| Unsafe { identity, first_seq: safe + 1, last_seq: published })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn identity(boot: &str) -> Identity {
        Identity { sensor: "host".to_owned(), boot: boot.to_owned() }
    }

    #[test]
    fn what_went_with_a_run_is_known_to_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let (ledger, left) = Ledger::begin(&path, &identity("a")).unwrap();
        assert_eq!(left, None);
        (1..=9).for_each(|seq| ledger.published(seq));
        ledger.safe(5);
        ledger.safe(4);
        // Not dropped: as after a kill.
        std::mem::forget(ledger);
        let (ledger, left) = Ledger::begin(&path, &identity("b")).unwrap();
        let left = left.unwrap();
        assert_eq!((left.identity.boot.as_str(), left.first_seq, left.last_seq), ("a", 6, 9));
        let Some(Body::Loss(loss)) = left.told().body else { panic!("{left:?}") };
        assert_eq!((loss.count, loss.reason.as_str()), (4, "killed"));
        ledger.published(3);
        ledger.safe(3);
        drop(ledger);
        assert_eq!(Ledger::begin(&path, &identity("c")).unwrap().1, None, "nothing is missing");
    }

    #[test]
    fn a_file_that_is_none_is_no_last_run() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        for bytes in [&b""[..], b"x", &[0xff; SIZE], &[0; SIZE + 1]] {
            fs::write(&path, bytes).unwrap();
            assert_eq!(Ledger::begin(&path, &identity("a")).unwrap().1, None);
        }
    }

    proptest! {
        #[test]
        fn anything_may_be_read(mut bytes in prop::collection::vec(any::<u8>(), SIZE)) {
            let _ = read(&bytes);
            bytes[..8].copy_from_slice(MAGIC);
            if let Some(left) = read(&bytes) {
                prop_assert!(left.first_seq <= left.last_seq && left.first_seq > 0);
            }
        }
    }
}
