//! The policy: read, checked, compiled, explained, suggested.
//!
//! `file` is the YAML as written, `parse` checks it into a `model::Policy`,
//! `compile` makes of that what the kernel's maps hold.

pub mod address;
pub mod cidr;
pub mod compile;
pub mod diagnostic;
pub mod exec;
pub mod file;
pub mod launchers;
pub mod matching;
pub mod model;
pub mod names;
pub mod parse;
pub mod schema;
pub mod tables;
pub mod toolhive;

pub use compile::{Compiled, Ids, compile};
pub use diagnostic::Diagnostic;
pub use model::Policy;
pub use parse::parse_bytes;

#[cfg(test)]
mod tests;
