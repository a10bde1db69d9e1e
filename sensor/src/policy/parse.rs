//! From bytes to a checked [`Policy`]: everything wrong with the file is found
//! in one pass, and nothing of a wrong file is taken.

use super::address::AddressError;
use super::diagnostic::{Diagnostic, Position, Severity};
use super::file::{File, ProfileReference, RawProfile, RawServer};
use super::model::{
    LauncherGlob, Mode, NONE, Policy, Profile, ProfileId, ProfileKind, Resolver, Server, UNRESTRICTED,
    UnixMode, UnixName, Unknown,
};
use super::names::NamePattern;
use super::{address, matching, rules, toolhive, tools};
use serde::de::DeserializeOwned;
use serde_saphyr::{MessageFormatter, Spanned};
use std::collections::HashMap;
use std::net::IpAddr;

/// Largest policy file.
pub const MAX_BYTES: usize = 64 << 20;
/// Findings that are kept.
const MAX_FINDINGS: usize = 1000;
/// Resolvers in one list.
pub const MAX_RESOLVERS: usize = 16;
/// Search domains.
pub const MAX_SEARCH: usize = 16;
/// Longest name of a server or profile.
const MAX_NAME: usize = 128;

/// Reads what a policy file names (ToolHive profiles): path as written → bytes.
pub type ReadFile<'a> = &'a dyn Fn(&str) -> Result<Vec<u8>, String>;

/// A policy that stands alone; one that names other files is refused.
pub fn parse_bytes(bytes: &[u8]) -> Result<Policy, Vec<Diagnostic>> {
    parse_with(bytes, &|_| Err("only a policy that is read from a file can name other files".to_owned()))
}

pub fn parse_with(bytes: &[u8], read: ReadFile<'_>) -> Result<Policy, Vec<Diagnostic>> {
    let file: File = document(bytes, MAX_BYTES)?;
    let mut checker = Checker::default();
    let mut policy =
        Reader { checker: &mut checker, read, policy: Policy::default(), by_name: HashMap::new() }
            .resolve(&file);
    let (warnings, errors) = checker.finish();
    if !errors.is_empty() {
        return Err(errors);
    }
    policy.warnings = warnings;
    Ok(policy)
}

/// One YAML (or JSON) document with bounds on everything that can grow.
pub fn document<T: DeserializeOwned>(bytes: &[u8], most: usize) -> Result<T, Vec<Diagnostic>> {
    if bytes.len() > most {
        let message = format!("{} bytes; at most {most} are read", bytes.len());
        return Err(vec![Diagnostic::error(None, "", message)]);
    }
    let text = std::str::from_utf8(bytes).map_err(|e| {
        let before = &bytes[..e.valid_up_to()];
        let line = before.iter().filter(|b| **b == b'\n').count() + 1;
        let column = before.iter().rev().take_while(|b| **b != b'\n').count() + 1;
        let position = Position { line: line as u32, column: column as u32 };
        vec![Diagnostic::error(Some(position), "", "not UTF-8").help("save the file as UTF-8")]
    })?;
    if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
        return Err(vec![Diagnostic::error(None, "", "the file is empty").help("begin with `version: 1`")]);
    }
    let budget = serde_saphyr::budget! {
        max_events: 16_000_000,
        max_nodes: 8_000_000,
        max_depth: 16,
        flow_nesting_limit: 16,
        max_documents: 1,
        max_anchors: 1_000,
        max_aliases: 10_000,
        max_merge_keys: 0,
    };
    let alias_limits = serde_saphyr::alias_limits! {
        max_total_replayed_events: 200_000,
        max_replay_stack_depth: 8,
    };
    let options = serde_saphyr::options! {
        budget: budget,
        alias_limits: alias_limits,
        merge_keys: serde_saphyr::MergeKeyPolicy::Error,
        strict_booleans: true,
        reject_unsupported_tags: true,
        with_snippet: false,
        emit_comments: false,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|e| {
        let position = e.location().and_then(Position::of);
        let message = serde_saphyr::UserMessageFormatter.format_message(e.without_snippet());
        vec![Diagnostic::error(position, "", message)]
    })
}

