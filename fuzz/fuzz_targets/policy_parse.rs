//! A policy of any bytes is refused with findings that render, or compiles to
//! tables that hold together.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mcp_sensor::policy::{Host, Ids, compile, diagnostic, parse_bytes};
use sensor_common::name::NameKey;

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let result = parse_bytes(bytes).and_then(|p| compile(&p, &Host::default(), &mut Ids::default()));
    match result {
        Err(findings) => {
            assert!(!findings.is_empty());
            diagnostic::render(&findings, "policy.yaml", &text, false);
        }
        Ok(compiled) => {
            for cidr in &compiled.cidrs {
                assert!(cidr.bits <= 128 && usize::from(cidr.profile) < compiled.profiles.len());
                let set = &compiled.port_sets[cidr.port_set as usize];
                for range in &set.ranges[..set.count as usize] {
                    assert!(range.low <= range.high && compiled.rule(range.rule).is_some());
                }
            }
            for entry in &compiled.names {
                assert!(usize::from(entry.profile) < compiled.profiles.len());
                assert!(NameKey::new(1, entry.profile, &entry.text).is_some(), "it fits the kernel's key");
                assert!((entry.rule.port_set as usize) < compiled.port_sets.len());
            }
        }
    }
});
