//! From what audit recorded to the smallest profile that allows it.

use super::explain::Verdict;
use super::names::NamePattern;
use super::parse::MAX_RESOLVERS;
use super::yaml::{quote, write_rules};
use super::{parse, rules};
use sensor_common::addr::Addr;
use sensor_common::policy::{MAX_RANGES, Reason};
use sensor_common::{TCP, UDP};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::IpAddr;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Longest line that is read.
pub const MAX_LINE: usize = 1 << 20;
/// Addresses, names and unix sockets, each, that are kept.
const MAX_PLACES: usize = 65_536;
/// Port ranges for one address and protocol, so that both protocols fit what
/// the kernel holds for one address, and for one that is a resolver.
const MAX_PORTS: usize = MAX_RANGES / 2 - 1;
/// The same for one name: port 443 may split a range of TCP in three.
const MAX_NAME_PORTS: usize = MAX_RANGES / 2 - 1;
const DNS: u16 = 53;
/// What a name that nobody connected to is proposed with.
const HTTPS: u16 = 443;

/// The fields of an event that matter here.
#[derive(Debug, Deserialize)]
struct Record {
    r#type: String,
    server: String,
    verdict: Option<Verdict>,
    reason: Option<String>,
    role: Option<String>,
    hook: Option<String>,
    direction: Option<String>,
    protocol: Option<String>,
    dst: Option<Endpoint>,
    src: Option<Endpoint>,
    #[serde(rename = "dst.ip")]
    dst_ip: Option<String>,
    #[serde(rename = "dst.port")]
    dst_port: Option<u16>,
    #[serde(rename = "dst.name")]
    dst_name: Option<String>,
    path: Option<String>,
    /// Of DNS.
    name: Option<String>,
    resolver: Option<ResolverField>,
    time: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Endpoint {
    #[serde(default)]
    ip: String,
    #[serde(default)]
    port: u16,
    #[serde(default)]
    name: String,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum ResolverField {
    Address(String),
    Endpoint(Endpoint),
}

impl ResolverField {
    fn ip(&self) -> Option<IpAddr> {
        let (ResolverField::Address(ip) | ResolverField::Endpoint(Endpoint { ip, .. })) = self;
        address(ip)
    }
}

/// In the form that is compared.
fn address(text: &str) -> Option<IpAddr> {
    text.parse::<IpAddr>().ok().map(|ip| Addr::from(ip).normalise().into())
}

#[derive(Debug, Default)]
struct Places {
    /// (protocol, address) → ports.
    egress: BTreeMap<(u8, IpAddr), BTreeSet<u16>>,
    inbound: BTreeMap<(u8, IpAddr), BTreeSet<u16>>,
    /// UDP connect() without a port: sends nothing, needs the address covered.
    asked: BTreeSet<IpAddr>,
    /// (protocol, name that the address was learned by) → ports.
    names: BTreeMap<(u8, String), BTreeSet<u16>>,
    /// Names that were asked for.
    wanted: BTreeSet<String>,
    /// Names whose addresses were looked at by UDP connect().
    looked_at: BTreeSet<String>,
    /// Where port 53 was spoken to: (protocol, address); connect() alone is 0.
    dns: BTreeSet<(u8, IpAddr)>,
    resolvers: Resolvers,
    unix: BTreeSet<String>,
    own_instance: bool,
}

/// Resolvers by how they were met.
#[derive(Debug, Default)]
struct Resolvers {
    pinned: BTreeSet<IpAddr>,
    foreign: BTreeSet<IpAddr>,
}

/// Collects records of one server.
#[derive(Debug)]
pub struct Suggester {
    server: String,
    since: Option<OffsetDateTime>,
    as_server: Places,
    as_launcher: Places,
    records: u64,
    left_out: BTreeMap<&'static str, u64>,
    unreadable: u64,
}

/// A policy that allows what was recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Suggestion {
    pub server: String,
    /// Records that the profile rests on.
    pub records: u64,
    /// A whole policy file (`version: 1` and the profiles).
    pub yaml: String,
    pub profile: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub launcher_profile: Option<String>,
    /// Records that no profile allows, or that were not wanted.
    pub left_out: Vec<LeftOut>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    pub why: &'static str,
    pub count: u64,
}

impl Suggester {
    pub fn new(server: impl Into<String>, since: Option<OffsetDateTime>) -> Suggester {
        Suggester {
            server: server.into(),
            since,
            as_server: Places::default(),
            as_launcher: Places::default(),
            records: 0,
            left_out: BTreeMap::new(),
            unreadable: 0,
        }
    }

