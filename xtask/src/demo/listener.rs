//! One page over HTTP on the far side of the wire.

use std::{
    io::{BufRead, BufReader, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Result;
use mcp_sensor_tests::network::Network;

pub(crate) const PORT: u16 = 8080;
pub(crate) const PAGE: &str = "Greetings from the far side of the wire.";

/// Serves until the program ends.
pub(crate) struct Listener {
    requests: Arc<AtomicU64>,
}

impl Listener {
    pub(crate) fn new(network: &Network) -> Result<Self> {
        let listener = network.peer.within(|| Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?))?;
        let requests = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&requests);
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                count.fetch_add(1, Ordering::Relaxed);
                // A client that goes away early is its own affair.
                let _ = answer(&connection);
            }
        });
        Ok(Self { requests })
    }

    /// Connections that were accepted.
    pub(crate) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }
}

fn answer(connection: &TcpStream) -> std::io::Result<()> {
    connection.set_read_timeout(Some(Duration::from_secs(5)))?;
    for line in BufReader::new(connection).lines() {
        if line?.is_empty() {
            break;
        }
    }
    let mut out = connection;
    // Plain text: for HTML, mcp-server-fetch asks npm for a converter first,
    // and there is no npm on this wire.
    write!(
        out,
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{PAGE}",
        PAGE.len()
    )
}
