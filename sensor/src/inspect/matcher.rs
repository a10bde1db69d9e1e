//! One secret rule's expression, searched only around its keywords.
//!
//! Text is read by a lazy DFA whose cache is bounded; most searches end after a
//! few bytes. What it finds is read once more for the place of the secret.

use std::{
    cell::RefCell,
    sync::{Mutex, PoisonError},
};

use regex_automata::{
    Anchored, Input, MatchKind,
    hybrid::dfa::{Cache, DFA},
    nfa::thompson::{
        NFA, WhichCaptures,
        pikevm::{self, PikeVM},
    },
    util::{captures::Captures, syntax},
};
use regex_syntax::hir::{Hir, literal::Extractor};

use super::rules::Hit;

/// Bytes that a match reaches at most: a private key of 8192 bits has 6.3 KiB.
pub const REACH: usize = 8 * 1024;
/// How far a match whose expression has no upper bound may begin before its
/// keyword, where the expression does not begin with it.
pub const REACH_BACK: usize = 512;
/// How far from a match its keyword may stand where it is no part of it
/// (`airtable` before `pat….…`). gitleaks takes it anywhere in a file.
const NEAR: usize = 64;
/// Of the DFA states that are kept of one rule: most need a few KiB, the few
/// that are open-ended (`{10,150}`, `+`) more.
const CACHE_BYTES: usize = 32 * 1024;
const OPEN_CACHE_BYTES: usize = 256 * 1024;

/// What gitleaks puts before and after the name in rules of the kind
/// `name = "secret"`.
const LEAD: &str = r"[\w.-]{0,50}?";
const ASSIGNMENT: &str = r#"(?:[ \t\w.-]{0,20})[\s'"]{0,3}(?:=|>|:{1,3}=|\|\||:|=>|\?=|,)"#;

#[derive(Debug)]
pub struct Matcher {
    start: Start,
    /// Bytes of the longest match, [`REACH`] at most.
    longest: usize,
    /// The keyword is followed by an operator within a few bytes.
    assignment: bool,
    group: usize,
    dfa: DFA,
    vm: PikeVM,
    cache: Mutex<Cache>,
}

thread_local! {
    /// Used for matches only, which are rare: one for all rules.
    static VM_CACHE: RefCell<Option<pikevm::Cache>> = const { RefCell::new(None) };
}

#[derive(Debug)]
enum Start {
    /// Matches begin with the keyword, and with one of these.
    Keyword(Vec<Vec<u8>>),
    /// The keyword stands in the match, or near it.
    Anywhere,
}

impl Matcher {
    pub fn new(pattern: &str, group: usize, keywords: &[String]) -> Result<Self, Box<dyn std::error::Error>> {
        // The lazy lead takes what stands before the name. It changes neither
        // whether there is a match nor the secret.
        let mut pattern = pattern.replace(LEAD, "");
        // Named groups say what part of a secret something is, none is one.
        while let Some(at) = pattern.find("(?P<") {
            let name = pattern[at..].find('>').ok_or("a group without the end of its name")?;
            pattern.replace_range(at..=at + name, "(?:");
        }
        let config = syntax::Config::new().unicode(false).utf8(false);
        let hir = syntax::parse_with(&pattern, &config)?;
        let nfa = NFA::compiler()
            .syntax(config)
            .configure(NFA::config().utf8(false).which_captures(WhichCaptures::All))
            .build_from_hir(&hir)?;
        let longest = hir.properties().maximum_len().unwrap_or(REACH).min(REACH);
        let dfa = DFA::builder()
            .configure(
                DFA::config()
                    .match_kind(MatchKind::LeftmostFirst)
                    .cache_capacity(if longest < REACH { CACHE_BYTES } else { OPEN_CACHE_BYTES })
                    .skip_cache_capacity_check(true),
            )
            .build_from_nfa(nfa.clone())?;
        let vm = PikeVM::new_from_nfa(nfa)?;
        let cache = Mutex::new(dfa.create_cache());
        let start = Start::of(&hir, keywords);
        Ok(Self { assignment: is_assignment(&pattern, keywords), start, longest, group, dfa, vm, cache })
    }