    /// One line of the event file.
    pub fn line(&mut self, line: &[u8]) {
        if line.iter().all(u8::is_ascii_whitespace) {
            return;
        }
        if line.len() > MAX_LINE {
            self.unreadable += 1;
            return;
        }
        // Events of other kinds have other fields; only an event must be JSON.
        match serde_json::from_slice::<Record>(line) {
            Ok(record) if record.server == self.server => self.record(&record),
            Ok(_) => {}
            Err(_) if serde_json::from_slice::<serde::de::IgnoredAny>(line).is_ok() => {}
            Err(_) => self.unreadable += 1,
        }
    }

    fn record(&mut self, record: &Record) {
        if !matches!(record.r#type.as_str(), "connection" | "unix_connection" | "dns") {
            return;
        }
        if let Some(since) = self.since {
            let time = record.time.as_deref().and_then(|t| OffsetDateTime::parse(t, &Rfc3339).ok());
            if time.is_none_or(|time| time < since) {
                return;
            }
        }
        match self.place(record) {
            Ok(()) => self.records += 1,
            Err(why) => *self.left_out.entry(why).or_insert(0) += 1,
        }
    }

    fn place(&mut self, record: &Record) -> Result<(), &'static str> {
        if record.verdict.is_none() {
            return Err("records without a verdict");
        }
        if record.verdict == Some(Verdict::Deny) {
            return Err("denied while the server was in enforce: add by hand what should have been allowed");
        }
        let places = if record.role.as_deref() == Some("launcher") {
            &mut self.as_launcher
        } else {
            &mut self.as_server
        };
        if record.r#type == "unix_connection" {
            let path = record.path.as_deref().unwrap_or("");
            if record.verdict == Some(Verdict::Allow) {
                return Ok(());
            }
            if rules::unix_key(path).is_err() || path.ends_with('*') {
                return Err("unix sockets whose name a rule cannot hold");
            }
            if places.unix.len() >= MAX_PLACES {
                return Err("more unix sockets than are kept");
            }
            places.unix.insert(path.to_owned());
            return Ok(());
        }
        let reason = record.reason.as_deref().unwrap_or("");
        let reason = Reason::ALL.into_iter().find(|r| r.name() == reason);
        if record.r#type == "dns" {
            return places.query(record, reason);
        }
        match reason {
            Some(Reason::SelfInstance) => {
                places.own_instance = true;
                return Ok(());
            }
            // What let them pass was recorded on its own.
            Some(Reason::Translated | Reason::Reply) => return Ok(()),
            Some(
                Reason::SocketType
                | Reason::GroupJoin
                | Reason::SocketOption
                | Reason::Fragment
                | Reason::IpOptions
                | Reason::ExtensionHeader
                | Reason::Protocol
                | Reason::Malformed
                | Reason::LabelOverflow
                | Reason::SocketLabel,
            ) => return Err("what no rule allows: odd sockets, protocols and packets"),
            Some(Reason::Sni | Reason::Ech) => {
                return Err("TLS that named another host than its address was learned by, or none: \
                            `sni: ignore` in that host's rule would allow it");
            }
            _ => {}
        }
        let protocol = match record.protocol.as_deref() {
            Some("tcp") => TCP,
            Some("udp") => UDP,
            _ => return Err("what no rule allows: odd sockets, protocols and packets"),
        };
        let inbound = record.direction.as_deref() == Some("inbound");
        let dst = record.dst.as_ref();
        let port = record.dst_port.or(dst.map(|d| d.port)).unwrap_or(0);
        let ip = if inbound {
            record.src.as_ref().map(|s| s.ip.as_str())
        } else {
            record.dst_ip.as_deref().or(dst.map(|d| d.ip.as_str()))
        };
        let Some(ip) = ip.and_then(address) else {
            return Err("records without an address");
        };
        let connect = protocol == UDP && (port == 0 || record.hook.as_deref() == Some("connect"));
        let name = record.dst_name.as_deref().or(dst.map(|d| d.name.as_str())).filter(|_| !inbound);
        if let Some(name) = name.and_then(host) {
            return if connect {
                keep_name(&mut places.looked_at, name)
            } else if port == 0 {
                Err("records without a port")
            } else if places.names.len() >= MAX_PLACES
                && !places.names.contains_key(&(protocol, name.clone()))
            {
                Err("more names than are kept")
            } else {
                places.names.entry((protocol, name)).or_default().insert(port);
                Ok(())
            };
        }
        if !inbound && port == DNS {
            if places.dns.len() >= MAX_PLACES {
                return Err("more addresses than are kept");
            }
            if reason == Some(Reason::Resolver) {
                places.resolvers.pinned.insert(ip);
            }
            places.dns.insert((if connect { 0 } else { protocol }, ip));
            return Ok(());
        }
        if !inbound && connect {
            if places.asked.len() >= MAX_PLACES {
                return Err("more addresses than are kept");
            }
            places.asked.insert(ip);
            return Ok(());
        }
        if port == 0 {
            return Err("records without a port");
        }
        let map = if inbound { &mut places.inbound } else { &mut places.egress };
        if map.len() >= MAX_PLACES && !map.contains_key(&(protocol, ip)) {
            return Err("more addresses than are kept");
        }
        map.entry((protocol, ip)).or_default().insert(port);
        Ok(())
    }

    pub fn finish(mut self) -> Suggestion {
        let profile =
            if parse::is_name(&self.server) && !matches!(self.server.as_str(), "none" | "unrestricted") {
                self.server.clone()
            } else {
                "suggested".to_owned()
            };
        let launcher = format!("{profile}-launcher");
        let mut yaml = String::from("version: 1\n");
        let mut resolvers = Resolvers::default();
        let mut completed = 0;
        for places in [&mut self.as_server, &mut self.as_launcher] {
            completed += places.settle(&mut resolvers);
        }
        if completed > 0 {
            let why = "names completed by a search domain, asked for before the name that was meant: the search \
                       list of the policy or of the host allows them";
            self.left_out.insert(why, completed);
        }
        if let Some(over) = resolvers.write(&mut yaml) {
            self.left_out.insert("resolvers beyond those that a policy can list", over);
        }
        yaml.push_str("profiles:\n");
        let mut unanswered = self.as_server.write(&profile, &mut yaml);
        let launched = !self.as_launcher.is_empty();
        if launched {
            unanswered += self.as_launcher.write(&launcher, &mut yaml);
        }
        if unanswered > 0 {
            let why = "addresses that were looked at (UDP connect sends nothing) and never used";
            self.left_out.insert(why, unanswered);
        }
        if self.unreadable > 0 {
            self.left_out.insert("lines that are not JSON, or too long", self.unreadable);
        }
        let left_out = self.left_out.into_iter().map(|(why, count)| LeftOut { why, count }).collect();
        Suggestion {
            server: self.server,
            records: self.records,
            yaml,
            profile,
            launcher_profile: launched.then_some(launcher),
            left_out,
        }
    }
}

