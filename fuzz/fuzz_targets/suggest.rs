//! An event file of any bytes gives a policy that compiles.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mcp_sensor::policy::command::suggest_from;
use mcp_sensor::policy::{Host, Ids, compile, parse_bytes};

fuzz_target!(|bytes: &[u8]| {
    let suggestion = suggest_from(bytes, "s", None).expect("reading memory does not fail");
    let policy = parse_bytes(suggestion.text().as_bytes()).expect("a suggestion is a policy");
    compile(&policy, &Host::default(), &mut Ids::default()).expect("that compiles");
});
