//! DNS as `hickory-proto` reads it, against DNS as the kernel does.

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query};
use hickory_proto::rr::rdata::{A, AAAA, CNAME};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use proptest::prelude::*;
use sensor_common::dns;
use std::net::IpAddr;

fn host() -> impl Strategy<Value = Name> {
    proptest::collection::vec("[a-zA-Z0-9_-]{1,63}", 1..5).prop_filter_map("a name of DNS", |labels| {
        Name::from_labels(labels.iter().map(String::as_bytes)).ok()
    })
}

/// The name without hickory's escapes.
fn text(name: &Name) -> String {
    let labels: Vec<_> = name.iter().map(|l| String::from_utf8_lossy(l).to_ascii_lowercase()).collect();
    labels.join(".")
}

/// What stands in one answer: records of the names of one chain, and of others.
#[derive(Clone, Debug)]
struct Answer {
    names: Vec<Name>,
    records: Vec<(usize, Option<usize>, IpAddr, u32)>,
    v6: bool,
}

fn answer() -> impl Strategy<Value = Answer> {
    let record = (0usize..4, proptest::option::of(0usize..4), any::<IpAddr>(), any::<u32>());
    (proptest::collection::vec(host(), 4), proptest::collection::vec(record, 0..24), any::<bool>())
        .prop_map(|(names, records, v6)| Answer { names, records, v6 })
}

fn encode(a: &Answer) -> Message {
    let kind = if a.v6 { RecordType::AAAA } else { RecordType::A };
    let mut message = Message::new();
    message.set_id(7).set_message_type(MessageType::Response).set_op_code(OpCode::Query);
    message.add_query(Query::query(a.names[0].clone(), kind));
    for (owner, alias, ip, ttl) in &a.records {
        let data = match (alias, ip) {
            (Some(to), _) => RData::CNAME(CNAME(a.names[*to].clone())),
            (None, IpAddr::V4(ip)) => RData::A(A(*ip)),
            (None, IpAddr::V6(ip)) => RData::AAAA(AAAA(*ip)),
        };
        message.add_answer(Record::from_rdata(a.names[*owner].clone(), *ttl, data));
    }
    message
}

/// The addresses of the name asked, by the chain as it stands, one pass.
fn followed(message: &Message) -> Vec<(IpAddr, u32)> {
    let question = &message.queries()[0];
    let mut expected = question.name().clone();
    let mut least = u32::MAX;
    let mut found = Vec::new();
    for record in message.answers() {
        if record.name() != &expected || record.dns_class() != DNSClass::IN {
            continue;
        }
        let ttl = if record.ttl() >> 31 != 0 { 0 } else { record.ttl() }.min(least);
        match record.data() {
            RData::CNAME(to) => {
                expected = to.0.clone();
                least = ttl;
            }
            RData::A(ip) if question.query_type() == RecordType::A => found.push((ip.0.into(), ttl)),
            RData::AAAA(ip) if question.query_type() == RecordType::AAAA => found.push((ip.0.into(), ttl)),
            _ => {}
        }
    }
    found
}

/// Of what the kernel's reader makes of `bytes`, if it reads them to the end.
fn read(bytes: &[u8]) -> Option<(String, Vec<(IpAddr, u32)>)> {
    let (mut questions, whole) = dns::read(bytes, false, true);
    let question = questions.pop()?;
    // A v4-mapped AAAA is IPv4 to both once normalised.
    let addresses = question.addresses.into_iter().map(|(a, t)| (a.into(), t)).collect();
    whole.then_some((question.name, addresses))
}

fn mapped(found: Vec<(IpAddr, u32)>) -> Vec<(IpAddr, u32)> {
    found.into_iter().map(|(ip, ttl)| (sensor_common::addr::Addr::from(ip).into(), ttl)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn answers_are_read_as_hickory_reads_them(a in answer()) {
        let message = encode(&a);
        let bytes = message.to_vec().expect("encoded");
        prop_assume!(bytes.len() <= dns::MESSAGE_BYTES);
        let cnames = a.records.iter().filter(|r| r.1.is_some()).count();
        prop_assume!(cnames <= 16);
        let (name, addresses) = read(&bytes).expect("a plain answer");
        prop_assert_eq!(name, text(&a.names[0]));
        prop_assert_eq!(addresses, mapped(followed(&message)));
    }

    #[test]
    fn what_is_read_of_a_damaged_answer_hickory_reads_too(a in answer(), at: prop::sample::Index, to: u8) {
        let mut bytes = encode(&a).to_vec().expect("encoded");
        let at = at.index(bytes.len());
        bytes[at] = to;
        if let Some((_, addresses)) = read(&bytes)
            && let Ok(message) = Message::from_vec(&bytes)
            && message.queries().len() == 1
        {
            prop_assert_eq!(addresses, mapped(followed(&message)));
        }
    }

    #[test]
    fn queries_are_read_as_hickory_writes_them(name in host(), kind: u16, edns: bool) {
        let mut message = Message::new();
        message.set_id(9).set_recursion_desired(true);
        message.add_query(Query::query(name.clone(), RecordType::from(kind)));
        if edns {
            message.set_edns(Edns::new());
        }
        let (questions, whole) = dns::read(&message.to_vec().expect("encoded"), false, false);
        prop_assert!(whole);
        prop_assert_eq!(&questions[0].name, &text(&name));
        prop_assert_eq!((questions[0].id, questions[0].qtype), (9, kind));
    }
}
