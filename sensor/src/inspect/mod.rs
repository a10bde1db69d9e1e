//! Detection on content without keeping it: secrets and personal data in what
//! is said over a connection, poison in what servers say of their tools.
//!
//! A value that was found is never kept, passed on or logged: a [`Found`] has
//! its kind, place, length and a keyed hash. `docs/detection.md` says which
//! rules there are, and their limits.

mod matcher;
mod personal;
mod redact;
mod rules;
mod scanner;
mod seen;
mod spans;
pub mod tool;

#[cfg(test)]
mod tests;

pub use crate::event::pb::Severity;
pub use redact::{MAX_BYTES as REDACTED_BYTES, redact, redact_json, redact_named, redact_place};
pub use scanner::{Limits, Scanner};

use hmac::{Hmac, Mac as _};
use sha2::Sha256;

/// What kind of thing was found; its name in events is [`Kind::name`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Secret,
    PersonalData,
    ToolPoisoning,
}

impl Kind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Secret => "secret",
            Self::PersonalData => "personal_data",
            Self::ToolPoisoning => "tool_poisoning",
        }
    }
}

/// Something that was found, without the thing itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub kind: Kind,
    /// A rule's stable name: gitleaks' id ("github-pat"), a class of personal
    /// data ("email"), a pattern of poisoning ("hidden_unicode").
    pub rule: &'static str,
    pub severity: Severity,
    /// JSON pointer below the message's root, or the tool's; cut at
    /// [`PLACE_BYTES`].
    pub place: String,
    /// Bytes of the value, of the first one where several are counted.
    pub length: u64,
    /// [`Key::hash`] of the value, of the first one where several are counted.
    pub value_hash: [u8; 16],
    /// How many sightings this stands for.
    pub count: u64,
}

/// Of a place that is kept.
pub const PLACE_BYTES: usize = 256;

/// What values are hashed with: without it nobody can try values.
#[derive(Clone)]
pub struct Key(Hmac<Sha256>);

impl Key {
    pub fn new(key: &[u8; 32]) -> Self {
        Self(Hmac::new_from_slice(key).expect("HMAC takes keys of any length"))
    }

    /// HMAC-SHA256, its first 16 bytes: equal for equal values under one key.
    pub fn hash(&self, value: &[u8]) -> [u8; 16] {
        let mut mac = self.0.clone();
        mac.update(value);
        let full = mac.finalize().into_bytes();
        std::array::from_fn(|n| full[n])
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

/// `text` up to `bytes`, whole characters.
fn cut(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}
