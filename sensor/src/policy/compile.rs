//! From a checked policy to plain data that the loader writes into BPF maps.
//! Pure: what the host contributes (launchers) comes in as an argument.

use super::cidr::{self, Cidr, PortSets};
use super::diagnostic::Diagnostic;
use super::exec::{self, ExecEntry};
use super::launchers::Launchers;
use super::model::{Direction, Mode, Policy, ProfileId, ProfileKind, Rule, UnixMode};
use sensor_common::policy::{
    MAX_CIDRS, MAX_PROFILES, MAX_SERVERS, MODE_AUDIT, MODE_ENFORCE, PROFILE_NONE, PROFILE_RULES,
    PROFILE_SELF, PROFILE_UNRESTRICTED, PortSet, SERVER_HASHED, SERVER_LAUNCHES, SERVER_UNKNOWN,
    UNIX_DEFAULT, UNIX_OPEN, UNIX_STRICT,
};
use sensor_common::unix::{MAX_UNIX_RULES, POWER, POWER_SOCKETS, UnixRule};
use std::collections::HashMap;

/// Server ids. A name keeps its id over every reload, and an id never comes to
/// mean another name while the agent lives: labels of running tasks hold it.
#[derive(Clone, Debug)]
pub struct Ids {
    by_name: HashMap<String, u16>,
    next: u16,
}

impl Default for Ids {
    fn default() -> Self {
        Ids { by_name: HashMap::new(), next: SERVER_UNKNOWN + 1 }
    }
}

impl Ids {
    pub fn get(&self, name: &str) -> Option<u16> {
        if name == UNKNOWN { Some(SERVER_UNKNOWN) } else { self.by_name.get(name).copied() }
    }

    /// Takes over an id that a running kernel state already uses. False: the
    /// id or the name is taken otherwise.
    pub fn restore(&mut self, name: &str, id: u16) -> bool {
        if id <= SERVER_UNKNOWN || u32::from(id) >= MAX_SERVERS {
            return false;
        }
        if let Some(known) = self.by_name.get(name) {
            return *known == id;
        }
        if self.by_name.values().any(|known| *known == id) {
            return false;
        }
        self.by_name.insert(name.to_owned(), id);
        self.next = self.next.max(id + 1);
        true
    }

    fn assign(&mut self, name: &str) -> Option<u16> {
        if let Some(id) = self.by_name.get(name) {
            return Some(*id);
        }
        if u32::from(self.next) >= MAX_SERVERS {
            return None;
        }
        let id = self.next;
        self.next += 1;
        self.by_name.insert(name.to_owned(), id);
        Some(id)
    }
}

/// The name of server id 1.
pub const UNKNOWN: &str = "unknown";

/// Everything that one generation of maps holds; the loader adds the number.
#[derive(Clone, Debug, Default)]
pub struct Compiled {
    pub servers: Vec<(u16, String, sensor_common::policy::Server)>,
    /// The index is the profile id; 0 is `none`, 1 `unrestricted`.
    pub profiles: Vec<sensor_common::policy::Profile>,
    pub profile_names: Vec<String>,
    pub cidrs: Vec<Cidr>,
    /// The index is the id in [`Cidr::port_set`]; 0 is empty.
    pub port_sets: Vec<PortSet>,
    pub exec: Vec<ExecEntry>,
    pub unix: Vec<UnixEntry>,
    /// What each `match` entry is, by its place in the file: index is
    /// `ExecRule::priority`.
    pub matchers: Vec<MatcherInfo>,
    /// Files whose hash the policy names.
    pub hashes: Vec<FileHashes>,
    /// (from, to).
    pub launches: Vec<(u16, u16)>,
    /// Rule `id` is at index `id - 1`.
    pub rules: Vec<RuleInfo>,
}

/// One key of the unix trie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixEntry {
    /// Profile id, or [`POWER`].
    pub profile: u32,
    pub text: Vec<u8>,
    pub rule: UnixRule,
}

/// What a server was recognised by.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct MatcherInfo {
    pub server: u16,
    /// `servers[0].match[1]`.
    pub path: String,
    /// `package: @scope/name`.
    pub evidence: String,
    /// It names a hash: the executable's file must be a verified one.
    pub hashed: bool,
}

/// A file that a server is recognised by, and what it may hold: one hash for
/// each version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileHashes {
    pub server: u16,
    pub name: String,
    pub exe: String,
    pub sha256: Vec<[u8; 32]>,
    /// `servers[0].match[1]`, the first that names the file.
    pub path: String,
}

