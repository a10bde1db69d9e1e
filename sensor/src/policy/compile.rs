//! From a checked policy to plain data that the loader writes into BPF maps.
//! Pure: what the host contributes (launchers) comes in as an argument.

use super::cidr::{self, Cidr};
use super::diagnostic::Diagnostic;
use super::exec::{self, ExecEntry};
use super::host::Host;
use super::model::{Direction, Mode, Policy, Profile, ProfileId, ProfileKind, Resolver, Rule, UnixMode};
use super::name_keys;
use super::ports::PortSets;
use super::tools::{Capture, Messages, OnViolation, ToolVerdict};
use super::variants::{Variant, Variants};
use sensor_common::policy::{
    MAX_CIDRS, MAX_PROFILES, MODE_AUDIT, MODE_ENFORCE, PROFILE_NAMES, PROFILE_NONE, PROFILE_RULES,
    PROFILE_SELF, PROFILE_UNRESTRICTED, PortSet, SERVER_CANARY, SERVER_HASHED, SERVER_LAUNCHES,
    SERVER_UNKNOWN, UNIX_DEFAULT, UNIX_OPEN, UNIX_STRICT,
};
use sensor_common::unix::{MAX_UNIX_RULES, POWER, POWER_SOCKETS, UnixRule};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

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
        if id <= SERVER_UNKNOWN || id >= SERVER_CANARY {
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
        if self.next >= SERVER_CANARY {
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
    /// The profile of the policy that each is made from: one with names is
    /// compiled once for each list of resolvers.
    pub profile_of: Vec<ProfileId>,
    /// Profiles that allow names and know no resolver: they reach none of them.
    pub unresolved: BTreeSet<u16>,
    pub cidrs: Vec<Cidr>,
    /// The index is the id in [`Cidr::port_set`]; 0 is empty.
    pub port_sets: Vec<PortSet>,
    pub exec: Vec<ExecEntry>,
    pub unix: Vec<UnixEntry>,
    pub names: Vec<NameEntry>,
    /// What each `match` entry is, by its place in the file: index is
    /// `ExecRule::priority`.
    pub matchers: Vec<MatcherInfo>,
    /// Files whose hash the policy names.
    pub hashes: Vec<FileHashes>,
    /// (from, to).
    pub launches: Vec<(u16, u16)>,
    /// Rule `id` is at index `id - 1`.
    pub rules: Vec<RuleInfo>,
    /// What is said of messages, by server id. No map holds it: the agent asks.
    pub messages: BTreeMap<u16, Messages>,
    /// What is allowed and will surprise somebody.
    pub warnings: Vec<Diagnostic>,
}

/// One key of the unix trie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixEntry {
    /// Profile id, or [`POWER`].
    pub profile: u32,
    pub text: Vec<u8>,
    pub rule: UnixRule,
}

/// One key of the trie of names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameEntry {
    pub profile: u16,
    /// As `sensor_common::name::turned` makes it.
    pub text: Vec<u8>,
    pub rule: sensor_common::name::NameRule,
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

    /// Whether a server's client may call a tool. What an id means that the
    /// policy no longer declares is not restricted.
    pub fn tool_verdict(&self, server: u16, tool: &str) -> ToolVerdict<'_> {
        self.messages.get(&server).map_or(ToolVerdict::Allowed, |m| m.verdict(tool))
    }

    /// What a forbidden call brings where the server is in `enforce`; in `audit`
    /// it is only reported, whatever this says.
    pub fn on_violation(&self, server: u16) -> OnViolation {
        self.messages.get(&server).map(|m| m.on_violation).unwrap_or_default()
    }

    pub fn capture(&self, server: u16) -> Capture {
        self.messages.get(&server).map(|m| m.capture).unwrap_or_default()
    }

    pub fn server(&self, name: &str) -> Option<(u16, &sensor_common::policy::Server)> {
        self.servers.iter().find(|(_, n, _)| n == name).map(|(id, _, server)| (*id, server))
    }
}

/// Nothing is half taken: on an error `ids` is as before.
pub fn compile(policy: &Policy, host: &Host, ids: &mut Ids) -> Result<Compiled, Vec<Diagnostic>> {
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
            SERVER_CANARY - 2
        );
        let error = Diagnostic::error(server.position, server.path.clone(), message)
            .help("declare fewer servers; if names came and went, restart the agent");
        return Err(vec![error]);
    }
    let mut compiled = Compiled::default();
    let mut variants = Variants::new(policy, host);
    servers(policy, &server_ids, &mut variants, &mut compiled);
    profiles(policy, host, &variants.list, &mut compiled, &mut errors);
    without_resolvers(policy, host, &mut compiled, &mut errors);
    match exec::compile(policy, &server_ids, &host.launchers) {
        Ok(entries) => compiled.exec = entries,
        Err(more) => errors.extend(more),
    }
    if !errors.is_empty() {
        return Err(errors);
    }
    *ids = new_ids;
    Ok(compiled)
}

