//! What may stand in `to:` and `ports:`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mcp_sensor::policy::{address, names::NamePattern};

fuzz_target!(|text: &str| {
    if let Some(Ok(net)) = address::net(text) {
        assert_eq!(net.trunc(), net, "bits behind the prefix of {text:?}");
    }
    if let Ok(ports) = address::ports(text) {
        assert!(ports.start() <= ports.end(), "an empty range from {text:?}");
    }
    if let Ok(pattern) = NamePattern::parse(text) {
        if pattern.below {
            assert!(pattern.covers(&format!("a.{}", pattern.name)), "{pattern:?}");
            assert!(!pattern.covers(&pattern.name), "{pattern:?} covers its apex");
        } else {
            assert!(pattern.covers(&pattern.name), "{pattern:?}");
        }
        assert!(!pattern.covers(&format!("x{}", pattern.name)), "{pattern:?} covers a neighbour");
    }
});
