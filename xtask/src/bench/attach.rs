//! Puts a setting in force on a cgroup; dropping it takes it away.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use aya::{
    Ebpf,
    maps::lpm_trie::{Key, LpmTrie},
    programs::{CgroupAttachMode, CgroupSkbAttachType, Program},
};

use super::{Setting, cgroup2, sensor::Sensor};
use crate::build;

/// Kernel objects of the settings that are not the sensor.
pub(crate) struct Objects {
    empty: Vec<u8>,
    address_filter: Vec<u8>,
}

impl Objects {
    pub(crate) fn build() -> Result<Self> {
        Ok(Self {
            empty: build::kernel_program("empty")?,
            address_filter: build::kernel_program("address_filter")?,
        })
    }
}

pub(crate) enum Attached {
    Nothing,
    Programs { _ebpf: Box<Ebpf> },
    Nftables,
    Sensor { sensor: Sensor, labelled: bool },
}

impl Attached {
    pub(crate) fn new(setting: Setting, cgroup: &Path, objects: &Objects) -> Result<Self> {
        Ok(match setting {
            Setting::Nothing => Self::Nothing,
            Setting::Empty => Self::Programs { _ebpf: Box::new(programs(&objects.empty, cgroup)?) },
            Setting::AddressFilter => {
                let mut ebpf = programs(&objects.address_filter, cgroup)?;
                addresses(&mut ebpf)?;
                Self::Programs { _ebpf: Box::new(ebpf) }
            }
            Setting::Nftables => {
                rule_set(cgroup)?;
                Self::Nftables
            }
            Setting::Unlabelled => Self::Sensor { sensor: Sensor::start(cgroup)?, labelled: false },
            Setting::Labelled => Self::Sensor { sensor: Sensor::start(cgroup)?, labelled: true },
        })
    }

    /// A command that runs `program` under this setting.
    pub(crate) fn launch(&self, program: &Path) -> Command {
        match self {
            Self::Sensor { sensor, labelled: true } => sensor.launch(program),
            _ => Command::new(program),
        }
    }

    /// How long the sensor took from its start to `ready`.
    pub(crate) fn start_seconds(&self) -> Option<f64> {
        match self {
            Self::Sensor { sensor, .. } => Some(sensor.start.as_secs_f64()),
            _ => None,
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if matches!(self, Self::Nftables)
            && let Err(error) = nft("flush ruleset\n", None)
        {
            eprintln!("nft: {error:#}");
        }
    }
}

/// Loads every program of an object and attaches it where its section says.
fn programs(object: &[u8], cgroup: &Path) -> Result<Ebpf> {
    let mut ebpf = Ebpf::load(object)?;
    let mode = CgroupAttachMode::Single;
    for (name, program) in ebpf.programs_mut() {
        let name = name.to_owned();
        let dir = File::open(cgroup)?;
        let attach = || -> Result<()> {
            match program {
                Program::CgroupSock(p) => {
                    p.load()?;
                    p.attach(dir, mode)?;
                }
                Program::CgroupSockAddr(p) => {
                    p.load()?;
                    p.attach(dir, mode)?;
                }
                Program::CgroupSockopt(p) => {
                    p.load()?;
                    p.attach(dir, mode)?;
                }
                Program::CgroupSkb(p) => {
                    p.load()?;
                    let side = p.expected_attach_type().unwrap_or(CgroupSkbAttachType::Egress);
                    p.attach(dir, side, mode)?;
                }
                Program::RawTracePoint(p) => {
                    p.load()?;
                    let tracepoint = match name.as_str() {
                        "empty_fork" => "sched_process_fork",
                        "empty_exec" => "sched_process_exec",
                        "empty_exit" => "sched_process_exit",
                        other => bail!("no tracepoint is known for {other}"),
                    };
                    p.attach(tracepoint)?;
                }
                _ => bail!("a program type that the benchmark does not use"),
            }
            Ok(())
        };
        attach().with_context(|| format!("program {name}"))?;
    }
    Ok(ebpf)
}

/// `IPAddressAllow=localhost`, `IPAddressDeny=any`, as systemd spells them out.
fn addresses(ebpf: &mut Ebpf) -> Result<()> {
    let mut put4 = |map: &str, bits, net: [u8; 4]| -> Result<()> {
        let mut trie: LpmTrie<_, [u8; 4], u8> = LpmTrie::try_from(ebpf.map_mut(map).context("map")?)?;
        Ok(trie.insert(&Key::new(bits, net), 1, 0)?)
    };
    put4("ALLOW4", 8, [127, 0, 0, 0])?;
    put4("DENY4", 0, [0; 4])?;
    let mut put6 = |map: &str, bits, net: [u8; 16]| -> Result<()> {
        let mut trie: LpmTrie<_, [u8; 16], u8> = LpmTrie::try_from(ebpf.map_mut(map).context("map")?)?;
        Ok(trie.insert(&Key::new(bits, net), 1, 0)?)
    };
    put6("ALLOW6", 128, std::net::Ipv6Addr::LOCALHOST.octets())?;
    put6("DENY6", 0, [0; 16])
}

/// Packets of the cgroup to anywhere but loopback are dropped, which is what a
/// fleet writes for a unit today.
fn rule_set(cgroup: &Path) -> Result<()> {
    let below = cgroup.strip_prefix(cgroup2()?)?.display().to_string();
    let level = below.split('/').count();
    let hit = format!("socket cgroupv2 level {level} \"{below}\"");
    let rules = format!(
        "table inet bench {{\n\
         set allowed4 {{ type ipv4_addr; flags interval; elements = {{ 127.0.0.0/8 }} }}\n\
         set allowed6 {{ type ipv6_addr; flags interval; elements = {{ ::1 }} }}\n\
         chain out {{ type filter hook output priority 0; policy accept;\n\
         {hit} ip daddr != @allowed4 drop\n{hit} ip6 daddr != @allowed6 drop\n}}\n\
         chain in {{ type filter hook input priority 0; policy accept;\n\
         {hit} ip saddr != @allowed4 drop\n{hit} ip6 saddr != @allowed6 drop\n}}\n}}\n"
    );
    nft(&rules, Some(cgroup))
}

/// nft looks the cgroup up below /sys/fs/cgroup; on a hybrid host it is not
/// there, so the mount is moved for nft alone.
fn nft(rules: &str, cgroup: Option<&Path>) -> Result<()> {
    let mount = cgroup2()?;
    let mut command = if cgroup.is_some() && mount != Path::new("/sys/fs/cgroup") {
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c", "mount --bind \"$0\" /sys/fs/cgroup && exec nft -f -"])
            .arg(&mount);
        command
    } else {
        let mut command = Command::new("nft");
        command.args(["-f", "-"]);
        command
    };
    let mut child =
        command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().context("cannot start nft")?;
    child.stdin.take().context("no pipe")?.write_all(rules.as_bytes())?;
    let out = child.wait_with_output()?;
    if !out.status.success() {
        bail!("nft refused\n{rules}\n{}", String::from_utf8_lossy(&out.stderr));
    }
    Ok(())
}

/// Text of a file that may not be there.
pub(crate) fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}
