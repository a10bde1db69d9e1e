//! One line for each step, a spinner with the clock on a terminal, and the
//! output of a command only when the command failed.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, IsTerminal, Read},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// Lines of output kept for the report of a failure.
const KEPT_LINES: usize = 60;

/// Says in one line what is there already or was decided.
pub(crate) fn say(what: impl AsRef<str>) {
    eprintln!("  {}", what.as_ref());
}

pub(crate) fn headline(what: &str) {
    eprintln!("{what}");
}

/// A step that takes long: a spinner on a terminal, one line when it is done.
pub(crate) struct Step {
    what: String,
    bar: ProgressBar,
    since: Instant,
}

impl Step {
    pub(crate) fn start(what: impl Into<String>) -> Self {
        let what = what.into();
        let bar = if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("  {spinner} {prefix} [{elapsed}] {wide_msg:.dim}")
                .unwrap_or_else(|_| ProgressStyle::default_spinner());
            let bar = ProgressBar::new_spinner().with_style(style).with_prefix(what.clone());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        } else {
            ProgressBar::hidden()
        };
        Self { what, bar, since: Instant::now() }
    }

    pub(crate) fn detail(&self, line: impl Into<String>) {
        self.bar.set_message(line.into());
    }

    pub(crate) fn done(self) {
        self.bar.finish_and_clear();
        eprintln!("  {} ({})", self.what, seconds(self.since.elapsed()));
    }

    pub(crate) fn failed(self) {
        self.bar.finish_and_clear();
        eprintln!("  {} FAILED ({})", self.what, seconds(self.since.elapsed()));
    }
}

/// Runs a command as one step; on failure its last lines are in the error.
pub(crate) fn run(what: &str, command: &mut Command) -> Result<()> {
    let step = Step::start(what);
    match watch(command, &step) {
        Ok(()) => {
            step.done();
            Ok(())
        }
        Err(error) => {
            step.failed();
            Err(error.context(what.to_owned()))
        }
    }
}

fn watch(command: &mut Command, step: &Step) -> Result<()> {
    let shown = show(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{shown}`"))?;
    let kept = Arc::new(Mutex::new(VecDeque::with_capacity(KEPT_LINES)));
    let readers: Vec<_> = [
        child.stdout.take().map(|s| Box::new(s) as Box<dyn Read + Send>),
        child.stderr.take().map(|s| Box::new(s) as Box<dyn Read + Send>),
    ]
    .into_iter()
    .flatten()
    .map(|stream| {
        let (kept, bar) = (Arc::clone(&kept), step.bar.clone());
        thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if line.is_empty() {
                    continue;
                }
                bar.set_message(line.clone());
                if let Ok(mut kept) = kept.lock() {
                    if kept.len() == KEPT_LINES {
                        kept.pop_front();
                    }
                    kept.push_back(line);
                }
            }
        })
    })
    .collect();
    let status = child.wait()?;
    for reader in readers {
        let _ = reader.join();
    }
    if !status.success() {
        let kept = kept.lock().map(|k| k.iter().cloned().collect::<Vec<_>>().join("\n")).unwrap_or_default();
        bail!("`{shown}` ended with {status}\n{kept}");
    }
    Ok(())
}

/// Runs a command with its output on ours: cargo shows its own progress.
pub(crate) fn run_visible(command: &mut Command) -> Result<()> {
    let shown = show(command);
    let status = command.status().with_context(|| format!("cannot start `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` ended with {status}");
    }
    Ok(())
}

/// The standard output of a command that must succeed, trimmed.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let shown = show(command);
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{shown}`"))?;
    if !out.status.success() {
        bail!("`{shown}` ended with {}: {}", out.status, String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

pub(crate) fn succeeds(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn show(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|arg| arg.to_string_lossy().into_owned()));
    words.join(" ")
}

pub(crate) fn seconds(time: Duration) -> String {
    if time < Duration::from_secs(60) {
        format!("{:.1} s", time.as_secs_f64())
    } else {
        format!("{} min {} s", time.as_secs() / 60, time.as_secs() % 60)
    }
}
