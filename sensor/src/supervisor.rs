//! What the service manager is told (sd_notify(3), `Type=notify` of systemd):
//! when the work begins, that it goes on, and what it is. Says nothing where
//! nobody asked (`NOTIFY_SOCKET`).

use crate::health::State;
use sd_notify::NotifyState;

/// The work is done from now on; `work` says which, in one line.
pub fn ready(work: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(work)]);
}

/// Call it again and again from where the work is done: what stands still does
/// not call, and what is not alive does not feed the watchdog.
pub fn alive(state: &State, work: &str) {
    let reasons: Vec<&str> = state.reasons().collect();
    let status =
        if reasons.is_empty() { work.to_owned() } else { format!("not ready: {}", reasons.join("; ")) };
    let status = NotifyState::Status(&status);
    if state.is_live() {
        tell(&[NotifyState::Watchdog, status]);
    } else {
        tell(&[status]);
    }
}

/// A reload begins; it ends when what is returned is dropped.
#[must_use]
pub fn reloading() -> Reloading {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => tracing::debug!(%error, "no monotonic clock"),
    }
    Reloading(())
}

pub struct Reloading(());

impl Drop for Reloading {
    fn drop(&mut self) {
        tell(&[NotifyState::Ready]);
    }
}

pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "the service manager was not told");
    }
}
