//! Content without what the scanner finds in it.

use std::borrow::Cow;

use aho_corasick::{AhoCorasick, MatchKind};
use serde_json::Value;

use super::{PLACE_BYTES, personal, spans};

/// Taking a secret out may bring to light what it stood beside; content that
/// needs more passes than these is left out whole.
const PASSES: usize = 8;
const EVERYTHING: &str = "[REDACTED]";
/// Nothing that is shorter is found in a name.
const SHORTEST: usize = 6;
/// Text beyond this is not kept.
pub const MAX_BYTES: usize = 1 << 20;

/// `text` with each secret as `[REDACTED:rule]` and personal data as `[class]`.
/// A secret that was found in one place goes everywhere. Cut afterwards, never
/// before: half a secret is not found.
pub fn redact(text: &str) -> String {
    redact_named("", text)
}

/// As [`redact`], for the value of a member `name`.
pub fn redact_named(name: &str, text: &str) -> String {
    let mut text = Cow::Borrowed(super::cut(text, MAX_BYTES));
    let prefix = if name.is_empty() { String::new() } else { format!("{}\":\"", super::cut(name, 64)) };
    for _ in 0..PASSES {
        match pass(&prefix, &text) {
            Ok(None) => return text.into_owned(),
            Ok(Some(less)) => text = Cow::Owned(less),
            Err(()) => break,
        }
    }
    EVERYTHING.to_owned()
}

/// A JSON pointer (RFC 6901), whose tokens are names that a program chose. One
/// that was cut loses its last token: half a secret is not found.
pub fn redact_place(place: &str) -> String {
    // An escape or a character more would have been beyond it.
    const CUT: usize = PLACE_BYTES - 4;
    let is_cut = place.len() > CUT;
    let mut tokens: Vec<Cow<'_, str>> =
        super::cut(place, PLACE_BYTES).split('/').map(Cow::Borrowed).collect();
    if is_cut && let Some(last) = tokens.last_mut() {
        *last = Cow::Borrowed("…");
    }
    for token in tokens.iter_mut().filter(|t| t.len() >= SHORTEST) {
        let name = token.replace("~1", "/").replace("~0", "~");
        let redacted = redact(&name);
        if redacted != name {
            *token = Cow::Owned(redacted.replace('~', "~0").replace('/', "~1"));
        }
    }
    tokens.join("/")
}

/// The strings of a value redacted in place, names of members too. A JSON text
/// is to be parsed first: its escapes hide secrets from rules.
pub fn redact_json(value: &mut Value) {
    redact_below("", value);
}

fn redact_below(name: &str, value: &mut Value) {
    match value {
        Value::String(text) => *text = redact_named(name, text),
        Value::Array(items) => items.iter_mut().for_each(|item| redact_below(name, item)),
        Value::Object(members) => {
            *members = std::mem::take(members)
                .into_iter()
                .map(|(name, mut value)| {
                    redact_below(&name, &mut value);
                    (redact(&name), value)
                })
                .collect();
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// One pass. `None`: there is nothing to take out. `Err`: it took too long.
fn pass(prefix: &str, text: &str) -> Result<Option<String>, ()> {
    let whole = format!("{prefix}{text}");
    let bytes = whole.as_bytes();
    let mut found = Vec::new();
    let mut work = spans::WORK_PER_MESSAGE + bytes.len() as u64 * spans::WORK_PER_BYTE;
    spans::secrets(bytes, 0, bytes.len(), &mut work, &mut found).map_err(drop)?;
    let mut cuts: Vec<(usize, usize, Cow<'static, str>)> = Vec::new();
    let mut values: Vec<(&[u8], &'static str)> = Vec::new();
    for span in found.iter().filter(|span| span.start >= prefix.len()) {
        values.push((&bytes[span.start..span.end], span.rule));
        cuts.push((span.start, span.end, Cow::Owned(format!("[REDACTED:{}]", span.rule))));
    }
    values.sort_unstable();
    values.dedup_by_key(|(value, _)| *value);
    if !values.is_empty() {
        let again = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(values.iter().map(|(value, _)| value))
            .map_err(drop)?;
        for found in again.find_iter(bytes).filter(|found| found.start() >= prefix.len()) {
            let rule = values[found.pattern().as_usize()].1;
            cuts.push((found.start(), found.end(), Cow::Owned(format!("[REDACTED:{rule}]"))));
        }
    }
    personal::find(bytes, prefix.len(), bytes.len(), |class, start, end| {
        cuts.push((start, end, Cow::Owned(format!("[{}]", class.name()))));
    });
    if cuts.is_empty() {
        return Ok(None);
    }
    // Secrets before personal data where both begin; what overlaps goes as one.
    cuts.sort_by_key(|(start, end, _)| (*start, std::cmp::Reverse(*end)));
    let mut out = String::with_capacity(text.len());
    let mut at = prefix.len();
    for (start, end, with) in &cuts {
        if *start >= at {
            out.push_str(whole.get(at..*start).ok_or(())?);
            out.push_str(with);
        }
        at = at.max(*end);
    }
    out.push_str(whole.get(at..).ok_or(())?);
    Ok(Some(out))
}
