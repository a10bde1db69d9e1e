//! What may be asked, of whom, and what must not leave: the resolvers count
//! every byte that reaches them.

use anyhow::{Result, ensure};
use mcp_sensor_tests::dns::message::{A, AAAA, HTTPS, Message, NULL, Record, TXT, framed, wire_name};
use mcp_sensor_tests::dns::zone::{Zone, addresses_of};
use mcp_sensor_tests::frame::Frame;
use mcp_sensor_tests::names::{
    API, FOREIGN, NAMED, OTHER, PLAIN, RESOLVER, RESOLVER_V6, World, ask, ask_at, ask_tcp, connect, ip,
};
use mcp_sensor_tests::policy::AUDIT;
use mcp_sensor_tests::step::{Step, Trick};
use mcp_sensor_tests::with_and_without_label;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

const ONE: &str = "198.51.100.7";

fn zone() -> Zone {
    let some = |q: &_, _| vec![addresses_of(q, &[ip(ONE)]).into()];
    Zone::new().below("example.test", some).below("corp.test", some)
}

fn to(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

/// How a denied query ends for the program that sent it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ends {
    /// EPERM from the call.
    Refused,
    /// The connection is over, with an error and at once.
    Closed,
}

/// One step that carries bytes to a resolver, and what denies it.
fn denied(labelled: bool, step: &Step, ends: Ends, reason: &str, name: &str) -> Result<()> {
    let world = World::new(labelled, zone)?;
    let ran = world.run(std::slice::from_ref(step))?;
    let outcome = ran.last();
    let arrived = world.resolver.bytes() + world.foreign.bytes();
    if !labelled {
        ensure!(arrived > 0, "proves nothing: nothing arrives, {}", outcome.report);
        return Ok(());
    }
    ensure!(arrived == 0, "{arrived} bytes arrived: {}", outcome.report);
    let payload: usize = ran.frames.iter().map(Frame::payload).sum();
    ensure!(payload == 0, "{payload} bytes on the wire: {:?}", ran.frames);
    let as_it_should = match ends {
        Ends::Refused => outcome.is_refused(),
        Ends::Closed => outcome.has_ended(),
    };
    ensure!(as_it_should, "it ends with {}", outcome.report);
    world.expect_name_event(reason, name)
}

fn denied_udp(labelled: bool, name: &str, kind: u16, reason: &str) -> Result<()> {
    denied(labelled, &ask(name, kind), Ends::Refused, reason, name)
}

fn denied_tcp(labelled: bool, name: &str, kind: u16, reason: &str) -> Result<()> {
    denied(labelled, &ask_tcp(name, kind), Ends::Closed, reason, name)
}

/// Bytes that are no plain query; nothing is said of their name.
fn unread(labelled: bool, pieces: Vec<Vec<u8>>, tcp: bool, trick: Trick) -> Result<()> {
    let world = World::new(labelled, zone)?;
    let ran = world.run(&[Step::Bytes { pieces, to: RESOLVER, tcp, trick }])?;
    let arrived = world.resolver.bytes();
    if !labelled {
        ensure!(arrived > 0, "proves nothing: nothing arrives, {}", ran.last().report);
        return Ok(());
    }
    ensure!(arrived == 0, "{arrived} bytes arrived: {}", ran.last().report);
    let report = &ran.last().report;
    let ended = if tcp { ran.last().has_ended() } else { ran.last().is_refused() };
    ensure!(ended, "it ends with {report}");
    let sensor = world.sensor.as_ref().expect("labelled");
    sensor.events().wait_for("a denied query", mcp_sensor_tests::sensor::SOON, |e| {
        e.text("type") == "dns" && e.text("server") == NAMED && e.text("verdict") == "deny"
    })?;
    Ok(())
}

fn query(name: &str, kind: u16) -> Message {
    Message::query(77, name, kind)
}

mod asked {
    use super::*;

    with_and_without_label! {
        an_allowed_name: |l| allowed(l, &[ask(API, A), ask(API, AAAA), ask_tcp(API, A)]);
        an_allowed_name_at_a_second_resolver: |l| allowed(l, &[ask_at(RESOLVER_V6, API, A)]);
        an_allowed_name_with_a_last_dot_and_capitals: |l| allowed(l, &[ask("API.example.TEST.", A)]);
        a_name_below_a_wildcard: |l| allowed(l, &[ask("x.cdn.example.test", A), ask("y.x.cdn.example.test", A)]);
        the_search_list_s_expansion: |l| {
            allowed(l, &[ask("api.example.test.corp.test", A), ask("x.cdn.example.test.corp.test", AAAA)])
        };
        a_query_without_edns: |l| {
            let mut plain = query(API, A);
            plain.additionals.clear();
            let pieces = vec![plain.to_bytes()];
            allowed(l, &[Step::Bytes { pieces, to: RESOLVER, tcp: false, trick: Trick::None }])
        };
        two_queries_in_one_segment: |l| {
            let both = [framed(&query(API, A).to_bytes()), framed(&query(API, AAAA).to_bytes())].concat();
            allowed(l, &[Step::Bytes { pieces: vec![both], to: RESOLVER, tcp: true, trick: Trick::None }])
        };
        two_queries_one_after_the_other: |l| {
            let pieces = vec![framed(&query(API, A).to_bytes()), framed(&query(API, AAAA).to_bytes())];
            allowed(l, &[Step::Bytes { pieces, to: RESOLVER, tcp: true, trick: Trick::Slow }])
        };
    }

