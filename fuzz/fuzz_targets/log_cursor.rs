//! What a subscriber gives as its cursor.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mcp_sensor::collect::log::Cursor;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(cursor) = Cursor::read(bytes) {
        assert_eq!(cursor.to_bytes(), bytes);
    }
});
