//! The sensor's own control socket, opened by somebody who had no label yet.

use crate::Target;
use crate::sockets::{exec_with, inherited};
use crate::wire::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

/// `rest`: for the first, attempt and socket; the second takes none.
pub(crate) const ALL: &[(&str, Attempt)] =
    &[("control-then-exec", open_then_exec), ("control-ask-inherited", ask_inherited)];

fn open_then_exec(t: &Target) -> Tried {
    let stream = UnixStream::connect(&t.rest[1])
        .map_err(|e| Stop { step: "unix connect", errno: e.raw_os_error().unwrap_or(0) })?;
    exec_with(t, &stream.into())
}

/// One frame of HTTP/2 (RFC 9113, 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// Status() over gRPC, by hand. `Ok(true)`: there was an answer with a body.
fn ask_inherited(_: &Target) -> Tried {
    let error = |step| move |e: std::io::Error| Stop { step, errno: e.raw_os_error().unwrap_or(0) };
    let mut stream = UnixStream::from(inherited());
    stream.set_read_timeout(Some(std::time::Duration::from_secs(2))).map_err(error("SO_RCVTIMEO"))?;
    let mut headers = Vec::new();
    for (name, value) in [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/mcp_sensor.v1.Control/Status"),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ] {
        // Literal, not indexed, not Huffman coded (RFC 7541, 6.2.2).
        headers.extend([0, name.len() as u8]);
        headers.extend(name.bytes());
        headers.push(value.len() as u8);
        headers.extend(value.bytes());
    }
    let mut request = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    request.extend(frame(4, 0, 0, &[]));
    request.extend(frame(1, 4, 1, &headers));
    // An empty message: not compressed, no bytes.
    request.extend(frame(0, 1, 1, &[0; 5]));
    stream.write_all(&request).map_err(error("write"))?;
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).map_err(error("read"))?;
        let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; len];
        stream.read_exact(&mut payload).map_err(error("read"))?;
        match head[3] {
            // DATA with more than the five bytes before a message.
            0 if len > 5 => return Ok(true),
            // HEADERS that end the stream, RST_STREAM, GOAWAY.
            1 if head[4] & 1 != 0 => return Err(Stop { step: "refused", errno: libc::EPERM }),
            3 | 7 => return Err(Stop { step: "cut off", errno: libc::ECONNRESET }),
            _ => {}
        }
    }
}
