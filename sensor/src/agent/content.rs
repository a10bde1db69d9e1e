//! What was said itself, where the policy asks for it: the strings of a message,
//! redacted value by value, a line each.

use crate::inspect::{redact_named, redact_place};
use std::collections::{HashMap, VecDeque};

/// Of one value; what is beyond is not looked at, so it is not kept.
const VALUE_MAX: usize = 256 << 10;
/// What is left out before a cut: half a secret would not be recognised.
const MARGIN: usize = 8 << 10;
/// Messages that wait for what they belong to.
const WAITING: usize = 256;

/// Collects from both sides of a wire.
#[derive(Default)]
pub struct Content {
    /// Of one message, bytes; 0: nothing is kept.
    max: usize,
    value: String,
    cut: bool,
    lines: String,
    /// Whole messages by side, method and name, in order.
    ended: VecDeque<(usize, String, String, String)>,
}

/// Requests of a server, which may be answered over another connection.
#[derive(Default)]
pub struct Asked {
    /// By conversation and the hash of their id.
    requests: HashMap<(u64, u64), String>,
}

impl Asked {
    pub fn add(&mut self, conversation: u64, id: u64, lines: String) {
        if !lines.is_empty() && self.requests.len() < WAITING {
            self.requests.insert((conversation, id), lines);
        }
    }

    pub fn take(&mut self, conversation: u64, id: u64) -> Option<String> {
        self.requests.remove(&(conversation, id))
    }
}

impl Content {
    pub fn set(&mut self, max: usize) {
        self.max = max;
    }

    pub fn piece(&mut self, place: &str, piece: &str, last: bool) {
        if self.max == 0 || self.lines.len() >= self.max {
            return;
        }
        if self.value.len() < VALUE_MAX {
            self.value.push_str(piece);
        } else {
            self.cut = true;
        }
        if !last {
            return;
        }
        if std::mem::take(&mut self.cut) {
            self.value.truncate(self.value.floor_char_boundary(VALUE_MAX - MARGIN));
        }
        let name = place.rsplit('/').next().unwrap_or_default();
        let text = redact_named(name, &self.value);
        self.value = String::new();
        self.lines.push_str(&redact_place(place));
        self.lines.push_str(" = ");
        self.lines.push_str(&text);
        self.lines.push('\n');
        self.lines.truncate(self.lines.floor_char_boundary(self.max));
    }

    pub fn message(&mut self, side: usize, method: &str, name: &str) {
        self.value.clear();
        self.cut = false;
        let lines = std::mem::take(&mut self.lines);
        if self.max == 0 || method.is_empty() {
            return;
        }
        if self.ended.len() >= WAITING {
            self.ended.pop_front();
        }
        self.ended.push_back((side, method.to_owned(), name.to_owned(), lines));
    }

    /// A message that was read whole.
    pub fn take(&mut self, side: usize, method: &str, name: &str) -> String {
        let at = self.ended.iter().position(|(s, m, n, _)| *s == side && m == method && n == name);
        at.and_then(|at| self.ended.remove(at)).map(|(.., lines)| lines).unwrap_or_default()
    }

    /// What came of the bytes at hand was told: what is left belongs to nothing.
    pub fn settle(&mut self) {
        self.ended.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_find_their_exchange_and_keep_no_secret() {
        let mut content = Content::default();
        content.piece("/params/x", "kept by nobody", true);
        content.message(0, "tools/call", "echo");
        content.set(60);
        let token = format!("ghp_{}", "a1B2c3D4e5F6".repeat(3));
        let mut asked = Asked::default();
        for (id, text) in [(1, "one"), (2, token.as_str())] {
            content.piece("/params/arguments/text", text, true);
            content.message(0, "tools/call", "echo");
            asked.add(7, id, content.take(0, "tools/call", "echo"));
        }
        content.piece("/result/content/0/text", &"long ".repeat(100), true);
        content.message(1, "tools/call", "echo");
        let (request, response) = (asked.take(7, 2).unwrap(), content.take(1, "tools/call", "echo"));
        assert!(request.contains("[REDACTED") && !request.contains("ghp_a1"), "{request}");
        assert_eq!(response.len(), 60);
        assert_eq!(asked.take(8, 1), None, "another conversation's");
        assert_eq!(asked.take(7, 1).as_deref(), Some("/params/arguments/text = one\n"));
        assert!(content.ended.is_empty() && asked.requests.is_empty());
    }

    #[test]
    fn what_nobody_waits_for_is_taken_for_nothing_else() {
        let mut content = Content::default();
        content.set(60);
        content.piece("/result/content/0/text", "late", true);
        content.message(1, "tools/call", "echo");
        content.settle();
        assert_eq!(content.take(1, "tools/call", "echo"), "");
    }
}
