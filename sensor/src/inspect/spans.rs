//! What is found in one stretch of text.

use super::rules;

/// A secret: offsets into the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub start: usize,
    pub end: usize,
    pub rule: &'static str,
    pub generic: bool,
}

/// What searching may cost: bytes that rules look at, a few nanoseconds each,
/// for each byte of text, and for a message of any size. Plain language takes
/// about one a byte, a file full of secrets ten; what takes more is made to.
pub const WORK_PER_BYTE: u64 = 16;
pub const WORK_PER_MESSAGE: u64 = 1 << 20;

/// Secrets whose keyword begins in `from..to` of `text`, by their start; none of
/// a generic rule overlaps another.
///
/// `work` is what may still be spent. `Err`: it did not suffice; how many bytes
/// of `from..to` were not searched.
pub fn secrets(
    text: &[u8],
    from: usize,
    to: usize,
    work: &mut u64,
    out: &mut Vec<Span>,
) -> Result<(), usize> {
    let rules = rules::rules();
    // Where each rule matched last: several keywords may lead to one match.
    let mut ends: Vec<(u16, usize)> = Vec::new();
    let mut stopped = None;
    out.clear();
    rules.keywords(text, from, to, |number, begin, end| {
        if stopped.is_some() {
            return;
        }
        let rule = &rules.list[usize::from(number)];
        let known = ends.iter().position(|(known, _)| *known == number).unwrap_or_else(|| {
            ends.push((number, 0));
            ends.len() - 1
        });
        let mut spent = 8;
        let hit = rules.find(rule, text, (begin, end), &mut ends[known].1, &mut spent);
        *work = work.saturating_sub(spent);
        if *work == 0 {
            stopped = Some(to - begin);
        }
        if let Some(hit) = hit {
            out.push(Span { start: hit.start, end: hit.end, rule: &rule.id, generic: rule.generic });
        }
    });
    out.sort_by_key(|span| (span.start, span.generic, span.end));
    prefer_specific(out);
    stopped.map_or(Ok(()), Err)
}

/// Drops what a generic rule found where another did.
fn prefer_specific(spans: &mut Vec<Span>) {
    let specific: Vec<(usize, usize)> =
        spans.iter().filter(|s| !s.generic).map(|s| (s.start, s.end)).collect();
    spans.retain(|span| {
        // Ordered by start: only those that begin before the span's end count.
        let before = specific.partition_point(|(start, _)| *start < span.end);
        !span.generic || !specific[..before].iter().rev().take(8).any(|(_, end)| *end > span.start)
    });
}
