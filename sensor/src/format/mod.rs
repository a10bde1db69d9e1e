//! Events in the forms that other systems read: OCSF 1.8.0, ECS and log records of
//! OpenTelemetry. Pure; no IO but writing what was rendered.
//!
//! All begin with the native form ([`json`]). What a schema has a place for is
//! taken out of it; the rest goes along under the native names, below `unmapped`
//! (OCSF) or `mcp_sensor` (the others). So a field that is new in the native form is
//! in all at once, and none is ever lost.

/// A serde struct whose members are left out where they are `None`.
macro_rules! object {
    ($(#[$of:meta])* $name:ident { $($(#[$field_of:meta])* $field:ident: $type:ty),* $(,)? }) => {
        $(#[$of])*
        #[derive(Clone, Debug, Default, serde::Serialize)]
        pub struct $name {
            $($(#[$field_of])* #[serde(skip_serializing_if = "Option::is_none")] pub $field: Option<$type>,)*
        }
    };
}

pub mod ecs;
pub mod ocsf;
pub mod otel;
mod rest;

use crate::event::{Event, json, text};
use serde::Serialize;
use serde_json::Value;
use std::io::{self, Write};

/// Bytes of a line in OCSF or ECS, without its end. What would be longer is cut
/// and says so: `metadata.is_truncated`, `mcp_sensor.truncated`.
pub const MAX_LINE: usize = 64 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// The native form.
    Ndjson,
    /// Open Cybersecurity Schema Framework 1.8.0.
    Ocsf,
    /// Elastic Common Schema.
    Ecs,
}

/// Writes the event as one line, newline included.
pub fn write_line(format: Format, event: &Event, out: &mut impl Write) -> io::Result<()> {
    match format {
        Format::Ndjson => return json::write_line(event, out),
        Format::Ocsf => out.write_all(&bounded(&ocsf::render(event), mark_ocsf)?)?,
        Format::Ecs => out.write_all(&bounded(&ecs::render(event), mark_ecs)?)?,
    }
    out.write_all(b"\n")
}

/// Which event this is, on whatever host: receivers drop what they have by it. A
/// loss of a collector's output has no number, but a time.
pub(crate) fn unique_id(event: &Event) -> String {
    let Event { sensor, boot, seq, time_unix_ns, .. } = event;
    if *seq == 0 {
        return format!("{sensor}/{boot}/t{time_unix_ns}");
    }
    format!("{sensor}/{boot}/{seq}")
}

/// What a person would read, as `mcp-sensor events` prints it.
fn message(event: &Event) -> Option<String> {
    let row = text::row(event);
    let message = format!("{} {}", row.what, row.detail);
    (!message.trim().is_empty()).then(|| message.trim().to_owned())
}

/// What most strings and lists are cut to, in turn, until the line fits: bytes of
/// a string as JSON has it, items of a list. The last fits whatever they held: no
/// event has more than a few hundred strings then.
const CUTS: [(usize, usize); 3] = [(4096, 256), (512, 64), (256, 8)];

fn bounded(record: &impl Serialize, mark: fn(&mut Value, usize)) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(record)?;
    if line.len() <= MAX_LINE {
        return Ok(line);
    }
    let mut value: Value = serde_json::from_slice(&line)?;
    mark(&mut value, line.len());
    for (text, items) in CUTS {
        cut(&mut value, text, items);
        line = serde_json::to_vec(&value)?;
        if line.len() <= MAX_LINE {
            break;
        }
    }
    Ok(line)
}

fn mark_ocsf(value: &mut Value, bytes: usize) {
    value["metadata"]["is_truncated"] = true.into();
    // In kilobytes, says the schema.
    value["metadata"]["untruncated_size"] = bytes.div_ceil(1024).into();
}

fn mark_ecs(value: &mut Value, _: usize) {
    value["mcp_sensor"]["truncated"] = true.into();
}

fn cut(value: &mut Value, text: usize, items: usize) {
    match value {
        Value::String(s) => {
            let mut room = text;
            let end = s.char_indices().find(|&(_, c)| {
                let fits = room.checked_sub(written(c));
                room = fits.unwrap_or(0);
                fits.is_none()
            });
            if let Some((end, _)) = end {
                s.truncate(end);
            }
        }
        Value::Array(list) => {
            list.truncate(items);
            list.iter_mut().for_each(|v| cut(v, text, items));
        }
        Value::Object(map) => map.values_mut().for_each(|v| cut(v, text, items)),
        Value::Null | Value::Bool(_) | Value::Number(_) => (),
    }
}

/// Bytes of a character in a JSON string.
fn written(c: char) -> usize {
    match c {
        '"' | '\\' => 2,
        c if c < ' ' => 6,
        c => c.len_utf8(),
    }
}

#[cfg(test)]
mod tests;
