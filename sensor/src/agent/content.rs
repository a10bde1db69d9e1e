//! What was said itself, where the policy asks for it: the strings of a message,
//! redacted value by value, a line each.

use crate::inspect::redact_named;
use std::collections::{HashMap, VecDeque};

/// Of one value; what is beyond is not looked at, so it is not kept.
const VALUE_MAX: usize = 256 << 10;
/// What is left out before a cut: half a secret would not be recognised.
const MARGIN: usize = 8 << 10;
/// Messages that wait for what they belong to.
const WAITING: usize = 256;

/// Collects from both sides of a conversation.
#[derive(Default)]
pub struct Content {
    /// Of one message, bytes; 0: nothing is kept.
    max: usize,
    value: String,
    cut: bool,
    lines: String,
    /// Whole messages by side, method and name, in order.
    ended: VecDeque<(usize, String, String, String)>,
    /// Requests by the hash of their id.
    asked: HashMap<u64, String>,
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
        self.lines.push_str(place);
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

    fn take(&mut self, side: usize, method: &str, name: &str) -> String {
        let at = self.ended.iter().position(|(s, m, n, _)| *s == side && m == method && n == name);
        at.and_then(|at| self.ended.remove(at)).map(|(.., lines)| lines).unwrap_or_default()
    }

    /// A request was read whole.
    pub fn asked(&mut self, side: usize, method: &str, name: &str, id: u64) {
        if self.max > 0 && self.asked.len() < WAITING {
            let lines = self.take(side, method, name);
            self.asked.insert(id, lines);
        }
    }

    /// It was answered by the other side, or not (`answered` false): both
    /// contents.
    pub fn ended(
        &mut self,
        side: usize,
        method: &str,
        name: &str,
        id: u64,
        answered: bool,
    ) -> (String, String) {
        if self.max == 0 {
            return Default::default();
        }
        let request = self.asked.remove(&id).unwrap_or_default();
        let response = if answered { self.take(1 - side, method, name) } else { String::new() };
        (request, response)
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
        for (id, text) in [(1, "one"), (2, token.as_str())] {
            content.piece("/params/arguments/text", text, true);
            content.message(0, "tools/call", "echo");
            content.asked(0, "tools/call", "echo", id);
        }
        content.piece("/result/content/0/text", &"long ".repeat(100), true);
        content.message(1, "tools/call", "echo");
        let (request, response) = content.ended(0, "tools/call", "echo", 2, true);
        assert!(request.contains("[REDACTED") && !request.contains("ghp_a1"), "{request}");
        assert_eq!(response.len(), 60);
        let (request, response) = content.ended(0, "tools/call", "echo", 1, false);
        assert_eq!((request.as_str(), response.as_str()), ("/params/arguments/text = one\n", ""));
        assert!(content.ended.is_empty() && content.asked.is_empty());
    }
}
