//! What was said on a connection, as events.

use super::session::Speaker;
use crate::event::{Body, pb};
use crate::mcp::{Era, Exchange, Implementation, Notification, Outcome, Output, Parties, Sender};
use siphasher::sip::SipHasher24;
use std::hash::Hasher as _;

pub fn era_name(era: Option<Era>) -> &'static str {
    match era {
        Some(Era::Legacy) => "legacy",
        Some(Era::Modern) => "modern",
        None => "unknown era",
    }
}

/// The event that an output comes to.
pub fn body(actor: pb::Actor, speaker: &Speaker, key: &[u8; 16], output: Output) -> Option<Body> {
    match output {
        Output::Ended(e) => Some(ended(actor, speaker, key, &e)),
        Output::Notified(n) => Some(notified(actor, speaker, &n)),
        Output::Uninspected { sender, bytes, how } => {
            let mut body = pb::Uninspected {
                actor: Some(actor),
                connection: speaker.connection,
                bytes,
                how: how.to_owned(),
                ..Default::default()
            };
            body.set_sender(wire_sender(sender));
            Some(Body::Uninspected(body))
        }
        Output::Tools(..) | Output::Recognised(_) | Output::NotMcp | Output::Asked { .. } => None,
    }
}

fn wire_sender(sender: Sender) -> pb::Sender {
    match sender {
        Sender::Client => pb::Sender::Client,
        Sender::Server => pb::Sender::Server,
    }
}

fn implementation(i: &Implementation) -> Option<pb::Implementation> {
    (!i.name.is_empty() || !i.version.is_empty())
        .then(|| pb::Implementation { name: i.name.clone(), version: i.version.clone() })
}

fn with_parties(exchange: &mut pb::Exchange, parties: &Parties) {
    exchange.set_era(match parties.era {
        Some(Era::Legacy) => pb::Era::Legacy,
        Some(Era::Modern) => pb::Era::Modern,
        None => pb::Era::Unspecified,
    });
    exchange.protocol_version.clone_from(&parties.protocol_version);
    exchange.client_info = implementation(&parties.client);
    exchange.server_info = implementation(&parties.server);
}

/// A request and what became of it, without what is particular to its method.
pub fn exchange(actor: pb::Actor, speaker: &Speaker, e: &Exchange) -> pb::Exchange {
    let mut exchange = pb::Exchange {
        actor: Some(actor),
        transport: speaker.transport.to_owned(),
        connection: speaker.connection,
        session_hash: speaker.session.map(|s| format!("{s:016x}")).unwrap_or_default(),
        method: e.method.clone(),
        id_hash: format!("{:016x}", e.id_hash),
        request_bytes: e.request_bytes,
        response_bytes: e.response_bytes,
        duration_ns: u64::try_from(e.answered - e.asked).unwrap_or(0),
        progress: e.progress,
        ..Default::default()
    };
    exchange.set_sender(wire_sender(e.sender));
    if let Outcome::RpcError(code) = e.outcome {
        exchange.error_code = code;
    }
    exchange.set_outcome(match e.outcome {
        Outcome::Ok => pb::Outcome::Ok,
        Outcome::ToolError => pb::Outcome::ToolError,
        Outcome::RpcError(_) => pb::Outcome::RpcError,
        Outcome::Cancelled => pb::Outcome::Cancelled,
        Outcome::NoResponse => pb::Outcome::NoResponse,
        Outcome::InputRequired => pb::Outcome::InputRequired,
        Outcome::Task => pb::Outcome::Task,
    });
    with_parties(&mut exchange, &e.parties);
    exchange
}

fn ended(actor: pb::Actor, speaker: &Speaker, key: &[u8; 16], e: &Exchange) -> Body {
    let exchange = Some(exchange(actor, speaker, e));
    match e.method.as_str() {
        "tools/call" => Body::ToolCall(Box::new(pb::ToolCall { exchange, tool: e.name.clone() })),
        "prompts/get" => Body::Prompt(Box::new(pb::Prompt { exchange, name: e.name.clone() })),
        "resources/read" => {
            let (scheme, host, rest) = uri(&e.uri);
            let path_hash = format!("{:016x}", keyed(key, rest));
            Body::Resource(Box::new(pb::Resource { exchange, scheme, host, path_hash }))
        }
        _ => Body::McpMessage(Box::new(pb::McpMessage { exchange, count: 1 })),
    }
}

fn notified(actor: pb::Actor, speaker: &Speaker, n: &Notification) -> Body {
    let mut exchange = pb::Exchange {
        actor: Some(actor),
        transport: speaker.transport.to_owned(),
        connection: speaker.connection,
        session_hash: speaker.session.map(|s| format!("{s:016x}")).unwrap_or_default(),
        method: n.method.clone(),
        request_bytes: n.bytes,
        ..Default::default()
    };
    exchange.set_sender(wire_sender(n.sender));
    with_parties(&mut exchange, &n.parties);
    Body::McpMessage(Box::new(pb::McpMessage { exchange: Some(exchange), count: 1 }))
}

/// Scheme, host, and the rest (RFC 3986, section 3). User names and passwords
/// are of the rest.
fn uri(uri: &str) -> (String, String, &str) {
    let Some((scheme, after)) = uri.split_once(':') else { return (String::new(), String::new(), uri) };
    let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
    if scheme.is_empty() || scheme.len() > 64 || !scheme.chars().all(valid) {
        return (String::new(), String::new(), uri);
    }
    let scheme = scheme.to_ascii_lowercase();
    let Some(authority) = after.strip_prefix("//") else { return (scheme, String::new(), after) };
    let authority = &authority[..authority.find(['/', '?', '#']).unwrap_or(authority.len())];
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    (scheme, host.chars().take(255).collect(), after)
}

/// SipHash-2-4 under this sensor's key.
pub fn keyed(key: &[u8; 16], text: &str) -> u64 {
    let mut hasher = SipHasher24::new_with_key(key);
    hasher.write(text.as_bytes());
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_shows_scheme_and_host_and_nothing_that_may_be_secret() {
        let (scheme, host, rest) = uri("https://user:pw@api.example.com:8443/a/b?token=1");
        assert_eq!((scheme.as_str(), host.as_str()), ("https", "api.example.com:8443"));
        assert!(rest.contains("pw"));
        assert_eq!(uri("file:///etc/passwd").1, "");
        assert_eq!(uri("demo:note/1").0, "demo");
        assert_eq!(uri("no uri at all").0, "");
        assert_eq!(uri("a b://x").0, "");
    }
}
