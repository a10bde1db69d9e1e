//! Host names: how a rule's name and a learned name lie in the kernel's maps.
//!
//! A name is kept as its text turned around, lower case, ending in NUL:
//! `www.example.com` is `moc.elpmaxe.www\0`. One trie of such texts answers for
//! exact names (`moc.elpmaxe\0`) and for everything below one (`moc.elpmaxe.`,
//! which its own apex does not begin with).

use crate::addr::Addr;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A turned-around name with its NUL. The kernel's tries take 256 bytes, four
/// of which are the scope.
pub const NAME_BYTES: usize = 252;
/// Longest name that fits: DNS itself allows 253 (RFC 1035 §2.3.4).
pub const MAX_NAME: usize = NAME_BYTES - 1;

/// Names of all profiles together, search-domain expansions included, in one
/// generation.
pub const MAX_NAMES: u32 = 262_144;

/// Addresses that all servers together have learned.
pub const MAX_LEARNED: u32 = 131_072;
/// Addresses that one server may have learned; the oldest makes room.
pub const LEARNED_PER_SERVER: u32 = 1024;
/// Names of one server that one address may have; the one that ends first makes
/// room.
pub const NAMES_PER_ADDRESS: u32 = 8;

/// An answer's TTL counts as at least this, seconds.
pub const TTL_FLOOR: u32 = 60;
/// And at most as this (RFC 2181 §8 makes larger ones harmless).
pub const TTL_CEILING: u32 = 86_400;
/// Beyond its TTL an address may still be connected to for this long, seconds:
/// clients keep addresses and reconnect.
pub const TTL_GRACE: u32 = 120;

/// Text of a name, NUL-padded.
pub type NameText = [u8; NAME_BYTES];

/// Key of the trie of names.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct NameKey {
    /// 32 + 8 per byte of the text.
    pub prefix_len: u32,
    /// Generation in the upper half, profile in the lower, network byte order.
    pub scope: u32,
    pub text: NameText,
}

pub const NAME_SCOPE_BITS: u32 = 32;

/// The scope of a profile's names under a generation.
#[inline(always)]
pub const fn scope(generation: u32, profile: u16) -> u32 {
    (generation << 16 | profile as u32).to_be()
}

/// Value of the trie of names.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct NameRule {
    /// Every range of every rule that covers the name, as for CIDRs: the trie
    /// answers with the longest match only.
    pub port_set: u32,
    /// [`NAME_ASK_ONLY`].
    pub flags: u32,
}

/// A name that the C library asks for by its search list before the one that
/// was meant: it may be asked, its answer is not learned.
pub const NAME_ASK_ONLY: u32 = 1;

/// Key of what was learned.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct LearnedKey {
    /// Network namespace that the name was asked in; the only one it holds in.
    pub netns: u64,
    /// Normalised.
    pub addr: [u32; 4],
    pub server: u16,
    /// Below [`NAMES_PER_ADDRESS`].
    pub slot: u16,
    pub _pad: u32,
}

/// One name of one address, as one server learned it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Learned {
    /// CLOCK_BOOTTIME, nanoseconds: until then a connection may begin.
    pub expires: u64,
    /// CLOCK_BOOTTIME, nanoseconds.
    pub learned: u64,
    /// Of the name (`dns::Reader::hash`), to find it among an address's names.
    pub hash: u64,
    /// The resolver that said so.
    pub resolver: Addr,
    /// [`scope`] that `set` was looked up under; 0: not yet.
    pub scope: u32,
    /// Port set of the name's rules, [`NO_SET`] if no rule covers it.
    pub set: u32,
    pub text: NameText,
    /// Seconds, as the answer said.
    pub ttl: u32,
    /// [`LEARNED_TRUSTED`].
    pub flags: u32,
    pub _pad: u32,
}

/// A pinned resolver said so of a name that a rule covered: it opens what the
/// rules say. Else it only names the address in events.
pub const LEARNED_TRUSTED: u32 = 1;

pub const NO_SET: u32 = u32::MAX;

/// The order in which a server learned, so that its own oldest makes room.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct OrderKey {
    pub server: u32,
    /// Modulo [`LEARNED_PER_SERVER`].
    pub index: u32,
}

/// What was learned at a place in that order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Order {
    pub key: LearnedKey,
    /// [`Learned::learned`] when it was entered here: differs if the name was
    /// learned again.
    pub stamp: u64,
}

#[cfg(any(test, feature = "user"))]
impl NameKey {
    /// `text` as [`turned`] makes it. `None`: too long.
    pub fn new(generation: u32, profile: u16, text: &[u8]) -> Option<NameKey> {
        let mut key = NameKey {
            prefix_len: NAME_SCOPE_BITS + 8 * text.len() as u32,
            scope: scope(generation, profile),
            text: [0; NAME_BYTES],
        };
        key.text.get_mut(..text.len())?.copy_from_slice(text);
        Some(key)
    }
}

/// The key text of an exact name, or with `below` of everything below it. `name`
/// is ASCII, lower case, without trailing dot.
#[cfg(any(test, feature = "user"))]
pub fn turned(name: &str, below: bool) -> Vec<u8> {
    let mut text: Vec<u8> = name.bytes().rev().collect();
    text.push(if below { b'.' } else { 0 });
    text
}

/// The name that a text stands for.
#[cfg(any(test, feature = "user"))]
pub fn readable(text: &[u8]) -> String {
    let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
    text[..end].iter().rev().map(|b| char::from(*b)).collect()
}

const _: () = {
    assert!(size_of::<NameKey>() == 260);
    assert!(size_of::<LearnedKey>() == 32);
    assert!(size_of::<Learned>() == 312);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_turn_around() {
        assert_eq!(turned("www.example.com", false), b"moc.elpmaxe.www\0");
        assert_eq!(turned("example.com", true), b"moc.elpmaxe.");
        assert_eq!(readable(b"moc.elpmaxe.www\0\0"), "www.example.com");
        assert!(
            !turned("example.com", false).starts_with(&turned("example.com", true)),
            "the apex is not below"
        );
        assert!(!turned("evilexample.com", false).starts_with(&turned("example.com", true)));
        assert!(turned("a.b.example.com", false).starts_with(&turned("example.com", true)));
        assert!(NameKey::new(1, 2, &turned(&"a".repeat(MAX_NAME), false)).is_some());
        assert!(NameKey::new(1, 2, &turned(&"a".repeat(MAX_NAME + 1), false)).is_none());
    }
}
