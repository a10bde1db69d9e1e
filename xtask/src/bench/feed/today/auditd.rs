//! auditd with the rules that everybody has for programs and connections, and its
//! plug-in that hands records to syslog.

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
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

use super::{LOGIN_UID, cpu_seconds, each_line, tree_cpu_seconds};
use crate::{setup, step};

const BACKLOG: u64 = 8192;
const DEV_LOG: &str = "/dev/log";
const EXECVE: &str = " syscall=59 ";
const CONNECT: &str = " syscall=42 ";

pub(super) struct Auditd {
    dir: PathBuf,
    auditd: Child,
    rsyslogd: Child,
    kauditd: Pid,
    /// CPU seconds and lost records before the load.
    before: (f64, u64),
    // Last: the kernel's rules go when everything else is gone.
    _rules: Rules,
}

impl Auditd {
    pub(super) fn start(dir: &Path) -> Result<Auditd> {
        if cfg!(not(target_arch = "x86_64")) {
            bail!("the numbers of its system calls are known for x86-64 only");
        }
        for (program, package) in
            [("auditd", "auditd"), ("audisp-syslog", "audispd-plugins"), ("rsyslogd", "rsyslog")]
        {
            if !Path::new("/sbin").join(program).exists() && !setup::on_path(program) {
                setup::apt_without_service(&[package])?;
            }
        }
        if Path::new(DEV_LOG).exists() {
            bail!("{DEV_LOG} belongs to a syslog daemon of this host");
        }
        fs::create_dir_all(dir.join("plugins"))?;
        fs::write(dir.join("auditd.conf"), configuration(dir))?;
        fs::write(
            dir.join("plugins/syslog.conf"),
            "active = yes\ndirection = out\npath = /sbin/audisp-syslog\ntype = always\nargs = LOG_INFO\nformat = string\n",
        )?;
        let rsyslog = dir.join("rsyslog.conf");
        fs::write(&rsyslog, syslog(dir))?;
        let rsyslogd = Command::new("rsyslogd")
            .args(["-n", "-f"])
            .arg(&rsyslog)
            .arg("-i")
            .arg(dir.join("rsyslogd.pid"))
            .stdin(Stdio::null())
            .stderr(File::create(dir.join("rsyslogd.said"))?)
            .spawn()
            .context("cannot start rsyslogd")?;
        let rsyslogd = Killed(Some(rsyslogd));
        wait_for("rsyslogd", || dir.join("log.sock").exists())?;
        let rules = Rules::take(dir)?;
        let auditd = Command::new("auditd")
            .args(["-n", "-c"])
            .arg(dir)
            .stdin(Stdio::null())
            .stdout(File::create(dir.join("auditd.said"))?)
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start auditd")?;
        let auditd = Killed(Some(auditd));
        let pid = auditd.id();
        wait_for("auditd", || status("pid").is_ok_and(|there| there == u64::from(pid)))
            .with_context(|| fs::read_to_string(dir.join("auditd.said")).unwrap_or_default())?;
        rules.set()?;
        let mut this = Auditd {
            dir: dir.to_owned(),
            auditd: auditd.keep()?,
            rsyslogd: rsyslogd.keep()?,
            kauditd: kauditd()?,
            before: (0.0, 0),
            _rules: rules,
        };
        this.before = (this.cpu()?, status("lost")?);
        Ok(this)
    }

    fn cpu(&self) -> Result<f64> {
        let of = |child: &Child| tree_cpu_seconds(Pid::from_raw(child.id() as i32));
        Ok(of(&self.auditd)? + of(&self.rsyslogd)? + cpu_seconds(self.kauditd)?)
    }

    /// Events found in syslog's file, those that the kernel says it lost, CPU
    /// seconds.
    pub(super) fn end(self) -> Result<(u64, u64, f64)> {
        let (cpu, lost) = (self.cpu()? - self.before.0, status("lost")?.saturating_sub(self.before.1));
        let (mut found, login) = (0, format!(" auid={LOGIN_UID} "));
        each_line(&self.dir.join("syslog"), |line| {
            let call = line.contains(EXECVE) || line.contains(CONNECT);
            found += u64::from(call && line.contains("type=SYSCALL") && line.contains(&login));
        })?;
        Ok((found, lost, cpu))
    }
}

