//! Handles on the maps that the programs and the agent share.

use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, RingBuf, SkStorage, lpm_trie};
use aya::{Ebpf, Pod};
use sensor_common::exec::{ExecRule, KEY_BYTES};
use sensor_common::identity::IdentityKey;
use sensor_common::kernel::{Counts, Denial, State};
use sensor_common::label::Label;
use sensor_common::listener::Looks;
use sensor_common::name::{Learned, LearnedKey, NameRule, NameText};
use sensor_common::policy::{LaunchKey, PortSet, Profile, Server};
use sensor_common::record::{Instance, VerdictKey};
use sensor_common::socket::{Socket, Tuple};
use sensor_common::stdio::{Wire, WireKey};
use sensor_common::unix::{PATH_BYTES, UnixRule};
use std::os::fd::OwnedFd;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A type of `sensor-common` as a map key or value.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Shared<T>(pub T);

// SAFETY: `FromBytes` and `IntoBytes` are what `Pod` asks for: every bit
// pattern is a value, and there is no padding.
unsafe impl<T: FromBytes + IntoBytes + Immutable + Copy + 'static> Pod for Shared<T> {}

/// A CIDR key without its prefix length: scope, direction, address.
pub type CidrBits = [u32; 6];
/// An exec key without its prefix length.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
pub struct ExecBits {
    pub generation: u32,
    pub kind: u8,
    pub bytes: [u8; KEY_BYTES],
}
/// A unix key without its prefix length.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
pub struct UnixBits {
    pub generation: u32,
    pub profile: u32,
    pub path: [u8; PATH_BYTES],
}

/// A name key without its prefix length.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
pub struct NameBits {
    pub scope: u32,
    pub text: NameText,
}

pub type LpmKey<T> = lpm_trie::Key<Shared<T>>;

/// All maps. Taken out of the loader, so that each has one owner.
pub struct Maps {
    pub state: Array<MapData, Shared<State>>,
    pub counts: Array<MapData, Shared<Counts>>,
    pub tasks: Array<MapData, Shared<Label>>,
    pub overflow: Array<MapData, u64>,
    pub instances: HashMap<MapData, u32, Shared<Instance>>,
    pub quarantined: HashMap<MapData, u32, u8>,
    pub sockets: SkStorage<MapData, Shared<Socket>>,
    pub inherited: HashMap<MapData, u64, Shared<Label>>,
    pub queued: HashMap<MapData, Shared<Tuple>, Shared<Label>>,
    pub servers: Array<MapData, Shared<Server>>,
    pub profiles: Array<MapData, Shared<Profile>>,
    pub port_sets: Array<MapData, Shared<PortSet>>,
    pub cidrs: LpmTrie<MapData, Shared<CidrBits>, u32>,
    pub launches: HashMap<MapData, Shared<LaunchKey>, u8>,
    pub exec_rules: LpmTrie<MapData, Shared<ExecBits>, Shared<ExecRule>>,
    pub identities: HashMap<MapData, Shared<IdentityKey>, u8>,
    pub unix: LpmTrie<MapData, Shared<UnixBits>, Shared<UnixRule>>,
    pub names: LpmTrie<MapData, Shared<NameBits>, Shared<NameRule>>,
    pub learned: HashMap<MapData, Shared<LearnedKey>, Shared<Learned>>,
    pub listeners: HashMap<MapData, u64, Shared<Looks>>,
    pub denials: HashMap<MapData, Shared<VerdictKey>, Shared<Denial>>,
    pub losses: PerCpuArray<MapData, u64>,
    pub reported: Array<MapData, u64>,
    pub verdicts_of: Array<MapData, u64>,
    pub verdicts_seen: Array<MapData, u64>,
    /// For the one call that aya has no name for, see `sys::take`.
    pub(super) denials_fd: OwnedFd,
}

/// The rings, for their readers.
pub struct Rings {
    pub verdicts: RingBuf<MapData>,
    pub telemetry: RingBuf<MapData>,
    pub stdio: RingBuf<MapData>,
}

/// What belongs to stdio, for the thread that reads it.
pub struct Wires {
    wires: HashMap<MapData, Shared<WireKey>, Shared<Wire>>,
    candidates: Array<MapData, u64>,
    admitted: HashMap<MapData, u64, Shared<Label>>,
}

impl Wires {
    pub(super) fn open(ebpf: &Ebpf) -> Result<Wires, MapsError> {
        Ok(Wires {
            wires: second(ebpf, "WIRES")?,
            candidates: second(ebpf, "CANDIDATES")?,
            admitted: second(ebpf, "ADMITTED")?,
        })
    }

    pub fn get(&self, key: &WireKey) -> Option<Wire> {
        self.wires.get(&Shared(*key), 0).ok().map(|w| w.0)
    }

    /// False: there is no place for it.
    pub fn set(&mut self, key: &WireKey, wire: &Wire) -> bool {
        self.wires.insert(Shared(*key), Shared(*wire), 0).is_ok()
    }

    pub fn remove(&mut self, key: &WireKey) {
        let _ = self.wires.remove(&Shared(*key));
    }

    pub fn iter(&self) -> impl Iterator<Item = (WireKey, Wire)> {
        self.wires.iter().flatten().map(|(key, wire)| (key.0, wire.0))
    }

    /// A candidate's connection is that of a server from now on; `None`: of
    /// nobody. False: there is no place for it.
    pub fn admit(&mut self, connection: u64, label: Option<Label>) -> bool {
        match label {
            Some(label) => self.admitted.insert(connection, Shared(label), 0).is_ok(),
            None => self.admitted.remove(&connection).is_ok(),
        }
    }

