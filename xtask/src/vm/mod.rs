//! Stock kernels in virtual machines: boots each with the sensor in an
//! initramfs, lets it say what works, holds it to a policy and counts claims.
//!
//! No KVM is needed; emulated, a boot takes between seconds and minutes.

mod initramfs;
mod kernels;
mod matrix;
mod systemd;
mod verifier;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{
    build,
    step::{self, Step, say},
    tally::Tally,
    workspace,
};
use kernels::{Expected, SERIES, Series};
use matrix::{Column, Matrix};

/// Emulation on a loaded machine.
const LIMIT: Duration = Duration::from_secs(600);
/// Claims that `init.sh` makes when all is well, and when it is to be quick.
const CLAIMS: usize = 63;
const QUICK_CLAIMS: usize = 50;

pub(crate) struct Options<'a> {
    pub(crate) series: Option<&'a str>,
    /// Fewer claims.
    pub(crate) quick: bool,
    /// Write down what the verifier needed.
    pub(crate) veristat: bool,
    pub(crate) json: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let series: Vec<_> = match options.series {
        Some(name) => vec![kernels::named(name)?],
        None => SERIES.iter().collect(),
    };
    build::all(false)?;
    let (matrix, verified) = boot_each(&series, options.quick)?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&matrix)?);
    } else {
        print!("{matrix}");
    }
    let mut tally = matrix.tally();
    tally.add(verifier::judge(&verified, options.veristat)?);
    eprintln!("{tally}");
    if tally.failed > 0 {
        bail!("{} failed", tally.failed);
    }
    Ok(())
}

/// One series with fewer claims, which is what the test command has time for;
/// skipped where the machine or the kernel cannot be had.
pub(crate) fn quick() -> Result<Tally> {
    const SERIES: &str = "6.12";
    let series = kernels::named(SERIES)?;
    if let Err(error) = initramfs::programs().and_then(|()| kernels::image(series)) {
        let mut tally = Tally::default();
        tally.skip(format!("kernel {SERIES} in a virtual machine: {error:#}"));
        return Ok(tally);
    }
    let (matrix, verified) = boot_each(&[series], true)?;
    print!("{matrix}");
    let mut tally = matrix.tally();
    tally.add(verifier::judge(&verified, false)?);
    Ok(tally)
}

/// Every series in full, then the package under systemd.
pub(crate) fn all() -> Result<Tally> {
    let (matrix, verified) = boot_each(&SERIES.iter().collect::<Vec<_>>(), false)?;
    print!("{matrix}");
    let mut tally = matrix.tally();
    tally.add(verifier::judge(&verified, false)?);
    match systemd::test() {
        Ok(more) => tally.add(more),
        Err(error) => {
            eprintln!("systemd: {error:#}");
            tally.count(false);
        }
    }
    Ok(tally)
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

fn boot_each(series: &[&Series], quick: bool) -> Result<(Matrix, verifier::Verified)> {
    let initrd = initramfs::build()?;
    let (mut matrix, mut verified) = (Matrix::default(), verifier::Verified::default());
    for series in series {
        // One kernel that does not boot must not hide what the others say.
        let since = Instant::now();
        let booted = kernels::image(series).and_then(|kernel| boot(series, &kernel, &initrd, quick));
        let (said, trouble) = match booted {
            Ok(said) => (said, None),
            Err(error) => (log_of(series.name).unwrap_or_default(), Some(format!("{error:#}"))),
        };
        let claims = if quick { QUICK_CLAIMS } else { CLAIMS };
        let mut column = Column::read(series.name, series.expected, claims, &said);
        column.trouble.extend(trouble);
        column.seconds = since.elapsed().as_secs();
        if column.tally().failed > 0 {
            say(format!("the whole log: {}", log(series.name).display()));
        }
        if series.expected == Expected::All {
            verified.read(series.name, &said);
        }
        matrix.kernels.push(column);
    }
    Ok((matrix, verified))
}

fn boot(series: &Series, kernel: &Path, initrd: &Path, quick: bool) -> Result<String> {
    let mut options = "console=ttyS0 panic=-1 reboot=t quiet lsm=lockdown,capability,landlock,bpf".to_owned();
    if quick {
        options.push_str(" vm_quick");
    }
    let mut machine = Command::new("qemu-system-x86_64");
    machine.args(["-M", "microvm,acpi=off", "-kernel"]).arg(kernel).arg("-initrd").arg(initrd);
    machine.args(["-append", &options]);
    until_off(series.name, &format!("kernel {} boots", series.name), &mut machine, LIMIT)
}

fn log(name: &str) -> PathBuf {
    workspace::target().join("vm").join(format!("{name}.log"))
}

fn log_of(name: &str) -> Result<String> {
    Ok(fs::read(log(name)).map(|text| String::from_utf8_lossy(&text).into_owned())?)
}

/// Runs a machine until it is off or asks to be started again; what it says
/// goes to a file and is returned.
fn until_off(name: &str, what: &str, machine: &mut Command, limit: Duration) -> Result<String> {
    let step = Step::start(what);
    let mut child = machine
        .args(["-accel", "tcg", "-cpu", "max", "-m", "1024", "-smp", "2", "-nographic", "-no-reboot"])
        .stdin(Stdio::null())
        .stdout(fs::File::create(log(name))?)
        .stderr(Stdio::inherit())
        .spawn()
        .context("cannot start qemu-system-x86_64")?;
    let end = Instant::now() + limit;
    while child.try_wait()?.is_none() {
        if Instant::now() > end {
            child.kill()?;
            child.wait()?;
            step.failed();
            bail!("no end within {}; see {}", step::seconds(limit), log(name).display());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    step.done();
    log_of(name)
}
