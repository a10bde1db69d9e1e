//! mcp-sensor: the agent, the collector and the command line.

pub mod agent;
pub mod cli;
pub mod control;
pub mod event;
pub mod kernel;
