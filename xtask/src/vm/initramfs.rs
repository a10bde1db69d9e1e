//! The file system of the machine: everything that the first process needs,
//! dynamic libraries included. What is booted is the binary that
//! `cargo xtask build` made, not a special one.

use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt, path::PathBuf, process::Command};

use anyhow::{Context, Result};

use crate::{
    setup,
    step::{self, Step},
    toolchain, workspace,
};

const POLICY: &str = "\
version: 1
resolvers: [192.0.2.53]
profiles:
  loopback: {egress: [{to: [127.0.0.0/8], ports: [7001]}]}
  sockets: {egress: [], unix: [/run/named.sock]}
  names: {egress: [{to: [api.example.test], ports: [7001]}]}
servers:
  - {name: none, profile: none, mode: enforce}
  - {name: loopback, profile: loopback, mode: enforce}
  - {name: names, profile: names, mode: enforce}
  - {name: sockets, profile: sockets, mode: enforce, match: [{exe: /bin/held}]}
  - {name: watched, profile: none, mode: audit}
  - {name: open, profile: unrestricted, mode: enforce}
  - {name: speak, profile: none, mode: enforce, match: [{exe: /bin/speak}]}
";

/// Builds what the machine runs besides the sensor, and packs it all.
pub(crate) fn build() -> Result<PathBuf> {
    programs()?;
    attempts()?;
    pack()
}

/// What tries to get bytes out, and what speaks MCP.
pub(super) fn attempts() -> Result<()> {
    let mut cargo = toolchain::cargo();
    cargo.args(["build", "--release", "--package", "mcp-sensor-tests"]);
    cargo.args(["--bin", "attempt", "--bin", "speak", "--target-dir"]);
    step::run_visible(cargo.arg(workspace::target()))
}

pub(super) fn programs() -> Result<()> {
    let needed = [
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("busybox", "busybox-static"),
        ("cpio", "cpio"),
        ("dpkg-deb", "dpkg"),
    ];
    let missing: Vec<_> =
        needed.iter().filter(|(program, _)| !setup::on_path(program)).map(|(_, package)| *package).collect();
    if missing.is_empty() { Ok(()) } else { setup::apt(&missing) }
}

fn pack() -> Result<PathBuf> {
    let step = Step::start("initramfs");
    let vm = workspace::target().join("vm");
    let root = vm.join("root");
    let _ = fs::remove_dir_all(&root);
    for dir in ["bin", "proc", "sys", "dev"] {
        fs::create_dir_all(root.join(dir))?;
    }
    let busybox = step::output(Command::new("sh").args(["-c", "command -v busybox"]))?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    let mut libraries = BTreeSet::new();
    let built = |name| workspace::target().join("release").join(name);
    for program in [workspace::sensor_binary(false), built("attempt"), built("speak")] {
        let name = program.file_name().context("a program without a name")?;
        let copy = root.join("bin").join(name);
        // Without debug information: the initramfs lies in the machine's memory.
        step::output(Command::new("strip").arg("-o").arg(&copy).arg(&program))?;
        let said = step::output(Command::new("ldd").arg(&program))?;
        libraries.extend(
            said.split_whitespace()
                .filter(|word| word.starts_with('/'))
                .map(|word| word.trim_end_matches(':').to_owned()),
        );
    }
    for library in &libraries {
        let copy = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(copy.parent().unwrap_or(&root))?;
        fs::copy(library, &copy).with_context(|| format!("cannot copy {library}"))?;
    }
    fs::write(root.join("policy.yaml"), POLICY)?;
    let init = root.join("init");
    fs::write(&init, include_str!("init.sh"))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    let archive = vm.join("initrd.gz");
    let pack = "find . | cpio --quiet -o -H newc | gzip -1 > \"$0\"";
    step::output(Command::new("sh").args(["-c", pack]).arg(&archive).current_dir(&root))?;
    step.done();
    Ok(archive)
}
