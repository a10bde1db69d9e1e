//! Verifying files: the content of an executable is compared with the hashes of
//! the policy, and what the kernel knows of its inode is written where the
//! kernel looks at exec. Files are read on threads of their own, with a limit
//! and a deadline: a FIFO or a file system that hangs stalls nothing.

use super::core::{Core, lock};
use super::instances::instance_id;
use super::process;
use crate::event::{Body, pb};
use crate::kernel::{Identifier, tables};
use crate::policy::compile::{Compiled, FileHashes};
use nix::sys::statfs::{FsType, fstatfs};
use sensor_common::identity::FileId;
use sensor_common::label::Label;
use sha2::{Digest as _, Sha256};
use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Largest file that is hashed.
const MAX_FILE: u64 = 512 << 20;
/// For one file.
const DEADLINE: Duration = Duration::from_secs(20);
/// How long a policy waits for its files before it is put in force.
const SURVEY: Duration = Duration::from_millis(500);
/// Files whose hash is kept; the oldest goes first.
const MAX_KNOWN: usize = 1024;
const MAX_REPORTED: usize = 1024;
/// Execs that wait to be looked at.
const QUEUE: usize = 256;

pub type Hash = [u8; 32];

/// Why a file cannot be verified.
#[derive(Debug, thiserror::Error)]
enum Unverifiable {
    #[error("{0}")]
    Open(io::Error),
    #[error("it cannot be read: {0}")]
    Read(io::Error),
    #[error("it is no regular file")]
    NotRegular,
    #[error("it has {0} bytes; at most {MAX_FILE} are hashed")]
    TooLarge(u64),
    #[error("it is on a file system (type {0:#x}) that does not tell every change of a file")]
    FileSystem(i64),
    #[error(
        "its file system does not tell every change of a file, and others than root can write it: give it to \
         root, mode 0755"
    )]
    Writable,
    #[error("somebody has it open for writing")]
    OpenForWriting,
    #[error("it changed while it was read")]
    Changed,
    #[error("it was not read within {DEADLINE:?}")]
    Deadline,
    #[error("the kernel does not tell what the file is: {0}")]
    Identify(String),
}

impl Unverifiable {
    /// No such file on this host: no server either.
    fn is_absent(&self) -> bool {
        matches!(self, Unverifiable::Open(e) if e.kind() == io::ErrorKind::NotFound)
    }
}

/// Hashes of files, by what the kernel knows of them.
#[derive(Default)]
struct Known {
    hashes: HashMap<FileId, Hash>,
    order: VecDeque<FileId>,
    /// Findings that were made before any instance ran the file.
    reported: HashSet<(u16, FileId)>,
}

impl Known {
    /// Returns the file that had to go.
    fn insert(&mut self, file: FileId, hash: Hash) -> Option<FileId> {
        if self.hashes.insert(file, hash).is_none() {
            self.order.push_back(file);
        }
        if self.order.len() <= MAX_KNOWN {
            return None;
        }
        let oldest = self.order.pop_front()?;
        self.hashes.remove(&oldest);
        Some(oldest)
    }

    /// True: for the first time.
    fn report(&mut self, server: u16, file: FileId) -> bool {
        if self.reported.len() >= MAX_REPORTED {
            self.reported.clear();
        }
        self.reported.insert((server, file))
    }
}

struct Files {
    identifier: Result<Identifier, String>,
    known: Mutex<Known>,
}

impl Files {
    fn identify(&self, file: &File) -> Result<FileId, Unverifiable> {
        let identifier = self.identifier.as_ref().map_err(|e| Unverifiable::Identify(e.clone()))?;
        identifier.of(file.as_fd()).map_err(|e| Unverifiable::Identify(e.to_string()))
    }

