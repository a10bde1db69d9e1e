//! Maps of an earlier start in the hands of this one.
//!
//! A map that is laid out as this object's is shared: the programs of both write
//! to the same memory. One that is not is made anew and filled from the old one,
//! by one rule: values grow at their end, and zero means what was before. Keys
//! and kinds of maps do not change; where they did, nothing is taken over, and
//! the start fails before anything was changed.
//!
//! Labels that fork and exec give out meanwhile are in the old maps only as long
//! as the new programs do not know the parent; hence the passes in
//! [`Carried::labels`], the last of which finds nothing new.

use super::pidfd::{pidfd_open, sockets_of};
use super::pins::{Building, Taken};
use super::sys;
use aya_obj::generated::bpf_map_info;
use sensor_common::kernel::PID_LIMIT;
use sensor_common::label::Label;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use zerocopy::{FromBytes as _, IntoBytes as _};

/// Nothing of these outlives one run of a program, or the object they belong to.
const OWN: [&str; 9] = [
    "STDIO",
    "OUT_PROGRAMS",
    "IN_PROGRAMS",
    "WORK",
    "SCRATCH",
    "SCRATCH_BUSY",
    "MOVES",
    "MOVES_BUSY",
    "IDENTIFIED",
];
const PASSES: usize = 64;

const ARRAY: u32 = 2;
const PERCPU_ARRAY: u32 = 6;
const RINGBUF: u32 = 27;
const SK_STORAGE: u32 = 24;

#[derive(Debug, thiserror::Error)]
pub enum CarryError {
    #[error(
        "what another version of this sensor enforces cannot be taken over: its map `{map}` {how}; it stays in \
         force. Start that version again, or let go of it with `mcp-sensor release`"
    )]
    Layout { map: String, how: &'static str },
    #[error("map `{map}` of the earlier sensor cannot be taken over: {source}")]
    Map { map: String, source: io::Error },
    #[error("labels change faster than they can be taken over; what was enforced stays in force: try again")]
    Restless,
}

fn at(map: &str) -> impl Fn(io::Error) -> CarryError {
    move |source| CarryError::Map { map: map.to_owned(), source }
}

/// A map that the object asks for.
pub(super) struct Wanted {
    pub name: String,
    pub kind: u32,
    pub key: u32,
    pub value: u32,
    pub entries: u32,
    pub flags: u32,
}

impl Wanted {
    fn is(&self, info: &bpf_map_info) -> bool {
        self.kind == info.type_
            && (self.key, self.value) == (info.key_size, info.value_size)
            && self.entries == info.max_entries
            && self.flags == info.map_flags
    }
}

/// An old map and the one in its place.
struct Pair {
    name: String,
    kind: u32,
    old: OwnedFd,
    old_info: bpf_map_info,
    new: OwnedFd,
    new_info: bpf_map_info,
}

/// Maps that could not be shared.
#[derive(Default)]
pub(super) struct Apart(Vec<(String, OwnedFd, bpf_map_info)>);

/// Pins in `building` what is laid out as it was. Returns the others.
pub(super) fn share(taken: &Taken, building: &Building, wanted: &[Wanted]) -> Result<Apart, CarryError> {
    let mut apart = Apart::default();
    for map in wanted.iter().filter(|map| !OWN.contains(&map.name.as_str())) {
        let old = match sys::open_pinned(&taken.map(&map.name)) {
            Ok(old) => old,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(at(&map.name)(e)),
        };
        let info = sys::map_info(old.as_fd()).map_err(at(&map.name))?;
        if map.is(&info) {
            sys::pin(old.as_fd(), &building.map(&map.name)).map_err(at(&map.name))?;
            continue;
        }
        let how = if map.kind != info.type_ {
            "is of another kind"
        } else if map.key != info.key_size {
            "has other keys"
        } else {
            tracing::info!(map = map.name, "laid out differently than before: it is carried over");
            apart.0.push((map.name.clone(), old, info));
            continue;
        };
        return Err(CarryError::Layout { map: map.name.clone(), how });
    }
    Ok(apart)
}

/// Maps that are filled from old ones.
pub(super) struct Carried {
    pairs: Vec<Pair>,
    /// Old and new: shared maps stand for both.
    tasks: (OwnedFd, OwnedFd),
    instances: (OwnedFd, OwnedFd),
    overflow: OwnedFd,
    capacity: u32,
    /// Bytes that an instance has in both.
    instance: Sizes,
}

#[derive(Clone, Copy)]
struct Sizes {
    old: usize,
    new: usize,
}

