//! The log, on stderr: stdout is for what a command prints.

use super::{Exit, Failure, LogFormat};
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

pub(super) fn start(filter: &str, format: LogFormat) -> anyhow::Result<()> {
    // A bare level is for this program; its libraries only warn.
    let directives = match filter {
        "error" | "off" => filter.to_owned(),
        "warn" | "info" | "debug" | "trace" => format!("warn,mcp_sensor={filter}"),
        other => other.to_owned(),
    };
    let filter = EnvFilter::try_new(&directives).map_err(|error| {
        Failure::new(Exit::Usage, format!("--log {filter:?}: {error}"))
            .hint("give error, warn, info, debug, trace, or TARGET=LEVEL pairs with commas")
    })?;
    let base = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && crate::collect::wants_color());
    match format {
        LogFormat::Text => base.init(),
        LogFormat::Json => base.json().init(),
    }
    Ok(())
}
