//! A segment of the spool that a crash, a bad disk or somebody else left.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mcp_sensor::feed::spool::{Item, Reader, read_header};

fuzz_target!(|bytes: &[u8]| {
    let start = read_header(bytes).map_or(0, |(_, start)| start);
    let mut at = start;
    for item in Reader::new(bytes, start) {
        at = match item {
            Item::Batch(batch, end) => {
                assert!(batch.first_seq > 0 && batch.first_seq <= batch.last_seq);
                end
            }
            Item::Damage(skipped) => at + skipped,
        };
    }
    assert_eq!(at, bytes.len());
});
