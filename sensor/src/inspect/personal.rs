//! Personal data that shows by its form: e-mail addresses, payment card
//! numbers, IBANs, US social security numbers, telephone numbers.

/// A class of personal data; [`Class::name`] is its rule's name in findings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    Email,
    PaymentCard,
    Iban,
    UsSsn,
    Phone,
}

impl Class {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Email => "email",
            Self::PaymentCard => "payment_card",
            Self::Iban => "iban",
            Self::UsSsn => "us_ssn",
            Self::Phone => "phone",
        }
    }
}

/// Digits in a row, single blanks and hyphens between them not counted, below
/// which nothing of digits is looked at.
const DIGITS: u8 = 8;
/// Of an IBAN, blanks included (34 characters in groups of four).
const IBAN_BYTES: usize = 34 + 8;
/// RFC 5321, 4.5.3.1.
const LOCAL_BYTES: usize = 64;
const DOMAIN_BYTES: usize = 253;

/// Calls `found` with what shows itself in `from..to` of `text` (an address by
/// its `@`, a number by its first group of digits), which is what the windows
/// of a text divide between them.
pub fn find(text: &[u8], from: usize, to: usize, mut found: impl FnMut(Class, usize, usize)) {
    for at in memchr::memchr_iter(b'@', &text[from..to]) {
        if let Some((start, end)) = email(text, from + at) {
            found(Class::Email, start, end);
        }
    }
    // Digits that stand before `from` may be the first of a number here, and
    // those after `to` the last.
    let mut at = from.saturating_sub(IBAN_BYTES);
    let end = text.len().min(to + IBAN_BYTES);
    let mut digits = 0;
    while at < end {
        let class = CLASSES[usize::from(text[at])];
        digits = (digits & class.keep) + class.add;
        at += 1;
        if digits == DIGITS {
            let mut group = run_start(text, at).max(from);
            while let Some((start, stop)) = next_group(text, group, to) {
                group = stop;
                if let Some((class, start, end)) = number(text, start) {
                    found(class, start, end);
                    group = end.max(stop);
                }
            }
            at = group.max(at);
            digits = 0;
        }
    }
}

fn kept(byte: u8) -> bool {
    CLASSES[usize::from(byte)].keep != 0
}

/// Where the digits and blanks begin that end at `at`.
fn run_start(text: &[u8], at: usize) -> usize {
    at - text[..at].iter().rev().take(IBAN_BYTES).take_while(|b| kept(**b)).count()
}

/// The first group of digits of a run that begins in `from..to`.
fn next_group(text: &[u8], from: usize, to: usize) -> Option<(usize, usize)> {
    let mut start = from;
    while start < to && kept(text[start]) {
        if text[start].is_ascii_digit() && (start == 0 || !text[start - 1].is_ascii_digit()) {
            return Some((start, group_end(text, start)));
        }
        start += 1;
    }
    None
}

fn group_end(text: &[u8], start: usize) -> usize {
    start + text[start..].iter().take_while(|b| b.is_ascii_digit()).count()
}

/// What the group of digits at `start` begins, or goes on.
fn number(text: &[u8], start: usize) -> Option<(Class, usize, usize)> {
    if let Some((start, end)) = iban(text, start) {
        return Some((Class::Iban, start, end));
    }
    let before = start.checked_sub(1).map(|n| text[n]);
    if before == Some(b'+') {
        return phone(text, start).map(|end| (Class::Phone, start - 1, end));
    }
    if before.is_some_and(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-' | b'/' | b'#')) {
        return None;
    }
    ssn(text, start)
        .map(|end| (Class::UsSsn, start, end))
        .or_else(|| card(text, start).map(|end| (Class::PaymentCard, start, end)))
}

/// Whether a number may end here: neither a word nor a longer number goes on.
fn ends(text: &[u8], at: usize) -> bool {
    match text.get(at) {
        None => true,
        Some(b'-' | b'.' | b',') => !text.get(at + 1).is_some_and(u8::is_ascii_digit),
        Some(&b) => !b.is_ascii_alphanumeric() && b != b'_',
    }
}

