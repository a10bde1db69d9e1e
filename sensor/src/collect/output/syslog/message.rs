//! An event as a message of RFC 5424.

use crate::event::{Body, Event, decision, json, pb, server};
use std::fmt::Write as _;
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

/// Names of facilities by their number (RFC 5424, table 1, as configuration files
/// write them).
pub const FACILITIES: [&str; 24] = [
    "kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp",
    "ntp", "audit", "alert", "clock", "local0", "local1", "local2", "local3", "local4", "local5", "local6",
    "local7",
];

/// The element with our fields. 32473 is the enterprise number of examples (RFC
/// 5612): there is no other of our own.
const ELEMENT: &str = "mcp@32473";
/// Longest fields of the header (RFC 5424, section 6).
const MAX_HOST: usize = 255;
pub const MAX_APP: usize = 48;
const MAX_MESSAGE_ID: usize = 32;
/// Longest value of a parameter, in characters.
const MAX_VALUE: usize = 256;
/// Says that the message is UTF-8.
const BOM: &str = "\u{feff}";
/// At most six digits of a second.
const TIME: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");

/// Of a message with this text.
pub fn write(out: &mut Vec<u8>, event: &Event, facility: u8, app: &str, text: &[u8]) {
    let mut head = String::with_capacity(512);
    let priority = u16::from(facility) * 8 + u16::from(severity(event));
    let kind = event.body.as_ref().map_or("-", json::type_name);
    // Writing to a String does not fail.
    let _ = write!(
        head,
        "<{priority}>1 {} {} {} - {} ",
        timestamp(event.time_unix_ns),
        name(&event.sensor, MAX_HOST),
        name(app, MAX_APP),
        name(kind, MAX_MESSAGE_ID),
    );
    structured(&mut head, event);
    head.push(' ');
    head.push_str(BOM);
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(text);
}

fn structured(out: &mut String, event: &Event) {
    let _ = write!(out, "[{ELEMENT}");
    let mut parameter = |name: &str, value: &str| {
        if !value.is_empty() {
            let _ = write!(out, " {name}=\"");
            escape(value, out);
            out.push('"');
        }
    };
    parameter("sensor", &event.sensor);
    parameter("boot", &event.boot);
    parameter("seq", &event.seq.to_string());
    if let Some(body) = &event.body {
        parameter("type", json::type_name(body));
        parameter("server", server(body));
        if let Some(decision) = decision(body) {
            parameter("verdict", json::verdict_name(decision.verdict()));
        }
    }
    out.push(']');
}

/// A value of a parameter (RFC 5424, section 6.3.3). A control character would end
/// a line of some receivers.
pub fn escape(value: &str, out: &mut String) {
    for c in value.chars().take(MAX_VALUE) {
        match c {
            '"' | '\\' | ']' => out.extend(['\\', c]),
            c if c.is_control() => out.push(char::REPLACEMENT_CHARACTER),
            c => out.push(c),
        }
    }
}

/// A field of the header: printable ASCII, or `-` for none.
fn name(text: &str, most: usize) -> String {
    let printable = |c: char| if c.is_ascii_graphic() { c } else { '?' };
    let name: String = text.chars().take(most).map(printable).collect();
    if name.is_empty() { "-".to_owned() } else { name }
}

fn timestamp(unix_ns: i64) -> String {
    let time = OffsetDateTime::from_unix_timestamp_nanos(unix_ns.into());
    time.ok().and_then(|t| t.format(TIME).ok()).unwrap_or_else(|| "-".to_owned())
}

