//! The kernel object, then user space with the object inside.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use object::{Object, ObjectSymbol};

use crate::{
    setup, step,
    toolchain::{self, Toolchain, bpf_linker_works},
    workspace,
};

const TARGET: &str = "bpfel-unknown-none";

pub(crate) fn all(debug: bool) -> Result<()> {
    kernel()?;
    user(debug)
}

/// Builds `sensor-ebpf` and puts it where `sensor/build.rs` looks.
pub(crate) fn kernel() -> Result<()> {
    if Toolchain::with_source()?.is_none() || !bpf_linker_works() {
        step::headline("the eBPF toolchain is not complete: setup first");
        setup::build_tools()?;
    }
    put(&kernel_program("sensor-ebpf")?, &workspace::kernel_object())
}

/// Builds one binary of the kernel crate and returns its object.
pub(crate) fn kernel_program(name: &str) -> Result<Vec<u8>> {
    cargo_for_kernel("build", &["--bin", name])?;
    let built = workspace::bpf().join(TARGET).join("release").join(name);
    let object = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    refuse_panics(&object, &built)?;
    Ok(object)
}

/// Runs a cargo command on the kernel crate, for its target and with its flags.
pub(crate) fn cargo_for_kernel(command: &str, rest: &[&str]) -> Result<()> {
    let toolchain = Toolchain::with_source()?
        .context("no Rust toolchain with the source of core: run `cargo xtask setup`")?;
    let mut path = OsString::from(workspace::tools().join("bin"));
    if let Some(rest) = std::env::var_os("PATH") {
        path.push(":");
        path.push(rest);
    }
    // The separator of this variable is the unit separator, not a space.
    let flags = [
        format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        // Atomics that return what was there: Linux 5.12.
        "-Ctarget-cpu=v3".to_owned(),
    ]
    .join("\u{1f}");
    step::run_visible(
        toolchain
            .cargo()
            .args([command, "--package", "sensor-ebpf", "--release", "--target", TARGET])
            .args(["-Z", "build-std=core", "--target-dir"])
            .arg(workspace::bpf())
            .args(rest)
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", flags)
            .env_remove("RUSTFLAGS")
            .env("PATH", path),
    )
}

/// A panic handler that is linked in means a bound check the compiler could
/// not prove; the verifier refuses such a program with an unhelpful message
/// ("last insn is not an exit or jmp"), so it is refused here by name.
fn refuse_panics(object: &[u8], path: &Path) -> Result<()> {
    let file = object::File::parse(object).with_context(|| format!("{} is no ELF object", path.display()))?;
    let panics: Vec<_> = file
        .symbols()
        .filter_map(|symbol| symbol.name().ok())
        .filter(|name| name.contains("panic"))
        .collect();
    if !panics.is_empty() {
        bail!(
            "{} contains panics, which the verifier refuses: {}\nfind the bound check, division or unwrap that the compiler could not remove",
            path.display(),
            panics.join(", ")
        );
    }
    Ok(())
}

/// A sensor whose maps are laid out differently, for tests of upgrades; see
/// `other-layout` in sensor-common. The workspace's own binary is left as it was.
pub(crate) fn other_layout(debug: bool) -> Result<PathBuf> {
    const FEATURE: [&str; 2] = ["--features", "other-layout"];
    let object = workspace::bpf().join("other-layout.o");
    cargo_for_kernel("build", &["--bin", "sensor-ebpf", FEATURE[0], FEATURE[1]])?;
    let built = workspace::bpf().join(TARGET).join("release/sensor-ebpf");
    put(&fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?, &object)?;
    let mut cargo = toolchain::cargo();
    cargo.args(["build", "--package", "mcp-sensor", "--target-dir"]).arg(workspace::target()).args(FEATURE);
    if !debug {
        cargo.arg("--release");
    }
    step::run_visible(cargo.env("MCP_SENSOR_EBPF_OBJECT", &object))?;
    let other = workspace::target().join("other-layout").join("mcp-sensor");
    fs::create_dir_all(other.parent().context("no directory")?)?;
    fs::copy(workspace::sensor_binary(debug), &other)?;
    // Puts the other one's place right again: nothing is compiled for it.
    user(debug)?;
    step::say(format!("built {}", other.display()));
    Ok(other)
}

/// Writes only what changed, so that an unchanged object rebuilds nothing.
fn put(content: &[u8], path: &Path) -> Result<()> {
    if fs::read(path).is_ok_and(|there| there == content) {
        return Ok(());
    }
    let draft = path.with_extension("new");
    fs::write(&draft, content).with_context(|| format!("cannot write {}", draft.display()))?;
    fs::rename(&draft, path).with_context(|| format!("cannot write {}", path.display()))
}

pub(crate) fn user(debug: bool) -> Result<()> {
    let mut cargo = toolchain::cargo();
    cargo.args(["build", "--package", "mcp-sensor", "--target-dir"]).arg(workspace::target());
    if !debug {
        cargo.arg("--release");
    }
    step::run_visible(&mut cargo)?;
    step::say(format!("built {}", workspace::sensor_binary(debug).display()));
    Ok(())
}
