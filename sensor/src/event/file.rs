//! A file of lines that only its owner can read, that never holds half a line
//! after a failure, and that is rotated by size: `NAME`, `NAME.1`, `NAME.2`, …

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

#[derive(Clone, Copy, Debug)]
pub struct Rotation {
    /// A write that would make the file larger than this goes to a new one; 0:
    /// never.
    pub max_bytes: u64,
    /// Files kept beside the current one; the oldest is deleted.
    pub keep: u32,
}

#[derive(Debug)]
pub struct LineFile {
    path: PathBuf,
    file: File,
    bytes: u64,
    /// Of these, how many [`LineFile::commit`] made safe.
    committed: u64,
    rotation: Rotation,
}

/// Longest half line that a crash can have left; what is cut is at most this.
const TORN_MAX: u64 = 4 << 20;

impl LineFile {
    /// Opens or creates; a half line that a crash left at the end is cut off.
    pub fn open(path: &Path, rotation: Rotation) -> io::Result<LineFile> {
        let file = open(path)?;
        let bytes = cut_torn(&file)?;
        Ok(LineFile { path: path.to_owned(), file, bytes, committed: bytes, rotation })
    }

    /// Appends whole lines, all of them or none; to a new file if this one is
    /// full, or was moved away (logrotate).
    pub fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.was_moved() {
            self.commit()?;
            *self = LineFile::open(&self.path, self.rotation)?;
        }
        if self.is_full_for(lines.len()) {
            self.commit()?;
            self.rotate()?;
        }
        self.extend(lines)
    }

    fn was_moved(&self) -> bool {
        let inode = |meta: Metadata| (meta.dev(), meta.ino());
        let there = fs::symlink_metadata(&self.path).map(inode).ok();
        self.file.metadata().map(inode).is_ok_and(|own| there != Some(own))
    }

    /// Appends whole lines to this file, however large it gets.
    pub fn extend(&mut self, lines: &[u8]) -> io::Result<()> {
        if let Err(error) = self.file.write_all(lines) {
            // Not even part of a line stays: a reader parses line by line.
            self.file.set_len(self.bytes)?;
            return Err(error);
        }
        self.bytes += lines.len() as u64;
        Ok(())
    }

    /// Whether so many bytes more would go to a new file.
    pub fn is_full_for(&self, bytes: usize) -> bool {
        let max = self.rotation.max_bytes;
        max > 0 && self.bytes > 0 && self.bytes + bytes as u64 > max
    }

    /// What was appended survives a crash of the machine.
    pub fn commit(&mut self) -> io::Result<()> {
        self.file.sync_data()?;
        self.committed = self.bytes;
        Ok(())
    }

    /// Takes back what was appended since the last commit.
    pub fn roll_back(&mut self) -> io::Result<()> {
        self.file.set_len(self.committed)?;
        self.bytes = self.committed;
        Ok(())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn numbered(&self, n: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{n}"));
        name.into()
    }

    /// Starts a new file; commit first what must survive.
    pub fn rotate(&mut self) -> io::Result<()> {
        if self.rotation.keep == 0 {
            self.file.set_len(0)?;
            (self.bytes, self.committed) = (0, 0);
            return Ok(());
        }
        for n in (1..self.rotation.keep).rev() {
            match fs::rename(self.numbered(n), self.numbered(n + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => (),
            }
        }
        match fs::rename(&self.path, self.numbered(1)) {
            // A rotation that failed after this step is done again.
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => (),
        }
        self.file = open(&self.path)?;
        (self.bytes, self.committed) = (0, 0);
        let parent = self.path.parent().filter(|p| !p.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    }
}

fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .append(true)
        .read(true)
        .create(true)
        .mode(0o600)
        // Nobody gets the sensor to write elsewhere by a link, nor to hang on a FIFO.
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    if meta.uid() != nix::unistd::geteuid().as_raw() {
        let why = format!("belongs to uid {}: move it away, so that nobody else can read it", meta.uid());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    Ok(file)
}

/// The length after cutting what follows the last newline.
fn cut_torn(mut file: &File) -> io::Result<u64> {
    let length = file.metadata()?.len();
    let mut end = length;
    let mut block = vec![0; 64 << 10];
    while end > 0 {
        if length - end > TORN_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "its last line is no line of events"));
        }
        let start = end.saturating_sub(block.len() as u64);
        let part = &mut block[..(end - start) as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(part)?;
        if let Some(newline) = part.iter().rposition(|b| *b == b'\n') {
            end = start + newline as u64 + 1;
            break;
        }
        end = start;
    }
    if end != length {
        file.set_len(end)?;
    }
    Ok(end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const ONE: Rotation = Rotation { max_bytes: 10, keep: 2 };

    #[test]
    fn a_file_that_was_moved_away_is_followed_by_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("e");
        let mut file = LineFile::open(&path, Rotation { max_bytes: 0, keep: 4 }).unwrap();
        file.append(b"before\n").unwrap();
        fs::rename(&path, dir.path().join("moved")).unwrap();
        file.append(b"after\n").unwrap();
        assert_eq!(fs::read(dir.path().join("moved")).unwrap(), b"before\n");
        assert_eq!(fs::read(&path).unwrap(), b"after\n");
    }

    #[test]
    fn the_file_is_readable_by_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("e");
        LineFile::open(&path, ONE).unwrap().append(b"x\n").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn rotation_keeps_the_newest_and_deletes_the_oldest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("e");
        let mut file = LineFile::open(&path, ONE).unwrap();
        for line in [b"1111111\n", b"2222222\n", b"3333333\n", b"4444444\n"] {
            file.append(line).unwrap();
        }
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(
            (read("e"), read("e.1"), read("e.2")),
            ("4444444\n".into(), "3333333\n".into(), "2222222\n".into())
        );
        assert!(!dir.path().join("e.3").exists());
    }

    #[test]
    fn half_a_line_is_cut_when_the_file_is_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("e");
        fs::write(&path, "{\"seq\":1}\n{\"seq\":2").unwrap();
        let mut file = LineFile::open(&path, Rotation { max_bytes: 0, keep: 0 }).unwrap();
        file.append(b"{\"seq\":2}\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"seq\":1}\n{\"seq\":2}\n");
        fs::write(&path, vec![b'x'; 70_000]).unwrap();
        LineFile::open(&path, ONE).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    }

    #[test]
    fn links_and_pipes_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/dev/null", &link).unwrap();
        assert_eq!(LineFile::open(&link, ONE).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        assert_eq!(
            LineFile::open(Path::new("/dev/null"), ONE).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }
}
