//! Subjects: tokens with dots between them.

/// Longest subject prefix.
pub const MAX_PREFIX: usize = 200;

/// Any text as one token, also as a key of a bucket: what is neither a letter, a
/// digit, `-` nor `_` becomes `=` and two hexadecimal digits for each byte. No two
/// texts become the same; the empty one is `=`.
pub fn token(text: &str) -> String {
    if text.is_empty() {
        return "=".to_owned();
    }
    let mut token = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => token.push(byte.into()),
            _ => token.push_str(&format!("={byte:02x}")),
        }
    }
    token
}

/// A subject that others may be put below, without wildcards.
pub fn check_prefix(prefix: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_graphic() && !"*>".contains(c);
    if prefix.is_empty() || prefix.len() > MAX_PREFIX {
        return Err(format!("a subject has 1 to {MAX_PREFIX} bytes"));
    }
    if prefix.starts_with('$') {
        return Err("subjects that begin with $ are the server's own".to_owned());
    }
    if prefix.split('.').any(|token| token.is_empty() || !token.chars().all(good)) {
        return Err("a subject is tokens with dots between them, without spaces, * and >".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_that_are_used_stay_as_they_are() {
        assert_eq!(token("web-1"), "web-1");
        assert_eq!(token("web-1.example"), "web-1=2eexample");
        assert_eq!(token(""), "=");
    }

    #[test]
    fn prefixes_are_checked() {
        for good in ["mcp-sensor.events", "a", "x.y_z.1"] {
            assert_eq!(check_prefix(good), Ok(()), "{good}");
        }
        for bad in ["", ".", "a.", ".a", "a..b", "a.*", "a.>", "a b", "$JS.API", &"a".repeat(201)] {
            assert!(check_prefix(bad).is_err(), "{bad}");
        }
    }

    fn back(token: &str) -> String {
        let mut bytes = Vec::new();
        let mut rest = token.as_bytes();
        while let Some((first, after)) = rest.split_first() {
            rest = after;
            if *first == b'=' && !after.is_empty() {
                bytes.push(u8::from_str_radix(std::str::from_utf8(&after[..2]).unwrap(), 16).unwrap());
                rest = &after[2..];
            } else if *first != b'=' {
                bytes.push(*first);
            }
        }
        String::from_utf8(bytes).unwrap()
    }

    proptest! {
        /// One token of what subjects and keys may hold, from which the text can
        /// be had back.
        #[test]
        fn any_text_is_one_token_of_its_own(text in any::<String>()) {
            let token = token(&text);
            let good = |b: u8| b.is_ascii_alphanumeric() || b"-_=".contains(&b);
            prop_assert!(!token.is_empty() && token.bytes().all(good));
            prop_assert_eq!(back(&token), text);
        }
    }
}
