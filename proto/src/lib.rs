//! The wire between sensor, collector and command line: package
//! `mcp_sensor.v1` in `proto/mcp_sensor/v1/*.proto`, generated at build time.

pub mod v1 {
    #![allow(clippy::all, clippy::pedantic, unreachable_pub, unused_qualifications)]
    tonic::include_proto!("mcp_sensor.v1");
}

/// Every message and service, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