    fn allowed(labelled: bool, steps: &[Step]) -> Result<()> {
        let world = World::new(labelled, zone)?;
        let ran = world.run(steps)?;
        let unanswered = ran.outcomes.iter().find(|o| !o.answered());
        ensure!(unanswered.is_none(), "{unanswered:?}");
        if let Some(sensor) = &world.sensor {
            let denials = sensor.events().all()?.to_vec();
            let denials: Vec<_> =
                denials.iter().filter(|e| e.text("type") == "dns" && e.text("verdict") == "deny").collect();
            ensure!(denials.is_empty(), "{denials:?}");
        }
        Ok(())
    }
}

mod names_that_no_rule_covers {
    use super::*;

    const REASON: &str = "name_no_rule";

    with_and_without_label! {
        another_name: |l| denied_udp(l, OTHER, A, REASON);
        another_name_over_tcp: |l| denied_tcp(l, OTHER, A, REASON);
        the_apex_of_a_wildcard: |l| denied_udp(l, "cdn.example.test", A, REASON);
        a_name_that_ends_like_a_wildcard: |l| denied_udp(l, "evilcdn.example.test", A, REASON);
        a_name_below_an_exact_one: |l| denied_udp(l, "x.api.example.test", A, REASON);
        a_name_with_an_allowed_one_in_front: |l| denied_udp(l, "api.example.test.evil.example.test", A, REASON);
        the_search_domain_with_another_name: |l| denied_udp(l, "secret.corp.test", A, REASON);
        a_dot_inside_a_label: |l| {
            // `cdn.example` as one label of eleven bytes.
            let mut name = b"\x01x\x0bcdn.example\x04test".to_vec();
            name.push(0);
            raw_name(l, name)
        };
        a_nul_inside_a_label: |l| raw_name(l, b"\x05evil\0\x07example\x04test\0".to_vec());
        an_allowed_and_then_another_in_one_segment: |l| {
            let both = [framed(&query(API, A).to_bytes()), framed(&query(OTHER, A).to_bytes())].concat();
            unread_or_no_rule(l, both)
        };
        the_root: |l| raw_name(l, vec![0]);
    }

    fn raw_name(labelled: bool, name: Vec<u8>) -> Result<()> {
        let mut message = query("x", A);
        message.questions = vec![(name, A)];
        unread(labelled, vec![message.to_bytes()], false, Trick::None)
    }

    fn unread_or_no_rule(labelled: bool, bytes: Vec<u8>) -> Result<()> {
        unread(labelled, vec![bytes], true, Trick::None)
    }
}

mod types_that_no_resolver_needs {
    use super::*;

    const REASON: &str = "query_type";

    with_and_without_label! {
        txt: |l| denied_udp(l, API, TXT, REASON);
        txt_over_tcp: |l| denied_tcp(l, API, TXT, REASON);
        null: |l| denied_udp(l, API, NULL, REASON);
        https: |l| denied_udp(l, API, HTTPS, REASON);
        https_over_tcp: |l| denied_tcp(l, API, HTTPS, REASON);
        any: |l| denied_udp(l, API, 255, REASON);
        a_zone_transfer_over_tcp: |l| denied_tcp(l, "x.cdn.example.test", 252, REASON);
    }
}

mod what_cannot_be_read {
    use super::*;

