//! The package in a clean Debian: installed, upgraded, removed, purged. What it
//! brought is gone in the end, and lintian has no errors to report.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{
    dist::{self, dir},
    setup,
    step::{self, Step},
    tally::Tally,
};

/// What the clean system has beside its essential packages.
const PACKAGES: &str = "systemd,systemd-sysv,iproute2,tcpdump";
/// A version that comes after this one.
pub(crate) const NEXT: &str = "99.0.0";

/// A Debian as it comes, made once.
pub(crate) fn archive() -> Result<PathBuf> {
    let archive = dir().join("root").join("debian.tar");
    if archive.exists() {
        return Ok(archive);
    }
    if !setup::on_path("mmdebstrap") {
        setup::apt(&["mmdebstrap"])?;
    }
    fs::create_dir_all(archive.parent().context("no directory")?)?;
    let draft = archive.with_extension("new.tar");
    step::run(
        "a clean Debian 12: mmdebstrap",
        Command::new("mmdebstrap").args(["--variant=minbase", "--include", PACKAGES, "bookworm"]).arg(&draft),
    )?;
    fs::rename(&draft, &archive)?;
    Ok(archive)
}

/// The clean system in a directory of its own.
pub(crate) fn unpacked(name: &str) -> Result<PathBuf> {
    let root = dir().join("root").join(name);
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    fs::create_dir_all(&root)?;
    step::output(Command::new("tar").arg("-xf").arg(archive()?).arg("-C").arg(&root))?;
    Ok(root)
}

/// The same program as a later version.
pub(crate) fn upgrade() -> Result<PathBuf> {
    dist::packed(NEXT)
}

pub(crate) fn test(package: &Path) -> Result<Tally> {
    let mut tally = Tally::default();
    lintian(package, &mut tally)?;
    if !nix::unistd::geteuid().is_root() {
        tally.skip("the package in a clean system: not root");
        return Ok(tally);
    }
    let upgrade = upgrade()?;
    let step = Step::start("the package in a clean system");
    let root = Root(unpacked("clean")?);
    for (name, deb) in [("package.deb", package), ("upgrade.deb", &upgrade)] {
        fs::copy(deb, root.0.join("var/tmp").join(name))?;
    }
    fs::create_dir_all(root.0.join("sys/fs/bpf"))?;
    let before = root.files()?;
    let mut claim = |name: &str, holds: bool| {
        if !holds {
            eprintln!("  {name}: failed");
        }
        tally.count(holds);
    };
    root.run("dpkg -i /var/tmp/package.deb")?;
    for (name, script) in INSTALLED {
        claim(name, root.holds(script));
    }
    root.run("echo '# mine' >>/etc/mcp-sensor/policy.yaml; systemctl disable mcp-sensor.service")?;
    root.run("mkdir -p /sys/fs/bpf/mcp_sensor && touch /sys/fs/bpf/mcp_sensor/pinned")?;
    root.run("dpkg -i /var/tmp/upgrade.deb </dev/null")?;
    for (name, script) in UPGRADED {
        claim(name, root.holds(script));
    }
    root.run("rm /sys/fs/bpf/mcp_sensor/pinned; dpkg -r mcp-sensor")?;
    for (name, script) in REMOVED {
        claim(name, root.holds(script));
    }
    root.run("dpkg -P mcp-sensor")?;
    let after = root.files()?;
    let left: Vec<_> = after.keys().filter(|path| !before.contains_key(*path)).collect();
    let gone: Vec<_> = before.keys().filter(|path| !after.contains_key(*path)).collect();
    let changed: Vec<_> =
        after.iter().filter(|(path, stat)| before.get(*path).is_some_and(|b| b != *stat)).collect();
    for path in left.iter().chain(&gone) {
        eprintln!("  left or gone: {}", path.display());
    }
    for (path, _) in &changed {
        eprintln!("  changed: {}", path.display());
    }
    claim("a purge leaves nothing", left.is_empty());
    claim("a purge takes nothing of others", gone.is_empty() && changed.is_empty());
    step.done();
    Ok(tally)
}

/// Whether a program starts where there is nothing beside it.
pub(crate) fn runs_alone(program: &Path) -> Result<bool> {
    let empty = tempfile::tempdir()?;
    fs::copy(program, empty.path().join("program"))?;
    Ok(step::succeeds(Command::new("chroot").arg(empty.path()).args(["/program", "--version"])))
}

/// What must hold, each by a command that succeeds.
type Claims = &'static [(&'static str, &'static str)];

