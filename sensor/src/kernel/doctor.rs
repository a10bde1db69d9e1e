//! What this host can enforce: each prerequisite, then each hook, tried for
//! real in a cgroup of its own that no process is in.

use super::capture::{Capture, CaptureError};
use super::load::{self, HookState, LoadError, Options};
use super::pins::{self, Pins};
use super::{OBJECT, btf, cgroup};
use crate::event::pb::HookStatus;
use std::collections::HashMap;
use std::fs;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

/// One prerequisite, or one hook.
#[derive(Clone, Debug)]
pub struct Check {
    pub name: String,
    /// `Attached`: works.
    pub status: HookStatus,
    /// The sensor does not start without it (but for `--allow-degraded`).
    pub required: bool,
    /// What was found, and why it is so.
    pub detail: String,
    /// What to do about it; empty if nothing.
    pub fix: String,
}

/// A prerequisite: what is there, or what is missing and what to do.
type Found = Result<String, (String, &'static str)>;

fn check(name: &str, required: bool, found: Found) -> Check {
    let (status, detail, fix) = match found {
        Ok(detail) => (HookStatus::Attached, detail, ""),
        Err((detail, fix)) => (HookStatus::NotEnforced, detail, fix),
    };
    Check { name: name.to_owned(), status, required, detail, fix: fix.to_owned() }
}

/// Tries everything. Hooks are tried below `root` (default: the root of cgroup
/// v2) and taken out again.
pub fn report(root: Option<&Path>) -> anyhow::Result<Vec<Check>> {
    let mount = match root {
        Some(path) => Ok(path.to_owned()),
        None => cgroup::root().map_err(|e| e.to_string()),
    };
    let mut checks = vec![
        check("kernel", true, kernel()),
        check("kernel programs in this binary", true, object()),
        check("capabilities", true, capabilities()),
        check("pid namespace", false, pid_namespace()),
        check("BTF", true, btf_offsets()),
        check("cgroup v2", true, cgroup_at(&mount)),
        check("bpffs", true, bpffs()),
        check("rules by name", false, name_rules()),
        name_service(
            &fs::read_to_string("/etc/nsswitch.conf").unwrap_or_default(),
            NSCD.iter().any(|path| Path::new(path).exists()),
        ),
    ];
    if let Ok(path) = &mount {
        checks.push(check("programs of others that rewrite addresses", false, rewriters(path)));
    }
    match mount {
        Ok(path) if checks.iter().all(|c| !c.required || c.status == HookStatus::Attached) => {
            checks.extend(hooks(&path));
        }
        _ => checks.push(check(
            "hooks",
            true,
            Err(("not tried: something required is missing".to_owned(), "see the checks above")),
        )),
    }
    Ok(checks)
}

fn kernel() -> Found {
    let uname = nix::sys::utsname::uname().map_err(|e| (e.desc().to_owned(), ""))?;
    Ok(uname.release().to_string_lossy().into_owned())
}

fn object() -> Found {
    if OBJECT.is_empty() {
        return Err(("none".to_owned(), "build it with `cargo xtask build`"));
    }
    Ok(format!("{} bytes", OBJECT.len()))
}

/// CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF (linux/capability.h).
const NEEDED: [(u32, &str); 3] = [(12, "CAP_NET_ADMIN"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];
/// Stands for all of them on kernels before 5.8.
const SYS_ADMIN: u32 = 21;

fn capabilities() -> Found {
    let status = procfs::process::Process::myself().and_then(|p| p.status());
    let effective = status.map_err(|e| (e.to_string(), "mount /proc"))?.capeff;
    let has = |bit: u32| effective & 1 << bit != 0;
    let missing: Vec<&str> =
        NEEDED.iter().filter(|(bit, _)| !has(*bit) && !has(SYS_ADMIN)).map(|(_, name)| *name).collect();
    if missing.is_empty() {
        return Ok("all that are needed".to_owned());
    }
    Err((format!("missing: {}", missing.join(", ")), "run it as root, or grant them to the service"))
}

/// In another pid namespace the process ids of events mean nothing.
fn pid_namespace() -> Found {
    let own = fs::metadata("/proc/self/ns/pid").map(|m| std::os::unix::fs::MetadataExt::ino(&m));
    // The initial namespace has a fixed inode (PROC_PID_INIT_INO, linux/proc_ns.h).
    const INITIAL: u64 = 0xEFFF_FFFC;
    match own {
        Ok(INITIAL) => Ok("the host's".to_owned()),
        Ok(_) => Err(("not the host's".to_owned(), "run the container with hostPID (--pid=host)")),
        Err(e) => Err((e.to_string(), "mount /proc")),
    }
}

fn btf_offsets() -> Found {
    let needs = "use a kernel with CONFIG_DEBUG_INFO_BTF";
    btf::offsets().map(|_| "/sys/kernel/btf/vmlinux".to_owned()).map_err(|e| (e.to_string(), needs))
}

fn cgroup_at(mount: &Result<PathBuf, String>) -> Found {
    match mount {
        Ok(path) if path.join("cgroup.procs").exists() => Ok(path.display().to_string()),
        Ok(path) => Err((format!("{} is no cgroup", path.display()), "give a cgroup v2 with --cgroup")),
        Err(error) => Err((error.clone(), "mount -t cgroup2 none /sys/fs/cgroup/unified")),
    }
}

fn bpffs() -> Found {
    let fix = "mount -t bpf bpf /sys/fs/bpf";
    load::ensure_bpffs().map(|()| load::BPFFS.to_owned()).map_err(|e| (e.to_string(), fix))
}

/// DNS messages are walked record by record, which the verifier accepts through
/// bpf_loop() only.
fn name_rules() -> Found {
    use aya::programs::ProgramType;
    use aya_obj::generated::bpf_func_id::BPF_FUNC_loop;
    match aya::sys::is_helper_supported(ProgramType::CgroupSkb, BPF_FUNC_loop) {
        Ok(true) => Ok("can be enforced".to_owned()),
        Ok(false) => Err((
            "cannot be enforced: this kernel has no bpf_loop()".to_owned(),
            "use Linux 5.17 or later; rules by address are enforced here",
        )),
        Err(error) => Err((format!("cannot be tried: {error}"), "run as root")),
    }
}

/// Where nscd listens; in [`sensor_common::unix::POWER_SOCKETS`] with the socket
/// of nss-resolve, below /run/systemd.
const NSCD: [&str; 2] = ["/run/nscd/socket", "/var/run/nscd/socket"];

/// Programs that look names up over a unix socket ask no resolver themselves, so
/// that nothing is learned from the answer.
fn name_service(nsswitch: &str, nscd: bool) -> Check {
    let mut services = Vec::new();
    if names_resolve(nsswitch) {
        services.push("nss-resolve (`hosts:` in /etc/nsswitch.conf)");
    }
    if nscd {
        services.push("nscd");
    }
    let mut check =
        check("names over unix sockets", false, Ok("none: programs ask DNS themselves".to_owned()));
    if !services.is_empty() {
        check.status = HookStatus::Fallback;
        check.detail = format!(
            "{}: names looked up that way are not learned. Labelled servers are denied these sockets by default, \
             where the unix hooks attach, and glibc then falls back to DNS",
            services.join(" and ")
        );
        check.fix = "leave these sockets out of `unix:` rules of servers that rules by name hold".to_owned();
    }
    check
}

/// Whether `hosts:` has the service `resolve` (nsswitch.conf(5)).
fn names_resolve(nsswitch: &str) -> bool {
    nsswitch
        .lines()
        .filter_map(|line| line.split('#').next()?.trim_start().strip_prefix("hosts:"))
        .any(|services| services.split_ascii_whitespace().any(|s| s == "resolve"))
}

/// Programs of others on the hooks that may change an address after it was
/// judged (linux/bpf.h): every one of them must allow, and packets are judged
/// again, but a destination that one of them rewrites is approved as it was
/// before.
const REWRITING: [(&str, u32); 6] =
    [("connect4", 10), ("connect6", 11), ("sendmsg4", 14), ("sendmsg6", 15), ("bind4", 8), ("bind6", 9)];

fn rewriters(cgroup: &Path) -> Found {
    let root = fs::File::open(cgroup).map_err(|e| (e.to_string(), "run as root"))?;
    let names: HashMap<u32, String> = aya::programs::loaded_programs()
        .flatten()
        .map(|p| (p.id(), p.name_as_str().unwrap_or("?").to_owned()))
        .collect();
    let mut others = Vec::new();
    for (hook, attach_type) in REWRITING {
        let ids = super::sys::attached(root.as_fd(), attach_type)
            .map_err(|e| (format!("cannot be asked for: {e}"), "run as root"))?;
        for id in ids {
            let name = names.get(&id).map_or("?", String::as_str);
            if name != hook {
                others.push(format!("{name} (id {id}, {hook})"));
            }
        }
    }
    if others.is_empty() {
        return Ok(format!("none at {}", cgroup.display()));
    }
    let fix = "see that what they rewrite to is meant; `bpftool prog show id ID` tells whose they are";
    Err((others.join(", "), fix))
}

/// A cgroup without processes; removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(root: &Path) -> std::io::Result<Scratch> {
        let path = root.join(format!("mcp-sensor-doctor-{}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "a cgroup stays behind");
        }
    }
}

fn hooks(root: &Path) -> Vec<Check> {
    let scratch = match Scratch::new(root) {
        Ok(scratch) => scratch,
        Err(error) => {
            let why =
                (format!("no cgroup can be made below {}: {error}", root.display()), "make it writable");
            return vec![check("hooks", true, Err(why))];
        }
    };
    let pins = match Pins::take(&pins::all().join(format!("doctor_{}", std::process::id()))) {
        Ok(pins) => pins,
        Err(error) => return vec![check("hooks", true, Err((error.to_string(), "run as root")))],
    };
    let root = pins.root().to_owned();
    let options = Options {
        cgroup: scratch.0.clone(),
        pins,
        label_capacity: 1024,
        allow_degraded: true,
        capture: None,
        stdio_ring: 1 << 20,
    };
    let loaded = load::load(options);
    let checks = match &loaded {
        Ok(loaded) => loaded.hooks.iter().map(hook).chain([stdio(&loaded.capture)]).collect(),
        Err(error) => vec![check("hooks", true, Err((error.to_string(), fix_of(error))))],
    };
    let removed = match loaded {
        Ok(loaded) => loaded.attached.release(),
        // It may have failed half way.
        Err(_) => Pins::take(&root).and_then(Pins::release).map(drop),
    };
    if let Err(error) = removed {
        tracing::warn!(path = %root.display(), %error, "pins stay behind");
    }
    checks
}

fn hook(hook: &load::Hook) -> Check {
    let (status, detail) = match &hook.state {
        HookState::Attached => (HookStatus::Attached, String::new()),
        HookState::Failed(reason) => (HookStatus::NotEnforced, format!("{}: {reason}", hook.without)),
    };
    let name = format!("hook {}", hook.name);
    Check { name, status, required: hook.core, detail, fix: String::new() }
}

/// Which back end reads what servers say, and what it does not see.
fn stdio(capture: &Result<Capture, CaptureError>) -> Check {
    let found = match capture {
        Ok(capture) => Ok(format!("by the {} back end", capture.backend)),
        Err(error) => Err((format!("what servers say is not seen: {error}"), "")),
    };
    let mut check = check("stdio", false, found);
    if let Ok(capture) = capture
        && !capture.notes.is_empty()
    {
        check.detail = format!("{} ({})", check.detail, capture.notes.join("; "));
    }
    check
}

fn fix_of(error: &LoadError) -> &'static str {
    match error {
        LoadError::NoObject => "build it with `cargo xtask build`",
        LoadError::Btf(_) => "use a kernel with CONFIG_DEBUG_INFO_BTF",
        LoadError::Load(_) | LoadError::Maps(_) => "report it with the kernel's version",
        LoadError::Cgroup { .. } => "give a cgroup v2 with --cgroup",
        LoadError::Bpffs { .. } | LoadError::Pins(_) => "mount -t bpf bpf /sys/fs/bpf",
        LoadError::Carry(_) => "mcp-sensor release",
        LoadError::Hook { .. } => "run it as root",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_looked_up_over_unix_sockets_are_told() {
        let resolve = "passwd: files\nhosts:  mymachines resolve [!UNAVAIL=return] files dns # x\n";
        let plain = "# hosts: resolve\nhosts: files dns # resolve\nnetworks: resolve\n";
        let quiet = name_service(plain, false);
        assert_eq!((quiet.status, quiet.fix.as_str()), (HookStatus::Attached, ""));
        let told = name_service(resolve, true);
        assert_eq!((told.status, told.required), (HookStatus::Fallback, false));
        assert!(told.detail.contains("nss-resolve") && told.detail.contains("nscd"), "{}", told.detail);
        assert!(!name_service(plain, true).detail.contains("nss-resolve"));
        assert!(!name_service("", false).detail.contains("nscd"));
    }

    #[test]
    fn the_sockets_of_name_services_are_denied_by_default() {
        let denied = |socket: &str| {
            sensor_common::unix::POWER_SOCKETS.iter().any(|listed| match listed.strip_suffix('*') {
                Some(prefix) => socket.starts_with(prefix),
                None => socket == *listed,
            })
        };
        for socket in NSCD.iter().chain(&["/run/systemd/resolve/io.systemd.Resolve"]) {
            assert!(denied(socket), "{socket}");
        }
    }

    #[test]
    fn a_missing_prerequisite_is_required_and_says_what_to_do() {
        let missing = check("x", true, Err(("not there".to_owned(), "mount it")));
        assert_eq!((missing.status, missing.fix.as_str()), (HookStatus::NotEnforced, "mount it"));
        let found = cgroup_at(&Ok(PathBuf::from("/proc")));
        assert!(found.unwrap_err().0.contains("no cgroup"));
    }
}
