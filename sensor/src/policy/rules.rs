//! One entry of `egress`, `inbound` or `unix`, checked.

use super::address;
use super::diagnostic::Position;
use super::file::{OneOrMany, RawEgress, RawInbound};
use super::model::{ANY_PORT, Direction, Rule, Sni};
use super::names::NamePattern;
use super::parse::{Checker, at};
use serde_saphyr::Spanned;
use std::ops::RangeInclusive;

pub fn egress(checker: &mut Checker, raw: &RawEgress, path: String, position: Option<Position>) -> Rule {
    let mut rule = Rule {
        direction: Direction::Egress,
        nets: Vec::with_capacity(raw.to.len()),
        names: Vec::new(),
        own_instance: false,
        ports: Vec::new(),
        tcp: true,
        udp: false,
        sni: Sni::Default,
        path,
        position,
    };
    if raw.to.is_empty() {
        checker.error(position, rule.path.clone(), "`to` names no destination").help =
            Some("leave the rule out to allow nothing".to_owned());
    }
    for (index, text) in raw.to.iter().enumerate() {
        if text.value == "self" {
            rule.own_instance = true;
            if raw.ports.is_some() || raw.protocol.is_some() {
                let here = format!("{}.to[{index}]", rule.path);
                checker.error(at(text), here, "`self` means every port and protocol").help =
                    Some("give it a rule of its own: `- to: [self]`".to_owned());
            }
            continue;
        }
        match address::net(&text.value) {
            Some(Ok(net)) => rule.nets.push(net),
            Some(Err(e)) => checker.address(at(text), format!("{}.to[{index}]", rule.path), e),
            None => match NamePattern::parse(&text.value) {
                Ok(name) => rule.names.push(name),
                Err(e) => {
                    let here = format!("{}.to[{index}]", rule.path);
                    checker.error(at(text), here, format!("`{}`: {e}", text.value.escape_debug()));
                }
            },
        }
    }
    ports_and_protocol(checker, &mut rule, raw.ports.as_ref(), raw.protocol.as_ref());
    sni(checker, &mut rule, raw.sni.as_ref());
    doubts_about_names(checker, &rule);
    rule
}

fn sni(checker: &mut Checker, rule: &mut Rule, sni: Option<&Spanned<String>>) {
    let Some(sni) = sni else { return };
    let here = format!("{}.sni", rule.path);
    match sni.value.as_str() {
        "ignore" => {
            rule.sni = Sni::Ignore;
            if rule.names.is_empty() {
                checker.warning(at(sni), here, "`sni` says nothing here: the rule names no host");
            }
        }
        "require" => {
            rule.sni = Sni::Require;
            if rule.names.is_empty() {
                checker.error(at(sni), here, "`sni: require` in a rule that names no host").help =
                    Some("addresses are not checked for a name; leave `sni` out".to_owned());
            } else if rule.udp {
                checker.error(at(sni), here, "`sni: require` cannot be checked on UDP").help =
                    Some("give UDP a rule of its own, without `sni`".to_owned());
            } else if !rule.nets.is_empty() {
                let message = "`sni: require` holds for the names of this rule, not for its addresses";
                checker.warning(at(sni), here, message).help =
                    Some("give the addresses a rule of their own".to_owned());
            }
        }
        other => {
            let message = format!("`{}` is no way to treat SNI", other.escape_debug());
            checker.error(at(sni), here, message).help = Some("write `require` or `ignore`".to_owned());
        }
    }
}

/// What a rule with names will surprise somebody with.
pub fn doubts_about_names(checker: &mut Checker, rule: &Rule) {
    let Some(first) = rule.names.first() else { return };
    if rule.udp && rule.ports.iter().any(|ports| ports.contains(&443)) {
        let message =
            format!("QUIC (UDP 443) to `{first}` is allowed without a look at the name it asks for");
        checker.warning(rule.position, rule.path.clone(), message).help = Some(
            "where servers share an address, any of them can be reached; leave `udp` out and clients use TCP"
                .to_owned(),
        );
    }
    let single = |name: &&NamePattern| !name.below && !name.name.contains('.') && name.name != "localhost";
    if let Some(name) = rule.names.iter().find(single) {
        let message =
            format!("`{name}` has one label: resolvers are asked for it with a search domain behind");
        checker.warning(rule.position, rule.path.clone(), message).help =
            Some(format!("write the whole name, like `{name}.example.com`"));
    }
}

