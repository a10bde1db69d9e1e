//! Which answer belongs to which request, and what became of it.

use super::*;

fn answer(id: &str, rest: &str) -> String {
    format!(r#"{{{rest},"jsonrpc":"2.0","id":{id}}}"#)
}

fn ask(id: &str, method: &str, params: &str) -> String {
    format!(r#"{{"method":"{method}","params":{{{params}}},"jsonrpc":"2.0","id":{id}}}"#)
}

fn call(id: &str, name: &str) -> String {
    ask(id, "tools/call", &format!(r#""name":"{name}""#))
}

const OK: &str = r#""result":{}"#;

fn exchanges(talk: &Talk) -> Vec<Exchange> {
    let ended = talk.out.iter().filter_map(|output| match output {
        Output::Ended(exchange) | Output::Tools(exchange, _) => Some((**exchange).clone()),
        _ => None,
    });
    ended.collect()
}

#[test]
fn ids_are_paired_with_their_type() {
    let mut talk = Talk::new(false);
    for id in ["0", "1", "\"1\"", "-1", "\"\"", "2.5"] {
        talk.client(&call(id, id.trim_matches('"')));
    }
    for id in ["\"1\"", "1.0", "2.50", "0e0", "\"\"", "-1e0"] {
        talk.server(&answer(id, OK));
    }
    let names: Vec<_> = exchanges(&talk).into_iter().map(|exchange| exchange.name).collect();
    // 2.50 is not what was sent.
    assert_eq!(names, ["1", "1", "0", "", "-1"]);
    assert_eq!(talk.connection.counters().unpaired, 1);
    let hashes: std::collections::HashSet<_> =
        exchanges(&talk).iter().map(|exchange| exchange.id_hash).collect();
    assert_eq!(hashes.len(), 5);
}

#[test]
fn outcomes_are_told_apart() {
    let mut talk = Talk::new(false);
    let answers = [
        (OK, Outcome::Ok),
        (r#""result":{"isError":false}"#, Outcome::Ok),
        (r#""result":{"isError":true}"#, Outcome::ToolError),
        (r#""error":{"message":"x","code":-32602}"#, Outcome::RpcError(-32602)),
        (r#""error":{"code":-3.2601e4}"#, Outcome::RpcError(-32601)),
        (r#""error":"x""#, Outcome::RpcError(0)),
        (r#""error":null,"result":{}"#, Outcome::Ok),
        (r#""result":{"resultType":"complete"}"#, Outcome::Ok),
        (r#""result":{"resultType":"input_required"}"#, Outcome::InputRequired),
        (r#""result":{"resultType":"task"}"#, Outcome::Task),
        (r#""result":{"task":{"taskId":"t"}}"#, Outcome::Task),
        (r#""\u0072esult":{"is\u0045rror":true}"#, Outcome::ToolError),
    ];
    for (rest, outcome) in answers {
        talk.client(&call("7", "t")).server(&answer("7", rest));
        assert_eq!(talk.ends().last(), Some(&("tools/call", "t", outcome)), "{rest}");
    }
    assert_eq!(talk.ends().len(), answers.len());
}

#[test]
fn a_cancelled_request_ends_once_and_its_late_answer_is_counted() {
    let mut talk = Talk::new(false);
    talk.client(&call("1", "slow")).client(&call("2", "fast"));
    let cancel =
        r#"{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":1,"reason":"x"}}"#;
    talk.client(cancel).client(cancel);
    // The server cannot cancel what the client asked.
    talk.server(&cancel.replace(":1", ":2"));
    talk.server(&answer("1", OK)).server(&answer("2", OK)).close();
    assert_eq!(
        talk.ends(),
        [("tools/call", "slow", Outcome::Cancelled), ("tools/call", "fast", Outcome::Ok)]
    );
    assert_eq!(talk.connection.counters(), Counters { late: 1, ..Counters::default() });
}

#[test]
fn an_answer_before_the_cancellation_counts() {
    let mut talk = Talk::new(false);
    talk.client(&call("1", "t")).server(&answer("1", OK));
    talk.client(r#"{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":1}}"#).close();
    assert_eq!(talk.ends(), [("tools/call", "t", Outcome::Ok)]);
}

#[test]
fn an_id_used_again_ends_the_request_before() {
    let mut talk = Talk::new(false);
    talk.client(&call("1", "a")).client(&call("1", "b")).server(&answer("1", OK)).server(&answer("1", OK));
    assert_eq!(talk.ends(), [("tools/call", "a", Outcome::NoResponse), ("tools/call", "b", Outcome::Ok)]);
    assert_eq!(talk.connection.counters().unpaired, 1);
}

#[test]
fn requests_of_the_server_are_paired_the_other_way() {
    let mut talk = Talk::new(false);
    talk.client(&call("1", "t")).server(&ask("1", "sampling/createMessage", ""));
    talk.server(&answer("1", r#""result":{"isError":true}"#)).client(&answer("1", OK));
    let ended = exchanges(&talk);
    assert_eq!(ended[0].outcome, Outcome::ToolError);
    assert_eq!((ended[1].method.as_str(), ended[1].sender), ("sampling/createMessage", Sender::Server));
    assert_eq!(ended[1].outcome, Outcome::Ok);
}

#[test]
fn progress_belongs_to_the_token_of_the_request() {
    let mut talk = Talk::new(false);
    talk.client(&ask("1", "tools/call", r#""name":"a","_meta":{"progressToken":"p"}"#));
    talk.client(&ask("2", "tools/call", r#""name":"b","_meta":{"progressToken":2}"#));
    for token in ["\"p\"", "2", "\"p\"", "\"2\""] {
        talk.server(&format!(
            r#"{{"jsonrpc":"2.0","method":"notifications/progress","params":{{"progressToken":{token},"progress":1}}}}"#
        ));
    }
    talk.server(&answer("1", OK)).server(&answer("2", OK));
    let counts: Vec<_> = exchanges(&talk).iter().map(|exchange| exchange.progress).collect();
    assert_eq!(counts, [2, 1]);
}

#[test]
fn a_list_is_told_page_by_page() {
    let mut talk = Talk::new(false);
    talk.client(&ask("1", "tools/list", ""));
    talk.server(&answer(
        "1",
        r#""result":{"nextCursor":"n","tools":[{"name":"a","inputSchema":{"b":1e3}}]}"#,
    ));
    talk.client(&ask("2", "tools/list", r#""cursor":"n""#)).server(&answer("2", r#""result":{"tools":[]}"#));
    let pages: Vec<_> = talk
        .out
        .iter()
        .filter_map(|output| match output {
            Output::Tools(_, page) => Some((page.first, page.last, page.cut, page.tools.clone())),
            _ => None,
        })
        .collect();
    let tool = serde_json::json!({"name": "a", "inputSchema": {"b": 1e3}});
    assert_eq!(
        pages,
        [(true, false, false, vec![ListedTool { name: "a".into(), tool }]), (false, true, false, vec![])]
    );
}

#[test]
fn modern_requests_say_who_asks() {
    let mut talk = Talk::new(true);
    let meta = r#""name":"t","_meta":{"io.modelcontextprotocol/clientCapabilities":{"b":1,"a":2},"io.modelcontextprotocol/clientInfo":{"version":"2","name":"c"},"io.modelcontextprotocol/protocolVersion":"2026-07-28"}"#;
    talk.client(&ask("1", "tools/call", meta));
    talk.server(&answer(
        "1",
        r#""result":{"resultType":"complete","_meta":{"io.modelcontextprotocol/serverInfo":{"name":"s","version":"3"}}}"#,
    ));
    assert_eq!(talk.out[0], Output::Recognised(Era::Modern));
    let parties = &exchanges(&talk)[0].parties;
    assert_eq!(parties.era, Some(Era::Modern));
    assert_eq!(parties.protocol_version, "2026-07-28");
    assert_eq!((parties.client.name.as_str(), parties.server.version.as_str()), ("c", "3"));
    let canonical = <sha2::Sha256 as sha2::Digest>::digest(r#"{"a":2,"b":1}"#);
    assert_eq!(parties.client_capabilities, Some(canonical.into()));
}

#[test]
fn batches_are_taken_apart() {
    let mut talk = Talk::new(false);
    let (a, b) = (call("1", "a"), call("2", "b"));
    talk.client(&format!("[{a} , {b},5]"));
    talk.server(&format!("[ {},{}]", answer("2", OK), answer("1", OK)));
    let ended = exchanges(&talk);
    assert_eq!((ended[0].name.as_str(), ended[0].request_bytes), ("b", b.len() as u64));
    assert_eq!((ended[1].name.as_str(), ended[1].response_bytes), ("a", answer("1", OK).len() as u64));
    // Brackets, commas and what is no message.
    let unread = Output::Uninspected { sender: Sender::Client, bytes: 7, how: "garbage" };
    assert!(talk.out.contains(&unread), "{:?}", talk.out);
}

#[test]
fn garbage_is_counted_once_a_line_and_summed_while_it_goes_on() {
    let mut talk = Talk::new(false);
    talk.server("listening").server("on \"stdio").server("").server("{\"level\":1}");
    talk.client(&call("1", "t")).server(&answer("1", OK));
    let of = |bytes| Output::Uninspected { sender: Sender::Server, bytes, how: "garbage" };
    assert_eq!(talk.out.iter().filter(|output| matches!(output, Output::Uninspected { .. })).count(), 2);
    assert!(talk.out.contains(&of(9)) && talk.out.contains(&of(9 + 11)), "{:?}", talk.out);
}

#[test]
fn behind_a_gap_reading_goes_on_at_the_next_line() {
    let mut talk = Talk::new(false);
    talk.client(&call("1", "t")).client(&call("2", "u"));
    talk.says(Sender::Server, &answer("1", OK)[..20]);
    talk.connection.gap(Sender::Server, 0, 9, &mut talk.shown, &mut talk.out);
    // It looks like an answer, and may be part of one.
    talk.server(&answer("1", OK)).server(&answer("2", OK)).close();
    assert_eq!(talk.ends(), [("tools/call", "u", Outcome::Ok), ("tools/call", "t", Outcome::NoResponse)]);
    let unread: u64 = talk
        .out
        .iter()
        .map(|output| if let Output::Uninspected { bytes, .. } = output { *bytes } else { 0 })
        .sum();
    assert_eq!(unread, 20 + answer("1", OK).len() as u64);
}

#[test]
fn the_last_line_needs_no_newline() {
    let mut talk = Talk::new(false);
    talk.client(&call("1", "t")).says(Sender::Server, answer("1", OK)).close();
    assert_eq!(talk.ends(), [("tools/call", "t", Outcome::Ok)]);
}

#[test]
fn what_is_no_utf8_is_counted_and_the_message_still_read() {
    let mut talk = Talk::new(false);
    talk.client(&call("1", "t"));
    talk.says(Sender::Server, b"{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{\"x\":\"a\xff\xe2\x82b\"}}\n");
    assert_eq!(talk.ends(), [("tools/call", "t", Outcome::Ok)]);
    assert!(talk.out.contains(&Output::Uninspected { sender: Sender::Server, bytes: 3, how: "bad_utf8" }));
    assert_eq!(talk.shown.values.last(), Some(&("/result/x".into(), "a\u{fffd}\u{fffd}b".into())));
}

#[test]
fn pointers_are_escaped_and_bounded() {
    let mut talk = Talk::new(false);
    let long = "k".repeat(300);
    talk.client(&ask("1", "tools/call", &format!(r#""a/b~c":[{{"":["x"]}},"y"],"{long}":{{"z":"w"}}"#)));
    let places: Vec<_> = talk.shown.values.iter().map(|(place, _)| place.as_str()).collect();
    assert_eq!(places[..2], ["/params/a~1b~0c/0//0", "/params/a~1b~0c/1"]);
    assert!(places[2].len() == 256 && places[2].starts_with("/params/kkk"));
}
