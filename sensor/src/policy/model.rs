//! A policy that has been read and checked: every value in its final form, with
//! the place it came from.

use super::diagnostic::{Diagnostic, Position};
use super::names::NamePattern;
use super::tools::Messages;
use ipnet::IpNet;
use std::net::IpAddr;
use std::ops::RangeInclusive;

#[derive(Clone, Debug, Default)]
pub struct Policy {
    pub profiles: Vec<Profile>,
    pub servers: Vec<Server>,
    pub unknown: Unknown,
    /// `None`: the host's.
    pub resolvers: Option<Vec<Resolver>>,
    /// Domains that the C library completes names by; `None`: the host's.
    pub search: Option<Vec<String>>,
    /// Globs and paths of further launchers.
    pub launchers: Vec<LauncherGlob>,
    pub warnings: Vec<Diagnostic>,
}

/// A DNS resolver that names are asked of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolver {
    pub addr: IpAddr,
    /// `resolvers[0]`.
    pub path: String,
    pub position: Option<Position>,
}

/// Index into [`Policy::profiles`]; the first two are built in.
pub type ProfileId = usize;
pub const NONE: ProfileId = 0;
pub const UNRESTRICTED: ProfileId = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProfileKind {
    None,
    Rules,
    Unrestricted,
}

#[derive(Clone, Debug)]
pub struct Profile {
    pub name: String,
    pub kind: ProfileKind,
    pub rules: Vec<Rule>,
    pub unix: Vec<UnixName>,
    pub position: Option<Position>,
}

impl Profile {
    pub fn builtin(name: &str, kind: ProfileKind) -> Profile {
        Profile { name: name.to_owned(), kind, rules: Vec::new(), unix: Vec::new(), position: None }
    }

    /// The first rule that names hosts.
    pub fn named(&self) -> Option<(&Rule, &NamePattern)> {
        self.rules.iter().find_map(|rule| rule.names.first().map(|name| (rule, name)))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Egress,
    Inbound,
}

impl Direction {
    pub fn code(self) -> u8 {
        match self {
            Direction::Egress => sensor_common::policy::EGRESS,
            Direction::Inbound => sensor_common::policy::INBOUND,
        }
    }
}

/// One entry of `egress` or `inbound`.
#[derive(Clone, Debug)]
pub struct Rule {
    pub direction: Direction,
    pub nets: Vec<IpNet>,
    pub names: Vec<NamePattern>,
    /// `to: [self]`.
    pub own_instance: bool,
    /// Never empty; host byte order.
    pub ports: Vec<RangeInclusive<u16>>,
    pub tcp: bool,
    pub udp: bool,
    /// Of connections to its names.
    pub sni: Sni,
    /// `profiles.github.egress[1]`.
    pub path: String,
    pub position: Option<Position>,
}

/// Whether a TLS ClientHello must name the host that a rule allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sni {
    /// On port 443 only.
    #[default]
    Default,
    Require,
    Ignore,
}

const HTTPS: u16 = 443;

impl Sni {
    /// A range of TCP ports in parts: (low, high, a ClientHello is required).
    pub fn split(self, ports: &RangeInclusive<u16>) -> impl Iterator<Item = (u16, u16, bool)> + use<> {
        let (low, high) = (*ports.start(), *ports.end());
        let whole = |require| [Some((low, high, require)), None, None];
        let parts = match self {
            Sni::Require => whole(true),
            Sni::Ignore => whole(false),
            Sni::Default if !ports.contains(&HTTPS) => whole(false),
            Sni::Default => [
                (low < HTTPS).then_some((low, HTTPS - 1, false)),
                Some((HTTPS, HTTPS, true)),
                (high > HTTPS).then_some((HTTPS + 1, high, false)),
            ],
        };
        parts.into_iter().flatten()
    }
}

/// Every port, 0 included: what a rule without `ports` means.
pub const ANY_PORT: RangeInclusive<u16> = 0..=u16::MAX;

/// Destinations that a rule's text spells out.
const TEXT_ITEMS: usize = 6;

impl Rule {
    pub fn protocols(&self) -> impl Iterator<Item = u8> {
        [(self.tcp, sensor_common::TCP), (self.udp, sensor_common::UDP)]
            .into_iter()
            .filter_map(|(on, code)| on.then_some(code))
    }

