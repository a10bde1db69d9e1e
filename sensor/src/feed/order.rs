//! Which of several collectors is fed: the first that takes events. Each has a
//! position of its own, and what one of them acknowledged is stored there.

use super::client::Settings;
use super::connect::Target;
use std::time::Duration;
use tokio::task::JoinHandle;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

pub(super) struct Order {
    targets: Vec<Target>,
    current: usize,
    /// Those that do not know compression.
    plain: Vec<bool>,
}

impl Order {
    pub(super) fn new(targets: Vec<Target>) -> Order {
        Order { plain: vec![false; targets.len()], targets, current: 0 }
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Target> {
        self.targets.iter()
    }

    pub(super) fn current(&self) -> &Target {
        &self.targets[self.current]
    }

    /// The current one does not take events. True: all were tried.
    pub(super) fn next(&mut self) -> bool {
        self.current = (self.current + 1) % self.targets.len();
        self.current == 0
    }

    pub(super) fn take(&mut self, index: usize) {
        self.current = index;
    }

    pub(super) fn compresses(&self, wanted: Option<bool>) -> bool {
        !self.plain[self.current] && wanted.unwrap_or_else(|| self.current().is_remote())
    }

    pub(super) fn without_compression(&mut self) {
        self.plain[self.current] = true;
    }
}

/// Asks the collectors before the current one whether they are back.
pub(super) struct LookBack(Option<JoinHandle<usize>>);

impl LookBack {
    pub(super) fn new(order: &Order, settings: Settings) -> LookBack {
        let before: Vec<Target> = order.targets[..order.current].to_vec();
        let looking = async move {
            loop {
                tokio::time::sleep(settings.look_back.mul_f64(0.5 + fastrand::f64())).await;
                for (index, target) in before.iter().enumerate() {
                    if is_ready(target, settings.connect).await {
                        return index;
                    }
                }
            }
        };
        LookBack((order.current > 0).then(|| tokio::spawn(looking)))
    }

    /// The index of one that is.
    pub(super) async fn back(&mut self) -> usize {
        if let Some(looking) = &mut self.0
            && let Ok(index) = looking.await
        {
            return index;
        }
        std::future::pending().await
    }
}

impl Drop for LookBack {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

/// An older collector knows no readiness.
async fn is_ready(target: &Target, patience: Duration) -> bool {
    let asking = async {
        let channel = target.open(patience).await.ok()?;
        let request = HealthCheckRequest { service: crate::health::READINESS.to_owned() };
        match HealthClient::new(channel).check(request).await {
            Ok(answer) => Some(answer.into_inner().status() == ServingStatus::Serving),
            Err(status) => Some(matches!(status.code(), tonic::Code::NotFound | tonic::Code::Unimplemented)),
        }
    };
    tokio::time::timeout(patience, asking).await.ok().flatten().unwrap_or(false)
}
