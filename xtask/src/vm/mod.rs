//! Stock kernels in virtual machines: boots each with the sensor in an
//! initramfs, lets it say what works, holds it to a policy and counts claims.
//!
//! No KVM is needed; emulated, a boot takes between seconds and minutes.

mod initramfs;
mod kernels;
mod matrix;
mod verifier;

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
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
    let series: Vec<_> =
        SERIES.iter().filter(|series| options.series.is_none_or(|only| series.name == only)).collect();
    if series.is_empty() {
        let names: Vec<_> = SERIES.iter().map(|series| series.name).collect();
        bail!("no kernel series `{}`; there are: {}", options.series.unwrap_or_default(), names.join(", "));
    }
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

/// Every series in full.
pub(crate) fn all() -> Result<Tally> {
    let (matrix, verified) = boot_each(&SERIES.iter().collect::<Vec<_>>(), false)?;
    print!("{matrix}");
    let mut tally = matrix.tally();
    tally.add(verifier::judge(&verified, false)?);
    Ok(tally)
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
            Err(error) => (log_of(series).unwrap_or_default(), Some(format!("{error:#}"))),
        };
        let claims = if quick { QUICK_CLAIMS } else { CLAIMS };
        let mut column = Column::read(series.name, series.expected, claims, &said);
        column.trouble.extend(trouble);
        column.seconds = since.elapsed().as_secs();
        if column.tally().failed > 0 {
            say(format!("the whole log: {}", log(series).display()));
        }
        if series.expected == Expected::All {
            verified.read(series.name, &said);
        }
        matrix.kernels.push(column);
    }
    Ok((matrix, verified))
}

fn log(series: &Series) -> std::path::PathBuf {
    workspace::target().join("vm").join(format!("{}.log", series.name))
}

fn log_of(series: &Series) -> Result<String> {
    Ok(fs::read(log(series)).map(|text| String::from_utf8_lossy(&text).into_owned())?)
}

fn boot(series: &Series, kernel: &Path, initrd: &Path, quick: bool) -> Result<String> {
    let step = Step::start(format!("kernel {} boots", series.name));
    let mut options = "console=ttyS0 panic=-1 reboot=t quiet lsm=lockdown,capability,landlock,bpf".to_owned();
    if quick {
        options.push_str(" vm_quick");
    }
    let mut child = Command::new("qemu-system-x86_64")
        .args(["-M", "microvm,acpi=off", "-accel", "tcg", "-cpu", "max", "-m", "1024", "-smp", "2"])
        .args(["-nographic", "-no-reboot", "-kernel"])
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", &options])
        .stdin(Stdio::null())
        .stdout(fs::File::create(log(series))?)
        .stderr(Stdio::inherit())
        .spawn()
        .context("cannot start qemu-system-x86_64")?;
    match ended(&mut child) {
        Ok(true) => step.done(),
        Ok(false) => {
            step.failed();
            bail!("no end within {}; see {}", step::seconds(LIMIT), log(series).display());
        }
        Err(error) => return Err(error),
    }
    log_of(series)
}

/// False: it hung, and was ended.
fn ended(child: &mut Child) -> Result<bool> {
    let end = Instant::now() + LIMIT;
    while child.try_wait()?.is_none() {
        if Instant::now() > end {
            child.kill()?;
            child.wait()?;
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(true)
}