/// The groups of digits from `start` on, one `separator` between two.
fn groups<const N: usize>(text: &[u8], start: usize, separator: u8) -> ([usize; N], usize) {
    let mut lengths = [0; N];
    let mut at = start;
    for (n, length) in lengths.iter_mut().enumerate() {
        let from = if n == 0 { at } else { at + 1 };
        if n > 0 && text.get(at) != Some(&separator) {
            break;
        }
        let end = text.get(from..).map_or(from, |_| group_end(text, from));
        if end == from {
            break;
        }
        (*length, at) = (end - from, end);
    }
    (lengths, at)
}

/// AAA-GG-SSSS as the Social Security Administration gives them out (since
/// 2011: any area but 000, 666 and 900 to 999).
fn ssn(text: &[u8], start: usize) -> Option<usize> {
    let (lengths, end) = groups::<3>(text, start, b'-');
    let number = text.get(start..end)?;
    let invalid = lengths != [3, 2, 4]
        || number.starts_with(b"000")
        || number.starts_with(b"666")
        || number[0] == b'9'
        || &number[4..6] == b"00"
        || &number[7..] == b"0000";
    (!invalid && ends(text, end)).then_some(end)
}

/// ISO/IEC 7812: an issuer's prefix, its length, the Luhn check digit; in one
/// group, or in those that are printed on the card.
fn card(text: &[u8], start: usize) -> Option<usize> {
    let first = group_end(text, start);
    let end = if first - start >= 14 {
        first
    } else {
        let separator = *text.get(first)?;
        if !matches!(separator, b' ' | b'-') {
            return None;
        }
        match groups::<4>(text, start, separator) {
            ([4, 4, 4, 4], end) => end,
            ([4, 6, 4 | 5, _], _) => groups::<3>(text, start, separator).1,
            _ => return None,
        }
    };
    let mut digits = [0u8; 19];
    let mut length = 0;
    for digit in text[start..end].iter().filter(|b| b.is_ascii_digit()) {
        *digits.get_mut(length)? = digit - b'0';
        length += 1;
    }
    let digits = &digits[..length];
    (issued(digits) && luhn(digits) && ends(text, end)).then_some(end)
}

/// The issuers' ranges and lengths.
fn issued(digits: &[u8]) -> bool {
    let number = |n: usize| digits[..n].iter().fold(0u32, |sum, d| sum * 10 + u32::from(*d));
    match digits.len() {
        14 => matches!(number(2), 36 | 38 | 39) || matches!(number(3), 300..=305),
        15 => matches!(number(2), 34 | 37),
        16 => {
            digits[0] == 4
                || matches!(number(2), 51..=55 | 62 | 65)
                || matches!(number(3), 644..=649)
                || matches!(number(4), 2221..=2720 | 3528..=3589 | 6011)
        }
        17 | 18 => number(2) == 62,
        19 => number(2) == 62 || digits[0] == 4,
        _ => false,
    }
}

fn luhn(digits: &[u8]) -> bool {
    let double =
        |(n, d): (usize, &u8)| if n % 2 == 0 { u32::from(*d) } else { u32::from(*d * 2 / 10 + *d * 2 % 10) };
    digits.iter().rev().enumerate().map(double).sum::<u32>() % 10 == 0
}

/// E.164: after the `+` 8 to 15 digits, single blanks or hyphens between them.
fn phone(text: &[u8], start: usize) -> Option<usize> {
    let before = start.checked_sub(2).map(|n| text[n]);
    if text[start] == b'0'
        || before.is_some_and(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'_' | b'/'))
    {
        return None;
    }
    // A line of a diff begins with a plus too.
    let least = if before == Some(b'\n') { 10 } else { 8 };
    let mut end = group_end(text, start);
    let mut digits = end - start;
    while matches!(text.get(end), Some(b' ' | b'-')) && text.get(end + 1).is_some_and(u8::is_ascii_digit) {
        let next = group_end(text, end + 1);
        if digits + (next - end - 1) > 15 {
            break;
        }
        digits += next - end - 1;
        end = next;
    }
    ((least..=15).contains(&digits) && ends(text, end)).then_some(end)
}