/// Names that cannot be asked for cannot be reached: worse than an error, since
/// the server would fail in ways that say nothing of it.
fn without_resolvers(policy: &Policy, host: &Host, compiled: &mut Compiled, errors: &mut Vec<Diagnostic>) {
    let why = host.dns.problem.as_deref().unwrap_or("the policy lists none");
    let mut findings = Vec::new();
    // The first is `unknown`.
    let declared = std::iter::once(None).chain(policy.servers.iter().map(Some));
    for ((_, _, entry), declared) in compiled.servers.iter().zip(declared) {
        let (mode, position, path) = match declared {
            Some(server) => (server.mode, server.position, server.path.as_str()),
            None => (policy.unknown.mode, policy.unknown.position, UNKNOWN),
        };
        let mut roles = vec![("profile", entry.profile)];
        if entry.launcher_profile != entry.profile {
            roles.push(("launcher_profile", entry.launcher_profile));
        }
        for (key, id) in roles.into_iter().filter(|(_, id)| compiled.unresolved.contains(id)) {
            let profile = &policy.profiles[compiled.profile_of[usize::from(id)]];
            let Some((rule, name)) = profile.named() else { continue };
            let message = format!(
                "profile `{}` allows host names ({}: `{name}`), and no resolver is known to ask for them: {why}",
                profile.name, rule.path
            );
            let path = format!("{path}.{key}");
            let finding = match mode {
                Mode::Enforce => Diagnostic::error(position, path, message),
                Mode::Audit => Diagnostic::warning(position, path, message),
            };
            findings.push((mode, finding.help(
                "write `resolvers: [ADDRESS, …]` at the top of the policy or for the server: the addresses that \
                 `nameserver` lines of its resolv.conf hold",
            )));
        }
    }
    for (mode, finding) in findings {
        match mode {
            Mode::Enforce => errors.push(finding),
            Mode::Audit => compiled.warnings.push(finding),
        }
    }
}

