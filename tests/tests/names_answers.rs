//! What is learned from an answer, and what is not: a pinned resolver that
//! says all that a hostile one could say.

use anyhow::{Result, ensure};
use mcp_sensor_tests::dns::message::{A, AAAA, Message, Query, Record, TRUNCATED, asked, pointer, wire_name};
use mcp_sensor_tests::dns::zone::{From, Over, Reply, Zone, addresses_of};
use mcp_sensor_tests::names::{
    API, NAMED, OTHER, PLAIN, RESOLVER, RESOLVER_V6, SEARCH, World, ask, ask_at, ask_tcp, connect, ip,
    policy_with,
};
use mcp_sensor_tests::sensor::SOON;
use mcp_sensor_tests::step::{Step, Trick};
use mcp_sensor_tests::with_and_without_label;
use std::net::{IpAddr, SocketAddr};

const ONE: &str = "198.51.100.7";
const TWO: &str = "203.0.113.9";
const SIX: &str = "2001:db8::7";
const DEEP: &str = "a.b.cdn.example.test";

/// A zone, the questions, and what may be reached after them.
struct Case {
    zone: fn() -> Zone,
    ask: Vec<Step>,
    opened: Vec<IpAddr>,
    closed: Vec<IpAddr>,
    /// The event that says why, with the name.
    reason: Option<(&'static str, &'static str)>,
}

impl Case {
    /// The question for [`API`]'s address.
    fn new(zone: fn() -> Zone) -> Case {
        Case { zone, ask: vec![ask(API, A)], opened: Vec::new(), closed: Vec::new(), reason: None }
    }

    fn ask(self, ask: Vec<Step>) -> Case {
        Case { ask, ..self }
    }

    fn opened(self, addresses: &[&str]) -> Case {
        Case { opened: addresses.iter().map(|a| ip(a)).collect(), ..self }
    }

    fn closed(self, addresses: &[&str]) -> Case {
        Case { closed: addresses.iter().map(|a| ip(a)).collect(), ..self }
    }

    fn reason(self, reason: &'static str, name: &'static str) -> Case {
        Case { reason: Some((reason, name)), ..self }
    }

    fn holds(self, labelled: bool) -> Result<()> {
        let world = World::new(labelled, self.zone)?;
        self.holds_in(&world)
    }

    fn holds_in(self, world: &World) -> Result<()> {
        let asked = self.ask.len();
        let mut steps = self.ask.clone();
        steps.extend(self.opened.iter().chain(&self.closed).map(|a| connect(*a, PLAIN)));
        let ran = world.run(&steps)?;
        let connects = &ran.outcomes[asked..];
        for (address, outcome) in self.opened.iter().zip(connects) {
            ensure!(outcome.answered(), "{address}: {}, after {:?}", outcome.report, ran.outcomes);
        }
        for (address, outcome) in self.closed.iter().zip(&connects[self.opened.len()..]) {
            if world.is_labelled() {
                ensure!(outcome.is_refused(), "{address} is open: {}", outcome.report);
                let frames = ran.frames_to(*address);
                ensure!(frames.is_empty(), "{address}: {frames:?}");
            } else {
                ensure!(outcome.answered(), "proves nothing: {address}: {}", outcome.report);
            }
        }
        if !world.is_labelled() {
            let answers = ran.outcomes[..asked].iter().filter(|o| o.answered()).count();
            ensure!(answers == asked, "proves nothing: {:?}", &ran.outcomes[..asked]);
        }
        if let Some((reason, name)) = self.reason {
            world.expect_name_event(reason, name)?;
        }
        Ok(())
    }
}

/// A script for [`API`] alone.
fn api(script: impl Fn(&Query, Over) -> Vec<Reply> + Send + Sync + 'static) -> Zone {
    Zone::new().script(API, script)
}

fn address(owner: Vec<u8>, text: &str) -> Record {
    Record::address(owner, ip(text))
}

fn plain(query: &Query) -> Message {
    addresses_of(query, &[ip(ONE), ip(SIX)])
}

fn one(message: Message) -> Vec<Reply> {
    vec![message.into()]
}

fn plain_zone() -> Zone {
    let both = [ip(ONE), ip(SIX)];
    Zone::new().host(API, &both).host(DEEP, &both)
}

mod learned {
    use super::*;

