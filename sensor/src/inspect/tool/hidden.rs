//! Characters that a model reads and a person does not see.

/// White space in a row that moves what follows out of sight.
const GAP: usize = 100;

/// (rule, the characters), one for each run.
pub fn find(text: &str) -> Vec<(&'static str, &str)> {
    let mut found: Vec<(&'static str, &str)> = Vec::new();
    if !text.is_ascii() {
        let right_to_left = text.chars().any(is_right_to_left);
        runs(text, &mut found, |before, c, after| {
            hidden(before, c, after, right_to_left).then_some("hidden_unicode")
        });
    }
    runs(text, &mut found, |_, c, _| is_control(c).then_some("control_characters"));
    for run in text.split(|c: char| !c.is_whitespace()) {
        let at = run.as_ptr() as usize - text.as_ptr() as usize;
        if run.chars().count() >= GAP && !text[at + run.len()..].trim().is_empty() {
            found.push(("hidden_whitespace", run));
        }
    }
    found
}

/// Adds each run of characters that `rule` names; it is given the characters
/// beside them too.
fn runs<'a>(
    text: &'a str,
    found: &mut Vec<(&'static str, &'a str)>,
    rule: impl Fn(Option<char>, char, Option<char>) -> Option<&'static str>,
) {
    let mut run: Option<(&'static str, usize)> = None;
    let mut before = None;
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        let after = chars.peek().map(|(_, c)| *c);
        match (rule(before, c, after), run) {
            (Some(name), None) => run = Some((name, at)),
            (None, Some((name, start))) => {
                found.push((name, &text[start..at]));
                run = None;
            }
            _ => {}
        }
        before = Some(c);
    }
    if let Some((name, start)) = run {
        found.push((name, &text[start..]));
    }
}

fn is_control(c: char) -> bool {
    c.is_control() && !matches!(c, '\t' | '\n' | '\r')
}

/// What has no width and no mark of its own, wherever it stands.
pub fn is_invisible(c: char) -> bool {
    matches!(c,
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
        | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{2800}' | '\u{3164}'
        | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff9}'..='\u{fffb}'
        | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
}

/// Whether a character hides something here. Emoji, scripts that join letters
/// and text from right to left use some of them, each in its place.
fn hidden(before: Option<char>, c: char, after: Option<char>, right_to_left: bool) -> bool {
    let beside = |test: fn(char) -> bool| before.is_some_and(test) || after.is_some_and(test);
    match c {
        // Flags of regions: a black flag, then tags.
        '\u{e0020}'..='\u{e007f}' => !before.is_some_and(|b| b == '\u{1f3f4}' || is_flag_tag(b)),
        // Variants of ideographs.
        '\u{e0100}'..='\u{e01ef}' => !before.is_some_and(is_ideograph),
        '\u{fe00}'..='\u{fe0f}' => !before.is_some_and(takes_variant),
        // Joiners: in emoji, and in scripts whose letters join.
        '\u{200d}' => {
            let emoji = before.is_some_and(|b| is_emoji(b) || b == '\u{fe0f}') && after.is_some_and(is_emoji);
            !emoji && !beside(joins)
        }
        '\u{200c}' => !beside(joins),
        '\u{200e}' | '\u{200f}' | '\u{61c}' | '\u{202a}'..='\u{202c}' | '\u{2066}'..='\u{2069}' => {
            !right_to_left
        }
        // A mark of byte order at the beginning.
        '\u{feff}' => before.is_some(),
        // A hyphen that shows where a word is broken.
        '\u{ad}' => !(before.is_some_and(char::is_alphabetic) && after.is_some_and(char::is_alphabetic)),
        '\u{115f}' | '\u{1160}' | '\u{3164}' | '\u{ffa0}' => !beside(is_hangul),
        '\u{2800}' => !beside(|c| ('\u{2801}'..='\u{28ff}').contains(&c)),
        '\u{180b}'..='\u{180f}' => !beside(|c| ('\u{1820}'..='\u{18aa}').contains(&c)),
        '\u{e000}'..='\u{f8ff}' | '\u{f0000}'..='\u{10ffff}' => true,
        c => is_invisible(c),
    }
}

/// The tags that flags are spelled with: region letters, digits, and the end.
fn is_flag_tag(c: char) -> bool {
    matches!(c, '\u{e0030}'..='\u{e0039}' | '\u{e0061}'..='\u{e007a}')
}

fn is_right_to_left(c: char) -> bool {
    matches!(c, '\u{590}'..='\u{8ff}' | '\u{fb1d}'..='\u{fdff}' | '\u{fe70}'..='\u{fefc}' | '\u{10800}'..='\u{10fff}' | '\u{1e800}'..='\u{1efff}')
        && c.is_alphabetic()
}

/// Arabic, Syriac, N'Ko, the scripts of India and around it, Mongolian.
fn joins(c: char) -> bool {
    matches!(c, '\u{600}'..='\u{7ff}' | '\u{840}'..='\u{dff}' | '\u{f00}'..='\u{109f}' | '\u{1780}'..='\u{18af}' | '\u{fb50}'..='\u{fdff}' | '\u{fe70}'..='\u{fefc}')
}

fn is_hangul(c: char) -> bool {
    matches!(c, '\u{1100}'..='\u{11ff}' | '\u{3131}'..='\u{318e}' | '\u{ac00}'..='\u{d7ff}')
        && c != '\u{115f}'
        && c != '\u{1160}'
        && c != '\u{3164}'
}

fn is_ideograph(c: char) -> bool {
    matches!(c, '\u{3400}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}')
}

fn is_emoji(c: char) -> bool {
    matches!(c, '\u{a9}' | '\u{ae}' | '\u{2190}'..='\u{2bff}' | '\u{3030}' | '\u{303d}' | '\u{3297}' | '\u{3299}' | '\u{1f000}'..='\u{1faff}')
}

/// Characters that are shown as text or as emoji, and those with variants.
fn takes_variant(c: char) -> bool {
    is_emoji(c)
        || is_ideograph(c)
        || matches!(c, '0'..='9' | '#' | '*' | '\u{203c}' | '\u{2049}' | '\u{2100}'..='\u{214f}' | '\u{1000}'..='\u{109f}' | '\u{1820}'..='\u{18aa}' | '\u{a840}'..='\u{a877}')
}