/// RFC 5424, table 2.
fn severity(event: &Event) -> u8 {
    const ALERT: u8 = 1;
    const CRITICAL: u8 = 2;
    const ERROR: u8 = 3;
    const WARNING: u8 = 4;
    const NOTICE: u8 = 5;
    const INFORMATIONAL: u8 = 6;
    let Some(body) = &event.body else { return INFORMATIONAL };
    match body {
        Body::Finding(finding) => match finding.severity() {
            pb::Severity::Critical => ALERT,
            pb::Severity::High => CRITICAL,
            pb::Severity::Medium => WARNING,
            pb::Severity::Low => NOTICE,
            pb::Severity::Info | pb::Severity::Unspecified => INFORMATIONAL,
        },
        Body::Loss(_) => ERROR,
        Body::Drift(_) => WARNING,
        Body::PolicyChange(change) => {
            if change.ok {
                NOTICE
            } else {
                ERROR
            }
        }
        Body::SensorState(state) if !state.degraded.is_empty() => WARNING,
        body => match decision(body).map(pb::Decision::verdict) {
            Some(pb::Verdict::Deny) => WARNING,
            Some(pb::Verdict::WouldDeny) => NOTICE,
            _ => INFORMATIONAL,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(event: &Event) -> String {
        let mut out = Vec::new();
        write(&mut out, event, 16, "mcp-sensor", b"{}");
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_denial_is_a_warning_with_what_it_is_about() {
        let actor = pb::Actor { server: "a\"]\\b".to_owned(), ..Default::default() };
        let decision = pb::Decision { verdict: pb::Verdict::Deny.into(), ..Default::default() };
        let body = pb::Connection { actor: Some(actor), decision: Some(decision), ..Default::default() };
        let event = Event {
            time_unix_ns: 1_700_000_000_123_456_789,
            seq: 7,
            sensor: "web-1".to_owned(),
            boot: "b1".to_owned(),
            body: Some(Body::Connection(body)),
        };
        assert_eq!(
            text(&event),
            "<132>1 2023-11-14T22:13:20.123456Z web-1 mcp-sensor - connection \
             [mcp@32473 sensor=\"web-1\" boot=\"b1\" seq=\"7\" type=\"connection\" \
             server=\"a\\\"\\]\\\\b\" verdict=\"deny\"] \u{feff}{}"
        );
    }

    #[test]
    fn what_is_not_there_is_a_dash() {
        let event = Event { time_unix_ns: i64::MIN, ..Default::default() };
        assert_eq!(
            text(&event),
            "<134>1 1677-09-21T00:12:43.145224Z - mcp-sensor - - [mcp@32473 seq=\"0\"] \u{feff}{}"
        );
    }

    /// Header, parameters and text.
    type Parsed<'a> = (Vec<&'a str>, Vec<(String, String)>, &'a str);

    /// As RFC 5424, section 6, has it; `None`: it is no such message.
    fn parse(message: &str) -> Option<Parsed<'_>> {
        let mut head: Vec<&str> = message.splitn(7, ' ').collect();
        let mut rest = head.pop()?.strip_prefix('[')?.strip_prefix(ELEMENT)?;
        let mut parameters = Vec::new();
        while let Some(parameter) = rest.strip_prefix(' ') {
            let (name, value) = parameter.split_once("=\"")?;
            let (mut text, mut end, mut escaped) = (String::new(), None, false);
            for (at, c) in value.char_indices() {
                match c {
                    _ if escaped => {
                        text.push(c);
                        escaped = false;
                    }
                    '\\' => escaped = true,
                    '"' => {
                        end = Some(at);
                        break;
                    }
                    ']' => return None,
                    c => text.push(c),
                }
            }
            parameters.push((name.to_owned(), text));
            rest = &value[end? + 1..];
        }
        Some((head, parameters, rest.strip_prefix("] \u{feff}")?))
    }

    proptest! {
        /// Whatever a sensor, a server or a clock says.
        #[test]
        fn every_event_is_a_message_that_can_be_read_back(
            sensor in any::<String>(), boot in any::<String>(), server in "\\PC{0,300}|[\"\\\\\\]\n\r]{0,20}",
            seq in any::<u64>(), time_unix_ns in any::<i64>(), body in "[ -~é☃]{0,40}",
        ) {
            let finding = pb::Finding { server: server.clone(), ..Default::default() };
            let body_of = Some(Body::Finding(finding));
            let event = Event { time_unix_ns, seq, sensor: sensor.clone(), boot, body: body_of };
            let mut out = Vec::new();
            write(&mut out, &event, 23, "a b", body.as_bytes());
            let message = String::from_utf8(out).unwrap();
            let head = message.split(BOM).next().unwrap();
            prop_assert!(!head.contains(char::is_control));
            let (head, parameters, said) = parse(&message).unwrap();
            prop_assert_eq!(said, body);
            prop_assert_eq!(head.len(), 6);
            prop_assert!(head[2].len() <= MAX_HOST && head.iter().all(|f| f.chars().all(|c| c.is_ascii_graphic())));
            prop_assert_eq!(head[3], "a?b");
            let value = |name: &str| parameters.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone());
            prop_assert_eq!(value("seq"), Some(seq.to_string()));
            let shown = |text: &str| -> Option<String> {
                let shown = text.chars().take(MAX_VALUE).map(|c| if c.is_control() { '\u{fffd}' } else { c });
                Some(shown.collect()).filter(|s: &String| !s.is_empty())
            };
            prop_assert_eq!(value("sensor"), shown(&sensor));
            prop_assert_eq!(value("server"), shown(&server));
        }
    }
}
