//! The last stage of deploy/container/Dockerfile, without a registry.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{dist::dir, setup, step, workspace};

/// An OCI archive (`docker load`, `podman load`, `ctr image import`).
pub(super) fn build(binary: &Path) -> Result<PathBuf> {
    if !setup::on_path("buildah") {
        setup::apt(&["buildah"])?;
    }
    let context = dir().join("image");
    let _ = fs::remove_dir_all(&context);
    let root = context.join("root-of-image");
    for (from, to) in [
        (binary, root.join("usr/bin/mcp-sensor")),
        (Path::new("/etc/ssl/certs/ca-certificates.crt"), root.join("etc/ssl/certs/ca-certificates.crt")),
    ] {
        fs::create_dir_all(to.parent().context("no directory")?)?;
        fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    let whole = fs::read_to_string(workspace::root().join("deploy/container/Dockerfile"))?;
    let last = whole.rfind("\nFROM ").context("the Dockerfile has no last stage")?;
    let stage = whole[last..].replace("--from=build /", "");
    fs::write(context.join("Dockerfile"), stage)?;
    let archive = dir().join("mcp-sensor-image.tar");
    let _ = fs::remove_file(&archive);
    let storage = dir().join("storage");
    let buildah = || {
        let mut command = Command::new("buildah");
        command.args(["--storage-driver", "vfs", "--root"]).arg(&storage);
        command.arg("--runroot").arg(storage.join("run"));
        command
    };
    let name = format!("mcp-sensor:{}", env!("CARGO_PKG_VERSION"));
    let mut bud = buildah();
    bud.args(["bud", "--isolation", "chroot", "--timestamp", "0", "--tag", &name]).arg(&context);
    step::run("image: buildah", &mut bud)?;
    step::output(buildah().args(["push", &name]).arg(format!("oci-archive:{}:{name}", archive.display())))?;
    fs::remove_dir_all(&storage)?;
    fs::remove_dir_all(&context)?;
    Ok(archive)
}
