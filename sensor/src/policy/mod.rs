//! The policy: read, checked, compiled, explained, suggested.
//!
//! `file` is the YAML as written, `parse` checks it into a `model::Policy`,
//! `compile` makes of that what the kernel's maps hold.

pub mod address;
pub mod bundle;
pub mod cidr;
pub mod combine;
pub mod command;
pub mod compile;
pub mod diagnostic;
pub mod exec;
pub mod explain;
pub mod file;
pub mod host;
pub mod launchers;
pub mod load;
pub mod matching;
mod meet;
pub mod model;
pub mod name_keys;
pub mod names;
pub mod parse;
pub mod ports;
pub mod recognise;
pub mod resolvers;
pub mod rules;
pub mod schema;
pub mod suggest;
pub mod tables;
pub mod toolhive;
pub mod tools;
pub mod variants;
pub mod yaml;

pub use compile::{Compiled, Ids, compile};
pub use diagnostic::Diagnostic;
pub use host::Host;
pub use load::{LoadError, Loaded, load};
pub use model::Policy;
pub use parse::parse_bytes;
pub use tools::{Capture, OnViolation, ToolVerdict};

#[cfg(test)]
mod tests;
