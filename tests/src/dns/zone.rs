//! What a server answers, name by name.

use super::message::{A, AAAA, Message, NO_SUCH_NAME, Query, Record, asked};
use std::net::IpAddr;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    Udp,
    Tcp,
}

/// Where an answer over UDP comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    Resolver,
    /// The same port of another address.
    AnotherAddress,
    /// The same address, another port.
    AnotherPort,
}

#[derive(Clone, Debug)]
pub struct Reply {
    pub bytes: Vec<u8>,
    pub from: From,
}

impl std::convert::From<Message> for Reply {
    fn from(message: Message) -> Reply {
        Reply { bytes: message.to_bytes(), from: From::Resolver }
    }
}

type Script = Box<dyn Fn(&Query, Over) -> Vec<Reply> + Send + Sync>;

/// Names with what is answered for them; every other name does not exist.
#[derive(Default)]
pub struct Zone {
    names: Vec<(String, Script)>,
    below: Vec<(String, Script)>,
}

impl Zone {
    pub fn new() -> Zone {
        Zone::default()
    }

    /// The plain case.
    pub fn host(self, name: &str, addresses: &[IpAddr]) -> Zone {
        let addresses = addresses.to_vec();
        self.script(name, move |query, _| vec![addresses_of(query, &addresses).into()])
    }

    pub fn script(
        mut self,
        name: &str,
        script: impl Fn(&Query, Over) -> Vec<Reply> + Send + Sync + 'static,
    ) -> Zone {
        self.names.push((name.to_string(), Box::new(script)));
        self
    }

    /// For every name that ends in `.suffix` and is not listed itself.
    pub fn below(
        mut self,
        suffix: &str,
        script: impl Fn(&Query, Over) -> Vec<Reply> + Send + Sync + 'static,
    ) -> Zone {
        self.below.push((format!(".{}", suffix.to_ascii_lowercase()), Box::new(script)));
        self
    }

    pub fn answer(&self, query: &Query, over: Over) -> Vec<Reply> {
        let lower = query.name.to_ascii_lowercase();
        let exact = self.names.iter().find(|(name, _)| query.is_for(name));
        let script = exact.or_else(|| self.below.iter().find(|(suffix, _)| lower.ends_with(suffix)));
        match script {
            Some((_, script)) => script(query, over),
            None => {
                let mut reply = Message::reply(query);
                reply.flags |= NO_SUCH_NAME;
                vec![reply.into()]
            }
        }
    }
}

/// Those of the asked family.
pub fn addresses_of(query: &Query, addresses: &[IpAddr]) -> Message {
    let wanted = addresses.iter().filter(|a| Query::kind_of(**a) == query.kind);
    wanted.fold(Message::reply(query), |m, a| m.answer(Record::address(asked(), *a)))
}

/// A fresh address in 198.51.100.0/24 or 2001:db8:1::/64 for every query.
pub fn random_address(query: &Query, seed: u64) -> Message {
    // SplitMix64: every bit of a counter spreads over the whole word.
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^= z >> 27;
    let bytes = z.to_be_bytes();
    let reply = Message::reply(query);
    match query.kind {
        A => reply.answer(Record::address(asked(), IpAddr::from([198, 51, 100, bytes[0].clamp(1, 254)]))),
        AAAA => {
            let mut octets = [0; 16];
            octets[..6].copy_from_slice(&[0x20, 0x01, 0x0d, 0xb8, 0, 1]);
            octets[8..].copy_from_slice(&bytes);
            reply.answer(Record::address(asked(), IpAddr::from(octets)))
        }
        _ => reply,
    }
}
