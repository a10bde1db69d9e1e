//! The policies that tests run under.

use crate::network::Family;
use crate::peer::PORT;

/// Server under the built-in profile `none`.
pub const NONE: &str = "under-none";
/// Server under the profile `wire`: the allowed networks, port 7001.
pub const WIRE: &str = "under-wire";
/// Server that nothing is denied to.
pub const OPEN: &str = "unrestricted";
/// The argument that makes a program [`OPEN`].
pub const OPEN_ARGUMENT: &str = "--mcp-unrestricted-server";
/// Like [`NONE`], in audit.
pub const AUDIT: &str = "audited";

/// A policy text, put together from pieces.
#[derive(Clone, Default)]
pub struct Policy {
    top: String,
    profiles: String,
    servers: String,
    unknown: Option<String>,
}

impl Policy {
    /// [`NONE`], [`WIRE`], [`OPEN`] and [`AUDIT`].
    pub fn standard() -> Policy {
        Policy::default()
            .profile("wire", &Policy::wire())
            .server(NONE, "none", "enforce", "")
            .server(WIRE, "wire", "enforce", "")
            .server(OPEN, "unrestricted", "enforce", &format!("match: [{{argv: [\"{OPEN_ARGUMENT}\"]}}]"))
            .server(AUDIT, "none", "audit", "")
    }

    fn wire() -> String {
        format!(
            "egress:\n\
             \x20 - {{to: [10.77.1.0/24, \"fd77:0:0:1::/64\"], ports: [{PORT}], protocol: tcp}}\n\
             \x20 - {{to: [10.77.1.0/24, \"fd77:0:0:1::/64\"], ports: [{PORT}], protocol: udp}}\n"
        )
    }

    /// A key of the file itself, one line.
    pub fn top(mut self, line: &str) -> Policy {
        self.top += &format!("{line}\n");
        self
    }

    /// `body`: the profile's keys, at no indentation.
    pub fn profile(mut self, name: &str, body: &str) -> Policy {
        self.profiles += &format!("  {name}:\n");
        for line in body.lines() {
            self.profiles += &format!("    {line}\n");
        }
        self
    }

    /// `extra`: more keys (`match: […]`), one a line; without `match` the
    /// server is known to `mcp-sensor exec` only.
    pub fn server(mut self, name: &str, profile: &str, mode: &str, extra: &str) -> Policy {
        self.servers += &format!("  - name: {name}\n    profile: {profile}\n    mode: {mode}\n");
        for line in extra.lines() {
            self.servers += &format!("    {line}\n");
        }
        if !extra.contains("match:") {
            self.servers += &format!("    match: [{{argv: [\"only-by-exec-{name}\"]}}]\n");
        }
        self
    }

    /// What holds for servers that nobody declared; without this `none` in audit.
    pub fn unknown(mut self, profile: &str, mode: &str) -> Policy {
        self.unknown = Some(format!("{{profile: {profile}, mode: {mode}}}"));
        self
    }

    pub fn yaml(&self) -> String {
        let profiles = if self.profiles.is_empty() { "  {}\n" } else { &self.profiles };
        let servers = if self.servers.is_empty() { "  []\n" } else { &self.servers };
        let unknown = self.unknown.as_deref().unwrap_or("{profile: none, mode: audit}");
        format!("version: 1\n{}profiles:\n{profiles}servers:\n{servers}unknown: {unknown}\n", self.top)
    }
}

/// The allowed network of one family, as a CIDR.
pub fn allowed_cidr(family: Family) -> &'static str {
    match family {
        Family::V4 => "10.77.1.0/24",
        Family::V6 => "fd77:0:0:1::/64",
    }
}
