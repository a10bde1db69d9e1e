//! mcp-sensor
