//! Text that is written so that only a model reads it.

use super::{super::Severity, patterns, plain::plain};

/// Characters of base64 or hexadecimal digits in a row that are looked at.
const LEAST: usize = 40;
/// A run of these that is no text is a blob that has no business here.
const BLOB: usize = 512;
/// Of a run that is decoded.
const MOST: usize = 16 * 1024;

/// Runs that decode to text, and blobs.
pub fn find(text: &str) -> Vec<(Severity, &str)> {
    let encoded = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '/' | '-' | '_' | '=');
    text.split(|c| !encoded(c))
        .filter(|run| run.len() >= LEAST)
        .filter_map(|run| {
            let severity = match decoded(&run[..run.len().min(MOST)]) {
                Some(text) if !patterns::find(&plain(&text)).is_empty() => Severity::High,
                Some(_) => Severity::Medium,
                None if run.len() >= BLOB && dense(run) => Severity::Medium,
                None => return None,
            };
            Some((severity, run))
        })
        .collect()
}

/// What a run of hexadecimal digits or base64 says, if it is text.
fn decoded(run: &str) -> Option<String> {
    let bytes = if run.len().is_multiple_of(2) && run.bytes().all(|b| b.is_ascii_hexdigit()) {
        hex::decode(run).ok()?
    } else {
        base64(run)
    };
    let text = String::from_utf8(bytes).ok()?;
    let words = text.split_whitespace().count();
    let readable =
        text.chars().filter(|c| c.is_alphanumeric() || c.is_ascii_punctuation() || *c == ' ').count();
    (words >= 4 && readable * 10 >= text.chars().count() * 9).then_some(text)
}

/// Both alphabets, padding or not; the rest of an odd run is left out.
fn base64(run: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(run.len() * 3 / 4);
    let (mut bits, mut count) = (0u32, 0);
    for b in run.bytes() {
        let value = match b {
            b'A'..=b'Z' => b - b'A',
            b'a'..=b'z' => b - b'a' + 26,
            b'0'..=b'9' => b - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => break,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    out
}

/// A blob rather than a long path or a rule of hyphens.
fn dense(run: &str) -> bool {
    let bytes = run.as_bytes();
    bytes.iter().any(u8::is_ascii_digit)
        && bytes.iter().any(u8::is_ascii_uppercase)
        && bytes.iter().any(u8::is_ascii_lowercase)
        && super::super::rules::entropy(bytes) > 4.5
}
