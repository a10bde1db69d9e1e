//! Others connect to the server: inbound rules, and what happens without one.

use anyhow::{Context, Result, bail, ensure};
use mcp_sensor_tests::bed::{Bed, LIMIT};
use mcp_sensor_tests::frame::{Frame, L4};
use mcp_sensor_tests::network::Family;
use mcp_sensor_tests::peer::{Client, PORT};
use mcp_sensor_tests::policy::{NONE, Policy, WIRE, allowed_cidr};
use mcp_sensor_tests::run::Running;
use mcp_sensor_tests::sensor::{SOON, Sensor};
use mcp_sensor_tests::spec::must;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

/// May be called on [`LISTEN`] from the allowed network.
const CALLED: &str = "called";
const LISTEN: u16 = 3901;
const ANSWER: Duration = Duration::from_millis(700);

fn policy() -> Policy {
    let (v4, v6) = (allowed_cidr(Family::V4), allowed_cidr(Family::V6));
    let rule =
        |protocol: &str| format!("  - {{from: [{v4}, \"{v6}\"], ports: [{LISTEN}], protocol: {protocol}}}\n");
    let body = format!("egress: []\ninbound:\n{}{}", rule("tcp"), rule("udp"));
    Policy::standard().profile("called", &body).server(CALLED, "called", "enforce", "")
}

struct Served {
    running: Running,
    address: SocketAddr,
}

/// Starts a serving attempt and waits until it has told its port.
fn serve(command: Command, family: Family) -> Result<Served> {
    let mut running = Running::start(command)?;
    loop {
        let line = running.line(LIMIT).context("the server does not listen")?;
        if let Some(port) = line.strip_prefix("port ") {
            return Ok(Served { running, address: SocketAddr::new(family.server(), port.parse()?) });
        }
        ensure!(!line.contains("outcome"), "the server does not listen: {line}");
    }
}

fn arguments(name: &str, family: Family, port: u16) -> Vec<String> {
    [name, "--to", &family.allowed().to_string(), "--port", &port.to_string()].map(String::from).to_vec()
}

#[derive(Clone, Copy)]
enum Ask {
    Tcp,
    Udp,
}

impl Ask {
    fn server(self) -> &'static str {
        match self {
            Ask::Tcp => "serve-tcp",
            Ask::Udp => "serve-udp",
        }
    }

    /// Did the peer get an answer?
    fn by_peer(self, bed: &Bed, from: std::net::IpAddr, to: SocketAddr) -> Result<bool> {
        let client = match self {
            Ask::Tcp => Client::tcp(&bed.network, from, to),
            Ask::Udp => Client::udp(&bed.network, from, to),
        };
        let Ok(client) = client else { return Ok(false) };
        Ok(client.ask(b"hello", ANSWER)? == Some(b"hello".to_vec()))
    }
}

fn no_answer_leaves(ask: Ask, family: Family, server: &str) -> Result<()> {
    let bed = Bed::new()?;
    let sensor = Sensor::start(&bed, &policy())?;
    let served =
        serve(bed.labelled_attempt(&sensor, server, &arguments(ask.server(), family, LISTEN))?, family);
    // bind() may say EPERM already.
    if let Ok(served) = served {
        ensure!(!ask.by_peer(&bed, family.allowed(), served.address)?, "the peer got an answer");
        let frames = bed.frames()?;
        ensure!(frames.is_empty(), "{server}: {frames:?}");
        served.running.finish(LIMIT)?;
    }
    sensor.events().wait_for("a denial", SOON, |e| e.is_denial_of(server))?;
    unlabelled_answers(ask, family, &bed)
}

fn unlabelled_answers(ask: Ask, family: Family, bed: &Bed) -> Result<()> {
    bed.frames()?;
    let served = serve(bed.attempt(&arguments(ask.server(), family, LISTEN + 1))?, family)?;
    let answered = ask.by_peer(bed, family.allowed(), served.address)?;
    ensure!(answered, "proves nothing: unlabelled, no answer");
    served.running.finish(LIMIT)?;
    Ok(())
}

