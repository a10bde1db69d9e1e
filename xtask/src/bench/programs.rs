//! What each program of the sensor costs by the kernel's own count.

use std::{collections::BTreeSet, fs, os::fd::AsRawFd};

use anyhow::{Context, Result};
use aya::{
    programs::{ProgramInfo, loaded_programs},
    sys::{Stats, enable_stats},
};

pub(crate) struct Cost {
    pub(crate) name: String,
    /// Instructions that the verifier walked.
    pub(crate) verified: Option<u64>,
    pub(crate) runs: u64,
    pub(crate) nanoseconds: u64,
}

/// Runs the load with statistics on and reads every program that appeared.
/// `load` returns what keeps the programs in the kernel.
pub(crate) fn cost<T>(load: impl FnOnce() -> Result<T>) -> Result<Vec<Cost>> {
    let before: BTreeSet<u32> = loaded().map(|info| info.id()).collect();
    let _on = enable_stats(Stats::RunTime).context("cannot switch on program statistics")?;
    let kept = load()?;
    let mut costs = Vec::new();
    for info in loaded().filter(|info| !before.contains(&info.id())) {
        let fd = info.fd()?;
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd_number(&fd)))?;
        let field = |name: &str| {
            text.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                (key == name).then(|| value.trim().parse::<u64>().ok())?
            })
        };
        costs.push(Cost {
            name: info.name_as_str().unwrap_or("?").to_owned(),
            verified: field("verified_insns"),
            runs: field("run_cnt").unwrap_or(0),
            nanoseconds: field("run_time_ns").unwrap_or(0),
        });
    }
    drop(kept);
    costs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(costs)
}

fn fd_number(fd: &aya::programs::ProgramFd) -> i32 {
    use std::os::fd::AsFd;
    fd.as_fd().as_raw_fd()
}

/// A program that goes away while it is looked at is not an error.
fn loaded() -> impl Iterator<Item = ProgramInfo> {
    loaded_programs().filter_map(Result::ok)
}