/// What a rule number in a verdict means.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct RuleInfo {
    pub id: u32,
    pub path: String,
    pub line: u32,
    pub text: String,
}

impl Compiled {
    /// `None`: 0, no rule.
    pub fn rule(&self, id: u32) -> Option<&RuleInfo> {
        self.rules.get((id as usize).checked_sub(1)?)
    }

    pub fn server(&self, name: &str) -> Option<(u16, &sensor_common::policy::Server)> {
        self.servers.iter().find(|(_, n, _)| n == name).map(|(id, _, server)| (*id, server))
    }
}

/// Nothing is half taken: on an error `ids` is as before.
pub fn compile(policy: &Policy, launchers: &Launchers, ids: &mut Ids) -> Result<Compiled, Vec<Diagnostic>> {
    let mut errors = Vec::new();
    let mut new_ids = ids.clone();
    let mut server_ids = Vec::with_capacity(policy.servers.len());
    for server in &policy.servers {
        if let Some(id) = new_ids.assign(&server.name) {
            server_ids.push(id);
            continue;
        }
        let message = format!(
            "no id left for `{}`: {} servers are declared, at most {} can be, counting those that earlier \
             policies declared since the agent started",
            server.name,
            policy.servers.len(),
            MAX_SERVERS - 2
        );
        let error = Diagnostic::error(server.position, server.path.clone(), message)
            .help("declare fewer servers; if names came and went, restart the agent");
        return Err(vec![error]);
    }
    names_are_not_enforced(policy, &mut errors);
    let mut compiled = Compiled::default();
    profiles(policy, &mut compiled, &mut errors);
    servers(policy, &server_ids, &mut compiled);
    match exec::compile(policy, &server_ids, launchers) {
        Ok(entries) => compiled.exec = entries,
        Err(more) => errors.extend(more),
    }
    if !errors.is_empty() {
        return Err(errors);
    }
    *ids = new_ids;
    Ok(compiled)
}

/// Half enforced would be worse than refused.
fn names_are_not_enforced(policy: &Policy, errors: &mut Vec<Diagnostic>) {
    let mut complain = |path: &str, position, profile: ProfileId| {
        let profile = &policy.profiles[profile];
        if let Some((rule, name)) = profile.named() {
            let message = format!(
                "profile `{}` allows host names ({}: `{name}`), which this version cannot enforce",
                profile.name, rule.path
            );
            errors.push(
                Diagnostic::error(position, path, message)
                    .help("write CIDRs instead, or `mode: audit` to record what would be denied"),
            );
        }
    };
    for server in policy.servers.iter().filter(|s| s.mode == Mode::Enforce) {
        complain(&format!("{}.profile", server.path), server.position, server.profile);
        if server.launcher_profile != server.profile {
            complain(&format!("{}.launcher_profile", server.path), server.position, server.launcher_profile);
        }
    }
    if policy.unknown.mode == Mode::Enforce {
        complain("unknown.profile", policy.unknown.position, policy.unknown.profile);
    }
}

fn profiles(policy: &Policy, compiled: &mut Compiled, errors: &mut Vec<Diagnostic>) {
    if policy.profiles.len() > MAX_PROFILES as usize {
        let message = format!("{} profiles; at most {MAX_PROFILES}", policy.profiles.len());
        errors.push(Diagnostic::error(None, "profiles", message));
        return;
    }
    let mut sets = PortSets::default();
    let nets: usize = policy.profiles.iter().map(cidr::most_entries).sum();
    compiled.cidrs.reserve(nets);
    for (id, profile) in policy.profiles.iter().enumerate() {
        let profile_id = id as u16;
        let mut entry = sensor_common::policy::Profile {
            kind: match profile.kind {
                ProfileKind::None => PROFILE_NONE,
                ProfileKind::Rules => PROFILE_RULES,
                ProfileKind::Unrestricted => PROFILE_UNRESTRICTED,
            },
            ..Default::default()
        };
        let mut numbered: Vec<(u32, &Rule)> = Vec::with_capacity(profile.rules.len());
        for rule in &profile.rules {
            let number = number(&mut compiled.rules, &rule.path, rule.position, rule.text());
            numbered.push((number, rule));
            if rule.own_instance && entry.self_rule == 0 {
                entry.flags |= PROFILE_SELF;
                entry.self_rule = number;
            }
        }
        for direction in [Direction::Egress, Direction::Inbound] {
            let rules: Vec<(u32, &Rule)> =
                numbered.iter().filter(|(_, r)| r.direction == direction).copied().collect();
            let code = direction.code();
            if let Err(e) = cidr::compile(profile_id, code, &rules, &mut sets, &mut compiled.cidrs) {
                let path = format!("profiles.{}", profile.name);
                errors.push(Diagnostic::error(profile.position, path, e.to_string()));
            }
            sets.forget_merged();
        }
        for name in &profile.unix {
            let rule =
                number(&mut compiled.rules, &name.path, name.position, format!("unix: {}", name.written));
            let text = name.key.clone();
            compiled.unix.push(UnixEntry { profile: id as u32, text, rule: UnixRule { rule } });
        }
        compiled.profiles.push(entry);
        compiled.profile_names.push(profile.name.clone());
    }
    compiled.port_sets = sets.sets;
    power_sockets(&mut compiled.unix);
    // The map of unix sockets holds two generations while one replaces the other.
    for (what, have, most) in [
        ("CIDRs", compiled.cidrs.len(), MAX_CIDRS as usize),
        ("unix sockets", compiled.unix.len(), MAX_UNIX_RULES as usize / 2),
    ] {
        if have > most {
            let message = format!("{have} {what} in all profiles; at most {most}");
            errors.push(Diagnostic::error(None, "profiles", message));
        }
    }
}

