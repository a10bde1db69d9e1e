//! Policies that are signed in one place and verified on every sensor.
//!
//! `key` makes and reads the keys, `file` is the bundle: its form, its limits,
//! its signature. Who may be given it and what follows on what is the agent's.

mod file;
mod key;
#[cfg(test)]
mod tests;

pub use file::{Bundle, BundleError, Draft, MAX_BYTES, is_group};
pub use key::{KeyError, PublicKey, PublicKeys, SigningKey};