impl Apart {
    /// `new`: the object's map of a name.
    pub(super) fn pair(
        self,
        taken: &Taken,
        new: impl Fn(&str) -> Option<OwnedFd>,
    ) -> Result<Option<Carried>, CarryError> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let missing = || io::Error::other("it is not in the kernel object");
        let of = |name: &str| new(name).ok_or_else(missing).map_err(at(name));
        let mut pairs = Vec::new();
        for (name, old, old_info) in self.0 {
            let new = of(&name)?;
            let new_info = sys::map_info(new.as_fd()).map_err(at(&name))?;
            pairs.push(Pair { kind: old_info.type_, name, old, old_info, new, new_info });
        }
        let both = |name: &str| -> Result<(OwnedFd, OwnedFd), CarryError> {
            Ok((sys::open_pinned(&taken.map(name)).map_err(at(name))?, of(name)?))
        };
        let (tasks, instances) = (both("TASKS")?, both("INSTANCES")?);
        let size = |fd: &OwnedFd| sys::map_info(fd.as_fd()).map(|i| i.value_size as usize);
        let instance = Sizes {
            old: size(&instances.0).map_err(at("INSTANCES"))?,
            new: size(&instances.1).map_err(at("INSTANCES"))?,
        };
        let capacity = sys::map_info(tasks.1.as_fd()).map_err(at("TASKS"))?.max_entries;
        Ok(Some(Carried { pairs, tasks, instances, overflow: of("OVERFLOW")?, capacity, instance }))
    }
}

impl Carried {
    /// Whether sockets have marks that no descriptor may lead to.
    pub(super) fn sockets_apart(&self) -> bool {
        self.pairs.iter().any(|pair| pair.name == "SOCKETS")
    }

    /// The policy and what else is in maps, before a new program is attached: it
    /// would deny what the old ones allow.
    pub(super) fn tables(&self) -> Result<(), CarryError> {
        for pair in self.pairs.iter().filter(|pair| pair.name != "TASKS") {
            let copied = match pair.kind {
                RINGBUF => Ok(()), // what the agent before did not read
                SK_STORAGE => Ok(()),
                ARRAY => pair.array(size_of::<u32>()),
                PERCPU_ARRAY => pair.per_cpu(),
                _ => pair.table(),
            };
            copied.map_err(at(&pair.name))?;
        }
        Ok(())
    }

    /// Labels, instances and sockets, while the programs of both are attached.
    pub(super) fn labels(&self) -> Result<(), CarryError> {
        for _ in 0..PASSES {
            if !self.pass()? {
                return Ok(());
            }
        }
        Err(CarryError::Restless)
    }

    /// Whether anything was new.
    fn pass(&self) -> Result<bool, CarryError> {
        let mut changed = false;
        for pid in processes().map_err(at("TASKS"))? {
            let Some(label) = label(self.tasks.0.as_fd(), pid) else { continue };
            changed |= self.instance(label)?;
            changed |= self.task(pid, label)?;
            changed |= self.sockets(pid)?;
        }
        Ok(changed | self.overflowed()?)
    }

    fn task(&self, pid: u32, wanted: Label) -> Result<bool, CarryError> {
        if pid >= self.capacity {
            return self.mark(pid);
        }
        if label(self.tasks.1.as_fd(), pid) == Some(wanted) {
            return Ok(false);
        }
        sys::update(self.tasks.1.as_fd(), &pid.to_ne_bytes(), wanted.as_bytes()).map_err(at("TASKS"))?;
        Ok(true)
    }

    /// A labelled process that has no place any more.
    fn mark(&self, pid: u32) -> Result<bool, CarryError> {
        let (key, bit) = ((pid / 64).to_ne_bytes(), 1u64 << (pid % 64));
        let mut word = 0u64;
        sys::lookup(self.overflow.as_fd(), &key, word.as_mut_bytes()).map_err(at("OVERFLOW"))?;
        if word & bit != 0 {
            return Ok(false);
        }
        sys::update(self.overflow.as_fd(), &key, (word | bit).as_bytes()).map_err(at("OVERFLOW"))?;
        Ok(true)
    }

    /// Processes that had no place, and have one now: denied as they were.
    fn overflowed(&self) -> Result<bool, CarryError> {
        const DENIED: Label = Label::new(u16::MAX, 0, 0);
        let mut changed = false;
        for index in 0..(self.capacity.min(PID_LIMIT)).div_ceil(64) {
            let mut word = 0u64;
            sys::lookup(self.overflow.as_fd(), &index.to_ne_bytes(), word.as_mut_bytes())
                .map_err(at("OVERFLOW"))?;
            if word == 0 {
                continue;
            }
            for pid in (0..64).filter(|bit| word & 1 << bit != 0).map(|bit| index * 64 + bit) {
                let alive = fs::exists(format!("/proc/{pid}")).unwrap_or(true);
                if alive && pid < self.capacity && label(self.tasks.1.as_fd(), pid).is_none() {
                    changed |= self.task(pid, DENIED)?;
                }
            }
        }
        Ok(changed)
    }

