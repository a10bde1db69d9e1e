//! The server name of a TLS ClientHello (RFC 8446 §4.1.2, RFC 6066 §3), read one
//! bounded step at a time, in the kernel and on the host. A hello that is not
//! whole in what was captured is not read.

use crate::dns::{Bytes, lower, plain};
use crate::name::{NAME_BYTES, NameText};

/// Bytes of a connection's start that are looked at.
pub const HELLO_BYTES: u32 = 4096;
/// Steps that one hello may take: an extension or a byte of the name each.
pub const STEPS: u32 = 512;
/// What [`looks_like_hello`] needs.
pub const PEEK_BYTES: u32 = 6;

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u32 = 0;
const ENCRYPTED_CLIENT_HELLO: u32 = 0xfe0d;
const HOST_NAME: u8 = 0;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    More,
    /// The hello is read; `text` is the name, empty if it has none.
    Done,
    /// Encrypted ClientHello: the name that counts cannot be read.
    Encrypted,
    /// No ClientHello, not whole, or contradictory.
    Unread,
}

/// How far a hello has been read.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Reader {
    phase: u32,
    limit: u32,
    pos: u32,
    end: u32,
    /// The host name: where, how long, how much of it is copied.
    name: u32,
    length: u32,
    index: u32,
    encrypted: u32,
}

const START: u32 = 0;
const EXTENSION: u32 = 1;
const TEXT: u32 = 2;

/// The bytes begin a record that begins a ClientHello.
#[inline(always)]
pub fn looks_like_hello<B: Bytes + ?Sized>(bytes: &B) -> bool {
    bytes.at(0) == HANDSHAKE && bytes.at(1) == 3 && bytes.at(5) == CLIENT_HELLO
}

impl Reader {
    #[inline(always)]
    pub const fn new(limit: u32) -> Reader {
        Reader { phase: START, limit, pos: 0, end: 0, name: 0, length: 0, index: 0, encrypted: 0 }
    }

    /// One step. `text` takes the name, turned around and NUL-padded.
    #[inline(always)]
    pub fn step<B: Bytes + ?Sized>(&mut self, bytes: &B, text: &mut NameText) -> Step {
        match self.phase {
            START => self.start(bytes, text),
            EXTENSION => self.extension(bytes),
            _ => self.copy(bytes, text),
        }
    }

    #[inline(always)]
    fn start<B: Bytes + ?Sized>(&mut self, bytes: &B, text: &mut NameText) -> Step {
        *text = [0; NAME_BYTES];
        if self.limit < 44 || !looks_like_hello(bytes) || bytes.at(2) > 4 {
            return Step::Unread;
        }
        // One handshake message in one record, and both in what was captured.
        let record = half(bytes, 3);
        let hello = (bytes.at(6) as u32) << 16 | half(bytes, 7);
        if hello + 4 != record || 5 + record > self.limit {
            return Step::Unread;
        }
        self.end = 5 + record;
        let session = bytes.at(43) as u32;
        let suites_at = 44 + session;
        if session > 32 || suites_at + 2 > self.end {
            return Step::Unread;
        }
        let methods_at = suites_at + 2 + half(bytes, suites_at);
        if methods_at >= self.end {
            return Step::Unread;
        }
        let extensions_at = methods_at + 1 + bytes.at(methods_at) as u32;
        if extensions_at == self.end {
            return Step::Done; // none at all, so no name
        }
        if extensions_at + 2 > self.end || extensions_at + 2 + half(bytes, extensions_at) != self.end {
            return Step::Unread;
        }
        self.pos = extensions_at + 2;
        self.phase = EXTENSION;
        Step::More
    }

    #[inline(always)]
    fn extension<B: Bytes + ?Sized>(&mut self, bytes: &B) -> Step {
        if self.pos == self.end {
            if self.encrypted != 0 {
                return Step::Encrypted;
            }
            if self.length == 0 {
                return Step::Done;
            }
            self.phase = TEXT;
            return Step::More;
        }
        if self.pos + 4 > self.end {
            return Step::Unread;
        }
        let kind = half(bytes, self.pos);
        let len = half(bytes, self.pos + 2);
        let data = self.pos + 4;
        if data + len > self.end {
            return Step::Unread;
        }
        self.pos = data + len;
        if kind == ENCRYPTED_CLIENT_HELLO {
            self.encrypted = 1;
        }
        if kind == SERVER_NAME {
            // A list of exactly one host name.
            if self.length != 0 || len < 6 || half(bytes, data) + 2 != len || bytes.at(data + 2) != HOST_NAME
            {
                return Step::Unread;
            }
            self.length = half(bytes, data + 3);
            self.name = data + 5;
            if self.length + 5 != len || self.length as usize >= NAME_BYTES {
                return Step::Unread;
            }
        }
        Step::More
    }

