//! Names of tools: those that look like another, and those of other servers.

use std::collections::HashSet;

use aho_corasick::{AhoCorasick, MatchKind};
use regex::bytes::{Regex, RegexBuilder};
use std::sync::LazyLock;

/// Names that are kept of other servers' tools.
const MAX_NAMES: usize = 4096;
/// How far from a name what is said of it may stand.
const REACH: usize = 160;

/// ASCII letters mixed with those of another alphabet that look alike.
pub fn confusable(name: &str) -> bool {
    let other = |c: char| matches!(c, '\u{370}'..='\u{52f}' | '\u{ff21}'..='\u{ff5a}');
    name.contains(other) && name.contains(|c: char| c.is_ascii_alphabetic())
}

pub struct Others(Option<AhoCorasick>);

impl Others {
    pub fn new(others: &HashSet<(String, String)>) -> Self {
        let mut names: Vec<String> =
            others.iter().map(|(_, name)| name.to_lowercase()).filter(|name| distinct(name)).collect();
        names.sort_unstable();
        names.dedup();
        names.truncate(MAX_NAMES);
        if names.is_empty() {
            return Self(None);
        }
        Self(AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(names).ok())
    }

    /// Another server's tool, where the text says what to do with it.
    pub fn mentioned<'t>(&self, plain: &'t str) -> Option<&'t str> {
        let word = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
        self.0.as_ref()?.find_iter(plain).find_map(|found| {
            let bytes = plain.as_bytes();
            if word(found.start().checked_sub(1).and_then(|n| bytes.get(n))) || word(bytes.get(found.end())) {
                return None;
            }
            let from = plain.floor_char_boundary(found.start().saturating_sub(REACH));
            let to = plain.floor_char_boundary(found.end() + REACH);
            IMPERATIVE.is_match(&bytes[from..to]).then(|| &plain[found.range()])
        })
    }
}

/// Names that are plain words ("search", "fetch") stand in any text.
fn distinct(name: &str) -> bool {
    name.len() >= 5 && name.contains(['_', '-', '.', '/'])
}

static IMPERATIVE: LazyLock<Regex> = LazyLock::new(|| {
    RegexBuilder::new(
        r"\b(?:instead of|rather than|in place of|must|should|shall|always|never|do not|don't|before|after|when|whenever|every time|change|redirect|replace|override|bcc|forward|first|then|also|use|call|invoke|run)\b",
    )
    .unicode(false)
    .build()
    .expect("a constant")
});
