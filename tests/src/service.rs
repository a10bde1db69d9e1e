//! What a peer offers beside echo: a page over HTTP, and names.

use crate::network::{ALLOWED_V4, ALLOWED_V6, Network};
use anyhow::{Context, Result};
use std::io::{Read, Write};
use std::net::{Ipv6Addr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

pub const WEB_PORT: u16 = 8080;
pub const PAGE: &str = "hello from the peer";
/// The name that [`Names`] resolves to the peer's allowed addresses.
pub const NAME: &str = "service.mcp.test";
const DNS_PORT: u16 = 53;

/// A thread on the peer's side; ends on drop.
pub struct Service {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Service {
    fn start(mut turn: impl FnMut() + Send + 'static) -> Service {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let stop = stop.clone();
            move || {
                while !stop.load(Ordering::Relaxed) {
                    turn();
                }
            }
        });
        Service { stop, thread: Some(thread) }
    }

    /// Answers every request on [`WEB_PORT`] with [`PAGE`].
    pub fn web(network: &Network) -> Result<Service> {
        let listener = network.peer.within(|| {
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, WEB_PORT)).context("web")?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        })?;
        Ok(Service::start(move || match listener.accept() {
            Ok((mut stream, _)) => {
                let _ = stream.set_nonblocking(false);
                let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
                let mut request = [0; 4096];
                let _ = stream.read(&mut request);
                let head = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n";
                let _ = write!(stream, "{head}Content-Length: {}\r\n\r\n{PAGE}", PAGE.len());
            }
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }))
    }

    /// Resolves [`NAME`] over UDP port 53; knows no other name.
    pub fn names(network: &Network) -> Result<Service> {
        let socket = network.peer.within(|| {
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, DNS_PORT)).context("names")?;
            socket.set_read_timeout(Some(Duration::from_millis(20)))?;
            Ok(socket)
        })?;
        Ok(Service::start(move || {
            let mut query = [0; 512];
            if let Ok((n, from)) = socket.recv_from(&mut query)
                && let Some(answer) = answer(&query[..n])
            {
                let _ = socket.send_to(&answer, from);
            }
        }))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// RFC 1035 section 4: header, the question again, at most one answer.
fn answer(query: &[u8]) -> Option<Vec<u8>> {
    let mut at = 12;
    let mut name = Vec::new();
    loop {
        let len = usize::from(*query.get(at)?);
        let label = query.get(at + 1..at + 1 + len)?;
        at += 1 + len;
        if len == 0 {
            break;
        }
        name.push(String::from_utf8_lossy(label).to_lowercase());
    }
    let kind = u16::from_be_bytes(query.get(at..at + 2)?.try_into().ok()?);
    let question = query.get(12..at + 4)?;
    let known = name.join(".") == NAME;
    let data: Vec<u8> = match kind {
        1 if known => ALLOWED_V4.octets().to_vec(),
        28 if known => ALLOWED_V6.octets().to_vec(),
        _ => Vec::new(),
    };
    let code = if known { 0 } else { 3 };
    let mut reply = query.get(..2)?.to_vec();
    reply.extend([0x81, 0x80 | code, 0, 1, 0, u8::from(!data.is_empty()), 0, 0, 0, 0]);
    reply.extend(question);
    if !data.is_empty() {
        reply.extend([0xc0, 12]);
        reply.extend(kind.to_be_bytes());
        reply.extend([0, 1, 0, 0, 0, 60]);
        reply.extend((data.len() as u16).to_be_bytes());
        reply.extend(data);
    }
    Some(reply)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_name_is_known() {
        let mut query = vec![9, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in NAME.split('.') {
            query.push(label.len() as u8);
            query.extend(label.bytes());
        }
        query.extend([0, 0, 1, 0, 1]);
        let reply = answer(&query).unwrap();
        assert_eq!((&reply[..2], reply[7]), (&[9, 9][..], 1));
        assert!(reply.ends_with(&ALLOWED_V4.octets()));
        query[13] = b'x';
        assert_eq!(answer(&query).unwrap()[3] & 15, 3);
        assert_eq!(answer(&query[..20]), None);
    }
}
