//! The kernel programs, inside the binary.

/// The object that `cargo xtask build` made, aligned for an ELF parser; empty
/// when the binary was built without an eBPF toolchain.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sensor-ebpf.o"));
