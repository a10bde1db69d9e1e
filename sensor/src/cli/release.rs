//! `mcp-sensor release`.

use super::{Exit, Failure, Output, ReleaseArgs, output};
use crate::agent::pin_directory;
use crate::kernel::pins::{self, Pins, PinsError, Released};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

pub(super) fn run(args: &ReleaseArgs) -> anyhow::Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Failure::new(Exit::Refused, "only root may let go of what is enforced").into());
    }
    let root = args.pins.clone().unwrap_or_else(|| pin_directory(&args.state_dir));
    let others = if root.exists() { Vec::new() } else { there(&root) };
    let released = if root.exists() { Some(release(&root, args)?) } else { None };
    match args.output.output {
        Output::Json => output::json(&json!({
            "pins": root, "released": released.is_some(),
            "links": released.map_or(0, |r| r.links), "maps": released.map_or(0, |r| r.maps),
            "others": others,
        }))?,
        Output::Table => output::text(&said(&root, released, &others))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn release(root: &Path, args: &ReleaseArgs) -> anyhow::Result<Released> {
    // A path that was typed wrong is not emptied.
    if root.parent() != Some(&pins::all()) || root.file_name().is_none() {
        return Err(Failure::new(
            Exit::Usage,
            format!(
                "{} is no pin directory of a sensor: they are below {}",
                root.display(),
                pins::all().display()
            ),
        )
        .into());
    }
    let pins = match Pins::take(root) {
        Ok(pins) => pins,
        Err(PinsError::Held(_)) if args.force => Pins::seize(root),
        Err(error @ PinsError::Held(_)) => {
            return Err(Failure::new(Exit::Refused, error.to_string())
                .hint(
                    "stop it first; `--force` lets go under its hands, and it will say that it is not ready",
                )
                .into());
        }
        Err(error) => return Err(error.into()),
    };
    Ok(pins.release()?)
}

fn said(root: &Path, released: Option<Released>, others: &[PathBuf]) -> String {
    match released {
        Some(Released { links, maps }) => {
            format!(
                "released {}: {links} hooks detached, {maps} maps gone; nothing is enforced by it\n",
                root.display()
            )
        }
        None => {
            let mut text = format!("nothing is enforced from {}\n", root.display());
            for other in others {
                text += &format!("there is: mcp-sensor release --pins {}\n", other.display());
            }
            text
        }
    }
}

/// Pin directories of other state directories.
fn there(root: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(pins::all()).into_iter().flatten().flatten();
    let mut others: Vec<PathBuf> = entries.map(|e| e.path()).filter(|path| path != root).collect();
    others.sort();
    others
}