    with_and_without_label! {
        an_ipv4_address: |l| Case::new(plain_zone).opened(&[ONE]).closed(&[TWO, SIX]).holds(l);
        an_ipv6_address: |l| Case::new(plain_zone).ask(vec![ask(API, AAAA)]).opened(&[SIX]).closed(&[ONE]).holds(l);
        an_answer_from_a_resolver_over_ipv6: |l| {
            Case::new(plain_zone).ask(vec![ask_at(RESOLVER_V6, API, AAAA)]).opened(&[SIX]).holds(l)
        };
        a_name_deep_below_a_wildcard: |l| Case::new(plain_zone).ask(vec![ask(DEEP, A)]).opened(&[ONE]).holds(l);
        an_answer_over_tcp: |l| Case::new(plain_zone).ask(vec![ask_tcp(API, A)]).opened(&[ONE]).holds(l);
        two_questions_in_one_segment: |l| Case::new(plain_zone).ask(vec![pipelined()]).opened(&[ONE, SIX]).holds(l);
        a_question_and_an_answer_in_mixed_case: |l| {
            Case::new(plain_zone).ask(vec![ask("aPi.ExAmPle.teSt", A)]).opened(&[ONE]).holds(l)
        };
        an_owner_in_another_case_than_the_question: |l| {
            Case::new(|| api(|q, _| one(Message::reply(q).answer(address(wire_name("API.example.TEST"), ONE)))))
                .opened(&[ONE])
                .holds(l)
        };
        an_address_with_ttl_0: |l| Case::new(|| with_ttl(0)).opened(&[ONE]).holds(l);
        an_address_with_ttl_beyond_its_range: |l| Case::new(|| with_ttl(1 << 31)).opened(&[ONE]).holds(l);
        the_end_of_a_chain_of_8: |l| Case::new(|| chain(8)).opened(&[ONE]).holds(l);
        a_truncated_answer_asked_again_over_tcp: |l| {
            Case::new(truncated).ask(vec![ask(API, A), ask_tcp(API, A)]).opened(&[ONE]).holds(l)
        };
        a_hundred_addresses: hundred;
        an_answer_without_compression: |l| {
            Case::new(|| api(|q, _| one(Message::reply(q).answer(address(wire_name(API), ONE))))).opened(&[ONE]).holds(l)
        };
        what_follows_an_answer_that_cannot_be_read: |l| {
            Case::new(oversized_below).ask(vec![ask("big.cdn.example.test", A), ask(API, A)]).opened(&[ONE]).holds(l)
        };
    }

    /// Both queries in one call, as glibc does.
    fn pipelined() -> Step {
        let framed =
            |id, kind| mcp_sensor_tests::dns::message::framed(&Message::query(id, API, kind).to_bytes());
        let pieces = vec![[framed(1, A), framed(2, AAAA)].concat()];
        Step::Bytes { pieces, to: RESOLVER, tcp: true, trick: Trick::None }
    }

    fn with_ttl(ttl: u32) -> Zone {
        api(move |q, _| one(Message::reply(q).answer(address(asked(), ONE).ttl(ttl))))
    }

    fn chain(links: usize) -> Zone {
        api(move |q, _| {
            let name = |n: usize| if n == 0 { API.to_string() } else { format!("link{n}.elsewhere.test") };
            let links = (0..links)
                .fold(Message::reply(q), |m, n| m.answer(Record::cname(wire_name(&name(n)), &name(n + 1))));
            one(links.answer(address(wire_name(&name(8)), ONE)))
        })
    }

    fn truncated() -> Zone {
        api(|q, over| match over {
            Over::Udp => {
                let mut reply = Message::reply(q);
                reply.flags |= TRUNCATED;
                one(reply)
            }
            Over::Tcp => one(plain(q)),
        })
    }

    fn hundred(labelled: bool) -> Result<()> {
        let all: Vec<String> = (1..=100).map(|n| format!("198.51.100.{n}")).collect();
        let zone = || {
            api(|q, _| {
                let all = (1..=100).map(|n| Record::address(asked(), IpAddr::from([198, 51, 100, n])));
                one(all.fold(Message::reply(q), Message::answer))
            })
        };
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        Case::new(zone).opened(&all).closed(&["198.51.100.101"]).holds(labelled)
    }

    /// 500 addresses: arrives in fragments.
    fn oversized_below() -> Zone {
        plain_zone().script("big.cdn.example.test", |q, _| {
            let record = |n: u16| Record::address(wire_name(&q.name), IpAddr::from([203, 0, 113, n as u8]));
            one((0..500).map(record).fold(Message::reply(q), Message::answer))
        })
    }
}

mod not_learned {
    use super::*;

