//! The client's side of a server's stdio: pipes, one call at a time.

use std::{
    io::{BufRead, BufReader, Write},
    os::{fd::OwnedFd, unix::process::CommandExt},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use serde_json::json;

/// What a call is sent through.
pub(crate) trait Caller {
    /// Sends a message; returns the answer to it, if it has an id.
    fn exchange(&mut self, message: &str, id: Option<u64>) -> Result<()>;
}

/// The client's. Where the scheduler puts client and server changes a round trip
/// more than anything that is measured.
pub(crate) const CPU: usize = 1;
/// The server's where it has one of its own.
pub(crate) const OTHER_CPU: usize = 0;

/// This thread stays on that CPU until this is dropped.
pub(crate) struct OnCpu(CpuSet);

pub(crate) fn on_cpu() -> Result<OnCpu> {
    let before = sched_getaffinity(Pid::from_raw(0))?;
    to_cpu(CPU).context("the client needs a second CPU")?;
    Ok(OnCpu(before))
}

impl Drop for OnCpu {
    fn drop(&mut self) {
        let _ = sched_setaffinity(Pid::from_raw(0), &self.0);
    }
}

/// Makes `command` join a cgroup, by a descriptor of its `cgroup.procs`.
pub(crate) fn enter(command: &mut Command, procs: OwnedFd) {
    // SAFETY: between fork and exec only a system call on a descriptor that the
    // closure owns.
    unsafe { command.pre_exec(move || Ok(nix::unistd::write(&procs, b"0").map(drop)?)) };
}

/// Makes `command` stay on that CPU.
pub(crate) fn pin(command: &mut Command, cpu: usize) {
    // SAFETY: between fork and exec only a system call with a set on the stack.
    unsafe { command.pre_exec(move || Ok(to_cpu(cpu)?)) };
}

fn to_cpu(cpu: usize) -> nix::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &cpus)
}

pub(crate) fn initialize(id: u64) -> String {
    json!({"jsonrpc": "2.0", "id": id, "method": "initialize", "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "bench", "version": "1.0.0"},
    }})
    .to_string()
}

pub(crate) const INITIALIZED: &str = r#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#;

/// A call of `echo`.
pub(crate) fn call(id: u64, message: &str) -> String {
    format!(
        r#"{{"jsonrpc":"2.0","id":{id},"method":"tools/call","params":{{"name":"echo","arguments":{{"message":"{message}"}}}}}}"#
    )
}

/// A server with its stdio; killed on drop.
pub(crate) struct Server {
    pub(crate) child: Child,
    pub(crate) input: Option<ChildStdin>,
    pub(crate) output: BufReader<ChildStdout>,
    line: Vec<u8>,
}

impl Server {
    pub(crate) fn start(mut command: Command) -> Result<Server> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let output = child.stdout.take().context("no pipe")?;
        Ok(Server {
            input: child.stdin.take(),
            output: BufReader::with_capacity(256 * 1024, output),
            child,
            line: Vec::new(),
        })
    }

    /// Bytes of the last answer, newline included.
    pub(crate) fn said(&self) -> usize {
        self.line.len()
    }

    /// Ends its input and waits for its end.
    pub(crate) fn finish(&mut self, within: Duration) -> Result<()> {
        self.input = None;
        let end = Instant::now() + within;
        while self.child.try_wait()?.is_none() {
            ensure!(Instant::now() < end, "the server does not end with its stdin");
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Caller for Server {
    fn exchange(&mut self, message: &str, id: Option<u64>) -> Result<()> {
        let input = self.input.as_mut().context("no stdin")?;
        // One call for each message, as clients do.
        input.write_all(format!("{message}\n").as_bytes())?;
        let Some(id) = id else { return Ok(()) };
        loop {
            self.line.clear();
            if self.output.read_until(b'\n', &mut self.line)? == 0 {
                bail!("the server ended");
            }
            if answers(&self.line, id)? {
                return Ok(());
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether this is a result for that request. The client is to cost nothing:
/// a message is searched from both ends, which is where an id stands.
pub(crate) fn answers(line: &[u8], id: u64) -> Result<bool> {
    const ENDS: usize = 256;
    let line = line.trim_ascii_end();
    let (head, tail) = (&line[..line.len().min(ENDS)], &line[line.len().saturating_sub(ENDS)..]);
    let wanted = [format!("\"id\":{id},"), format!("\"id\":{id}}}")];
    let holds = |part: &[u8], text: &str| part.windows(text.len()).any(|w| w == text.as_bytes());
    if !wanted.iter().any(|w| holds(head, w) || holds(tail, w)) {
        return Ok(false);
    }
    if holds(head, "\"error\"") || holds(head, "\"isError\":true") || holds(tail, "\"isError\":true") {
        bail!("a call failed: {}", String::from_utf8_lossy(head));
    }
    Ok(true)
}

/// A session that calls `echo` over and over.
pub(crate) struct Session<C> {
    pub(crate) caller: C,
    next: u64,
}

impl<C: Caller> Session<C> {
    pub(crate) fn open(mut caller: C) -> Result<Session<C>> {
        caller.exchange(&initialize(1), Some(1)).context("initialize")?;
        caller.exchange(INITIALIZED, None)?;
        Ok(Session { caller, next: 2 })
    }

    /// How many so far.
    pub(crate) fn calls(&self) -> u64 {
        self.next - 2
    }

    /// Nanoseconds of each round trip, for so long.
    pub(crate) fn call_for(&mut self, message: &str, time: Duration) -> Result<Vec<f64>> {
        let mut times = Vec::new();
        let end = Instant::now() + time;
        while Instant::now() < end {
            times.push(self.call(message)?);
        }
        Ok(times)
    }

    /// The same, with a call every `pace`.
    pub(crate) fn call_paced(&mut self, message: &str, time: Duration, pace: Duration) -> Result<Vec<f64>> {
        let mut times = Vec::new();
        let since = Instant::now();
        let mut due = Duration::ZERO;
        while due < time {
            thread::sleep(due.saturating_sub(since.elapsed()));
            times.push(self.call(message)?);
            due += pace;
        }
        Ok(times)
    }

    pub(crate) fn call(&mut self, message: &str) -> Result<f64> {
        let text = call(self.next, message);
        let since = Instant::now();
        self.caller.exchange(&text, Some(self.next))?;
        self.next += 1;
        Ok(since.elapsed().as_nanos() as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_known_by_its_id_wherever_that_stands() {
        let long = "x".repeat(1000);
        for line in [
            r#"{"jsonrpc":"2.0","id":7,"result":{}}"#.to_owned(),
            format!(r#"{{"result":{{"content":"{long}"}},"jsonrpc":"2.0","id":7}}"#),
        ] {
            assert!(answers(line.as_bytes(), 7).unwrap());
            assert!(!answers(line.as_bytes(), 77).unwrap());
        }
        assert!(answers(br#"{"id":7,"error":{"code":-32600}}"#, 7).is_err());
    }
}