fn keep_name(names: &mut BTreeSet<String>, name: String) -> Result<(), &'static str> {
    if names.len() >= MAX_PLACES && !names.contains(&name) {
        return Err("more names than are kept");
    }
    names.insert(name);
    Ok(())
}

/// A name as rules write it. `None`: none that a rule can hold.
fn host(text: &str) -> Option<String> {
    // `self` would be read as something else.
    NamePattern::parse(text).ok().filter(|p| !p.below && p.name != "self").map(|p| p.name)
}

impl Resolvers {
    /// Those that the policy in force pins are left to it, unless others were
    /// used: a list names all or none. Returns how many found no place.
    fn write(&self, yaml: &mut String) -> Option<u64> {
        if self.foreign.is_subset(&self.pinned) {
            return None;
        }
        let all: BTreeSet<IpAddr> = self.pinned.union(&self.foreign).copied().collect();
        let listed: Vec<String> = all.iter().take(MAX_RESOLVERS).map(|ip| quote(&ip.to_string())).collect();
        let _ = writeln!(yaml, "resolvers: [{}]", listed.join(", "));
        let over = all.len() - listed.len();
        (over > 0).then_some(over as u64)
    }
}

impl Places {
    /// A DNS query, or what an answer was noteworthy for.
    fn query(&mut self, record: &Record, reason: Option<Reason>) -> Result<(), &'static str> {
        let resolver = record.resolver.as_ref().and_then(ResolverField::ip);
        match reason {
            // About answers: what asked for them was recorded on its own.
            Some(Reason::AnswerUnread | Reason::Rebinding | Reason::NotLearned) => return Ok(()),
            Some(Reason::QueryType | Reason::QueryUnread) => {
                return Err("DNS that no rule allows: other types than A and AAAA, and what cannot be read");
            }
            _ => {}
        }
        let Some(name) = record.name.as_deref().and_then(host) else {
            return Err("names that no rule can hold");
        };
        if let Some(ip) = resolver {
            let of = match reason {
                Some(Reason::ForeignResolver) => &mut self.resolvers.foreign,
                _ => &mut self.resolvers.pinned,
            };
            if of.len() < MAX_PLACES {
                of.insert(ip);
            }
        }
        keep_name(&mut self.wanted, name)
    }

    /// Once all is known: what was said on port 53, and what the names are for
    /// that nobody connected to. Returns how many were completed by a search
    /// domain: the longer of two that were asked for.
    fn settle(&mut self, resolvers: &mut Resolvers) -> u64 {
        if self.names.is_empty() && self.wanted.is_empty() && self.looked_at.is_empty() {
            // Nothing looked into DNS: an address like others.
            for (protocol, ip) in std::mem::take(&mut self.dns) {
                if protocol == 0 {
                    self.asked.insert(ip);
                } else {
                    self.egress.entry((protocol, ip)).or_default().insert(DNS);
                }
            }
            return 0;
        }
        let met = std::mem::take(&mut self.resolvers);
        for (_, ip) in std::mem::take(&mut self.dns) {
            if groups(ip) {
                self.egress.entry((UDP, ip)).or_default().insert(DNS);
            } else if !met.pinned.contains(&ip) {
                resolvers.foreign.insert(ip);
            }
        }
        resolvers.pinned.extend(met.pinned.into_iter().filter(|ip| !groups(*ip)));
        resolvers.foreign.extend(met.foreign.into_iter().filter(|ip| !groups(*ip)));
        let known: BTreeSet<String> = self.names.keys().map(|(_, name)| name.clone()).collect();
        let looked_at = std::mem::take(&mut self.looked_at);
        let wanted = &std::mem::take(&mut self.wanted) | &looked_at;
        let mut completed = 0;
        for name in wanted.difference(&known) {
            let mut fronts = name.match_indices('.').map(|(at, _)| &name[..at]).filter(|f| f.contains('.'));
            if !looked_at.contains(name) && fronts.any(|f| known.contains(f) || wanted.contains(f)) {
                completed += 1;
                continue;
            }
            self.names.insert((TCP, name.clone()), BTreeSet::from([HTTPS]));
        }
        completed
    }

    fn is_empty(&self) -> bool {
        self.egress.is_empty()
            && self.names.is_empty()
            && self.inbound.is_empty()
            && self.asked.is_empty()
            && self.unix.is_empty()
            && !self.own_instance
    }

    /// Addresses of a service that was used under another of its addresses take
    /// that service's ports: name look-ups connect() to all of them, and the
    /// next look-up may pick another. Returns how many stay uncovered.
    fn cover_asked(&mut self) -> u64 {
        let used: BTreeSet<IpAddr> = self.egress.keys().map(|(_, ip)| *ip).collect();
        let of_addresses = self.egress.iter().map(|((protocol, _), ports)| (*protocol, ports));
        let of_names = self.names.iter().map(|((protocol, _), ports)| (*protocol, ports));
        let ports: BTreeSet<u16> = of_addresses
            .chain(of_names)
            .filter(|(protocol, _)| *protocol == TCP)
            .flat_map(|(_, ports)| ports.iter().copied())
            .collect();
        let mut uncovered = 0;
        for ip in self.asked.difference(&used) {
            if ports.is_empty() {
                uncovered += 1;
            } else {
                self.egress.insert((TCP, *ip), ports.clone());
            }
        }
        uncovered
    }

    fn write(&mut self, name: &str, yaml: &mut String) -> u64 {
        let uncovered = self.cover_asked();
        let quoted = quote(name);
        if self.is_empty()
            || (self.egress.is_empty()
                && self.names.is_empty()
                && self.inbound.is_empty()
                && self.unix.is_empty()
                && !self.own_instance)
        {
            let _ = writeln!(yaml, "  {quoted}: {{}}");
            return uncovered;
        }
        let _ = writeln!(yaml, "  {quoted}:");
        if !self.egress.is_empty() || !self.names.is_empty() || self.own_instance {
            yaml.push_str("    egress:\n");
            write_rules(&self.names, MAX_NAME_PORTS, "to", yaml);
            write_rules(&self.egress, MAX_PORTS, "to", yaml);
            if self.own_instance {
                yaml.push_str("      - to: [self]\n");
            }
        }
        if !self.inbound.is_empty() {
            yaml.push_str("    inbound:\n");
            write_rules(&self.inbound, MAX_PORTS, "from", yaml);
        }
        if !self.unix.is_empty() {
            yaml.push_str("    unix:\n");
            for path in &self.unix {
                let _ = writeln!(yaml, "      - {}", quote(path));
            }
        }
        uncovered
    }
}

/// Multicast and broadcast: no resolver.
fn groups(ip: IpAddr) -> bool {
    let addr = Addr::from(ip);
    addr.is_multicast() || addr.is_broadcast()
}

impl Suggestion {
    pub fn text(&self) -> String {
        let mut text = format!("# From {} records of server {}.\n", self.records, quote(&self.server));
        for LeftOut { why, count } in &self.left_out {
            let _ = writeln!(text, "# Left out, {count}: {why}.");
        }
        text.push_str(&self.yaml);
        let launcher = self
            .launcher_profile
            .as_ref()
            .map(|l| format!(", launcher_profile: {}", quote(l)))
            .unwrap_or_default();
        let _ = writeln!(
            text,
            "# servers: [{{name: {}, profile: {}{launcher}, …}}]",
            quote(&self.server),
            quote(&self.profile)
        );
        text
    }
}
