//! What the kernel programs and the agent agree on: the layout of every map
//! value and ring record, and every decision as a pure function. `no_std`, no
//! allocation, no panics on the paths that the kernel programs use.
//!
//! Layouts are checked at compile time (`zerocopy` refuses padding; sizes are
//! asserted), and the agent refuses a kernel object whose [`ABI`] differs.
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

/// Version of every layout in this crate; part of the name of the pin
/// directory, so that two versions never share a map.
pub const ABI: u32 = 5;

/// IANA protocol numbers that a labelled server may use.
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