fn number(
    rules: &mut Vec<RuleInfo>,
    path: &str,
    position: Option<super::diagnostic::Position>,
    text: String,
) -> u32 {
    let id = rules.len() as u32 + 1;
    rules.push(RuleInfo { id, path: path.to_owned(), line: position.map_or(0, |p| p.line), text });
    id
}

fn power_sockets(unix: &mut Vec<UnixEntry>) {
    for name in POWER_SOCKETS {
        let mut text = name.strip_suffix('*').unwrap_or(name).as_bytes().to_vec();
        if text.first() == Some(&b'@') {
            text[0] = 0;
        }
        if !name.ends_with('*') {
            text.push(0);
        }
        unix.push(UnixEntry { profile: POWER, text, rule: UnixRule { rule: 0 } });
    }
}

fn servers(policy: &Policy, ids: &[u16], compiled: &mut Compiled) {
    let entry =
        |mode, unix, profile: ProfileId, launcher: ProfileId, flags: u8| sensor_common::policy::Server {
            valid: 1,
            mode: match mode {
                Mode::Audit => MODE_AUDIT,
                Mode::Enforce => MODE_ENFORCE,
            },
            unix: match unix {
                UnixMode::Default => UNIX_DEFAULT,
                UnixMode::Strict => UNIX_STRICT,
                UnixMode::Open => UNIX_OPEN,
            },
            flags,
            profile: profile as u16,
            launcher_profile: launcher as u16,
        };
    let unknown = &policy.unknown;
    compiled.servers.push((
        SERVER_UNKNOWN,
        UNKNOWN.to_owned(),
        entry(unknown.mode, unknown.unix, unknown.profile, unknown.profile, 0),
    ));
    for (server, id) in policy.servers.iter().zip(ids) {
        let hashes = file_hashes(server, *id);
        let mut flags = 0;
        if !server.may_launch.is_empty() {
            flags |= SERVER_LAUNCHES;
        }
        if !hashes.is_empty() {
            flags |= SERVER_HASHED;
        }
        let value = entry(server.mode, server.unix, server.profile, server.launcher_profile, flags);
        compiled.hashes.extend(hashes);
        compiled.servers.push((*id, server.name.clone(), value));
        compiled.matchers.extend(server.matches.iter().map(|matcher| MatcherInfo {
            server: *id,
            path: matcher.path.clone(),
            evidence: matcher.evidence(),
            hashed: matcher.sha256.is_some(),
        }));
        compiled.launches.extend(server.may_launch.iter().map(|to| (*id, ids[*to])));
    }
}

fn file_hashes(server: &super::model::Server, id: u16) -> Vec<FileHashes> {
    let mut files: Vec<FileHashes> = Vec::new();
    for matcher in &server.matches {
        let (Some(exe), Some(hash)) = (&matcher.exe, matcher.sha256) else { continue };
        match files.iter_mut().find(|file| file.exe == *exe) {
            Some(file) => file.sha256.push(hash),
            None => files.push(FileHashes {
                server: id,
                name: server.name.clone(),
                exe: exe.clone(),
                sha256: vec![hash],
                path: matcher.path.clone(),
            }),
        }
    }
    files
}
