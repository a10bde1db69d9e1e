//! What each server has said of its tools and of itself, kept over sessions:
//! whatever is not as it was before is drift.
//!
//! Pure but for `file`; times are UTC, nanoseconds since 1970, and passed in.
//!
//! Lists are kept by (server, era, client capabilities): real servers list other
//! tools to a client that said `initialize` than to one that did not, and to one
//! that can be asked (elicitation, sampling) than to one that cannot. What a key
//! listed before is compared with what it lists now, within a session
//! (`list_changed`) as between sessions. A key's first list is no drift.

mod canonical;
mod file;
#[cfg(test)]
mod tests;

pub use canonical::{Hash, ListHashes, Pages, ToolHashes};
pub use file::{Damage, load, write};

use super::{Era, Implementation};
use crate::event::pb;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};

/// Servers, counting programs: the name `unknown` stands for many.
pub const MAX_SERVERS: usize = 1000;
/// Lists of one server.
pub const MAX_LISTS: usize = 8;
/// Tools of one list.
pub const MAX_TOOLS: usize = 512;
/// Tools of all lists: about 16 MiB in memory and on disk.
pub const MAX_TOOLS_IN_ALL: usize = 32_768;
/// Names and versions, bytes.
pub const MAX_TEXT: usize = 256;
/// Drift of one server within [`WINDOW`] that is told item by item; what is
/// beyond is told by number. A server must not flood out denials.
const MAX_DRIFT: u32 = 64;
const WINDOW: i64 = 60_000_000_000;

/// What is no longer as it was. The names are those of [`pb::Drift`]'s `what`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    ToolChanged,
    ToolAdded,
    ToolRemoved,
    /// Of more than is told item by item.
    More,
    ServerVersion,
    PackageVersion,
    EntryPoint,
}

impl What {
    pub fn name(self) -> &'static str {
        match self {
            What::ToolChanged => "tool_changed",
            What::ToolAdded => "tool_added",
            What::ToolRemoved => "tool_removed",
            What::More => "more",
            What::ServerVersion => "server_version",
            What::PackageVersion => "package_version",
            What::EntryPoint => "entry_point",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriftItem {
    pub what: What,
    /// Empty: it is about the server as a whole.
    pub tool: String,
    /// Hash or version before and after; empty: there was, or is, none.
    pub before: String,
    pub after: String,
    /// When `before` was last seen.
    pub since: i64,
    /// "description", "schema", "annotations" of a changed tool; "N changes" of
    /// [`What::More`].
    pub parts: Vec<String>,
}

impl DriftItem {
    pub fn event(self, actor: pb::Actor) -> pb::Drift {
        pb::Drift {
            actor: Some(actor),
            what: self.what.name().to_owned(),
            tool: self.tool,
            before: self.before,
            after: self.after,
            since_unix_ns: self.since,
            parts: self.parts,
        }
    }
}

/// Which server: the policy's name for it, and the package, script, image or
/// executable, by which those called `unknown` differ.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Which {
    pub server: String,
    pub program: String,
}

impl Which {
    pub fn new(server: &str, program: &str) -> Which {
        Which { server: cut(server), program: cut(program) }
    }
}

/// A value and when it was last seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Seen<T> {
    value: T,
    at: i64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    seen: i64,
    /// Self-reported name and version.
    said: Option<Seen<(String, String)>>,
    package_version: Option<Seen<String>>,
    entry_point: Option<Seen<Hash>>,
    lists: Vec<KnownList>,
    #[serde(skip)]
    told: Budget,
}

