use super::*;

fn name(labels: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for label in labels.split('.').filter(|l| !l.is_empty()) {
        out.push(label.len() as u8);
        out.extend(label.bytes());
    }
    out.push(0);
    out
}

fn message(id: u16, flags: u16, counts: [u16; 4], rest: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::new();
    for half in [id, flags].into_iter().chain(counts) {
        out.extend(half.to_be_bytes());
    }
    out.extend(rest.concat());
    out
}

fn query(labels: &str, qtype: u16) -> Vec<u8> {
    message(7, 0x0100, [1, 0, 0, 0], &[&name(labels), &qtype.to_be_bytes(), &[0, 1]])
}

fn record(owner: &[u8], kind: u16, ttl: u32, data: &[u8]) -> Vec<u8> {
    let len = (data.len() as u16).to_be_bytes();
    [owner, &kind.to_be_bytes(), &[0, 1], &ttl.to_be_bytes(), &len, data].concat()
}

const AT_QUESTION: [u8; 2] = [0xc0, 12];

#[test]
fn a_plain_query_is_read_in_lower_case() {
    let (questions, whole) = read(&query("WwW.Example.COM", A), false, false);
    assert!(whole);
    assert_eq!((questions[0].name.as_str(), questions[0].qtype, questions[0].id), ("www.example.com", A, 7));
}

#[test]
fn what_no_resolver_sends_is_not_read() {
    let good = query("a.example", A);
    for cut in 0..good.len() {
        assert!(!read(&good[..cut], false, false).1, "{cut} bytes");
    }
    let mut trailing = good.clone();
    trailing.push(0);
    assert!(!read(&trailing, false, false).1);
    let mut response = good;
    response[2] |= 0x80;
    assert!(!read(&response, false, false).1);
    assert!(!read(&query("a b.example", A), false, false).1);
    let dotted = message(7, 0x0100, [1, 0, 0, 0], &[&[3, b'a', b'.', b'b', 0], &[0, 1, 0, 1]]);
    assert!(!read(&dotted, false, false).1, "a dot within a label");
    let two = message(7, 0x0100, [2, 0, 0, 0], &[&name("a.b"), &[0, 1, 0, 1], &name("c.d"), &[0, 1, 0, 1]]);
    assert!(!read(&two, false, false).1);
    let pointer = message(7, 0x0100, [1, 0, 0, 0], &[&[0xc0, 12], &[0, 1, 0, 1]]);
    assert!(!read(&pointer, false, false).1);
}

#[test]
fn edns_may_carry_a_cookie_and_nothing_else() {
    let opt = |data: &[u8]| {
        let opt = [&[0, 0, 41, 16, 0, 0, 0, 0x80, 0][..], &(data.len() as u16).to_be_bytes(), data].concat();
        message(7, 0x0120, [1, 0, 0, 1], &[&name("a.example"), &[0, 1, 0, 1], &opt])
    };
    assert!(read(&opt(&[]), false, false).1);
    assert!(read(&opt(&[0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8]), false, false).1);
    assert!(!read(&opt(&[0, 12, 0, 4, 1, 2, 3, 4]), false, false).1, "padding");
    assert!(!read(&opt(&[0, 10, 0, 2, 1, 2, 0, 10, 0, 0]), false, false).1, "two options");
}

#[test]
fn tcp_segments_hold_several_messages() {
    let framed = |m: Vec<u8>| [&(m.len() as u16).to_be_bytes()[..], &m].concat();
    let two = [framed(query("a.example", A)), framed(query("a.example", AAAA))].concat();
    let (questions, whole) = read(&two, true, false);
    assert!(whole);
    assert_eq!(questions.iter().map(|q| q.qtype).collect::<Vec<_>>(), [A, AAAA]);
    for cut in 1..two.len() {
        let whole_messages = cut == framed(query("a.example", A)).len();
        assert_eq!(read(&two[..cut], true, false).1, whole_messages, "{cut}");
    }
}

#[test]
fn addresses_follow_the_chain_that_begins_at_the_question() {
    let answer = message(
        7,
        0x8180,
        [1, 5, 0, 0],
        &[
            &name("www.example.com"),
            &[0, 1, 0, 1],
            &record(&name("evil.example"), A, 60, &[6, 6, 6, 6]),
            &record(&AT_QUESTION, 5, 30, &name("cdn.example.net")),
            &record(&AT_QUESTION, A, 60, &[6, 6, 6, 7]),
            &record(&name("CDN.example.net"), A, 300, &[192, 0, 2, 1]),
            &record(&name("cdn.example.net"), A, 10, &[192, 0, 2, 2]),
        ],
    );
    let (questions, whole) = read(&answer, false, true);
    assert!(whole);
    let ip = |a: Addr| std::net::IpAddr::from(a).to_string();
    let got: Vec<_> = questions[0].addresses.iter().map(|(a, t)| (ip(*a), *t)).collect();
    assert_eq!(got, [("192.0.2.1".to_owned(), 30), ("192.0.2.2".to_owned(), 10)]);
}

#[test]
fn pointer_loops_end() {
    let question = name("a.example");
    let at = (12 + question.len() + 4) as u8;
    for owner in [[0xc0, at], [0xc0, at + 1], [0xff, 0xff]] {
        let answer = message(
            7,
            0x8180,
            [1, 1, 0, 0],
            &[&question, &[0, 1, 0, 1], &record(&owner, A, 1, &[1, 2, 3, 4])],
        );
        let (questions, whole) = read(&answer, false, true);
        assert!(!whole && questions[0].addresses.is_empty(), "{owner:?}");
    }
}

proptest::proptest! {
    #[test]
    fn any_bytes_end(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..600), framed: bool, answers: bool) {
        let _ = read(&bytes, framed, answers);
    }
}
