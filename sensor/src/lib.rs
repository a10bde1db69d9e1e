//! mcp-sensor

pub mod kernel;