pub fn inbound(checker: &mut Checker, raw: &RawInbound, path: String, position: Option<Position>) -> Rule {
    let mut rule = Rule {
        direction: Direction::Inbound,
        nets: Vec::with_capacity(raw.from.len()),
        names: Vec::new(),
        own_instance: false,
        ports: Vec::new(),
        tcp: true,
        udp: false,
        sni: Sni::Default,
        path,
        position,
    };
    if raw.from.is_empty() {
        checker.error(position, rule.path.clone(), "`from` names no peer").help =
            Some("leave the rule out to allow none".to_owned());
    }
    for (index, text) in raw.from.iter().enumerate() {
        match address::net(&text.value) {
            Some(Ok(net)) => rule.nets.push(net),
            Some(Err(e)) => checker.address(at(text), format!("{}.from[{index}]", rule.path), e),
            None => {
                let here = format!("{}.from[{index}]", rule.path);
                let message = format!("`{}` is not an address", text.value.escape_debug());
                checker.error(at(text), here, message).help =
                    Some("a peer is known by its address only: write CIDRs".to_owned());
            }
        }
    }
    ports_and_protocol(checker, &mut rule, raw.ports.as_ref(), raw.protocol.as_ref());
    rule
}

fn ports_and_protocol(
    checker: &mut Checker,
    rule: &mut Rule,
    ports: Option<&Spanned<Vec<Spanned<String>>>>,
    protocol: Option<&Spanned<OneOrMany>>,
) {
    match ports {
        None => rule.ports.push(ANY_PORT),
        Some(ports) if ports.value.is_empty() => {
            let here = format!("{}.ports", rule.path);
            checker.error(at(ports), here, "an empty list of ports").help =
                Some("leave `ports` out for every port, or the rule for none".to_owned());
        }
        Some(ports) => {
            for (index, text) in ports.value.iter().enumerate() {
                match address::ports(&text.value) {
                    Ok(range) => rule.ports.push(range),
                    Err(e) => checker.address(at(text), format!("{}.ports[{index}]", rule.path), e),
                }
            }
            merge(&mut rule.ports);
        }
    }
    let Some(protocol) = protocol else { return };
    rule.tcp = false;
    for text in &protocol.value.0 {
        match text.value.as_str() {
            "tcp" => rule.tcp = true,
            "udp" => rule.udp = true,
            other => {
                let here = format!("{}.protocol", rule.path);
                let message = format!("`{}` is no protocol", other.escape_debug());
                checker.error(at(text).or(at(protocol)), here, message).help =
                    Some("write `tcp`, `udp` or `[tcp, udp]`; nothing else can be allowed".to_owned());
            }
        }
    }
    if protocol.value.0.is_empty() {
        let here = format!("{}.protocol", rule.path);
        checker.error(at(protocol), here, "an empty list of protocols");
    }
}

/// Sorted, overlapping and adjacent ranges joined.
fn merge(ranges: &mut Vec<RangeInclusive<u16>>) {
    ranges.sort_by_key(|r| (*r.start(), *r.end()));
    let mut merged: Vec<RangeInclusive<u16>> = Vec::with_capacity(ranges.len());
    for range in ranges.drain(..) {
        match merged.last_mut() {
            Some(last) if u32::from(*range.start()) <= u32::from(*last.end()) + 1 => {
                *last = *last.start()..=*last.end().max(range.end());
            }
            _ => merged.push(range),
        }
    }
    *ranges = merged;
}

/// `/run/x.sock`, `/run/x/*` (a prefix), `@name` (abstract).
pub fn unix_key(text: &str) -> Result<Vec<u8>, String> {
    if text.contains('\0') {
        return Err("a socket name with NUL".to_owned());
    }
    if !text.starts_with('/') && !text.starts_with('@') {
        return Err(format!(
            "`{}` is neither an absolute path nor an abstract name (`@name`)",
            text.escape_debug()
        ));
    }
    let (name, prefix) = match text.strip_suffix('*') {
        Some(name) => (name, true),
        None => (text, false),
    };
    if name.contains('*') {
        return Err(format!("`{}`: `*` stands at the end only", text.escape_debug()));
    }
    if name.len() <= 1 {
        return Err(format!(
            "`{}` would cover every socket; write `unix: open` for the server",
            text.escape_debug()
        ));
    }
    if name.split('/').any(|part| part == "." || part == "..") || name.contains("//") {
        return Err(format!("`{}`: write the path without `.`, `..` and `//`", text.escape_debug()));
    }
    let mut key = name.as_bytes().to_vec();
    if key[0] == b'@' {
        key[0] = 0;
    }
    if !prefix {
        key.push(0);
    }
    if key.len() > sensor_common::unix::PATH_BYTES {
        return Err(format!("longer than {} bytes", sensor_common::unix::PATH_BYTES - 1));
    }
    Ok(key)
}
