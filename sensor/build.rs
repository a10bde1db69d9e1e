//! Puts the kernel object into the binary: `MCP_SENSOR_EBPF_OBJECT`, or what
//! `cargo xtask build` left in `target/bpf`. Without either the object is
//! empty, so that the collector builds with no eBPF toolchain.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

fn main() {
    println!("cargo::rerun-if-env-changed=MCP_SENSOR_EBPF_OBJECT");
    let named = env::var_os("MCP_SENSOR_EBPF_OBJECT").filter(|path| !path.is_empty());
    let source = match &named {
        Some(path) => PathBuf::from(path),
        None => {
            let manifest = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from).unwrap_or_default();
            let object = manifest.join("../target/bpf/sensor-ebpf.o");
            stand_in(&object);
            object
        }
    };
    println!("cargo::rerun-if-changed={}", source.display());
    let content = match fs::read(&source) {
        Ok(content) => content,
        Err(error) if named.is_some() => {
            println!("cargo::error=MCP_SENSOR_EBPF_OBJECT: cannot read {}: {error}", source.display());
            return;
        }
        Err(_) => Vec::new(),
    };
    let out = env::var_os("OUT_DIR").map(PathBuf::from).unwrap_or_default().join("sensor-ebpf.o");
    if let Err(error) = fs::write(&out, content) {
        println!("cargo::error=cannot write {}: {error}", out.display());
    }
}

/// cargo takes a watched file that is missing as changed and would build this
/// crate anew each time, so an empty one stands in. It is dated far back:
/// made during this run, it would look newer than the run.
fn stand_in(object: &Path) {
    if object.exists() {
        return;
    }
    let Some(dir) = object.parent() else { return };
    if fs::create_dir_all(dir).is_err() {
        return;
    }
    if let Ok(file) = fs::File::create_new(object) {
        let _ = file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1));
    }
}
