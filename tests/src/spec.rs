//! One row of the table of attempts, and the three claims made about it:
//! it reaches the peer unlabelled, is stopped under `none`, and is held to its
//! rule under `wire`.

use crate::bed::{Bed, Tried};
use crate::frame::{Frame, L4};
use crate::network::Family;
use crate::peer::{OTHER_PORT, PORT};
use crate::policy::{NONE, Policy, WIRE};
use crate::sensor::{SOON, Sensor};
use anyhow::{Result, ensure};
use std::net::IpAddr;

#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// Subcommand of `attempt`.
    pub name: &'static str,
    pub family: Family,
    /// What the peer must see of it when nothing stops it.
    pub expect: Expect,
    pub under_rule: UnderRule,
    /// It needs a second address, where the first is allowed.
    pub via: bool,
    /// What stands after `--`.
    pub rest: &'static [&'static str],
}

#[derive(Clone, Copy, Debug)]
pub enum Expect {
    Tcp,
    Mptcp,
    Udp,
    UdpLite,
    Ping,
    Protocol(u8),
    Fragments,
    IpOptions,
    RoutingHeader,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnderRule {
    /// Plain: what the rule allows goes.
    Passes,
    /// Not plain: not one frame leaves, wherever to.
    NeverLeaves,
}

impl Expect {
    pub fn matches(self, frame: &Frame, to: IpAddr) -> bool {
        let Frame::Ip { dst, routed, options, l4, .. } = frame else { return false };
        let port = |p: u16| p == PORT || p == OTHER_PORT;
        // With a first hop, the wire carries that one's address.
        let there = *dst == to || matches!(self, Expect::RoutingHeader | Expect::IpOptions);
        there
            && match (self, l4) {
                (Expect::Tcp, L4::Tcp { dst, .. }) => port(*dst),
                (Expect::Mptcp, L4::Tcp { dst, mptcp, .. }) => port(*dst) && *mptcp,
                (Expect::Udp, L4::Udp { dst, .. }) => port(*dst),
                (Expect::UdpLite, L4::UdpLite { dst, .. }) => port(*dst),
                (Expect::Ping, L4::Icmp(8) | L4::Icmp6(128)) => true,
                (Expect::Protocol(p), L4::Other(seen)) => p == *seen,
                (Expect::Fragments, L4::Fragment(_)) => true,
                (Expect::IpOptions, L4::Udp { .. }) => *options,
                (Expect::RoutingHeader, L4::Udp { .. }) => *routed,
                _ => false,
            }
    }
}

/// A test's end: its claim holds, or the kernel cannot even try.
pub enum Claim {
    Holds,
    /// With the exact step and errno.
    Skipped(String),
}

impl Spec {
    fn arguments(&self, to: IpAddr, port: u16) -> Vec<String> {
        let mut all =
            vec![self.name.into(), "--to".into(), to.to_string(), "--port".into(), port.to_string()];
        if self.via {
            all.extend(["--via".into(), self.family.denied().to_string()]);
        }
        all.push("--".into());
        all.extend(self.rest.iter().map(|r| r.to_string()));
        all
    }

    /// Where it is meant to be stopped; what goes by a first hop claims to go
    /// where it may.
    fn forbidden(&self) -> IpAddr {
        if self.via { self.family.allowed() } else { self.family.denied() }
    }

    /// Without a label it must reach the peer, or the tests prove nothing.
    pub fn reaches_the_peer_unlabelled(&self) -> Result<Claim> {
        self.control(&Bed::new()?)
    }

    fn control(&self, bed: &Bed) -> Result<Claim> {
        let to = self.forbidden();
        bed.frames()?;
        let tried = bed.try_out(bed.attempt(&self.arguments(to, PORT))?)?;
        if tried.report.is_lacking() {
            return Ok(Claim::Skipped(tried.report.to_string()));
        }
        ensure!(tried.report.errno().is_none(), "proves nothing: unlabelled, {}", tried.report);
        ensure!(
            tried.frames.iter().any(|f| self.expect.matches(f, to)),
            "proves nothing: unlabelled, the peer sees no {:?} to {to}, only {:?}",
            self.expect,
            tried.frames
        );
        Ok(Claim::Holds)
    }

    pub fn is_denied_under_none(&self) -> Result<Claim> {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        for to in [self.family.denied(), self.family.allowed()] {
            self.must_not_leave(&bed, &sensor, NONE, to, PORT)?;
        }
        self.conclude(&bed, &sensor, NONE)
    }

