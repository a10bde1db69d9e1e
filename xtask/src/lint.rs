//! Format, clippy for both sides, licences and sources of dependencies.

use std::path::PathBuf;

use anyhow::Result;

use crate::{build, setup, step, toolchain, workspace};

const CARGO_DENY: &str = "0.20.2";

pub(crate) fn all(install: bool) -> Result<()> {
    step::run("cargo fmt --check", toolchain::cargo().args(["fmt", "--all", "--", "--check"]))?;
    step::run_visible(
        toolchain::cargo()
            .args(["clippy", "--workspace", "--exclude", "sensor-ebpf", "--all-targets", "--"])
            .args(["-D", "warnings"]),
    )?;
    setup::build_tools()?;
    build::cargo_for_kernel("clippy", &["--", "-D", "warnings"])?;
    deny(install)
}

fn deny(install: bool) -> Result<()> {
    let own = workspace::tools().join("bin/cargo-deny");
    let program = if own.exists() {
        own
    } else if setup::on_path("cargo-deny") {
        PathBuf::from("cargo-deny")
    } else if install {
        let build = workspace::target().join("cargo-deny");
        step::run(
            &format!("cargo-deny {CARGO_DENY}: cargo install"),
            toolchain::cargo()
                .args(["install", "cargo-deny", "--version", CARGO_DENY, "--locked", "--root"])
                .arg(workspace::tools())
                .arg("--target-dir")
                .arg(&build),
        )?;
        let _ = std::fs::remove_dir_all(&build);
        own
    } else {
        step::say("cargo deny: not installed, not run (`cargo xtask lint --install` installs it)");
        return Ok(());
    };
    let mut command = std::process::Command::new(program);
    command.current_dir(workspace::root()).args(["--all-features", "check", "bans", "licenses", "sources"]);
    step::run("cargo deny check bans licenses sources", &mut command)
}
