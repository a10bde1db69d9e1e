//! A client of the tests' own: one thread that puts exactly the bytes on a
//! server's stdio that a test wants, and keeps the same log as real ones.

use super::log::{Log, Record, ResultFields};
use super::speaker::Speaker;
use crate::bed::Bed;
use crate::sensor::{SOON, Sensor};
use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long one answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// What joins a client and its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    Pipes,
    /// A socket pair for each direction, as node makes them.
    Sockets,
}

/// A server that was started, and the client's ends of its stdio.
pub struct Wire {
    child: Child,
    input: Option<File>,
    output: File,
    ended: bool,
    rest: Vec<u8>,
    arrived: VecDeque<Arrived>,
    records: Vec<Record>,
    next: i64,
    /// Every byte that went, and that came.
    pub sent: u64,
    pub received: u64,
}

/// A message of the server's.
#[derive(Debug)]
pub struct Arrived {
    pub id: Option<Value>,
    pub method: String,
    pub at: Instant,
}

/// Of a message, what the log keeps; the rest is only passed over.
#[derive(Deserialize)]
struct Message {
    id: Option<Value>,
    #[serde(default)]
    method: String,
    #[serde(default)]
    params: Params,
    error: Option<Code>,
    result: Option<ResultFields>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Params {
    name: Value,
    request_id: Value,
}

#[derive(Deserialize)]
struct Code {
    code: i64,
}

impl Wire {
    pub fn start(command: Command, link: Link) -> Result<Wire> {
        Wire::with(command, link, 1)
    }

