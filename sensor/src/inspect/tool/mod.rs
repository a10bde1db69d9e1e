//! Poison in what a server says of its tools: text that is meant for the model
//! and not for the person who approved the server.
//!
//! Every string of a tool is looked at, names of schema members included
//! ("full-schema poisoning"). Known patterns only: what is found is a reason to
//! look, what is not found is no proof.

mod encoded;
mod hidden;
mod names;
mod patterns;
mod plain;

use std::collections::HashSet;

use serde_json::Value;

use super::{Found, Key, Kind, PLACE_BYTES, Severity, cut};

/// Findings of one tool.
pub const MAX_FOUND: usize = 32;
/// Bytes of strings of one tool that are looked at.
pub const MAX_BYTES: usize = 1 << 20;
/// What a single string is cut at; longer ones are looked at in parts.
const PART_BYTES: usize = 64 * 1024;
/// Parts share this much, for what stands across their border.
const SHARED_BYTES: usize = 1024;
/// Levels of a schema.
const MAX_DEPTH: usize = 64;

/// Name of the finding where a tool was larger than what is looked at.
pub const TOO_LARGE: &str = "tool_too_large";

/// Looks at a tool as listed by `tools/list`. `others` has (server, tool) of
/// the other servers that the same client is connected to, without names that
/// this server lists itself.
pub fn check(tool: &Value, others: &HashSet<(String, String)>, key: &Key) -> Vec<Found> {
    let mut check =
        Check { others: names::Others::new(others), key, found: Vec::new(), left: MAX_BYTES, cut: false };
    if let Some(name) = tool.get("name").and_then(Value::as_str) {
        check.name(name);
    }
    check.walk(tool, &mut String::new(), 0);
    if check.cut {
        check.add(TOO_LARGE, Severity::Medium, "", b"");
    }
    check.found
}

/// The same for one text that a server says to the model elsewhere: a prompt,
/// `instructions`, the message of a failed call.
pub fn check_text(place: &str, text: &str, others: &HashSet<(String, String)>, key: &Key) -> Vec<Found> {
    let mut check =
        Check { others: names::Others::new(others), key, found: Vec::new(), left: MAX_BYTES, cut: false };
    check.text(place, text);
    if check.cut {
        check.add(TOO_LARGE, Severity::Medium, place, b"");
    }
    check.found
}

struct Check<'a> {
    others: names::Others,
    key: &'a Key,
    found: Vec<Found>,
    left: usize,
    cut: bool,
}

impl Check<'_> {
    fn walk(&mut self, value: &Value, place: &mut String, depth: usize) {
        if depth > MAX_DEPTH || self.found.len() >= MAX_FOUND {
            self.cut |= depth > MAX_DEPTH;
            return;
        }
        let length = place.len();
        match value {
            Value::String(text) => self.text(place, text),
            Value::Array(items) => {
                for (n, item) in items.iter().enumerate() {
                    place.push_str(&format!("/{n}"));
                    self.walk(item, place, depth + 1);
                    place.truncate(length);
                }
            }
            Value::Object(members) => {
                for (name, value) in members {
                    place.push('/');
                    place.push_str(&name.replace('~', "~0").replace('/', "~1"));
                    self.text(place, name);
                    self.walk(value, place, depth + 1);
                    place.truncate(length);
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    fn name(&mut self, name: &str) {
        if names::confusable(name) {
            self.add("confusable_name", Severity::Medium, "/name", name.as_bytes());
        }
    }

    fn text(&mut self, place: &str, text: &str) {
        let taken = cut(text, self.left);
        self.cut |= taken.len() < text.len();
        self.left -= taken.len();
        let mut rest = taken;
        loop {
            let part = cut(rest, PART_BYTES);
            self.part(place, part);
            if part.len() == rest.len() {
                return;
            }
            rest = &rest[rest.floor_char_boundary(part.len() - SHARED_BYTES)..];
        }
    }

    fn part(&mut self, place: &str, text: &str) {
        for (rule, found) in hidden::find(text) {
            self.add(rule, Severity::High, place, found.as_bytes());
        }
        let plain = plain::plain(text);
        for (rule, severity, found) in patterns::find(&plain) {
            self.add(rule, severity, place, found);
        }
        if let Some(found) = self.others.mentioned(&plain) {
            self.add("cross_tool_reference", Severity::High, place, found.as_bytes());
        }
        // Icons are pictures, and pictures are base64.
        if place.starts_with("/icons/") && text.starts_with("data:image/") {
            return;
        }
        for (severity, found) in encoded::find(text) {
            self.add("encoded_text", severity, place, found.as_bytes());
        }
    }

    /// One finding for each rule and place; what follows is counted.
    fn add(&mut self, rule: &'static str, severity: Severity, place: &str, value: &[u8]) {
        let place = cut(place, PLACE_BYTES);
        if let Some(found) = self.found.iter_mut().find(|f| f.rule == rule && f.place == place) {
            found.count += 1;
        } else if self.found.len() < MAX_FOUND {
            self.found.push(Found {
                kind: Kind::ToolPoisoning,
                rule,
                severity,
                place: place.to_owned(),
                length: value.len() as u64,
                value_hash: self.key.hash(value),
                count: 1,
            });
        }
    }
}
