//! Generates the crate with protox, so that nobody needs protoc.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let protos = ["event", "collector", "control"].map(|name| format!("mcp_sensor/v1/{name}.proto"));
    println!("cargo::rerun-if-changed=mcp_sensor");
    let descriptors = protox::compile(&protos, ["."])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
