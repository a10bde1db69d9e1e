//! Outputs to a real receiver of syslog: rsyslog, over TLS with certificates on
//! both ends, TCP, UDP and a unix socket, also when it is killed.

mod support;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use support::collector::{batches, feed};
use support::receiver::{Collecting, Key, assert_all, certificates, free_port, got, missing, spawn, until};
use tokio::process::Child;

fn skipped() -> bool {
    missing("rsyslogd", "rsyslog") || {
        let plugins =
            ["/usr/lib/x86_64-linux-gnu/rsyslog", "/usr/lib/aarch64-linux-gnu/rsyslog", "/usr/lib/rsyslog"];
        let there = plugins.iter().any(|p| Path::new(p).join("lmnsd_ossl.so").exists());
        if !there {
            println!("SKIP: rsyslog has no TLS (Debian package rsyslog-openssl)");
        }
        !there
    }
}

struct Rsyslog {
    dir: PathBuf,
    input: String,
    child: Option<Child>,
}

impl Rsyslog {
    async fn start(dir: &Path, input: String) -> Rsyslog {
        let mut rsyslog = Rsyslog { dir: dir.to_owned(), input, child: None };
        rsyslog.run().await;
        rsyslog
    }

    fn file(&self) -> PathBuf {
        self.dir.join("got")
    }

    async fn run(&mut self) {
        let d = self.dir.display();
        let config = format!(
            r#"
global(workDirectory="{d}" maxMessageSize="256k" net.enableDNS="off"
  defaultNetstreamDriver="ossl" defaultNetstreamDriverCAFile="{d}/ca.pem"
  defaultNetstreamDriverCertFile="{d}/server.pem" defaultNetstreamDriverKeyFile="{d}/server-key.pem")
template(name="line" type="string" string="%pri% %hostname% %app-name% %msgid% %structured-data% %msg%\n")
{}
action(type="omfile" file="{d}/got" template="line")
"#,
            self.input
        );
        let path = self.dir.join("rsyslog.conf");
        std::fs::write(&path, config).unwrap();
        let pid = self.dir.join("rsyslog.pid");
        let _ = std::fs::remove_file(&pid);
        let mut child = spawn("rsyslogd", &["-n", "-f", path.to_str().unwrap(), "-i", pid.to_str().unwrap()]);
        until("rsyslogd runs", || {
            assert!(child.try_wait().unwrap().is_none(), "rsyslogd -N1 -f {} says why", path.display());
            pid.exists()
        })
        .await;
        self.child = Some(child);
    }

    async fn kill(&mut self) {
        self.child.take().unwrap().kill().await.unwrap();
    }

    fn has(&self, wanted: &BTreeSet<Key>) -> bool {
        let seen: BTreeSet<Key> = got(&self.file()).iter().map(support::receiver::key).collect();
        seen.is_superset(wanted)
    }
}

fn tls_input(port: u16, verified: bool) -> String {
    let mode = if verified { "x509/certvalid" } else { "anon" };
    format!(
        r#"module(load="imtcp" streamDriver.name="ossl" streamDriver.mode="1" streamDriver.authMode="{mode}")
input(type="imtcp" address="127.0.0.1" port="{port}")"#
    )
}

fn tls_output(port: u16, certificate: bool) -> String {
    let pair = if certificate { ", cert: client.pem, key: client-key.pem" } else { "" };
    format!(
        "outputs:\n  - name: siem\n    syslog: {{address: 'tls://127.0.0.1:{port}', ca: ca.pem{pair}, resend: 2s}}\n"
    )
}

