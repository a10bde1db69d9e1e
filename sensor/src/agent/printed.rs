//! What a server prints before it says anything of MCP. A server that is spoken
//! to over HTTP logs on its stdout, which is no wire of its then.

use crate::mcp::{Output, Sender};

/// More than this is told, unless the server is spoken to over HTTP.
const MOST: u64 = 64 << 10;

/// Bytes of one stdout that wait until it is known what they are.
pub struct Printed {
    bytes: u64,
    most: u64,
}

impl Default for Printed {
    fn default() -> Self {
        Self { bytes: 0, most: MOST }
    }
}

impl Printed {
    /// Keeps back what is no message. `recognised`: this stdout carries MCP;
    /// `over_http`: the server speaks it elsewhere.
    pub fn hold(&mut self, recognised: bool, over_http: bool, outputs: &mut Vec<Output>) {
        if !recognised {
            outputs.retain(|output| match output {
                Output::Uninspected { sender: Sender::Server, bytes, how: "garbage" } => {
                    self.bytes += bytes;
                    false
                }
                _ => true,
            });
        }
        if over_http && !recognised {
            self.bytes = 0;
        } else if self.bytes > 0 && (recognised || self.bytes > self.most) {
            let bytes = std::mem::take(&mut self.bytes);
            outputs.insert(0, Output::Uninspected { sender: Sender::Server, bytes, how: "garbage" });
        }
    }

    /// Nothing more comes: what waits is told.
    pub fn end(&mut self) {
        self.most = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn garbage(bytes: u64) -> Output {
        Output::Uninspected { sender: Sender::Server, bytes, how: "garbage" }
    }

    #[test]
    fn a_banner_is_told_with_the_first_message() {
        let (mut printed, mut outputs) = (Printed::default(), vec![garbage(3)]);
        printed.hold(false, false, &mut outputs);
        assert!(outputs.is_empty());
        let mut outputs = vec![garbage(5)];
        printed.hold(true, false, &mut outputs);
        assert_eq!(outputs, [garbage(3), garbage(5)]);
    }

    #[test]
    fn what_an_http_server_logs_is_none_of_a_wires() {
        let mut printed = Printed::default();
        let mut before = vec![garbage(100)];
        printed.hold(false, false, &mut before);
        let mut after = vec![garbage(MOST + 1)];
        printed.hold(false, true, &mut after);
        printed.end();
        printed.hold(false, true, &mut after);
        assert!(before.is_empty() && after.is_empty());
    }

    #[test]
    fn what_is_never_recognised_is_told_at_the_end_or_when_it_is_much() {
        let mut printed = Printed::default();
        let mut outputs = vec![garbage(MOST)];
        printed.hold(false, false, &mut outputs);
        assert!(outputs.is_empty());
        let mut outputs = vec![garbage(1)];
        printed.hold(false, false, &mut outputs);
        assert_eq!(outputs, [garbage(MOST + 1)]);
        let mut outputs = vec![garbage(7)];
        printed.hold(false, false, &mut outputs);
        printed.end();
        printed.hold(false, false, &mut outputs);
        assert_eq!(outputs, [garbage(7)]);
    }
}
