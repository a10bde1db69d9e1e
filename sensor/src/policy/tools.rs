//! Which tools of a server may be called, what happens where a forbidden one is,
//! and whether content is recorded.

use super::diagnostic::Position;
use super::file::{RawCapture, RawTools};
use super::parse::{Checker, at};
use serde_saphyr::Spanned;

/// Names or globs in one list.
pub const MAX_PATTERNS: usize = 1000;
/// Of one name or glob, bytes.
pub const MAX_PATTERN: usize = 256;
/// Content recorded of one request or response where `max_bytes` is absent.
pub const CAPTURE_BYTES: u32 = 16 << 10;
/// And at most.
pub const MAX_CAPTURE_BYTES: u32 = 64 << 10;

/// What a server's policy says of its messages. The default restricts nothing and
/// records no content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Messages {
    pub tools: Tools,
    pub on_violation: OnViolation,
    pub capture: Capture,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Tools {
    #[default]
    Any,
    /// These and no others; `line` is that of the list.
    Allow { patterns: Vec<ToolPattern>, path: String, line: u32 },
    /// All but these.
    Deny(Vec<ToolPattern>),
    /// What both allow.
    Both(Box<Tools>, Box<Tools>),
}

/// A tool's name; `*` stands for any characters, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolPattern {
    pub pattern: String,
    /// `servers[0].tools.deny[1]`.
    pub path: String,
    /// 0: not known.
    pub line: u32,
}

/// What is done about a forbidden call of a server in `enforce`; in `audit`
/// every one of these is `Report`. The later is the stricter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum OnViolation {
    /// A finding.
    #[default]
    Report,
    /// And the instance reaches nothing any more, as under profile `none`.
    Quarantine,
    /// And the instance's processes are killed.
    Kill,
}

impl OnViolation {
    pub fn name(self) -> &'static str {
        match self {
            OnViolation::Report => "report",
            OnViolation::Kill => "kill",
            OnViolation::Quarantine => "quarantine",
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Capture {
    /// Content never leaves the process that parsed it.
    #[default]
    None,
    /// Without the secrets that were found in it, and cut at so many bytes.
    Redacted { max_bytes: u32 },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolVerdict<'a> {
    Allowed,
    /// `rule` is the entry of `deny`, or the `allow` that does not list it.
    Forbidden {
        rule: &'a str,
        line: u32,
    },
}

impl Messages {
    pub fn verdict(&self, tool: &str) -> ToolVerdict<'_> {
        self.tools.verdict(tool)
    }

    /// What both allow, the stricter answer, and content only where both ask for
    /// it.
    #[must_use]
    pub fn and(&self, other: &Messages) -> Messages {
        let tools = match (&self.tools, &other.tools) {
            (Tools::Any, tools) | (tools, Tools::Any) => tools.clone(),
            (a, b) => Tools::Both(Box::new(a.clone()), Box::new(b.clone())),
        };
        let capture = match (self.capture, other.capture) {
            (Capture::Redacted { max_bytes: a }, Capture::Redacted { max_bytes: b }) => {
                Capture::Redacted { max_bytes: a.min(b) }
            }
            _ => Capture::None,
        };
        Messages { tools, on_violation: self.on_violation.max(other.on_violation), capture }
    }
}

impl Tools {
    fn verdict(&self, tool: &str) -> ToolVerdict<'_> {
        match self {
            Tools::Any => ToolVerdict::Allowed,
            Tools::Allow { patterns, path, line } => {
                if patterns.iter().any(|p| covers(&p.pattern, tool)) {
                    ToolVerdict::Allowed
                } else {
                    ToolVerdict::Forbidden { rule: path, line: *line }
                }
            }
            Tools::Deny(patterns) => match patterns.iter().find(|p| covers(&p.pattern, tool)) {
                Some(p) => ToolVerdict::Forbidden { rule: &p.path, line: p.line },
                None => ToolVerdict::Allowed,
            },
            Tools::Both(a, b) => match a.verdict(tool) {
                ToolVerdict::Allowed => b.verdict(tool),
                forbidden @ ToolVerdict::Forbidden { .. } => forbidden,
            },
        }
    }
}

/// Byte by byte; a `*` takes as little as it can and, where what follows does not
/// fit, one more: only the last `*` is ever tried again, so this ends after
/// `pattern.len() * name.len()` steps at most.
fn covers(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    p = at + 1;
                    n = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

/// The keys of a server, or of `unknown`, as written.
pub struct Raw<'a> {
    pub tools: Option<&'a Spanned<RawTools>>,
    pub on_violation: Option<&'a Spanned<String>>,
    pub capture: Option<&'a Spanned<RawCapture>>,
}

pub fn check(checker: &mut Checker, raw: &Raw<'_>, path: &str) -> Messages {
    let tools = raw.tools.map_or(Tools::Any, |t| tools(checker, t, &format!("{path}.tools")));
    let on_violation = raw
        .on_violation
        .map_or(OnViolation::Report, |v| on_violation(checker, v, &format!("{path}.on_violation")));
    if let (Some(written), None) = (raw.on_violation, raw.tools) {
        let here = format!("{path}.on_violation");
        checker.warning(at(written), here, "without `tools` no call is forbidden").help =
            Some("add `tools: {allow: […]}` or `tools: {deny: […]}`".to_owned());
    }
    let capture = raw.capture.map_or(Capture::None, |c| capture(checker, c, &format!("{path}.capture")));
    Messages { tools, on_violation, capture }
}

