//! mcp-sensor: the agent, the collector and the command line.

pub mod agent;
pub mod cli;
pub mod collect;
pub mod control;
pub mod event;
pub mod feed;
pub mod format;
pub mod grpc;
pub mod health;
pub mod inspect;
pub mod kernel;
mod lock;
pub mod mcp;
pub mod metrics;
pub mod outputs;
pub mod panics;
pub mod policy;
pub mod supervisor;
pub mod tls;
