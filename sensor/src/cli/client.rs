//! The way to the agent, and what its refusals mean for the exit code.

use super::{ControlArgs, Exit, Failure};
use crate::event::pb::control_client::ControlClient;
use hyper_util::rt::TokioIo;
use std::future::Future;
use std::io;
use std::time::Duration;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// Of a whole answer; 4,096 servers with their instances fit.
const MAX_ANSWER: usize = 64 << 20;

/// Runs a command's future; one thread is enough.
pub(super) fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future)
}

pub(super) async fn connect(args: &ControlArgs) -> anyhow::Result<ControlClient<Channel>> {
    let path = args.control.clone();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://control")
        .connect_timeout(Duration::from_secs(5))
        .connect_with_connector(connector)
        .await
        .map_err(|error| unreachable(args, &error))?;
    Ok(ControlClient::new(channel).max_decoding_message_size(MAX_ANSWER))
}

fn unreachable(args: &ControlArgs, error: &(dyn std::error::Error + 'static)) -> Failure {
    let mut cause = Some(error);
    let mut why = error.to_string();
    while let Some(error) = cause {
        why = error.to_string();
        if let Some(error) = error.downcast_ref::<io::Error>()
            && error.kind() == io::ErrorKind::PermissionDenied
        {
            let message = format!("{}: permission denied", args.control.display());
            return Failure::new(Exit::Refused, message)
                .hint("run it as root, or as a member of the group given to `run --control-group`");
        }
        cause = error.source();
    }
    Failure::new(Exit::NoAgent, format!("no agent answers on {}: {why}", args.control.display()))
        .hint("start it (systemctl start mcp-sensor, or `mcp-sensor run`), or name its socket with --control")
}

/// A status as an error for a person.
pub(super) fn failed(status: &Status) -> Failure {
    let (exit, hint) = match status.code() {
        Code::PermissionDenied => (Exit::Refused, ""),
        Code::NotFound => (Exit::NotFound, "`mcp-sensor servers` lists what the policy declares"),
        Code::InvalidArgument => (Exit::Usage, ""),
        Code::Unavailable => (Exit::NoAgent, "the connection to the agent broke; try again"),
        _ => (Exit::Failure, ""),
    };
    Failure::new(exit, crate::event::text::escape_lines(status.message())).hint(hint)
}