    /// A file and its hash; neither changed in between, and no change after
    /// that leaves the [`FileId`] as it is.
    fn examine(&self, path: &Path, deadline: Instant) -> Result<(FileId, Hash), Unverifiable> {
        let mut file = open(path)?;
        let id = self.identify(&file)?;
        if let Some(hash) = lock(&self.known).hashes.get(&id) {
            return Ok((id, *hash));
        }
        trusted(&file)?;
        let id = self.identify(&file)?;
        wait_until_past(&id);
        let before = file.metadata().map_err(Unverifiable::Read)?;
        let hash = hash(&mut file, deadline)?;
        let after = file.metadata().map_err(Unverifiable::Read)?;
        let same = |m: &std::fs::Metadata| (m.dev(), m.ino(), m.size(), m.ctime(), m.ctime_nsec());
        if same(&before) != same(&after) || self.identify(&file)? != id {
            return Err(Unverifiable::Changed);
        }
        Ok((id, hash))
    }
}

fn open(path: &Path) -> Result<File, Unverifiable> {
    // Opening a FIFO would wait for a writer.
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    options.open(path).map_err(Unverifiable::Open)
}

/// What a file system's change times are worth.
#[derive(Debug, PartialEq, Eq)]
enum Times {
    /// Every write moves them, also one through a mapping.
    Exact,
    /// Writes through a mapping may go unseen.
    Mapped,
    /// Another program, or another host, says what they are.
    Foreign,
}

fn times(kind: FsType) -> Times {
    // linux/magic.h, and zfs, which is not in it.
    const EXT4: i64 = 0xef53;
    const XFS: i64 = 0x5846_5342;
    const BTRFS: i64 = 0x9123_683e;
    const F2FS: i64 = 0xf2f5_2010;
    const SQUASHFS: i64 = 0x7371_7368;
    const EROFS: i64 = 0xe0f5_e1e2;
    const TMPFS: i64 = 0x0102_1994;
    const RAMFS: i64 = 0x8584_58f6;
    const OVERLAYFS: i64 = 0x794c_7630;
    const ZFS: i64 = 0x2fc1_2fc1;
    match kind.0 {
        EXT4 | XFS | BTRFS | F2FS | SQUASHFS | EROFS => Times::Exact,
        TMPFS | RAMFS | OVERLAYFS | ZFS => Times::Mapped,
        _ => Times::Foreign,
    }
}

/// A later change of the content will show in the file's [`FileId`].
fn trusted(file: &File) -> Result<(), Unverifiable> {
    const OTHERS_WRITE: u32 = 0o022;
    let meta = file.metadata().map_err(Unverifiable::Read)?;
    if !meta.is_file() {
        return Err(Unverifiable::NotRegular);
    }
    if meta.len() > MAX_FILE {
        return Err(Unverifiable::TooLarge(meta.len()));
    }
    let kind = fstatfs(file).map_err(|e| Unverifiable::Read(e.into()))?.filesystem_type();
    match times(kind) {
        Times::Exact => {}
        Times::Mapped if meta.uid() == 0 && meta.mode() & OTHERS_WRITE == 0 => {}
        Times::Mapped => return Err(Unverifiable::Writable),
        Times::Foreign => return Err(Unverifiable::FileSystem(kind.0)),
    }
    no_writer(file)
}

/// A page that is mapped for writing and was written once is written again
/// without a new change time. The kernel grants a read lease only where nobody
/// has the file open for writing, a mapping included (fs/locks.c,
/// `check_conflicting_open`).
fn no_writer(file: &File) -> Result<(), Unverifiable> {
    // SAFETY: no memory is passed.
    let lease = |kind: i32| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) };
    if lease(libc::F_RDLCK) == 0 {
        lease(libc::F_UNLCK);
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Err(Unverifiable::OpenForWriting),
        _ => Err(Unverifiable::Read(error)),
    }
}

/// Change times move in ticks of at most 10 ms: two changes within one look
/// like one.
fn wait_until_past(file: &FileId) {
    const TICKS: Duration = Duration::from_millis(25);
    let changed = UNIX_EPOCH
        + Duration::new(u64::try_from(file.ctime_sec).unwrap_or(0), file.ctime_nsec.min(999_999_999));
    // In the future: a clock that was set back, which no change repeats.
    if let Ok(age) = SystemTime::now().duration_since(changed)
        && age < TICKS
    {
        std::thread::sleep(TICKS - age);
    }
}

