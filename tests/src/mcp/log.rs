//! What a client keeps of its own wire (`tests/clients`).

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

/// A tools/call and what became of it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Call {
    pub tool: String,
    /// In the sensor's words; an error with its code: `rpc_error -32602`.
    pub outcome: String,
    /// Bytes of the JSON texts, without the newline.
    pub request_bytes: u64,
    pub response_bytes: u64,
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}/{} B", self.tool, self.outcome, self.request_bytes, self.response_bytes)
    }
}

impl Call {
    /// It got an answer that counts: its place in the order is known.
    pub fn is_answered(&self) -> bool {
        !["cancelled", "no_response"].contains(&self.outcome.as_str())
    }
}

/// Who asked for what: (`client` or `server`, method).
pub type Asked = (&'static str, String);

#[derive(Debug, Default)]
pub struct Log {
    /// Those that were answered in the order of their answers, then the others.
    pub calls: Vec<Call>,
    /// Every request, by who sent it and method.
    pub requests: BTreeMap<Asked, usize>,
    /// Progress notifications.
    pub progress: usize,
    /// Processes that the client started: more than one if it tried first.
    pub processes: usize,
    /// HTTP requests, without what came of them.
    pub exchanges: Vec<Exchanged>,
    /// Those whose response began, without `received`.
    pub begun: Vec<Exchanged>,
    /// The server named a session.
    pub named: bool,
    /// Those whose response was read to its end.
    pub whole: Vec<Exchanged>,
    /// What is spoken.
    pub protocol_version: String,
}

/// An HTTP request and its response, in bytes of their bodies.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(default)]
pub struct Exchanged {
    pub method: String,
    pub status: u64,
    pub sent: u64,
    pub received: u64,
}

/// One JSON-RPC message on a wire, or what an SDK told its caller of a call.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Record {
    /// Set: this is what the caller was told of this tool.
    pub call: Option<String>,
    pub outcome: String,
    /// Set: this is an HTTP request, one whose response begins, or has ended.
    pub asked: Option<Exchanged>,
    pub began: Option<Exchanged>,
    /// Of an HTTP response: it names a session.
    pub named: bool,
    pub ended: Option<Exchanged>,
    pub process: u64,
    /// `sent` by the client, or `received`.
    pub way: String,
    pub bytes: u64,
    pub id: Option<Value>,
    pub method: String,
    pub name: Value,
    pub request_id: Value,
    /// As a request of the modern era says with every message.
    pub version: String,
    pub error: Option<i64>,
    pub result: Option<ResultFields>,
}

/// Of a result, what says how it went.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ResultFields {
    pub is_error: bool,
    pub result_type: String,
    pub protocol_version: String,
}

struct Pending {
    method: String,
    name: String,
    bytes: u64,
    cancelled: bool,
}

impl Log {
    /// A script's log, if what the SDK told its caller agrees with the wire.
    pub fn read(path: &Path) -> Result<Log> {
        let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
        let records: Vec<Record> =
            text.lines().map(serde_json::from_str).collect::<Result<_, _>>().context("a client's log")?;
        let log = Log::of(&records)?;
        let told = records.iter().filter_map(|r| Some((r.call.clone()?, r.outcome.clone()))).collect();
        log.agrees_with(told)?;
        Ok(log)
    }

