//! mcp-sensor

pub mod agent;
pub mod cli;
pub mod control;
pub mod event;
pub mod grpc;
