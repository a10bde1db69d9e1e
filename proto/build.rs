//! Generates the crate with protox, so that nobody needs protoc.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let protos = ["event", "policy", "collector", "control", "query"]
        .map(|name| format!("mcp_sensor/v1/{name}.proto"));
    println!("cargo::rerun-if-changed=mcp_sensor");
    let descriptors = protox::compile(&protos, ["."])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    let mut config = tonic_prost_build::configure();
    // What an event holds is kept by the ten thousand: no body makes all others
    // larger.
    for body in ["tool_call", "prompt", "resource", "mcp_message", "tools_listed"] {
        config = config.boxed(format!(".mcp_sensor.v1.Event.body.{body}"));
    }
    config.compile_fds(descriptors)?;
    Ok(())
}
