//! Tests of the policy as a whole: from text to the decision.

mod combined;
mod decisions;
mod hostile;
mod messages;
mod named;
mod recognised;
mod suggested;
mod written;

use super::compile::{Compiled, Ids, compile};
use super::diagnostic::Diagnostic;
use super::host::Host;
use super::parse::parse_bytes;
use super::tables::MemoryTables;
use sensor_common::addr::Addr;
use sensor_common::policy::{Decision, EGRESS, Flow, INBOUND, decide};
use std::net::IpAddr;

fn compiled(text: &str) -> Compiled {
    try_compiled(text).unwrap_or_else(|e| panic!("{e:#?}"))
}

fn try_compiled(text: &str) -> Result<Compiled, Vec<Diagnostic>> {
    let policy = parse_bytes(text.as_bytes())?;
    compile(&policy, &Host::default(), &mut Ids::default())
}

fn errors(text: &str) -> Vec<Diagnostic> {
    try_compiled(text).err().unwrap_or_else(|| panic!("accepted:\n{text}"))
}

fn egress(compiled: &Compiled, profile: &str, to: &str, port: u16, protocol: u8) -> Decision {
    flow(compiled, profile, EGRESS, to, port, protocol)
}

fn inbound(compiled: &Compiled, profile: &str, from: &str, port: u16, protocol: u8) -> Decision {
    flow(compiled, profile, INBOUND, from, port, protocol)
}

fn flow(compiled: &Compiled, profile: &str, direction: u8, ip: &str, port: u16, protocol: u8) -> Decision {
    let id = compiled.profile_names.iter().position(|n| n == profile).expect("a profile") as u16;
    let addr = Addr::from(ip.parse::<IpAddr>().expect("an address"));
    let flow = Flow { direction, protocol, port, addr, any_port: false };
    decide(&MemoryTables::new(compiled), 1, id, &flow)
}