    pub fn of(records: &[Record]) -> Result<Log> {
        let mut log = Log::default();
        let mut pending: BTreeMap<(u64, bool, String), Pending> = BTreeMap::new();
        let (mut processes, mut unanswered) = (BTreeSet::new(), Vec::new());
        log.exchanges = records.iter().filter_map(|r| r.asked.clone()).collect();
        log.begun = records.iter().filter_map(|r| r.began.clone()).collect();
        log.named = records.iter().any(|r| r.named);
        log.whole = records.iter().filter_map(|r| r.ended.clone()).collect();
        let is_message =
            |r: &&Record| r.call.is_none() && r.asked.is_none() && r.began.is_none() && r.ended.is_none();
        for record in records.iter().filter(is_message) {
            if !record.version.is_empty() {
                log.protocol_version.clone_from(&record.version);
            }
            if let Some(result) = &record.result
                && !result.protocol_version.is_empty()
            {
                log.protocol_version.clone_from(&result.protocol_version);
            }
            processes.insert(record.process);
            let by_client = record.way == "sent";
            match (record.method.as_str(), &record.id) {
                ("", None) => {}
                ("", Some(id)) => {
                    let asked = pending.remove(&(record.process, !by_client, id.to_string()));
                    // A refusal over HTTP need not know what it refuses.
                    if asked.is_none() && record.error.is_some() && !log.exchanges.is_empty() {
                        continue;
                    }
                    let asked =
                        asked.with_context(|| format!("an answer that nobody asked for: {record:?}"))?;
                    if asked.method == "tools/call" {
                        let calls = if asked.cancelled { &mut unanswered } else { &mut log.calls };
                        let outcome = if asked.cancelled { "cancelled".into() } else { record.outcome() };
                        calls.push(asked.ended(outcome, record.bytes));
                    }
                }
                ("notifications/cancelled", _) => {
                    let id = record.request_id.to_string();
                    if let Some(asked) = pending.get_mut(&(record.process, by_client, id)) {
                        asked.cancelled = true;
                    }
                }
                ("notifications/progress", _) => log.progress += 1,
                (_, None) => {}
                (method, Some(id)) => {
                    let sender = if by_client { "client" } else { "server" };
                    *log.requests.entry((sender, method.to_owned())).or_default() += 1;
                    let name = record.name.as_str().unwrap_or("").to_owned();
                    let asked =
                        Pending { method: method.to_owned(), name, bytes: record.bytes, cancelled: false };
                    pending.insert((record.process, by_client, id.to_string()), asked);
                }
            }
        }
        for asked in pending.into_values().filter(|a| a.method == "tools/call") {
            let outcome = if asked.cancelled { "cancelled" } else { "no_response" };
            unanswered.push(asked.ended(outcome.into(), 0));
        }
        log.calls.extend(unanswered);
        log.processes = processes.len();
        Ok(log)
    }

    /// The SDK told its caller the same as stood on the wire. What only asks
    /// for more is the SDK's own business.
    fn agrees_with(&self, mut told: Vec<(String, String)>) -> Result<()> {
        let mut seen: Vec<_> = self
            .calls
            .iter()
            .filter(|c| c.outcome != "input_required")
            .map(|c| (c.tool.clone(), c.outcome.clone()))
            .collect();
        seen.sort();
        told.sort();
        ensure!(seen == told, "the SDK told its caller {told:?}, its wire carried {seen:?}");
        Ok(())
    }

    pub fn asked(&self, sender: &'static str, method: &str) -> usize {
        self.requests.get(&(sender, method.to_owned())).copied().unwrap_or(0)
    }
}

impl Pending {
    fn ended(self, outcome: String, response_bytes: u64) -> Call {
        Call { tool: self.name, outcome, request_bytes: self.bytes, response_bytes }
    }
}

impl Record {
    /// Of an answer.
    pub fn outcome(&self) -> String {
        match (self.error, &self.result) {
            (Some(code), _) => format!("rpc_error {code}"),
            (None, Some(r)) if r.result_type == "input_required" => "input_required".into(),
            (None, Some(r)) if r.is_error => "tool_error".into(),
            _ => "ok".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn records(lines: Value) -> Vec<Record> {
        serde_json::from_value(lines).unwrap()
    }

    #[test]
    fn answers_find_their_requests_by_typed_id_and_direction() {
        let log = Log::of(&records(json!([
            {"way": "sent", "bytes": 10, "id": 1, "method": "tools/call", "name": "t"},
            {"way": "sent", "bytes": 11, "id": "1", "method": "tools/call", "name": "t"},
            {"way": "sent", "bytes": 12, "id": 0, "method": "tools/call", "name": "t"},
            {"way": "received", "bytes": 5, "id": 1, "method": "roots/list"},
            {"way": "received", "bytes": 20, "id": "1", "result": {"isError": true}},
            {"way": "received", "bytes": 21, "id": 1, "error": -32602},
            {"way": "sent", "bytes": 1, "method": "notifications/cancelled", "requestId": 0},
        ])));
        let log = log.unwrap();
        let got: Vec<_> = log.calls.iter().map(|c| format!("{c:?}")).collect();
        assert_eq!(got, ["t tool_error 11/20 B", "t rpc_error -32602 10/21 B", "t cancelled 12/0 B"]);
        assert_eq!((log.asked("client", "tools/call"), log.asked("server", "roots/list")), (3, 1));
        assert!(log.agrees_with(vec![("t".into(), "ok".into())]).is_err());
    }

    #[test]
    fn an_answer_without_a_question_is_refused() {
        assert!(Log::of(&records(json!([{"way": "received", "bytes": 1, "id": 1, "result": {}}]))).is_err());
    }
}
