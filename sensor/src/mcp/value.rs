//! JSON values that are kept for a moment, within a budget, and their hash.

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

/// What a value, a member of an object takes beside its text: `[[],[],…]` must
/// not cost ten times its bytes.
const VALUE_COST: usize = 32;
const MEMBER_COST: usize = 64;

/// A value that is built as its events come.
#[derive(Debug)]
pub(super) struct Kept {
    open: Vec<Open>,
    text: String,
    /// Bytes of memory that may still be spent; `None`: it was too much.
    left: Option<usize>,
    spent: usize,
    depth: usize,
}

#[derive(Debug)]
enum Open {
    Array(Vec<Value>),
    /// And the name of the member whose value comes next.
    Object(Map<String, Value>, String),
}

impl Kept {
    pub(super) fn new(budget: usize) -> Self {
        Self { open: Vec::new(), text: String::new(), left: Some(budget), spent: 0, depth: 0 }
    }

    pub(super) const fn spent(&self) -> usize {
        self.spent
    }

    fn spend(&mut self, bytes: usize) -> bool {
        self.left = self.left.and_then(|left| left.checked_sub(bytes));
        if self.left.is_some() {
            self.spent += bytes;
        } else {
            self.open = Vec::new();
            self.text = String::new();
        }
        self.left.is_some()
    }

    pub(super) fn begin(&mut self, object: bool) {
        self.depth += 1;
        if self.spend(VALUE_COST) {
            self.open.push(if object {
                Open::Object(Map::new(), String::new())
            } else {
                Open::Array(Vec::new())
            });
        }
    }

    /// The outermost container has ended: the value, unless it was too large.
    pub(super) fn end(&mut self) -> Option<Option<Value>> {
        self.depth -= 1;
        let value = match self.open.pop() {
            Some(Open::Array(items)) => Some(Value::Array(items)),
            Some(Open::Object(members, _)) => Some(Value::Object(members)),
            None => None,
        };
        if self.depth == 0 {
            return Some(value);
        }
        if let Some(value) = value {
            self.push(value);
        }
        None
    }

    fn push(&mut self, value: Value) {
        match self.open.last_mut() {
            Some(Open::Array(items)) => items.push(value),
            // The last of several with one name wins.
            Some(Open::Object(members, name)) => drop(members.insert(std::mem::take(name), value)),
            None => {}
        }
    }

    /// More of a string or a number.
    pub(super) fn text(&mut self, run: &str) {
        if self.spend(run.len()) {
            self.text.push_str(run);
        }
    }

    pub(super) fn key_end(&mut self) {
        if self.spend(MEMBER_COST)
            && let Some(Open::Object(_, name)) = self.open.last_mut()
        {
            *name = std::mem::take(&mut self.text);
        }
    }

    pub(super) fn string_end(&mut self) {
        let text = std::mem::take(&mut self.text);
        self.scalar(Value::String(text));
    }

    pub(super) fn number_end(&mut self) {
        let text = std::mem::take(&mut self.text);
        // Beyond what a double holds, the text is what can be compared.
        self.scalar(text.parse().map_or(Value::String(text), Value::Number));
    }

    pub(super) fn scalar(&mut self, value: Value) {
        if self.spend(VALUE_COST) {
            self.push(value);
        }
    }
}

/// SHA-256 of a value in canonical JSON: no blanks, members sorted by the bytes
/// of their names.
pub fn sha256(value: &Value) -> [u8; 32] {
    let mut hash = Sha256::new();
    write(value, &mut hash);
    hash.finalize().into()
}

fn write(value: &Value, hash: &mut Sha256) {
    match value {
        Value::Array(items) => {
            hash.update("[");
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    hash.update(",");
                }
                write(item, hash);
            }
            hash.update("]");
        }
        Value::Object(members) => {
            let mut members: Vec<_> = members.iter().collect();
            members.sort_by_key(|(name, _)| *name);
            hash.update("{");
            for (index, (name, value)) in members.into_iter().enumerate() {
                if index > 0 {
                    hash.update(",");
                }
                hash.update(Value::from(name.as_str()).to_string());
                hash.update(":");
                write(value, hash);
            }
            hash.update("}");
        }
        scalar => hash.update(scalar.to_string()),
    }
}