    /// `next`: the first id.
    pub fn with(mut command: Command, link: Link, next: i64) -> Result<Wire> {
        let what = format!("{command:?}");
        let (their_input, input) = pair(link)?;
        let (output, their_output) = pair(link)?;
        command.stdin(Stdio::from(their_input)).stdout(Stdio::from(their_output));
        let child = command.spawn().with_context(|| what)?;
        // Its ends must be its own only.
        drop(command);
        let (input, output) = (File::from(input), File::from(output));
        for end in [&input, &output] {
            fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        Ok(Wire {
            child,
            input: Some(input),
            output,
            ended: false,
            rest: Vec::new(),
            arrived: VecDeque::new(),
            records: Vec::new(),
            next,
            sent: 0,
            received: 0,
        })
    }

    /// A session that the sensor has heard of: from here on, and as long as it
    /// lives, the sensor listens.
    pub fn companion(bed: &Bed, sensor: &Sensor, server: &Speaker) -> Result<Wire> {
        let mut wire = Wire::start(server.command(bed, &[])?, Link::Pipes)?;
        wire.initialize()?;
        let mark = sensor.mark()?;
        let deadline = Instant::now() + SOON;
        while sensor.since(mark, "tool_call", server.name)?.is_empty() {
            ensure!(Instant::now() < deadline, "the sensor hears nothing within {SOON:?}");
            wire.call("echo", json!({}))?;
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(wire)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `initialize`, as the legacy eras begin.
    pub fn initialize(&mut self) -> Result<()> {
        let info = json!({"name": "tests", "version": "1.0.0"});
        let params = json!({"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": info});
        let id = self.ask("initialize", params)?;
        self.answer_to(id)?;
        self.send(&json!({"jsonrpc": "2.0", "method": "notifications/initialized"}))
    }

    /// Sends a request; its id.
    pub fn ask(&mut self, method: &str, params: Value) -> Result<i64> {
        let (id, request) = self.request(method, params);
        self.send(&request)?;
        Ok(id)
    }

    pub fn request(&mut self, method: &str, params: Value) -> (i64, Value) {
        let id = self.next;
        self.next += 1;
        let mut request = json!({"jsonrpc": "2.0", "id": id, "method": method});
        request["params"] = params;
        (id, request)
    }

    pub fn request_call(&mut self, tool: &str, arguments: Value) -> (i64, Value) {
        let mut params = json!({"name": tool});
        params["arguments"] = arguments;
        self.request("tools/call", params)
    }

    /// Calls a tool and waits for what comes of it.
    pub fn call(&mut self, tool: &str, arguments: Value) -> Result<()> {
        let (id, request) = self.request_call(tool, arguments);
        self.send(&request)?;
        self.answer_to(id).map(drop)
    }

    pub fn send(&mut self, message: &Value) -> Result<()> {
        self.send_together(std::slice::from_ref(message))
    }

    /// Several messages in one piece.
    pub fn send_together(&mut self, messages: &[Value]) -> Result<()> {
        let mut bytes = Vec::new();
        for message in messages {
            let line = message.to_string();
            self.note("sent", line.as_bytes())?;
            bytes.extend_from_slice(line.as_bytes());
            bytes.push(b'\n');
        }
        self.put(&bytes)
    }

    /// Bytes that are in no log.
    pub fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !bytes.is_empty() {
            ensure!(Instant::now() < deadline, "{} bytes do not leave within {PATIENCE:?}", bytes.len());
            let input = self.input.as_mut().context("the server's input is closed")?;
            match input.write(bytes) {
                Ok(n) => {
                    bytes = &bytes[n..];
                    self.sent += n as u64;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.turn(true)?,
                Err(e) => return Err(e).context("the server reads no more"),
            }
        }
        Ok(())
    }

    /// The next message, whatever it is.
    pub fn message(&mut self) -> Result<Arrived> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(arrived) = self.arrived.pop_front() {
                return Ok(arrived);
            }
            ensure!(!self.ended, "the server has ended its output");
            ensure!(Instant::now() < deadline, "no message within {PATIENCE:?}");
            self.turn(false)?;
        }
    }

    pub fn answer_to(&mut self, id: i64) -> Result<Arrived> {
        loop {
            let message = self.message()?;
            if message.method.is_empty() && message.id == Some(json!(id)) {
                return Ok(message);
            }
        }
    }

    /// Answers to so many requests, in any order.
    pub fn answers(&mut self, count: usize) -> Result<()> {
        let mut left = count;
        while left > 0 {
            left -= usize::from(self.message()?.method.is_empty());
        }
        Ok(())
    }

    /// What became of the last request that was answered, in the sensor's words.
    pub fn last_outcome(&self) -> Option<String> {
        self.records.iter().rev().find(|r| r.way == "received" && r.method.is_empty()).map(Record::outcome)
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id() as i32), signal)?)
    }

    /// Reads so many bytes and no more; for messages that never end.
    pub fn take_bytes(&mut self, count: u64) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.received < count {
            ensure!(!self.ended && Instant::now() < deadline, "{} of {count} bytes came", self.received);
            self.turn(false)?;
        }
        Ok(())
    }

    /// Closes the server's input, reads to the end and waits for it.
    pub fn end(mut self) -> Result<Log> {
        drop(self.input.take());
        let deadline = Instant::now() + PATIENCE;
        while !self.ended {
            ensure!(Instant::now() < deadline, "the server does not end within {PATIENCE:?}");
            self.turn(false)?;
        }
        self.child.wait()?;
        Log::of(&self.records)
    }

    /// Has the server closed its output? Waits a moment for that.
    pub fn has_ended(&mut self) -> Result<bool> {
        self.turn(false)?;
        Ok(self.ended)
    }

    /// For a server that was killed: what it left unread is read.
    pub fn end_of_killed(mut self) -> Result<Log> {
        self.child.wait()?;
        self.end()
    }

    /// Waits a moment for room (`writing`) or bytes, and takes what has come.
    fn turn(&mut self, writing: bool) -> Result<()> {
        let mut fds = vec![PollFd::new(self.output.as_fd(), PollFlags::POLLIN)];
        if writing && let Some(input) = &self.input {
            fds.push(PollFd::new(input.as_fd(), PollFlags::POLLOUT));
        }
        if self.ended {
            fds.remove(0);
        }
        poll(&mut fds, PollTimeout::from(50u8))?;
        if self.ended {
            return Ok(());
        }
        // One read: a writer as fast as we are would keep a loop going to the end of its message.
        let mut room = [0u8; 64 * 1024];
        match self.output.read(&mut room) {
            Ok(0) => self.ended = true,
            Ok(n) => self.take(&room[..n])?,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            // A socket whose other end was killed.
            Err(e) if e.kind() == ErrorKind::ConnectionReset => self.ended = true,
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }

    fn take(&mut self, bytes: &[u8]) -> Result<()> {
        self.received += bytes.len() as u64;
        let mut pieces = bytes.split(|b| *b == b'\n').peekable();
        while let Some(piece) = pieces.next() {
            self.rest.extend_from_slice(piece);
            if pieces.peek().is_some() {
                let line = std::mem::take(&mut self.rest);
                self.note("received", &line)?;
            }
        }
        Ok(())
    }

    /// A line of the log; a batch is as many as it has messages, each with the
    /// length of its own text.
    fn note(&mut self, way: &str, line: &[u8]) -> Result<()> {
        if line.first() == Some(&b'[') {
            // Compact JSON of the tests' own making: as long as when it is written again.
            let batch: Vec<Value> = serde_json::from_slice(line)?;
            return batch.iter().try_for_each(|m| self.note(way, m.to_string().as_bytes()));
        }
        let Ok(read) = serde_json::from_slice::<Message>(line) else {
            bail!("not JSON: {}", String::from_utf8_lossy(&line[..line.len().min(200)]));
        };
        if way == "received" {
            let arrived = Arrived { id: read.id.clone(), method: read.method.clone(), at: Instant::now() };
            self.arrived.push_back(arrived);
        }
        self.records.push(Record {
            process: self.child.id().into(),
            way: way.to_owned(),
            bytes: line.len() as u64,
            id: read.id,
            method: read.method,
            name: read.params.name,
            request_id: read.params.request_id,
            error: read.error.map(|e| e.code),
            result: read.result,
            ..Record::default()
        });
        Ok(())
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// (what is read, what is written); for sockets either end does both.
fn pair(link: Link) -> Result<(OwnedFd, OwnedFd)> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    Ok(match link {
        Link::Pipes => nix::unistd::pipe2(OFlag::O_CLOEXEC)?,
        Link::Sockets => socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?,
    })
}