fn tools(checker: &mut Checker, raw: &Spanned<RawTools>, path: &str) -> Tools {
    match (&raw.value.allow, &raw.value.deny) {
        (Some(_), Some(deny)) => {
            checker.error(at(deny), format!("{path}.deny"), "`allow` and `deny` at once").help =
                Some("keep one: what `allow` does not list is forbidden anyway".to_owned());
            Tools::Any
        }
        (None, None) => {
            checker.error(at(raw), path, "neither `allow` nor `deny`").help =
                Some("write `allow: [NAME, …]`, `deny: [NAME, …]`, or leave `tools` out".to_owned());
            Tools::Any
        }
        (Some(allow), None) => {
            let path = format!("{path}.allow");
            let patterns = patterns(checker, allow, &path);
            Tools::Allow { patterns, path, line: line(at(allow)) }
        }
        (None, Some(deny)) => {
            let path = format!("{path}.deny");
            if deny.value.is_empty() {
                checker.error(at(deny), &*path, "an empty list forbids nothing").help =
                    Some("leave `tools` out, or write `allow: []` to forbid every tool".to_owned());
            }
            Tools::Deny(patterns(checker, deny, &path))
        }
    }
}

fn line(position: Option<Position>) -> u32 {
    position.map_or(0, |p| p.line)
}

fn patterns(checker: &mut Checker, list: &Spanned<Vec<Spanned<String>>>, path: &str) -> Vec<ToolPattern> {
    if let Some(more) = list.value.get(MAX_PATTERNS) {
        let message = format!("{} tools; at most {MAX_PATTERNS}", list.value.len());
        checker.error(at(more), path, message).help = Some("use `*` for names that begin alike".to_owned());
    }
    let mut patterns: Vec<ToolPattern> = Vec::new();
    for (index, text) in list.value.iter().take(MAX_PATTERNS).enumerate() {
        let (here, position) = (format!("{path}[{index}]"), at(text));
        let pattern = &text.value;
        if pattern.is_empty() || pattern.len() > MAX_PATTERN || pattern.chars().any(char::is_control) {
            let message = format!("`{}` is no name of a tool", pattern.escape_debug());
            checker.error(position, here, message).help =
                Some(format!("1 to {MAX_PATTERN} bytes without control characters; `*` stands for any"));
        } else if patterns.iter().any(|p| p.pattern == *pattern) {
            checker.error(position, here, format!("`{pattern}` stands here twice"));
        } else {
            patterns.push(ToolPattern { pattern: pattern.clone(), path: here, line: line(position) });
        }
    }
    patterns
}

fn on_violation(checker: &mut Checker, raw: &Spanned<String>, path: &str) -> OnViolation {
    match raw.value.as_str() {
        "report" => OnViolation::Report,
        "kill" => OnViolation::Kill,
        "quarantine" => OnViolation::Quarantine,
        other => {
            let message = format!("`{}` is nothing that can be done", other.escape_debug());
            checker.error(at(raw), path, message).help =
                Some("write `report`, `kill` or `quarantine`".to_owned());
            OnViolation::Report
        }
    }
}

fn capture(checker: &mut Checker, raw: &Spanned<RawCapture>, path: &str) -> Capture {
    let max_bytes = raw.value.max_bytes.as_ref().map_or(CAPTURE_BYTES, |bytes| {
        let fits = u32::try_from(bytes.value).ok().filter(|n| (1..=MAX_CAPTURE_BYTES).contains(n));
        fits.unwrap_or_else(|| {
            let message = format!("{} bytes; from 1 to {MAX_CAPTURE_BYTES}", bytes.value);
            checker.error(at(bytes), format!("{path}.max_bytes"), message);
            CAPTURE_BYTES
        })
    });
    match raw.value.content.as_ref().map(|c| (c, c.value.as_str())) {
        None | Some((_, "none")) => Capture::None,
        Some((_, "redacted")) => Capture::Redacted { max_bytes },
        Some((content, other)) => {
            let message = format!("`{}` is no way to record content", other.escape_debug());
            checker.error(at(content), format!("{path}.content"), message).help =
                Some("write `none` or `redacted`".to_owned());
            Capture::None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::covers;
    use proptest::prelude::*;

    #[test]
    fn a_star_stands_for_any_characters_or_none() {
        for (pattern, name, expected) in [
            ("read_file", "read_file", true),
            ("read_file", "read_files", false),
            ("read_file", "Read_file", false),
            ("read_*", "read_", true),
            ("read_*", "read_file", true),
            ("*_file", "write_file", true),
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("a*b*c", "axxbyybzc", true),
            ("a*b*c", "axxbyybz", false),
            ("**", "x", true),
            ("?", "x", false),
            ("[ab]", "a", false),
            ("*größe", "die größe", true),
        ] {
            assert_eq!(covers(pattern, name), expected, "{pattern} {name}");
        }
    }

    proptest! {
        /// As the same pattern written as a regular expression decides.
        #[test]
        fn globs_are_what_they_are_elsewhere(pattern in "[ab*]{0,8}", name in "[ab]{0,10}") {
            let glob = glob::Pattern::new(&pattern.replace("**", "*").replace("**", "*").replace("**", "*"));
            prop_assert_eq!(covers(&pattern, &name), glob.unwrap().matches(&name));
        }
    }
}
