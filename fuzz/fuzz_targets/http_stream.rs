//! What hostile peers write to the TCP connections of an HTTP server.
//!
//! The first byte is the size of the pieces. After that 0xFE hands over to the
//! other side, 0xFD to the other one of two connections, 0xFC is a gap.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mcp_sensor::mcp::http::{Candidate, HttpConnection, HttpOutput, HttpServer, Said};
use mcp_sensor::mcp::{Limits, Output, Sender};

fn play(size: usize, said: &[u8]) -> Vec<HttpOutput> {
    let limits = Limits { candidate: false, pending: 8, tool_bytes: 512, list_bytes: 1024 };
    let mut server = HttpServer::new([7; 16], limits);
    let mut connections = [HttpConnection::new(), HttpConnection::new()];
    let mut out = Vec::new();
    let (mut sender, mut at) = (Sender::Client, 0);
    for part in said.chunk_by(|a, b| *a < 0xfc && *b < 0xfc) {
        match part[0] {
            0xfe => {
                sender = match sender {
                    Sender::Client => Sender::Server,
                    Sender::Server => Sender::Client,
                }
            }
            0xfd => at = 1 - at,
            0xfc => connections[at].gap(sender, 0, 3, &mut server, &mut (), &mut out),
            _ => {
                for piece in part.chunks(size) {
                    connections[at].bytes(sender, 0, piece, &mut server, &mut (), &mut out);
                }
            }
        }
    }
    for mut connection in connections {
        connection.close(0, &mut server, &mut (), &mut out);
    }
    server.close(0, &mut out);
    out
}

/// The same as one exchange of a program that nobody declared: what comes before
/// the first hand-over is its request.
fn recognise(size: usize, said: &[u8]) -> Said {
    let mut candidate = Candidate::default();
    for (sender, bytes) in [Sender::Client, Sender::Server].into_iter().zip(said.splitn(2, |b| *b == 0xfe)) {
        let mut position = 0;
        // Its first piece has the status.
        for piece in bytes.chunks(size.max(16)) {
            match candidate.bytes(sender, position, piece) {
                Said::More => position += piece.len(),
                other => return other,
            }
        }
    }
    Said::More
}

fuzz_target!(|bytes: &[u8]| {
    let [size, said @ ..] = bytes else { return };
    let whole = play(usize::MAX, said);
    let (asked, ended) = whole.iter().fold((0, 0), |(asked, ended), output| match output {
        HttpOutput::Mcp { output: Output::Asked { .. }, .. } => (asked + 1, ended),
        HttpOutput::Mcp { output: Output::Ended(_) | Output::Tools(..), .. } => (asked, ended + 1),
        _ => (asked, ended),
    });
    assert_eq!(asked, ended);
    for output in &whole {
        assert!(!matches!(output, HttpOutput::Mcp { output: Output::NotMcp, .. }));
        if let HttpOutput::Exchange(exchange) = output {
            assert!(exchange.path.len() <= 256 && exchange.host.len() <= 256);
        }
    }
    assert_eq!(recognise(usize::MAX, said), recognise(usize::from(*size), said));
    let cut = play(usize::from(*size) + 1, said);
    // Behind a gap, a head counts where a piece begins with it.
    if !said.contains(&0xfc) {
        assert_eq!(whole, cut);
    }
});
