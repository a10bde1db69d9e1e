//! Real servers and a real client, installed once below `target/testbed`.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, bail};

use crate::{
    setup,
    step::{self, say},
    workspace,
};

/// Versions that are known to work with each other; changing one installs anew.
const PYTHON: &[&str] = &["mcp==2.3.0", "mcp-server-fetch==2026.10.24"];
const NODE: &[&str] = &["@modelcontextprotocol/server-everything@2026.8.31"];

pub(crate) struct Testbed {
    /// Of the virtual environment that has the client.
    pub(crate) python: PathBuf,
    pub(crate) fetch: PathBuf,
    pub(crate) everything: PathBuf,
}

pub(crate) fn install() -> Result<Testbed> {
    let dir = workspace::target().join("testbed");
    let python = dir.join("python");
    let node = dir.join("node");
    let testbed = Testbed {
        python: python.join("bin/python3"),
        fetch: python.join("bin/mcp-server-fetch"),
        everything: node.join("node_modules/.bin/mcp-server-everything"),
    };
    let stamp = dir.join("installed");
    let wanted = [PYTHON, NODE].concat().join("\n");
    // A console script names its interpreter by path: a moved folder is broken.
    let works = || step::succeeds(Command::new(&testbed.fetch).arg("--help"));
    if fs::read_to_string(&stamp).is_ok_and(|there| there == wanted) && testbed.everything.exists() && works()
    {
        say("real servers and client: there");
        return Ok(testbed);
    }
    for program in ["python3", "npm"] {
        if !setup::on_path(program) {
            bail!("{program} is missing: `cargo xtask setup` as root installs it");
        }
    }
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&node).with_context(|| format!("cannot make {}", node.display()))?;
    step::run("python3 -m venv", Command::new("python3").args(["-m", "venv"]).arg(&python))?;
    step::run(
        &format!("pip install {}", PYTHON.join(" ")),
        Command::new(python.join("bin/pip")).args(["install", "--disable-pip-version-check"]).args(PYTHON),
    )?;
    step::run(
        &format!("npm install {}", NODE.join(" ")),
        Command::new("npm")
            .args(["install", "--save-exact", "--no-fund", "--no-audit", "--prefix"])
            .arg(&node)
            .args(NODE),
    )?;
    if !works() || !testbed.everything.exists() {
        bail!("the servers were installed but do not start; see {}", dir.display());
    }
    fs::write(&stamp, wanted)?;
    Ok(testbed)
}