    with_and_without_label! {
        another_id: |l| {
            Case::new(|| api(|q, _| {
                let mut reply = plain(q);
                reply.id ^= 0x0101;
                one(reply)
            })).closed(&[ONE]).holds(l)
        };
        another_question_that_is_allowed_too: |l| {
            Case::new(|| api(|q, _| one(plain(&Query { name: DEEP.into(), ..q.clone() })))).closed(&[ONE]).holds(l)
        };
        another_owner: |l| {
            Case::new(|| api(|q, _| {
                one(plain(q).answer(address(wire_name(OTHER), TWO)).answer(address(wire_name(DEEP), "203.0.113.10")))
            })).opened(&[ONE]).closed(&[TWO, "203.0.113.10"]).holds(l)
        };
        another_owner_without_its_chain: |l| {
            Case::new(|| api(|q, _| one(Message::reply(q).answer(address(wire_name(OTHER), TWO))))).closed(&[TWO]).holds(l)
        };
        the_additional_section: |l| {
            Case::new(|| api(|q, _| {
                let mut reply = plain(q);
                reply.additionals.push(address(asked(), TWO));
                one(reply)
            })).opened(&[ONE]).closed(&[TWO]).holds(l)
        };
        the_authority_section: |l| {
            Case::new(|| api(|q, _| {
                let mut reply = plain(q);
                reply.authorities.push(address(asked(), TWO));
                one(reply)
            })).opened(&[ONE]).closed(&[TWO]).holds(l)
        };
        what_nobody_asked: |l| {
            Case::new(|| api(|q, _| {
                let unasked = Query { id: q.id ^ 1, name: DEEP.into(), kind: A };
                vec![plain(q).into(), Message::reply(&unasked).answer(address(asked(), TWO)).into()]
            })).opened(&[ONE]).closed(&[TWO]).holds(l)
        };
        another_sender: |l| Case::new(|| from(From::AnotherAddress)).closed(&[ONE]).holds(l);
        another_port_of_the_resolver: |l| Case::new(|| from(From::AnotherPort)).closed(&[ONE]).holds(l);
        what_is_no_response: |l| {
            Case::new(|| api(|q, _| {
                let mut reply = plain(q);
                reply.flags = 0x0100;
                one(reply)
            })).closed(&[ONE]).holds(l)
        };
        a_name_beside_a_loop_of_cnames: |l| {
            Case::new(|| api(|q, _| {
                one(Message::reply(q)
                    .answer(Record::cname(asked(), "loop.elsewhere.test"))
                    .answer(Record::cname(wire_name("loop.elsewhere.test"), API))
                    .answer(address(wire_name("beside.elsewhere.test"), TWO)))
            })).closed(&[TWO]).holds(l)
        };
        a_chain_that_starts_elsewhere: |l| {
            Case::new(|| api(|q, _| {
                one(Message::reply(q)
                    .answer(Record::cname(wire_name("x.elsewhere.test"), "y.elsewhere.test"))
                    .answer(address(wire_name("y.elsewhere.test"), TWO)))
            })).closed(&[TWO]).holds(l)
        };
        an_owner_that_points_to_itself: |l| {
            // The header and the question: the owner stands after them.
            Case::new(|| api(|q, _| {
                let here = 12 + wire_name(API).len() + 4;
                one(Message::reply(q).answer(address(pointer(here), TWO)))
            })).closed(&[TWO]).reason("answer_unread", API).holds(l)
        };
        owners_that_point_to_each_other: |l| {
            Case::new(|| api(|q, _| {
                let first = 12 + wire_name(API).len() + 4;
                one(Message::reply(q)
                    .answer(address(pointer(first + 16), TWO))
                    .answer(address(pointer(first), TWO)))
            })).closed(&[TWO]).reason("answer_unread", API).holds(l)
        };
        an_address_of_the_wrong_size: |l| {
            Case::new(|| api(|q, _| {
                let mut data = vec![203, 0, 113, 9];
                data.resize(16, 0);
                one(Message::reply(q).answer(Record::new(asked(), A, data)))
            })).closed(&[TWO]).holds(l)
        };
        a_record_longer_than_the_message: |l| {
            Case::new(|| api(|q, _| {
                let record = Record { said_len: Some(400), ..address(asked(), TWO) };
                one(Message::reply(q).answer(record))
            })).closed(&[TWO]).reason("answer_unread", API).holds(l)
        };
        another_class: |l| {
            Case::new(|| api(|q, _| {
                one(Message::reply(q).answer(Record { class: 3, ..address(asked(), TWO) }))
            })).closed(&[TWO]).holds(l)
        };
        a_name_by_the_search_list: |l| {
            let expanded = "api.example.test.corp.test";
            assert!(expanded.ends_with(SEARCH));
            Case::new(|| Zone::new().host("api.example.test.corp.test", &[ip(ONE)]))
                .ask(vec![ask(expanded, A)]).closed(&[ONE]).holds(l)
        };
    }

