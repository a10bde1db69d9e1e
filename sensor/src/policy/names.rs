//! Host names as rules write them: one name, or everything below one.

use std::fmt;

/// Longest name in its textual form. DNS allows 253; two bytes stay free for
/// the key that the kernel matches.
pub const MAX_NAME: usize = 251;

/// `example.com`, or `*.example.com`: any depth below it, not itself. Stored in
/// ASCII (IDNA), lower case, without trailing dot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamePattern {
    pub below: bool,
    pub name: String,
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.below { "*." } else { "" }, self.name)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("an empty name")]
    Empty,
    #[error("a name with a NUL or control character")]
    Control,
    #[error("`*` stands for whole labels at the front only: `*.example.com`")]
    Wildcard,
    #[error("`*.{0}` would cover a whole top-level domain")]
    TooWide(String),
    #[error("an empty label (two dots in a row, or one in front)")]
    EmptyLabel,
    #[error("a label longer than 63 bytes")]
    LongLabel,
    #[error("a name longer than {MAX_NAME} bytes")]
    Long,
    #[error("`{0}` may not stand in a host name")]
    Character(char),
    #[error("a label that begins or ends with `-`")]
    Hyphen,
    #[error("not a valid internationalised name")]
    Idna,
    #[error("neither an address nor a host name (the last label is a number)")]
    Numeric,
}

impl NamePattern {
    pub fn parse(text: &str) -> Result<NamePattern, NameError> {
        if text.len() > 4 * MAX_NAME {
            return Err(NameError::Long);
        }
        if text.chars().any(char::is_control) {
            return Err(NameError::Control);
        }
        let (below, rest) = match text.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        if rest.contains('*') {
            return Err(NameError::Wildcard);
        }
        let name = ascii(rest)?;
        if below && !name.contains('.') {
            return Err(NameError::TooWide(name));
        }
        // With one more label there would be no name left to cover.
        if below && name.len() + 2 > MAX_NAME {
            return Err(NameError::Long);
        }
        Ok(NamePattern { below, name })
    }

    /// `host` in any case, with or without trailing dot.
    pub fn covers(&self, host: &str) -> bool {
        let Ok(host) = ascii(host) else { return false };
        if !self.below {
            return host == self.name;
        }
        host.strip_suffix(self.name.as_str()).is_some_and(|front| front.len() > 1 && front.ends_with('.'))
    }
}

/// The name as DNS carries it, checked label by label. Underscores are taken,
/// since real names have them (`_dmarc`, `my_host`).
fn ascii(text: &str) -> Result<String, NameError> {
    let text = text.strip_suffix('.').unwrap_or(text);
    if text.is_empty() {
        return Err(NameError::Empty);
    }
    let name = if text.is_ascii() {
        text.to_ascii_lowercase()
    } else {
        idna::domain_to_ascii_strict(text).map_err(|_| NameError::Idna)?
    };
    if name.len() > MAX_NAME {
        return Err(NameError::Long);
    }
    for label in name.split('.') {
        if label.is_empty() {
            return Err(NameError::EmptyLabel);
        }
        if label.len() > 63 {
            return Err(NameError::LongLabel);
        }
        if label.starts_with('-') || label.ends_with('-') {
            return Err(NameError::Hyphen);
        }
        if let Some(c) = label.chars().find(|c| !c.is_ascii_alphanumeric() && *c != '-' && *c != '_') {
            return Err(NameError::Character(c));
        }
        if label.starts_with("xn--") && idna::domain_to_unicode(label).1.is_err() {
            return Err(NameError::Idna);
        }
    }
    let last = name.rsplit('.').next().unwrap_or("");
    let hex = last.strip_prefix("0x").is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
    if hex || last.bytes().all(|b| b.is_ascii_digit()) {
        return Err(NameError::Numeric);
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_wildcard_leaves_room_for_a_label() {
        let long = |n: usize| format!("*.{}.b", ["a"; 125].join(".") + &"a".repeat(n - 251));
        assert!(NamePattern::parse(&long(251)).is_err(), "251 bytes below which there is nothing");
        let name = format!("{}.bb", ["a"; 123].join("."));
        assert_eq!(name.len() + 1, 249);
        let pattern = NamePattern::parse(&format!("*.{name}c")).expect("249 bytes");
        assert!(pattern.covers(&format!("x.{name}c")));
    }

    #[test]
    fn names_are_stored_as_dns_carries_them() {
        for (written, stored) in [
            ("API.GitHub.com", "api.github.com"),
            ("example.com.", "example.com"),
            ("*.Example.com", "*.example.com"),
            ("bücher.example", "xn--bcher-kva.example"),
            ("_dmarc.example.com", "_dmarc.example.com"),
            ("localhost", "localhost"),
        ] {
            assert_eq!(NamePattern::parse(written).unwrap().to_string(), stored);
        }
    }

    #[test]
    fn what_is_no_name_is_refused_with_its_reason() {
        for (written, error) in [
            ("", NameError::Empty),
            (".", NameError::Empty),
            ("a..b", NameError::EmptyLabel),
            (".example.com", NameError::EmptyLabel),
            ("exa\0mple.com", NameError::Control),
            ("*", NameError::Wildcard),
            ("a.*.com", NameError::Wildcard),
            ("*a.com", NameError::Wildcard),
            ("*.com", NameError::TooWide("com".into())),
            ("-a.com", NameError::Hyphen),
            ("http://example.com", NameError::Character(':')),
            ("a b.com", NameError::Character(' ')),
            ("10.1", NameError::Numeric),
            ("1.2.3.4.5", NameError::Numeric),
            ("a.0x7f", NameError::Numeric),
            ("xn--\u{7f}", NameError::Control),
        ] {
            assert_eq!(NamePattern::parse(written).unwrap_err(), error, "{written:?}");
        }
        assert_eq!(NamePattern::parse(&format!("{}.com", "a".repeat(64))), Err(NameError::LongLabel));
        let long = vec!["a".repeat(49); 5].join(".");
        assert_eq!(long.len(), 249);
        assert!(NamePattern::parse(&long).is_ok());
        assert_eq!(NamePattern::parse(&format!("{long}.bcd")), Err(NameError::Long));
    }

    #[test]
    fn a_wildcard_covers_every_depth_below_and_not_the_apex() {
        let pattern = NamePattern::parse("*.example.com").unwrap();
        assert!(pattern.covers("a.example.com") && pattern.covers("A.b.Example.com."));
        assert!(!pattern.covers("example.com") && !pattern.covers("evilexample.com"));
        assert!(NamePattern::parse("example.com").unwrap().covers("EXAMPLE.com."));
    }

    proptest! {
        #[test]
        fn parsing_is_stable_and_never_panics(text in ".{0,80}") {
            if let Ok(pattern) = NamePattern::parse(&text) {
                prop_assert_eq!(NamePattern::parse(&pattern.to_string()).unwrap(), pattern);
            }
        }
    }
}
