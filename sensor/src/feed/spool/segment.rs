//! One file of the spool.

use super::record::{HEAD, Item, MAX_HEADER, Meta, Owner, Reader, header, read_header, record};
use super::thin::{self, Gone};
use crate::feed::MAX_BATCH_BYTES;
use crate::feed::batch::Sealed;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// More than a segment's limit and one batch: what is longer is none.
const MAX_FILE: u64 = 64 << 20;

pub(super) struct Segment {
    pub number: u64,
    pub owner: Arc<Owner>,
    /// 0: no batch yet.
    pub first_seq: u64,
    pub last_seq: u64,
    pub batches: u64,
    pub bytes: u64,
    /// Where the first record begins.
    pub start: u64,
    /// Telemetry was given up.
    pub thinned: bool,
    /// Of the first batch.
    pub sealed_unix_ms: u64,
    told: bool,
}

/// A segment that was mended; `None`: nothing of it is left.
pub(super) struct Damaged {
    pub segment: Option<Segment>,
    pub lost: u64,
    /// Not even whose it is could be read.
    pub unreadable: bool,
    pub why: String,
}

pub(super) fn name(number: u64) -> String {
    format!("{number:016}.seg")
}

pub(super) fn number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".seg")?;
    (digits.len() == 16 && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok()).flatten()
}

pub(super) fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(name(number))
}

pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn reopen(dir: &Path, number: u64) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path(dir, number))
}

/// The batch whose record begins at `at`, and where it ends; `None`: there is
/// no whole record.
pub(super) fn read_at(file: &File, at: u64) -> io::Result<Option<(Sealed, u64)>> {
    let mut head = [0; HEAD];
    if let Err(error) = file.read_exact_at(&mut head, at) {
        return if error.kind() == io::ErrorKind::UnexpectedEof { Ok(None) } else { Err(error) };
    }
    let length = u32::from_le_bytes([head[8], head[9], head[10], head[11]]) as usize;
    if length > MAX_BATCH_BYTES + 1024 {
        return Ok(None);
    }
    let mut bytes = vec![0; HEAD + length];
    match file.read_exact_at(&mut bytes, at) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    Ok(match Reader::new(&bytes, 0).next() {
        Some(Item::Batch(batch, end)) => Some((batch, at + end as u64)),
        _ => None,
    })
}

/// Whose a segment is, and the first number that it accounts for; `None`: its
/// beginning cannot be read.
fn beginning(dir: &Path, number: u64) -> Option<(Owner, u64)> {
    let file = File::open(path(dir, number)).ok()?;
    let mut head = Vec::new();
    (&file).take(MAX_HEADER as u64).read_to_end(&mut head).ok()?;
    let (owner, start) = read_header(&head).ok()?;
    let (batch, _) = read_at(&file, start as u64).ok()??;
    Some((owner, thin::first_of(&batch)?))
}

/// Reads a segment that an earlier run left. `before`: the one before it;
/// `after`: the number of the one after it.
pub(super) fn open(
    dir: &Path,
    number: u64,
    before: Option<&Segment>,
    after: Option<u64>,
) -> io::Result<Result<Segment, Damaged>> {
    let path = path(dir, number);
    let length = std::fs::metadata(&path)?.len();
    let gone = |why: String| Damaged { segment: None, lost: 0, unreadable: true, why };
    if length > MAX_FILE {
        set_aside(&path)?;
        return Ok(Err(gone(format!("{length} bytes are no segment"))));
    }
    let bytes = std::fs::read(&path)?;
    let (owner, start) = match read_header(&bytes) {
        Ok(found) => found,
        Err(error) => {
            set_aside(&path)?;
            return Ok(Err(gone(error.to_string())));
        }
    };
    let mut segment = Segment::new(number, Arc::new(owner), start as u64);
    let mut reader = Reader::new(&bytes, start);
    let (mut damage, mut at_end) = (0, false);
    while let Some((item, meta)) = reader.next_with_meta() {
        at_end = matches!(item, Item::Damage(_));
        match item {
            Item::Batch(batch, end) => segment.add(&batch, meta, end as u64),
            Item::Damage(skipped) => damage += skipped,
        }
    }
    let expected = before.filter(|b| b.owner == segment.owner).map_or(0, |b| b.last_seq);
    if damage == 0 {
        if segment.batches == 0 {
            std::fs::remove_file(&path)?;
            return Ok(Err(Damaged { segment: None, lost: 0, unreadable: false, why: "empty".to_owned() }));
        }
        return Ok(Ok(segment));
    }
    let next = after.filter(|_| at_end).and_then(|after| beginning(dir, after));
    let until = next.filter(|(owner, _)| *owner == *segment.owner).map_or(0, |(_, first)| first - 1);
    let lost = segment.rewrite_damaged(dir, &bytes, start, (expected, until))?;
    Ok(Err(Damaged {
        segment: Some(segment),
        lost,
        unreadable: false,
        why: format!("{damage} bytes are damaged"),
    }))
}