fn profiles(
    policy: &Policy,
    host: &Host,
    variants: &[Variant],
    compiled: &mut Compiled,
    errors: &mut Vec<Diagnostic>,
) {
    if variants.len() > MAX_PROFILES as usize {
        let more = match variants.len() - policy.profiles.len() {
            0 => String::new(),
            n => format!(" ({n} of them for servers with resolvers of their own)"),
        };
        let message = format!("{} profiles{more}; at most {MAX_PROFILES}", variants.len());
        errors.push(Diagnostic::error(None, "profiles", message));
        return;
    }
    let mut sets = PortSets::default();
    let nets: usize = policy.profiles.iter().map(cidr::most_entries).sum();
    compiled.cidrs.reserve(nets);
    let search = policy.search.as_ref().unwrap_or(&host.dns.search);
    // Numbers of the rules, which variants of a profile share.
    let mut numbers: Vec<Option<(u32, u32)>> = vec![None; policy.profiles.len()];
    for (id, variant) in variants.iter().enumerate() {
        let profile_id = id as u16;
        let profile = &policy.profiles[variant.profile];
        let mut entry = sensor_common::policy::Profile {
            kind: match profile.kind {
                ProfileKind::None => PROFILE_NONE,
                ProfileKind::Rules => PROFILE_RULES,
                ProfileKind::Unrestricted => PROFILE_UNRESTRICTED,
            },
            ..Default::default()
        };
        let (first_rule, first_unix) = *numbers[variant.profile].get_or_insert_with(|| {
            let first = compiled.rules.len() as u32 + 1;
            for rule in &profile.rules {
                number(&mut compiled.rules, &rule.path, rule.position, rule.text());
            }
            let unix = compiled.rules.len() as u32 + 1;
            for name in &profile.unix {
                let text = format!("unix: {}", name.written);
                number(&mut compiled.rules, &name.path, name.position, text);
            }
            (first, unix)
        });
        let numbered: Vec<(u32, &Rule)> = (first_rule..).zip(&profile.rules).collect();
        if let Some((number, _)) = numbered.iter().find(|(_, rule)| rule.own_instance) {
            entry.flags |= PROFILE_SELF;
            entry.self_rule = *number;
        }
        let mut complain = |message: String| {
            let path = format!("profiles.{}", profile.name);
            errors.push(Diagnostic::error(profile.position, path, message));
        };
        let mut pinned: Vec<(u32, IpAddr)> = Vec::new();
        for resolver in &variant.resolvers {
            let text = format!("resolvers: {}", resolver.addr);
            let number = number(&mut compiled.rules, &resolver.path, resolver.position, text);
            pinned.push((number, resolver.addr));
        }
        for direction in [Direction::Egress, Direction::Inbound] {
            let rules: Vec<(u32, &Rule)> =
                numbered.iter().filter(|(_, r)| r.direction == direction).copied().collect();
            let pinned = if direction == Direction::Egress { pinned.as_slice() } else { &[] };
            let code = direction.code();
            if let Err(e) = cidr::compile(profile_id, code, &rules, pinned, &mut sets, &mut compiled.cidrs) {
                complain(e.to_string());
            }
            sets.forget_merged();
            if direction == Direction::Egress && profile.has_names() {
                entry.flags |= PROFILE_NAMES;
                if let Err(e) = name_keys::compile(profile_id, &rules, search, &mut sets, &mut compiled.names)
                {
                    complain(e.to_string());
                }
                sets.forget_merged();
                if pinned.is_empty() {
                    compiled.unresolved.insert(profile_id);
                }
            }
        }
        if id == variant.profile {
            compiled.warnings.extend(stays_inspected(profile, &variant.resolvers));
        }
        for (rule, name) in (first_unix..).zip(&profile.unix) {
            let text = name.key.clone();
            compiled.unix.push(UnixEntry { profile: id as u32, text, rule: UnixRule { rule } });
        }
        compiled.profiles.push(entry);
        compiled.profile_names.push(profile.name.clone());
        compiled.profile_of.push(variant.profile);
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

/// A rule for a resolver's address reads as if DNS were free.
fn stays_inspected(profile: &Profile, resolvers: &[Resolver]) -> Option<Diagnostic> {
    let meets = |rule: &Rule| {
        let dns = rule.direction == Direction::Egress && rule.ports.iter().any(|ports| ports.contains(&53));
        resolvers.iter().find(|r| dns && rule.nets.iter().any(|net| net.contains(&r.addr)))
    };
    let mut rules = profile.rules.iter().filter_map(|rule| Some((rule, meets(rule)?)));
    let (rule, resolver) = rules.next()?;
    let more = match rules.count() {
        0 => String::new(),
        n => format!(" (and {n} more of the profile)"),
    };
    let message = format!(
        "port 53 of {} stays inspected, since it is a pinned resolver of a profile with host names: only the \
         names of the profile are asked there, whatever this rule{more} says",
        resolver.addr
    );
    // A rule of another file has its name in front.
    let (file, path) = match rule.path.split_once(": ") {
        Some((file, path)) => (Some(file.to_owned()), path),
        None => (None, rule.path.as_str()),
    };
    Some(Diagnostic { file, ..Diagnostic::warning(rule.position, path, message) })
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

fn servers(policy: &Policy, ids: &[u16], variants: &mut Variants, compiled: &mut Compiled) {
    let entry = |mode, unix, profile: usize, launcher: usize, flags: u8| sensor_common::policy::Server {
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
    let profile = variants.of(policy, unknown.profile, policy.resolvers.as_deref());
    compiled.servers.push((
        SERVER_UNKNOWN,
        UNKNOWN.to_owned(),
        entry(unknown.mode, unknown.unix, profile, profile, 0),
    ));
    compiled.messages.insert(SERVER_UNKNOWN, unknown.messages.clone());
    for (server, id) in policy.servers.iter().zip(ids) {
        compiled.messages.insert(*id, server.messages.clone());
        let resolvers = server.resolvers.as_deref();
        let profile = variants.of(policy, server.profile, resolvers);
        let launcher = variants.of(policy, server.launcher_profile, resolvers);
        let hashes = file_hashes(server, *id);
        let mut flags = 0;
        if !server.may_launch.is_empty() {
            flags |= SERVER_LAUNCHES;
        }
        if !hashes.is_empty() {
            flags |= SERVER_HASHED;
        }
        let value = entry(server.mode, server.unix, profile, launcher, flags);
        compiled.hashes.extend(hashes);
        compiled.servers.push((*id, server.name.clone(), value));
        compiled.launches.extend(server.may_launch.iter().map(|to| (*id, ids[*to])));
    }
    compiled.matchers.extend(policy.matchers().map(|(server, matcher)| MatcherInfo {
        server: ids[server],
        path: matcher.path.clone(),
        evidence: matcher.evidence(),
        hashed: matcher.sha256.is_some(),
    }));
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
