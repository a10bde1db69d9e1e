//! The kernels that are booted: Debian's, unpacked but not installed, kept
//! below `target/vm`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{step, workspace};

/// What a kernel has to do with the claims of `init.sh`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expected {
    /// Every one of them.
    All,
    /// Too old: the sensor says so and does not start.
    Refusal,
}

/// A series of stock kernels.
pub(crate) struct Series {
    pub(crate) name: &'static str,
    /// Where from; `None`: the suites that this host is configured for.
    suite: Option<&'static str>,
    /// What the packages are called, an extended regular expression.
    packages: &'static str,
    pub(crate) expected: Expected,
}

pub(crate) const SERIES: &[Series] = &[
    Series {
        name: "5.10",
        suite: Some("bullseye"),
        packages: r"^linux-image-5\.10\..*cloud-amd64$",
        expected: Expected::Refusal,
    },
    Series {
        name: "6.1",
        suite: None,
        packages: r"^linux-image-6\.1\..*cloud-amd64$",
        expected: Expected::All,
    },
    Series {
        name: "6.12",
        suite: None,
        packages: r"^linux-image-6\.12\..*cloud-amd64$",
        expected: Expected::All,
    },
    Series {
        name: "newest",
        suite: Some("sid"),
        packages: r"^linux-binary-[0-9.]+\+deb[0-9+]*-cloud-amd64$",
        expected: Expected::All,
    },
];

pub(crate) fn named(name: &str) -> Result<&'static Series> {
    SERIES.iter().find(|series| series.name == name).with_context(|| {
        let names: Vec<_> = SERIES.iter().map(|series| series.name).collect();
        format!("no kernel series `{name}`; there are: {}", names.join(", "))
    })
}

/// The newest kernel of a series, from the cache if one is there.
pub(crate) fn image(series: &Series) -> Result<PathBuf> {
    let dir = workspace::target().join("vm").join(series.name);
    if let Some(there) = unpacked(&dir) {
        return Ok(there);
    }
    let apt = Apt::new(series.suite)?;
    let names = step::output(apt.command("apt-cache").args(["search", "--names-only", series.packages]))?;
    let package = newest(&names).with_context(|| {
        format!("no package {} in {}", series.packages, series.suite.unwrap_or("the configured suites"))
    })?;
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir)?;
    step::run(
        &format!("apt-get download {package}"),
        apt.command("apt-get").args(["download", package]).current_dir(&dir),
    )?;
    let deb = entries(&dir)?
        .into_iter()
        .find(|path| path.extension().is_some_and(|e| e == "deb"))
        .context("apt-get downloaded nothing")?;
    step::output(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&dir))?;
    fs::remove_file(&deb)?;
    unpacked(&dir).with_context(|| format!("{package} has no boot/vmlinuz"))
}

fn newest(names: &str) -> Option<&str> {
    let names = names.lines().filter_map(|line| line.split_whitespace().next());
    names.max_by_key(|name| numbers(name))
}

/// Below `boot`, or beside its modules since Debian's 7.0.
fn unpacked(dir: &Path) -> Option<PathBuf> {
    let modules = entries(&dir.join("usr/lib/modules")).unwrap_or_default();
    let places = modules.into_iter().chain([dir.join("boot")]);
    let mut files = places.flat_map(|place| entries(&place).unwrap_or_default());
    files.find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz")))
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    Ok(fs::read_dir(dir)?.flatten().map(|entry| entry.path()).collect())
}

/// Every number in a name, so that 6.1.0-9 is older than 6.1.0-56.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// apt with a suite of its own, which leaves the host's configuration alone.
struct Apt {
    options: Vec<String>,
}

impl Apt {
    fn new(suite: Option<&str>) -> Result<Apt> {
        let Some(suite) = suite else { return Ok(Apt { options: Vec::new() }) };
        let dir = workspace::target().join("vm").join("apt").join(suite);
        for sub in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(sub))?;
        }
        let sources = dir.join("sources.list");
        let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
        fs::write(
            &sources,
            format!("deb [arch=amd64 signed-by={keyring}] http://deb.debian.org/debian {suite} main\n"),
        )?;
        let apt = Apt {
            options: vec![
                format!("Dir::Etc::SourceList={}", sources.display()),
                "Dir::Etc::SourceParts=/dev/null".to_owned(),
                "Dir::Etc::Preferences=/dev/null".to_owned(),
                "Dir::Etc::PreferencesParts=/dev/null".to_owned(),
                format!("Dir::State::Lists={}", dir.join("lists").display()),
                format!("Dir::Cache={}", dir.join("cache").display()),
                // Else it wants a user of its own to read what root made.
                "APT::Sandbox::User=root".to_owned(),
            ],
        };
        step::run(&format!("apt-get update ({suite})"), apt.command("apt-get").args(["update", "-q"]))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for option in &self.options {
            command.args(["-o", option]);
        }
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_ordered_by_number() {
        let names = "linux-image-6.1.0-9-cloud-amd64 - Linux\nlinux-image-6.1.0-56-cloud-amd64 - Linux\n";
        assert_eq!(newest(names), Some("linux-image-6.1.0-56-cloud-amd64"));
    }
}
