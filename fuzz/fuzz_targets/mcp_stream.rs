//! What a hostile server, or client, writes to a stdio wire.
//!
//! The first byte's lowest bit makes it a candidate, the second is the size of
//! the pieces. After that 0xFE hands over to the other side, 0xFC is a gap.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mcp_sensor::mcp::{Connection, Limits, Output, Sender, Values};

#[derive(Default, PartialEq, Debug)]
struct Shown {
    pieces: Vec<(String, String, bool)>,
    messages: usize,
}

impl Values for Shown {
    fn piece(&mut self, place: &str, piece: &str, last: bool) {
        assert!(place.len() <= 256 && piece.len() <= 16 * 1024);
        self.pieces.push((place.to_owned(), piece.to_owned(), last));
    }

    fn message(&mut self, _: Sender, _: &str, _: &str) {
        self.messages += 1;
    }
}

fn play(candidate: bool, size: usize, said: &[u8]) -> (Vec<Output>, Shown) {
    let limits = Limits { candidate, pending: 8, tool_bytes: 512, list_bytes: 1024 };
    let mut connection = Connection::new([7; 16], limits);
    let (mut out, mut shown) = (Vec::new(), Shown::default());
    let mut sender = Sender::Client;
    for part in said.chunk_by(|a, b| *a < 0xfc && *b < 0xfc) {
        match part[0] {
            0xfe => {
                sender = match sender {
                    Sender::Client => Sender::Server,
                    Sender::Server => Sender::Client,
                }
            }
            0xfc => connection.gap(sender, 0, 3, &mut shown, &mut out),
            _ => {
                for piece in part.chunks(size) {
                    connection.bytes(sender, 0, piece, &mut shown, &mut out);
                }
            }
        }
    }
    connection.close(0, &mut shown, &mut out);
    (out, shown)
}

fuzz_target!(|bytes: &[u8]| {
    let [flags, size, said @ ..] = bytes else { return };
    let whole = play(flags & 1 == 1, usize::MAX, said);
    let (asked, ended) = whole.0.iter().fold((0, 0), |(asked, ended), output| match output {
        Output::Asked { .. } => (asked + 1, ended),
        Output::Ended(_) | Output::Tools(..) => (asked, ended + 1),
        _ => (asked, ended),
    });
    let dismissed = whole.0.iter().position(|output| *output == Output::NotMcp);
    match dismissed {
        Some(at) => assert_eq!(at + 1, whole.0.len()),
        None => assert_eq!(asked, ended),
    }
    let unread: u64 = whole
        .0
        .iter()
        .map(|output| if let Output::Uninspected { bytes, .. } = output { *bytes } else { 0 })
        .sum();
    assert!(unread <= said.len() as u64);
    let cut = play(flags & 1 == 1, usize::from(*size) + 1, said);
    assert_eq!(whole.0, cut.0);
    if dismissed.is_none() {
        assert_eq!(whole.1, cut.1);
    }
});
