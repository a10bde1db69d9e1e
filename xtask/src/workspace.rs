//! Where things lie. Everything that xtask makes is below `target/`.

use std::path::{Path, PathBuf};

/// Root of the repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

pub(crate) fn target() -> PathBuf {
    root().join("target")
}

/// Programs that `setup` builds for itself (`bpf-linker`).
pub(crate) fn tools() -> PathBuf {
    target().join("tools")
}

/// Target directory of the kernel crate: its own, because its flags would
/// otherwise throw away every user-space artefact on each build.
pub(crate) fn bpf() -> PathBuf {
    target().join("bpf")
}

/// The kernel object that `sensor/build.rs` embeds.
pub(crate) fn kernel_object() -> PathBuf {
    bpf().join("sensor-ebpf.o")
}

pub(crate) fn sensor_binary(debug: bool) -> PathBuf {
    target().join(if debug { "debug" } else { "release" }).join("mcp-sensor")
}