const INSTALLED: Claims = &[
    ("the program starts", "mcp-sensor --version"),
    ("the policy that comes with it is valid", "mcp-sensor policy check"),
    ("it denies nothing", "! grep -q '^[^#]*enforce' /etc/mcp-sensor/policy.yaml"),
    ("the sensor starts at boot", "systemctl is-enabled mcp-sensor.service"),
    ("the collector does not", "! systemctl is-enabled mcp-sensor-collector.service"),
    (
        "both units are well-formed",
        "systemd-analyze verify --man=no mcp-sensor.service mcp-sensor-collector.service",
    ),
    ("the users exist", "getent passwd mcp-sensor mcp-sensor-collector"),
    ("bash reads the completions", "bash -n /usr/share/bash-completion/completions/mcp-sensor"),
    (
        "there is a page for each command",
        "ls /usr/share/man/man1/mcp-sensor-run.1.gz /usr/share/man/man1/mcp-sensor-policy-check.1.gz",
    ),
    (
        "who may read the options may not change them",
        "[ \"$(stat -c %U:%a /etc/mcp-sensor/conf.d/10-sensor.conf)\" = root:644 ]",
    ),
];

const UPGRADED: Claims = &[
    ("the later version is there", "dpkg -s mcp-sensor | grep -qx 'Version: 99.0.0-1'"),
    ("a changed policy stays", "grep -qx '# mine' /etc/mcp-sensor/policy.yaml"),
    ("what was disabled stays disabled", "! systemctl is-enabled mcp-sensor.service"),
    ("what is enforced stays pinned", "test -e /sys/fs/bpf/mcp_sensor/pinned"),
];

const REMOVED: Claims = &[
    ("the program is gone", "! test -e /usr/bin/mcp-sensor"),
    ("the policy stays", "test -e /etc/mcp-sensor/policy.yaml"),
    ("the directory of the pins is gone", "! test -e /sys/fs/bpf/mcp_sensor"),
];

/// A system in a directory, with mounts of its own.
struct Root(PathBuf);

impl Root {
    fn command(&self, script: &str) -> Command {
        let mut command = Command::new("unshare");
        // Nothing that a script mounts reaches this host.
        command.args(["--mount", "--propagation", "private", "chroot"]).arg(&self.0);
        command
            .args(["/bin/sh", "-ec", script])
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("LC_ALL", "C.UTF-8");
        command
    }

    fn run(&self, script: &str) -> Result<String> {
        step::output(&mut self.command(script)).with_context(|| format!("in the clean system: {script}"))
    }

    fn holds(&self, script: &str) -> bool {
        self.run(script).inspect_err(|error| eprintln!("  {error:#}")).is_ok()
    }

    /// Every file but those that dpkg, the dynamic linker and systemd keep their
    /// books in; users stay.
    fn files(&self) -> Result<BTreeMap<PathBuf, (u32, u64)>> {
        const BOOKS: &[&str] = &[
            "var/lib/dpkg",
            "var/log",
            "var/cache",
            "etc/passwd",
            "etc/group",
            "etc/shadow",
            "etc/gshadow",
            "etc/passwd-",
            "etc/group-",
            "etc/shadow-",
            "etc/gshadow-",
            "etc/.pwd.lock",
            "sys",
            "proc",
            "dev",
            "run",
            "tmp",
            "var/lib/systemd/deb-systemd-helper-enabled",
            "var/lib/systemd/deb-systemd-helper-masked",
        ];
        let mut files = BTreeMap::new();
        let mut dirs = vec![self.0.clone()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir)? {
                let path = entry?.path();
                let name = path.strip_prefix(&self.0)?.to_owned();
                if BOOKS.iter().any(|book| name == Path::new(book)) {
                    continue;
                }
                let meta = fs::symlink_metadata(&path)?;
                if meta.is_dir() {
                    dirs.push(path);
                }
                files.insert(name, (meta.mode(), if meta.is_dir() { 0 } else { meta.size() }));
            }
        }
        Ok(files)
    }
}

fn lintian(package: &Path, tally: &mut Tally) -> Result<()> {
    if !setup::on_path("lintian") && setup::apt(&["lintian"]).is_err() {
        tally.skip("lintian: not installed (Debian package lintian)");
        return Ok(());
    }
    let out = Command::new("lintian")
        .args(["--fail-on", "error", "--tag-display-limit", "0"])
        .arg(package)
        .output()?;
    if !out.stdout.is_empty() {
        eprintln!("{}", String::from_utf8_lossy(&out.stdout).trim_end());
    }
    if out.status.code().is_none_or(|code| code > 2) {
        bail!("lintian ended with {}: {}", out.status, String::from_utf8_lossy(&out.stderr).trim());
    }
    tally.count(out.status.success());
    Ok(())
}
