//! bpftrace with the script that everybody writes: programs and connections,
//! printed.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{cpu_seconds, each_line};
use crate::setup;

pub(super) struct Bpftrace {
    child: Child,
    dir: PathBuf,
    before: f64,
}

impl Bpftrace {
    pub(super) fn start(dir: &Path, cgroup: &Path) -> Result<Bpftrace> {
        if !setup::on_path("bpftrace") {
            setup::apt(&["bpftrace"])?;
        }
        let script = dir.join("script.bt");
        fs::write(&script, program(cgroup))?;
        // Its tracefs is where older versions look for it; mounted for it alone.
        let child = Command::new("unshare")
            .args(["-m", "sh", "-c"])
            .arg(
                "mount -t debugfs none /sys/kernel/debug; mount -t tracefs none /sys/kernel/tracing; \
                 exec bpftrace \"$0\"",
            )
            .arg(&script)
            .stdin(Stdio::null())
            .stdout(File::create(dir.join("out"))?)
            .stderr(File::create(dir.join("err"))?)
            .spawn()
            .context("cannot start bpftrace")?;
        let mut this = Bpftrace { child, dir: dir.to_owned(), before: 0.0 };
        let end = Instant::now() + Duration::from_secs(30);
        while !fs::read_to_string(dir.join("out"))?.contains("attached") {
            if this.child.try_wait()?.is_some() || Instant::now() > end {
                bail!("it does not attach: {}", fs::read_to_string(dir.join("err"))?.trim());
            }
            thread::sleep(Duration::from_millis(50));
        }
        this.before = cpu_seconds(this.pid())?;
        Ok(this)
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// Lines, those that it says it lost, CPU seconds.
    pub(super) fn end(mut self) -> Result<(u64, u64, f64)> {
        let cpu = cpu_seconds(self.pid())? - self.before;
        // What it has is printed at its end.
        kill(self.pid(), Signal::SIGINT)?;
        self.child.wait()?;
        let (mut found, mut lost) = (0, 0);
        each_line(&self.dir.join("out"), |line| {
            found += u64::from(line.starts_with("exec ") || line.starts_with("connect "));
        })?;
        for file in ["out", "err"] {
            each_line(&self.dir.join(file), |line| {
                let count = line.strip_prefix("Lost ").and_then(|rest| rest.split(' ').next()?.parse().ok());
                lost += count.unwrap_or(0);
            })?;
        }
        Ok((found, lost, cpu))
    }
}

impl Drop for Bpftrace {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn program(cgroup: &Path) -> String {
    let ours = format!("/cgroup == cgroupid(\"{}\")/", cgroup.display());
    format!(
        "BEGIN {{ printf(\"attached\\n\"); }}\n\
         tracepoint:syscalls:sys_enter_execve {ours}\n\
         {{ printf(\"exec %d %d %s %s\\n\", pid, uid, comm, str(args->filename)); }}\n\
         tracepoint:syscalls:sys_enter_connect {ours}\n\
         {{ $to = (struct sockaddr_in *)args->uservaddr; \
         printf(\"connect %d %d %s %s %d\\n\", pid, uid, comm, ntop($to->sin_addr.s_addr), $to->sin_port); }}\n"
    )
}
