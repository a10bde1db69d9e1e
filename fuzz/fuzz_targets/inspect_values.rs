//! Strings of messages, and what servers say of their tools: chunking changes
//! nothing, and what is found does not survive redaction.
#![no_main]

use std::collections::HashSet;

use libfuzzer_sys::fuzz_target;
use mcp_sensor::{
    inspect::{Found, Key, Limits, Scanner, redact, tool},
    mcp::{Sender, Values as _},
};

fn scan(limits: Limits, pieces: &[&str]) -> (Vec<Found>, u64, u64) {
    let mut scanner = Scanner::new(Key::new(&[1; 32]), limits);
    for (n, piece) in pieces.iter().enumerate() {
        scanner.piece("/params/arguments/key", piece, n + 1 == pieces.len());
    }
    scanner.message(Sender::Client, "tools/call", "x");
    (scanner.take(), scanner.unscanned(), scanner.dropped())
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&[size, budget], text)) = bytes.split_first_chunk() else { return };
    let text = String::from_utf8_lossy(text);
    let limits = Limits { message_bytes: 1 << (budget % 21), ..Limits::default() };
    let mut pieces = Vec::new();
    let mut rest = &*text;
    while rest.len() > usize::from(size) + 4 {
        let (piece, after) = rest.split_at(rest.ceil_char_boundary(usize::from(size) + 1));
        pieces.push(piece);
        rest = after;
    }
    pieces.push(rest);
    let whole = scan(limits, &[&text]);
    assert_eq!(whole, scan(limits, &pieces));
    let (found, unscanned, _) = whole;
    assert!(unscanned <= text.len() as u64);
    assert!(found.iter().all(|f| f.length <= text.len() as u64 && f.count > 0));

    let redacted = redact(&text);
    assert_eq!(redact(&redacted), redacted);

    let poison = tool::check_text(
        "/description",
        &text,
        &HashSet::from([("s".into(), "send_email".into())]),
        &Key::new(&[1; 32]),
    );
    assert!(poison.len() <= tool::MAX_FOUND);
});