fn rule_lets_the_named_peer_in(ask: Ask, family: Family) -> Result<()> {
    let bed = Bed::new()?;
    let sensor = Sensor::start(&bed, &policy())?;
    let command = bed.labelled_attempt(&sensor, CALLED, &arguments(ask.server(), family, LISTEN))?;
    let served = serve(command, family)?;
    // Who is not named gets not one frame back.
    ensure!(!ask.by_peer(&bed, family.denied(), served.address)?, "a stranger got an answer");
    let frames = bed.frames()?;
    ensure!(frames.is_empty(), "to a stranger: {frames:?}");
    if !ask.by_peer(&bed, family.allowed(), served.address)? {
        bail!("the named peer gets no answer: {:?}", sensor.events().denials_of(CALLED)?);
    }
    let done = served.running.finish(LIMIT)?;
    ensure!(done.lines.iter().any(|l| l.contains("\"done\"")), "{:?}", done.lines);
    let astray: Vec<Frame> =
        bed.frames()?.into_iter().filter(|f| f.destination() != Some(family.allowed())).collect();
    ensure!(astray.is_empty(), "{astray:?}");
    sensor.events().wait_for("the stranger's denial", SOON, |e| {
        e.is_denial_of(CALLED) && e.text("reason") == "no_inbound_rule"
    })?;
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
    tcp_listener_under_none_answers_nobody: |f| no_answer_leaves(Ask::Tcp, f, NONE);
    tcp_listener_without_inbound_rule_answers_nobody: |f| no_answer_leaves(Ask::Tcp, f, WIRE);
    udp_socket_under_none_answers_nobody: |f| no_answer_leaves(Ask::Udp, f, NONE);
    udp_socket_without_inbound_rule_answers_nobody: |f| no_answer_leaves(Ask::Udp, f, WIRE);
    inbound_rule_lets_the_named_tcp_peer_in: |f| rule_lets_the_named_peer_in(Ask::Tcp, f);
    inbound_rule_lets_the_named_udp_peer_in: |f| rule_lets_the_named_peer_in(Ask::Udp, f);
    listen_without_bind_answers_nobody: listen_without_bind;
    accepted_before_the_label_is_judged: queued_before_the_label;
    a_listener_that_becomes_a_client_loses_its_standing: listener_becomes_client;
    udp_may_answer_but_not_speak_first: speaks_first;
}

fn listen_without_bind(family: Family) -> Result<()> {
    let bed = Bed::new()?;
    let sensor = Sensor::start(&bed, &policy())?;
    for server in [NONE, WIRE, CALLED] {
        let command = bed.labelled_attempt(&sensor, server, &arguments("serve-unbound", family, 0))?;
        let served = serve(command, family)?;
        ensure!(!Ask::Tcp.by_peer(&bed, family.allowed(), served.address)?, "{server}: an answer");
        let frames = bed.frames()?;
        ensure!(frames.is_empty(), "{server}: {frames:?}");
        sensor.events().wait_for("a denial", SOON, |e| e.is_denial_of(server))?;
        served.running.finish(LIMIT)?;
    }
    let served = serve(bed.attempt(&arguments("serve-unbound", family, 0))?, family)?;
    ensure!(Ask::Tcp.by_peer(&bed, family.allowed(), served.address)?, "proves nothing: no answer");
    served.running.finish(LIMIT)?;
    Ok(())
}

/// The peer is in the accept queue when the sensor starts.
fn queued_before_the_label(family: Family) -> Result<()> {
    let answer = |with_sensor: bool| -> Result<(bool, Vec<Frame>)> {
        let bed = Bed::new()?;
        let program = bed.copy_of_attempt("older")?;
        let mut command = bed.command(&program)?;
        command.args(arguments("serve-queued", family, LISTEN));
        let mut served = serve(command, family)?;
        served.running.wait_for_line(mcp_sensor_tests::report::READY, LIMIT)?;
        let client = Client::tcp(&bed.network, family.denied(), served.address)?;
        let rule = format!("match: [{{exe: \"{}\"}}]", program.display());
        let policy = Policy::standard().server("older", "none", "enforce", &rule);
        let _sensor = if with_sensor { Some(Sensor::start(&bed, &policy)?) } else { None };
        bed.frames()?;
        served.running.say("go")?;
        let answered = client.ask(b"hello", ANSWER)?.is_some();
        served.running.finish(LIMIT)?;
        Ok((answered, bed.frames()?))
    };
    let (answered, frames) = answer(true)?;
    ensure!(!answered && frames.is_empty(), "answered: {answered}, {frames:?}");
    let (answered, _) = answer(false)?;
    ensure!(answered, "proves nothing: without a sensor, no answer");
    Ok(())
}

