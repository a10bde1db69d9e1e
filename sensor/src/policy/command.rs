//! `mcp-sensor policy …` without the argument parser: paths in, text out, a
//! typed end.

use super::bundle::Bundle;
use super::compile::Ids;
use super::diagnostic::{self, Diagnostic};
use super::explain::{NoServer, Query, Verdict, explain as ask, explain_tool};
use super::load::{LoadError, Loaded, combined, from_bytes, load};
use super::suggest::{MAX_LINE, Suggester, Suggestion};
use serde::Serialize;
use serde_json::json;
use std::fmt::Write;
use std::io::{BufRead, Read};
use std::path::Path;
use std::sync::Arc;
use time::OffsetDateTime;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Text { color: bool },
    Json,
}

/// How a command ended; the caller makes an exit code of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Ok,
    /// The policy is not valid.
    Invalid,
    /// The file cannot be read, or does not exist.
    NotFound,
    /// The policy has no such server.
    NoServer,
    /// `explain`: denied, or would be.
    Denied,
}

/// What to print (on stdout, whatever the status) and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    pub text: String,
    pub status: Status,
}

fn json_text(value: &impl Serialize) -> String {
    // Only maps with other keys than strings fail, and there are none.
    let mut text = serde_json::to_string_pretty(value).unwrap_or_default();
    text.push('\n');
    text
}

fn failed(error: &LoadError, format: Format) -> Output {
    let status = match error {
        LoadError::Read { .. } => Status::NotFound,
        LoadError::Invalid { .. } => Status::Invalid,
    };
    let text = match (format, error) {
        (Format::Text { color }, _) => error.render(color),
        (Format::Json, LoadError::Read { path, reason }) => {
            json_text(&json!({"file": path, "valid": false, "error": reason, "findings": []}))
        }
        (Format::Json, LoadError::Invalid { path, findings, .. }) => {
            json_text(&json!({"file": path, "valid": false, "findings": findings}))
        }
    };
    Output { text, status }
}

/// `policy check FILE`.
pub fn check(path: &Path, format: Format) -> Output {
    let loaded = match load(path, &mut Ids::default()) {
        Ok(loaded) => loaded,
        Err(e) => return failed(&e, format),
    };
    let name = path.display().to_string();
    let text = match format {
        Format::Json => json_text(&json!({
            "file": name,
            "valid": true,
            "findings": loaded.warnings,
            "servers": loaded.policy.servers.len(),
            "profiles": loaded.policy.profiles.len() - super::model::UNRESTRICTED - 1,
            "rules": loaded.compiled.rules.len(),
            "names": loaded.compiled.names.len(),
            "cidrs": loaded.compiled.cidrs.len(),
            "exec_keys": loaded.compiled.exec.len(),
        })),
        Format::Text { color } => {
            let mut text = diagnostic::render(&loaded.warnings, &name, &loaded.source, color);
            let _ = writeln!(text, "{name}: valid: {}", counts(&loaded));
            text
        }
    };
    Output { text, status: Status::Ok }
}

fn counts(loaded: &Loaded) -> String {
    let profiles = loaded.policy.profiles.len() - super::model::UNRESTRICTED - 1;
    let plural = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    let parts = [
        plural(loaded.policy.servers.len(), "server"),
        plural(profiles, "profile"),
        plural(loaded.compiled.rules.len(), "rule"),
        plural(loaded.warnings.len(), "warning"),
    ];
    parts.join(", ")
}

/// What `policy explain` is asked.
#[derive(Clone, Copy, Debug)]
pub enum Question<'a> {
    Destination(&'a Query),
    Tool { server: &'a str, tool: &'a str },
}

impl<'a> From<&'a Query> for Question<'a> {
    fn from(query: &'a Query) -> Self {
        Question::Destination(query)
    }
}

