//! A segment of the collector's log that a crash, a bad disk or somebody else
//! left.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mcp_sensor::collect::log::{Header, Item, Items};

fuzz_target!(|bytes: &[u8]| {
    let start = Header::read(bytes).map_or(0, |_| Header::LENGTH);
    let mut at = start;
    for item in Items::new(bytes, start) {
        at = match item {
            Item::Record(record, end) => {
                assert!(record.head.events > 0 && record.head.end() > record.head.offset);
                let _ = record.origin();
                if let Some(events) = record.events() {
                    assert_eq!(events.len(), record.head.events as usize);
                }
                end
            }
            Item::Damage(skipped) => at + skipped,
        };
    }
    assert_eq!(at, bytes.len());
});
