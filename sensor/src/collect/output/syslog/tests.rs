//! Syslog to receivers that end, do not read, or come back.

use super::*;
use crate::event::Event;
use std::io::Read as _;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

fn syslog(address: &str, change: impl FnOnce(&mut Settings)) -> Syslog {
    let mut settings = Settings {
        address: address.parse().unwrap(),
        tls: None,
        facility: 16,
        app_name: "mcp-sensor".to_owned(),
        framing: Framing::OctetCounting,
        max_bytes: 1 << 20,
        resend: Duration::from_secs(60),
    };
    change(&mut settings);
    Syslog {
        name: "s".to_owned(),
        format: Format::Ndjson,
        settings,
        link: None,
        marks: VecDeque::new(),
        safe: 0,
        begun: None,
        text: Vec::new(),
        message: Vec::new(),
    }
}

fn events(seqs: std::ops::Range<u64>, bytes: usize) -> Vec<Event> {
    let boot = "b".repeat(bytes);
    seqs.map(|seq| Event { seq, boot: boot.clone(), ..Default::default() }).collect()
}

fn batch(events: &[Event]) -> Batch<'_> {
    let (from, next) = (events[0].seq, events[events.len() - 1].seq + 1);
    Batch { log: 1, from, next, events }
}

fn taken(delivered: io::Result<Delivered>) -> Vec<Refused> {
    match delivered {
        Ok(Delivered::Taken(refused)) => refused,
        other => panic!("{other:?}"),
    }
}

/// The numbers in frames of octet counting.
fn numbers(mut bytes: &[u8]) -> Vec<u64> {
    let mut numbers = Vec::new();
    while !bytes.is_empty() {
        let space = bytes.iter().position(|b| *b == b' ').unwrap();
        let length: usize = std::str::from_utf8(&bytes[..space]).unwrap().parse().unwrap();
        numbers.push(number(&bytes[space + 1..][..length]));
        bytes = &bytes[space + 1 + length..];
    }
    numbers
}

fn number(message: &[u8]) -> u64 {
    let text = std::str::from_utf8(message).unwrap();
    let (_, rest) = text.split_once(" seq=\"").unwrap();
    rest.split_once('"').unwrap().0.parse().unwrap()
}

fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", listener.local_addr().unwrap());
    (listener, address)
}

fn read_all(mut socket: TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    socket.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Until the cursor is where it should be.
fn settles(output: &mut Syslog) -> Settled {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        assert!(Instant::now() < deadline);
        match output.settle().unwrap() {
            Settled::Upto(..) => std::thread::sleep(Duration::from_millis(5)),
            other => return other,
        }
    }
}

#[test]
fn a_receiver_that_reads_to_the_end_has_everything() {
    let (listener, address) = listen();
    let mut output = syslog(&address, |_| ());
    let reader = std::thread::spawn(move || read_all(listener.accept().unwrap().0));
    assert_eq!(taken(output.deliver(&batch(&events(1..300, 50)))), []);
    assert!(matches!(output.settle().unwrap(), Settled::Upto(0, _)), "it may still be lost");
    assert!(matches!(output.finish().unwrap(), Settled::All(_)));
    assert!(numbers(&reader.join().unwrap()).into_iter().eq(1..300));
}

#[test]
fn what_was_taken_long_enough_ago_is_safe() {
    let (listener, address) = listen();
    let mut output = syslog(&address, |s| s.resend = Duration::from_millis(20));
    taken(output.deliver(&batch(&events(1..3, 1))));
    let _socket = listener.accept().unwrap();
    assert!(matches!(settles(&mut output), Settled::All(_)));
}

#[test]
fn when_the_receiver_ends_everything_since_the_safe_cursor_comes_again() {
    let (listener, address) = listen();
    let mut output = syslog(&address, |_| ());
    taken(output.deliver(&batch(&events(1..3, 1))));
    drop(listener.accept().unwrap());
    assert!(matches!(settles(&mut output), Settled::Back(_)));
    // Nothing is under way any more: the same batch is tried.
    drop(listener);
    assert!(output.deliver(&batch(&events(1..3, 1))).is_err());
}