    #[inline(always)]
    fn copy<B: Bytes + ?Sized>(&mut self, bytes: &B, text: &mut NameText) -> Step {
        let byte = lower(bytes.at(self.name + self.index));
        if !plain(byte) && byte != b'.' {
            return Step::Unread;
        }
        let at = self.length.wrapping_sub(1).wrapping_sub(self.index) as usize;
        if at >= NAME_BYTES {
            return Step::Unread;
        }
        text[at] = byte;
        self.index += 1;
        if self.index < self.length { Step::More } else { Step::Done }
    }
}

#[inline(always)]
fn half<B: Bytes + ?Sized>(bytes: &B, at: u32) -> u32 {
    (bytes.at(at) as u32) << 8 | bytes.at(at + 1) as u32
}

/// The host's way to read a hello: its name (empty: none), or why not.
#[cfg(any(test, feature = "user"))]
pub fn server_name(bytes: &[u8]) -> Result<String, Step> {
    let bytes = &bytes[..bytes.len().min(HELLO_BYTES as usize)];
    let mut reader = Reader::new(bytes.len() as u32);
    let mut text = [0; NAME_BYTES];
    for _ in 0..STEPS {
        match reader.step(bytes, &mut text) {
            Step::More => {}
            Step::Done => return Ok(crate::name::readable(&text)),
            other => return Err(other),
        }
    }
    Err(Step::Unread)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extension(kind: u16, data: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &(data.len() as u16).to_be_bytes(), data].concat()
    }

    fn sni(name: &str) -> Vec<u8> {
        let len = name.len() as u16;
        extension(0, &[&(len + 3).to_be_bytes()[..], &[0], &len.to_be_bytes(), name.as_bytes()].concat())
    }

    fn hello(extensions: &[Vec<u8>]) -> Vec<u8> {
        let extensions = extensions.concat();
        let body = [
            &[3, 3][..],
            &[9; 32],
            &[4, 1, 2, 3, 4],
            &[0, 4, 0x13, 1, 0x13, 2],
            &[1, 0],
            &(extensions.len() as u16).to_be_bytes(),
            &extensions,
        ]
        .concat();
        let message = [&[1, 0][..], &(body.len() as u16).to_be_bytes(), &body].concat();
        [&[22, 3, 1][..], &(message.len() as u16).to_be_bytes(), &message].concat()
    }

    #[test]
    fn the_name_of_a_hello() {
        let bytes =
            hello(&[extension(10, &[0, 2, 0, 29]), sni("Api.Example.com"), extension(43, &[2, 3, 4])]);
        assert_eq!(server_name(&bytes), Ok("api.example.com".to_owned()));
        assert_eq!(server_name(&hello(&[extension(10, &[0])])), Ok(String::new()));
        for cut in 0..bytes.len() {
            assert_eq!(server_name(&bytes[..cut]), Err(Step::Unread), "{cut}");
        }
    }

    #[test]
    fn what_is_not_one_plain_hello_is_not_read() {
        let good = sni("a.example");
        assert_eq!(server_name(&hello(&[good.clone(), good.clone()])), Err(Step::Unread), "two names");
        assert_eq!(server_name(&hello(&[extension(0, &[0, 0])])), Err(Step::Unread));
        assert_eq!(server_name(&hello(&[sni("a\0.example")])), Err(Step::Unread));
        assert_eq!(server_name(&hello(&[good.clone(), extension(0xfe0d, &[0; 8])])), Err(Step::Encrypted));
        assert_eq!(server_name(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n and more"), Err(Step::Unread));
        let mut two_records = hello(std::slice::from_ref(&good));
        two_records[4] -= 1;
        assert_eq!(server_name(&two_records), Err(Step::Unread));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_end(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..600), flip in 0usize..120, to: u8) {
            let _ = server_name(&bytes);
            let mut bytes = hello(&[sni("api.example.com"), extension(43, &[2, 3, 4])]);
            if let Some(byte) = bytes.get_mut(flip) { *byte = to; }
            let _ = server_name(&bytes);
        }
    }
}
