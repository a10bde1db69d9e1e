//! Sums of what passes an output, cumulative since this start of the collector.

use super::exporter::{described, headers};
use super::settings::Settings;
use crate::event::{Event, now};
use crate::metrics::Metrics;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_client::MetricsServiceClient;
use std::sync::Arc;
use std::time::Duration;
use tonic::codec::CompressionEncoding;
use tonic::transport::Channel;

/// `service.name`: sensors that send their own sums are called `mcp-sensor`.
const SERVICE: &str = "mcp-sensor-collector";
/// For the last time, when the collector ends.
const LAST: Duration = Duration::from_secs(2);

pub struct Sums {
    metrics: Arc<Metrics>,
    sender: Sender,
}

#[derive(Clone)]
struct Sender {
    channel: Channel,
    settings: Settings,
    instance: String,
}

impl Sums {
    /// Sends every so often, while the runtime that it is called in lives.
    pub fn start(channel: Channel, settings: Settings, every: Duration) -> Sums {
        let instance = nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned();
        let (metrics, sender) = (Metrics::new(now()), Sender { channel, settings, instance });
        let (shown, again) = (metrics.clone(), sender.clone());
        tokio::spawn(async move {
            let mut failing = false;
            loop {
                tokio::time::sleep(every).await;
                let sent = again.send(&shown).await;
                match &sent {
                    Ok(()) if failing => tracing::info!("metrics reach the OTLP receiver again"),
                    Err(error) if !failing => {
                        tracing::warn!(error, "metrics do not reach the OTLP receiver; they are sent again");
                    }
                    _ => (),
                }
                failing = sent.is_err();
            }
        });
        Sums { metrics, sender }
    }

    pub fn observe(&self, events: &[Event]) {
        events.iter().filter_map(|e| e.body.as_ref()).for_each(|body| self.metrics.observe(body));
    }

    pub async fn send_last(&self) {
        match tokio::time::timeout(LAST, self.sender.send(&self.metrics)).await {
            Ok(Ok(())) => (),
            Ok(Err(error)) => tracing::warn!(error, "the last metrics did not reach the OTLP receiver"),
            Err(_) => tracing::warn!("the last metrics did not reach the OTLP receiver in time"),
        }
    }
}

impl Sender {
    async fn send(&self, metrics: &Metrics) -> Result<(), String> {
        let mut request = tonic::Request::new(metrics.request(SERVICE, &self.instance, now()));
        *request.metadata_mut() = headers(&self.settings).map_err(|e| e.to_string())?;
        let mut client =
            MetricsServiceClient::new(self.channel.clone()).accept_compressed(CompressionEncoding::Gzip);
        let sent = tokio::time::timeout(self.settings.timeout, client.export(request)).await;
        let response = sent.map_err(|_| "no answer".to_owned())?.map_err(|s| described(&s))?.into_inner();
        match response.partial_success.filter(|p| p.rejected_data_points > 0) {
            Some(p) => Err(format!("{} data points refused: {}", p.rejected_data_points, p.error_message)),
            None => Ok(()),
        }
    }
}
