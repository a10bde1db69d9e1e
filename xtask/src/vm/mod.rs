//! Stock kernels in virtual machines: boots each with the sensor in an
//! initramfs, lets it say what works, holds it to a policy and counts claims.
//!
//! No KVM is needed; emulated, a boot takes between seconds and a minute.

mod systemd;

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{
    build, setup,
    step::{self, Step, say},
    tally::Tally,
    toolchain, workspace,
};

/// Series of Debian's cloud kernels that are booted.
pub(crate) const SERIES: &[&str] = &["6.1", "6.12"];

const POLICY: &str = "\
version: 1
resolvers: [192.0.2.53]
profiles:
  loopback: {egress: [{to: [127.0.0.0/8], ports: [7001]}]}
  names: {egress: [{to: [api.example.test], ports: [7001]}]}
servers:
  - {name: none, profile: none, mode: enforce}
  - {name: loopback, profile: loopback, mode: enforce}
  - {name: names, profile: names, mode: enforce}
  - {name: open, profile: unrestricted, mode: enforce}
  - {name: speak, profile: none, mode: enforce, match: [{exe: /bin/speak}]}
";

/// Emulation on a loaded machine.
const LIMIT: Duration = Duration::from_secs(300);
/// Claims that `init.sh` makes when all is well.
const CLAIMS: usize = 25;

pub(crate) fn run(only: Option<&str>) -> Result<()> {
    let series: Vec<_> = SERIES.iter().filter(|series| only.is_none_or(|only| **series == only)).collect();
    if series.is_empty() {
        bail!("no kernel series `{}`; there are: {}", only.unwrap_or_default(), SERIES.join(", "));
    }
    build::all(false)?;
    let tally = boot_each(series.into_iter().copied())?;
    println!("{tally}");
    if tally.failed > 0 {
        bail!("{} failed", tally.failed);
    }
    Ok(())
}

/// Every kernel, then the package under systemd.
pub(crate) fn all() -> Result<Tally> {
    let mut sum = boot_each(SERIES.iter().copied())?;
    match systemd::test() {
        Ok(tally) => sum.add(tally),
        Err(error) => {
            eprintln!("systemd: {error:#}");
            sum.count(false);
        }
    }
    Ok(sum)
}

/// Only the package under systemd.
pub(crate) fn under_systemd() -> Result<()> {
    build::kernel()?;
    let tally = systemd::test()?;
    println!("{tally}");
    if tally.failed > 0 {
        bail!("{} failed", tally.failed);
    }
    Ok(())
}

fn boot_each(series: impl Iterator<Item = &'static str>) -> Result<Tally> {
    programs()?;
    attempts()?;
    let initrd = initramfs()?;
    let mut sum = Tally::default();
    for series in series {
        // One kernel that does not boot must not hide what the others say.
        match kernel(series).and_then(|kernel| boot(series, &kernel, &initrd)) {
            Ok(tally) => sum.add(tally),
            Err(error) => {
                eprintln!("kernel {series}: {error:#}");
                sum.count(false);
            }
        }
    }
    Ok(sum)
}

/// What tries to get bytes out, and what speaks MCP.
fn attempts() -> Result<()> {
    let mut cargo = toolchain::cargo();
    cargo.args(["build", "--release", "--package", "mcp-sensor-tests"]);
    cargo.args(["--bin", "attempt", "--bin", "speak", "--target-dir"]);
    step::run_visible(cargo.arg(workspace::target()))
}

fn programs() -> Result<()> {
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

/// The newest cloud kernel of a series, unpacked but not installed.
fn kernel(series: &str) -> Result<PathBuf> {
    let dir = workspace::target().join("vm").join(series);
    if let Some(there) = image(&dir) {
        return Ok(there);
    }
    let pattern = format!("^linux-image-{}\\..*cloud-amd64$", series.replace('.', "\\."));
    let names = step::output(Command::new("apt-cache").args(["search", "--names-only", &pattern]))?;
    let package = names
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .max_by_key(|name| numbers(name))
        .with_context(|| {
            format!("no cloud kernel {series} in the configured suites: add Debian's bookworm-backports")
        })?;
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir)?;
    step::run(
        &format!("apt-get download {package}"),
        Command::new("apt-get").args(["download", package]).current_dir(&dir),
    )?;
    let deb = entries(&dir)?
        .into_iter()
        .find(|path| path.extension().is_some_and(|e| e == "deb"))
        .context("apt-get downloaded nothing")?;
    step::output(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&dir))?;
    fs::remove_file(&deb)?;
    image(&dir).with_context(|| format!("{package} has no boot/vmlinuz"))
}

