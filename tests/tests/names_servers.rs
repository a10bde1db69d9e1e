//! Whose a learned address is, for how long, and that no answer comes too late.

use anyhow::{Result, ensure};
use mcp_sensor_tests::bed::LIMIT;
use mcp_sensor_tests::dns::message::A;
use mcp_sensor_tests::dns::zone::{Zone, addresses_of, random_address};
use mcp_sensor_tests::drivers::with_resolver;
use mcp_sensor_tests::names::{
    API, CDN, NAMED, NEIGHBOUR, PLAIN, RESOLVER, World, ask, connect, ip, outcomes, policy_with,
};
use mcp_sensor_tests::spec::must;
use mcp_sensor_tests::step::Step;
use mcp_sensor_tests::with_and_without_label;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const ONE: &str = "198.51.100.7";
const SHARED: &str = "shared.cdn.example.test";
/// For addresses that no test asks for by name.
const ELSEWHERE: &str = "203.0.113.77";

fn fixed() -> Zone {
    Zone::new()
        .host(API, &[ip(ONE)])
        .host(SHARED, &[ip(ONE)])
        .below(CDN, |q, _| vec![addresses_of(q, &[ip(ELSEWHERE)]).into()])
}

/// Another address for every query.
fn fresh() -> Zone {
    let count = AtomicU64::new(std::process::id().into());
    Zone::new().below(CDN, move |q, _| vec![random_address(q, count.fetch_add(1, Ordering::Relaxed)).into()])
}

with_and_without_label! {
    what_one_server_learned_is_not_the_others: |labelled: bool| {
        let world = World::new(labelled, fixed)?;
        let steps = [ask(SHARED, A), connect(ip(ONE), PLAIN), Step::Pause, connect(ip(ONE), PLAIN)];
        let mut first = world.start(NAMED, &steps)?;
        let ran = world.run_as(NEIGHBOUR, &[connect(ip(ONE), PLAIN)], |_| Ok(()), LIMIT)?;
        ensure!(ran.last().is_refused() == labelled, "before it asks itself: {}", ran.last().report);
        // The first one's connection may have to acknowledge its last bytes still.
        let sent = ran.frames_to(ip(ONE)).into_iter().any(|f| !f.is_bare_ack());
        ensure!(sent != labelled, "{:?}", ran.frames);
        let own = [ask(SHARED, A), connect(ip(ONE), PLAIN)];
        let ran = world.run_as(NEIGHBOUR, &own, |_| Ok(()), LIMIT)?;
        ensure!(ran.last().answered(), "after it asked itself: {}", ran.last().report);
        first.say("go")?;
        let of_first = outcomes(first, LIMIT)?;
        ensure!(of_first[1].answered() && of_first[3].answered(), "{of_first:?}");
        anyhow::Ok(())
    };

    // A user's own namespaces: it is root there and answers as the resolver.
    a_server_that_answers_itself_learns_nothing: |labelled: bool| {
        let world = World::new(labelled, fixed)?;
        let steps = [
            Step::AnswerItself { name: API.into(), resolver: RESOLVER, address: ip(ELSEWHERE) },
            connect(ip(ELSEWHERE), PLAIN),
        ];
        let ran = world.run(&steps)?;
        if labelled {
            ensure!(ran.last().is_refused(), "{}", ran.last().report);
            ensure!(ran.frames.is_empty(), "{:?}", ran.frames);
            let sensor = world.sensor.as_ref().expect("labelled");
            let learned = sensor.cli(&["names", "--server", NAMED, "-o", "json"])?.to_string();
            ensure!(!learned.contains(ELSEWHERE), "{learned}");
        } else {
            let itself = &ran.outcomes[0];
            ensure!(itself.answered(), "proves nothing: it does not answer itself: {}", itself.report);
            ensure!(ran.last().answered(), "proves nothing: {}", ran.last().report);
        }
        ensure!(world.resolver.bytes() == 0, "the resolver was asked");
        anyhow::Ok(())
    };

    ten_thousand_names_of_one_server_push_out_nothing: |labelled: bool| {
        let cidr = format!("\x20 - {{to: [10.77.1.2/32], ports: [{PLAIN}]}}\n");
        let zone = || Zone::new().host(SHARED, &[ip(ELSEWHERE)]).below(CDN, fresh_script());
        let world = World::with_policy(labelled, zone, &policy_with(&cidr))?;
        let steps = [ask(SHARED, A), connect(ip(ELSEWHERE), PLAIN), Step::Pause, connect(ip(ELSEWHERE), PLAIN)];
        let mut other = world.start(NEIGHBOUR, &steps)?;
        let many = [
            Step::AskMany { suffix: CDN.into(), count: 10_000, to: RESOLVER },
            connect(ip("10.77.1.2"), PLAIN),
        ];
        let ran = world.run_as(NAMED, &many, |_| Ok(()), Duration::from_secs(60))?;
        ensure!(ran.outcomes[0].answered(), "{}", ran.outcomes[0].report);
        ensure!(ran.last().answered(), "its own rule is gone: {}", ran.last().report);
        other.say("go")?;
        let of_other = outcomes(other, LIMIT)?;
        ensure!(of_other[3].answered(), "the other server's address is gone: {:?}", of_other[3]);
        anyhow::Ok(())
    };

    a_fresh_address_can_be_connected_to_at_once: |labelled| race(labelled, 4, 500, 0);

    a_fresh_address_can_be_connected_to_at_once_after_getaddrinfo: |labelled| race(labelled, 4, 0, 100);
}

