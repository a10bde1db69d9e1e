//! The secret rules: gitleaks' default configuration, read as data.
//!
//! `rules/gitleaks.toml` is gitleaks 8.30.1's `config/gitleaks.toml`, unchanged.
//! A rule is a regular expression in Go's RE2 syntax, the keywords without
//! which it cannot match, an entropy its secret must exceed and allowlists of
//! what is no secret. Only the keywords are compiled at first use; a rule is
//! when its keyword is first seen.

use std::{
    array,
    sync::{LazyLock, OnceLock},
};

use aho_corasick::{
    AhoCorasick, AhoCorasickKind, Anchored, MatchKind,
    automaton::{Automaton as _, StateID},
    dfa::DFA,
};
use serde::Deserialize;

use super::matcher::Matcher;

const GITLEAKS: &str = include_str!("rules/gitleaks.toml");

/// What gitleaks says of `generic-*` rules, in its code rather than its
/// configuration: a secret has a digit.
const GENERIC: &str = "generic";

#[derive(Deserialize)]
struct File {
    allowlist: AllowEntry,
    rules: Vec<RuleEntry>,
}

#[derive(Deserialize)]
struct RuleEntry {
    id: String,
    regex: Option<String>,
    #[serde(default)]
    keywords: Vec<String>,
    #[serde(default)]
    entropy: f64,
    #[serde(default, rename = "secretGroup")]
    group: usize,
    path: Option<String>,
    #[serde(default)]
    allowlists: Vec<AllowEntry>,
}

#[derive(Deserialize)]
struct AllowEntry {
    #[serde(default)]
    regexes: Vec<String>,
    #[serde(default)]
    stopwords: Vec<String>,
    #[serde(default)]
    paths: Vec<String>,
    #[serde(default)]
    condition: String,
    #[serde(default, rename = "regexTarget")]
    target: String,
}

#[derive(Debug)]
pub struct Rule {
    pub id: String,
    pub generic: bool,
    pub keywords: Vec<String>,
    pub pattern: String,
    pub group: usize,
    entropy: f64,
    allow: Vec<Allow>,
    matcher: OnceLock<Option<Matcher>>,
}

/// What is no secret after all.
#[derive(Debug)]
struct Allow {
    regexes: Vec<String>,
    target: Target,
    stopwords: Vec<String>,
    compiled: OnceLock<(Option<regex::bytes::RegexSet>, Option<AhoCorasick>)>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Target {
    Secret,
    Match,
    Line,
}

/// Where a rule matched: offsets into what was searched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    pub match_start: usize,
    pub match_end: usize,
    pub start: usize,
    pub end: usize,
}

pub struct Rules {
    pub list: Vec<Rule>,
    global: Allow,
    keywords: DFA,
    /// Which rules a keyword belongs to, by its number in `keywords`.
    by_keyword: Vec<Vec<u16>>,
    longest_keyword: usize,
}

/// The rules, compiled at first use.
pub fn rules() -> &'static Rules {
    static RULES: LazyLock<Rules> = LazyLock::new(|| Rules::read(GITLEAKS));
    &RULES
}

impl Rules {
    /// # Panics
    /// When the text is not what was shipped: a test reads it.
    fn read(text: &str) -> Self {
        let file: File = toml::from_str(text).expect("the rules that are shipped can be read");
        let mut keywords: Vec<String> = Vec::new();
        let mut by_keyword: Vec<Vec<u16>> = Vec::new();
        let mut list = Vec::new();
        for entry in file.rules {
            // Rules that ask for a file of a certain name: there are none here.
            let (Some(regex), None) = (entry.regex, entry.path) else { continue };
            let number = u16::try_from(list.len()).expect("a few hundred rules");
            for keyword in &entry.keywords {
                let at = keywords.iter().position(|k| k == keyword).unwrap_or_else(|| {
                    keywords.push(keyword.clone());
                    by_keyword.push(Vec::new());
                    keywords.len() - 1
                });
                by_keyword[at].push(number);
            }
            list.push(Rule {
                generic: entry.id.starts_with(GENERIC),
                id: entry.id,
                keywords: entry.keywords,
                pattern: from_go(&regex),
                group: entry.group,
                entropy: entry.entropy,
                allow: entry.allowlists.iter().filter_map(Allow::new).collect(),
                matcher: OnceLock::new(),
            });
        }
        let dfa = DFA::builder()
            .ascii_case_insensitive(true)
            .match_kind(MatchKind::Standard)
            .build(&keywords)
            .expect("a few hundred keywords");
        let longest_keyword = keywords.iter().map(String::len).max().unwrap_or(0);
        Self {
            list,
            global: Allow { target: Target::Secret, ..Allow::of(&file.allowlist) },
            keywords: dfa,
            by_keyword,
            longest_keyword,
        }
    }

