//! What every gRPC server of this program offers beside its own service.

mod connection;

pub(crate) use connection::Connection;
pub use connection::Deadlines;

use tonic::codec::CompressionEncoding;
use tonic_reflection::server::Builder;
use tonic_reflection::server::v1::{ServerReflection, ServerReflectionServer};
use tonic_reflection::server::v1alpha;

fn descriptors() -> Builder<'static> {
    Builder::configure()
        .register_encoded_file_descriptor_set(mcp_sensor_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

/// Reflection as current clients ask for it.
pub fn reflection_v1() -> anyhow::Result<ServerReflectionServer<impl ServerReflection>> {
    // A client that compresses everything must not fail on this service alone.
    Ok(descriptors().build_v1()?.accept_compressed(CompressionEncoding::Gzip))
}

/// Reflection as older clients (grpcurl before 1.9, Python) ask for it.
pub fn reflection_v1alpha() -> anyhow::Result<v1alpha::ServerReflectionServer<impl v1alpha::ServerReflection>>
{
    Ok(descriptors().build_v1alpha()?.accept_compressed(CompressionEncoding::Gzip))
}
