//! `mcp-proxy` in front of a stdio server: the client speaks streamable HTTP.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::client::{Caller, answers};

/// Ended on drop, and its server with it.
pub(crate) struct Proxy {
    child: Child,
    connection: BufReader<TcpStream>,
    session: String,
    body: Vec<u8>,
}

impl Proxy {
    /// `server`: the command of a stdio server; `place` says where it runs.
    pub(crate) fn start(program: &Path, server: &Command, place: impl FnOnce(&mut Command)) -> Result<Proxy> {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let mut command = Command::new(program);
        // Its log of requests is not what is measured.
        command.args(["--port", &port.to_string(), "--log-level", "WARNING", "--pass-environment", "--"]);
        command.arg(server.get_program()).args(server.get_args());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        place(&mut command);
        let mut child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
        let end = Instant::now() + Duration::from_secs(20);
        let stream = loop {
            match TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < end && child.try_wait()?.is_none() => {
                    thread::sleep(Duration::from_millis(20));
                }
                Err(error) => {
                    let _ = child.kill();
                    let _ = child.wait();
                    bail!("{} does not listen: {error}", program.display());
                }
            }
        };
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        Ok(Proxy { child, connection: BufReader::new(stream), session: String::new(), body: Vec::new() })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.connection.read_line(&mut line)? > 0, "the proxy closed the connection");
        Ok(line.trim_end().to_owned())
    }

    /// Reads one response into `body`.
    fn response(&mut self) -> Result<u16> {
        let status = self.line()?;
        let status: u16 = status
            .split(' ')
            .nth(1)
            .and_then(|s| s.parse().ok())
            .with_context(|| format!("no status: {status}"))?;
        let (mut length, mut chunked) = (0, false);
        loop {
            let line = self.line()?;
            let Some((name, value)) = line.split_once(':') else { break };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.trim().parse()?,
                "transfer-encoding" => chunked = value.trim() == "chunked",
                "mcp-session-id" => self.session = format!("Mcp-Session-Id: {}\r\n", value.trim()),
                _ => {}
            }
        }
        self.body.clear();
        loop {
            let size = if chunked { usize::from_str_radix(&self.line()?, 16)? } else { length };
            (&mut self.connection).take(size as u64).read_to_end(&mut self.body)?;
            if !chunked {
                return Ok(status);
            }
            self.line()?;
            if size == 0 {
                return Ok(status);
            }
        }
    }
}

impl Caller for Proxy {
    fn exchange(&mut self, message: &str, id: Option<u64>) -> Result<()> {
        let request = format!(
            "POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n\
             Accept: application/json, text/event-stream\r\n{}Content-Length: {}\r\n\r\n{message}",
            self.session,
            message.len()
        );
        self.connection.get_mut().write_all(request.as_bytes())?;
        let status = self.response()?;
        ensure!(
            (200..300).contains(&status),
            "the proxy says {status}: {}",
            String::from_utf8_lossy(&self.body)
        );
        let Some(id) = id else { return Ok(()) };
        for line in self.body.split(|b| *b == b'\n') {
            let line = line.strip_prefix(b"data: ").unwrap_or(line);
            if answers(line, id)? {
                return Ok(());
            }
        }
        bail!("no answer in {}", String::from_utf8_lossy(&self.body));
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let end = Instant::now() + Duration::from_secs(3);
        while Instant::now() < end {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
