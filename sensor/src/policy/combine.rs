//! A policy from a bundle and the host's own, at once: what is allowed is what
//! both allow, unless the bundle delegates (docs/fleet.md has the rules).

use super::diagnostic::Diagnostic;
use super::meet::{Budget, Half, TooLarge, Unix};
use super::model::{
    Direction, Matcher, Mode, NONE, Policy, Profile, ProfileId, ProfileKind, Resolver, Server, UNRESTRICTED,
    UnixMode, Unknown,
};
use super::resolvers::{HostDns, RESOLV_CONF};
use super::tools::{Messages, Tools};
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

/// In front of what stands in the bundle's files.
pub const BUNDLE: &str = "bundle: ";

impl Policy {
    /// One that says nothing.
    pub fn silent() -> Policy {
        let builtin = [("none", ProfileKind::None), ("unrestricted", ProfileKind::Unrestricted)];
        let profiles = builtin.map(|(name, kind)| Profile::builtin(name, kind)).to_vec();
        Policy { profiles, ..Policy::default() }
    }
}

/// What both allow. `delegate`: what the host's own policy declares is as it
/// says, the rest as the bundle does.
pub fn combine(
    bundle: Policy,
    host: &Policy,
    delegate: bool,
    dns: &HostDns,
) -> Result<Policy, Vec<Diagnostic>> {
    let bundle = marked(bundle);
    let mut combiner = Combiner {
        layers: [&bundle, host],
        delegate,
        dns,
        policy: Policy::silent(),
        profiles: HashMap::new(),
        budget: Budget::default(),
        errors: Vec::new(),
    };
    if combiner.run() == Err(TooLarge) {
        let message = "the bundle and the policy of this host are too large to compare rule by rule";
        combiner.errors.push(
            Diagnostic::error(None, "", message)
                .help("let one of them say less of the servers that both declare, or sign with --delegate"),
        );
    }
    if combiner.errors.is_empty() { Ok(combiner.policy) } else { Err(combiner.errors) }
}

/// The bundle's paths say so. Lines of its files are not those of the host's.
fn marked(mut policy: Policy) -> Policy {
    let mark = |path: &mut String| path.insert_str(0, BUNDLE);
    for profile in &mut policy.profiles {
        profile.position = None;
        profile.rules.iter_mut().for_each(|rule| mark(&mut rule.path));
        profile.unix.iter_mut().for_each(|name| mark(&mut name.path));
    }
    policy.unknown.position = None;
    let tools = |messages: &mut Messages| match &mut messages.tools {
        Tools::Any | Tools::Both(..) => {}
        Tools::Allow { path, .. } => path.insert_str(0, BUNDLE),
        Tools::Deny(patterns) => patterns.iter_mut().for_each(|p| p.path.insert_str(0, BUNDLE)),
    };
    tools(&mut policy.unknown.messages);
    let of_servers = policy.servers.iter_mut().filter_map(|s| s.resolvers.as_mut());
    for resolver in of_servers.chain(policy.resolvers.as_mut()).flatten() {
        mark(&mut resolver.path);
        resolver.position = None;
    }
    for server in &mut policy.servers {
        mark(&mut server.path);
        server.position = None;
        tools(&mut server.messages);
        for matcher in &mut server.matches {
            mark(&mut matcher.path);
            matcher.position = None;
        }
    }
    for glob in &mut policy.launchers {
        mark(&mut glob.path);
        glob.position = None;
    }
    for warning in &mut policy.warnings {
        warning.file = Some(match &warning.file {
            Some(file) => format!("{BUNDLE}{file}"),
            None => BUNDLE.trim_end_matches(": ").to_owned(),
        });
    }
    policy
}

/// What one policy says of a server.
#[derive(Clone, Copy)]
struct Part<'a> {
    layer: usize,
    profile: ProfileId,
    launcher_profile: ProfileId,
    mode: Mode,
    unix: UnixMode,
    /// `None`: the host's.
    resolvers: Option<&'a [Resolver]>,
    messages: &'a Messages,
}

/// (layer, profile, `unix`) of each part.
type Key = Vec<(usize, ProfileId, UnixMode)>;

struct Combiner<'a> {
    /// The bundle, the host's.
    layers: [&'a Policy; 2],
    delegate: bool,
    dns: &'a HostDns,
    policy: Policy,
    profiles: HashMap<Key, ProfileId>,
    budget: Budget,
    errors: Vec<Diagnostic>,
}