/// A file that is no segment is not ours to remove.
fn set_aside(path: &Path) -> io::Result<()> {
    std::fs::rename(path, path.with_extension("bad"))
}

impl Segment {
    fn new(number: u64, owner: Arc<Owner>, start: u64) -> Segment {
        Segment {
            number,
            owner,
            first_seq: 0,
            last_seq: 0,
            batches: 0,
            bytes: start,
            start,
            thinned: false,
            sealed_unix_ms: 0,
            told: false,
        }
    }

    pub(super) fn create(dir: &Path, number: u64, owner: Arc<Owner>) -> io::Result<(Segment, File)> {
        let head = header(&owner);
        let path = path(dir, number);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        if let Err(error) = file.write_all(&head) {
            let _ = std::fs::remove_file(&path);
            return Err(error);
        }
        Ok((Segment::new(number, owner, head.len() as u64), file))
    }

    fn add(&mut self, batch: &Sealed, meta: Meta, end: u64) {
        if self.batches == 0 {
            self.sealed_unix_ms = meta.sealed_unix_ms;
            self.thinned = meta.thinned;
            self.first_seq = batch.first_seq;
        }
        self.batches += 1;
        self.last_seq = self.last_seq.max(batch.last_seq);
        self.bytes = end;
        self.told = false;
    }

    /// All of the record, or nothing of it.
    pub(super) fn append(&mut self, file: &File, batch: &Sealed, bytes: &[u8]) -> io::Result<()> {
        if let Err(error) = file.write_all_at(bytes, self.bytes) {
            let _ = file.set_len(self.bytes);
            return Err(error);
        }
        let end = self.bytes + bytes.len() as u64;
        self.add(batch, Meta { sealed_unix_ms: now_ms(), thinned: false }, end);
        Ok(())
    }

    /// Only a loss is left of it.
    pub(super) fn is_told(&self) -> bool {
        self.told
    }

    /// Puts other batches in the place of these. A crash leaves one or the other.
    fn replace(&mut self, dir: &Path, batches: &[Sealed], meta: Meta) -> io::Result<()> {
        self.replace_after(dir, header(&self.owner), batches, meta)
    }

