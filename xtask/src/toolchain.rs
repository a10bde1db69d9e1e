//! The compiler that builds the kernel programs.
//!
//! `core` is compiled for `bpfel-unknown-none` from source, so the compiler
//! must come with it: the pinned toolchain and its `rust-src` component, or
//! Debian's `rustc-web` with `rust-web-src` where that component cannot be had.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{step, workspace};

pub(crate) const BPF_LINKER: &str = "0.13.0";

#[derive(Debug, Clone)]
pub(crate) struct Toolchain {
    pub(crate) rustc: PathBuf,
    pub(crate) cargo: PathBuf,
    pub(crate) sysroot: PathBuf,
}

impl Toolchain {
    /// The toolchain that runs xtask.
    pub(crate) fn host() -> Result<Self> {
        let cargo = std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from);
        let sysroot = step::output(rustc(Path::new("rustc")).args(["--print", "sysroot"]))
            .context("no rustc on PATH: install Rust by rustup (https://rustup.rs)")?;
        Ok(Self { rustc: PathBuf::from("rustc"), cargo, sysroot: PathBuf::from(sysroot) })
    }

    /// Debian's second Rust, if it is installed.
    fn debian() -> Option<Self> {
        let rustc_path = PathBuf::from("/usr/bin/rustc");
        let cargo = PathBuf::from("/usr/bin/cargo");
        if !rustc_path.exists() || !cargo.exists() {
            return None;
        }
        let sysroot = step::output(rustc(&rustc_path).args(["--print", "sysroot"])).ok()?;
        Some(Self { rustc: rustc_path, cargo, sysroot: PathBuf::from(sysroot) })
    }

    /// The first toolchain that has the source of `core`.
    pub(crate) fn with_source() -> Result<Option<Self>> {
        Ok([Some(Self::host()?), Self::debian()].into_iter().flatten().find(Self::has_source))
    }

    pub(crate) fn has_source(&self) -> bool {
        self.sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").exists()
    }

    pub(crate) fn version(&self) -> Result<String> {
        step::output(rustc(&self.rustc).arg("--version"))
    }

    /// The LLVM inside the toolchain: its library and its major version.
    pub(crate) fn llvm(&self) -> Result<(PathBuf, u32)> {
        let verbose = step::output(rustc(&self.rustc).arg("-vV"))?;
        let major = verbose
            .lines()
            .find_map(|line| line.strip_prefix("LLVM version: "))
            .and_then(|version| version.split('.').next()?.parse().ok())
            .with_context(|| format!("`rustc -vV` names no LLVM version:\n{verbose}"))?;
        let multiarch = format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH);
        for dir in [self.sysroot.join("lib"), PathBuf::from(multiarch)] {
            let Ok(entries) = std::fs::read_dir(&dir) else { continue };
            let mut found: Vec<_> = entries
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| {
                    path.file_name().is_some_and(|name| {
                        let name = name.to_string_lossy();
                        name.starts_with(&format!("libLLVM.so.{major}"))
                            || name.starts_with(&format!("libLLVM-{major}"))
                    })
                })
                .collect();
            found.sort();
            if let Some(library) = found.pop() {
                return Ok((library, major));
            }
        }
        bail!("{} brings no libLLVM {major}; use the toolchain that rustup installs", self.sysroot.display())
    }

    /// `cargo` of this toolchain, undisturbed by the cargo that runs xtask.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = Command::new(&self.cargo);
        command.current_dir(workspace::root()).env("RUSTC", &self.rustc);
        if self.rustc == Path::new("rustc") {
            command.env_remove("RUSTC");
        } else {
            command.env_remove("RUSTUP_TOOLCHAIN");
        }
        clean(&mut command);
        command
    }
}

fn rustc(path: &Path) -> Command {
    let mut command = Command::new(path);
    command.current_dir(workspace::root());
    command
}

/// Removes what the outer `cargo run` sets for xtask's own package: build
/// scripts that watch such a variable would run again each time.
pub(crate) fn clean(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_")
            || text.starts_with("CARGO_MANIFEST_")
            || text == "CARGO_PRIMARY_PACKAGE"
        {
            command.env_remove(&name);
        }
    }
}

/// `cargo` for user space, in the root of the repository.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace::root());
    clean(&mut command);
    command
}

pub(crate) fn bpf_linker() -> PathBuf {
    workspace::tools().join("bin/bpf-linker")
}

/// Whether the linker is there, is the pinned version, and finds its LLVM.
pub(crate) fn bpf_linker_works() -> bool {
    step::output(Command::new(bpf_linker()).arg("--version"))
        .is_ok_and(|version| version.ends_with(BPF_LINKER))
}