/// Where a value stands.
pub fn at<T>(value: &Spanned<T>) -> Option<Position> {
    Position::of(value.referenced)
}

/// Collects what is wrong.
#[derive(Default)]
pub struct Checker {
    findings: Vec<Diagnostic>,
    more: usize,
    /// The file being read, where it is not the policy.
    file: Option<String>,
}

impl Checker {
    pub fn error(
        &mut self,
        position: Option<Position>,
        path: impl Into<String>,
        message: impl Into<String>,
    ) -> &mut Diagnostic {
        self.push(Diagnostic::error(position, path, message))
    }

    pub fn warning(
        &mut self,
        position: Option<Position>,
        path: impl Into<String>,
        message: impl Into<String>,
    ) -> &mut Diagnostic {
        self.push(Diagnostic::warning(position, path, message))
    }

    pub fn address(&mut self, position: Option<Position>, path: String, error: AddressError) {
        self.error(position, path, error.message).help = error.help;
    }

    fn push(&mut self, mut finding: Diagnostic) -> &mut Diagnostic {
        finding.file.clone_from(&self.file);
        if self.findings.len() >= MAX_FINDINGS {
            self.more += 1;
            // Errors must survive: one more than the limit tells of the rest.
            self.findings.truncate(MAX_FINDINGS);
        }
        self.findings.push(finding);
        let last = self.findings.len() - 1;
        &mut self.findings[last]
    }

    /// (warnings, errors), in the order of the file.
    pub fn finish(mut self) -> (Vec<Diagnostic>, Vec<Diagnostic>) {
        if self.more > 0 {
            let message = format!("{} more findings are not listed", self.more);
            self.findings.push(Diagnostic::error(None, "", message));
        }
        self.findings.sort_by_key(|f| (f.file.clone(), f.position));
        self.findings.into_iter().partition(|f| f.severity == Severity::Warning)
    }
}

struct Reader<'a> {
    checker: &'a mut Checker,
    read: ReadFile<'a>,
    policy: Policy,
    by_name: HashMap<String, ProfileId>,
}

