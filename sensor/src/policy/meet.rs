//! What two profiles both allow. Where that cannot be written as rules it is
//! less: a host that one names and the other allows by address is not reached.

use super::cidr::is_group;
use super::model::{ProfileKind, Rule, Sni, UnixMode, UnixName};
use super::names::NamePattern;
use ipnet::IpNet;
use sensor_common::unix::POWER_SOCKETS;
use std::ops::RangeInclusive;

/// Comparisons of addresses, names and sockets for one policy, at most.
const COMPARISONS: usize = 50_000_000;
/// Rules that come of it.
const RULES: usize = 50_000;

/// What is left to spend.
pub(super) struct Budget {
    comparisons: usize,
    rules: usize,
}

impl Default for Budget {
    fn default() -> Self {
        Budget { comparisons: COMPARISONS, rules: RULES }
    }
}

/// The two policies are too large to compare rule by rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooLarge;

impl Budget {
    fn compare(&mut self, a: usize, b: usize) -> Result<(), TooLarge> {
        self.comparisons = a.checked_mul(b).and_then(|n| self.comparisons.checked_sub(n)).ok_or(TooLarge)?;
        Ok(())
    }
}

/// A profile as a server under some `unix` has it.
#[derive(Clone, Debug)]
pub(super) struct Half {
    pub kind: ProfileKind,
    pub rules: Vec<Rule>,
    pub unix: Unix,
}

#[derive(Clone, Debug)]
pub(super) enum Unix {
    /// No name is looked at.
    Open,
    /// All but those that give power over the host, and these.
    Default(Vec<UnixName>),
    /// These.
    Strict(Vec<UnixName>),
}

impl Unix {
    /// As the kernel reads the two.
    pub fn of(mode: UnixMode, kind: ProfileKind, names: &[UnixName]) -> Unix {
        match (mode, kind) {
            (UnixMode::Open, _) | (UnixMode::Default, ProfileKind::Unrestricted) => Unix::Open,
            (UnixMode::Default, _) => Unix::Default(names.to_vec()),
            (UnixMode::Strict, _) => Unix::Strict(names.to_vec()),
        }
    }

    pub fn names(self) -> Vec<UnixName> {
        match self {
            Unix::Open => Vec::new(),
            Unix::Default(names) | Unix::Strict(names) => names,
        }
    }

    fn meet(self, other: Unix, budget: &mut Budget) -> Result<Unix, TooLarge> {
        Ok(match (self, other) {
            (Unix::Open, unix) | (unix, Unix::Open) => unix,
            (Unix::Default(a), Unix::Default(b)) => Unix::Default(common(&a, &b, budget)?),
            (Unix::Strict(a), Unix::Strict(b)) => Unix::Strict(common(&a, &b, budget)?),
            (Unix::Strict(strict), Unix::Default(default))
            | (Unix::Default(default), Unix::Strict(strict)) => {
                let mut names = common(&strict, &default, budget)?;
                names.extend(strict.into_iter().filter(|name| !gives_power(&name.key)));
                Unix::Strict(names)
            }
        })
    }
}

/// Whether a name, or one below it, is among those that give power.
fn gives_power(key: &[u8]) -> bool {
    POWER_SOCKETS.iter().any(|socket| {
        let mut power = socket.strip_suffix('*').unwrap_or(socket).as_bytes().to_vec();
        if let Some(first @ b'@') = power.first_mut() {
            *first = 0;
        }
        if !socket.ends_with('*') {
            power.push(0);
        }
        power.starts_with(key) || key.starts_with(&power)
    })
}

/// A key that ends in NUL stands for itself, any other for what begins with it:
/// in both cases a longer one that begins so is the narrower.
fn common(a: &[UnixName], b: &[UnixName], budget: &mut Budget) -> Result<Vec<UnixName>, TooLarge> {
    budget.compare(a.len(), b.len())?;
    let mut names: Vec<UnixName> = Vec::new();
    for x in a {
        for y in b {
            let narrower = if y.key.starts_with(&x.key) {
                y
            } else if x.key.starts_with(&y.key) {
                x
            } else {
                continue;
            };
            if !names.iter().any(|n| n.key == narrower.key) {
                names.push(narrower.clone());
            }
        }
    }
    Ok(names)
}

