//! What a labelled connection moved is told when its socket is closed: exactly
//! the IP packets that a sniffer beside it sees until then, and how it ended.

use anyhow::{Context, Result, ensure};
use mcp_sensor_tests::bed::{Bed, LIMIT};
use mcp_sensor_tests::dns::zone::Zone;
use mcp_sensor_tests::events::Event;
use mcp_sensor_tests::frame::{Frame, L4};
use mcp_sensor_tests::mcp::listening::{self, Listener};
use mcp_sensor_tests::names::{self, API, NAMED};
use mcp_sensor_tests::network::Family;
use mcp_sensor_tests::peer::{Client, OTHER_PORT, PORT};
use mcp_sensor_tests::policy::{OPEN, Policy, WIRE};
use mcp_sensor_tests::run::{Running, built};
use mcp_sensor_tests::sensor::{SOON, Sensor};
use mcp_sensor_tests::sniffer::Sniffer;
use mcp_sensor_tests::spec::must;
use mcp_sensor_tests::step::Step;
use std::net::{IpAddr, SocketAddr};

/// Both ways until the server's own FIN, which it sends when the socket is
/// closed: (packets, bytes) sent and received, IP headers included.
#[derive(Debug, Default, PartialEq, Eq)]
struct Moved {
    sent: (u64, u64),
    received: (u64, u64),
}

impl Moved {
    fn seen(frames: &[Frame], family: Family) -> Moved {
        let mut moved = Moved::default();
        for frame in frames {
            let Frame::Ip { src, len, l4: L4::Tcp { .. } | L4::Udp { .. }, .. } = frame else { continue };
            let own = *src == family.server();
            if own && frame.is_fin() {
                break;
            }
            let side = if own { &mut moved.sent } else { &mut moved.received };
            *side = (side.0 + 1, side.1 + *len as u64);
        }
        moved
    }

    fn told(event: &Event) -> Moved {
        let number = |key: &str| event.number(key).unwrap_or(0);
        Moved {
            sent: (number("packets_sent"), number("bytes_sent")),
            received: (number("packets_received"), number("bytes_received")),
        }
    }
}

fn payload(frames: &[Frame], family: Family) -> usize {
    let own = |f: &&Frame| matches!(f, Frame::Ip { src, .. } if *src == family.server());
    frames.iter().filter(own).map(Frame::payload).sum()
}

/// `key`: `src.ip` or `dst.ip`, where the far end stands.
fn end(sensor: &Sensor, server: &str, what: &str, key: &str, far: IpAddr) -> Result<Event> {
    let event = sensor.events().wait_for(what, SOON, |e| {
        e.text("type") == "connection_end"
            && e.text("server") == server
            // Python's listeners take IPv4 on IPv6 sockets.
            && e.text(key).trim_start_matches("::ffff:") == far.to_string()
    })?;
    ensure!(event.number("duration_ns").is_some_and(|d| d > 0), "no duration: {}", event.0);
    ensure!(event.number("cookie").is_some() && !event.text("instance").is_empty(), "{}", event.0);
    Ok(event)
}

fn steps(bed: &Bed, sensor: &Sensor, server: &str, steps: &[Step]) -> Result<()> {
    let mut command = bed.labelled(sensor, server, built("attempt")?)?;
    command.args(["steps", "--", &serde_json::to_string(steps)?]);
    let outcomes = names::outcomes(Running::start(command)?, LIMIT)?;
    ensure!(outcomes.len() == steps.len(), "{outcomes:?}");
    Ok(())
}

fn world() -> Result<(Bed, Sniffer, Sensor)> {
    let bed = Bed::new()?;
    let sniffer = Sniffer::both_ways(&bed.network)?;
    let sensor = Sensor::start(&bed, &Policy::standard())?;
    sniffer.frames()?;
    Ok((bed, sniffer, sensor))
}

fn out_over_tcp(family: Family) -> Result<()> {
    let (bed, sniffer, sensor) = world()?;
    let to = SocketAddr::new(family.allowed(), PORT);
    let mut all = vec![Step::Open { to }];
    all.extend(std::iter::repeat_n(Step::Talk, 20));
    steps(&bed, &sensor, WIRE, &all)?;
    let event = end(&sensor, WIRE, "the end of a connection", "dst.ip", to.ip())?;
    let frames = sniffer.frames()?;
    let seen = Moved::seen(&frames, family);
    ensure!(Moved::told(&event) == seen, "seen: {seen:?}, told: {}", event.0);
    ensure!(payload(&frames, family) as u64 == bed.peer.stream_bytes(), "proves nothing: {frames:?}");
    let text = |key: &str| event.text(key);
    ensure!(
        (text("outcome"), text("protocol"), text("direction")) == ("closed", "tcp", "egress"),
        "{}",
        event.0
    );
    ensure!(
        text("dst.ip") == to.ip().to_string() && event.number("dst.port") == Some(PORT.into()),
        "{}",
        event.0
    );
    ensure!(text("src.ip") == family.server().to_string(), "{}", event.0);
    Ok(())
}

