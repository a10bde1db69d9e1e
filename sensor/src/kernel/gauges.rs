//! How full the kernel's half is, and what it costs: maps, rings, programs.

use super::sys;
use aya::Ebpf;
use memmap2::{Mmap, MmapOptions};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// Maps that fill as servers work: an entry more is refused when they are full.
const MAPS: [&str; 10] = [
    "ADMITTED",
    "DENIALS",
    "IDENTITIES",
    "INHERITED",
    "INSTANCES",
    "LEARNED",
    "LISTENERS",
    "QUARANTINED",
    "QUEUED",
    "WIRES",
];
const RINGS: [&str; 3] = ["STDIO", "TELEMETRY", "VERDICTS"];
/// Whether the kernel measures programs.
const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Of one map or ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filling {
    /// Lower case.
    pub name: String,
    /// Entries, or bytes.
    pub used: u64,
    pub capacity: u64,
}

/// Of one hook, since it was loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunTime {
    pub hook: &'static str,
    pub runs: u64,
    pub nanoseconds: u64,
}

struct Table {
    name: &'static str,
    fd: OwnedFd,
    key_size: usize,
    capacity: u64,
}

struct Ring {
    name: &'static str,
    consumer: Mmap,
    producer: Mmap,
    capacity: u64,
}

/// Handles of their own: whoever looks holds up nobody.
pub struct Gauges {
    tables: Vec<Table>,
    rings: Vec<Ring>,
    programs: Vec<(&'static str, OwnedFd)>,
}

impl Gauges {
    /// What cannot be opened is not shown.
    pub(super) fn open(ebpf: &Ebpf, programs: Vec<(&'static str, OwnedFd)>) -> Gauges {
        let fd = |name: &str| ebpf.map(name).and_then(super::load::map_fd)?.try_clone_to_owned().ok();
        let table = |name: &&'static str| {
            let fd = fd(name)?;
            let info = sys::map_info(fd.as_fd()).ok()?;
            Some(Table { name, fd, key_size: info.key_size as usize, capacity: info.max_entries.into() })
        };
        let ring = |name: &&'static str| {
            let fd = fd(name)?;
            let capacity = sys::map_info(fd.as_fd()).ok()?.max_entries.into();
            let page =
                usize::try_from(nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??).ok()?;
            // SAFETY: the kernel's own pages, which nobody cuts; they are read as
            // atomics only.
            let map = |at: usize| unsafe { MmapOptions::new().offset(at as u64).len(page).map(&fd).ok() };
            Some(Ring { name, consumer: map(0)?, producer: map(page)?, capacity })
        };
        Gauges {
            tables: MAPS.iter().filter_map(table).collect(),
            rings: RINGS.iter().filter_map(ring).collect(),
            programs,
        }
    }

    pub fn tables(&self) -> impl Iterator<Item = Filling> {
        self.tables.iter().map(|table| Filling {
            name: table.name.to_lowercase(),
            used: sys::count(table.fd.as_fd(), table.key_size, table.capacity),
            capacity: table.capacity,
        })
    }

    pub fn rings(&self) -> impl Iterator<Item = Filling> {
        self.rings.iter().map(|ring| {
            // The consumer first: it never is ahead.
            let (consumed, produced) = (position(&ring.consumer), position(&ring.producer));
            let used = produced.saturating_sub(consumed).min(ring.capacity);
            Filling { name: ring.name.to_lowercase(), used, capacity: ring.capacity }
        })
    }

    /// `None`: the kernel does not measure it (`kernel.bpf_stats_enabled`).
    pub fn run_times(&self) -> Option<Vec<RunTime>> {
        let enabled = std::fs::read_to_string(STATS).is_ok_and(|text| text.trim() == "1");
        let time = |(hook, fd): &(&'static str, OwnedFd)| {
            let info = sys::program_info(fd.as_fd()).ok()?;
            Some(RunTime { hook, runs: info.run_cnt, nanoseconds: info.run_time_ns })
        };
        enabled.then(|| self.programs.iter().filter_map(time).collect())
    }
}

/// The first word of either page (kernel/bpf/ringbuf.c).
fn position(page: &Mmap) -> u64 {
    // SAFETY: within the page and aligned to it; the kernel and the reader write
    // it as one word.
    unsafe { &*page.as_ptr().cast::<AtomicU64>() }.load(Ordering::Acquire)
}
