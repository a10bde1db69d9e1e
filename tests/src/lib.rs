//! The testbed of the end-to-end tests: a server side and a peer side, joined
//! by a veth pair, with live listeners and a sniffer on the peer's end of the
//! wire, so that "denied" means that no frame arrived where one could have.

pub mod bed;
pub mod cgroup;
pub mod dns;
pub mod drivers;
pub mod events;
pub mod frame;
pub mod link;
pub mod mcp;
pub mod names;
pub mod network;
pub mod peer;
pub mod policy;
pub mod report;
pub mod run;
pub mod sensor;
pub mod service;
pub mod sniffer;
pub mod spec;
pub mod step;
pub mod tls;