/// ISO 13616: the country's length, ISO 7064 mod 97-10. `digits` is where a
/// group of digits begins; the IBAN begins at most 14 bytes before.
fn iban(text: &[u8], digits: usize) -> Option<(usize, usize)> {
    (digits.saturating_sub(14)..digits).rev().find_map(|start| {
        let [a @ b'A'..=b'Z', b @ b'A'..=b'Z', b'0'..=b'9', b'0'..=b'9'] = *text.get(start..start + 4)?
        else {
            return None;
        };
        if start.checked_sub(1).is_some_and(|n| text[n].is_ascii_alphanumeric()) {
            return None;
        }
        let country = IBAN_LENGTHS.split(' ').find(|country| country.as_bytes()[..2] == [a, b])?;
        let length: usize = country[2..].parse().ok()?;
        let mut compact = [0u8; 34];
        let (mut taken, mut at) = (0, start);
        while taken < length {
            let byte = *text.get(at)?;
            at += 1;
            // Printed in groups of four.
            if byte == b' ' && taken > 0 && taken % 4 == 0 && text[at - 2] != b' ' {
                continue;
            }
            if !byte.is_ascii_digit() && !byte.is_ascii_uppercase() {
                return None;
            }
            compact[taken] = byte;
            taken += 1;
        }
        let compact = &compact[..taken];
        let followed = text.get(at).is_some_and(u8::is_ascii_alphanumeric);
        (!followed && mod_97(compact) == 1).then_some((start, at))
    })
}

fn mod_97(iban: &[u8]) -> u32 {
    iban[4..].iter().chain(&iban[..4]).fold(0, |rest, byte| match byte {
        b'0'..=b'9' => (rest * 10 + u32::from(byte - b'0')) % 97,
        _ => (rest * 100 + u32::from(byte - b'A') + 10) % 97,
    })
}

/// The SWIFT registry of IBAN formats: a country and its length.
const IBAN_LENGTHS: &str = "\
    AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 \
    EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 \
    JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 \
    NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 \
    TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30";

/// The address around the `@` at `at`: the common part of RFC 5322's `addr-spec`.
fn email(text: &[u8], at: usize) -> Option<(usize, usize)> {
    let local = text[..at].iter().rev().take(LOCAL_BYTES + 1).take_while(|b| is_local(**b)).count();
    let start = at - local;
    if local == 0 || local > LOCAL_BYTES || !text[start].is_ascii_alphanumeric() || text[at - 1] == b'.' {
        return None;
    }
    // What stands before the host of a URL.
    if start > 0 && text[start - 1] == b'/' {
        return None;
    }
    let domain = &text[at + 1..text.len().min(at + 2 + DOMAIN_BYTES)];
    let mut length =
        domain.iter().take_while(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-')).count();
    if length > DOMAIN_BYTES {
        return None;
    }
    while length > 0 && matches!(domain[length - 1], b'.' | b'-') {
        length -= 1;
    }
    let end = at + 1 + length;
    let domain = std::str::from_utf8(&domain[..length]).ok()?;
    let (hosts, top) = domain.rsplit_once('.')?;
    let named = (2..=24).contains(&top.len())
        && top.bytes().all(|b| b.is_ascii_alphabetic())
        && !FILE_TYPES.contains(&top.to_ascii_lowercase().as_str())
        && hosts.split('.').all(|label| !label.is_empty() && label.len() <= 63);
    // scp's and git's `user@host:path`.
    let path = text.get(end) == Some(&b':')
        && text.get(end + 1).is_some_and(|b| b.is_ascii_alphanumeric() || matches!(b, b'/' | b'~'));
    (named && !path).then_some((start, end))
}

fn is_local(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'%' | b'+' | b'-')
}

/// `icon@2x.png`, `lib@next.js`: no top-level domains.
const FILE_TYPES: [&str; 16] = [
    "png", "jpg", "jpeg", "gif", "svg", "webp", "ico", "js", "mjs", "cjs", "ts", "tsx", "jsx", "css", "json",
    "html",
];

#[derive(Clone, Copy)]
struct ByteClass {
    keep: u8,
    add: u8,
}

const CLASSES: [ByteClass; 256] = {
    let mut classes = [ByteClass { keep: 0, add: 0 }; 256];
    let mut byte = 0;
    while byte < 256 {
        if (byte as u8).is_ascii_digit() {
            classes[byte] = ByteClass { keep: 0xff, add: 1 };
        } else if byte as u8 == b' ' || byte as u8 == b'-' {
            classes[byte] = ByteClass { keep: 0xff, add: 0 };
        }
        byte += 1;
    }
    classes
};