/// How much drift was told since `start`, and how much was not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Budget {
    start: i64,
    count: u32,
    untold: u64,
    /// That there is some, since `start`.
    told: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KnownList {
    key: ListKey,
    hash: Hash,
    seen: i64,
    incomplete: bool,
    tools: BTreeMap<String, KnownTool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ListKey {
    /// `None`: neither era has shown itself.
    modern: Option<bool>,
    capabilities: Option<Hash>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KnownTool {
    whole: Hash,
    description: Hash,
    schema: Hash,
    annotations: Hash,
    first_seen: i64,
    changed: i64,
}

/// Everything that is kept; share it behind a lock.
#[derive(Debug, Default)]
pub struct Inventory {
    servers: BTreeMap<Which, Known>,
    tools: usize,
    /// Servers and lists that made room for others since the start.
    forgotten: u64,
    dirty: bool,
}

impl Inventory {
    /// A list of tools was seen, whole or in part ([`ListHashes::incomplete`]);
    /// of an incomplete one nothing is ever missing. What drifted.
    pub fn listed(
        &mut self,
        which: &Which,
        era: Option<Era>,
        capabilities: Option<[u8; 32]>,
        list: &ListHashes,
        at: i64,
    ) -> Vec<DriftItem> {
        let key = ListKey { modern: era.map(|era| era == Era::Modern), capabilities: capabilities.map(Hash) };
        let known = self.servers.entry(which.clone()).or_default();
        known.seen = known.seen.max(at);
        self.dirty = true;
        let mut drift = Vec::new();
        match known.lists.iter_mut().find(|l| l.key == key) {
            Some(before) => {
                self.tools -= before.tools.len();
                let old = before.hash;
                drift = before.update(list, at);
                self.tools += before.tools.len();
                drift.truncate(known.told.take(drift.len(), at));
                if let Some(more) = known.told.untold() {
                    drift.push(DriftItem {
                        what: What::More,
                        tool: String::new(),
                        before: old.to_string(),
                        after: list.hash.to_string(),
                        since: at,
                        parts: vec![format!("{more} changes")],
                    });
                }
            }
            None => {
                let mut first = KnownList {
                    key,
                    hash: list.hash,
                    seen: at,
                    incomplete: list.incomplete,
                    tools: BTreeMap::new(),
                };
                // Of an empty list everything is new.
                let _ = first.update(list, at);
                self.tools += first.tools.len();
                known.lists.push(first);
                if known.lists.len() > MAX_LISTS
                    && let Some(oldest) = (0..known.lists.len()).min_by_key(|i| known.lists[*i].seen)
                {
                    self.tools -= known.lists.remove(oldest).tools.len();
                    self.forgotten += 1;
                }
            }
        }
        self.make_room(which);
        drift
    }

    /// What a server says of itself, and what its files are, where they are
    /// known. What drifted.
    pub fn identity(
        &mut self,
        which: &Which,
        said: &Implementation,
        package_version: &str,
        entry_point: Option<[u8; 32]>,
        at: i64,
    ) -> Vec<DriftItem> {
        let known = self.servers.entry(which.clone()).or_default();
        known.seen = known.seen.max(at);
        self.dirty = true;
        let item = |what, before: String, after: String, since| DriftItem {
            what,
            tool: String::new(),
            before,
            after,
            since,
            parts: Vec::new(),
        };
        let mut drift = Vec::new();
        let said = (!said.name.is_empty() || !said.version.is_empty())
            .then(|| (cut(&said.name), cut(&said.version)));
        if let Some((before, after, since)) = changed(&mut known.said, said, at) {
            // A version alone says enough, unless another program answers.
            let (before, after) = if before.0 == after.0 {
                (before.1, after.1)
            } else {
                (format!("{} {}", before.0, before.1), format!("{} {}", after.0, after.1))
            };
            drift.push(item(What::ServerVersion, before, after, since));
        }
        let version = (!package_version.is_empty()).then(|| cut(package_version));
        if let Some((before, after, since)) = changed(&mut known.package_version, version, at) {
            drift.push(item(What::PackageVersion, before, after, since));
        }
        let entry_point = entry_point.map(Hash);
        if let Some((before, after, since)) = changed(&mut known.entry_point, entry_point, at) {
            drift.push(item(What::EntryPoint, before.to_string(), after.to_string(), since));
        }
        drift.truncate(known.told.take(drift.len(), at));
        self.make_room(which);
        drift
    }

    /// Tools of every other server, by server and name: a description that speaks
    /// of these is worth a look.
    pub fn tools_of_others(&self, which: &Which) -> HashSet<(String, String)> {
        self.servers
            .iter()
            .filter(|(other, _)| *other != which)
            .flat_map(|(other, known)| {
                let server = if other.program.is_empty() { &other.server } else { &other.program };
                let names = known.lists.iter().flat_map(|l| l.tools.keys());
                names.map(move |tool| (server.clone(), tool.clone()))
            })
            .collect()
    }

    /// Servers and lists that were forgotten since the start, for there was no
    /// room: what they say next is no drift.
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// For `mcp-sensor tools`; empty: no such server has listed any. Sorted by
    /// server and program.
    pub fn shown(&self, server: Option<&str>) -> Vec<pb::ServerTools> {
        self.servers
            .iter()
            .filter(|(which, _)| server.is_none_or(|name| which.server == name))
            .map(|(which, known)| known.shown(which))
            .collect()
    }

    /// The longest unseen go first, those that nobody declared before others:
    /// whoever can start programs with ever new names forgets only these.
    fn make_room(&mut self, keep: &Which) {
        while self.servers.len() > MAX_SERVERS || self.tools > MAX_TOOLS_IN_ALL {
            let declared = |which: &Which| which.server != crate::policy::compile::UNKNOWN;
            let candidates = self.servers.iter().filter(|(which, _)| *which != keep);
            let Some(which) =
                candidates.min_by_key(|(w, k)| (declared(w), k.seen)).map(|(which, _)| which.clone())
            else {
                return;
            };
            if let Some(known) = self.servers.remove(&which) {
                self.tools -= known.tools();
                self.forgotten += 1;
            }
        }
    }
}

/// Remembers what was seen; (before, after, last seen) where they differ.
fn changed<T: Clone + PartialEq>(
    known: &mut Option<Seen<T>>,
    now: Option<T>,
    at: i64,
) -> Option<(T, T, i64)> {
    let now = now?;
    let before = known.replace(Seen { value: now.clone(), at })?;
    (before.value != now).then_some((before.value, now, before.at))
}

/// At most [`MAX_TEXT`] bytes.
fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_TEXT)].to_owned()
}