    /// Calls `hit` with every rule a keyword of which begins in `from..to`: part by
    /// part of a text, within one in the order in which the keywords end.
    ///
    /// The parts are read side by side: a step within one waits for what the step
    /// before it read, those of different parts do not wait for each other.
    pub fn keywords(&self, text: &[u8], from: usize, to: usize, mut hit: impl FnMut(u16, usize, usize)) {
        const PARTS: usize = 4;
        let dfa = &self.keywords;
        let Ok(start) = dfa.start_state(Anchored::No) else { return };
        let to = to.min(text.len()).max(from);
        let length = (to - from) / PARTS;
        let [a, b, c, d]: [_; PARTS] = array::from_fn(|n| &text[from + n * length..][..length]);
        let mut states = [start; PARTS];
        let mut met: [Vec<(usize, StateID)>; PARTS] = Default::default();
        for (step, (((a, b), c), d)) in a.iter().zip(b).zip(c).zip(d).enumerate() {
            for (n, byte) in [*a, *b, *c, *d].into_iter().enumerate() {
                states[n] = dfa.next_state(Anchored::No, states[n], byte);
                // Match states are special; without a prefilter few others are.
                if dfa.is_special(states[n]) && dfa.is_match(states[n]) {
                    met[n].push((from + n * length + step, states[n]));
                }
            }
        }
        for n in 0..PARTS {
            let after = from + (n + 1) * length;
            let to = if n + 1 == PARTS { to } else { after };
            // The last part is up to three bytes longer, and keywords reach out of each.
            let end = text.len().min(to.saturating_add(self.longest_keyword));
            let mut state = states[n];
            let rest = text[after..end].iter().zip(after..).filter_map(|(&byte, at)| {
                state = dfa.next_state(Anchored::No, state, byte);
                dfa.is_match(state).then_some((at, state))
            });
            for (at, state) in met[n].iter().copied().chain(rest) {
                for index in 0..dfa.match_len(state) {
                    let keyword = dfa.match_pattern(state, index);
                    let begin = at + 1 - dfa.pattern_len(keyword);
                    if begin < to {
                        for &rule in &self.by_keyword[keyword.as_usize()] {
                            hit(rule, begin, at + 1);
                        }
                    }
                }
            }
        }
    }

    /// Whether the rule finds a secret around a keyword at `keyword`, other than
    /// the one that `last` knows; see [`Matcher::find`].
    pub fn find(
        &self,
        rule: &Rule,
        text: &[u8],
        keyword: (usize, usize),
        last: &mut usize,
        work: &mut u64,
    ) -> Option<Hit> {
        let hit = rule.matcher()?.find(text, keyword, last, work)?;
        *work += 4 * (hit.end - hit.start) as u64;
        self.accepts(rule, text, hit).then_some(hit)
    }

    /// Whether what matched is a secret: random enough, and on no allowlist.
    pub fn accepts(&self, rule: &Rule, text: &[u8], hit: Hit) -> bool {
        let secret = &text[hit.start..hit.end];
        let random = rule.entropy <= 0.0 || entropy(secret) > rule.entropy;
        let digit = !rule.generic || secret.iter().any(u8::is_ascii_digit);
        let allowed =
            || self.global.allows(text, hit) || rule.allow.iter().any(|allow| allow.allows(text, hit));
        !secret.is_empty() && random && digit && !allowed()
    }
}