    fn replace_after(
        &mut self,
        dir: &Path,
        mut bytes: Vec<u8>,
        batches: &[Sealed],
        meta: Meta,
    ) -> io::Result<()> {
        let path = path(dir, self.number);
        let new = path.with_extension("new");
        for batch in batches {
            bytes.extend(record(batch, meta));
        }
        let written = (|| {
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&bytes)?;
            file.sync_data()
        })();
        if let Err(error) = written.and_then(|()| std::fs::rename(&new, &path)) {
            let _ = std::fs::remove_file(&new);
            return Err(error);
        }
        self.bytes = bytes.len() as u64;
        self.batches = batches.len() as u64;
        self.last_seq = batches.iter().map(|b| b.last_seq).max().unwrap_or(self.last_seq);
        self.thinned = meta.thinned;
        Ok(())
    }

    /// All of its batches; what is damaged is mended first.
    fn batches(&mut self, dir: &Path) -> io::Result<Vec<Sealed>> {
        let mut mended = false;
        loop {
            let bytes = std::fs::read(path(dir, self.number))?;
            let mut whole = true;
            let batches = Reader::new(&bytes, self.start as usize).filter_map(|item| match item {
                Item::Batch(batch, _) => Some(batch),
                Item::Damage(_) => {
                    whole = false;
                    None
                }
            });
            let batches: Vec<Sealed> = batches.collect();
            let cut = batches.last().is_none_or(|b| b.last_seq < self.last_seq);
            if (whole && !cut) || mended {
                return Ok(batches);
            }
            self.mend(dir, self.start, self.first_seq.saturating_sub(1))?;
            mended = true;
        }
    }

    fn thinned(&self) -> Meta {
        Meta { sealed_unix_ms: self.sealed_unix_ms, thinned: true }
    }

    /// Gives up its telemetry; how many events went.
    pub(super) fn thin(&mut self, dir: &Path) -> io::Result<u64> {
        let (mut kept, mut gone) = (Vec::new(), 0);
        for batch in self.batches(dir)? {
            let (rest, lost) = thin::without_telemetry(&batch);
            kept.extend(rest);
            gone += lost.count;
        }
        self.replace(dir, &kept, self.thinned())?;
        Ok(gone)
    }

    /// Gives up all of it but the count, and takes over that of the segment
    /// `told`, which is removed. How many events went.
    pub(super) fn give_up(&mut self, dir: &Path, told: Option<u64>) -> io::Result<u64> {
        let mut sum = Gone::default();
        let mut new = 0;
        if let Some(told) = told {
            let bytes = std::fs::read(path(dir, told))?;
            for item in Reader::new(&bytes, self.start as usize) {
                let Item::Batch(batch, _) = item else { continue };
                sum.join(&thin::all_of(&batch));
            }
        }
        for batch in self.batches(dir)? {
            let gone = thin::all_of(&batch);
            new += batch.events as u64;
            sum.join(&gone);
        }
        let told_now = thin::seal([sum.told("evicted")]);
        self.replace(dir, &told_now, self.thinned())?;
        self.told = true;
        if let Some(told) = told {
            std::fs::remove_file(path(dir, told))?;
        }
        Ok(new)
    }

    /// Rewrites what cannot be read from `at` on; how many events are gone.
    /// `before`: the last number that could be read.
    pub(super) fn mend(&mut self, dir: &Path, at: u64, before: u64) -> io::Result<u64> {
        let bytes = std::fs::read(path(dir, self.number))?;
        let at = usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
        let last = self.last_seq;
        self.rewrite_damaged(dir, &bytes, at, (before, last))
    }

    /// From `start` on whole batches stay; between them stands how many events
    /// are gone, by their numbers. `known`: the last number before, and the last
    /// of the segment; 0 if that is not known.
    fn rewrite_damaged(
        &mut self,
        dir: &Path,
        bytes: &[u8],
        start: usize,
        known: (u64, u64),
    ) -> io::Result<u64> {
        let (before, until) = known;
        let (mut kept, mut lost, mut last, mut damaged) = (Vec::new(), 0, before, false);
        let mut reader = Reader::new(bytes, start);
        let mut meta = Meta { sealed_unix_ms: self.sealed_unix_ms, thinned: self.thinned };
        while let Some((item, of)) = reader.next_with_meta() {
            match item {
                Item::Damage(_) => damaged = true,
                Item::Batch(batch, _) => {
                    if damaged && last > 0 && batch.first_seq > last + 1 {
                        let mut gone = Gone { count: batch.first_seq - last - 1, ..Gone::default() };
                        gone.reach(last + 1, batch.first_seq - 1);
                        lost += gone.count;
                        kept.extend(thin::seal([gone.told("damaged")]));
                    } else if damaged && last == 0 && batch.first_seq > 1 {
                        // How many before it were sent long ago, nobody knows.
                        let mut gone = Gone::default();
                        gone.reach(batch.first_seq - 1, batch.first_seq - 1);
                        kept.extend(thin::seal([gone.told("damaged")]));
                    }
                    damaged = false;
                    last = batch.last_seq;
                    meta = Meta { sealed_unix_ms: meta.sealed_unix_ms.max(of.sealed_unix_ms), ..of };
                    kept.push(batch);
                }
            }
        }
        if damaged || last < until {
            // Of a file cut short by a crash nobody knows how many were there.
            let mut gone = Gone { count: until.saturating_sub(last), ..Gone::default() };
            gone.reach(last + 1, until.max(last + 1));
            lost += gone.count;
            kept.extend(thin::seal([gone.told("damaged")]));
        }
        self.replace_after(dir, bytes[..start].to_vec(), &kept, meta)?;
        Ok(lost)
    }
}