impl Drop for Auditd {
    fn drop(&mut self) {
        for child in [&mut self.auditd, &mut self.rsyslogd] {
            let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
            let _ = child.wait();
        }
    }
}

/// Ended unless it is kept.
struct Killed(Option<Child>);

impl Killed {
    fn id(&self) -> u32 {
        self.0.as_ref().map_or(0, Child::id)
    }

    fn keep(mut self) -> Result<Child> {
        self.0.take().context("it is gone")
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The kernel's audit rules and /dev/log while they are ours.
struct Rules;

impl Rules {
    /// Only where nobody else uses them.
    fn take(dir: &Path) -> Result<Rules> {
        if status("pid")? != 0 {
            bail!("an audit daemon of this host holds the kernel's audit socket");
        }
        let there = auditctl(&["-l"])?;
        if there != "No rules" && there != NEVER {
            bail!("this host has audit rules of its own");
        }
        symlink(dir.join("log.sock"), DEV_LOG).with_context(|| format!("cannot make {DEV_LOG}"))?;
        Ok(Rules)
    }

    fn set(&self) -> Result<()> {
        auditctl(&["-D"])?;
        auditctl(&["-b", &BACKLOG.to_string()])?;
        let login = format!("auid={LOGIN_UID}");
        auditctl(&["-a", "always,exit", "-F", "arch=b64", "-S", "execve", "-S", "connect", "-F", &login])?;
        Ok(())
    }
}

/// Once auditing was on, every new task pays for it until a rule says that none
/// is audited.
const NEVER: &str = "-a never,task";

impl Drop for Rules {
    fn drop(&mut self) {
        let _ = fs::remove_file(DEV_LOG);
        for arguments in [&["-D"][..], &["-a", "never,task"], &["-e", "0"]] {
            if let Err(error) = auditctl(arguments) {
                eprintln!("audit rules stay as they are: {error:#}");
            }
        }
    }
}

fn auditctl(arguments: &[&str]) -> Result<String> {
    step::output(Command::new("/sbin/auditctl").args(arguments))
}

fn status(key: &str) -> Result<u64> {
    let said = auditctl(&["-s"])?;
    let line = said.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    line.and_then(|value| value.trim().parse().ok())
        .with_context(|| format!("auditctl says no {key}: {said}"))
}

fn wait_for(what: &str, mut there: impl FnMut() -> bool) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    while !there() {
        if Instant::now() > end {
            bail!("{what} does not start");
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The kernel thread that hands records on.
fn kauditd() -> Result<Pid> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let is_it = fs::read_to_string(entry.path().join("comm")).is_ok_and(|name| name.trim() == "kauditd");
        if let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()).filter(|_| is_it) {
            return Ok(Pid::from_raw(pid));
        }
    }
    bail!("no kauditd: this kernel has no audit")
}

/// As Debian has it, but for where things are, and for disks that are full.
fn configuration(dir: &Path) -> String {
    format!(
        "local_events = yes\nwrite_logs = yes\nlog_file = {0}/audit.log\nlog_format = ENRICHED\n\
         flush = INCREMENTAL_ASYNC\nfreq = 50\nmax_log_file = 64\nnum_logs = 5\nmax_log_file_action = ROTATE\n\
         space_left = 2\nspace_left_action = IGNORE\nadmin_space_left = 1\nadmin_space_left_action = IGNORE\n\
         disk_full_action = IGNORE\ndisk_error_action = IGNORE\nq_depth = 2000\noverflow_action = SYSLOG\n\
         plugin_dir = {0}/plugins\n",
        dir.display()
    )
}

fn syslog(dir: &Path) -> String {
    format!(
        "module(load=\"imuxsock\" SysSock.Use=\"off\")\ninput(type=\"imuxsock\" Socket=\"{0}/log.sock\")\n\
         action(type=\"omfile\" file=\"{0}/syslog\")\n",
        dir.display()
    )
}