impl Rule {
    /// `None`: the expression does not compile; a test sees to it that all do.
    pub fn matcher(&self) -> Option<&Matcher> {
        self.matcher.get_or_init(|| Matcher::new(&self.pattern, self.group, &self.keywords).ok()).as_ref()
    }
}

impl Allow {
    fn new(entry: &AllowEntry) -> Option<Self> {
        // Those that are only about paths, or need one, never apply here.
        let applies = entry.condition != "AND" || entry.paths.is_empty();
        (applies && (!entry.regexes.is_empty() || !entry.stopwords.is_empty())).then(|| Self::of(entry))
    }

    fn of(entry: &AllowEntry) -> Self {
        Self {
            target: match entry.target.as_str() {
                "match" => Target::Match,
                "line" => Target::Line,
                _ => Target::Secret,
            },
            regexes: entry.regexes.iter().map(|regex| from_go(regex)).collect(),
            stopwords: entry.stopwords.iter().map(|word| word.to_lowercase()).collect(),
            compiled: OnceLock::new(),
        }
    }

    fn allows(&self, text: &[u8], hit: Hit) -> bool {
        let (regexes, stopwords) = self.compiled.get_or_init(|| {
            let regexes = (!self.regexes.is_empty())
                .then(|| regex::bytes::RegexSetBuilder::new(&self.regexes).unicode(false).build().ok())
                .flatten();
            let words = (!self.stopwords.is_empty())
                .then(|| {
                    AhoCorasick::builder()
                        .ascii_case_insensitive(true)
                        .kind(Some(AhoCorasickKind::ContiguousNFA))
                        .build(&self.stopwords)
                        .ok()
                })
                .flatten();
            (regexes, words)
        });
        let secret = &text[hit.start..hit.end];
        let target = match self.target {
            Target::Secret => secret,
            Target::Match => &text[identifier(text, hit.match_start)..hit.match_end],
            Target::Line => line(text, hit),
        };
        regexes.as_ref().is_some_and(|set| set.is_match(target))
            || stopwords.as_ref().is_some_and(|words| words.is_match(secret))
    }
}

/// Where the identifier begins that ends at `at`: `[\w.-]{0,50}?` of gitleaks,
/// which [`Matcher`] leaves off.
fn identifier(text: &[u8], at: usize) -> usize {
    let word = |b: &&u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    at - text[..at].iter().rev().take(50).take_while(word).count()
}

/// The line of a match, at most 512 bytes to both sides.
fn line(text: &[u8], hit: Hit) -> &[u8] {
    const REACH: usize = 512;
    let before = &text[hit.match_start.saturating_sub(REACH)..hit.match_start];
    let after = &text[hit.match_end..text.len().min(hit.match_end + REACH)];
    let left = memchr::memrchr(b'\n', before).map_or(before.len(), |n| before.len() - n - 1);
    let right = memchr::memchr(b'\n', after).unwrap_or(after.len());
    &text[hit.match_start - left..hit.match_end + right]
}

/// Shannon entropy in bits for each byte.
pub fn entropy(bytes: &[u8]) -> f64 {
    let mut counts = [0u32; 256];
    for &b in bytes {
        counts[usize::from(b)] += 1;
    }
    let total = bytes.len() as f64;
    counts.iter().filter(|&&n| n > 0).map(|&n| f64::from(n) / total).map(|p| -p * p.log2()).sum()
}

/// Go takes a brace that begins no repetition for itself; the regex crate wants
/// it escaped.
fn from_go(pattern: &str) -> String {
    let mut out = String::with_capacity(pattern.len() + 8);
    let mut escaped = false;
    for (at, c) in pattern.char_indices() {
        if c == '{' && !escaped && !repetition(&pattern[at + 1..]) {
            out.push('\\');
        }
        out.push(c);
        escaped = c == '\\' && !escaped;
    }
    out
}

/// `n}`, `n,}` or `n,m}`.
fn repetition(rest: &str) -> bool {
    rest.split_once('}').is_some_and(|(inner, _)| {
        inner.starts_with(|c: char| c.is_ascii_digit())
            && inner.bytes().all(|b| b.is_ascii_digit() || b == b',')
    })
}
