//! mcp-sensor

pub mod agent;
pub mod cli;
pub mod collect;
pub mod control;
pub mod event;
pub mod feed;
pub mod grpc;