fn hash(file: &mut File, deadline: Instant) -> Result<Hash, Unverifiable> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 128 << 10];
    let mut total = 0;
    loop {
        let n = file.read(&mut buffer).map_err(Unverifiable::Read)?;
        if n == 0 {
            return Ok(hash.finalize().into());
        }
        total += n as u64;
        if total > MAX_FILE {
            return Err(Unverifiable::TooLarge(total));
        }
        if Instant::now() > deadline {
            return Err(Unverifiable::Deadline);
        }
        hash.update(&buffer[..n]);
    }
}

/// An instance whose file is to be looked at.
struct Unverified {
    label: Label,
    pid: u32,
    exe: String,
}

enum Job {
    /// The files of a policy that is about to be in force.
    Survey(Vec<FileHashes>, SyncSender<()>),
    Exec(Unverified),
}

/// The part that everybody may ask.
pub struct Identities {
    files: Arc<Files>,
    jobs: SyncSender<Job>,
}

/// The part that works.
pub struct Jobs(Receiver<Job>);

impl Identities {
    pub fn new(identifier: Result<Identifier, String>) -> (Identities, Jobs) {
        let (jobs, queue) = sync_channel(QUEUE);
        let files = Arc::new(Files { identifier, known: Mutex::default() });
        (Identities { files, jobs }, Jobs(queue))
    }

    /// Hashes the files that a policy names, as far as time allows; what is not
    /// done then is done later.
    pub fn survey(&self, compiled: &Compiled) {
        if compiled.hashes.is_empty() {
            return;
        }
        let (done, ready) = sync_channel(1);
        if self.jobs.try_send(Job::Survey(compiled.hashes.clone(), done)).is_ok() {
            let _ = ready.recv_timeout(SURVEY);
        }
    }

    /// The files that hold what the policy says, and for which server.
    pub fn verified(&self, compiled: &Compiled) -> Vec<(FileId, u16)> {
        let known = lock(&self.files.known);
        let servers = |(file, hash): (&FileId, &Hash)| {
            servers_of(compiled, hash).into_iter().map(|server| (*file, server)).collect::<Vec<_>>()
        };
        known.hashes.iter().flat_map(servers).collect()
    }

    /// The executable of a process, as the kernel knows it. `None`: it cannot
    /// be told, and counts as not verified.
    pub fn of_process(&self, pid: u32) -> Option<FileId> {
        const PATIENCE: Duration = Duration::from_millis(100);
        let files = self.files.clone();
        let look = move || files.identify(&open(&proc_exe(pid))?);
        process::within(PATIENCE, look)?.ok()
    }

    /// An instance runs a file that nobody has verified. False: too many wait.
    pub fn look_at(&self, label: Label, pid: u32, exe: &str) -> bool {
        self.jobs.try_send(Job::Exec(Unverified { label, pid, exe: exe.to_owned() })).is_ok()
    }
}

fn proc_exe(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/exe"))
}

fn servers_of(compiled: &Compiled, hash: &Hash) -> HashSet<u16> {
    compiled.hashes.iter().filter(|file| file.sha256.contains(hash)).map(|file| file.server).collect()
}

/// Starts the thread that hashes.
pub fn start(core: Arc<Core>, jobs: Jobs) -> io::Result<()> {
    // Sent where somebody opens a file in the moment of our lease; its default
    // is death.
    // SAFETY: the disposition is changed before anything can send it.
    unsafe { nix::sys::signal::signal(nix::sys::signal::SIGIO, nix::sys::signal::SigHandler::SigIgn)? };
    std::thread::Builder::new().name("identity".to_owned()).spawn(move || {
        for job in jobs.0 {
            match job {
                Job::Survey(files, done) => {
                    for file in &files {
                        survey(&core, &files, file);
                    }
                    let _ = done.try_send(());
                }
                Job::Exec(unverified) => {
                    let started = Instant::now();
                    look(&core, &unverified);
                    // Whoever changes a file again and again gets half a CPU at most.
                    std::thread::sleep(started.elapsed());
                }
            }
        }
    })?;
    Ok(())
}