#[test]
fn a_receiver_that_does_not_read_holds_up_its_output_and_loses_nothing() {
    let (listener, address) = listen();
    let mut output = syslog(&address, |_| ());
    let large = |n: u64| events(n * 100..n * 100 + 100, 60_000);
    let mut sent = 0;
    let stuck = loop {
        match output.deliver(&batch(&large(sent))) {
            Ok(Delivered::Taken(_)) => sent += 1,
            Err(error) => break error,
            other => panic!("{other:?}"),
        }
        assert!(sent < 50, "this is more than sockets hold");
    };
    assert!(stuck.to_string().contains("does not read"), "{stuck}");
    let reader = std::thread::spawn(move || read_all(listener.accept().unwrap().0));
    while !matches!(output.deliver(&batch(&large(sent))), Ok(Delivered::Taken(_))) {}
    assert!(matches!(output.finish().unwrap(), Settled::All(_)));
    assert!(numbers(&reader.join().unwrap()).into_iter().eq(0..(sent + 1) * 100));
}

#[test]
fn what_is_too_large_is_refused_and_the_rest_goes_on() {
    let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut output = syslog(&format!("udp://{}", receiver.local_addr().unwrap()), |s| s.max_bytes = 2000);
    let mut mixed = events(1..4, 1);
    mixed[1] = events(2..3, 3000).remove(0);
    let refused = taken(output.deliver(&batch(&mixed)));
    assert_eq!(refused, [Refused { event: 1, reason: TOO_LARGE }]);
    let mut bytes = [0; 4096];
    let first = receiver.recv(&mut bytes).map(|n| number(&bytes[..n])).unwrap();
    let second = receiver.recv(&mut bytes).map(|n| number(&bytes[..n])).unwrap();
    assert_eq!((first, second), (1, 3));
}

#[test]
fn a_datagram_that_nobody_took_comes_again() {
    let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = receiver.local_addr().unwrap();
    drop(receiver);
    let mut output = syslog(&format!("udp://{address}"), |_| ());
    let some = events(1..3, 1);
    match output.deliver(&batch(&some)) {
        Ok(Delivered::Taken(_)) => assert!(matches!(settles(&mut output), Settled::Back(_))),
        // The answer to the first came before the second.
        other => assert!(other.is_err(), "{other:?}"),
    }
}

#[test]
fn a_unix_socket_has_everything_when_its_program_has_read_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let absent = |path: &Path| syslog(&format!("unix:{}", path.display()), |_| ());
    assert!(absent(&path).deliver(&batch(&events(1..2, 1))).is_err());
    let receiver = UnixDatagram::bind(&path).unwrap();
    let mut output = absent(&path);
    let reader = std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        let mut next = || receiver.recv(&mut bytes).map(|n| number(&bytes[..n])).unwrap();
        let read: Vec<u64> = (1..500).map(|_| next()).collect();
        read
    });
    taken(output.deliver(&batch(&events(1..500, 100))));
    assert!(matches!(output.finish().unwrap(), Settled::All(_)));
    assert!(reader.join().unwrap().into_iter().eq(1..500));
}

#[test]
fn a_unix_stream_has_a_line_for_each_message() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let change = |s: &mut Settings| s.framing = Framing::Newline;
    let mut output = syslog(&format!("unix-stream:{}", path.display()), change);
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        listener.accept().unwrap().0.read_to_string(&mut text).unwrap();
        text.lines().map(|l| number(l.as_bytes())).collect::<Vec<u64>>()
    });
    taken(output.deliver(&batch(&events(1..200, 100))));
    assert!(matches!(output.finish().unwrap(), Settled::All(_)));
    assert!(reader.join().unwrap().into_iter().eq(1..200));
}