    fn from(from: From) -> Zone {
        api(move |q, _| vec![Reply { bytes: plain(q).to_bytes(), from }])
    }
}

mod rebinding {
    use super::*;

    with_and_without_label! {
        to_a_private_address: |l| to("10.77.2.2", l);
        to_a_shared_address: |l| to("100.64.0.1", l);
        to_the_metadata_service: |l| to("169.254.169.254", l);
        to_a_unique_local_address: |l| to("fd77:0:0:2::2", l);
        to_an_address_that_a_cidr_rule_allows: |l| {
            let more = format!("\x20 - {{to: [10.77.2.2/32], ports: [{PLAIN}]}}\n");
            let world = World::with_policy(l, || rebound("10.77.2.2"), &policy_with(&more))?;
            Case::new(|| rebound("10.77.2.2")).opened(&["10.77.2.2"]).holds_in(&world)?;
            if let Some(sensor) = &world.sensor {
                let events = sensor.events().all()?.to_vec();
                ensure!(!events.iter().any(|e| e.is_of_a_name(NAMED, "rebinding")), "{events:?}");
            }
            anyhow::Ok(())
        };
        to_ipv4_in_ipv6_clothes: |l| {
            Case::new(|| rebound("::ffff:10.77.2.2")).ask(vec![ask(API, AAAA)]).closed(&["10.77.2.2"]).holds(l)
        };
    }

    fn rebound(to: &'static str) -> Zone {
        Zone::new().host(API, &[ip(to)])
    }

    fn to(address: &'static str, labelled: bool) -> Result<()> {
        let kind = Query::kind_of(ip(address));
        // A `fn` pointer takes no capture: one zone has them all.
        fn zone() -> Zone {
            api(|q, _| {
                let all = ["10.77.2.2", "100.64.0.1", "169.254.169.254", "fd77:0:0:2::2"];
                one(addresses_of(q, &all.map(ip)))
            })
        }
        let case = Case::new(zone).ask(vec![ask(API, kind)]).closed(&[address]);
        case.reason("rebinding", API).holds(labelled)
    }
}

mod what_is_seen {
    use super::*;

    /// In its event and in `mcp-sensor names`.
    #[test]
    fn a_connection_says_by_which_name() {
        mcp_sensor_tests::spec::must(|| {
            let world = World::new(true, plain_zone)?;
            let to = SocketAddr::new(ip(ONE), PLAIN);
            let ran = world.run(&[ask(API, A), Step::Connect { to }])?;
            ensure!(ran.last().answered(), "{}", ran.last().report);
            let sensor = world.sensor.as_ref().expect("labelled");
            let event = sensor.events().wait_for("the connection", SOON, |e| {
                e.text("type") == "connection" && e.text("verdict") == "allow" && e.text("dst.ip") == ONE
            })?;
            ensure!(event.text("dst.name") == API, "{}", event.0);
            let learned = sensor.cli(&["names", "--server", NAMED, "-o", "json"])?.to_string();
            ensure!(learned.contains(API) && learned.contains(ONE), "{learned}");
            ensure!(learned.contains(&RESOLVER.ip().to_string()), "from whom? {learned}");
            Ok(())
        });
    }

    #[test]
    fn what_is_learned_ends_with_the_policy_that_allowed_it() {
        mcp_sensor_tests::spec::must(|| {
            let world = World::new(true, plain_zone)?;
            let to = SocketAddr::new(ip(ONE), PLAIN);
            let steps = [ask(API, A), Step::Open { to }, Step::Pause, Step::Connect { to }, Step::Talk];
            let mut running = world.start(NAMED, &steps)?;
            let sensor = world.sensor.as_ref().expect("labelled");
            let less = mcp_sensor_tests::policy::Policy::standard()
                .profile(NAMED, &format!("egress: [{{to: [{OTHER}], ports: [{PLAIN}]}}]"))
                .server(NAMED, NAMED, "enforce", "");
            sensor.reload(&less)?;
            running.say("go")?;
            let outcomes = mcp_sensor_tests::names::outcomes(running, mcp_sensor_tests::bed::LIMIT)?;
            ensure!(outcomes[3].is_refused(), "a new connection: {}", outcomes[3].report);
            ensure!(!outcomes[4].answered(), "an open connection: {}", outcomes[4].report);
            Ok(())
        });
    }
}
