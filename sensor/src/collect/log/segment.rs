//! One file of the log, and where in it to look for a number or a time.

use super::record::{HEADER, Head, Header, Item, Items};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Bytes of records that one entry of the index stands for; what a reader takes
/// from the disk at a time.
const BLOCK: u64 = 256 << 10;
/// More than a segment's limit and one record: what is longer is none.
const MAX_FILE: u64 = 64 << 20;

/// Records that lie together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Block {
    pub at: u64,
    /// Number of its first event.
    pub offset: u64,
    pub oldest: i64,
    pub newest: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Segment {
    /// Number of its first event, and of the one after its last.
    pub base: u64,
    pub end: u64,
    pub bytes: u64,
    /// When its first and its last record were stored; UTC, milliseconds.
    pub first_unix_ms: u64,
    pub last_unix_ms: u64,
    pub blocks: Vec<Block>,
}

pub(super) fn path(dir: &Path, base: u64) -> PathBuf {
    dir.join(format!("{base:020}.log"))
}

fn index_path(dir: &Path, base: u64) -> PathBuf {
    dir.join(format!("{base:020}.idx"))
}

pub(super) fn base(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".log")?;
    (digits.len() == 20 && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok()).flatten()
}

/// What a scan found beside whole records.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Damage {
    /// Bytes before the last whole record.
    pub inside: u64,
    /// Bytes after it.
    pub tail: u64,
}

impl Segment {
    pub(super) fn new(base: u64) -> Segment {
        Segment {
            base,
            end: base,
            bytes: HEADER as u64,
            first_unix_ms: 0,
            last_unix_ms: 0,
            blocks: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// A record of `length` bytes stands at `at`.
    pub(super) fn add(&mut self, head: &Head, at: u64, length: u64) {
        match self.blocks.last_mut() {
            Some(block) if at - block.at < BLOCK => {
                block.oldest = block.oldest.min(head.oldest);
                block.newest = block.newest.max(head.newest);
            }
            _ => {
                let (offset, oldest, newest) = (head.offset, head.oldest, head.newest);
                self.blocks.push(Block { at, offset, oldest, newest });
            }
        }
        if self.first_unix_ms == 0 {
            self.first_unix_ms = head.stored_unix_ms;
        }
        self.last_unix_ms = head.stored_unix_ms;
        self.end = head.end();
        self.bytes = at + length;
    }

    /// Where block `n` ends: position, and number of the next event.
    pub(super) fn end_of(&self, n: usize) -> (u64, u64) {
        self.blocks.get(n + 1).map_or((self.bytes, self.end), |next| (next.at, next.offset))
    }

    /// A new file with nothing but its header, safe on the disk.
    pub(super) fn create(dir: &Path, header: Header) -> io::Result<File> {
        let path = path(dir, header.base);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)?;
        let written = file.write_all(&header.to_bytes()).and_then(|()| file.sync_all());
        if let Err(error) = written.and_then(|()| File::open(dir)?.sync_all()) {
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        Ok(file)
    }

    /// Reads the whole file. Records that do not go on from those before them
    /// are damage too. `None`: it is no segment of this base.
    pub(super) fn scan(dir: &Path, base: u64) -> io::Result<Option<(Segment, Header, Damage)>> {
        let path = path(dir, base);
        if fs::metadata(&path)?.len() > MAX_FILE {
            return Ok(None);
        }
        let bytes = fs::read(&path)?;
        let Some(header) = Header::read(&bytes).filter(|h| h.base == base) else { return Ok(None) };
        let mut segment = Segment::new(base);
        let (mut at, mut skipped) = (HEADER as u64, 0);
        let mut damage = Damage::default();
        for item in Items::new(&bytes, HEADER) {
            match item {
                Item::Record(record, end) if record.head.offset >= segment.end => {
                    damage.inside += skipped;
                    skipped = 0;
                    segment.add(&record.head, at, end as u64 - at);
                    at = end as u64;
                }
                Item::Record(_, end) => {
                    skipped += end as u64 - at;
                    at = end as u64;
                }
                Item::Damage(length) => {
                    skipped += length as u64;
                    at += length as u64;
                }
            }
        }
        damage.tail = skipped;
        Ok(Some((segment, header, damage)))
    }

    /// Beside the segment, so that no start has to read all of it.
    pub(super) fn save_index(&self, dir: &Path) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(self)?;
        let sum = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(format!("\n{sum:08x}\n").as_bytes());
        super::state::replace(dir, &index_path(dir, self.base), &bytes)
    }

    /// `None`: it is not there, or not of the file as it is.
    pub(super) fn load_index(dir: &Path, base: u64) -> Option<Segment> {
        let bytes = fs::read(index_path(dir, base)).ok()?;
        let (body, sum) = bytes.split_at_checked(bytes.len().checked_sub(10)?)?;
        if sum != format!("\n{:08x}\n", crc32c::crc32c(body)).as_bytes() {
            return None;
        }
        let segment: Segment = serde_json::from_slice(body).ok()?;
        let length = fs::metadata(path(dir, base)).ok()?.len();
        (segment.base == base && segment.bytes == length && segment.end >= base).then_some(segment)
    }

    pub(super) fn remove(dir: &Path, base: u64) -> io::Result<()> {
        if let Err(error) = fs::remove_file(index_path(dir, base))
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
        fs::remove_file(path(dir, base))
    }
}
