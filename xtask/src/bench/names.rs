//! What it costs to be held to names: a section of docs/figures.md of its own.

use std::{fs, process::Command};

use anyhow::{Context, Result};

use crate::{
    build, setup,
    step::{self, Step, say},
    test, toolchain, workspace,
};

const SECTION: &str = "## Names\n";

pub(super) fn all(rounds: usize, print_only: bool) -> Result<()> {
    setup::build_tools()?;
    if !setup::on_path("squid")
        && let Err(error) = setup::apt_without_service(&["squid"])
    {
        say(format!("no proxy to compare with: {error:#}"));
    }
    build::all(false)?;
    step::run_visible(toolchain::cargo().args([
        "build",
        "--release",
        "--package",
        "xtask",
        "--bin",
        "names",
        "--target-dir",
        "target",
    ]))?;
    test::mount_bpffs()?;
    let step = Step::start(format!("{rounds} interleaved rounds"));
    let section = step::output(
        Command::new(workspace::target().join("release/names"))
            .args(["report", "--rounds", &rounds.to_string()])
            .env("MCP_SENSOR_BIN", workspace::sensor_binary(false)),
    )?;
    step.done();
    println!("{section}");
    if !print_only {
        let path = workspace::root().join("docs/figures.md");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        fs::write(&path, with_section(&text, &section))
            .with_context(|| format!("cannot write {}", path.display()))?;
        say(format!("wrote {}", path.display()));
    }
    Ok(())
}

/// The report with this section in place of the one it has, or at its end.
fn with_section(text: &str, section: &str) -> String {
    let (before, after) = match text.find(SECTION) {
        None => (text, ""),
        Some(at) => {
            let rest = &text[at + SECTION.len()..];
            (&text[..at], rest.find("\n## ").map_or("", |next| &rest[next + 1..]))
        }
    };
    let section = format!("{}\n\n{SECTION}\n{}\n", before.trim_end(), section.trim());
    if after.is_empty() { section } else { format!("{section}\n{after}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_section_is_replaced_and_nothing_else() {
        let text = "# Figures\n\n| a |\n\n## Programs\n\n| p |\n";
        let once = with_section(text, "first\n");
        assert_eq!(once, format!("{text}\n{SECTION}\nfirst\n"));
        assert_eq!(with_section(&once, "second"), format!("{text}\n{SECTION}\nsecond\n"));
        let between = format!("# Figures\n\n{SECTION}\nold\n\n## Programs\n\n| p |\n");
        assert_eq!(
            with_section(&between, "new"),
            format!("# Figures\n\n{SECTION}\nnew\n\n## Programs\n\n| p |\n")
        );
    }
}
