//! HTTPS on the peer's side, with a CA of the test's own, and every byte that
//! a client said before and after it was understood.

use crate::network::Network;
use crate::service::PAGE;
use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection};
use std::io::{Read, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub const PORT: u16 = 443;
const PATIENCE: Duration = Duration::from_secs(3);

/// Ends on drop; connections that are open end by themselves.
pub struct TlsServer {
    pub ca: PathBuf,
    stop: Arc<AtomicBool>,
    heard: Arc<Mutex<Vec<u8>>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Groups {
    /// What clients guess first.
    Usual,
    /// One that no client sends a share for: HelloRetryRequest.
    Unguessed,
}

impl TlsServer {
    /// For `names` and addresses, on `port` of every address of the peer.
    pub fn start(
        network: &Network,
        folder: &Path,
        names: &[&str],
        port: u16,
        groups: Groups,
    ) -> Result<TlsServer> {
        let (config, ca) = config(names, groups)?;
        let path = folder.join(format!("ca-{port}.pem"));
        std::fs::write(&path, ca)?;
        let listener = network.peer.within(move || {
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).context("https")?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        })?;
        let stop = Arc::new(AtomicBool::new(false));
        let heard = Arc::new(Mutex::new(Vec::new()));
        let thread = std::thread::spawn({
            let (stop, heard) = (stop.clone(), heard.clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let Ok((stream, _)) = listener.accept() else {
                        std::thread::sleep(Duration::from_millis(1));
                        continue;
                    };
                    let (config, heard) = (config.clone(), heard.clone());
                    std::thread::spawn(move || serve(&stream, config, &heard));
                }
            }
        });
        Ok(TlsServer { ca: path, stop, heard, thread: Some(thread) })
    }

    /// Bytes of TCP payload, from all clients.
    pub fn bytes(&self) -> usize {
        self.heard.lock().expect("heard").len()
    }

    /// Did any client say this in the clear?
    pub fn heard(&self, what: &str) -> bool {
        let heard = self.heard.lock().expect("heard");
        !heard.is_empty() && (what.is_empty() || heard.windows(what.len()).any(|w| w == what.as_bytes()))
    }

    /// The same, soon: a client may be gone before the server has read.
    pub fn hears(&self, what: &str) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while !self.heard(what) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.heard(what)
    }
}

impl Drop for TlsServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn config(names: &[&str], groups: Groups) -> Result<(Arc<ServerConfig>, String)> {
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    authority.distinguished_name.push(rcgen::DnType::CommonName, "mcp-sensor test CA");
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let mut leaf = CertificateParams::new(names.iter().map(|n| n.to_string()).collect::<Vec<_>>())?;
    leaf.use_authority_key_identifier_extension = true;
    let leaf = leaf.signed_by(&key, &authority)?;
    let mut provider: CryptoProvider = ring::default_provider();
    if groups == Groups::Unguessed {
        provider.kx_groups = vec![ring::kx_group::SECP384R1];
    }
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key)?;
    Ok((Arc::new(config), authority.pem()))
}

/// Remembers what it reads.
struct Overheard<'a> {
    stream: &'a TcpStream,
    heard: &'a Mutex<Vec<u8>>,
}

impl Read for Overheard<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let n = self.stream.read(bytes)?;
        self.heard.lock().expect("heard").extend(&bytes[..n]);
        Ok(n)
    }
}

impl Write for Overheard<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.stream.flush()
    }
}

fn serve(stream: &TcpStream, config: Arc<ServerConfig>, heard: &Mutex<Vec<u8>>) {
    let mut wire = Overheard { stream, heard };
    let _ = stream.set_nonblocking(false);
    let _ = stream.set_nodelay(true);
    let _ = stream.set_read_timeout(Some(PATIENCE));
    if answer(&mut wire, config).is_none() {
        // What a client says after its error is heard as well.
        let _ = std::io::copy(&mut wire, &mut std::io::sink());
    }
}

/// One page for each request, until the client has enough.
fn answer(wire: &mut Overheard, config: Arc<ServerConfig>) -> Option<()> {
    let mut connection = ServerConnection::new(config).ok()?;
    let mut tls = rustls::Stream::new(&mut connection, wire);
    let mut request: Vec<u8> = Vec::new();
    let mut bytes = [0; 4096];
    loop {
        match tls.read(&mut bytes) {
            Ok(0) => return Some(()),
            Ok(n) => request.extend(&bytes[..n]),
            Err(_) => return None,
        }
        while let Some(end) = request.windows(4).position(|w| w == b"\r\n\r\n") {
            request.drain(..end + 4);
            let page = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n{PAGE}",
                PAGE.len()
            );
            tls.write_all(page.as_bytes()).ok()?;
        }
    }
}