impl<'a> Combiner<'a> {
    fn run(&mut self) -> Result<(), TooLarge> {
        self.policy.search = self.search();
        let [bundle, host] = self.layers;
        for glob in bundle.launchers.iter().chain(&host.launchers) {
            if !self.policy.launchers.iter().any(|g| g.glob == glob.glob) {
                self.policy.launchers.push(glob.clone());
            }
        }
        let mut names: Vec<&str> = bundle.servers.iter().map(|s| s.name.as_str()).collect();
        names.extend(
            host.servers.iter().map(|s| s.name.as_str()).filter(|name| bundle.server(name).is_none()),
        );
        let places: HashMap<&str, usize> = names.iter().enumerate().map(|(i, name)| (*name, i)).collect();
        for name in names {
            let server = self.server(name, &places)?;
            self.policy.servers.push(server);
        }
        self.unknown()?;
        let warnings = self.layers.iter().flat_map(|layer| layer.warnings.iter().cloned());
        self.policy.warnings.extend(warnings);
        Ok(())
    }

    fn part(&self, layer: usize, server: &'a Server) -> Part<'a> {
        Part {
            layer,
            profile: server.profile,
            launcher_profile: server.launcher_profile,
            mode: server.mode,
            unix: server.unix,
            resolvers: server.resolvers.as_deref(),
            messages: &server.messages,
        }
    }

    fn unknown_part(&self, layer: usize) -> Part<'a> {
        let policy = self.layers[layer];
        let Unknown { profile, mode, unix, messages, .. } = &policy.unknown;
        Part {
            layer,
            profile: *profile,
            launcher_profile: *profile,
            mode: *mode,
            unix: *unix,
            resolvers: policy.resolvers.as_deref(),
            messages,
        }
    }

    /// What this policy knows only as `unknown` it denies as such.
    fn holds_unknown(&self, layer: usize) -> bool {
        self.layers[layer].unknown.mode == Mode::Enforce
    }

    fn server(&mut self, name: &str, places: &HashMap<&str, usize>) -> Result<Server, TooLarge> {
        let mut declared = self.layers.map(|policy| policy.server(name));
        if self.delegate && declared[1].is_some() {
            declared[0] = None;
        }
        let mut parts = Vec::new();
        for layer in 0..2 {
            let other = declared[1 - layer];
            match declared[layer] {
                Some(server) => {
                    parts.push(self.part(layer, server));
                    // The other one recognises it by something that this one has not.
                    let more = other.is_some_and(|o| o.matches.iter().any(|m| !has(&server.matches, m)));
                    if more && self.holds_unknown(layer) {
                        parts.push(self.unknown_part(layer));
                    }
                }
                None if !self.delegate && self.holds_unknown(layer) => parts.push(self.unknown_part(layer)),
                None => {}
            }
        }
        let (profile, launcher_profile) = self.both_profiles(name, &parts)?;
        let (_, first) = (0..).zip(declared).find_map(|(i, s)| Some((i, s?))).expect("it is declared");
        Ok(Server {
            name: name.to_owned(),
            profile,
            launcher_profile,
            mode: strictest_mode(&parts),
            unix: strictest_unix(&parts),
            matches: self.matches(declared),
            may_launch: self.may_launch(declared, places),
            resolvers: self.resolvers(&parts),
            messages: all_messages(&parts),
            path: first.path.clone(),
            position: first.position,
        })
    }

    fn unknown(&mut self) -> Result<(), TooLarge> {
        let declared = self.layers.map(|policy| policy.unknown.declared);
        // A file that is not verified is held to it, said or not.
        let hashed =
            |policy: &Policy| policy.servers.iter().flat_map(|s| &s.matches).any(|m| m.sha256.is_some());
        let [bundle, host] = self.layers.map(|policy| policy.unknown.declared || hashed(policy));
        let layers: &[usize] = match (bundle, host) {
            _ if self.delegate && declared[1] => &[1],
            (true, true) => &[0, 1],
            (true, false) => &[0],
            (false, true) => &[1],
            (false, false) => return Ok(()),
        };
        let parts: Vec<Part<'_>> = layers.iter().map(|layer| self.unknown_part(*layer)).collect();
        let (profile, _) = self.both_profiles("unknown", &parts)?;
        self.policy.resolvers = self.resolvers(&parts);
        self.policy.unknown = Unknown {
            declared: true,
            profile,
            mode: strictest_mode(&parts),
            unix: strictest_unix(&parts),
            messages: all_messages(&parts),
            position: self.layers[layers[layers.len() - 1]].unknown.position,
        };
        Ok(())
    }

