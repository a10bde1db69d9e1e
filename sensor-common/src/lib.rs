//! What the kernel programs and the agent agree on: the layout of every map
//! value and ring record, and every decision as a pure function. `no_std`, no
//! allocation, no panics on the paths that the kernel programs use.
//!
//! Layouts are checked at compile time (`zerocopy` refuses padding; sizes are
//! asserted).
#![cfg_attr(not(any(test, feature = "user")), no_std)]

pub mod access;
pub mod addr;
pub mod dns;
pub mod exec;
pub mod identity;
pub mod kernel;
pub mod label;
pub mod listener;
pub mod name;
pub mod policy;
pub mod record;
pub mod socket;
pub mod stdio;
pub mod tls;
pub mod unix;

/// Version of the layouts in this crate; part of the name of the pin directory.
///
/// A sensor takes over from one of another version, newer or older (see
/// `kernel::carry`), if values of maps grow only at their end, zero there means
/// what was before, and keys stay as they are. A map whose values come to mean
/// something else gets another name.
pub const ABI: u32 = if cfg!(feature = "other-layout") { 1006 } else { 6 };

/// IANA protocol numbers that a labelled server may use.
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