    /// Before a label that names it is.
    fn instance(&self, label: Label) -> Result<bool, CarryError> {
        let key = label.instance().to_ne_bytes();
        let mut value = vec![0; self.instance.old.max(self.instance.new)];
        let (old, new) = (self.instances.0.as_fd(), self.instances.1.as_fd());
        match sys::lookup(new, &key, &mut value) {
            Ok(()) => return Ok(false),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(at("INSTANCES")(e)),
        }
        value.fill(0);
        match sys::lookup(old, &key, &mut value) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(at("INSTANCES")(e)),
        }
        value[self.instance.old.min(self.instance.new)..].fill(0);
        sys::update(new, &key, &value).map_err(at("INSTANCES"))?;
        Ok(true)
    }

    /// What sockets carry, of every kind that is laid out differently now.
    fn sockets(&self, pid: u32) -> Result<bool, CarryError> {
        let storages = || self.pairs.iter().filter(|pair| pair.kind == SK_STORAGE);
        if storages().next().is_none() {
            return Ok(false);
        }
        let Some(pidfd) = unless_gone(pidfd_open(pid)).map_err(at("SOCKETS"))? else { return Ok(false) };
        let sockets = unless_gone(sockets_of(pid, &pidfd)).map_err(at("SOCKETS"))?;
        let mut changed = false;
        for socket in sockets.into_iter().flatten() {
            let Some(socket) = unless_gone(socket).map_err(at("SOCKETS"))? else { continue };
            let key = socket.as_raw_fd().to_ne_bytes();
            for pair in storages() {
                changed |= pair.carry(&key).map_err(at(&pair.name))?;
            }
        }
        Ok(changed)
    }
}

impl Pair {
    /// One entry, if it is there and not in the new map. True: it was carried.
    fn carry(&self, key: &[u8]) -> io::Result<bool> {
        let (old, new) = (self.old_info.value_size as usize, self.new_info.value_size as usize);
        let mut value = vec![0; old.max(new)];
        if unless_gone(sys::lookup(self.new.as_fd(), key, &mut value))?.is_some() {
            return Ok(false);
        }
        value.fill(0);
        if unless_gone(sys::lookup(self.old.as_fd(), key, &mut value))?.is_none() {
            return Ok(false);
        }
        value[old.min(new)..].fill(0);
        sys::update(self.new.as_fd(), key, &value)?;
        Ok(true)
    }

    fn array(&self, key_size: usize) -> io::Result<()> {
        debug_assert_eq!(key_size, self.old_info.key_size as usize);
        let (old, new) = (self.old_info.value_size as usize, self.new_info.value_size as usize);
        let mut value = vec![0; old.max(new)];
        for index in 0..self.old_info.max_entries.min(self.new_info.max_entries) {
            let key = index.to_ne_bytes();
            sys::lookup(self.old.as_fd(), &key, &mut value)?;
            value[old.min(new)..].fill(0);
            if value.iter().any(|byte| *byte != 0) {
                sys::update(self.new.as_fd(), &key, &value)?;
            }
            value.fill(0);
        }
        Ok(())
    }

    /// The kernel moves the values of all CPUs at once, each rounded up to 8.
    fn per_cpu(&self) -> io::Result<()> {
        let cpus = aya::util::nr_cpus().map_err(|(_, e)| e)?;
        let stride = |info: &bpf_map_info| (info.value_size as usize).next_multiple_of(8);
        let (old, new) = (stride(&self.old_info), stride(&self.new_info));
        let (mut from, mut to) = (vec![0; old * cpus], vec![0; new * cpus]);
        for index in 0..self.old_info.max_entries.min(self.new_info.max_entries) {
            let key = index.to_ne_bytes();
            sys::lookup(self.old.as_fd(), &key, &mut from)?;
            for (from, to) in from.chunks(old).zip(to.chunks_mut(new)) {
                let common = old.min(new);
                to[..common].copy_from_slice(&from[..common]);
            }
            sys::update(self.new.as_fd(), &key, &to)?;
        }
        Ok(())
    }

    fn table(&self) -> io::Result<()> {
        let mut key: Option<Vec<u8>> = None;
        // Entries that come and go make the kernel begin again.
        for _ in 0..u64::from(self.old_info.max_entries) * 2 {
            let next = sys::next_key(self.old.as_fd(), key.as_deref(), self.old_info.key_size as usize)?;
            let Some(next) = next else { return Ok(()) };
            self.carry(&next)?;
            key = Some(next);
        }
        Err(io::Error::other("it changes faster than it can be read"))
    }
}

/// `None`: the process, descriptor or entry went away meanwhile.
fn unless_gone<T>(done: io::Result<T>) -> io::Result<Option<T>> {
    match done {
        Ok(it) => Ok(Some(it)),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH | libc::EBADF)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// `None`: no label.
fn label(tasks: BorrowedFd<'_>, pid: u32) -> Option<Label> {
    let mut value = [0; size_of::<Label>()];
    sys::lookup(tasks, &pid.to_ne_bytes(), &mut value).ok()?;
    Label::read_from_bytes(&value).ok().filter(|label| label.is_some())
}

fn processes() -> io::Result<Vec<u32>> {
    Ok(fs::read_dir("/proc")?.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
}

/// The object's maps as they are to be, `entries` being those that are chosen at
/// start.
pub(super) fn wanted(object: &aya_obj::Object, entries: &HashMap<&str, u32>) -> Vec<Wanted> {
    let own = object.maps.iter().filter(|(name, _)| !name.starts_with('.'));
    own.map(|(name, map)| Wanted {
        name: name.clone(),
        kind: map.map_type(),
        key: map.key_size(),
        value: map.value_size(),
        entries: entries.get(name.as_str()).copied().unwrap_or(map.max_entries()),
        flags: map.map_flags(),
    })
    .collect()
}