    /// Whether what a process reads and writes is looked at. A bit of a process
    /// that forks or ends at this very moment may be lost: it is looked at
    /// again at its next exec, or for nothing.
    pub fn set_candidate(&mut self, tgid: u32, yes: bool) {
        let Ok(word) = self.candidates.get(&(tgid / 64), 0) else { return };
        let bit = 1 << (tgid % 64);
        let _ = self.candidates.set(tgid / 64, if yes { word | bit } else { word & !bit }, 0);
    }
}

#[derive(Debug, thiserror::Error)]
pub enum MapsError {
    #[error("the kernel object has no map `{0}`: it does not belong to this binary, run `cargo xtask build`")]
    Missing(&'static str),
    #[error("map `{name}`: {source}")]
    Kind { name: &'static str, source: MapError },
}

fn duplicate(ebpf: &Ebpf, name: &'static str) -> Result<OwnedFd, MapsError> {
    let fd = ebpf.map(name).and_then(super::load::map_fd).ok_or(MapsError::Missing(name))?;
    fd.try_clone_to_owned().map_err(|e| MapsError::Kind { name, source: MapError::IoError(e) })
}

/// The labels of tasks alone: look-ups that must not wait while a policy is
/// being written.
pub struct Labels {
    tasks: Array<MapData, Shared<Label>>,
    overflow: Array<MapData, u64>,
}

impl Labels {
    pub(super) fn open(ebpf: &Ebpf) -> Result<Labels, MapsError> {
        Ok(Labels { tasks: second(ebpf, "TASKS")?, overflow: second(ebpf, "OVERFLOW")? })
    }

    /// `None`: nobody knows.
    pub fn of(&self, tgid: u32) -> Option<Label> {
        if let Ok(label) = self.tasks.get(&tgid, 0) {
            return Some(label.0);
        }
        // Beyond the map: marked if it is labelled, though not by what.
        let marks = self.overflow.get(&(tgid / 64), 0).ok()?;
        (marks & 1 << (tgid % 64) == 0).then_some(Label::NONE)
    }
}

/// What servers learned alone, for the same reason.
pub struct LearnedNames {
    learned: HashMap<MapData, Shared<LearnedKey>, Shared<Learned>>,
    /// How often each server has learned; an object may come without it.
    count: Option<Array<MapData, u64>>,
}

impl LearnedNames {
    pub(super) fn open(ebpf: &Ebpf) -> Result<LearnedNames, MapsError> {
        let count = match second(ebpf, "LEARNED_COUNT") {
            Ok(count) => Some(count),
            Err(MapsError::Missing(_)) => None,
            Err(error) => return Err(error),
        };
        Ok(LearnedNames { learned: second(ebpf, "LEARNED")?, count })
    }

    /// `None`: nobody knows.
    pub fn count(&self, server: u16) -> Option<u64> {
        self.count.as_ref()?.get(&server.into(), 0).ok()
    }

    pub fn get(&self, key: &LearnedKey) -> Option<Learned> {
        self.learned.get(&Shared(*key), 0).ok().map(|l| l.0)
    }

    pub fn iter(&self) -> impl Iterator<Item = (LearnedKey, Learned)> {
        self.learned.iter().flatten().map(|(key, learned)| (key.0, learned.0))
    }
}

/// A handle of its own on a map.
pub(super) fn second<M: TryFrom<Map, Error = MapError>>(
    ebpf: &Ebpf,
    name: &'static str,
) -> Result<M, MapsError> {
    let at = |source| MapsError::Kind { name, source };
    let data = MapData::from_fd(duplicate(ebpf, name)?).map_err(at)?;
    M::try_from(Map::from_map_data(data).map_err(at)?).map_err(at)
}

impl Maps {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<(Maps, Rings), MapsError> {
        macro_rules! take {
            ($name:literal) => {
                ebpf.take_map($name)
                    .ok_or(MapsError::Missing($name))?
                    .try_into()
                    .map_err(|source| MapsError::Kind { name: $name, source })?
            };
        }
        let denials_fd = duplicate(ebpf, "DENIALS")?;
        let maps = Maps {
            denials_fd,
            state: take!("STATE"),
            counts: take!("COUNTS"),
            tasks: take!("TASKS"),
            overflow: take!("OVERFLOW"),
            instances: take!("INSTANCES"),
            quarantined: take!("QUARANTINED"),
            sockets: take!("SOCKETS"),
            inherited: take!("INHERITED"),
            queued: take!("QUEUED"),
            servers: take!("SERVERS"),
            profiles: take!("PROFILES"),
            port_sets: take!("PORT_SETS"),
            cidrs: take!("CIDRS"),
            launches: take!("LAUNCHES"),
            exec_rules: take!("EXEC_RULES"),
            identities: take!("IDENTITIES"),
            unix: take!("UNIX"),
            names: take!("NAMES"),
            learned: take!("LEARNED"),
            listeners: take!("LISTENERS"),
            denials: take!("DENIALS"),
            losses: take!("LOSSES"),
            reported: take!("REPORTED"),
            verdicts_of: take!("VERDICTS_OF"),
            verdicts_seen: take!("VERDICTS_SEEN"),
        };
        Ok((
            maps,
            Rings { verdicts: take!("VERDICTS"), telemetry: take!("TELEMETRY"), stdio: take!("STDIO") },
        ))
    }
}