/// From a port on which an inbound rule lets others in, to an address that is
/// named there, but nobody called.
fn calls_out(name: &str, family: Family) -> Result<()> {
    let bed = Bed::new()?;
    let sensor = Sensor::start(&bed, &policy())?;
    let mut all = arguments(name, family, PORT);
    all.extend(["--".into(), LISTEN.to_string()]);
    let tried = bed.try_out(bed.labelled_attempt(&sensor, CALLED, &all)?)?;
    ensure!(tried.frames.is_empty(), "{} {:?}", tried.report, tried.frames);
    sensor.events().wait_for("a denial", SOON, |e| e.is_denial_of(CALLED))?;
    let tried = bed.try_out(bed.attempt(&all)?)?;
    ensure!(!tried.frames.is_empty(), "proves nothing: unlabelled, {}", tried.report);
    Ok(())
}

fn listener_becomes_client(family: Family) -> Result<()> {
    calls_out("listen-bound-then-connect", family)
}

fn speaks_first(family: Family) -> Result<()> {
    calls_out("udp-from-port", family)
}

/// Both ends call each other (RFC 9293, 3.5). The peer's kernel drops the
/// server's SYN, so that the server's socket still waits when the peer's comes.
mod simultaneous_open {
    use super::*;
    use mcp_sensor_tests::drivers::found;
    use mcp_sensor_tests::spec::{Claim, run};

    const BOTH: u16 = 7009;

    /// Whether the connection came about, and what the peer saw.
    fn open(bed: &Bed, command: Command, family: Family, to: std::net::IpAddr) -> Result<(bool, Vec<Frame>)> {
        let mut running = Running::start(command)?;
        let mut port = None;
        while port.is_none() && !running.is_over()? {
            port = match bed.sniffer.wait_for(Duration::from_millis(50), Frame::is_syn)? {
                Some(Frame::Ip { l4: L4::Tcp { src, .. }, .. }) => Some(src),
                _ => None,
            };
        }
        // Without a call the peer calls all the same; it cannot know a port.
        let server = SocketAddr::new(family.server(), port.unwrap_or(BOTH));
        let met = Client::tcp_from(&bed.network, SocketAddr::new(to, BOTH), server).is_ok();
        ensure!(port.is_some() || !met, "met without a call");
        let done = running.finish(LIMIT)?;
        let sent = done.lines.iter().any(|l| l.contains("\"done\""));
        Ok((met && sent, bed.frames()?))
    }

    fn is_judged(family: Family) -> Result<Claim> {
        if found("nft").is_none() {
            return Ok(Claim::Skipped("nft is not installed (ENOENT): apt-get install nftables".into()));
        }
        let bed = Bed::new()?;
        let deaf = format!(
            "table inet deaf {{ chain input {{ type filter hook input priority 0; \
             tcp dport {BOTH} tcp flags & (syn | ack) == syn drop; }}; }}\n"
        );
        bed.network.peer.tool("nft", &["-f", "-"], &deaf)?;
        let rule = format!("egress: [{{to: [{}], ports: [{BOTH}]}}]", quoted(family));
        let policy = Policy::standard().profile("both", &rule).server("both", "both", "enforce", "");
        let sensor = Sensor::start(&bed, &policy)?;
        let all = |to: std::net::IpAddr| {
            ["simultaneous-open", "--to", &to.to_string(), "--port", &BOTH.to_string()].map(String::from)
        };
        for (server, to) in [(NONE, family.allowed()), (WIRE, family.allowed()), ("both", family.denied())] {
            let (met, frames) = open(&bed, bed.labelled_attempt(&sensor, server, &all(to))?, family, to)?;
            ensure!(!met && frames.is_empty(), "{server} to {to}: {frames:?}");
            sensor.events().wait_for("a denial", SOON, |e| e.is_denial_of(server))?;
        }
        let to = family.allowed();
        let (met, frames) = open(&bed, bed.labelled_attempt(&sensor, "both", &all(to))?, family, to)?;
        ensure!(met, "the rule allows it: {frames:?}");
        let (met, frames) = open(&bed, bed.attempt(&all(family.denied()))?, family, family.denied())?;
        ensure!(met, "proves nothing: unlabelled, {frames:?}");
        Ok(Claim::Holds)
    }

    fn quoted(family: Family) -> String {
        format!("\"{}\"", allowed_cidr(family))
    }

    #[test]
    fn v4() {
        run(|| is_judged(Family::V4));
    }

    #[test]
    fn v6() {
        run(|| is_judged(Family::V6));
    }
}