/// `policy explain`, of a file.
pub fn explain<'a>(path: &Path, question: impl Into<Question<'a>>, format: Format) -> Output {
    match load(path, &mut Ids::default()) {
        Ok(loaded) => explained(&loaded, question.into(), format),
        Err(e) => failed(&e, format),
    }
}

/// `policy explain`, of a policy's text (the one in force, from the agent).
pub fn explain_text<'a>(
    text: &str,
    path: &Path,
    question: impl Into<Question<'a>>,
    format: Format,
) -> Output {
    match from_bytes(text.as_bytes(), path, &mut Ids::default()) {
        Ok(loaded) => explained(&loaded, question.into(), format),
        Err(e) => failed(&e, format),
    }
}

/// As [`explain_text`], for a host's policy that a bundle is combined with.
pub fn explain_combined<'a>(
    bundle: Arc<Bundle>,
    text: &str,
    path: &Path,
    question: impl Into<Question<'a>>,
    format: Format,
) -> Output {
    let own = (!text.is_empty()).then_some(text.as_bytes());
    match combined(bundle, own, path, &mut Ids::default()) {
        Ok(loaded) => explained(&loaded, question.into(), format),
        Err(e) => failed(&e, format),
    }
}

fn explained(loaded: &Loaded, question: Question<'_>, format: Format) -> Output {
    let (policy, compiled) = (&loaded.policy, &loaded.compiled);
    let answered = match question {
        Question::Destination(query) => ask(policy, compiled, query)
            .map(|answer| (answer.verdict == Verdict::Allow, answer.text(), json_text(&answer))),
        Question::Tool { server, tool } => explain_tool(policy, compiled, server, tool)
            .map(|answer| (answer.allowed, answer.text(), json_text(&answer))),
    };
    let (status, text, json) = match answered {
        Ok((true, text, json)) => (Status::Ok, text, json),
        Ok((false, text, json)) => (Status::Denied, text, json),
        Err(e @ NoServer { .. }) => {
            (Status::NoServer, format!("{e}\n"), json_text(&json!({"error": e.to_string()})))
        }
    };
    let text = match format {
        Format::Text { .. } => text,
        Format::Json => json,
    };
    Output { text, status }
}

/// `policy schema`.
pub fn schema() -> Output {
    let mut text = super::schema::text();
    text.push('\n');
    Output { text, status: Status::Ok }
}

/// `policy suggest`, of an event file.
pub fn suggest(path: &Path, server: &str, since: Option<OffsetDateTime>, format: Format) -> Output {
    let read =
        std::fs::File::open(path).and_then(|f| suggest_from(std::io::BufReader::new(f), server, since));
    match read {
        Ok(suggestion) => suggested(&suggestion, format),
        Err(e) => {
            let error = LoadError::Read { path: path.display().to_string(), reason: e.to_string() };
            failed(&error, format)
        }
    }
}

/// Of any stream of NDJSON events; a line is never held beyond its limit.
pub fn suggest_from(
    mut events: impl BufRead,
    server: &str,
    since: Option<OffsetDateTime>,
) -> std::io::Result<Suggestion> {
    let mut suggester = Suggester::new(server, since);
    let mut line = Vec::new();
    loop {
        line.clear();
        if events.by_ref().take(MAX_LINE as u64 + 1).read_until(b'\n', &mut line)? == 0 {
            return Ok(suggester.finish());
        }
        let whole = line.ends_with(b"\n");
        suggester.line(&line);
        if !whole && line.len() > MAX_LINE {
            events.skip_until(b'\n')?;
        }
    }
}

pub fn suggested(suggestion: &Suggestion, format: Format) -> Output {
    let text = match format {
        Format::Text { .. } => suggestion.text(),
        Format::Json => json_text(suggestion),
    };
    Output { text, status: Status::Ok }
}

/// Findings as lines, for logs and events.
pub fn lines(findings: &[Diagnostic], file: &str) -> Vec<String> {
    findings.iter().map(|f| f.line(file)).collect()
}
