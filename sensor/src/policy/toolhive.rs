//! ToolHive permission profiles (JSON) read as profiles.
//!
//! Where ToolHive's own backends disagree about what a file means, it is
//! refused or read the strict way with a warning.

use super::diagnostic::{Diagnostic, Position};
use super::model::{ANY_PORT, Direction, Profile, ProfileKind, Rule, Sni};
use super::names::NamePattern;
use super::parse::{Checker, at};
use super::{address, parse, rules};
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::de::IgnoredAny;
use serde_saphyr::Spanned;

#[derive(Clone, Debug, Default, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ToolHiveNetwork")]
pub struct RawNetwork {
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub mode: Option<Spanned<String>>,
    #[serde(default)]
    #[schemars(with = "Option<RawOutbound>")]
    pub outbound: Option<Spanned<RawOutbound>>,
    #[serde(default)]
    #[schemars(with = "Option<RawInboundHosts>")]
    pub inbound: Option<Spanned<RawInboundHosts>>,
}

/// Both spellings: JSON files say `allow_host`, Kubernetes resources `allowHost`.
#[derive(Clone, Debug, Default, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ToolHiveOutbound")]
pub struct RawOutbound {
    #[serde(default, alias = "insecureAllowAll")]
    #[schemars(with = "Option<bool>")]
    pub insecure_allow_all: Option<Spanned<bool>>,
    #[serde(default, alias = "allowHost")]
    #[schemars(with = "Option<Vec<String>>")]
    pub allow_host: Option<Vec<Spanned<String>>>,
    #[serde(default, alias = "allowPort")]
    #[schemars(with = "Option<Vec<u16>>")]
    pub allow_port: Option<Vec<Spanned<String>>>,
    #[serde(default, alias = "allowTransport")]
    #[schemars(with = "Option<Vec<String>>")]
    pub allow_transport: Option<Spanned<IgnoredAny>>,
}

#[derive(Clone, Debug, Default, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ToolHiveInbound")]
pub struct RawInboundHosts {
    #[serde(default, alias = "allowHost")]
    #[schemars(with = "Option<Vec<String>>")]
    pub allow_host: Option<Vec<Spanned<String>>>,
}

/// A permission profile in a file of its own.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ToolHiveProfile")]
pub struct RawPermissions {
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub name: Option<Spanned<String>>,
    #[serde(default)]
    #[schemars(with = "Option<Vec<serde_json::Value>>")]
    pub read: Option<Spanned<IgnoredAny>>,
    #[serde(default)]
    #[schemars(with = "Option<Vec<serde_json::Value>>")]
    pub write: Option<Spanned<IgnoredAny>>,
    #[serde(default)]
    #[schemars(with = "Option<bool>")]
    pub privileged: Option<Spanned<bool>>,
    #[schemars(with = "RawNetwork")]
    pub network: Option<Spanned<RawNetwork>>,
}

/// Largest permission profile file.
pub const MAX_BYTES: usize = 1 << 20;

/// A permission profile as its own document. The name is the caller's to give.
pub fn parse(bytes: &[u8]) -> Result<(Profile, Vec<Diagnostic>), Vec<Diagnostic>> {
    let raw: RawPermissions = parse::document(bytes, MAX_BYTES)?;
    let mut checker = Checker::default();
    let profile = convert(&mut checker, "", &raw, Some(Position { line: 1, column: 1 }));
    let (warnings, errors) = checker.finish();
    match profile {
        Some(profile) if errors.is_empty() => Ok((profile, warnings)),
        _ => Err(errors),
    }
}