    /// Of the server and of its launcher. Where the two policies know different
    /// launchers, what one of them takes for a launcher is held to the server's
    /// profile as well: to the other it is the server.
    fn both_profiles(
        &mut self,
        server: &str,
        parts: &[Part<'_>],
    ) -> Result<(ProfileId, ProfileId), TooLarge> {
        let key = |of: fn(&Part<'_>) -> ProfileId| parts.iter().map(move |p| (p.layer, of(p), p.unix));
        let own: Key = key(|p| p.profile).collect();
        let mut launcher: Key = key(|p| p.launcher_profile).collect();
        let globs =
            self.layers.map(|policy| policy.launchers.iter().map(|g| &g.glob).collect::<BTreeSet<_>>());
        if globs[0] != globs[1] && parts.len() > 1 {
            launcher.extend(own.iter().copied());
        }
        let profile = self.profile(own.clone())?;
        let launcher_profile = if launcher == own { profile } else { self.profile(launcher)? };
        self.stays_inspected(server, profile, parts, |p| p.profile);
        self.stays_inspected(server, launcher_profile, parts, |p| p.launcher_profile);
        Ok((profile, launcher_profile))
    }

    fn profile(&mut self, mut key: Key) -> Result<ProfileId, TooLarge> {
        let mut seen = Vec::new();
        key.retain(|part| {
            let new = !seen.contains(part);
            seen.push(*part);
            new
        });
        if let Some(id) = self.profiles.get(&key) {
            return Ok(*id);
        }
        let mut names: Vec<&str> = Vec::new();
        let mut met: Option<Half> = None;
        for (layer, id, unix) in &key {
            let profile = &self.layers[*layer].profiles[*id];
            if !names.contains(&profile.name.as_str()) {
                names.push(&profile.name);
            }
            let half = Half {
                kind: profile.kind,
                rules: profile.rules.clone(),
                unix: Unix::of(*unix, profile.kind, &profile.unix),
            };
            met = Some(match met {
                None => half,
                Some(before) => before.meet(half, &mut self.budget)?,
            });
        }
        let Half { kind, rules, unix } = met.expect("a part");
        let unix = unix.names();
        let id = match kind {
            ProfileKind::None if unix.is_empty() => NONE,
            ProfileKind::Unrestricted if unix.is_empty() => UNRESTRICTED,
            _ => {
                let name = names.join(" and ");
                self.policy.profiles.push(Profile { name, kind, rules, unix, position: None });
                self.policy.profiles.len() - 1
            }
        };
        self.profiles.insert(key, id);
        Ok(id)
    }

    fn addresses(&self, resolvers: Option<&[Resolver]>) -> Vec<IpAddr> {
        match resolvers {
            Some(list) => list.iter().map(|r| r.addr).collect(),
            None => self.dns.resolvers.clone(),
        }
    }

    fn is_named(&self, part: &Part<'_>) -> bool {
        let profiles = &self.layers[part.layer].profiles;
        profiles[part.profile].has_names() || profiles[part.launcher_profile].has_names()
    }

    /// Those that every part with names asks; `None`: the host's.
    fn resolvers(&self, parts: &[Part<'_>]) -> Option<Vec<Resolver>> {
        let named: Vec<&Part<'_>> = parts.iter().filter(|part| self.is_named(part)).collect();
        let first = named.iter().find_map(|part| part.resolvers)?;
        let mut common = first.to_vec();
        for part in &named {
            let addresses = self.addresses(part.resolvers);
            common.retain(|resolver| addresses.contains(&resolver.addr));
        }
        Some(common)
    }

    /// A resolver that one policy asks names of, and the other knows as an
    /// address only, would be asked anything.
    fn stays_inspected(
        &mut self,
        server: &str,
        id: ProfileId,
        parts: &[Part<'_>],
        of: fn(&Part<'_>) -> ProfileId,
    ) {
        let profile = &self.policy.profiles[id];
        let pinned = self.resolvers(parts);
        let kept = if profile.has_names() { self.addresses(pinned.as_deref()) } else { Vec::new() };
        let open = |address: &IpAddr| {
            let mut egress = profile.rules.iter().filter(|rule| rule.direction == Direction::Egress);
            !kept.contains(address)
                && egress.any(|rule| {
                    rule.ports.iter().any(|ports| ports.contains(&53))
                        && rule.nets.iter().any(|net| net.contains(address))
                })
        };
        let named = parts.iter().filter(|part| self.layers[part.layer].profiles[of(part)].has_names());
        let Some(address) = named.flat_map(|part| self.addresses(part.resolvers)).find(open) else { return };
        let message = format!(
            "`{server}`: {address} is a resolver that only one of the bundle and the policy of this host pins, and \
             the other allows its port 53 to be asked anything"
        );
        self.errors.push(
            Diagnostic::error(None, format!("{RESOLV_CONF}, resolvers"), message).help(
                "write the same `resolvers` into both, or leave port 53 out of the rules for addresses",
            ),
        );
    }

    /// By what the bundle says first; with a bundle that delegates, by what the
    /// host says.
    fn matches(&mut self, declared: [Option<&Server>; 2]) -> Vec<Matcher> {
        let mut matches: Vec<Matcher> = Vec::new();
        for (layer, server) in declared.into_iter().enumerate() {
            let Some(server) = server else { continue };
            for matcher in &server.matches {
                if !has(&matches, matcher) {
                    let last = (layer == 0) == self.delegate;
                    matches.push(Matcher { last, ..matcher.clone() });
                }
            }
        }
        let [Some(bundle), Some(host)] = declared else { return matches };
        // A file that either pins must be what both say.
        let hashed = matches.iter().filter(|m| m.sha256.is_some()).filter_map(|m| m.exe.clone());
        for exe in hashed.collect::<BTreeSet<_>>() {
            let hashes = [bundle, host].map(|server| {
                let of_file = server.matches.iter().filter(|m| m.exe.as_ref() == Some(&exe));
                of_file.filter_map(|m| m.sha256).collect::<BTreeSet<_>>()
            });
            let both: BTreeSet<_> = match (hashes[0].is_empty(), hashes[1].is_empty()) {
                (false, false) => hashes[0].intersection(&hashes[1]).copied().collect(),
                _ => hashes[0].union(&hashes[1]).copied().collect(),
            };
            if both.is_empty() {
                let message = format!(
                    "`{}`: the bundle and the policy of this host pin {exe} to different contents",
                    host.name
                );
                self.errors.push(Diagnostic::error(host.position, format!("{}.match", host.path), message));
            }
            matches.retain(|m| {
                m.exe.as_ref() != Some(&exe)
                    || m.subject.is_some()
                    || m.sha256.is_some_and(|h| both.contains(&h))
            });
        }
        matches
    }

    /// Only what every policy allows that knows the server, or would hold it as
    /// `unknown`.
    fn may_launch(&self, declared: [Option<&Server>; 2], places: &HashMap<&str, usize>) -> Vec<usize> {
        let mut allowed: Option<BTreeSet<usize>> = None;
        for (layer, server) in declared.into_iter().enumerate() {
            let to: BTreeSet<usize> = match server {
                Some(server) => {
                    let name = |to: &usize| self.layers[layer].servers[*to].name.as_str();
                    server.may_launch.iter().filter_map(|to| places.get(name(to)).copied()).collect()
                }
                None if !self.delegate && self.holds_unknown(layer) => BTreeSet::new(),
                None => continue,
            };
            allowed = Some(match allowed {
                None => to,
                Some(before) => before.intersection(&to).copied().collect(),
            });
        }
        allowed.unwrap_or_default().into_iter().collect()
    }

    fn search(&self) -> Option<Vec<String>> {
        let named = |policy: &&&Policy| policy.profiles.iter().any(Profile::has_names);
        let layers: Vec<&Policy> = self.layers.iter().filter(named).copied().collect();
        let lists = layers.iter().map(|policy| policy.search.as_ref());
        let explicit: Vec<&Vec<String>> = lists.clone().flatten().collect();
        let mut common = (*explicit.first()?).clone();
        for list in lists {
            let list = list.unwrap_or(&self.dns.search);
            common.retain(|domain| list.contains(domain));
        }
        Some(common)
    }
}

impl Policy {
    fn server(&self, name: &str) -> Option<&Server> {
        self.servers.iter().find(|s| s.name == name)
    }
}

fn has(matches: &[Matcher], matcher: &Matcher) -> bool {
    matches.iter().any(|m| m.subject == matcher.subject && m.exe == matcher.exe && m.sha256 == matcher.sha256)
}

fn strictest_mode(parts: &[Part<'_>]) -> Mode {
    if parts.iter().any(|p| p.mode == Mode::Enforce) { Mode::Enforce } else { Mode::Audit }
}

fn strictest_unix(parts: &[Part<'_>]) -> UnixMode {
    let has = |mode| parts.iter().any(|p| p.unix == mode);
    if has(UnixMode::Strict) {
        UnixMode::Strict
    } else if has(UnixMode::Default) {
        UnixMode::Default
    } else {
        UnixMode::Open
    }
}

fn all_messages(parts: &[Part<'_>]) -> Messages {
    let first = parts.first().map(|part| part.messages.clone()).unwrap_or_default();
    parts.iter().skip(1).fold(first, |messages, part| messages.and(part.messages))
}
