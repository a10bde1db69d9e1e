//! What building and testing need, installed only where it is missing.

use std::{fs, os::unix::fs::symlink, path::Path, process::Command};

use anyhow::{Context, Result, bail};

use crate::{
    step::{self, say},
    toolchain::{self, BPF_LINKER, Toolchain, bpf_linker, bpf_linker_works},
    workspace,
};

/// Everything: compiler and linker for kernel programs, programs for tests.
pub(crate) fn all() -> Result<()> {
    step::headline("setup");
    build_tools()?;
    test_tools()
}

/// What `cargo xtask build` needs.
pub(crate) fn build_tools() -> Result<()> {
    let toolchain = rust_source()?;
    linker(&toolchain)
}

fn rust_source() -> Result<Toolchain> {
    if let Some(toolchain) = Toolchain::with_source()? {
        say(format!("source of core: {} has it", toolchain.version()?));
        return Ok(toolchain);
    }
    let by_rustup = step::run(
        "source of core: rustup component add rust-src",
        Command::new("rustup").args(["component", "add", "rust-src"]).current_dir(workspace::root()),
    );
    if by_rustup.is_err() {
        say("rust-src cannot be had: falling back to Debian's rustc-web");
        apt(&["rustc-web", "cargo-web", "rust-web-src"]).context(
            "kernel programs need the source of Rust's core: `rustup component add rust-src`, \
             or `apt-get install rustc-web cargo-web rust-web-src`",
        )?;
    }
    Toolchain::with_source()?
        .context("the source of core was installed, but no rustc has it below lib/rustlib/src; see `rustc --print sysroot`")
}

/// bpf-linker against the LLVM that reads what this compiler writes.
fn linker(toolchain: &Toolchain) -> Result<()> {
    if bpf_linker_works() {
        say(format!("bpf-linker {BPF_LINKER}: there"));
        return Ok(());
    }
    let (library, major) = toolchain.llvm()?;
    let prefix = workspace::tools().join("llvm");
    let lib = prefix.join("lib");
    fs::create_dir_all(&lib).with_context(|| format!("cannot make {}", lib.display()))?;
    let link = lib.join("libLLVM.so");
    if fs::symlink_metadata(&link).is_ok() {
        fs::remove_file(&link)?;
    }
    symlink(&library, &link).with_context(|| format!("cannot make {}", link.display()))?;
    let rpath = library.parent().unwrap_or(Path::new("/usr/lib"));
    step::run(
        &format!("bpf-linker {BPF_LINKER}: cargo install, against LLVM {major} of the Rust toolchain"),
        toolchain::cargo()
            .args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--force"])
            .args(["--no-default-features", "--features", &format!("llvm-{major}"), "--root"])
            .arg(workspace::tools())
            .arg("--target-dir")
            .arg(workspace::target().join("bpf-linker"))
            .env("RUSTFLAGS", format!("-C link-arg=-Wl,-rpath,{}", rpath.display()))
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env("LLVM_PREFIX", &prefix),
    )?;
    // 200 MB that nothing reads again.
    let _ = fs::remove_dir_all(workspace::target().join("bpf-linker"));
    if !bpf_linker_works() {
        bail!("{} was installed but does not start: run it to see why", bpf_linker().display());
    }
    Ok(())
}

/// A program that tests or the demo start, and the Debian package that has it.
struct Needed {
    what: &'static str,
    packages: &'static [&'static str],
    there: fn() -> bool,
}

