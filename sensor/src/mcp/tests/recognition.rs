//! What is MCP, and what is not.

use super::*;

fn first(sender: Sender, bytes: &str) -> Option<Output> {
    let mut talk = Talk::new(true);
    talk.says(sender, bytes);
    // Nothing of a candidate comes out before it is known.
    assert!(talk.out.iter().skip(1).all(|output| *output != Output::NotMcp), "{:?}", talk.out);
    talk.out.into_iter().next()
}

#[test]
fn mcp_is_recognised_by_its_first_message() {
    use Era::{Legacy, Modern};
    let client = [
        (INITIALIZE, Legacy),
        (r#"{"jsonrpc":"2.0","id":"d","method":"server/discover","params":{}}"#, Modern),
        (
            r#"{"jsonrpc":"2.0","id":1,"method":"x","params":{"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28"}}}"#,
            Modern,
        ),
        (r#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#, Legacy),
        (r#"{"jsonrpc":"2.0","id":5,"method":"tools/list"}"#, Legacy),
        (r#"{"jsonrpc":"2.0","id":5,"method":"resources/read","params":{"uri":"x:"}}"#, Legacy),
        (r#"[{"jsonrpc":"2.0","id":5,"method":"prompts/get","params":{}}]"#, Legacy),
    ];
    for (line, era) in client {
        assert_eq!(first(Sender::Client, &format!("{line}\n")), Some(Output::Recognised(era)), "{line}");
    }
    let found = first(Sender::Server, &format!("{INITIALIZED}\n"));
    assert_eq!(found, Some(Output::Recognised(Legacy)));
}

#[test]
fn other_protocols_are_not_mcp() {
    let client = [
        "Content-Length: 119\r\n\r\n{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"initialize\",\"params\":{\"processId\":1,\"capabilities\":{}}}",
        "ls -l\n",
        "\u{1b}[0m",
        "{\"a\":1}\n",
        "{a}\n",
        "[1,2,3]\n",
        // ACP, with its number for a version.
        "{\"jsonrpc\":\"2.0\",\"id\":0,\"method\":\"initialize\",\"params\":{\"protocolVersion\":1,\"clientCapabilities\":{\"fs\":{}},\"clientInfo\":{\"name\":\"z\",\"version\":\"1\"}}}\n",
        "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"session/new\",\"params\":{\"mcpServers\":[]}}\n",
        // Codex's app server, with and without a version of JSON-RPC.
        "{\"method\":\"initialize\",\"id\":0,\"params\":{\"clientInfo\":{\"name\":\"v\",\"version\":\"1\"}}}\n",
        "{\"jsonrpc\":\"2.0\",\"method\":\"initialize\",\"id\":0,\"params\":{\"clientInfo\":{\"name\":\"v\",\"version\":\"1\"}}}\n",
        "{\"jsonrpc\":\"2.0\",\"method\":\"thread/start\",\"id\":0,\"params\":{}}\n",
        // A language server without its framing.
        "{\"jsonrpc\":\"2.0\",\"method\":\"initialized\",\"params\":{}}\n",
    ];
    for bytes in client {
        assert_eq!(first(Sender::Client, bytes), Some(Output::NotMcp), "{bytes}");
    }
    let server = "total 0\n".repeat(200);
    assert_eq!(first(Sender::Server, &server), Some(Output::NotMcp));
}

#[test]
fn a_banner_of_the_server_decides_nothing() {
    let mut talk = Talk::new(true);
    talk.server("[dotenv@17.2.0] injecting env (0) from .env").server("{\"level\":\"info\",\"msg\":\"up\"}");
    assert_eq!(talk.out, []);
    talk.client(INITIALIZE);
    assert_eq!(talk.out[0], Output::Recognised(Era::Legacy));
}

#[test]
fn a_candidate_that_stays_undecided_is_dropped_after_64_kib_each_way() {
    let mut talk = Talk::new(true);
    let line = r#"{"jsonrpc":"2.0","id":1,"method":"eth_call","params":["0x0"]}"#;
    for _ in 0..2000 {
        talk.client(line);
    }
    assert_eq!(talk.out, []);
    for _ in 0..2000 {
        talk.server(r#"{"jsonrpc":"2.0","id":1,"result":"0x0000000000000000000"}"#);
    }
    assert_eq!(talk.out, [Output::NotMcp]);
    talk.client(INITIALIZE).close();
    assert_eq!(talk.out.len(), 1);
}

#[test]
fn a_wire_met_in_the_middle_is_recognised_at_the_next_line() {
    let mut talk = Talk::new(true);
    for sender in [Sender::Client, Sender::Server] {
        talk.connection.gap(sender, 0, 0, &mut (), &mut talk.out);
    }
    talk.says(Sender::Client, "rest\":\"of a message\"}}\n").says(Sender::Server, "0}\n");
    assert_eq!(talk.out, []);
    talk.client(CALL).server(FAILED);
    assert_eq!(talk.out[0], Output::Recognised(Era::Legacy));
    assert_eq!(talk.ends(), [("tools/call", "echo", Outcome::ToolError)]);
}

#[test]
fn garbage_never_ends_a_declared_server() {
    let mut talk = Talk::new(false);
    talk.client("Content-Length: 1").server(&"x".repeat(100_000)).client(CALL).server(FAILED);
    assert_eq!(talk.ends(), [("tools/call", "echo", Outcome::ToolError)]);
    assert!(!talk.out.contains(&Output::NotMcp));
}
