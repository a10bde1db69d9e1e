//! The policy file as it is written: YAML, every key known, every value with
//! its place. Nothing here is checked beyond its shape; `parse` does that.

use schemars::JsonSchema;
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;
use std::fmt;
use std::marker::PhantomData;

/// The policy of one host: what each MCP server may reach.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "mcp-sensor policy")]
pub struct File {
    /// Version of this format; 1.
    #[schemars(with = "VersionSchema")]
    pub version: Spanned<u64>,
    /// Profiles by name. `none` and `unrestricted` are built in.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::profiles")]
    pub profiles: Named<RawProfile>,
    /// The declared servers. Where two match one program, the first wins.
    #[serde(default)]
    #[schemars(with = "Vec<RawServer>")]
    pub servers: Vec<Spanned<RawServer>>,
    /// For MCP servers that nobody declared.
    #[serde(default)]
    pub unknown: Option<RawUnknown>,
    /// DNS resolvers of every server that names none of its own. Absent: those
    /// of the host's resolv.conf.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::resolvers")]
    pub resolvers: Option<Spanned<Vec<Spanned<String>>>>,
    /// Domains that names are completed by before they are asked for. Absent:
    /// those of the host's resolv.conf.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::search")]
    pub search: Option<Spanned<Vec<Spanned<String>>>>,
    /// Further launchers: absolute paths or globs of executables and scripts
    /// (npx, uvx, docker …) beside those found in the system's directories.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub launchers: Vec<Spanned<String>>,
}

/// What a server may reach. An empty profile allows nothing.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawProfile {
    pub egress: Option<Vec<Spanned<RawEgress>>>,
    pub inbound: Option<Vec<Spanned<RawInbound>>>,
    pub unix: Option<Vec<Spanned<String>>>,
    pub toolhive: Option<Spanned<String>>,
    // The keys of a ToolHive permission profile written in place.
    pub name: Option<Spanned<String>>,
    pub read: Option<Spanned<IgnoredAny>>,
    pub write: Option<Spanned<IgnoredAny>>,
    pub privileged: Option<Spanned<bool>>,
    pub network: Option<Spanned<super::toolhive::RawNetwork>>,
}

/// Destinations that are allowed.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Egress")]
pub struct RawEgress {
    /// CIDRs, addresses, host names (`api.example.com`, or `*.example.com` for
    /// any depth below it), or `self` (loopback to a socket of the same instance).
    #[schemars(with = "Vec<String>", length(min = 1))]
    pub to: Vec<Spanned<String>>,
    /// Ports and port ranges (`6000-6010`). Absent: every port.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::ports")]
    pub ports: Option<Spanned<Vec<Spanned<String>>>>,
    /// `tcp` (default), `udp` or both.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::protocol")]
    pub protocol: Option<Spanned<OneOrMany>>,
    /// Whether a TLS ClientHello must name the host (`require`) or not
    /// (`ignore`). Absent: it must on port 443. TCP, host names only.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::sni")]
    pub sni: Option<Spanned<String>>,
}

/// Peers that may connect to the server.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Inbound")]
pub struct RawInbound {
    /// CIDRs and addresses of the peers.
    #[schemars(with = "Vec<String>", length(min = 1))]
    pub from: Vec<Spanned<String>>,
    /// Local ports and port ranges. Absent: every port.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::ports")]
    pub ports: Option<Spanned<Vec<Spanned<String>>>>,
    /// `tcp` (default), `udp` or both.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::protocol")]
    pub protocol: Option<Spanned<OneOrMany>>,
}

/// One server: what it is called, how it is recognised, what holds for it.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Server")]
pub struct RawServer {
    /// Unique; letters, digits, `.`, `_`, `-`, `/`, `@`.
    #[schemars(with = "String")]
    pub name: Spanned<String>,
    /// Name of a profile, path of a ToolHive permission profile (relative to
    /// the policy file), or such a profile in place.
    #[schemars(schema_with = "super::schema::profile_reference")]
    pub profile: Spanned<ProfileReference>,
    /// For npx, uvx or docker, before the server itself runs. Absent: `profile`.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::profile_reference")]
    pub launcher_profile: Option<Spanned<ProfileReference>>,
    /// `enforce` denies, `audit` (default) records what it would have denied.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::mode")]
    pub mode: Option<Spanned<String>>,
    /// How the server is recognised: any one of these.
    #[serde(default, rename = "match")]
    #[schemars(with = "Vec<RawMatch>")]
    pub matches: Vec<Spanned<RawMatch>>,
    /// Servers that this one may start as instances of their own.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub may_launch: Vec<Spanned<String>>,
    /// Unix sockets: `default` (all but those that give power over the host),
    /// `strict` (only those that the profile names), `open` (all).
    #[serde(default)]
    #[schemars(schema_with = "super::schema::unix_mode")]
    pub unix: Option<Spanned<String>>,
    /// DNS resolvers of this server. Absent: those of the policy.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::resolvers")]
    pub resolvers: Option<Spanned<Vec<Spanned<String>>>>,
    /// Tools that may be called: all but some, or only some. Absent: all.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::tools")]
    pub tools: Option<Spanned<RawTools>>,
    /// What a call of a forbidden tool brings in `enforce`: a finding
    /// (`report`, default), and the end of the instance (`kill`) or of all it
    /// reaches (`quarantine`).
    #[serde(default)]
    #[schemars(schema_with = "super::schema::on_violation")]
    pub on_violation: Option<Spanned<String>>,
    /// Whether content of calls is recorded. Absent: only metadata.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::capture")]
    pub capture: Option<Spanned<RawCapture>>,
}

