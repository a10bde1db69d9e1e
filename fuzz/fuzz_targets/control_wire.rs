//! Events as they come from a sensor over the wire: every one has a JSON form
//! on one line and a text form without control characters.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mcp_sensor::event::{json, text};
use mcp_sensor_proto::v1::Event;
use prost::Message;

fuzz_target!(|bytes: &[u8]| {
    let Ok(event) = Event::decode(bytes) else { return };
    let mut line = Vec::new();
    json::write_line(&event, &mut line).expect("a Vec takes everything");
    assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
    assert_eq!(line.last(), Some(&b'\n'));
    serde_json::from_slice::<serde_json::Value>(&line).expect("JSON");
    for cell in text::row(&event).cells() {
        assert!(!cell.chars().any(char::is_control), "{cell:?}");
    }
});