fn image(dir: &Path) -> Option<PathBuf> {
    entries(&dir.join("boot"))
        .ok()?
        .into_iter()
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz")))
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    Ok(fs::read_dir(dir)?.flatten().map(|entry| entry.path()).collect())
}

/// Every number in a name, so that 6.1.0-9 is older than 6.1.0-56.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// Everything that the first process needs, dynamic libraries included: what
/// is booted is the binary that `cargo xtask build` made, not a special one.
fn initramfs() -> Result<PathBuf> {
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

fn boot(series: &str, kernel: &Path, initrd: &Path) -> Result<Tally> {
    let mut machine = Command::new("qemu-system-x86_64");
    machine
        .args(["-M", "microvm,acpi=off", "-kernel"])
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", "console=ttyS0 panic=-1 reboot=t quiet lsm=lockdown,capability,landlock,bpf"]);
    let said = until_off(series, &format!("kernel {series} boots"), &mut machine, LIMIT)?;
    Ok(claims(&said, CLAIMS))
}

/// Runs a machine until it is off or asks to be started again; what it says
/// goes to a file and is returned, its claims are printed.
fn until_off(name: &str, what: &str, machine: &mut Command, limit: Duration) -> Result<String> {
    let log = workspace::target().join("vm").join(format!("{name}.log"));
    let step = Step::start(what);
    let mut child = machine
        .args(["-accel", "tcg", "-cpu", "max", "-m", "1024", "-smp", "2", "-nographic", "-no-reboot"])
        .stdin(Stdio::null())
        .stdout(fs::File::create(&log)?)
        .stderr(Stdio::inherit())
        .spawn()
        .context("cannot start qemu-system-x86_64")?;
    let end = Instant::now() + limit;
    while child.try_wait()?.is_none() {
        if Instant::now() > end {
            child.kill()?;
            child.wait()?;
            step.failed();
            bail!("no end within {}; see {}", step::seconds(limit), log.display());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    step.done();
    let said = fs::read(&log).map(|text| String::from_utf8_lossy(&text).into_owned())?;
    let mut out = std::io::stdout().lock();
    for line in said.lines().filter(|line| line.starts_with("VM ")) {
        writeln!(out, "  {name}: {}", line.trim_end())?;
    }
    if said.lines().any(|line| line.starts_with("VM ") && line.trim_end().ends_with(" failed")) {
        say(format!("the whole log: {}", log.display()));
    }
    Ok(said)
}

/// A claim that was not made is as bad as one that failed, and so is a kernel
/// that complains.
fn claims(log: &str, expected: usize) -> Tally {
    const TROUBLE: &[&str] = &["Kernel panic", "BUG:", "WARNING: CPU", "Oops", "rcu_sched self-detected"];
    let mut tally = Tally::default();
    for line in log.lines().map(str::trim_end).filter_map(|line| line.strip_prefix("VM ")) {
        match line.rsplit_once(' ') {
            Some((_, "ok")) => tally.count(true),
            Some((_, "failed")) => tally.count(false),
            _ => {}
        }
    }
    for line in log.lines().filter(|line| TROUBLE.iter().any(|trouble| line.contains(trouble))) {
        eprintln!("  {}", line.trim_end());
        tally.count(false);
    }
    let made = (tally.passed + tally.failed) as usize;
    (made..expected).for_each(|_| tally.count(false));
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_says_nothing_fails_every_claim() {
        assert_eq!(claims("", CLAIMS).failed, CLAIMS as u64);
    }

    #[test]
    fn a_kernel_panic_is_a_failure_beside_good_claims() {
        let claims_made: String = (0..CLAIMS).map(|n| format!("VM claim{n} ok\r\n")).collect();
        let log = format!("VM kernel 6.1\r\n{claims_made}");
        assert_eq!((claims(&log, CLAIMS).passed, claims(&log, CLAIMS).failed), (CLAIMS as u64, 0));
        let log = format!("{log}[ 1.0] Kernel panic - not syncing\n");
        assert_eq!((claims(&log, CLAIMS).passed, claims(&log, CLAIMS).failed), (CLAIMS as u64, 1));
    }

    #[test]
    fn kernels_are_ordered_by_number() {
        assert!(numbers("linux-image-6.1.0-9-cloud-amd64") < numbers("linux-image-6.1.0-56-cloud-amd64"));
    }
}
