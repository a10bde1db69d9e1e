//! Running a program with a deadline.

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Longest line kept of a child's output.
const MAX_LINE: u64 = 1 << 20;

/// A child whose output is read as it comes; killed on drop.
pub struct Running {
    child: Child,
    lines: Receiver<String>,
    errors: std::thread::JoinHandle<String>,
    what: String,
    ended: bool,
}

pub struct Finished {
    pub status: ExitStatus,
    pub lines: Vec<String>,
    pub stderr: String,
}

/// A program that a test has just copied stays open for writing as long as
/// another test's child, forked at that moment, has not called exec.
fn spawn(command: &mut Command) -> std::io::Result<Child> {
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        match command.spawn() {
            Err(e) if e.raw_os_error() == Some(libc::ETXTBSY) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}

impl Running {
    pub fn start(mut command: Command) -> Result<Running> {
        let what = format!("{command:?}");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = spawn(&mut command).with_context(|| format!("cannot start {what}"))?;
        let stdout = child.stdout.take().expect("piped");
        let (send, lines) = channel();
        std::thread::spawn(move || {
            let mut reader = BufReader::new(stdout);
            let mut line = Vec::new();
            while matches!(reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line), Ok(n) if n > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_string();
                line.clear();
                if send.send(text).is_err() {
                    return;
                }
            }
        });
        let stderr = child.stderr.take().expect("piped");
        let errors = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stderr.take(MAX_LINE).read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        Ok(Running { child, lines, errors, what, ended: false })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line of its output.
    pub fn line(&mut self, within: Duration) -> Result<String> {
        match self.lines.recv_timeout(within) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => bail!("no output of {} within {within:?}", self.what),
            Err(RecvTimeoutError::Disconnected) => {
                let errors = std::mem::replace(&mut self.errors, std::thread::spawn(String::new));
                let said =
                    if wait_finished(&errors) { errors.join().unwrap_or_default() } else { String::new() };
                bail!("{} ended its output: {}", self.what, said.trim())
            }
        }
    }

    /// Reads on until the line is `wanted`.
    pub fn wait_for_line(&mut self, wanted: &str, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        loop {
            let line = self.line(deadline.saturating_duration_since(Instant::now()))?;
            if line == wanted {
                return Ok(());
            }
        }
    }

    pub fn say(&mut self, text: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("its input is closed")?;
        writeln!(stdin, "{text}")?;
        Ok(stdin.flush()?)
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id() as i32), signal)?)
    }

    /// Has it ended by itself?
    pub fn is_over(&mut self) -> Result<bool> {
        self.ended |= self.child.try_wait()?.is_some();
        Ok(self.ended)
    }

    /// Closes its input and waits for its end; kills it at the deadline, which
    /// is an error.
    pub fn finish(mut self, within: Duration) -> Result<Finished> {
        drop(self.child.stdin.take());
        let deadline = Instant::now() + within;
        while !self.is_over()? {
            if Instant::now() > deadline {
                bail!("{} does not end within {within:?}", self.what);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let status = self.child.wait()?;
        // A grandchild may hold the pipe: what it says later is not waited for.
        let mut lines = Vec::new();
        let mut patience = Duration::from_millis(500);
        while let Ok(line) = self.lines.recv_timeout(patience) {
            lines.push(line);
            patience = deadline.saturating_duration_since(Instant::now()).min(patience);
        }
        let errors = std::mem::replace(&mut self.errors, std::thread::spawn(String::new));
        let stderr = if errors.is_finished() || status.success() && wait_finished(&errors) {
            errors.join().unwrap_or_default()
        } else {
            String::new()
        };
        Ok(Finished { status, lines, stderr })
    }
}

fn wait_finished(handle: &std::thread::JoinHandle<String>) -> bool {
    let deadline = Instant::now() + Duration::from_millis(200);
    while !handle.is_finished() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    handle.is_finished()
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A program built with the tests.
pub fn built(name: &str) -> Result<PathBuf> {
    // target/PROFILE/deps/TEST
    let me = std::env::current_exe()?;
    let path = me.parent().and_then(|p| p.parent()).context("the test's folder")?.join(name);
    if !path.exists() {
        bail!("{} is missing: cargo build -p mcp-sensor-tests --bins", path.display());
    }
    Ok(path)
}
