//! A ToolHive permission profile of any bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Err(findings) = mcp_sensor::policy::toolhive::parse(bytes) {
        assert!(!findings.is_empty());
    }
});