    pub fn is_held_to_its_rule(&self) -> Result<Claim> {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        let allowed = self.family.allowed();
        if !self.via {
            self.must_not_leave(&bed, &sensor, WIRE, self.family.denied(), PORT)?;
        }
        self.must_not_leave(&bed, &sensor, WIRE, allowed, OTHER_PORT)?;
        match self.under_rule {
            UnderRule::NeverLeaves => {
                self.must_not_leave(&bed, &sensor, WIRE, allowed, PORT)?;
            }
            UnderRule::Passes => {
                let tried = self.labelled(&bed, &sensor, WIRE, allowed, PORT)?;
                if !tried.report.is_lacking() {
                    ensure!(tried.report.errno().is_none(), "what the rule allows fails: {}", tried.report);
                    let reached = tried.frames.iter().any(|f| self.expect.matches(f, allowed));
                    ensure!(reached, "what the rule allows does not arrive: {:?}", tried.frames);
                    let astray: Vec<_> =
                        tried.frames.iter().filter(|f| f.destination() != Some(allowed)).collect();
                    ensure!(astray.is_empty(), "frames that no rule allows: {astray:?}");
                }
            }
        }
        self.conclude(&bed, &sensor, WIRE)
    }

    fn labelled(&self, bed: &Bed, sensor: &Sensor, server: &str, to: IpAddr, port: u16) -> Result<Tried> {
        bed.try_out(bed.labelled_attempt(sensor, server, &self.arguments(to, port))?)
    }

    fn must_not_leave(&self, bed: &Bed, sensor: &Sensor, server: &str, to: IpAddr, port: u16) -> Result<()> {
        let tried = self.labelled(bed, sensor, server, to, port)?;
        ensure!(
            tried.frames.is_empty(),
            "{server}: {} to {to} port {port} reached the peer ({}): {:?}",
            self.name,
            tried.report,
            tried.frames
        );
        Ok(())
    }

    /// The denial is on record, nothing came late, and the control run works.
    fn conclude(&self, bed: &Bed, sensor: &Sensor, server: &str) -> Result<Claim> {
        let event = sensor.events().wait_for("a denial", SOON, |e| e.is_denial_of(server));
        let late: Vec<_> =
            bed.frames()?.into_iter().filter(|f| f.destination() != Some(self.family.allowed())).collect();
        let claim = self.control(bed)?;
        if matches!(claim, Claim::Holds) {
            let event = event?;
            if event.text("type") == "connection" {
                for key in ["reason", "rule", "instance", "pid", "uid", "protocol", "dst", "time", "seq"] {
                    ensure!(event.0.get(key).is_some(), "the denial has no \"{key}\": {}", event.0);
                }
            }
        }
        ensure!(late.is_empty(), "frames after the attempt: {late:?}");
        Ok(claim)
    }
}

/// Runs one claim as a test.
pub fn run(claim: impl FnOnce() -> Result<Claim>) {
    use std::io::Write;
    // Straight to the descriptor: the harness swallows what a passing test prints.
    let skip = |why: &str| {
        let test = std::thread::current().name().unwrap_or("").to_string();
        let _ = writeln!(std::io::stderr(), "\nSKIP: {test}: {why}");
    };
    if !nix::unistd::geteuid().is_root() {
        return skip("needs root (EPERM)");
    }
    match claim() {
        Ok(Claim::Holds) => {}
        Ok(Claim::Skipped(why)) => skip(&why),
        Err(e) => panic!("{e:#}"),
    }
}

/// Runs a test that always applies.
pub fn must(test: impl FnOnce() -> Result<()>) {
    run(|| test().map(|()| Claim::Holds));
}

/// A table of attempts: for each row and family three tests, named by what
/// they claim. `v4_via` and `v6_via`: by a first hop that is not allowed.
#[macro_export]
macro_rules! attempts {
    ($($claim:ident: $name:literal $([$($rest:literal)+])?, $expect:expr, $under:expr, [$($family:ident)+];)+) => {
        $(mod $claim {
            const REST: &[&str] = &[$($($rest),+)?];
            $($crate::attempts!(@ $family, $name, $expect, $under);)+
        })+
    };
    (@ v4, $($rest:tt)+) => { mod v4 { $crate::attempts!(@@ V4, false, $($rest)+); } };
    (@ v6, $($rest:tt)+) => { mod v6 { $crate::attempts!(@@ V6, false, $($rest)+); } };
    (@ v4_via, $($rest:tt)+) => { mod v4 { $crate::attempts!(@@ V4, true, $($rest)+); } };
    (@ v6_via, $($rest:tt)+) => { mod v6 { $crate::attempts!(@@ V6, true, $($rest)+); } };
    (@@ $family:ident, $via:literal, $name:literal, $expect:expr, $under:expr) => {
        #[allow(unused_imports)]
        use $crate::spec::{Expect::*, Spec, UnderRule::*, run};

        const SPEC: Spec = Spec {
            name: $name,
            family: $crate::network::Family::$family,
            expect: $expect,
            under_rule: $under,
            via: $via,
            rest: super::REST,
        };

        #[test]
        fn reaches_the_peer_unlabelled() { run(|| SPEC.reaches_the_peer_unlabelled()); }

        #[test]
        fn is_denied_under_none() { run(|| SPEC.is_denied_under_none()); }

        #[test]
        fn is_held_to_its_rule_under_a_cidr_profile() { run(|| SPEC.is_held_to_its_rule()); }
    };
}
