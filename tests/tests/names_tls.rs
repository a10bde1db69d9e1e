//! On an address that was learned by name, TLS must say a name that led there.

use anyhow::{Result, ensure};
use mcp_sensor_tests::dns::message::A;
use mcp_sensor_tests::dns::zone::Zone;
use mcp_sensor_tests::names::{API, NAMED, OTHER, Ran, SNI_IGNORED, SNI_REQUIRED, World, ask, ip};
use mcp_sensor_tests::sensor::SOON;
use mcp_sensor_tests::service::PAGE;
use mcp_sensor_tests::step::{Cut, Hello, Step, Trick};
use mcp_sensor_tests::tls::{Groups, PORT, TlsServer};
use mcp_sensor_tests::with_and_without_label;
use std::net::SocketAddr;

const ONE: &str = "198.51.100.7";
const TWO: &str = "198.51.100.8";
const BELOW: &str = "www.cdn.example.test";

fn zone() -> Zone {
    Zone::new().host(API, &[ip(ONE)]).host(BELOW, &[ip(TWO)])
}

fn front() -> SocketAddr {
    SocketAddr::new(ip(ONE), PORT)
}

fn hello(name: &str) -> Hello {
    Hello { names: vec![name.into()], ..Hello::default() }
}

struct Https {
    world: World,
    server: TlsServer,
}

impl Https {
    fn new(labelled: bool, port: u16, groups: Groups) -> Result<Https> {
        let world = World::new(labelled, zone)?;
        let names = [API, OTHER, ONE, TWO, "*.cdn.example.test"];
        let server = TlsServer::start(&world.bed.network, world.bed.folder.path(), &names, port, groups)?;
        Ok(Https { world, server })
    }

    fn after_learning(&self, step: Step) -> Result<Ran> {
        let ran = self.world.run(&[ask(API, A), step])?;
        ensure!(ran.outcomes[0].answered(), "the question: {}", ran.outcomes[0].report);
        Ok(ran)
    }

    fn get(&self, port: u16, sni: &str) -> Step {
        let to = SocketAddr::new(ip(ONE), port);
        Step::Get { to, sni: sni.into(), ca: self.server.ca.clone() }
    }
}

/// The page comes, with and without a label.
fn passes(labelled: bool, port: u16, groups: Groups, sni: &str) -> Result<()> {
    let https = Https::new(labelled, port, groups)?;
    let ran = https.after_learning(https.get(port, sni))?;
    ensure!(ran.last().text.contains(PAGE), "{} {}", ran.last().report, ran.last().text);
    Ok(())
}

/// The page does not come, and not one byte of the hello.
fn get_is_closed(labelled: bool, port: u16, sni: &str, to_one: bool) -> Result<()> {
    let https = Https::new(labelled, port, Groups::Usual)?;
    let mut step = https.get(port, sni);
    if !to_one && let Step::Get { to, .. } = &mut step {
        to.set_ip(ip(TWO));
    }
    let steps = [ask(API, A), ask(BELOW, A), step];
    let ran = https.world.run(&steps)?;
    let outcome = ran.last();
    if !labelled {
        ensure!(outcome.text.contains(PAGE), "proves nothing: {}", outcome.report);
        return Ok(());
    }
    ensure!(outcome.has_ended(), "it ends with {} {}", outcome.report, outcome.text);
    ensure!(https.server.bytes() == 0, "{} bytes arrived", https.server.bytes());
    let to = SocketAddr::new(ip(if to_one { ONE } else { TWO }), port);
    https.world.expect_denial("sni", to)?;
    let sensor = https.world.sensor.as_ref().expect("labelled");
    let event =
        sensor.events().wait_for("the SNI", SOON, |e| e.is_denial_of(NAMED) && e.text("reason") == "sni")?;
    ensure!(event.text("sni") == sni, "{}", event.0);
    Ok(())
}

fn hello_passes(labelled: bool, hello: Hello) -> Result<()> {
    let https = Https::new(labelled, PORT, Groups::Usual)?;
    let ran = https.after_learning(Step::Hello { to: front(), hello })?;
    ensure!(ran.last().answered(), "{}", ran.last().report);
    Ok(())
}

/// Ends with an error and at once; `unheard` never arrives.
fn hello_is_closed(labelled: bool, hello: &Hello, reason: &str, unheard: &str) -> Result<()> {
    let https = Https::new(labelled, PORT, Groups::Usual)?;
    let ran = https.after_learning(Step::Hello { to: front(), hello: hello.clone() })?;
    let outcome = ran.last();
    if !labelled {
        // What the server makes of it is its own affair: the bytes are there.
        ensure!(https.server.hears(unheard), "proves nothing: \"{unheard}\" does not arrive");
        return Ok(());
    }
    ensure!(outcome.has_ended(), "it ends with {}", outcome.report);
    ensure!(!https.server.heard(unheard), "\"{unheard}\" arrived");
    if hello.second.is_none() {
        ensure!(https.server.bytes() == 0, "{} bytes arrived", https.server.bytes());
    }
    https.world.expect_denial(reason, front())
}

