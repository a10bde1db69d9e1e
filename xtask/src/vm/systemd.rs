//! The Debian package under a systemd that is the first process: installed,
//! reloaded, hung, rebooted, upgraded, removed, with a server held to nothing.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};

use super::{
    initramfs,
    kernels::{self, Expected},
    matrix::{Column, Matrix},
    until_off,
};
use crate::{
    dist,
    step::{self, Step},
    tally::Tally,
    workspace,
};

const SERIES: &str = "6.12";
/// Emulation on a loaded machine; each boot.
const LIMIT: Duration = Duration::from_secs(900);
const SCRIPT: &str = include_str!("systemd.sh");

/// Finds the disk, since the kernel's driver for it is a module.
const INIT: &str = "\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
/bin/busybox insmod /virtio_blk.ko
until [ -b /dev/vda ]; do /bin/busybox sleep 0.1; done
/bin/busybox mount -t ext4 /dev/vda /disk
/bin/busybox umount /dev
exec /bin/busybox switch_root /disk /sbin/init
";

const UNITS: &[(&str, &str)] = &[
    (
        "listener.service",
        "[Service]\nExecStart=/usr/local/bin/busybox nc -ll -p 7001 -e cat\n[Install]\nWantedBy=multi-user.target\n",
    ),
    (
        "script.service",
        "[Unit]\nAfter=listener.service early.service\n[Service]\nExecStart=/usr/local/bin/script\n\
         StandardOutput=tty\nStandardError=tty\nTTYPath=/dev/ttyS0\n[Install]\nWantedBy=multi-user.target\n",
    ),
    // Enabled by the script: a server that starts with the system.
    (
        "early.service",
        "[Unit]\nAfter=listener.service\n[Service]\nType=oneshot\nExecStart=-/usr/local/bin/server tcp-connect --to 127.0.0.1 \
         --port 7001\nStandardOutput=truncate:/var/lib/early\n[Install]\nWantedBy=multi-user.target\n",
    ),
];

pub(super) fn test() -> Result<Tally> {
    initramfs::programs()?;
    initramfs::attempts()?;
    let (package, upgrade) = (dist::package()?, dist::root::upgrade()?);
    let kernel = kernels::image(kernels::named(SERIES)?)?;
    let (disk, initrd) = (disk(&package, &upgrade)?, initrd()?);
    let mut said = String::new();
    for boot in ["first", "second"] {
        let mut machine = Command::new("qemu-system-x86_64");
        machine
            .args(["-M", "q35", "-kernel"])
            .arg(&kernel)
            .arg("-initrd")
            .arg(&initrd)
            .arg("-drive")
            .arg(format!("file={},format=raw,if=virtio,cache=unsafe", disk.display()))
            .args([
                "-append",
                "console=ttyS0 panic=-1 quiet systemd.show_status=0 lsm=lockdown,capability,landlock,bpf",
            ]);
        said +=
            &until_off(&format!("systemd-{boot}"), &format!("systemd, {boot} boot"), &mut machine, LIMIT)?;
    }
    let _ = fs::remove_file(&disk);
    let column = Column::read("systemd", Expected::All, expected(), &said);
    let matrix = Matrix { kernels: vec![column] };
    print!("{matrix}");
    Ok(matrix.tally())
}

/// As many as the script makes, each once.
fn expected() -> usize {
    SCRIPT.lines().filter(|line| line.trim_start().starts_with("claim ")).count()
}

/// A clean Debian with the packages to install and the programs that try.
fn disk(package: &Path, upgrade: &Path) -> Result<PathBuf> {
    let root = dist::root::unpacked("systemd")?;
    let step = Step::start("a disk with systemd");
    let local = root.join("usr/local/bin");
    let attempt = workspace::target().join("release/attempt");
    let busybox = step::output(Command::new("sh").args(["-c", "command -v busybox"]))?;
    for (from, to) in [
        (package, root.join("var/tmp/package.deb")),
        (upgrade, root.join("var/tmp/upgrade.deb")),
        (&attempt, local.join("attempt")),
        (&attempt, local.join("server")),
        (Path::new(&busybox), local.join("busybox")),
    ] {
        fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    fs::write(local.join("script"), SCRIPT)?;
    fs::set_permissions(local.join("script"), fs::Permissions::from_mode(0o755))?;
    fs::write(root.join("etc/machine-id"), "0123456789abcdef0123456789abcdef\n")?;
    fs::write(root.join("etc/hostname"), "vm\n")?;
    let units = root.join("etc/systemd/system");
    let wanted = units.join("multi-user.target.wants");
    fs::create_dir_all(&wanted)?;
    for (name, unit) in UNITS {
        fs::write(units.join(name), unit)?;
        if *name != "early.service" {
            symlink(format!("../{name}"), wanted.join(name))?;
        }
    }
    for unused in
        ["serial-getty@ttyS0.service", "getty@tty1.service", "apt-daily.timer", "apt-daily-upgrade.timer"]
    {
        symlink("/dev/null", units.join(unused))?;
    }
    let disk = workspace::target().join("vm/systemd.ext4");
    let _ = fs::remove_file(&disk);
    step::output(Command::new("mkfs.ext4").args(["-q", "-d"]).arg(&root).arg(&disk).arg("1536M"))?;
    fs::remove_dir_all(&root)?;
    step.done();
    Ok(disk)
}

fn initrd() -> Result<PathBuf> {
    let vm = workspace::target().join("vm");
    let root = vm.join("systemd-root");
    let _ = fs::remove_dir_all(&root);
    for dir in ["bin", "dev", "disk"] {
        fs::create_dir_all(root.join(dir))?;
    }
    let busybox = step::output(Command::new("sh").args(["-c", "command -v busybox"]))?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    let find = "xz -dc \"$0\"/lib/modules/*/kernel/drivers/block/virtio_blk.ko.xz >\"$1\"";
    let module = root.join("virtio_blk.ko");
    step::output(Command::new("sh").args(["-c", find]).arg(vm.join(SERIES)).arg(module))?;
    fs::write(root.join("init"), INIT)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    let archive = vm.join("systemd-initrd.gz");
    let pack = "find . | cpio --quiet -o -H newc | gzip -1 > \"$0\"";
    step::output(Command::new("sh").args(["-c", pack]).arg(&archive).current_dir(&root))?;
    Ok(archive)
}