/// Examines a file and lets the kernel know it, if some rule names its hash.
fn examine(core: &Core, path: &Path) -> Result<(FileId, Hash), Unverifiable> {
    let (files, path) = (core.identities.files.clone(), path.to_owned());
    let deadline = Instant::now() + DEADLINE;
    let found = process::within(DEADLINE, move || files.examine(&path, deadline));
    let (file, hash) = found.unwrap_or(Err(Unverifiable::Deadline))?;
    let evicted = lock(&core.identities.files.known).insert(file, hash);
    core.admit(file, |compiled| servers_of(compiled, &hash), evicted);
    Ok((file, hash))
}

fn survey(core: &Core, all: &[FileHashes], rule: &FileHashes) {
    match examine(core, Path::new(&rule.exe)) {
        Ok((file, hash)) => {
            let expected = expected(all, rule.server);
            if !expected.contains(&hash) && lock(&core.identities.files.known).report(rule.server, file) {
                let text = mismatch(&rule.exe, &hash, &expected);
                finding(core, "hash_mismatch", &rule.name, None, text);
            }
        }
        Err(error) if error.is_absent() => {
            tracing::debug!(exe = rule.exe, "a file that the policy names a hash of is not there");
        }
        Err(error) => {
            let text = format!("`{}` cannot be verified ({}): {error}", rule.exe, rule.path);
            finding(core, "unverifiable", &rule.name, None, text);
        }
    }
}

/// What runs decides: the instance's own file, by whichever way leads to it.
fn look(core: &Core, unverified: &Unverified) {
    let Some(policy) = core.in_force() else { return };
    let (label, exe) = (unverified.label, &unverified.exe);
    let rules = &policy.compiled().hashes;
    let Some(name) = rules.iter().find(|f| f.server == label.server()).map(|f| &f.name) else { return };
    let noted = tables::instance(&lock(&core.maps), label.instance()).map(|i| i.file);
    // Of an instance that has ended, the process may be another by now.
    let running = noted.map(|_| proc_exe(unverified.pid));
    let mut last = None;
    for path in running.into_iter().chain([PathBuf::from(exe)]) {
        match examine(core, &path) {
            // Another program by now, or another file under the same path.
            Ok((file, _)) if noted.is_some_and(|noted| noted != file) => {}
            Ok((_, hash)) => {
                let expected = expected(rules, label.server());
                if expected.contains(&hash) {
                    tracing::info!(exe, server = name, "the file of a running server is verified");
                } else {
                    let text = mismatch(exe, &hash, &expected);
                    finding(core, "hash_mismatch", name, Some(label), text);
                }
                return;
            }
            Err(error) => last = Some(error),
        }
    }
    if let Some(error) = last.filter(|e| !e.is_absent()) {
        let text = format!("`{exe}` cannot be verified: {error}");
        finding(core, "unverifiable", name, Some(label), text);
    }
}

fn expected(files: &[FileHashes], server: u16) -> Vec<Hash> {
    files.iter().filter(|file| file.server == server).flat_map(|file| file.sha256.iter().copied()).collect()
}

fn mismatch(exe: &str, found: &Hash, expected: &[Hash]) -> String {
    const SHOWN: usize = 4;
    let mut hashes: Vec<String> = expected.iter().take(SHOWN).map(hex::encode).collect();
    if expected.len() > SHOWN {
        hashes.push(format!("{} more", expected.len() - SHOWN));
    }
    format!("`{exe}`: expected sha256 {}, found {}", hashes.join(" or "), hex::encode(found))
}

