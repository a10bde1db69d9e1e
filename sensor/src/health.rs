//! Whether a process is alive, and whether it does what it is there for: one
//! answer for gRPC (`grpc.health.v1`), for HTTP and for `status`.

use tokio::sync::watch;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

/// Restart it when this fails.
pub const LIVENESS: &str = "liveness";
/// It does its work: as the empty name and that of the process's own service.
pub const READINESS: &str = "readiness";

/// What is wrong, in sentences; nothing is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Only a restart mends it.
    pub not_live: Vec<String>,
    /// It does not do its work, or not all of it.
    pub not_ready: Vec<String>,
}

impl State {
    pub fn is_live(&self) -> bool {
        self.not_live.is_empty()
    }

    /// What is not alive does no work.
    pub fn is_ready(&self) -> bool {
        self.is_live() && self.not_ready.is_empty()
    }

    /// Why it is not ready.
    pub fn reasons(&self) -> impl Iterator<Item = &str> {
        self.not_live.iter().chain(&self.not_ready).map(String::as_str)
    }
}

/// The present state, for those who ask.
pub type Health = watch::Receiver<State>;

/// One that never changes.
pub fn always(state: State) -> Health {
    watch::channel(state).1
}

/// Changes the state; what is new is logged.
pub fn change(shown: &watch::Sender<State>, change: impl FnOnce(&mut State)) {
    shown.send_if_modified(|state| {
        let before = state.clone();
        change(state);
        if *state == before {
            return false;
        }
        if state.is_ready() {
            tracing::info!("healthy");
        } else {
            tracing::error!(reasons = ?state.reasons().collect::<Vec<_>>(), "not healthy");
        }
        true
    });
}

/// Tells `grpc.health.v1` of the state as it is now. What is returned tells it of
/// every change, until nobody changes it any more.
pub async fn tell(
    reporter: HealthReporter,
    services: Vec<&'static str>,
    mut health: Health,
) -> impl Future<Output = ()> + Send {
    let state = health.borrow_and_update().clone();
    say(&reporter, &services, &state).await;
    async move {
        while health.changed().await.is_ok() {
            let state = health.borrow_and_update().clone();
            say(&reporter, &services, &state).await;
        }
    }
}

async fn say(reporter: &HealthReporter, services: &[&str], state: &State) {
    let status = |good| if good { ServingStatus::Serving } else { ServingStatus::NotServing };
    let ready = status(state.is_ready());
    for service in services.iter().copied().chain(["", READINESS]) {
        reporter.set_service_status(service, ready).await;
    }
    reporter.set_service_status(LIVENESS, status(state.is_live())).await;
}
