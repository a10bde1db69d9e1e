//! Which rule decides about a destination, and what would allow it. Asks the
//! very function that decides in the kernel.

use super::compile::{Compiled, RuleInfo};
use super::model::{Direction, Mode, Policy, ProfileKind};
use super::tables::MemoryTables;
use super::tools::{OnViolation, ToolVerdict};
use sensor_common::addr::Addr;
use sensor_common::name::NAME_ASK_ONLY;
use sensor_common::policy::{
    Flow, MODE_ENFORCE, PROFILE_NAMES, PROFILE_SELF, Reason, SERVER_HASHED, SERVER_UNKNOWN, decide,
};
use sensor_common::{TCP, UDP};
use serde::Serialize;
use std::fmt::Write;
use std::net::IpAddr;

/// `HOST_OR_IP:PORT[/proto]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub host: Host,
    pub port: u16,
    /// IANA number.
    pub protocol: u8,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    Ip(IpAddr),
    Name(String),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}`: {reason}; write HOST:PORT, 10.0.0.1:443, [2001:db8::1]:443 or 9.9.9.9:53/udp")]
pub struct TargetError {
    text: String,
    reason: &'static str,
}

impl std::str::FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Target, TargetError> {
        let error = |reason| TargetError { text: text.escape_debug().to_string(), reason };
        let (place, protocol) = match text.rsplit_once('/') {
            None => (text, TCP),
            Some((place, "tcp")) => (place, TCP),
            Some((place, "udp")) => (place, UDP),
            Some(_) => return Err(error("the protocol is `tcp` or `udp`")),
        };
        let (host, port) = place.rsplit_once(':').ok_or_else(|| error("no port"))?;
        let plain = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        let port = port.parse::<u16>().ok().filter(|p| plain && *p > 0);
        let port = port.ok_or_else(|| error("the port is a number from 1 to 65535"))?;
        let bracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let host = match (bracketed, host.parse::<IpAddr>()) {
            (Some(inner), _) => match inner.parse() {
                Ok(ip) => Host::Ip(IpAddr::V6(ip)),
                Err(_) => return Err(error("no IPv6 address stands in the brackets")),
            },
            (None, Ok(IpAddr::V6(_))) => return Err(error("an IPv6 address needs brackets")),
            (None, Ok(ip)) => Host::Ip(ip),
            (None, Err(_)) => match super::names::NamePattern::parse(host) {
                Ok(name) if !name.below => Host::Name(name.name),
                _ => return Err(error("neither an address nor a host name")),
            },
        };
        Ok(Target { host, port, protocol })
    }
}

#[derive(Clone, Debug)]
pub struct Query {
    pub server: String,
    /// Under `launcher_profile`.
    pub launcher: bool,
    pub direction: Direction,
    pub target: Target,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Allow,
    Deny,
    /// Audit: it goes through and is recorded.
    WouldDeny,
}

/// The answer; its JSON form is stable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    pub server: String,
    pub role: &'static str,
    pub mode: &'static str,
    pub profile: String,
    pub direction: &'static str,
    /// Address in the form that is compared, or the name.
    pub host: String,
    pub port: u16,
    pub protocol: &'static str,
    pub verdict: Verdict,
    pub reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<RuleInfo>,
    /// Allowed if the TLS ClientHello names the host.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub sni: bool,
    /// One line of policy that would allow it, and where it belongs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suggestion: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no server `{name}` in this policy; it declares {known}")]
pub struct NoServer {
    pub name: String,
    pub known: String,
}

fn no_server(policy: &Policy, name: &str) -> NoServer {
    let names: Vec<&str> = policy.servers.iter().take(20).map(|s| s.name.as_str()).collect();
    let known = if names.is_empty() { "only `unknown`".to_owned() } else { names.join(", ") };
    NoServer { name: name.to_owned(), known }
}

/// Whether a tool may be called; its JSON form is stable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ToolExplanation {
    pub server: String,
    pub mode: &'static str,
    pub tool: String,
    pub allowed: bool,
    /// The entry that forbids it, or the list that does not have it, and its
    /// line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<(String, u32)>,
    /// What a forbidden call brings in this mode.
    pub on_violation: &'static str,
}

pub fn explain_tool(
    policy: &Policy,
    compiled: &Compiled,
    server: &str,
    tool: &str,
) -> Result<ToolExplanation, NoServer> {
    let (id, entry) = compiled.server(server).ok_or_else(|| no_server(policy, server))?;
    let rule = match compiled.tool_verdict(id, tool) {
        ToolVerdict::Allowed => None,
        ToolVerdict::Forbidden { rule, line } => Some((rule.to_owned(), line)),
    };
    let (mode, then) = match entry.mode {
        MODE_ENFORCE => (Mode::Enforce, compiled.on_violation(id)),
        _ => (Mode::Audit, OnViolation::Report),
    };
    Ok(ToolExplanation {
        server: server.to_owned(),
        mode: mode.name(),
        tool: tool.to_owned(),
        allowed: rule.is_none(),
        rule,
        on_violation: then.name(),
    })
}

impl ToolExplanation {
    pub fn text(&self) -> String {
        let mut text = format!("{} ({}) tool {}\n", self.server, self.mode, self.tool.escape_debug());
        let verdict = if self.allowed { "allowed" } else { "forbidden" };
        let _ = writeln!(text, "  verdict  {verdict}");
        if let Some((rule, line)) = &self.rule {
            let place = if *line == 0 { String::new() } else { format!(" (line {line})") };
            let _ = writeln!(text, "  rule     {rule}{place}");
            let _ = writeln!(text, "  then     {}", self.on_violation);
        }
        text
    }
}

pub fn explain(policy: &Policy, compiled: &Compiled, query: &Query) -> Result<Explanation, NoServer> {
    let Some((id, server)) = compiled.server(&query.server) else {
        return Err(no_server(policy, &query.server));
    };
    let profile_id = if query.launcher { server.launcher_profile } else { server.profile };
    let profile = &policy.profiles[compiled.profile_of[usize::from(profile_id)]];
    let mode = match policy.servers.iter().find(|s| id != SERVER_UNKNOWN && s.name == query.server) {
        Some(server) => server.mode,
        None => policy.unknown.mode,
    };
    let mut answer = Explanation {
        server: query.server.clone(),
        role: if query.launcher { "launcher" } else { "server" },
        mode: mode.name(),
        profile: profile.name.clone(),
        direction: match query.direction {
            Direction::Egress => "egress",
            Direction::Inbound => "inbound",
        },
        host: String::new(),
        port: query.target.port,
        protocol: if query.target.protocol == UDP { "udp" } else { "tcp" },
        verdict: Verdict::Allow,
        reason: "",
        rule: None,
        sni: false,
        suggestion: None,
        notes: Vec::new(),
    };
    let allowed = match &query.target.host {
        Host::Ip(ip) => by_address(compiled, profile_id, query, *ip, &mut answer),
        Host::Name(name) => by_name(profile, compiled, profile_id, query, name, &mut answer),
    };
    if server.flags & SERVER_HASHED != 0 {
        answer.notes.push(unverified(policy, compiled, query));
    }
    if allowed {
        return Ok(answer);
    }
    answer.verdict = if mode == Mode::Audit { Verdict::WouldDeny } else { Verdict::Deny };
    let (port, protocol) = (query.target.port, query.target.protocol);
    let line = match &query.target.host {
        Host::Ip(ip) => Some(allow_line(query.direction, *ip, port, protocol)),
        Host::Name(name) if query.direction == Direction::Egress => name_line(name, port, protocol),
        Host::Name(_) => None,
    };
    if let Some(line) = line {
        let key = answer.direction;
        answer.suggestion = Some(match profile.kind {
            ProfileKind::Rules => format!("profiles.{}.{key}: add `- {line}`", profile.name),
            _ => format!("give the server a profile of its own with `{key}: [{line}]`"),
        });
    }
    if let Host::Ip(ip) = query.target.host
        && Addr::from(ip).normalise().is_broadcast()
    {
        answer.notes.push("SO_BROADCAST is refused to every labelled socket".to_owned());
    }
    Ok(answer)
}

/// What holds as long as the file of an instance is not verified.
fn unverified(policy: &Policy, compiled: &Compiled, query: &Query) -> String {
    let (profile, mode) = (policy.unknown.profile, policy.unknown.mode.name());
    let name = &policy.profiles[profile].name;
    let mut note = format!(
        "while its file is not verified (`sha256`), `unknown` (profile {name}, {mode}) must allow it as well"
    );
    if let Host::Ip(ip) = query.target.host {
        let flow = Flow {
            direction: query.direction.code(),
            protocol: query.target.protocol,
            port: query.target.port,
            addr: Addr::from(ip),
            any_port: false,
        };
        let allows = decide(&MemoryTables::new(compiled), 0, profile as u16, &flow).allows();
        note.push_str(if allows { "; it does" } else { "; it does not" });
    }
    note
}

fn by_address(
    compiled: &Compiled,
    profile_id: u16,
    query: &Query,
    ip: IpAddr,
    answer: &mut Explanation,
) -> bool {
    let written = Addr::from(ip);
    let addr = written.normalise();
    answer.host = IpAddr::from(addr).to_string();
    if addr != written {
        answer.notes.push(format!("{ip} is judged as {}", answer.host));
    }
    let (port, protocol) = (query.target.port, query.target.protocol);
    let flow = Flow { direction: query.direction.code(), protocol, port, addr, any_port: false };
    let decision = decide(&MemoryTables::new(compiled), 0, profile_id, &flow);
    answer.reason = decision.reason.name();
    answer.rule = compiled.rule(decision.rule).cloned();
    let profile = &compiled.profiles[usize::from(profile_id)];
    let own = profile.flags & PROFILE_SELF != 0 && addr.is_loopback();
    if decision.reason == Reason::NoRule && own {
        answer
            .notes
            .push("allowed if the socket at the other end is of the same instance (`self`)".to_owned());
        answer.rule = compiled.rule(profile.self_rule).cloned();
    }
    if decision.reason == Reason::Resolver {
        answer.notes.push("a pinned resolver: only queries for the profile's host names pass".to_owned());
    }
    if decision.reason == Reason::NoRule && profile.flags & PROFILE_NAMES != 0 {
        answer.notes.push(
            "a server that learned this address by one of the profile's host names may connect by that name's \
             rule: ask again with the name"
                .to_owned(),
        );
    }
    let connect = Flow { any_port: true, ..flow };
    if !decision.allows()
        && protocol == UDP
        && query.direction == Direction::Egress
        && decide(&MemoryTables::new(compiled), 0, profile_id, &connect).allows()
    {
        answer.notes.push(
            "connect() of a UDP socket succeeds, since it sends nothing; packets are denied".to_owned(),
        );
    }
    decision.allows()
}

fn by_name(
    profile: &super::model::Profile,
    compiled: &Compiled,
    profile_id: u16,
    query: &Query,
    name: &str,
    answer: &mut Explanation,
) -> bool {
    name.clone_into(&mut answer.host);
    let (port, protocol) = (query.target.port, query.target.protocol);
    // The address does not matter.
    let flow =
        Flow { direction: query.direction.code(), protocol, port, addr: Addr::default(), any_port: false };
    let tables = MemoryTables::new(compiled).learned_by(name);
    let decision = decide(&tables, 0, profile_id, &flow);
    answer.reason = decision.reason.name();
    answer.rule = compiled.rule(decision.rule).cloned();
    answer.sni = decision.sni;
    let mut note = |text: &str| answer.notes.push(text.to_owned());
    if query.direction == Direction::Inbound && !decision.allows() {
        note("a peer is known by its address only");
        return false;
    }
    if decision.sni {
        note("the TLS ClientHello must name it (`sni: require`); it is looked at before it leaves");
    }
    if decision.reason == Reason::Rule && compiled.unresolved.contains(&profile_id) {
        note("no resolver is known to ask for it: write `resolvers: [ADDRESS, …]`");
    }
    if decision.reason == Reason::NoRule {
        let named = compiled.profiles[usize::from(profile_id)].flags & PROFILE_NAMES != 0;
        match tables.name(profile_id, name) {
            Some(rule) if rule.flags & NAME_ASK_ONLY != 0 => note(
                "it may be asked for, since the search list makes it of a host name of the profile; what it \
                 resolves to is not learned",
            ),
            None if named => answer.reason = Reason::NameNoRule.name(),
            _ => {}
        }
        if profile.rules.iter().any(|rule| rule.direction == Direction::Egress && !rule.nets.is_empty()) {
            answer
                .notes
                .push("rules for addresses hold, too: ask again with an address of the host".to_owned());
        }
    }
    decision.allows()
}

/// The entry of `egress` or `inbound` that allows exactly this. `ip` is the
/// destination, or the peer of an inbound connection, whose port is the local
/// one. Denial events carry the same line.
pub fn allow_line(direction: Direction, ip: IpAddr, port: u16, protocol: u8) -> String {
    let key = match direction {
        Direction::Egress => "to",
        Direction::Inbound => "from",
    };
    let ip = IpAddr::from(Addr::from(ip).normalise());
    let host = if ip.is_ipv6() { format!("\"{ip}\"") } else { ip.to_string() };
    let ports = if port == 0 { String::new() } else { format!(", ports: [{port}]") };
    let protocol = if protocol == UDP { ", protocol: udp" } else { "" };
    format!("{{{key}: [{host}]{ports}{protocol}}}")
}

/// The entry of `egress` that allows a host by its name (0: on any port).
/// `None`: a name that no rule can hold.
pub fn name_line(name: &str, port: u16, protocol: u8) -> Option<String> {
    let pattern = super::names::NamePattern::parse(name).ok().filter(|p| !p.below && p.name != "self")?;
    let plain = pattern.name.contains('.') && pattern.name.starts_with(|c: char| c.is_ascii_alphabetic());
    let name = if plain { pattern.name } else { format!("\"{}\"", pattern.name) };
    let ports = if port == 0 { String::new() } else { format!(", ports: [{port}]") };
    let protocol = if protocol == UDP { ", protocol: udp" } else { "" };
    Some(format!("{{to: [{name}]{ports}{protocol}}}"))
}

/// The entry that allows a name which was asked for and denied: what it was
/// asked for is not known yet, so HTTPS.
pub fn line_for_query(reason: Reason, name: &str) -> Option<String> {
    if matches!(reason, Reason::NameNoRule | Reason::ProfileNone) { name_line(name, 443, TCP) } else { None }
}

/// As [`allow_line`] for a denial with its reason. `None`: no rule allows it
/// (odd sockets, protocols, packets), or it was no denial.
pub fn line_for(reason: Reason, direction: Direction, ip: IpAddr, port: u16, protocol: u8) -> Option<String> {
    match reason {
        Reason::ProfileNone
        | Reason::NoRule
        | Reason::NoInboundRule
        | Reason::Multicast
        | Reason::Broadcast
            if matches!(protocol, TCP | UDP) =>
        {
            Some(allow_line(direction, ip, port, protocol))
        }
        _ => None,
    }
}

/// The line of a profile that names a unix socket (as events spell it).
/// `None`: a name that no rule can hold.
pub fn unix_line(path: &str) -> Option<String> {
    // Written in a rule, a trailing `*` would be a prefix.
    super::rules::unix_key(path).ok().filter(|_| !path.ends_with('*'))?;
    Some(format!("unix: [{}]", super::yaml::quote(path)))
}

impl Explanation {
    pub fn text(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        let arrow = if self.direction == "egress" { "to" } else { "from" };
        let verdict = match self.verdict {
            Verdict::Allow => "allow",
            Verdict::Deny => "deny",
            Verdict::WouldDeny => "would deny (audit: it goes through and is recorded)",
        };
        let mut text = format!(
            "{} ({}, profile {}, {}) {arrow} {host}:{}/{}\n  verdict  {verdict}\n  reason   {}\n",
            self.server, self.role, self.profile, self.mode, self.port, self.protocol, self.reason
        );
        let mut line = |key: &str, value: &str| {
            let _ = writeln!(text, "  {key:<8} {value}");
        };
        if let Some(rule) = &self.rule {
            // What the host adds has no line.
            let place = if rule.line == 0 { String::new() } else { format!(" (line {})", rule.line) };
            line("rule", &format!("{}{place}: {}", rule.path, rule.text));
        }
        if let Some(suggestion) = &self.suggestion {
            line("allow", suggestion);
        }
        for note in &self.notes {
            line("note", note);
        }
        text
    }
}
