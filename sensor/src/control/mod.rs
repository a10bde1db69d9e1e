//! The agent's local control service: what the command line talks to.

mod connection;
pub mod peer;
mod service;
mod socket;

pub use connection::Limits;
pub use peer::Peer;
pub use service::serve;
pub use socket::{BindError, ControlSocket};

use crate::event::{Bus, pb};
use crate::health::Health;
use std::sync::Arc;

/// Why the agent did not do what it was asked. Callers branch on this: it
/// becomes the gRPC status and the exit code of the command.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// No such server, with what is known instead.
    #[error("{0}")]
    NotFound(String),
    /// The policy, or an argument, is bad; the text says where and why.
    #[error("{0}")]
    Invalid(String),
    /// The caller may not have this.
    #[error("{0}")]
    Refused(String),
    /// Not in the agent's present state.
    #[error("{0}")]
    Unavailable(String),
    /// A table is full.
    #[error("{0}")]
    Exhausted(String),
    #[error("{0}")]
    Internal(String),
}

/// What the control service needs from the agent. Every call is made by an
/// admitted caller: unlabelled, alive, and uid 0 where the call changes
/// something.
#[tonic::async_trait]
pub trait Agent: Send + Sync + 'static {
    fn bus(&self) -> &Arc<Bus>;

    /// Whether it does its work.
    fn health(&self) -> Health;

    /// Whether a process carries a label. Called at accept and on every
    /// request; must be a look-up, and must say true when it cannot tell.
    fn is_labelled(&self, pid: u32) -> bool;

    /// Everything but `subscribers`, `events`, `sensor` and `boot`, which the
    /// service takes from the bus.
    async fn status(&self) -> Result<pb::StatusResponse, ControlError>;

    /// All servers, or the one named.
    async fn servers(&self, server: Option<&str>) -> Result<Vec<pb::Server>, ControlError>;

    /// What all servers learned, or the one named; sorted.
    async fn names(&self, server: Option<&str>) -> Result<Vec<pb::LearnedName>, ControlError>;

    /// The tools of all servers, or of the one named; sorted.
    async fn tools(&self, server: Option<&str>) -> Result<Vec<pb::ServerTools>, ControlError>;

    async fn policy(&self) -> Result<pb::PolicyShowResponse, ControlError>;

    async fn reload(&self) -> Result<pb::PolicyReloadResponse, ControlError>;

    /// The mode before.
    async fn set_mode(&self, server: &str, mode: pb::Mode) -> Result<pb::Mode, ControlError>;

    /// Labels the caller's process. `caller.pidfd` (where the kernel has one)
    /// or `caller.start_time` tell whether the pid still means that process.
    async fn launch(
        &self,
        caller: &Peer,
        server: &str,
        argv: &[String],
    ) -> Result<pb::LaunchResponse, ControlError>;
}
