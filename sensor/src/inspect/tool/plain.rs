//! Text as the patterns read it.

use super::hidden::is_invisible;

/// Lower case, one blank for any white space, without what cannot be seen and
/// without emphasis; full-width and common look-alike letters as ASCII. An
/// identifier reads as words: `ignore_previous` is "ignore previous". A blank
/// line ends a sentence.
pub fn plain(text: &str) -> String {
    let identifier = !text.contains(char::is_whitespace);
    let mut out = String::with_capacity(text.len());
    let mut lines = 0;
    for c in text.chars().filter(|c| !is_invisible(*c)) {
        lines = if c == '\n' { lines + 1 } else { lines * usize::from(c.is_whitespace()) };
        if lines == 2 && !out.trim_end().ends_with('.') {
            out.push_str(". ");
        }
        match ascii(c) {
            '*' => {}
            c if c.is_whitespace() || c.is_control() || identifier && matches!(c, '_' | '-') => {
                if !out.ends_with(' ') {
                    out.push(' ');
                }
            }
            '\u{2018}' | '\u{2019}' => out.push('\''),
            '\u{201c}' | '\u{201d}' => out.push('"'),
            c => out.extend(c.to_lowercase()),
        }
    }
    out
}

/// Parts that end with a full stop and a blank, or the like. The stop of
/// `~/.ssh` and `e.g.x` ends none.
pub fn sentences(plain: &str) -> impl Iterator<Item = &str> {
    let bytes = plain.as_bytes();
    let mut rest = 0;
    std::iter::from_fn(move || {
        if rest >= bytes.len() {
            return None;
        }
        let stops =
            |n: &usize| matches!(bytes[*n], b'.' | b'!' | b'?' | b';') && bytes.get(n + 1) == Some(&b' ');
        let end = (rest..bytes.len()).find(stops).map_or(bytes.len(), |n| n + 2);
        let sentence = &plain[rest..end];
        rest = end;
        Some(sentence)
    })
}

/// Letters that look like another alphabet's.
fn ascii(c: char) -> char {
    match c {
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(u32::from(c) - 0xff01 + 0x21).unwrap_or(c),
        'а' | 'А' | 'α' | 'Α' => 'a',
        'В' | 'Β' => 'b',
        'с' | 'С' => 'c',
        'е' | 'Е' | 'Ε' => 'e',
        'Н' | 'Η' => 'h',
        'і' | 'І' | 'ι' | 'Ι' => 'i',
        'ј' | 'Ј' => 'j',
        'К' | 'Κ' | 'к' | 'κ' => 'k',
        'М' | 'Μ' => 'm',
        'Ν' => 'n',
        'о' | 'О' | 'ο' | 'Ο' => 'o',
        'р' | 'Р' | 'ρ' | 'Ρ' => 'p',
        'ѕ' | 'Ѕ' => 's',
        'Т' | 'Τ' => 't',
        'υ' | 'ν' => 'v',
        'х' | 'Х' | 'χ' | 'Χ' => 'x',
        'у' | 'У' | 'Υ' => 'y',
        c => c,
    }
}