fn fresh_script() -> impl Fn(
    &mcp_sensor_tests::dns::message::Query,
    mcp_sensor_tests::dns::zone::Over,
) -> Vec<mcp_sensor_tests::dns::zone::Reply>
+ Send
+ Sync
+ 'static {
    let count = AtomicU64::new(1);
    move |q, _| {
        let n = count.fetch_add(1, Ordering::Relaxed);
        // 10,000 different ones: 2001:db8:1::/64 has room, 198.51.100.0/24 has not.
        let wide = std::net::Ipv4Addr::from(0x0b00_0000 + n as u32);
        let reply = if q.kind == A { addresses_of(q, &[wide.into()]) } else { random_address(q, n) };
        vec![reply.into()]
    }
}

/// `own`: rounds with a resolver of its own; `system`: with the C library's.
/// No connect may be denied for what was answered just before.
fn race(labelled: bool, threads: u32, own: u32, system: u32) -> Result<()> {
    let world = World::new(labelled, fresh)?;
    let mut steps = Vec::new();
    if own > 0 {
        let to = RESOLVER;
        steps.push(Step::Race { suffix: CDN.into(), threads, rounds: own, to, port: PLAIN });
    }
    if system > 0 {
        steps.push(Step::SystemRace { suffix: CDN.into(), threads, rounds: system, port: PLAIN });
    }
    let folder = world.bed.folder.path();
    let prepare = |command: &mut _| with_resolver(command, folder, RESOLVER.ip());
    let ran = world.run_as(NAMED, &steps, prepare, Duration::from_secs(300))?;
    for outcome in &ran.outcomes {
        ensure!(outcome.answered(), "{}", outcome.text);
    }
    Ok(())
}

#[test]
#[ignore = "long: 24,000 look-ups, each followed by its connects"]
fn race_of_20_000_look_ups_without_one_false_denial() {
    must(|| race(true, 4, 5_000, 1_000));
}

/// Floor of 60 s and grace of 120 s for a TTL of one second.
#[test]
#[ignore = "long: waits until what was learned has expired"]
fn an_open_connection_outlives_the_ttl_and_a_new_one_does_not() {
    must(|| {
        let zone = || {
            Zone::new().script(API, |q, _| {
                let mut reply = addresses_of(q, &[ip(ONE)]);
                reply.answers.iter_mut().for_each(|r| r.ttl = 1);
                vec![reply.into()]
            })
        };
        let world = World::new(true, zone)?;
        let to = SocketAddr::new(ip(ONE), PLAIN);
        let steps = [
            ask(API, A),
            Step::Open { to },
            Step::Sleep { seconds: 30 },
            Step::Connect { to },
            Step::Sleep { seconds: 160 },
            Step::Talk,
            Step::Connect { to },
            ask(API, A),
            Step::Connect { to },
        ];
        let ran = world.run_as(NAMED, &steps, |_| Ok(()), Duration::from_secs(240))?;
        let outcomes = &ran.outcomes;
        ensure!(outcomes[3].answered(), "within the floor: {}", outcomes[3].report);
        ensure!(outcomes[5].answered(), "the open connection is cut: {}", outcomes[5].report);
        ensure!(outcomes[6].is_refused(), "expired, and open: {}", outcomes[6].report);
        ensure!(outcomes[8].answered(), "asked anew: {}", outcomes[8].report);
        Ok(())
    });
}

/// What is learned, and what is closed, needs no agent.
#[test]
fn names_go_on_while_no_agent_runs() {
    must(|| {
        let world = World::new(true, fixed)?;
        let steps = [
            Step::Pause,
            connect(ip(ONE), PLAIN),
            ask(SHARED, A),
            connect(ip(ONE), PLAIN),
            ask("other.test", A),
        ];
        let mut running = world.start(NAMED, &steps)?;
        world.sensor.as_ref().expect("a sensor").kill()?;
        running.say("go")?;
        let outcomes = outcomes(running, LIMIT)?;
        ensure!(outcomes[1].is_refused(), "before it is asked for: {}", outcomes[1].report);
        ensure!(outcomes[2].answered() && outcomes[3].answered(), "{outcomes:?}");
        ensure!(outcomes[4].is_refused(), "another name: {}", outcomes[4].report);
        Ok(())
    });
}

/// Nobody resets the connection then: TCP itself gives up, in seconds.
#[test]
fn a_denied_query_over_tcp_ends_while_no_agent_runs() {
    must(|| {
        let world = World::new(true, fixed)?;
        let mut command = world.command(NAMED, mcp_sensor_tests::run::built("attempt")?)?;
        let to = RESOLVER.ip().to_string();
        command.args(["dns-wait", "--to", &to, "--port", "53", "--pause", "--", "other.test"]);
        let mut running = world.bed.start_until_ready(command)?;
        world.sensor.as_ref().expect("a sensor").kill()?;
        running.say("go")?;
        let done = running.finish(Duration::from_secs(20))?;
        let said = done.lines.join("\n");
        ensure!(said.contains(&format!("\"errno\":{}", libc::ETIMEDOUT)), "{said} {}", done.stderr);
        ensure!(world.resolver.bytes() == 0, "{} bytes arrived", world.resolver.bytes());
        Ok(())
    });
}