fn out_over_udp(family: Family) -> Result<()> {
    let (bed, sniffer, sensor) = world()?;
    let to = SocketAddr::new(family.allowed(), PORT);
    steps(&bed, &sensor, WIRE, &[Step::Datagram { to }])?;
    let event = end(&sensor, WIRE, "the end of a datagram socket", "dst.ip", to.ip())?;
    let seen = Moved::seen(&sniffer.frames()?, family);
    ensure!(seen.sent.0 == 1 && seen.received.0 == 1, "proves nothing: {seen:?}");
    ensure!(Moved::told(&event) == seen, "seen: {seen:?}, told: {}", event.0);
    ensure!((event.text("outcome"), event.text("protocol")) == ("closed", "udp"), "{}", event.0);
    Ok(())
}

/// The client closes first, so that nothing is under way when the server does.
fn in_over_tcp(family: Family) -> Result<()> {
    let bed = Bed::new()?;
    let sniffer = Sniffer::both_ways(&bed.network)?;
    let listener = Listener::plain(&bed, "called-and-closed", "statuses.py", &[])?;
    let sensor = Sensor::start(&bed, &listener.declared(Policy::default()))?;
    let _running = listener.start(&bed)?;
    sniffer.frames()?;
    let own = SocketAddr::new(family.server(), listening::PORT);
    let client = Client::tcp(&bed.network, family.allowed(), own)?;
    client.ask(b"GET /200 HTTP/1.1\r\n\r\n", LIMIT)?.context("no answer")?;
    drop(client);
    let event = end(&sensor, listener.name, "the end of an accepted connection", "src.ip", family.allowed())?;
    let seen = Moved::seen(&sniffer.frames()?, family);
    // The handshake is the listener's: SYN with 40 bytes of TCP, ACK with 32.
    let ip = if family == Family::V4 { 20 } else { 40 };
    let mut told = Moved::told(&event);
    told.received = (told.received.0 + 2, told.received.1 + 2 * ip + 40 + 32);
    told.sent = (told.sent.0 + 1, told.sent.1 + ip + 40);
    ensure!(told == seen, "seen: {seen:?}, told: {}", event.0);
    let text = |key: &str| event.text(key);
    ensure!((text("outcome"), text("direction")) == ("closed", "inbound"), "{}", event.0);
    let dst = (text("dst.ip"), event.number("dst.port"));
    ensure!(dst == (own.ip().to_string().as_str(), Some(own.port().into())), "{}", event.0);
    Ok(())
}

/// Packets that were dropped were not sent.
fn denied(family: Family) -> Result<()> {
    let (bed, sniffer, sensor) = world()?;
    // The address is allowed, which is all that connect() is asked; the port is not.
    let to = family.allowed();
    let arguments = ["udp-connect-send", "--to", &to.to_string(), "--port", &OTHER_PORT.to_string()];
    bed.try_out(bed.labelled_attempt(&sensor, WIRE, &arguments.map(String::from))?)?;
    let event = end(&sensor, WIRE, "the end of a denied socket", "dst.ip", to)?;
    let seen = Moved::seen(&sniffer.frames()?, family);
    ensure!(seen == Moved::default() && Moved::told(&event) == seen, "seen: {seen:?}, told: {}", event.0);
    ensure!(event.text("outcome") == "denied", "{}", event.0);
    Ok(())
}

fn refused_by_the_far_end(family: Family) -> Result<()> {
    let (bed, sniffer, sensor) = world()?;
    // Nobody listens there.
    let to = SocketAddr::new(family.allowed(), 9);
    steps(&bed, &sensor, OPEN, &[Step::Connect { to }])?;
    let event = end(&sensor, OPEN, "the end of a refused connection", "dst.ip", to.ip())?;
    let seen = Moved::seen(&sniffer.frames()?, family);
    ensure!(seen.sent.0 == 1 && seen.received.0 == 1, "proves nothing: {seen:?}");
    ensure!(Moved::told(&event) == seen, "seen: {seen:?}, told: {}", event.0);
    ensure!(event.text("outcome") == "reset", "{}", event.0);
    Ok(())
}

macro_rules! both {
    ($($name:ident: $test:expr;)+) => {
        $(mod $name {
            use super::*;
            #[test]
            fn v4() { must(|| $test(Family::V4)); }
            #[test]
            fn v6() { must(|| $test(Family::V6)); }
        })+
    };
}

both! {
    a_tcp_connection_tells_what_it_moved: out_over_tcp;
    a_datagram_socket_tells_what_it_moved: out_over_udp;
    an_accepted_connection_tells_what_it_moved: in_over_tcp;
    what_was_dropped_was_not_sent: denied;
    a_refused_connection_was_reset: refused_by_the_far_end;
}

#[test]
fn a_far_end_has_the_name_it_was_learned_by() {
    must(|| {
        let world = names::World::new(true, || Zone::new().host(API, &[names::ip("198.51.100.7")]))?;
        let ran =
            world.run(&[names::ask(API, 1), names::connect(names::ip("198.51.100.7"), names::PLAIN)])?;
        ensure!(ran.outcomes.iter().all(|o| o.answered()), "proves nothing: {:?}", ran.outcomes);
        let sensor = world.sensor.as_ref().context("a sensor")?;
        let event = sensor.events().wait_for("the end of a named connection", SOON, |e| {
            e.text("type") == "connection_end" && e.text("server") == NAMED && e.text("protocol") == "tcp"
        })?;
        ensure!(event.text("dst.name") == API && event.text("outcome") == "closed", "{}", event.0);
        Ok(())
    });
}
