//! Whether a message can only be MCP, or cannot be.

use super::message::{Facts, Version};
use super::{Era, Sender};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sign {
    Mcp(Era),
    /// Another protocol on JSON-RPC.
    Foreign,
    /// It may be either.
    None,
}

/// Requests that no other protocol is known to have.
const METHODS: [&str; 3] = ["tools/list", "tools/call", "completion/complete"];
const FAMILIES: [&str; 2] = ["resources/", "prompts/"];

/// Methods of language servers, debug adapters, Agent Client Protocol agents,
/// Codex's app server.
const FOREIGN: [&str; 6] =
    ["initialized", "authenticate", "newConversation", "sendUserMessage", "sendUserTurn", "exit"];
const FOREIGN_FAMILIES: [&str; 12] = [
    "session/",
    "fs/",
    "terminal/",
    "thread/",
    "turn/",
    "item/",
    "account/",
    "codex/",
    "textDocument/",
    "workspace/",
    "window/",
    "$/",
];

pub(super) fn sign(sender: Sender, facts: &Facts) -> Sign {
    let Some(method) = facts.method.as_deref() else {
        return match &facts.result {
            Some(result)
                if sender == Sender::Server
                    && is_date(&result.version)
                    && result.server.is_some()
                    && result.capabilities =>
            {
                Sign::Mcp(Era::Legacy)
            }
            _ => Sign::None,
        };
    };
    let params = &facts.params;
    if FOREIGN.contains(&method) || FOREIGN_FAMILIES.iter().any(|family| method.starts_with(family)) {
        return Sign::Foreign;
    }
    if sender == Sender::Server {
        return Sign::None;
    }
    let request = facts.id.known().is_some();
    match method {
        "initialize"
            if is_date(&params.version) && (params.capabilities.is_some() || params.client.is_some()) =>
        {
            Sign::Mcp(Era::Legacy)
        }
        "initialize" => Sign::Foreign,
        _ if request && is_date(&params.meta.version) => Sign::Mcp(Era::Modern),
        "server/discover" if request => Sign::Mcp(Era::Modern),
        "notifications/initialized" => Sign::Mcp(Era::Legacy),
        _ if request && (METHODS.contains(&method) || FAMILIES.iter().any(|f| method.starts_with(f))) => {
            Sign::Mcp(Era::Legacy)
        }
        _ => Sign::None,
    }
}

fn is_date(version: &Version) -> bool {
    matches!(version, Version::Text(text) if is_version(text))
}

/// `YYYY-MM-DD`, or a draft of one.
pub(super) fn is_version(text: &str) -> bool {
    let bytes = text.as_bytes();
    text.starts_with("DRAFT-")
        || bytes.len() >= 10
            && bytes[..10].iter().enumerate().all(|(at, byte)| match at {
                4 | 7 => *byte == b'-',
                _ => byte.is_ascii_digit(),
            })
}