    with_and_without_label! {
        two_questions: |l| {
            let mut two = query(API, A);
            two.questions.push((wire_name(OTHER), A));
            unread(l, vec![two.to_bytes()], false, Trick::None)
        };
        a_second_question_that_is_not_counted: |l| {
            let mut message = query(API, A);
            message.additionals.clear();
            message.trailing = [wire_name(OTHER), vec![0, 1, 0, 1]].concat();
            unread(l, vec![message.to_bytes()], false, Trick::None)
        };
        trailing_bytes: |l| {
            let mut message = query(API, A);
            message.trailing = b"stolen".to_vec();
            unread(l, vec![message.to_bytes()], false, Trick::None)
        };
        bytes_in_an_edns_option: |l| {
            let mut message = query(API, A);
            // Option 65001, "local use", of 32 chosen bytes.
            message.additionals[0].data = [vec![0xfd, 0xe9, 0, 32], vec![b's'; 32]].concat();
            unread(l, vec![message.to_bytes()], false, Trick::None)
        };
        an_answer_in_a_query: |l| {
            let mut message = query(API, A);
            message.answers.push(Record::new(wire_name(OTHER), TXT, b"\x06stolen".to_vec()));
            unread(l, vec![message.to_bytes()], false, Trick::None)
        };
        an_update: |l| {
            let mut message = query(API, A);
            message.flags = 5 << 11;
            unread(l, vec![message.to_bytes()], false, Trick::None)
        };
        a_name_by_a_pointer: |l| {
            let mut message = query(API, A);
            message.questions = vec![(vec![0xc0, 12], A)];
            unread(l, vec![message.to_bytes()], false, Trick::None)
        };
        no_dns_at_all: |l| unread(l, vec![b"stolen bytes, as they are".to_vec()], false, Trick::None);
        no_dns_at_all_over_tcp: |l| unread(l, vec![b"stolen bytes, as they are".to_vec()], true, Trick::None);
        a_header_alone: |l| unread(l, vec![query(API, A).to_bytes()[..12].to_vec()], false, Trick::None);
        a_length_alone_over_tcp: |l| split(l, 2);
        half_a_query_over_tcp: |l| split(l, 20);
        a_length_that_is_too_long_over_tcp: |l| {
            let mut bytes = framed(&query(API, A).to_bytes());
            bytes[1] += 40;
            unread(l, vec![bytes, b"stolen".to_vec()], true, Trick::Slow)
        };
        two_datagrams_by_segmentation: |l| {
            // Both of one size: the second is not what was inspected.
            let (one, two) = (query(API, A).to_bytes(), query("xyz.example.test", A).to_bytes());
            assert_eq!(one.len(), two.len());
            let size = one.len() as u16;
            unread(l, vec![[one, two].concat()], false, Trick::Segment(size))
        };
        two_calls_for_one_datagram: |l| {
            unread(l, vec![query(API, A).to_bytes(), b"stolen".to_vec()], false, Trick::More)
        };
        another_name_without_a_copy: |l| unread(l, vec![query(OTHER, A).to_bytes()], false, Trick::Zerocopy);
        another_name_by_splice: |l| unread(l, vec![query(OTHER, A).to_bytes()], false, Trick::Splice);
        another_name_in_a_syn: |l| {
            unread(l, vec![framed(&query(OTHER, A).to_bytes())], true, Trick::Fastopen)
        };
        another_name_over_tcp_by_splice: |l| {
            unread(l, vec![framed(&query(OTHER, A).to_bytes())], true, Trick::Splice)
        };
    }

    /// In two segments: ends with an error and does not hang.
    fn split(labelled: bool, at: usize) -> Result<()> {
        let bytes = framed(&query(API, A).to_bytes());
        let (first, second) = bytes.split_at(at);
        unread(labelled, vec![first.to_vec(), second.to_vec()], true, Trick::Slow)
    }
}

mod others_who_answer {
    use super::*;

    const REASON: &str = "foreign_resolver";

    with_and_without_label! {
        another_resolver: |l| denied(l, &ask_at(FOREIGN, API, A), Ends::Refused, REASON, API);
        another_resolver_over_tcp: |l| {
            let step = Step::Ask { name: API.into(), kind: A, to: FOREIGN, tcp: true };
            closed_to(l, step, FOREIGN)
        };
        dns_over_tls: |l| closed_to(l, Step::Connect { to: to(RESOLVER.ip(), 853) }, to(RESOLVER.ip(), 853));
        dns_over_quic: |l| closed_to(l, Step::Datagram { to: to(RESOLVER.ip(), 853) }, to(RESOLVER.ip(), 853));
        dns_over_https_by_address: |l| closed_to(l, Step::Connect { to: to(FOREIGN.ip(), 443) }, to(FOREIGN.ip(), 443));
        http_3: |l| closed_to(l, Step::Datagram { to: to(ip(ONE), 443) }, to(ip(ONE), 443));
        mdns: |l| closed_to(l, Step::Datagram { to: to(ip("224.0.0.251"), 5353) }, to(ip("224.0.0.251"), 5353));
        mdns_v6: |l| closed_to(l, Step::Datagram { to: to(ip("ff02::fb"), 5353) }, to(ip("ff02::fb"), 5353));
        llmnr: |l| closed_to(l, Step::Datagram { to: to(ip("224.0.0.252"), 5355) }, to(ip("224.0.0.252"), 5355));
        llmnr_v6: |l| closed_to(l, Step::Datagram { to: to(ip("ff02::1:3"), 5355) }, to(ip("ff02::1:3"), 5355));
        another_port_of_the_resolver: |l| {
            closed_to(l, Step::Datagram { to: to(RESOLVER.ip(), 5354) }, to(RESOLVER.ip(), 5354))
        };
    }