fn bytes_are_closed(labelled: bool, pieces: &[&[u8]], trick: Trick, reason: &str) -> Result<()> {
    let https = Https::new(labelled, PORT, Groups::Usual)?;
    let pieces = pieces.iter().map(|p| p.to_vec()).collect();
    let ran = https.after_learning(Step::Bytes { pieces, to: front(), tcp: true, trick })?;
    if !labelled {
        ensure!(https.server.hears(""), "proves nothing: {}", ran.last().report);
        return Ok(());
    }
    ensure!(ran.last().has_ended(), "it ends with {}", ran.last().report);
    ensure!(https.server.bytes() == 0, "{} bytes arrived", https.server.bytes());
    https.world.expect_denial(reason, front())
}

mod passing {
    use super::*;

    with_and_without_label! {
        the_right_name: |l| passes(l, PORT, Groups::Usual, API);
        the_right_name_where_the_server_asks_for_another_share: |l| passes(l, PORT, Groups::Unguessed, API);
        the_right_name_on_another_port_with_sni_required: |l| passes(l, SNI_REQUIRED, Groups::Usual, API);
        another_name_where_sni_is_ignored: |l| passes(l, SNI_IGNORED, Groups::Usual, OTHER);
        no_name_where_sni_is_ignored: |l| passes(l, SNI_IGNORED, Groups::Usual, "");
        a_hello_by_hand: |l| hello_passes(l, hello(API));
        a_name_in_capitals: |l| hello_passes(l, hello("API.Example.TEST"));
        a_hello_as_long_as_post_quantum_ones: |l| hello_passes(l, Hello { padding: 1800, ..hello(API) });
    }
}

mod closed {
    use super::*;

    with_and_without_label! {
        another_name: |l| get_is_closed(l, PORT, OTHER, true);
        another_name_on_a_port_with_sni_required: |l| get_is_closed(l, SNI_REQUIRED, OTHER, true);
        // Allowed both, but this address was learned by the other.
        an_allowed_name_that_led_elsewhere: |l| get_is_closed(l, PORT, API, false);
        no_name: |l| get_is_closed(l, PORT, "", true);
        an_empty_name: |l| hello_is_closed(l, &hello(""), "sni", "\0\x03\0\0\0");
        two_names: |l| {
            let names = vec![API.to_string(), OTHER.to_string()];
            hello_is_closed(l, &Hello { names, ..Hello::default() }, "sni", OTHER)
        };
        two_names_the_allowed_last: |l| {
            let names = vec![OTHER.to_string(), API.to_string()];
            hello_is_closed(l, &Hello { names, ..Hello::default() }, "sni", OTHER)
        };
        a_name_with_a_nul: |l| hello_is_closed(l, &hello("api.example.test\0.evil.test"), "sni", ".evil.test");
        a_name_that_ends_like_a_wildcard: |l| hello_is_closed(l, &hello("evilcdn.example.test"), "sni", "evilcdn");
        an_encrypted_hello: |l| hello_is_closed(l, &Hello { ech: true, ..hello(API) }, "ech", API);
        a_hello_in_two_segments: |l| hello_is_closed(l, &Hello { cut: Cut::At(40), ..hello(API) }, "sni", API);
        a_hello_after_its_first_byte: |l| hello_is_closed(l, &Hello { cut: Cut::At(1), ..hello(API) }, "sni", API);
        a_hello_in_two_records: |l| hello_is_closed(l, &Hello { cut: Cut::Records(30), ..hello(API) }, "sni", API);
        a_second_hello_with_another_name: |l| {
            hello_is_closed(l, &Hello { second: Some(Box::new(hello(OTHER))), ..hello(API) }, "sni", OTHER)
        };
        plain_http: |l| bytes_are_closed(l, &[b"GET / HTTP/1.1\r\nHost: api.example.test\r\n\r\n"], Trick::None, "sni");
        plain_http_in_the_syn: |l| {
            bytes_are_closed(l, &[b"GET / HTTP/1.1\r\nHost: api.example.test\r\n\r\n"], Trick::Fastopen, "sni")
        };
        ssh: |l| bytes_are_closed(l, &[b"SSH-2.0-OpenSSH_9.2\r\n"], Trick::None, "sni");
        one_byte: |l| bytes_are_closed(l, &[b"\x16"], Trick::None, "sni");
        plain_http_by_splice: |l| bytes_are_closed(l, &[b"GET / HTTP/1.1\r\n\r\n"], Trick::Splice, "sni");
        an_alert_first: |l| bytes_are_closed(l, &[b"\x15\x03\x03\x00\x02\x01\x00"], Trick::None, "sni");
    }
}

/// One call after the other with MSG_MORE is one segment for the wire: it may
/// pass whole or be closed, but what arrives is the right name.
#[test]
fn a_hello_by_two_calls_is_whole_or_closed() {
    mcp_sensor_tests::spec::must(|| {
        let https = Https::new(true, PORT, Groups::Usual)?;
        let cut = Hello { cut: Cut::More(40), ..hello(OTHER) };
        let ran = https.after_learning(Step::Hello { to: front(), hello: cut })?;
        ensure!(ran.last().has_ended(), "{}", ran.last().report);
        ensure!(!https.server.heard(OTHER), "another name arrived");
        Ok(())
    });
}

/// Without a look-up, the address is closed whatever the hello says.
#[test]
fn the_right_name_at_an_address_that_was_not_learned_is_refused() {
    mcp_sensor_tests::spec::must(|| {
        let https = Https::new(true, PORT, Groups::Usual)?;
        let ran = https.world.run(&[https.get(PORT, API)])?;
        ensure!(ran.last().is_refused(), "{}", ran.last().report);
        ensure!(ran.frames.is_empty(), "{:?}", ran.frames);
        Ok(())
    });
}
