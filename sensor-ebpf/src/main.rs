//! The kernel programs of mcp-sensor. Each file is one capability and bears the
//! name of its counterpart in `sensor-common` and in the agent. Entries are
//! thin: they gather facts, ask a pure function of `sensor-common`, and turn
//! its answer into a verdict in one place ([`verdict::conclude`]).
#![no_std]
#![no_main]
#![allow(clippy::needless_pass_by_value, reason = "aya's macros hand contexts over by value")]
#![allow(clippy::needless_borrows_for_generic_args, reason = "what is passed by copy lies on the stack")]
#![feature(core_intrinsics, asm_experimental_arch)]
#![allow(internal_features, reason = "the target's atomics are behind intrinsics only")]

mod access;
mod address;
mod atomic;
mod dns;
mod exec;
mod handover;
mod identity;
mod kernel;
mod label;
mod listener;
mod name;
mod option;
mod packet;
mod policy;
mod record;
mod scratch;
mod socket;
mod stdio;
mod tls;
mod traffic;
mod unix;
mod verdict;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // Never linked in: the build refuses an object that mentions a panic.
    loop {}
}

/// Helpers that read kernel memory are offered to GPL programs only; the crate
/// is licensed Apache-2.0 OR GPL-2.0-only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