impl Reader<'_> {
    fn resolve(mut self, file: &File) -> Policy {
        if file.version.value != 1 {
            let message = format!("version {} is not known", file.version.value);
            self.checker.error(at(&file.version), "version", message).help =
                Some("this mcp-sensor reads version 1".to_owned());
            return self.policy;
        }
        for (id, name, kind) in
            [(NONE, "none", ProfileKind::None), (UNRESTRICTED, "unrestricted", ProfileKind::Unrestricted)]
        {
            self.by_name.insert(name.to_owned(), id);
            self.policy.profiles.push(Profile::builtin(name, kind));
        }
        for (name, raw) in &file.profiles.0 {
            let path = format!("profiles.{}", name.value.escape_debug());
            self.name(name, &path);
            if let ("none" | "unrestricted", position) = (name.value.as_str(), at(name)) {
                self.checker.error(position, path, "a built-in profile cannot be declared again");
                continue;
            }
            let mut profile = self.profile(raw, &path, at(name));
            profile.name.clone_from(&name.value);
            self.by_name.insert(name.value.clone(), self.policy.profiles.len());
            self.policy.profiles.push(profile);
        }
        self.policy.resolvers = file.resolvers.as_ref().map(|list| self.resolvers(list, "resolvers"));
        self.policy.search = file.search.as_ref().map(|list| self.search(list));
        self.servers(&file.servers);
        if let Some(raw) = &file.unknown {
            self.policy.unknown = Unknown {
                declared: true,
                profile: raw.profile.as_ref().map_or(NONE, |p| self.reference(p, "unknown.profile")),
                mode: self.mode(raw.mode.as_ref(), "unknown.mode"),
                unix: self.unix_mode(raw.unix.as_ref(), "unknown.unix"),
                messages: tools::check(
                    self.checker,
                    &tools::Raw {
                        tools: raw.tools.as_ref(),
                        on_violation: raw.on_violation.as_ref(),
                        capture: raw.capture.as_ref(),
                    },
                    "unknown",
                ),
                position: raw.profile.as_ref().and_then(at),
            };
        }
        for (index, glob) in file.launchers.iter().enumerate() {
            let path = format!("launchers[{index}]");
            if !glob.value.starts_with('/') || glob.value.chars().any(char::is_control) {
                self.checker.error(at(glob), path, "a launcher is an absolute path or glob");
            } else if glob.value.contains("**") {
                self.checker.error(at(glob), path, "`**` would search whole trees").help =
                    Some("write one `*` for each directory".to_owned());
            } else if let Err(e) = glob::Pattern::new(&glob.value) {
                self.checker.error(at(glob), path, format!("not a glob: {e}"));
            } else {
                self.policy.launchers.push(LauncherGlob {
                    glob: glob.value.clone(),
                    path,
                    position: at(glob),
                });
            }
        }
        self.policy
    }

    fn name(&mut self, name: &Spanned<String>, path: &str) {
        let text = &name.value;
        if !is_name(text) {
            self.checker.error(at(name), path, format!("`{}` is not a name", text.escape_debug())).help =
                Some(format!("letters, digits, `.`, `_`, `-`, `/` and `@`, at most {MAX_NAME} bytes"));
        }
    }

    fn servers(&mut self, servers: &[Spanned<RawServer>]) {
        let mut index_of: HashMap<&str, usize> = HashMap::new();
        for (index, raw) in servers.iter().enumerate() {
            let path = format!("servers[{index}]");
            let server = &raw.value;
            self.name(&server.name, &format!("{path}.name"));
            if server.name.value == "unknown" {
                self.checker.error(at(&server.name), format!("{path}.name"), "`unknown` is built in").help =
                    Some("use the top-level key `unknown`".to_owned());
            } else if index_of.insert(&server.name.value, index).is_some() {
                let message = format!("a second server `{}`", server.name.value);
                self.checker.error(at(&server.name), format!("{path}.name"), message).help =
                    Some("one server takes several `match` entries".to_owned());
            }
        }
        for (index, raw) in servers.iter().enumerate() {
            let path = format!("servers[{index}]");
            let server = &raw.value;
            let profile = self.reference(&server.profile, &format!("{path}.profile"));
            let launcher_path = format!("{path}.launcher_profile");
            let launcher =
                server.launcher_profile.as_ref().map_or(profile, |p| self.reference(p, &launcher_path));
            let mut may_launch = Vec::new();
            for (n, name) in server.may_launch.iter().enumerate() {
                match index_of.get(name.value.as_str()) {
                    Some(other) if *other == index => {
                        let here = format!("{path}.may_launch[{n}]");
                        self.checker.error(at(name), here, "a server always starts itself");
                    }
                    Some(other) => may_launch.push(*other),
                    None => {
                        let here = format!("{path}.may_launch[{n}]");
                        self.checker.error(at(name), here, format!("no server `{}`", name.value));
                    }
                }
            }
            let own = server.resolvers.as_ref().map(|l| self.resolvers(l, &format!("{path}.resolvers")));
            let resolvers = own.or_else(|| self.policy.resolvers.clone());
            let mut matches = Vec::new();
            for (n, entry) in server.matches.iter().enumerate() {
                let here = format!("{path}.match[{n}]");
                matches.extend(matching::check(self.checker, &entry.value, here, at(entry)));
            }
            let messages = tools::Raw {
                tools: server.tools.as_ref(),
                on_violation: server.on_violation.as_ref(),
                capture: server.capture.as_ref(),
            };
            let server = Server {
                name: server.name.value.clone(),
                profile,
                launcher_profile: launcher,
                mode: self.mode(server.mode.as_ref(), &format!("{path}.mode")),
                unix: self.unix_mode(server.unix.as_ref(), &format!("{path}.unix")),
                matches,
                may_launch,
                resolvers,
                messages: tools::check(self.checker, &messages, &path),
                path,
                position: at(&server.name),
            };
            self.policy.servers.push(server);
        }
    }

    fn resolvers(&mut self, list: &Spanned<Vec<Spanned<String>>>, path: &str) -> Vec<Resolver> {
        let mut resolvers: Vec<Resolver> = Vec::new();
        if list.value.is_empty() {
            self.checker.error(at(list), path, "an empty list of resolvers").help =
                Some("leave `resolvers` out for those of the host".to_owned());
        }
        if let Some(more) = list.value.get(MAX_RESOLVERS) {
            let message = format!("{} resolvers; at most {MAX_RESOLVERS}", list.value.len());
            self.checker.error(at(more), path, message);
        }
        for (index, text) in list.value.iter().take(MAX_RESOLVERS).enumerate() {
            let (here, position) = (format!("{path}[{index}]"), at(text));
            let Ok(addr) = text.value.parse::<IpAddr>() else {
                let message = format!("`{}` is not an IP address", text.value.escape_debug());
                self.checker.error(position, here, message);
                continue;
            };
            let group = addr.is_multicast() || addr == IpAddr::from(std::net::Ipv4Addr::BROADCAST);
            match address::net(&text.value) {
                Some(Err(e)) => self.checker.address(position, here, e),
                _ if group => {
                    let message = format!("`{addr}` is no resolver but a group of hosts");
                    self.checker.error(position, here, message);
                }
                _ if resolvers.iter().any(|r| r.addr == addr) => {
                    self.checker.error(position, here, format!("`{addr}` stands here twice"));
                }
                _ => resolvers.push(Resolver { addr, path: here, position }),
            }
        }
        resolvers
    }

    fn search(&mut self, list: &Spanned<Vec<Spanned<String>>>) -> Vec<String> {
        if let Some(more) = list.value.get(MAX_SEARCH) {
            let message = format!("{} search domains; at most {MAX_SEARCH}", list.value.len());
            self.checker.error(at(more), "search", message);
        }
        let mut domains: Vec<String> = Vec::new();
        for (index, text) in list.value.iter().take(MAX_SEARCH).enumerate() {
            let here = format!("search[{index}]");
            match NamePattern::parse(&text.value) {
                Ok(name) if name.below => {
                    self.checker.error(at(text), here, "a search domain is one name, without `*`");
                }
                Ok(name) if domains.contains(&name.name) => {
                    self.checker.error(at(text), here, format!("`{name}` stands here twice"));
                }
                Ok(name) => domains.push(name.name),
                Err(e) => {
                    self.checker.error(at(text), here, format!("`{}`: {e}", text.value.escape_debug()));
                }
            }
        }
        domains
    }

    fn mode(&mut self, mode: Option<&Spanned<String>>, path: &str) -> Mode {
        match mode.map(|m| m.value.as_str()) {
            None | Some("audit") => Mode::Audit,
            Some("enforce") => Mode::Enforce,
            Some(other) => {
                let message = format!("`{}` is no mode", other.escape_debug());
                self.checker.error(mode.and_then(at), path, message).help =
                    Some("write `enforce` or `audit`".to_owned());
                Mode::Enforce
            }
        }
    }

    fn unix_mode(&mut self, mode: Option<&Spanned<String>>, path: &str) -> UnixMode {
        match mode.map(|m| m.value.as_str()) {
            None | Some("default") => UnixMode::Default,
            Some("strict") => UnixMode::Strict,
            Some("open") => UnixMode::Open,
            Some(other) => {
                let message = format!("`{}` is no way to treat unix sockets", other.escape_debug());
                self.checker.error(mode.and_then(at), path, message).help =
                    Some("write `default`, `strict` or `open`".to_owned());
                UnixMode::Strict
            }
        }
    }

    fn reference(&mut self, reference: &Spanned<ProfileReference>, path: &str) -> ProfileId {
        let position = at(reference);
        let mut profile = match &reference.value {
            ProfileReference::Text(name) => {
                if let Some(id) = self.by_name.get(name) {
                    return *id;
                }
                if !name.contains('/') && !name.ends_with(".json") {
                    let message = format!("no profile `{}`", name.escape_debug());
                    self.checker.error(position, path, message).help = Some(
                        "declare it under `profiles`, or use `none`, `unrestricted` or the path of a \
                         ToolHive profile"
                            .to_owned(),
                    );
                    return NONE;
                }
                let Some(profile) = self.toolhive_file(name, path, position) else { return NONE };
                // The same file again is the same profile.
                self.by_name.insert(name.clone(), self.policy.profiles.len());
                Profile { name: name.clone(), ..profile }
            }
            ProfileReference::Inline(raw) => {
                Profile { name: path.to_owned(), ..self.profile(raw, path, position) }
            }
        };
        profile.position = position;
        self.policy.profiles.push(profile);
        self.policy.profiles.len() - 1
    }

    fn profile(&mut self, raw: &RawProfile, path: &str, position: Option<Position>) -> Profile {
        let native = raw.egress.is_some() || raw.inbound.is_some();
        let in_place = raw.network.is_some()
            || raw.name.is_some()
            || raw.read.is_some()
            || raw.write.is_some()
            || raw.privileged.is_some();
        let refused = Profile { position, ..Profile::builtin("", ProfileKind::None) };
        let mut profile = match (&raw.toolhive, in_place) {
            (Some(_), true) => {
                let help = "keep either `toolhive: FILE` or the profile itself";
                self.checker.error(position, path, "a ToolHive profile twice").help = Some(help.to_owned());
                return refused;
            }
            (Some(_), false) | (None, true) if native => {
                let message = "`egress` and `inbound` do not mix with a ToolHive profile";
                self.checker.error(position, path, message).help =
                    Some("put them into a profile of their own".to_owned());
                return refused;
            }
            (Some(file), false) => {
                let here = format!("{path}.toolhive");
                let Some(profile) = self.toolhive_file(&file.value, &here, at(file)) else { return refused };
                profile
            }
            (None, true) => {
                let permissions = toolhive::RawPermissions {
                    name: raw.name.clone(),
                    read: raw.read.clone(),
                    write: raw.write.clone(),
                    privileged: raw.privileged.clone(),
                    network: raw
                        .network
                        .as_ref()
                        .map(|n| Spanned::new(n.value.clone(), n.referenced, n.defined)),
                };
                let Some(profile) = toolhive::convert(self.checker, path, &permissions, position) else {
                    return refused;
                };
                profile
            }
            (None, false) => self.native(raw, path, position),
        };
        for (index, name) in raw.unix.iter().flatten().enumerate() {
            let here = format!("{path}.unix[{index}]");
            match rules::unix_key(&name.value) {
                Ok(key) => profile.unix.push(UnixName {
                    written: name.value.clone(),
                    key,
                    path: here,
                    position: at(name),
                }),
                Err(message) => {
                    self.checker.error(at(name), here, message);
                }
            }
        }
        profile
    }

    fn toolhive_file(&mut self, name: &str, path: &str, position: Option<Position>) -> Option<Profile> {
        let bytes = match (self.read)(name) {
            Ok(bytes) => bytes,
            Err(e) => {
                self.checker.error(position, path, format!("{name}: {e}"));
                return None;
            }
        };
        let found = match toolhive::parse(&bytes) {
            Ok((profile, warnings)) => {
                for mut warning in warnings {
                    warning.file = Some(name.to_owned());
                    self.checker.findings.push(warning);
                }
                Some(profile)
            }
            Err(errors) => {
                for mut error in errors {
                    error.file = Some(name.to_owned());
                    self.checker.findings.push(error);
                }
                None
            }
        };
        found.map(|mut profile| {
            for rule in &mut profile.rules {
                rule.path = format!("{name}: {}", rule.path);
            }
            profile
        })
    }

    fn native(&mut self, raw: &RawProfile, path: &str, position: Option<Position>) -> Profile {
        let mut rules = Vec::new();
        for (index, rule) in raw.egress.iter().flatten().enumerate() {
            rules.push(rules::egress(self.checker, &rule.value, format!("{path}.egress[{index}]"), at(rule)));
        }
        for (index, rule) in raw.inbound.iter().flatten().enumerate() {
            rules.push(rules::inbound(
                self.checker,
                &rule.value,
                format!("{path}.inbound[{index}]"),
                at(rule),
            ));
        }
        Profile { rules, position, ..Profile::builtin("", ProfileKind::Rules) }
    }
}

/// Whether a server or a profile may be called that.
pub fn is_name(text: &str) -> bool {
    let good = |c: char| c.is_alphanumeric() || "._-/@".contains(c);
    !text.is_empty() && text.len() <= MAX_NAME && text.chars().all(good)
}