impl Half {
    pub fn meet(self, other: Half, budget: &mut Budget) -> Result<Half, TooLarge> {
        let unix = self.unix.meet(other.unix, budget)?;
        let (kind, rules) = match (self.kind, other.kind) {
            (ProfileKind::None, _) | (_, ProfileKind::None) => (ProfileKind::None, Vec::new()),
            (ProfileKind::Unrestricted, kind) => (kind, other.rules),
            (kind, ProfileKind::Unrestricted) => (kind, self.rules),
            (ProfileKind::Rules, ProfileKind::Rules) => {
                let mut rules = Vec::new();
                for a in &self.rules {
                    for b in other.rules.iter().filter(|b| b.direction == a.direction) {
                        rules.extend(rule(a, b, budget)?);
                    }
                }
                (ProfileKind::Rules, rules)
            }
        };
        Ok(Half { kind, rules, unix })
    }
}

/// What both rules allow; `None`: nothing.
fn rule(a: &Rule, b: &Rule, budget: &mut Budget) -> Result<Option<Rule>, TooLarge> {
    budget.compare(a.nets.len(), b.nets.len())?;
    budget.compare(a.names.len(), b.names.len())?;
    budget.compare(a.ports.len(), b.ports.len())?;
    let ports = pairs(&a.ports, &b.ports, |x, y| {
        let ports: RangeInclusive<u16> = *x.start().max(y.start())..=*x.end().min(y.end());
        (!ports.is_empty()).then_some(ports)
    });
    let (tcp, udp) = (a.tcp && b.tcp, a.udp && b.udp);
    let own_instance = a.own_instance && b.own_instance;
    let reaches = !ports.is_empty() && (tcp || udp);
    let (nets, names) = if reaches {
        (pairs(&a.nets, &b.nets, net), pairs(&a.names, &b.names, name))
    } else {
        (Vec::new(), Vec::new())
    };
    if nets.is_empty() && names.is_empty() && !own_instance {
        return Ok(None);
    }
    budget.rules = budget.rules.checked_sub(1).ok_or(TooLarge)?;
    Ok(Some(Rule {
        direction: a.direction,
        nets,
        names,
        own_instance,
        // Of `self` every port; a rule is never without one.
        ports: if reaches { ports } else { a.ports.clone() },
        tcp: tcp || !reaches,
        udp,
        sni: match (a.sni, b.sni) {
            (Sni::Require, _) | (_, Sni::Require) => Sni::Require,
            (Sni::Ignore, Sni::Ignore) => Sni::Ignore,
            _ => Sni::Default,
        },
        path: format!("{} and {}", a.path, b.path),
        position: b.position.or(a.position),
    }))
}

fn pairs<T: PartialEq>(a: &[T], b: &[T], meet: impl Fn(&T, &T) -> Option<T>) -> Vec<T> {
    let mut met: Vec<T> = Vec::new();
    for found in a.iter().flat_map(|x| b.iter().filter_map(|y| meet(x, y)).collect::<Vec<T>>()) {
        if met.last() != Some(&found) {
            met.push(found);
        }
    }
    met
}

/// The narrower, if it lies in the other. A rule that is wider than multicast
/// opens none of it.
fn net(a: &IpNet, b: &IpNet) -> Option<IpNet> {
    let (outer, inner) = if a.prefix_len() <= b.prefix_len() { (a, b) } else { (b, a) };
    (outer.contains(inner) && is_group(outer) == is_group(inner)).then_some(*inner)
}

fn name(a: &NamePattern, b: &NamePattern) -> Option<NamePattern> {
    let within = |inner: &NamePattern, outer: &NamePattern| {
        inner == outer
            || (outer.below
                && (inner.name.strip_suffix(&outer.name).is_some_and(|front| front.ends_with('.'))
                    || (inner.below && inner.name == outer.name)))
    };
    if within(a, b) {
        Some(a.clone())
    } else if within(b, a) {
        Some(b.clone())
    } else {
        None
    }
}
