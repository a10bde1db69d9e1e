//! Hostile input costs bounded time and memory.

use std::time::{Duration, Instant};

use super::*;

/// Plenty even for a debug build on a busy machine; quadratic work takes minutes.
const LIMIT: Duration = Duration::from_secs(20);

fn feed(bytes: &[u8]) -> Talk {
    let began = Instant::now();
    let mut talk = Talk::new(false);
    talk.client(r#"{"jsonrpc":"2.0","id":1,"method":"tools/list"}"#);
    talk.out.clear();
    for chunk in bytes.chunks(16 * 1024) {
        talk.connection.bytes(Sender::Server, 0, chunk, &mut (), &mut talk.out);
    }
    talk.says(Sender::Server, "\n");
    assert!(began.elapsed() < LIMIT, "{:?}", began.elapsed());
    // Whatever it was, the next line counts.
    talk.client(CALL.replace("\"id\":1", "\"id\":7").as_str())
        .server(&FAILED.replace("\"id\":1", "\"id\":7"));
    assert_eq!(talk.ends().last(), Some(&("tools/call", "echo", Outcome::ToolError)));
    talk
}

fn unread(talk: &Talk) -> Vec<(u64, &'static str)> {
    let unread = talk.out.iter().filter_map(|output| match output {
        Output::Uninspected { bytes, how, .. } => Some((*bytes, *how)),
        _ => None,
    });
    unread.collect()
}

#[test]
fn deep_nesting_is_too_deep() {
    let line = r#"{"jsonrpc":"2.0","id":1,"result":"#.to_owned() + &"[".repeat(3 << 20);
    let talk = feed(line.as_bytes());
    let unread = unread(&talk);
    assert!(unread.iter().all(|(_, how)| *how == "too_deep"), "{unread:?}");
    assert_eq!(unread.iter().map(|(bytes, _)| bytes).sum::<u64>(), line.len() as u64);
}

#[test]
fn a_depth_of_128_is_read() {
    let line = |depth: usize| {
        format!(r#"{{"jsonrpc":"2.0","id":1,"result":{}{}}}"#, "[".repeat(depth - 1), "]".repeat(depth - 1))
    };
    assert_eq!(unread(&feed(line(128).as_bytes())), []);
    assert_eq!(unread(&feed(line(129).as_bytes())), [(line(129).len() as u64, "too_deep")]);
}

#[test]
fn ten_megabytes_of_backslashes_are_read() {
    let line = format!(r#"{{"jsonrpc":"2.0","id":1,"result":{{"x":"{}"}}}}"#, "\\".repeat(10 << 20));
    assert_eq!(unread(&feed(line.as_bytes())), []);
}

#[test]
fn ten_megabytes_of_bytes_that_are_no_utf8_are_counted() {
    let mut line = br#"{"jsonrpc":"2.0","id":1,"result":{"x":""#.to_vec();
    line.extend(std::iter::repeat_n(0xff, 10 << 20));
    line.extend_from_slice(br#""}}"#);
    assert_eq!(unread(&feed(&line)), [(10 << 20, "bad_utf8")]);
}

#[test]
fn a_million_keys_and_a_million_elements_are_read() {
    let keys: Vec<_> = (0..1_000_000).map(|n| format!(r#""{n}":0"#)).collect();
    let line = format!(r#"{{"jsonrpc":"2.0","id":1,"result":{{{}}}}}"#, keys.join(","));
    assert_eq!(unread(&feed(line.as_bytes())), []);
    let line = format!(r#"{{"jsonrpc":"2.0","id":1,"result":[{}0]}}"#, "0,".repeat(1_000_000));
    assert_eq!(unread(&feed(line.as_bytes())), []);
}

#[test]
fn ids_and_numbers_of_a_megabyte_are_told_apart() {
    let digits = "1".repeat(1 << 20);
    let mut talk = Talk::new(false);
    for id in [format!("\"{digits}\""), digits.clone(), format!("{digits}1"), format!("\"{digits}1\"")] {
        talk.client(&format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"ping"}}"#));
    }
    talk.server(&format!(r#"{{"jsonrpc":"2.0","id":{digits},"result":{{}}}}"#));
    talk.server(&format!(r#"{{"jsonrpc":"2.0","id":"{digits}","result":{{}}}}"#));
    assert_eq!(talk.ends().len(), 2);
    assert_eq!(talk.close().ends().len(), 4);
}

#[test]
fn a_list_of_tools_beyond_the_limit_is_cut() {
    // Small texts that would take a lot of memory, and one large text.
    let small = format!(r#"{{"name":"s","x":[{}0]}}"#, "[],".repeat(300_000));
    let large = format!(r#"{{"name":"l","x":"{}"}}"#, "x".repeat(2 << 20));
    let line = format!(
        r#"{{"jsonrpc":"2.0","id":1,"result":{{"tools":[{{"name":"a"}},{small},{large},{{"name":"b"}}]}}}}"#
    );
    let talk = feed(line.as_bytes());
    let Output::Tools(_, page) = &talk.out[0] else { panic!("{:?}", talk.out[0]) };
    assert!(page.cut && page.first && page.last);
    assert_eq!(page.tools.iter().map(|tool| tool.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
}

#[test]
fn pending_requests_are_bounded_and_the_oldest_ends() {
    let mut talk = Talk::new(false);
    for id in 0..5000 {
        talk.client(&format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"ping"}}"#));
    }
    assert_eq!(talk.ends().len(), 5000 - 4096);
    assert_eq!(talk.connection.counters().evicted, 5000 - 4096);
    assert!(talk.ends().iter().all(|(_, _, outcome)| *outcome == Outcome::NoResponse));
    assert_eq!(talk.close().ends().len(), 5000);
}