const NEEDED: &[Needed] = &[
    Needed { what: "ip", packages: &["iproute2"], there: || on_path("ip") },
    Needed {
        what: "python3 with venv",
        packages: &["python3", "python3-venv"],
        there: || step::succeeds(Command::new("python3").args(["-c", "import venv, ensurepip"])),
    },
    Needed {
        what: "node and npm",
        packages: &["nodejs", "npm"],
        there: || on_path("node") && on_path("npm"),
    },
    // Address translation, and an answer to the benchmarks' question.
    Needed { what: "nft", packages: &["nftables"], there: || on_path("nft") },
    // Go's own resolver and dialler.
    Needed { what: "go", packages: &["golang-go"], there: || on_path("go") },
    // Another C library's resolver.
    Needed { what: "musl-gcc", packages: &["musl-tools"], there: || on_path("musl-gcc") },
    // Real resolvers.
    Needed { what: "dnsmasq", packages: &["dnsmasq-base"], there: || on_path("dnsmasq") },
    Needed { what: "unbound", packages: &["unbound"], there: || on_path("unbound") },
    // A bus that collectors publish to; Debian has it where only root's PATH goes.
    Needed {
        what: "nats-server",
        packages: &["nats-server"],
        there: || on_path("nats-server") || Path::new("/usr/sbin/nats-server").is_file(),
    },
    // Receivers of what a collector hands on.
    Needed {
        what: "rsyslogd with TLS",
        packages: &["rsyslog", "rsyslog-openssl"],
        there: || on_path("rsyslogd") && rsyslog_has_tls(),
    },
    Needed { what: "prometheus", packages: &["prometheus"], there: || on_path("prometheus") },
];

/// Its TLS is a package of its own.
fn rsyslog_has_tls() -> bool {
    let libraries = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"];
    libraries.iter().any(|library| Path::new(library).join("rsyslog/lmnsd_ossl.so").exists())
}

/// Packages that bring a service along, which Debian starts and enables: no
/// test is worth that on somebody's host.
const SERVICES: &[&str] = &["nats-server", "unbound", "rsyslog", "prometheus"];

/// Those that would start a service are left to the operator.
pub(crate) fn apt_without_service(packages: &[&str]) -> Result<()> {
    if runs_services() {
        bail!(
            "its package starts a service; run: apt-get install --no-install-recommends {}",
            packages.join(" ")
        );
    }
    apt(packages)
}

fn runs_services() -> bool {
    Path::new("/run/systemd/system").exists()
}

/// Namespaces, Python and node for tests and the demo. What is missing and
/// cannot be installed is said; it does not stop a build.
fn test_tools() -> Result<()> {
    let mut missing = Vec::new();
    for needed in NEEDED {
        if (needed.there)() {
            say(format!("{}: there", needed.what));
        } else if runs_services() && needed.packages.iter().any(|p| SERVICES.contains(p)) {
            say(format!("{}: left out, since its package starts a service", needed.what));
        } else {
            missing.extend(needed.packages);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    match apt(&missing) {
        Ok(()) => Ok(()),
        Err(error) => {
            say(format!("tests and the demo will miss {}: {error:#}", missing.join(", ")));
            Ok(())
        }
    }
}

/// Installs Debian packages, as root only.
pub(crate) fn apt(packages: &[&str]) -> Result<()> {
    if !on_path("apt-get") {
        bail!("this is not a Debian: install {} by its own means", packages.join(" "));
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("not root; run: sudo apt-get install -y --no-install-recommends {}", packages.join(" "));
    }
    let install = || {
        let mut command = Command::new("apt-get");
        command
            .args(["install", "-y", "-q", "--no-install-recommends"])
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    };
    let list = packages.join(" ");
    // Lists of packages may be missing (images) or older than the archive.
    if Path::new("/var/lib/apt/lists")
        .read_dir()
        .is_ok_and(|mut dir| dir.any(|e| e.is_ok_and(|e| is_list(&e))))
        && step::run(&format!("apt-get install {list}"), &mut install()).is_ok()
    {
        return Ok(());
    }
    step::run("apt-get update", Command::new("apt-get").args(["update", "-q"]))?;
    step::run(&format!("apt-get install {list}"), &mut install())
}

fn is_list(entry: &fs::DirEntry) -> bool {
    entry.file_name().to_string_lossy().ends_with("Packages")
        || entry.file_name().to_string_lossy().ends_with("Packages.lz4")
}

pub(crate) fn on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}