    /// The first match around a keyword, unless it ends where one did that
    /// `last` knows from a keyword before. `work` grows by the bytes looked at.
    pub fn find(
        &self,
        text: &[u8],
        (begin, end): (usize, usize),
        last: &mut usize,
        work: &mut u64,
    ) -> Option<Hit> {
        let (from, reach, anchored) = match &self.start {
            Start::Keyword(prefixes) => {
                if !prefixes.iter().any(|prefix| text[begin..].starts_with(prefix)) {
                    return None;
                }
                (begin, self.longest, Anchored::Yes)
            }
            Start::Anywhere => {
                let reach = self.longest + NEAR;
                (begin.saturating_sub(reach.min(REACH_BACK)), reach.min(REACH), Anchored::No)
            }
        };
        if self.assignment && !followed_by_operator(&text[end..]) {
            return None;
        }
        let to = text.len().min(end + reach);
        let input = Input::new(text).range(from..to).anchored(anchored);
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let found = self.end(&mut cache, &input, work)?;
        drop(cache);
        if std::mem::replace(last, found) == found {
            return None;
        }
        *work += 4 * (found - from) as u64;
        // One byte more for what looks ahead.
        let captures = self.captures(&input.range(from..to.min(found + 1)));
        let whole = captures.get_match()?;
        let secret = match self.group {
            0 => {
                (1..captures.group_len()).find_map(|n| captures.get_group(n).filter(|span| !span.is_empty()))
            }
            n => captures.get_group(n),
        };
        let secret = secret.unwrap_or_else(|| whole.span());
        Some(Hit { match_start: whole.start(), match_end: whole.end(), start: secret.start, end: secret.end })
    }

    fn captures(&self, input: &Input<'_>) -> Captures {
        let mut captures = self.vm.create_captures();
        VM_CACHE.with_borrow_mut(|cache| {
            let cache = cache.get_or_insert_with(|| self.vm.create_cache());
            cache.reset(&self.vm);
            self.vm.search(cache, input, &mut captures);
        });
        captures
    }

    /// Where the leftmost match ends; stops where none can follow any more.
    fn end(&self, cache: &mut Cache, input: &Input<'_>, work: &mut u64) -> Option<usize> {
        let text = input.haystack();
        let mut state = self.dfa.start_state_forward(cache, input).ok()?;
        let mut last = None;
        // A match shows itself one byte after its end.
        for (&byte, at) in text[input.get_range()].iter().zip(input.start()..) {
            state = self.dfa.next_state(cache, state, byte).ok()?;
            *work += 1;
            if state.is_tagged() {
                if state.is_match() {
                    last = Some(at);
                } else if state.is_dead() {
                    return last;
                }
            }
        }
        state = match text.get(input.end()) {
            Some(&next) => self.dfa.next_state(cache, state, next).ok()?,
            None => self.dfa.next_eoi_state(cache, state).ok()?,
        };
        if state.is_match() { Some(input.end()) } else { last }
    }

    #[cfg(test)]
    pub fn memory(&self) -> usize {
        self.vm.get_nfa().memory_usage() + self.dfa.memory_usage() + self.cache.lock().unwrap().memory_usage()
    }

    #[cfg(test)]
    pub fn begins_with_keyword(&self) -> bool {
        matches!(self.start, Start::Keyword(_))
    }
}

impl Start {
    fn of(hir: &Hir, keywords: &[String]) -> Self {
        let prefixes = Extractor::new().extract(hir);
        let Some(literals) = prefixes.literals() else { return Self::Anywhere };
        let begins = literals.iter().all(|literal| {
            let literal = literal.as_bytes().to_ascii_lowercase();
            literal.len() >= 2
                && keywords
                    .iter()
                    .any(|k| literal.starts_with(k.as_bytes()) || k.as_bytes().starts_with(&literal))
        });
        if begins && !literals.is_empty() {
            Self::Keyword(literals.iter().map(|literal| literal.as_bytes().to_vec()).collect())
        } else {
            Self::Anywhere
        }
    }
}

/// Whether the expression is `name = "secret"`, and its names are keywords.
fn is_assignment(pattern: &str, keywords: &[String]) -> bool {
    let Some((name, value)) = pattern.split_once(ASSIGNMENT) else { return false };
    let Ok(name) = syntax::parse(&name.replace("(?i)", "").replace("(?i:", "")) else { return false };
    let names = Extractor::new().extract(&name);
    let is_keyword =
        |name: &[u8]| keywords.iter().any(|keyword| name.eq_ignore_ascii_case(keyword.as_bytes()));
    // Only one: where there is another way to match, nothing follows from it.
    !value.contains(r"|$)|")
        && names
            .literals()
            .is_some_and(|names| names.iter().all(|name| name.is_exact() && is_keyword(name.as_bytes())))
}

/// Whether an [`ASSIGNMENT`] may begin here: what decides most searches for
/// words of plain language.
fn followed_by_operator(text: &[u8]) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-' | b' ' | b'\t');
    let mut at = text.iter().take(20).take_while(|b| word(**b)).count();
    at += text[at..]
        .iter()
        .take(3)
        .take_while(|b| b.is_ascii_whitespace() || matches!(b, b'\'' | b'"' | 0x0b))
        .count();
    text.get(at).is_some_and(|b| matches!(b, b'=' | b'>' | b':' | b'|' | b'?' | b','))
}
