//! Servers as small as can be, so that their own time hides nothing.

use std::{
    borrow::Cow,
    io::{self, BufRead, BufReader, StdinLock, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::agent::now_of_day;

#[derive(Deserialize)]
struct Request<'a> {
    id: Option<u64>,
    #[serde(borrow)]
    method: Cow<'a, str>,
    #[serde(borrow)]
    params: Option<Params<'a>>,
}

#[derive(Deserialize)]
struct Params<'a> {
    #[serde(borrow)]
    arguments: Option<Arguments<'a>>,
}

#[derive(Deserialize)]
struct Arguments<'a> {
    #[serde(borrow)]
    message: Option<Cow<'a, str>>,
}

/// More than any request has.
const BUFFER: usize = 256 * 1024;

fn input() -> BufReader<StdinLock<'static>> {
    BufReader::with_capacity(BUFFER, io::stdin().lock())
}

/// One call for each message, as servers do.
fn say(message: &Value) -> Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    write(&line)
}

fn write(line: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    // Past the line buffer of `Stdout`: it would cut long messages.
    let mut rest = line;
    while !rest.is_empty() {
        let n = nix::unistd::write(&out, rest)?;
        rest = &rest[n..];
    }
    Ok(out.flush()?)
}

/// Everything but calls.
fn other(request: &Request) -> Result<()> {
    let Some(id) = request.id else { return Ok(()) };
    let result = match &*request.method {
        "initialize" => json!({
            "protocolVersion": "2025-06-18",
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "bench", "version": "1.0.0"},
        }),
        "tools/list" => json!({"tools": [{
            "name": "echo",
            "description": "Says what it was told",
            "inputSchema": {"type": "object", "properties": {"message": {"type": "string"}}},
        }]}),
        "ping" => json!({}),
        _ => {
            let error = json!({"code": -32601, "message": "Method not found"});
            return say(&json!({"jsonrpc": "2.0", "id": id, "error": error}));
        }
    };
    say(&json!({"jsonrpc": "2.0", "id": id, "result": result}))
}

/// Calls `each` with every `tools/call`, until stdin ends.
fn serve(mut each: impl FnMut(u64, &Request) -> Result<()>) -> Result<()> {
    let mut input = input();
    let mut line = Vec::new();
    loop {
        line.clear();
        if input.read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let request: Request = serde_json::from_slice(&line).context("no request")?;
        match request.id {
            Some(id) if request.method == "tools/call" => each(id, &request)?,
            _ => other(&request)?,
        }
    }
}

pub(crate) fn echo() -> Result<()> {
    serve(|id, request| {
        let message = request.params.as_ref().and_then(|p| p.arguments.as_ref()?.message.as_deref());
        let text = format!("Echo: {}", message.unwrap_or_default());
        say(&json!({"jsonrpc": "2.0", "id": id, "result": {"content": [{"type": "text", "text": text}]}}))
    })
}

/// Ids of the calls have as many digits as this, so that a result is made by
/// writing over its id.
pub(crate) const FIRST_ID: u64 = 1_000_000_000;

pub(crate) fn results(bytes: usize) -> Result<()> {
    let head = format!(r#"{{"jsonrpc":"2.0","id":{FIRST_ID},"result":{{"content":[{{"type":"text","text":"#);
    let tail = "}]}}\n";
    let room = bytes.checked_sub(head.len() + tail.len() + 2).context("a result has more bytes")?;
    let mut line = head.into_bytes();
    line.push(b'"');
    line.extend(prose(room).into_bytes());
    line.push(b'"');
    line.extend(tail.as_bytes());
    let at = line.windows(5).position(|w| w == b"\"id\":").context("no id")? + 5;
    serve(|id, _| {
        let digits = id.to_string();
        line.get_mut(at..at + digits.len())
            .context("an id that is too long")?
            .copy_from_slice(digits.as_bytes());
        write(&line)
    })
}

/// Text as tools return it, of just so many bytes; nothing in it is escaped in
/// JSON.
pub(crate) fn prose(bytes: usize) -> String {
    const WORDS: [&str; 24] = [
        "the",
        "server",
        "of",
        "a",
        "request",
        "file",
        "in",
        "returns",
        "path",
        "and",
        "error",
        "to",
        "line",
        "with",
        "2026-11-21",
        "value",
        "is",
        "report",
        "customer",
        "for",
        "17.5",
        "https://example.test/a/b",
        "list",
        "(see",
    ];
    let mut text = String::with_capacity(bytes + 32);
    let mut state = 1_u32;
    while text.len() < bytes {
        // Numerical Recipes' generator: the same text everywhere.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        text += WORDS[(state >> 16) as usize % WORDS.len()];
        text += if state >> 28 == 0 { ". " } else { " " };
    }
    text.truncate(bytes);
    text
}

/// Nobody listens there; allowed, connect() says so.
const NOBODY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9);

/// Says on stderr when connect() was denied, nanoseconds of the day, or `never`.
pub(crate) fn connecting() -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(2);
    let mut line = Vec::new();
    input().read_until(b'\n', &mut line)?;
    let since = Instant::now();
    other(&serde_json::from_slice(&line).context("no request")?)?;
    while since.elapsed() < LIMIT {
        match TcpStream::connect(NOBODY) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                eprintln!("{}", now_of_day()?);
                return Ok(());
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            other => bail!("connect to {NOBODY}: {other:?}"),
        }
        thread::sleep(Duration::from_micros(100));
    }
    eprintln!("never");
    Ok(())
}
