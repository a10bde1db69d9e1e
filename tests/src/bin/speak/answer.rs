//! What is said; how it is said is the other files' business.

use serde_json::{Value, json};

/// The answer to one line, newline included; none to a notification.
pub(crate) fn to(line: &[u8]) -> Option<Vec<u8>> {
    let message: Value = serde_json::from_slice(line).ok()?;
    let reply = match &message {
        Value::Array(batch) => {
            let replies: Vec<Value> = batch.iter().filter_map(one).collect();
            if replies.is_empty() {
                return None;
            }
            Value::Array(replies)
        }
        single => one(single)?,
    };
    let mut text = reply.to_string().into_bytes();
    text.push(b'\n');
    Some(text)
}

fn one(message: &Value) -> Option<Value> {
    let id = message.get("id")?;
    let method = message["method"].as_str()?;
    let said = match method {
        "initialize" => json!({"result": {
            "protocolVersion": message["params"]["protocolVersion"],
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "speak", "version": "1.0.0"},
        }}),
        "tools/list" => json!({"result": {"tools": [
            {"name": "echo", "description": "Says so many bytes.", "inputSchema": {"type": "object"}},
        ]}}),
        "tools/call" => call(&message["params"]),
        _ => json!({"error": {"code": -32601, "message": "no such method"}}),
    };
    let mut reply = json!({"jsonrpc": "2.0", "id": id});
    reply.as_object_mut()?.extend(said.as_object()?.clone());
    Some(reply)
}

fn call(params: &Value) -> Value {
    let text = |t: &str| json!([{"type": "text", "text": t}]);
    match params["name"].as_str() {
        Some("echo") => {
            let count = params["arguments"]["bytes"].as_u64().unwrap_or(1) as usize;
            json!({"result": {"content": text(&"x".repeat(count))}})
        }
        Some("fail") => json!({"result": {"content": text("it failed"), "isError": true}}),
        _ => json!({"error": {"code": -32602, "message": "no such tool"}}),
    }
}
