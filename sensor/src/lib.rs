//! mcp-sensor

pub mod policy;
