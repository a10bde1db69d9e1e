//! The world of the tests by name: a pinned resolver and a foreign one, peers
//! at public addresses, and a server that may reach two names.

use crate::bed::{Bed, LIMIT};
use crate::dns::server::DnsServer;
use crate::dns::zone::Zone;
use crate::frame::{Frame, L4};
use crate::network::{ALLOWED_V4, ALLOWED_V6, Network};
use crate::peer::PORT;
use crate::policy::Policy;
use crate::run::Running;
use crate::sensor::Sensor;
use crate::step::{Outcome, Step};
use anyhow::{Context, Result, ensure};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::Duration;

/// Server that may reach [`API`] and what is below [`CDN`].
pub const NAMED: &str = "named";
/// Another, with [`OTHER`] and the same wildcard.
pub const NEIGHBOUR: &str = "neighbour";
pub const API: &str = "api.example.test";
pub const CDN: &str = "cdn.example.test";
pub const OTHER: &str = "other.example.test";
/// Where the C library looks first.
pub const SEARCH: &str = "corp.test";

/// The policy's resolver.
pub const RESOLVER: SocketAddr = SocketAddr::new(IpAddr::V4(ALLOWED_V4), 53);
pub const RESOLVER_V6: SocketAddr = SocketAddr::new(IpAddr::V6(ALLOWED_V6), 53);
/// A resolver that no policy names.
pub const FOREIGN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 53)), 53);

/// Beyond the ports of TLS: only the address is judged.
pub const PLAIN: u16 = PORT;
/// TLS where the policy says `sni: ignore`, and where it says `sni: require`.
pub const SNI_IGNORED: u16 = 8443;
pub const SNI_REQUIRED: u16 = 9443;

/// Addresses outside the public ones that the peer has as well: rebinding.
const SPECIAL: [&str; 2] = ["100.64.0.0/10", "169.254.169.254/32"];

pub struct World {
    pub bed: Bed,
    pub resolver: DnsServer,
    /// Answers as the resolver does.
    pub foreign: DnsServer,
    /// `None`: nothing is labelled.
    pub sensor: Option<Sensor>,
}

/// What became of some steps.
pub struct Ran {
    pub outcomes: Vec<Outcome>,
    pub frames: Vec<Frame>,
}

impl World {
    /// `zone`: for each of the two servers.
    pub fn new(labelled: bool, zone: fn() -> Zone) -> Result<World> {
        World::with_policy(labelled, zone, &policy())
    }

    pub fn with_policy(labelled: bool, zone: fn() -> Zone, policy: &Policy) -> Result<World> {
        World::build(labelled, zone, policy, &[RESOLVER.ip(), RESOLVER_V6.ip()])
    }

    /// Nobody answers at the resolver's address yet.
    pub fn without_resolver(labelled: bool) -> Result<World> {
        World::build(labelled, Zone::new, &policy(), &[])
    }

    fn build(labelled: bool, zone: fn() -> Zone, policy: &Policy, resolvers: &[IpAddr]) -> Result<World> {
        let bed = Bed::with_network(Network::with_public_addresses(&SPECIAL)?)?;
        let resolver = DnsServer::start(&bed.network, resolvers, zone())?;
        let foreign = DnsServer::start(&bed.network, &[FOREIGN.ip()], zone())?;
        let sensor = if labelled { Some(Sensor::start(&bed, policy)?) } else { None };
        Ok(World { bed, resolver, foreign, sensor })
    }

    pub fn command(&self, server: &str, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        match &self.sensor {
            Some(sensor) => self.bed.labelled(sensor, server, program),
            None => self.bed.command(program),
        }
    }

    fn steps_command(&self, server: &str, steps: &[Step]) -> Result<Command> {
        let mut command = self.command(server, crate::run::built("attempt")?)?;
        command.args(["steps", "--", &serde_json::to_string(steps)?]);
        Ok(command)
    }

    /// One process of [`NAMED`].
    pub fn run(&self, steps: &[Step]) -> Result<Ran> {
        self.run_as(NAMED, steps, |_| Ok(()), LIMIT)
    }

    pub fn run_as(
        &self,
        server: &str,
        steps: &[Step],
        prepare: impl FnOnce(&mut Command) -> Result<()>,
        within: Duration,
    ) -> Result<Ran> {
        self.bed.frames()?;
        let mut command = self.steps_command(server, steps)?;
        prepare(&mut command)?;
        let outcomes = outcomes(Running::start(command)?, within)?;
        ensure!(outcomes.len() == steps.len(), "{} of {} steps", outcomes.len(), steps.len());
        Ok(Ran { outcomes, frames: self.bed.frames()? })
    }

    /// A process that waits at its [`Step::Pause`].
    pub fn start(&self, server: &str, steps: &[Step]) -> Result<Running> {
        self.bed.start_until_ready(self.steps_command(server, steps)?)
    }

