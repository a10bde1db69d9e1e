//! A stdio wire: newline-delimited JSON-RPC, both ways.

use super::session::{Counters, Session};
use super::stream::{Around, Stream};
use super::{Output, Parties, Sender, Values};

/// How much is kept, and how sure it is that this is MCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Nobody said that this is a server: it has 64 KiB each way to show it,
    /// and nothing but [`Output::NotMcp`] comes out before it did.
    pub candidate: bool,
    /// Requests that wait for an answer; beyond, the oldest ends without one.
    pub pending: usize,
    /// Memory for one tool of a list, and for all of a page.
    pub tool_bytes: usize,
    pub list_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { candidate: false, pending: 4096, tool_bytes: 1 << 20, list_bytes: 8 << 20 }
    }
}

/// What goes over one server's stdin and stdout.
#[derive(Debug)]
pub struct Connection {
    client: Stream,
    server: Stream,
    session: Session,
}

impl Connection {
    /// `key` is for the hashes of ids: the same on one sensor, secret.
    pub fn new(key: [u8; 16], limits: Limits) -> Self {
        Self {
            client: Stream::new(Sender::Client, &key),
            server: Stream::new(Sender::Server, &key),
            session: Session::new(limits),
        }
    }

    /// Bytes that `sender` moved, in order. `at` is for the events: nanoseconds
    /// of any clock.
    pub fn bytes(
        &mut self,
        sender: Sender,
        at: i64,
        bytes: &[u8],
        values: &mut dyn Values,
        out: &mut Vec<Output>,
    ) {
        let (stream, mut around) = self.around(sender, at, values, out);
        stream.lines(bytes, &mut around);
    }

    /// `lost` bytes of `sender` that nobody read lie between those before and
    /// those after; reporting them is the caller's. Also for a wire that is met
    /// in the middle, with 0. Reading goes on at the next line.
    pub fn gap(
        &mut self,
        sender: Sender,
        at: i64,
        lost: u64,
        values: &mut dyn Values,
        out: &mut Vec<Output>,
    ) {
        if self.session.dismissed() {
            return;
        }
        let (stream, mut around) = self.around(sender, at, values, out);
        stream.gap(&mut around);
        around.session.saw(sender, lost, around.out);
    }

    /// Both sides are done: a last line without its newline counts, and what is
    /// pending ends without an answer.
    pub fn close(&mut self, at: i64, values: &mut dyn Values, out: &mut Vec<Output>) {
        if self.session.dismissed() {
            return;
        }
        for sender in [Sender::Client, Sender::Server] {
            let (stream, mut around) = self.around(sender, at, values, out);
            stream.end(&mut around);
            stream.report(&mut around);
        }
        self.session.close(at, out);
    }

    fn around<'a>(
        &'a mut self,
        sender: Sender,
        at: i64,
        values: &'a mut dyn Values,
        out: &'a mut Vec<Output>,
    ) -> (&'a mut Stream, Around<'a>) {
        let stream = match sender {
            Sender::Client => &mut self.client,
            Sender::Server => &mut self.server,
        };
        (stream, Around { session: &mut self.session, values, out, at })
    }

    pub const fn counters(&self) -> Counters {
        self.session.counters()
    }

    pub const fn parties(&self) -> &Parties {
        self.session.parties()
    }

    pub const fn recognised(&self) -> bool {
        self.session.recognised()
    }
}
