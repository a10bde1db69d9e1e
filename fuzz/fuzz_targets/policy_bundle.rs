//! A policy bundle that a collector, or whoever stands in for it, sends.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mcp_sensor::policy::bundle::{Bundle, PublicKeys};

fuzz_target!(|bytes: &[u8]| {
    let Ok(bundle) = Bundle::parse(bytes) else { return };
    assert!(bundle.version > 0 && bundle.signed == bytes);
    for (name, _) in bundle.files() {
        assert!(!name.starts_with('/') && !name.split('/').any(|part| part == ".."));
    }
    assert!(bundle.verify(&PublicKeys::default()).is_err(), "no key is pinned");
});