    /// The name is learned first, so that only the way is in question. What
    /// nobody listens to is seen on the wire.
    fn closed_to(labelled: bool, step: Step, address: SocketAddr) -> Result<()> {
        let world = World::new(labelled, zone)?;
        let ran = world.run(&[ask(API, A), step])?;
        let frames: Vec<_> = ran.frames.iter().filter(|f| is_to(f, address)).collect();
        ensure!(ran.outcomes[0].answered(), "the question itself: {}", ran.outcomes[0].report);
        if !labelled {
            ensure!(!frames.is_empty(), "proves nothing: no frame to {address}, {}", ran.last().report);
            return Ok(());
        }
        ensure!(frames.is_empty(), "{frames:?}");
        ensure!(ran.last().is_refused(), "{}", ran.last().report);
        ensure!(
            world.foreign.bytes() == 0 && world.foreign.connections() == 0,
            "the other resolver was asked"
        );
        Ok(())
    }

    fn is_to(frame: &Frame, address: SocketAddr) -> bool {
        use mcp_sensor_tests::frame::L4;
        matches!(frame, Frame::Ip { dst, l4: L4::Tcp { dst: port, .. } | L4::Udp { dst: port, .. }, .. }
            if *dst == address.ip() && *port == address.port())
    }
}

mod tunnels {
    use super::*;

    with_and_without_label! {
        long_labels_to_the_resolver: |l| tunnel(l, RESOLVER, false);
        long_labels_to_the_resolver_over_tcp: |l| tunnel(l, RESOLVER, true);
        long_labels_to_ones_own_resolver: |l| tunnel(l, FOREIGN, false);
    }

    /// As iodine and dnscat ask: each name carries 120 bytes.
    fn tunnel(labelled: bool, server: SocketAddr, tcp: bool) -> Result<()> {
        let world = World::new(labelled, zone)?;
        let name = |n: usize| {
            let label = |salt: usize| -> String {
                (0..60).map(|i| char::from(b'a' + ((i * 7 + n * 31 + salt * 13) % 26) as u8)).collect()
            };
            format!("{}.{}.t.example.test", label(1), label(2))
        };
        let kinds = [NULL, TXT, A, AAAA, HTTPS, 15, 33, 5];
        let steps: Vec<Step> = (0..24)
            .map(|n| Step::Ask { name: name(n), kind: kinds[n % kinds.len()], to: server, tcp })
            .collect();
        let ran = world.run(&steps)?;
        let arrived = world.resolver.bytes() + world.foreign.bytes();
        if !labelled {
            ensure!(arrived as usize > 24 * 120, "proves nothing: {arrived} bytes");
            return Ok(());
        }
        ensure!(arrived == 0, "{arrived} bytes went through the tunnel");
        let passed = ran.outcomes.iter().find(|o| o.answered());
        ensure!(passed.is_none(), "{passed:?}");
        let payload: usize = ran.frames.iter().map(Frame::payload).sum();
        ensure!(payload == 0, "{payload} bytes on the wire");
        if server == RESOLVER {
            world.expect_name_event("name_no_rule", &name(2))?;
        }
        Ok(())
    }
}

/// In audit, all is asked and all is recorded.
#[test]
fn an_audited_server_asks_what_it_likes() {
    mcp_sensor_tests::spec::must(|| {
        let world = World::new(true, zone)?;
        let step = [ask(OTHER, A), ask(API, TXT)];
        let ran = world.run_as(AUDIT, &step, |_| Ok(()), mcp_sensor_tests::bed::LIMIT)?;
        ensure!(ran.outcomes.iter().all(|o| o.answered()), "{:?}", ran.outcomes);
        Ok(())
    });
}

/// What audit saw is proposed by name, and replayed it is allowed.
#[test]
fn a_suggestion_names_what_was_asked_for() {
    mcp_sensor_tests::spec::must(|| {
        let world = World::new(true, zone)?;
        let step = [ask(OTHER, A), connect(ip(ONE), PLAIN)];
        let ran = world.run_as(AUDIT, &step, |_| Ok(()), mcp_sensor_tests::bed::LIMIT)?;
        ensure!(ran.last().answered(), "proves nothing: {:?}", ran.outcomes);
        let sensor = world.sensor.as_ref().expect("a sensor");
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let said = sensor.command(&["policy", "suggest", "--server", AUDIT])?.lines.join("\n");
            if said.contains(OTHER) && said.contains(&PLAIN.to_string()) {
                ensure!(!said.contains(ONE), "by address, too: {said}");
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{said}");
            std::thread::sleep(Duration::from_millis(50));
        }
    });
}