/// rsyslog that wants a certificate, and a collector with one or without; `None`:
/// there is no rsyslog.
async fn over_tls(certificate: bool) -> Option<(tempfile::TempDir, u16, Rsyslog, Collecting)> {
    if skipped() {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let port = free_port();
    let rsyslog = Rsyslog::start(dir.path(), tls_input(port, true)).await;
    let collecting = Collecting::start(dir.path(), &tls_output(port, certificate), &[]).await;
    Some((dir, port, rsyslog, collecting))
}

async fn send(collecting: &Collecting, sensor: &str, seqs: std::ops::RangeInclusive<u64>) {
    feed(&collecting.address, sensor, "b1", batches(seqs, 100)).await;
}

fn keys(sensor: &str, seqs: std::ops::RangeInclusive<u64>) -> BTreeSet<Key> {
    seqs.map(|seq| (sensor.to_owned(), "b1".to_owned(), seq)).collect()
}

#[tokio::test]
async fn over_tls_with_certificates_everything_that_is_stored_arrives_as_it_is() {
    let Some((dir, port, rsyslog, collecting)) = over_tls(true).await else { return };
    tokio::join!(send(&collecting, "web-1", 1..=3000), send(&collecting, "web-2", 1..=2000));
    collecting.wait("ndjson", |s| s.delivered == 5000).await;
    let wanted: BTreeSet<Key> = collecting.stored().into_iter().collect();
    assert_eq!(wanted.len(), 5000);
    until("everything is there", || rsyslog.has(&wanted)).await;
    let values = got(&rsyslog.file());
    assert_eq!(values.len(), 5000, "nothing broke, so nothing came twice");
    assert_all(&values, &wanted);
    let text = std::fs::read_to_string(rsyslog.file()).unwrap();
    let first = text.lines().find(|l| l.contains(r#"sensor="web-1" boot="b1" seq="1""#)).unwrap();
    // local0.info; the fields as rsyslog read them.
    assert!(first.starts_with(r#"134 web-1 mcp-sensor exec [mcp@32473 sensor="web-1""#), "{first}");
    let state = collecting.wait("siem", |s| s.lag == 0).await;
    assert_eq!((state.kind.as_str(), state.delivered, state.lost, state.retries), ("syslog", 5000, 0, 0));
    // rsyslog ends its connection as well: the cursor is at the end, nothing comes again.
    assert!(collecting.stop().await);
    let again = Collecting::start(dir.path(), &tls_output(port, true), &[]).await;
    send(&again, "web-1", 3001..=3100).await;
    let more = keys("web-1", 3001..=3100);
    until("what is new is there", || rsyslog.has(&more)).await;
    assert_eq!(got(&rsyslog.file()).len(), 5100);
}

#[tokio::test]
async fn a_client_without_certificate_is_refused_and_its_events_wait() {
    let Some((dir, port, rsyslog, collecting)) = over_tls(false).await else { return };
    send(&collecting, "web-1", 1..=500).await;
    let state = collecting.wait("siem", |s| s.retries >= 3).await;
    assert!(!state.error.is_empty() && state.lost == 0, "{state:?}");
    assert!(got(&rsyslog.file()).is_empty());
    collecting.stop().await;
    let collecting = Collecting::start(dir.path(), &tls_output(port, true), &[]).await;
    let wanted = keys("web-1", 1..=500);
    until("they have arrived", || rsyslog.has(&wanted)).await;
    assert_all(&got(&rsyslog.file()), &wanted);
    collecting.wait("siem", |s| s.error.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_and_a_collector_that_are_killed_lose_nothing() {
    if skipped() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let port = free_port();
    let output = tls_output(port, true);
    let mut rsyslog = Rsyslog::start(dir.path(), tls_input(port, true)).await;
    let mut collecting = Collecting::start(dir.path(), &output, &[]).await;
    let mut next = 1;
    for round in 0..4u64 {
        let (until, sending) = (next + 4999, &collecting);
        let length = |r: &Rsyslog| std::fs::metadata(r.file()).map_or(0, |m| m.len());
        // When it has some of these, and not all.
        let some = length(&rsyslog) + 30_000 * (round + 1);
        let killing = async {
            support::receiver::until("some are there", || length(&rsyslog) > some).await;
            rsyslog.kill().await;
        };
        tokio::join!(send(sending, "web-1", next..=until), killing);
        next = until + 1;
        rsyslog.run().await;
        if round % 2 == 1 {
            collecting.kill().await;
            collecting = Collecting::start(dir.path(), &output, &[]).await;
        }
    }
    let wanted = keys("web-1", 1..=next - 1);
    until("everything is there", || rsyslog.has(&wanted)).await;
    assert_all(&got(&rsyslog.file()), &wanted);
    let state = collecting.wait("siem", |s| s.lag == 0 && s.error.is_empty()).await;
    assert_eq!(state.lost, 0);
}

#[tokio::test]
async fn tcp_udp_and_a_unix_socket_carry_the_same() {
    if skipped() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let (tcp, udp, socket) = (free_port(), free_port(), dir.path().join("log"));
    let socket = socket.display();
    for (input, address) in [
        (
            format!("module(load=\"imtcp\")\ninput(type=\"imtcp\" address=\"127.0.0.1\" port=\"{tcp}\")"),
            format!("tcp://127.0.0.1:{tcp}"),
        ),
        (
            format!(
                "module(load=\"imudp\")\ninput(type=\"imudp\" address=\"127.0.0.1\" port=\"{udp}\" rcvbufSize=\"4m\")"
            ),
            format!("udp://127.0.0.1:{udp}"),
        ),
        (
            format!(
                "module(load=\"imuxsock\" sysSock.use=\"off\")\ninput(type=\"imuxsock\" socket=\"{socket}\" \
                 useSpecialParser=\"off\" parseHostname=\"on\")"
            ),
            format!("unix:{socket}"),
        ),
    ] {
        let _ = std::fs::remove_file(dir.path().join("got"));
        let _ = std::fs::remove_dir_all(dir.path().join("events"));
        let mut rsyslog = Rsyslog::start(dir.path(), input).await;
        let outputs =
            format!("outputs:\n  - name: siem\n    syslog: {{address: '{address}', facility: audit}}\n");
        let collecting = Collecting::start(dir.path(), &outputs, &[]).await;
        send(&collecting, "web-1", 1..=100).await;
        let wanted = keys("web-1", 1..=100);
        until(&address, || rsyslog.has(&wanted)).await;
        assert_all(&got(&rsyslog.file()), &wanted);
        let text = std::fs::read_to_string(rsyslog.file()).unwrap();
        assert!(
            text.lines().all(|l| l.starts_with("110 web-1 mcp-sensor exec [mcp@32473 ")),
            "{address}\n{text}"
        );
        // Gone and back: what is stored meanwhile arrives.
        rsyslog.kill().await;
        if address.starts_with("unix:") {
            let _ = std::fs::remove_file(dir.path().join("log"));
        }
        send(&collecting, "web-1", 101..=150).await;
        collecting.wait("siem", |s| s.retries > 0).await;
        rsyslog.run().await;
        let wanted = keys("web-1", 1..=150);
        until(&address, || rsyslog.has(&wanted)).await;
        assert!(collecting.stop().await);
        rsyslog.kill().await;
    }
}