/// Names of tools, or globs of them (`*`). One of the two.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawTools {
    pub allow: Option<Spanned<Vec<Spanned<String>>>>,
    pub deny: Option<Spanned<Vec<Spanned<String>>>>,
}

/// Content of requests and responses in events.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawCapture {
    pub content: Option<Spanned<String>>,
    pub max_bytes: Option<Spanned<u64>>,
}

/// One way to recognise a server. Keys stand alone, except that `exe` may be
/// added to `package`, `script`, `argv` or `image`, and `sha256` to `exe` alone.
#[derive(Debug, Default, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Match", transform = super::schema::hash_beside_exe)]
pub struct RawMatch {
    /// npm or PyPI package, without version.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub package: Option<Spanned<String>>,
    /// File name of the script that an interpreter runs.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub script: Option<Spanned<String>>,
    /// A whole argument, or several that follow each other.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::one_or_many")]
    pub argv: Option<Spanned<OneOrMany>>,
    /// Absolute path of the executable.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub exe: Option<Spanned<String>>,
    /// SHA-256 of the file at `exe`, in hexadecimal digits. Of a script the
    /// executable is its interpreter.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::sha256")]
    pub sha256: Option<Spanned<String>>,
    /// systemd unit.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub unit: Option<Spanned<String>>,
    /// Container id, at least its first 12 digits.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub container: Option<Spanned<String>>,
    /// Container image as it is named to docker, podman or nerdctl.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub image: Option<Spanned<String>>,
}

/// What holds for MCP servers that no entry of `servers` matches.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Unknown")]
pub struct RawUnknown {
    /// Default: `none`.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::profile_reference")]
    pub profile: Option<Spanned<ProfileReference>>,
    /// Default: `audit`.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::mode")]
    pub mode: Option<Spanned<String>>,
    /// As for a server.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::unix_mode")]
    pub unix: Option<Spanned<String>>,
    /// As for a server.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::tools")]
    pub tools: Option<Spanned<RawTools>>,
    /// As for a server.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::on_violation")]
    pub on_violation: Option<Spanned<String>>,
    /// As for a server.
    #[serde(default)]
    #[schemars(schema_with = "super::schema::capture")]
    pub capture: Option<Spanned<RawCapture>>,
}

#[derive(JsonSchema)]
#[allow(dead_code)]
#[schemars(transparent, inline)]
struct VersionSchema(#[schemars(range(min = 1, max = 1))] u64);

/// `profile: NAME`, `profile: ./file.json` or a ToolHive profile in place.
#[derive(Debug)]
pub enum ProfileReference {
    Text(String),
    Inline(Box<RawProfile>),
}

impl<'de> Deserialize<'de> for ProfileReference {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reference;
        impl<'de> Visitor<'de> for Reference {
            type Value = ProfileReference;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str(
                    "the name of a profile, the path of a ToolHive profile, or such a profile in place",
                )
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(ProfileReference::Text(text.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                let map = serde::de::value::MapAccessDeserializer::new(map);
                Ok(ProfileReference::Inline(Box::new(RawProfile::deserialize(map)?)))
            }
        }
        deserializer.deserialize_any(Reference)
    }
}

/// A text or a list of texts.
#[derive(Debug)]
pub struct OneOrMany(pub Vec<Spanned<String>>);

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Texts;
        impl<'de> Visitor<'de> for Texts {
            type Value = OneOrMany;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a text (in quotes if it looks like a number) or a list of texts")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                let nowhere = serde_saphyr::Location::UNKNOWN;
                Ok(OneOrMany(vec![Spanned::new(text.to_owned(), nowhere, nowhere)]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut texts = Vec::new();
                while let Some(text) = seq.next_element()? {
                    texts.push(text);
                }
                Ok(OneOrMany(texts))
            }
        }
        deserializer.deserialize_any(Texts)
    }
}

/// A mapping in the order of the file.
#[derive(Debug)]
pub struct Named<T>(pub Vec<(Spanned<String>, T)>);

impl<T> Default for Named<T> {
    fn default() -> Self {
        Named(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Named<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Named<T>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a mapping from names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Named(entries))
            }
        }
        deserializer.deserialize_map(Entries(PhantomData))
    }
}
