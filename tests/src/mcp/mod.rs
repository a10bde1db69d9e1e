//! MCP as real programs speak it: servers and clients from their registries,
//! servers of the tests' own for what those do not do on request, and the logs
//! that clients keep of their own wires, to hold the sensor's record against.

pub mod events;
pub mod listening;
pub mod log;
pub mod model;
pub mod servers;
pub mod session;
pub mod speaker;
pub mod wire;
