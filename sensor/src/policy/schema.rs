//! The JSON Schema of the policy file, for editors and for checks before a
//! policy is shipped.

use super::file::{File, RawEgress, RawInbound};
use super::toolhive::RawPermissions;
use schemars::{Schema, SchemaGenerator, generate::SchemaSettings, json_schema};

/// As text, ready to print.
pub fn text() -> String {
    let schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<File>();
    // A schema is plain JSON; it always has a text.
    serde_json::to_string_pretty(&schema).unwrap_or_default()
}

pub(super) fn profiles(generator: &mut SchemaGenerator) -> Schema {
    let profile = profile(generator);
    json_schema!({ "type": "object", "additionalProperties": profile })
}

fn profile(generator: &mut SchemaGenerator) -> Schema {
    let egress = generator.subschema_for::<Vec<RawEgress>>();
    let inbound = generator.subschema_for::<Vec<RawInbound>>();
    let unix = json_schema!({
        "description": "Unix sockets that may be reached: a path, a path and `*`, or `@name` (abstract).",
        "type": "array",
        "items": { "type": "string", "pattern": "^[/@]" }
    });
    let mut toolhive = generator.subschema_for::<RawPermissions>();
    toolhive.insert("description".to_owned(), "A ToolHive permission profile in place.".into());
    json_schema!({
        "anyOf": [
            {
                "type": "object",
                "properties": { "egress": egress, "inbound": inbound, "unix": unix },
                "additionalProperties": false
            },
            {
                "type": "object",
                "properties": {
                    "toolhive": {
                        "description": "Path of a ToolHive permission profile, relative to this file.",
                        "type": "string"
                    },
                    "unix": unix
                },
                "required": ["toolhive"],
                "additionalProperties": false
            },
            toolhive
        ]
    })
}

pub(super) fn profile_reference(generator: &mut SchemaGenerator) -> Schema {
    let inline = profile(generator);
    json_schema!({
        "description": "Name of a profile, path of a ToolHive permission profile, or a profile in place.",
        "anyOf": [{ "type": "string" }, inline]
    })
}

pub(super) fn ports(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "Ports and port ranges. Absent: every port.",
        "type": "array",
        "minItems": 1,
        "items": {
            "anyOf": [
                { "type": "integer", "minimum": 1, "maximum": 65535 },
                { "type": "string", "pattern": "^[0-9]{1,5}( *- *[0-9]{1,5})?$" }
            ]
        }
    })
}

pub(super) fn protocol(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "`tcp` (default), `udp` or both.",
        "anyOf": [
            { "enum": ["tcp", "udp"] },
            { "type": "array", "minItems": 1, "items": { "enum": ["tcp", "udp"] } }
        ]
    })
}

pub(super) fn sni(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "enum": ["require", "ignore"] })
}

pub(super) fn resolvers(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "IP addresses of DNS resolvers. Absent: those of the policy, or of the host's resolv.conf.",
        "type": "array",
        "minItems": 1,
        "maxItems": super::parse::MAX_RESOLVERS,
        "uniqueItems": true,
        "items": { "type": "string", "anyOf": [{ "format": "ipv4" }, { "format": "ipv6" }] }
    })
}

pub(super) fn search(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "Domains that names are completed by. Absent: those of the host's resolv.conf.",
        "type": "array",
        "maxItems": super::parse::MAX_SEARCH,
        "items": { "type": "string" }
    })
}

pub(super) fn mode(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "enum": ["enforce", "audit"], "default": "audit" })
}

pub(super) fn unix_mode(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "enum": ["default", "strict", "open"], "default": "default" })
}

pub(super) fn tools(_: &mut SchemaGenerator) -> Schema {
    let names = |description: &str, least: usize| {
        json_schema!({
            "description": description,
            "type": "array",
            "minItems": least,
            "maxItems": super::tools::MAX_PATTERNS,
            "uniqueItems": true,
            "items": { "type": "string", "minLength": 1, "maxLength": super::tools::MAX_PATTERN }
        })
    };
    let only = |key: &str, list: Schema| {
        json_schema!({
            "type": "object",
            "properties": { key: list },
            "required": [key],
            "additionalProperties": false
        })
    };
    json_schema!({
        "description": "Tools that may be called, by name or glob (`*`): only those of `allow`, or all but those \
                        of `deny`. Absent: all.",
        "anyOf": [
            only("allow", names("These and no others; empty: none.", 0)),
            only("deny", names("All but these.", 1))
        ]
    })
}

pub(super) fn on_violation(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "What a call of a forbidden tool brings in `enforce`: a finding, and the end of the instance \
                        (`kill`) or of all it reaches (`quarantine`). In `audit`: a finding.",
        "enum": ["report", "kill", "quarantine"],
        "default": "report"
    })
}

pub(super) fn capture(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "Content of requests and responses in events. Absent: only metadata.",
        "type": "object",
        "properties": {
            "content": {
                "description": "`redacted`: without the secrets that were found in it.",
                "enum": ["none", "redacted"],
                "default": "none"
            },
            "max_bytes": {
                "description": "Of each request and of each response.",
                "type": "integer",
                "minimum": 1,
                "maximum": super::tools::MAX_CAPTURE_BYTES,
                "default": super::tools::CAPTURE_BYTES
            }
        },
        "additionalProperties": false
    })
}

pub(super) fn sha256(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "SHA-256 of the file at `exe`, in hexadecimal digits. Of a script the executable is its \
                        interpreter.",
        "type": "string",
        "pattern": "^[0-9a-fA-F]{64}$"
    })
}

/// `sha256` is of the executable, so that it stands beside `exe` alone.
pub(super) fn hash_beside_exe(schema: &mut Schema) {
    let alone = serde_json::json!({
        "sha256": { "required": ["exe"], "propertyNames": { "enum": ["exe", "sha256"] } }
    });
    schema.insert("dependentSchemas".to_owned(), alone);
}

pub(super) fn one_or_many(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "anyOf": [
            { "type": "string" },
            { "type": "array", "minItems": 1, "items": { "type": "string" } }
        ]
    })
}