/// `None`: refused, the checker says why.
pub fn convert(
    checker: &mut Checker,
    path: &str,
    raw: &RawPermissions,
    position: Option<Position>,
) -> Option<Profile> {
    let name = raw.name.as_ref().map_or_else(String::new, |n| n.value.clone());
    let mut profile = Profile { position, ..Profile::builtin(&name, ProfileKind::Rules) };
    let Some(network) = &raw.network else {
        checker.error(position, path, "a permission profile without `network`").help = Some(
            "ToolHive reads that as allow-all in one backend and deny-all in another; \
             write `\"network\": {\"outbound\": {}}` for nothing"
                .to_owned(),
        );
        return None;
    };
    if raw.privileged.as_ref().is_some_and(|p| p.value) {
        let place = raw.privileged.as_ref().and_then(at);
        checker.warning(place, path, "`privileged` is ignored: it is about the container, not the network");
    }
    for (key, value) in [("read", &raw.read), ("write", &raw.write)] {
        if let Some(value) = value {
            checker.warning(
                at(value),
                path,
                format!("`{key}` is ignored: it is about files, not the network"),
            );
        }
    }
    let network_path = join(path, "network");
    if !mode(checker, &network_path, network) {
        return Some(Profile { kind: ProfileKind::None, ..profile });
    }
    match &network.value.outbound {
        None => {
            checker.warning(at(network), &network_path, "no `outbound`: read as nothing allowed");
        }
        Some(outbound) => {
            outbound_rules(checker, &join(&network_path, "outbound"), outbound, &mut profile);
        }
    }
    if let Some(inbound) = &network.value.inbound {
        inbound_rules(checker, &join(&network_path, "inbound"), inbound, &mut profile);
    }
    Some(profile)
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// False: `mode: none`, nothing is allowed whatever else stands there.
fn mode(checker: &mut Checker, path: &str, network: &Spanned<RawNetwork>) -> bool {
    let Some(mode) = &network.value.mode else { return true };
    match mode.value.as_str() {
        "none" => {
            if network.value.outbound.is_some() || network.value.inbound.is_some() {
                checker.warning(at(mode), path, "`mode: none` wins over `outbound` and `inbound`");
            }
            return false;
        }
        "" | "bridge" | "default" => {}
        "host" => {
            checker.warning(at(mode), path, "`mode: host` is ignored: the rules below hold on every network");
        }
        other => {
            checker.warning(at(mode), path, format!("`mode: {other}` is ignored"));
        }
    }
    true
}

fn outbound_rules(checker: &mut Checker, path: &str, outbound: &Spanned<RawOutbound>, profile: &mut Profile) {
    let raw = &outbound.value;
    if let Some(transport) = &raw.allow_transport {
        checker.warning(at(transport), path, "`allow_transport` is ignored: ToolHive dropped it");
    }
    let hosts = raw.allow_host.as_deref().unwrap_or_default();
    let ports = raw.allow_port.as_deref().unwrap_or_default();
    if let Some(all) = raw.insecure_allow_all.as_ref().filter(|all| all.value) {
        let rest = if hosts.is_empty() && ports.is_empty() { "" } else { "; hosts and ports are ignored" };
        checker.warning(
            at(all),
            path,
            format!("`insecure_allow_all` is `unrestricted`: recorded, never denied{rest}"),
        );
        profile.kind = ProfileKind::Unrestricted;
        return;
    }
    if hosts.is_empty() && ports.is_empty() {
        return;
    }
    let mut rule = Rule {
        direction: Direction::Egress,
        nets: Vec::new(),
        names: Vec::new(),
        own_instance: false,
        ports: Vec::new(),
        // Its enforcement is an HTTP proxy.
        tcp: true,
        udp: false,
        sni: Sni::Default,
        path: path.to_owned(),
        position: at(outbound),
    };
    for (index, port) in ports.iter().enumerate() {
        match address::ports(&port.value) {
            Ok(range) => rule.ports.push(range),
            Err(e) => checker.address(at(port), format!("{path}.allow_port[{index}]"), e),
        }
    }
    if ports.is_empty() {
        checker.warning(at(outbound), path, "hosts without `allow_port`: every TCP port of them");
        rule.ports.push(ANY_PORT);
    }
    if hosts.is_empty() {
        checker.warning(at(outbound), path, "ports without `allow_host`: these ports of every host");
        rule.nets = everywhere();
    }
    for (index, host) in hosts.iter().enumerate() {
        let here = format!("{path}.allow_host[{index}]");
        if let Some(net) = address::net(&host.value) {
            match net {
                Ok(net) => rule.nets.push(net),
                Err(e) => checker.address(at(host), here, e),
            }
            continue;
        }
        // `.x` is the apex and everything below; `*.x` only what is below.
        let (apex, below) = match host.value.strip_prefix('.') {
            Some(apex) => (Some(apex), Some(format!("*.{apex}"))),
            None => (Some(host.value.as_str()), None),
        };
        for name in apex.into_iter().chain(below.as_deref()) {
            match NamePattern::parse(name) {
                Ok(name) => rule.names.push(name),
                Err(e) => {
                    checker.error(at(host), here.clone(), format!("`{}`: {e}", host.value.escape_debug()));
                    break;
                }
            }
        }
    }
    rules::doubts_about_names(checker, &rule);
    profile.rules.push(rule);
}

fn inbound_rules(
    checker: &mut Checker,
    path: &str,
    inbound: &Spanned<RawInboundHosts>,
    profile: &mut Profile,
) {
    let hosts = inbound.value.allow_host.as_deref().unwrap_or_default();
    let mut nets = Vec::new();
    for (index, host) in hosts.iter().enumerate() {
        let here = format!("{path}.allow_host[{index}]");
        match address::net(&host.value) {
            Some(Ok(net)) => nets.push(net),
            Some(Err(e)) => checker.address(at(host), here, e),
            None if host.value.eq_ignore_ascii_case("localhost") => nets.extend(loopback()),
            None => {
                let message = format!("`{}` is ignored: a peer is known by its address only", host.value);
                checker.warning(at(host), here, message);
            }
        }
    }
    if !nets.is_empty() {
        profile.rules.push(Rule {
            direction: Direction::Inbound,
            nets,
            names: Vec::new(),
            own_instance: false,
            ports: vec![ANY_PORT],
            tcp: true,
            udp: false,
            sni: Sni::Default,
            path: path.to_owned(),
            position: at(inbound),
        });
    }
}

fn everywhere() -> Vec<IpNet> {
    vec![
        IpNet::V4(ipnet::Ipv4Net::new_assert(std::net::Ipv4Addr::UNSPECIFIED, 0)),
        IpNet::V6(ipnet::Ipv6Net::new_assert(std::net::Ipv6Addr::UNSPECIFIED, 0)),
    ]
}

fn loopback() -> [IpNet; 2] {
    [
        IpNet::V4(ipnet::Ipv4Net::new_assert(std::net::Ipv4Addr::new(127, 0, 0, 0), 8)),
        IpNet::V6(ipnet::Ipv6Net::new_assert(std::net::Ipv6Addr::LOCALHOST, 128)),
    ]
}
