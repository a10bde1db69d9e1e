//! What goes out in which request, whatever the receiver refuses.

use super::*;
use proptest::prelude::*;

fn event(seq: u64, bytes: usize) -> Event {
    Event { seq, sensor: "s".repeat(bytes), boot: "b".to_owned(), ..Default::default() }
}

fn begun(events: &[Event], most: usize) -> Begun {
    let next = events.len() as u64;
    Begun::new(&Batch { log: 7, from: 0, next, events }, Format::Ndjson, most).unwrap()
}

proptest! {
    /// A receiver that refuses every request with one of some events in it gets
    /// all others once and in order, and is told of exactly these.
    #[test]
    fn what_is_refused_is_found_and_the_rest_goes_out_once_and_in_order(
        sizes in prop::collection::vec(0usize..400, 1..60),
        bad in prop::collection::hash_set(0usize..60, 0..10),
        most in 300usize..2000,
        array in any::<bool>(),
    ) {
        let events: Vec<Event> = sizes.iter().enumerate().map(|(n, bytes)| event(n as u64, *bytes)).collect();
        let mut begun = begun(&events, most);
        let body = if array { Body::Array } else { Body::Ndjson };
        let (mut got, mut keys) = (Vec::new(), Vec::new());
        while let Some(part) = begun.parts.pop() {
            prop_assert!(!part.is_empty());
            let bytes = begun.body(part.clone(), body, false).unwrap();
            prop_assert!(bytes.len() <= most);
            keys.push(begun.key(7, &part));
            if part.clone().any(|n| bad.contains(&n)) {
                begun.refuse(part, REFUSED);
                continue;
            }
            let values: Vec<Value> = match body {
                Body::Array => serde_json::from_slice(&bytes).unwrap(),
                Body::Ndjson => bytes.split(|b| *b == b'\n').filter(|l| !l.is_empty())
                    .map(|l| serde_json::from_slice(l).unwrap()).collect(),
            };
            got.extend(values.iter().map(|v| v["seq"].as_u64().unwrap() as usize));
        }
        let large = |n: usize| begun.lines[n].len() + 3 > most;
        let reason = |n: usize| if large(n) { Some(TOO_LARGE) } else { bad.contains(&n).then_some(REFUSED) };
        let mut refused = begun.refused.clone();
        refused.sort_by_key(|r| r.event);
        let expected: Vec<Refused> =
            (0..events.len()).filter_map(|event| Some(Refused { event, reason: reason(event)? })).collect();
        prop_assert_eq!(refused, expected);
        prop_assert!(got.into_iter().eq((0..events.len()).filter(|n| reason(*n).is_none())));
        let count = keys.len();
        keys.sort();
        keys.dedup();
        prop_assert_eq!(keys.len(), count, "no two requests have the same key");
    }
}

#[test]
fn a_body_that_is_compressed_is_the_same_body() {
    use std::io::Read as _;
    let events = [event(1, 1), event(2, 1)];
    let begun = begun(&events, 10_000);
    let plain = begun.body(0..2, Body::Ndjson, false).unwrap();
    let packed = begun.body(0..2, Body::Ndjson, true).unwrap();
    let mut text = Vec::new();
    flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut text).unwrap();
    assert_eq!(text, plain);
}