fn finding(core: &Core, kind: &str, server: &str, label: Option<Label>, detail: String) {
    let mut finding = pb::Finding {
        kind: kind.to_owned(),
        server: server.to_owned(),
        instance: label.map(|l| instance_id(server, l.instance())).unwrap_or_default(),
        detail,
        ..Default::default()
    };
    finding.set_severity(if kind == "hash_mismatch" { pb::Severity::High } else { pb::Severity::Medium });
    core.bus.publish_now(Body::Finding(finding));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn soon() -> Instant {
        Instant::now() + DEADLINE
    }

    #[test]
    fn a_file_is_hashed_in_whole() {
        let mut file = tempfile::NamedTempFile::new().expect("file");
        file.write_all(&vec![b'a'; 300_000]).expect("write");
        let found = hash(&mut open(file.path()).expect("open"), soon()).expect("hash");
        assert_eq!(found, <Hash>::from(Sha256::digest(vec![b'a'; 300_000])));
        let late = Instant::now() - Duration::from_secs(1);
        assert!(matches!(hash(&mut open(file.path()).expect("open"), late), Err(Unverifiable::Deadline)));
    }

    #[test]
    fn a_fifo_and_a_directory_are_refused_at_once() {
        let dir = tempfile::tempdir().expect("dir");
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
        for path in [fifo.as_path(), dir.path()] {
            let file = open(path).expect("open");
            assert!(matches!(trusted(&file), Err(Unverifiable::NotRegular)), "{}", path.display());
        }
        assert!(open(&dir.path().join("none")).is_err_and(|e| e.is_absent()));
    }

    #[test]
    fn a_file_that_somebody_may_still_write_is_refused() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let reader = open(file.path()).expect("open");
        assert!(matches!(no_writer(&reader), Err(Unverifiable::OpenForWriting)));
        let path = file.into_temp_path();
        no_writer(&reader).expect("the writer is gone");
        // A mapping outlives the descriptor that it was made with.
        let writer = OpenOptions::new().read(true).write(true).open(&path).expect("open");
        writer.set_len(4096).expect("length");
        let (prot, flags) = (libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping, unmapped below.
        let map = unsafe { libc::mmap(std::ptr::null_mut(), 4096, prot, flags, writer.as_raw_fd(), 0) };
        assert_ne!(map, libc::MAP_FAILED);
        drop(writer);
        assert!(matches!(no_writer(&reader), Err(Unverifiable::OpenForWriting)));
        // SAFETY: mapped above, not used after.
        unsafe { libc::munmap(map, 4096) };
        no_writer(&reader).expect("the mapping is gone");
    }

    #[test]
    fn file_systems_are_told_apart_by_what_their_times_are_worth() {
        assert_eq!(times(FsType(0xef53)), Times::Exact);
        assert_eq!(times(FsType(0x0102_1994)), Times::Mapped);
        for (name, magic) in [("fuse", 0x6573_5546), ("nfs", 0x6969), ("proc", 0x9fa0), ("9p", 0x0102_1997)] {
            assert_eq!(times(FsType(magic)), Times::Foreign, "{name}");
        }
    }

    #[test]
    fn a_change_time_of_this_moment_is_waited_out() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("clock");
        let file =
            FileId { ctime_sec: now.as_secs() as i64, ctime_nsec: now.subsec_nanos(), ..FileId::default() };
        wait_until_past(&file);
        let changed = UNIX_EPOCH + now;
        assert!(SystemTime::now().duration_since(changed).expect("clock") >= Duration::from_millis(25));
        wait_until_past(&FileId { ctime_sec: i64::MAX, ctime_nsec: u32::MAX, ..file });
    }

    #[test]
    fn known_files_are_bounded_and_the_oldest_goes() {
        let mut known = Known::default();
        let file = |ino| FileId { ino, ..FileId::default() };
        for ino in 0..MAX_KNOWN as u64 {
            assert_eq!(known.insert(file(ino), [0; 32]), None);
        }
        assert_eq!(known.insert(file(5), [0; 32]), None, "known before");
        assert_eq!(known.insert(file(u64::MAX), [0; 32]), Some(file(0)));
        assert_eq!(known.hashes.len(), MAX_KNOWN);
        assert!(known.report(2, file(1)) && !known.report(2, file(1)) && known.report(3, file(1)));
    }

    #[test]
    fn a_finding_says_what_was_expected_and_what_was_found() {
        let text = mismatch("/opt/x", &[0xab; 32], &[[1; 32], [2; 32]]);
        assert!(
            text.contains(&"ab".repeat(32))
                && text.contains(&"01".repeat(32))
                && text.contains(&"02".repeat(32))
        );
        assert!(mismatch("/x", &[0; 32], &[[1; 32]; 9]).contains("5 more"));
    }
}