    /// The rule as one line of YAML, long lists cut short.
    pub fn text(&self) -> String {
        let own = self.own_instance.then(|| "self".to_owned());
        let peers: Vec<String> = own
            .into_iter()
            .chain(self.names.iter().take(TEXT_ITEMS).map(|n| format!("\"{n}\"")))
            .chain(self.nets.iter().take(TEXT_ITEMS).map(|n| format!("\"{n}\"")))
            .collect();
        let total = usize::from(self.own_instance) + self.names.len() + self.nets.len();
        let mut text = peers.join(", ");
        if total > peers.len() {
            text.push_str(&format!(", … {} more", total - peers.len()));
        }
        let key = match self.direction {
            Direction::Egress => "to",
            Direction::Inbound => "from",
        };
        let mut parts = vec![format!("{key}: [{text}]")];
        if self.ports != [ANY_PORT] {
            let ports: Vec<String> = self.ports.iter().map(port_text).collect();
            parts.push(format!("ports: [{}]", ports.join(", ")));
        }
        match (self.tcp, self.udp) {
            (true, true) => parts.push("protocol: [tcp, udp]".to_owned()),
            (false, true) => parts.push("protocol: udp".to_owned()),
            _ => {}
        }
        match self.sni {
            Sni::Default => {}
            Sni::Require => parts.push("sni: require".to_owned()),
            Sni::Ignore => parts.push("sni: ignore".to_owned()),
        }
        format!("{{{}}}", parts.join(", "))
    }
}

pub fn port_text(range: &RangeInclusive<u16>) -> String {
    if range.start() == range.end() {
        range.start().to_string()
    } else {
        format!("{}-{}", range.start(), range.end())
    }
}

/// A unix socket that a profile names, as in `sun_path`.
#[derive(Clone, Debug)]
pub struct UnixName {
    pub written: String,
    /// Ends in NUL to match in whole, else a prefix; an abstract name begins
    /// with NUL.
    pub key: Vec<u8>,
    pub path: String,
    pub position: Option<Position>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Audit,
    Enforce,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Mode::Audit => "audit",
            Mode::Enforce => "enforce",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UnixMode {
    Default,
    Strict,
    Open,
}

#[derive(Clone, Debug)]
pub struct Server {
    pub name: String,
    pub profile: ProfileId,
    pub launcher_profile: ProfileId,
    pub mode: Mode,
    pub unix: UnixMode,
    pub matches: Vec<Matcher>,
    /// Indices into [`Policy::servers`].
    pub may_launch: Vec<usize>,
    /// Its own or the policy's; `None`: the host's.
    pub resolvers: Option<Vec<Resolver>>,
    pub messages: Messages,
    pub path: String,
    pub position: Option<Position>,
}

#[derive(Clone, Debug)]
pub struct Unknown {
    /// The file says something of it.
    pub declared: bool,
    pub profile: ProfileId,
    pub mode: Mode,
    pub unix: UnixMode,
    pub messages: Messages,
    pub position: Option<Position>,
}

impl Default for Unknown {
    fn default() -> Self {
        Unknown {
            declared: false,
            profile: NONE,
            mode: Mode::Audit,
            unix: UnixMode::Default,
            messages: Messages::default(),
            position: None,
        }
    }
}

/// One entry of `match`.
#[derive(Clone, Debug)]
pub struct Matcher {
    /// `None`: the executable alone decides.
    pub subject: Option<Subject>,
    /// Absolute path.
    pub exe: Option<String>,
    /// What the file at `exe` must hold.
    pub sha256: Option<[u8; 32]>,
    /// Looked at when no other fits: it is of a policy beneath another.
    pub last: bool,
    pub path: String,
    pub position: Option<Position>,
}

impl Policy {
    /// Every `match` entry with the index of its server, the first that fits
    /// first: the index is `ExecRule::priority`.
    pub fn matchers(&self) -> impl Iterator<Item = (usize, &Matcher)> {
        [false, true].into_iter().flat_map(move |last| {
            let servers = self.servers.iter().enumerate();
            let matchers = servers.flat_map(|(index, s)| s.matches.iter().map(move |m| (index, m)));
            matchers.filter(move |(_, matcher)| matcher.last == last)
        })
    }
}

impl Matcher {
    /// As events say it: `package: @scope/name`.
    pub fn evidence(&self) -> String {
        let subject = match &self.subject {
            None => None,
            Some(Subject::Package(name)) => Some(format!("package: {name}")),
            Some(Subject::Script(name)) => Some(format!("script: {name}")),
            Some(Subject::Argv(arguments)) => Some(format!("argv: {}", arguments.join(" "))),
            Some(Subject::Unit(name)) => Some(format!("unit: {name}")),
            Some(Subject::Container(id)) => Some(format!("container: {id}")),
            Some(Subject::Image(name)) => Some(format!("image: {name}")),
        };
        let exe = self.exe.as_ref().map(|path| format!("exe: {path}"));
        let hash = self.sha256.map(|_| "sha256".to_owned());
        exe.into_iter().chain(subject).chain(hash).collect::<Vec<_>>().join(", ")
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    Package(String),
    Script(String),
    Argv(Vec<String>),
    Unit(String),
    Container(String),
    Image(String),
}

#[derive(Clone, Debug)]
pub struct LauncherGlob {
    pub glob: String,
    pub path: String,
    pub position: Option<Position>,
}