impl Budget {
    /// How many of `wanted` may be told.
    fn take(&mut self, wanted: usize, at: i64) -> usize {
        if at.saturating_sub(self.start) >= WINDOW || at < self.start {
            *self = Budget { start: at, untold: self.untold, ..Budget::default() };
        }
        let left = MAX_DRIFT.saturating_sub(self.count);
        let allowed = u32::try_from(wanted).unwrap_or(u32::MAX).min(left);
        self.count += allowed;
        self.untold += (wanted - allowed as usize) as u64;
        allowed as usize
    }

    /// How many items were not told since this was asked last; once in a window.
    fn untold(&mut self) -> Option<u64> {
        if self.told || self.untold == 0 {
            return None;
        }
        self.told = true;
        Some(std::mem::take(&mut self.untold))
    }
}

impl Known {
    fn tools(&self) -> usize {
        self.lists.iter().map(|l| l.tools.len()).sum()
    }

    fn shown(&self, which: &Which) -> pb::ServerTools {
        let said = self
            .said
            .as_ref()
            .map(|s| pb::Implementation { name: s.value.0.clone(), version: s.value.1.clone() });
        pb::ServerTools {
            server: which.server.clone(),
            program: which.program.clone(),
            seen_unix_ns: self.seen,
            server_info: said,
            package_version: self.package_version.as_ref().map(|v| v.value.clone()).unwrap_or_default(),
            entry_point: self.entry_point.as_ref().map(|h| h.value.to_string()).unwrap_or_default(),
            lists: self.lists.iter().map(KnownList::shown).collect(),
        }
    }
}

impl KnownList {
    fn update(&mut self, list: &ListHashes, at: i64) -> Vec<DriftItem> {
        let mut drift = Vec::new();
        let since = self.seen;
        let item = |what, tool: &str, before: Option<Hash>, after: Option<Hash>, parts: &[&str]| DriftItem {
            what,
            tool: tool.to_owned(),
            before: before.map(|h| h.to_string()).unwrap_or_default(),
            after: after.map(|h| h.to_string()).unwrap_or_default(),
            since,
            parts: parts.iter().map(|p| (*p).to_owned()).collect(),
        };
        let mut now = BTreeMap::new();
        for tool in list.by_name() {
            let before = self.tools.get(&tool.name);
            let known = KnownTool {
                whole: tool.whole,
                description: tool.description,
                schema: tool.schema,
                annotations: tool.annotations,
                first_seen: before.map_or(at, |b| b.first_seen),
                changed: before.filter(|b| b.whole == tool.whole).map_or(at, |b| b.changed),
            };
            match before {
                Some(before) if before.whole != tool.whole => {
                    let parts: Vec<&str> = [
                        ("description", before.description != tool.description),
                        ("schema", before.schema != tool.schema),
                        ("annotations", before.annotations != tool.annotations),
                    ]
                    .into_iter()
                    .filter_map(|(part, changed)| changed.then_some(part))
                    .collect();
                    let (before, after) = (Some(before.whole), Some(tool.whole));
                    drift.push(item(What::ToolChanged, &tool.name, before, after, &parts));
                }
                // What was not kept before may have been there all the same.
                None if !self.incomplete => {
                    drift.push(item(What::ToolAdded, &tool.name, None, Some(tool.whole), &[]));
                }
                _ => (),
            }
            now.insert(tool.name, known);
        }
        if list.incomplete {
            // The rest of the list is as it was, for all that is known.
            for (name, tool) in std::mem::take(&mut self.tools) {
                if now.len() < MAX_TOOLS {
                    now.entry(name).or_insert(tool);
                }
            }
        } else {
            for (name, tool) in self.tools.iter().filter(|(name, _)| !now.contains_key(*name)) {
                drift.push(item(What::ToolRemoved, name, Some(tool.whole), None, &[]));
            }
            self.hash = list.hash;
        }
        // Whole once is known whole.
        self.incomplete &= list.incomplete;
        self.tools = now;
        self.seen = self.seen.max(at);
        drift
    }

    fn shown(&self) -> pb::ToolList {
        let era = match self.key.modern {
            None => pb::Era::Unspecified,
            Some(false) => pb::Era::Legacy,
            Some(true) => pb::Era::Modern,
        };
        let tool = |(name, tool): (&String, &KnownTool)| pb::ListedTool {
            tool: Some(pb::Tool {
                name: name.clone(),
                hash: tool.whole.to_string(),
                description_hash: tool.description.to_string(),
                schema_hash: tool.schema.to_string(),
            }),
            first_seen_unix_ns: tool.first_seen,
            changed_unix_ns: tool.changed,
        };
        pb::ToolList {
            era: era.into(),
            capabilities_hash: self.key.capabilities.map(|h| h.to_string()).unwrap_or_default(),
            list_hash: self.hash.to_string(),
            seen_unix_ns: self.seen,
            incomplete: self.incomplete,
            tools: self.tools.iter().map(tool).collect(),
        }
    }
}
