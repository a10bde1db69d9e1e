//! What is handed out: a Debian package, a static binary for images, what they
//! are made of (SBOM), and their sums. Everything lies in `target/dist`.

mod image;
pub(crate) mod root;

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, bail};

use crate::{
    build, setup,
    step::{self, say},
    tally::Tally,
    toolchain, workspace,
};

/// Programs of cargo's that packaging needs, and their versions.
const TOOLS: [(&str, &str); 3] =
    [("cargo-auditable", "0.7.7"), ("cargo-cyclonedx", "0.5.9"), ("cargo-deb", "3.8.0")];

/// Nothing of the image's system is linked in: its binary runs in an empty root.
pub(crate) const STATIC: &str = "x86_64-unknown-linux-musl";

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Part {
    /// The Debian package
    Package,
    /// A binary that runs without any library
    Static,
    /// An image with that binary and nothing else
    Image,
    /// What the program is made of (CycloneDX)
    Sbom,
}

pub(crate) fn run(part: Option<Part>, then_test: bool) -> Result<()> {
    let wanted = |this: Part| part.is_none_or(|part| part == this);
    if wanted(Part::Package) {
        let package = package()?;
        say(format!("built {}", package.display()));
        if then_test {
            let tally = root::test(&package)?;
            println!("{tally}");
            if tally.failed > 0 {
                bail!("{} failed", tally.failed);
            }
        }
    }
    if wanted(Part::Static) || wanted(Part::Image) {
        let binary = static_binary()?;
        say(format!("built {}", binary.display()));
        if wanted(Part::Image) {
            say(format!("built {}", image::build(&binary)?.display()));
        }
    }
    if wanted(Part::Sbom) {
        bill()?;
    }
    sums()
}

/// The package, installed, upgraded, removed and purged in a clean system; the
/// binary of the image in an empty one.
pub(crate) fn test() -> Result<Tally> {
    let mut tally = root::test(&package()?)?;
    if nix::unistd::geteuid().is_root() {
        tally.count(root::runs_alone(&static_binary()?)?);
    }
    Ok(tally)
}

pub(crate) fn dir() -> PathBuf {
    workspace::target().join("dist")
}

/// Installs programs into `target/tools` where they are missing.
fn tools(names: &[&str]) -> Result<()> {
    for (name, version) in TOOLS.into_iter().filter(|(name, _)| names.contains(name)) {
        let mark = workspace::tools().join(format!("{name}-{version}"));
        if mark.exists() {
            continue;
        }
        let building = workspace::target().join(name);
        step::run(
            &format!("{name} {version}: cargo install"),
            toolchain::cargo()
                .args(["install", name, "--version", version, "--locked", "--force", "--root"])
                .arg(workspace::tools())
                .arg("--target-dir")
                .arg(&building),
        )?;
        let _ = fs::remove_dir_all(&building);
        fs::write(&mark, "")?;
    }
    Ok(())
}

/// `cargo` that finds the programs in `target/tools`.
fn cargo() -> Result<Command> {
    let own = [workspace::tools().join("bin")];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut cargo = toolchain::cargo();
    cargo.env("PATH", std::env::join_paths(own.into_iter().chain(std::env::split_paths(&path)))?);
    Ok(cargo)
}

/// The Debian package of the workspace's version: a binary for the C library of
/// this system, which finds users and groups wherever the host keeps them.
pub(crate) fn package() -> Result<PathBuf> {
    tools(&["cargo-auditable", "cargo-deb"])?;
    build::kernel()?;
    step::run_visible(
        cargo()?
            .args(["auditable", "build", "--release", "--package", "mcp-sensor", "--target-dir"])
            .arg(workspace::target()),
    )?;
    generate()?;
    packed(env!("CARGO_PKG_VERSION"))
}

/// What was built, as a package of this version.
fn packed(version: &str) -> Result<PathBuf> {
    let file = dir().join(format!("mcp-sensor_{version}-1_amd64.deb"));
    step::run(
        &format!("{}: cargo deb", file.file_name().unwrap_or_default().to_string_lossy()),
        cargo()?
            .args(["deb", "--no-build", "--package", "mcp-sensor", "--deb-version"])
            .arg(format!("{version}-1"))
            .arg("--output")
            .arg(&file),
    )?;
    Ok(file)
}

/// Man pages and completions, by the program itself.
fn generate() -> Result<()> {
    let generated = dir().join("generated");
    let _ = fs::remove_dir_all(&generated);
    let man = generated.join("man");
    fs::create_dir_all(&man)?;
    let sensor = workspace::sensor_binary(false);
    step::output(Command::new(&sensor).arg("man").arg(&man))?;
    step::output(Command::new("gzip").args(["-9", "-n", "-r"]).arg(&man))?;
    for (shell, name) in [("bash", "mcp-sensor.bash"), ("zsh", "_mcp-sensor"), ("fish", "mcp-sensor.fish")] {
        let script = step::output(Command::new(&sensor).args(["completions", shell]))?;
        fs::write(generated.join(name), script + "\n")?;
    }
    Ok(())
}

pub(crate) fn static_binary() -> Result<PathBuf> {
    tools(&["cargo-auditable"])?;
    build::kernel()?;
    if !setup::on_path("musl-gcc") {
        setup::apt(&["musl-tools"])?;
    }
    step::run(
        &format!("standard library for {STATIC}: rustup target add"),
        Command::new("rustup").args(["target", "add", STATIC]).current_dir(workspace::root()),
    )?;
    step::run_visible(
        cargo()?
            .args(["auditable", "build", "--release", "--package", "mcp-sensor", "--target", STATIC])
            .arg("--target-dir")
            .arg(workspace::target())
            .env("CC_x86_64_unknown_linux_musl", "musl-gcc"),
    )?;
    let built = workspace::target().join(STATIC).join("release/mcp-sensor");
    let handed_out = dir().join("mcp-sensor-static");
    fs::create_dir_all(dir())?;
    step::output(Command::new("strip").arg("-o").arg(&handed_out).arg(&built))?;
    Ok(handed_out)
}

/// CycloneDX: every crate that is linked in, with version, licence and hash.
fn bill() -> Result<()> {
    tools(&["cargo-cyclonedx"])?;
    step::run(
        "software bill of materials: cargo cyclonedx",
        cargo()?
            .args(["cyclonedx", "--format", "json", "--spec-version", "1.5", "--no-build-deps"])
            .args(["--override-filename", "mcp-sensor.cdx", "--manifest-path"])
            .arg(workspace::root().join("sensor/Cargo.toml")),
    )?;
    // It writes one beside each manifest of the workspace.
    for member in ["sensor", "sensor-ebpf", "sensor-common", "proto", "xtask", "tests"] {
        let written = workspace::root().join(member).join("mcp-sensor.cdx.json");
        if member == "sensor" {
            fs::copy(&written, dir().join("mcp-sensor.cdx.json")).context("no bill of materials")?;
        }
        let _ = fs::remove_file(&written);
    }
    Ok(())
}

fn sums() -> Result<()> {
    let mut names: Vec<_> = fs::read_dir(dir())?
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
        .map(|entry| entry.file_name())
        .filter(|name| name != "SHA256SUMS")
        .collect();
    names.sort();
    let sums = step::output(Command::new("sha256sum").arg("--").args(names).current_dir(dir()))?;
    fs::write(dir().join("SHA256SUMS"), format!("{sums}\n"))?;
    println!("{sums}");
    Ok(())
}