    /// The event of a question or an answer; without a sensor there is none.
    pub fn expect_name_event(&self, reason: &str, name: &str) -> Result<()> {
        let Some(sensor) = &self.sensor else { return Ok(()) };
        let what = format!("dns {reason} of {name}");
        let event = sensor.events().wait_for(&what, crate::sensor::SOON, |e| {
            e.is_of_a_name(NAMED, reason) && e.text("name").eq_ignore_ascii_case(name)
        })?;
        for key in ["verdict", "qtype", "instance", "resolver"] {
            ensure!(event.0.get(key).is_some(), "the event has no \"{key}\": {}", event.0);
        }
        if reason == "name_no_rule" {
            ensure!(!event.text("suggestion").is_empty(), "which rule would allow it? {}", event.0);
        }
        Ok(())
    }

    pub fn expect_denial(&self, reason: &str, to: SocketAddr) -> Result<()> {
        let Some(sensor) = &self.sensor else { return Ok(()) };
        sensor.events().wait_for(&format!("{reason} to {to}"), crate::sensor::SOON, |e| {
            e.is_denial_of(NAMED)
                && e.text("reason") == reason
                && e.text("dst.ip") == to.ip().to_string()
                && e.number("dst.port") == Some(to.port().into())
        })?;
        Ok(())
    }

    pub fn is_labelled(&self) -> bool {
        self.sensor.is_some()
    }
}

/// The outcomes that a program of steps prints.
pub fn outcomes(running: Running, within: Duration) -> Result<Vec<Outcome>> {
    let done = running.finish(within)?;
    let found = done.lines.iter().find_map(|l| serde_json::from_str(l).ok());
    found.with_context(|| format!("no outcomes: {:?} {}", done.lines, done.stderr))
}

impl Ran {
    pub fn frames_to(&self, to: IpAddr) -> Vec<&Frame> {
        self.frames.iter().filter(|f| f.destination() == Some(to)).collect()
    }

    /// Bytes above TCP and UDP to this address and port.
    pub fn payload_to(&self, to: SocketAddr) -> usize {
        let port = |frame: &Frame| match frame {
            Frame::Ip { l4: L4::Tcp { dst, .. } | L4::Udp { dst, .. }, .. } => Some(*dst),
            _ => None,
        };
        let there = |f: &&Frame| f.destination() == Some(to.ip()) && port(f) == Some(to.port());
        self.frames.iter().filter(there).map(Frame::payload).sum()
    }

    pub fn last(&self) -> &Outcome {
        self.outcomes.last().expect("one step at least")
    }
}

/// Two servers that may reach names.
pub fn policy() -> Policy {
    policy_with("")
}

/// `more`: rules of [`NAMED`] beside those by name.
pub fn policy_with(more: &str) -> Policy {
    let rules = |names: &str| {
        format!(
            "egress:\n\
             \x20 - {{to: [{names}], ports: [443]}}\n\
             \x20 - {{to: [{names}], ports: [{PLAIN}]}}\n\
             \x20 - {{to: [{names}], ports: [{SNI_IGNORED}], sni: ignore}}\n\
             \x20 - {{to: [{names}], ports: [{SNI_REQUIRED}], sni: require}}\n"
        )
    };
    Policy::standard()
        .top(&format!("resolvers: [{}, \"{}\"]", RESOLVER.ip(), RESOLVER_V6.ip()))
        .top(&format!("search: [{SEARCH}]"))
        .profile(NAMED, &format!("{}{more}", rules(&format!("{API}, \"*.{CDN}\""))))
        .profile(NEIGHBOUR, &rules(&format!("{OTHER}, \"*.{CDN}\"")))
        .server(NAMED, NAMED, "enforce", "")
        .server(NEIGHBOUR, NEIGHBOUR, "enforce", "")
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub fn ask(name: &str, kind: u16) -> Step {
    ask_at(RESOLVER, name, kind)
}

pub fn ask_at(to: SocketAddr, name: &str, kind: u16) -> Step {
    Step::Ask { name: name.into(), kind, to, tcp: false }
}

pub fn ask_tcp(name: &str, kind: u16) -> Step {
    Step::Ask { name: name.into(), kind, to: RESOLVER, tcp: true }
}

pub fn connect(to: IpAddr, port: u16) -> Step {
    Step::Connect { to: SocketAddr::new(to, port) }
}

/// Each claim twice: as [`NAMED`], and unlabelled, where everything must get
/// through, or the first proves nothing.
#[macro_export]
macro_rules! with_and_without_label {
    ($($claim:ident: $test:expr;)+) => {
        $(mod $claim {
            #[allow(unused_imports)]
            use super::*;

            #[test]
            fn unlabelled_gets_through() { $crate::spec::must(|| $test(false)); }

            #[test]
            fn labelled_is_held_to_its_names() { $crate::spec::must(|| $test(true)); }
        })+
    };
}
