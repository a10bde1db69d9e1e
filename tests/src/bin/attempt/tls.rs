//! ClientHellos: by hand, so that they can be cut and altered, and by a real
//! client that goes all the way.

use crate::wire::*;
use mcp_sensor_tests::step::{Cut, Hello};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// TLS record types (RFC 8446, 5.1).
const HANDSHAKE: u8 = 22;
const MOMENT: Duration = Duration::from_millis(40);
const PATIENCE: Duration = Duration::from_secs(2);

/// `true`: the server took it for a hello and said hello.
pub(crate) fn hello(to: SocketAddr, hello: &Hello) -> Tried {
    let s = socket_for(to.ip(), libc::SOCK_STREAM, 0)?;
    set(&s, "TCP_NODELAY", libc::IPPROTO_TCP, libc::TCP_NODELAY, &1i32)?;
    connect(&s, to)?;
    let message = client_hello(hello);
    match hello.cut {
        Cut::Whole => send(&s, &record(&message), 0)?,
        Cut::Records(at) => send(&s, &[record(&message[..at]), record(&message[at..])].concat(), 0)?,
        Cut::More(at) => {
            let bytes = record(&message);
            send(&s, &bytes[..at], libc::MSG_MORE)?;
            send(&s, &bytes[at..], 0)?;
        }
        Cut::At(at) => {
            let bytes = record(&message);
            send(&s, &bytes[..at], 0)?;
            std::thread::sleep(MOMENT);
            send(&s, &bytes[at..], 0)?;
        }
    }
    if let Some(second) = &hello.second {
        std::thread::sleep(MOMENT);
        send(&s, &record(&client_hello(second)), 0)?;
        // What the server said to the first could be read for long: the end of
        // the connection shows when something is sent.
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            std::thread::sleep(MOMENT);
            send(&s, &[0], 0)?;
        }
    }
    let mut stream = TcpStream::from(s);
    Ok(crate::steps::first_byte(&mut stream)? == HANDSHAKE)
}

fn record(fragment: &[u8]) -> Vec<u8> {
    let mut bytes = vec![HANDSHAKE, 3, 1];
    bytes.extend((fragment.len() as u16).to_be_bytes());
    bytes.extend(fragment);
    bytes
}

fn sized(bytes: &[u8]) -> Vec<u8> {
    let mut all = (bytes.len() as u16).to_be_bytes().to_vec();
    all.extend(bytes);
    all
}

fn extension(all: &mut Vec<u8>, kind: u16, body: &[u8]) {
    all.extend(kind.to_be_bytes());
    all.extend(sized(body));
}

/// TLS 1.3 with an X25519 share (RFC 8446, 4.1.2): enough for a ServerHello.
fn client_hello(hello: &Hello) -> Vec<u8> {
    let mut extensions = Vec::new();
    if !hello.names.is_empty() {
        let mut names = Vec::new();
        for name in &hello.names {
            names.push(0);
            names.extend(sized(name.as_bytes()));
        }
        extension(&mut extensions, 0, &sized(&names));
    }
    // supported_groups, signature_algorithms, supported_versions, key_share
    extension(&mut extensions, 10, &sized(&[0, 29]));
    extension(&mut extensions, 13, &sized(&[4, 3, 8, 4, 8, 7]));
    extension(&mut extensions, 43, &[2, 3, 4]);
    let mut share = vec![0, 29];
    share.extend(sized(&[9; 32]));
    extension(&mut extensions, 51, &sized(&share));
    if hello.ech {
        // outer, HKDF-SHA256 with AES-128-GCM, config 1, a key, a payload
        let mut body = vec![0, 0, 1, 0, 1, 1];
        body.extend(sized(&[7; 32]));
        body.extend(sized(&[8; 64]));
        extension(&mut extensions, 0xfe0d, &body);
    }
    if hello.padding > 0 {
        extension(&mut extensions, 21, &vec![0; hello.padding]);
    }
    let mut body = vec![3, 3];
    body.extend([5; 32]);
    body.push(32);
    body.extend([6; 32]);
    body.extend(sized(&[0x13, 1]));
    body.extend([1, 0]);
    body.extend(sized(&extensions));
    let mut message = vec![1];
    message.extend(&(body.len() as u32).to_be_bytes()[1..]);
    message.extend(body);
    message
}

/// GET / over TLS; an empty `sni` sends none.
pub(crate) fn get(to: SocketAddr, sni: &str, ca: &Path) -> Result<String, Stop> {
    let bad = |step| Stop { step, errno: libc::EINVAL };
    let mut roots = RootCertStore::empty();
    let certificate = CertificateDer::from_pem_file(ca).map_err(|_| bad("CA"))?;
    roots.add(certificate).map_err(|_| bad("CA"))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|_| bad("versions"))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.enable_sni = !sni.is_empty();
    // Without a name the certificate is checked for the address.
    let name = if sni.is_empty() { to.ip().to_string() } else { sni.to_string() };
    let name = ServerName::try_from(name).map_err(|_| bad("name"))?;
    let mut connection = ClientConnection::new(Arc::new(config), name).map_err(|_| bad("TLS"))?;
    let s = socket_for(to.ip(), libc::SOCK_STREAM, 0)?;
    connect(&s, to)?;
    let mut stream = TcpStream::from(s);
    let io = |step| {
        move |e: std::io::Error| match e.kind() {
            ErrorKind::WouldBlock => Stop { step, errno: libc::ETIMEDOUT },
            // rustls's own errors have no number.
            _ => Stop { step, errno: e.raw_os_error().unwrap_or(libc::EPROTO) },
        }
    };
    stream.set_read_timeout(Some(PATIENCE)).map_err(io("SO_RCVTIMEO"))?;
    let mut tls = rustls::Stream::new(&mut connection, &mut stream);
    let request = "GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
    tls.write_all(request.as_bytes()).map_err(io("TLS"))?;
    let mut page = [0; 4096];
    let n = tls.read(&mut page).map_err(io("the page"))?;
    Ok(String::from_utf8_lossy(&page[..n]).into_owned())
}
