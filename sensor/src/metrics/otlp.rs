//! OpenTelemetry: the same sums, sent to a collector by OTLP over gRPC.

use super::series::{BOUNDS, SECONDS, present};
use super::{Metrics, Sums};
use crate::event::{Identity, now};
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_client::MetricsServiceClient;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric, NumberDataPoint, ResourceMetrics,
    ScopeMetrics, Sum, metric, number_data_point,
};
use opentelemetry_proto::tonic::resource::v1::Resource;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tonic::transport::{Channel, ClientTlsConfig};

/// Between two exports: OpenTelemetry's default is a minute, a scrape's is less.
const EVERY: Duration = Duration::from_secs(30);
/// For a connection, and for one export.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where the collector is.
#[derive(Clone, Debug)]
pub struct Endpoint(Box<tonic::transport::Endpoint>);

#[derive(Debug, thiserror::Error)]
#[error("{reason}; write http://HOST:4317, or https:// where the collector has TLS")]
pub struct EndpointError {
    reason: String,
}

impl std::str::FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Endpoint, EndpointError> {
        let error = |reason: &str| EndpointError { reason: reason.to_owned() };
        let tls = match text.split_once("://") {
            Some(("http", _)) => false,
            Some(("https", _)) => true,
            _ => return Err(error("neither http:// nor https://")),
        };
        let mut endpoint = tonic::transport::Endpoint::from_shared(text.to_owned())
            .map_err(|e| error(&e.to_string()))?
            .connect_timeout(PATIENCE)
            .timeout(PATIENCE);
        if endpoint.uri().host().is_none_or(str::is_empty) {
            return Err(error("no host"));
        }
        if tls {
            let config = ClientTlsConfig::new().with_native_roots();
            endpoint = endpoint.tls_config(config).map_err(|e| error(&e.to_string()))?;
        }
        Ok(Endpoint(Box::new(endpoint)))
    }
}

/// Sends everything again and again, and once more when `end` is true or gone.
pub async fn export(
    metrics: Arc<Metrics>,
    identity: Identity,
    endpoint: Endpoint,
    mut end: watch::Receiver<bool>,
) {
    // Connects when it is used, and again when the connection broke.
    let mut client = MetricsServiceClient::new(endpoint.0.connect_lazy());
    let mut failing = false;
    let mut ended = false;
    while !ended {
        ended = tokio::select! {
            () = tokio::time::sleep(EVERY) => false,
            _ = end.wait_for(|end| *end) => true,
        };
        match send(&mut client, &metrics, &identity).await {
            Ok(()) if failing => {
                failing = false;
                tracing::info!("metrics reach the OTLP collector again");
            }
            Ok(()) => (),
            Err(error) if !failing => {
                failing = true;
                tracing::warn!(%error, "metrics do not reach the OTLP collector; they are sent again");
            }
            Err(_) => (),
        }
    }
}

async fn send(
    client: &mut MetricsServiceClient<Channel>,
    metrics: &Metrics,
    identity: &Identity,
) -> Result<(), String> {
    let request = metrics.request("mcp-sensor", &identity.sensor, now());
    let sent = tokio::time::timeout(PATIENCE, client.export(request)).await;
    let response = sent.map_err(|_| "no answer".to_owned())?.map_err(|s| s.to_string())?.into_inner();
    match response.partial_success.filter(|p| p.rejected_data_points > 0) {
        Some(p) => Err(format!("{} data points refused: {}", p.rejected_data_points, p.error_message)),
        None => Ok(()),
    }
}

fn attribute(key: &str, value: &str) -> KeyValue {
    let value = Some(AnyValue { value: Some(Value::StringValue(value.to_owned())) });
    KeyValue { key: key.to_owned(), value, ..Default::default() }
}

fn attributes(keys: &'static [&'static str], values: &[String]) -> Vec<KeyValue> {
    present(keys, values).map(|(key, value)| attribute(key, value)).collect()
}

impl Metrics {
    /// `instance`: which one of the service.
    pub(crate) fn request(&self, service: &str, instance: &str, at: i64) -> ExportMetricsServiceRequest {
        let times = (self.started.unsigned_abs(), at.unsigned_abs());
        let sums = self.sums();
        let mut metrics: Vec<Metric> = counters(&sums, times);
        metrics.push(duration(&sums, times));
        drop(sums);
        metrics.extend(self.certificate_end().map(|end| certificate(end, at.unsigned_abs())));
        metrics.retain(|metric| match &metric.data {
            Some(metric::Data::Sum(sum)) => !sum.data_points.is_empty(),
            Some(metric::Data::Histogram(histogram)) => !histogram.data_points.is_empty(),
            Some(metric::Data::Gauge(_)) => true,
            _ => false,
        });
        let scope = InstrumentationScope {
            name: "mcp-sensor".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        };
        let resource = Resource {
            attributes: vec![
                attribute("service.name", service),
                attribute("service.version", env!("CARGO_PKG_VERSION")),
                attribute("service.instance.id", instance),
            ],
            ..Default::default()
        };
        ExportMetricsServiceRequest {
            resource_metrics: vec![ResourceMetrics {
                resource: Some(resource),
                scope_metrics: vec![ScopeMetrics { scope: Some(scope), metrics, ..Default::default() }],
                ..Default::default()
            }],
        }
    }
}

fn counters(sums: &Sums, (start, at): (u64, u64)) -> Vec<Metric> {
    let metric = |counter: &super::Counter| {
        let points = counter.series.iter().map(|(values, sum)| NumberDataPoint {
            attributes: attributes(counter.labels, values),
            start_time_unix_nano: start,
            time_unix_nano: at,
            value: Some(number_data_point::Value::AsInt(i64::try_from(*sum).unwrap_or(i64::MAX))),
            ..Default::default()
        });
        let sum = Sum {
            data_points: points.collect(),
            aggregation_temporality: AggregationTemporality::Cumulative.into(),
            is_monotonic: true,
        };
        described(counter.name, counter.unit, counter.help, metric::Data::Sum(sum))
    };
    sums.counters().into_iter().map(metric).collect()
}

fn certificate(end: i64, at: u64) -> Metric {
    let point = NumberDataPoint {
        time_unix_nano: at,
        value: Some(number_data_point::Value::AsInt(end)),
        ..Default::default()
    };
    let (name, help) = super::CERTIFICATE;
    described(name, SECONDS, help, metric::Data::Gauge(Gauge { data_points: vec![point] }))
}

fn duration(sums: &Sums, (start, at): (u64, u64)) -> Metric {
    let histogram = &sums.duration;
    let points = histogram.series.iter().map(|(values, distribution)| HistogramDataPoint {
        attributes: attributes(histogram.labels, values),
        start_time_unix_nano: start,
        time_unix_nano: at,
        count: distribution.count(),
        sum: Some(distribution.seconds),
        bucket_counts: distribution.counts.to_vec(),
        explicit_bounds: BOUNDS.to_vec(),
        ..Default::default()
    });
    let data = Histogram {
        data_points: points.collect(),
        aggregation_temporality: AggregationTemporality::Cumulative.into(),
    };
    described(histogram.name, SECONDS, histogram.help, metric::Data::Histogram(data))
}

fn described(name: &str, unit: &str, help: &str, data: metric::Data) -> Metric {
    Metric {
        name: name.to_owned(),
        unit: unit.to_owned(),
        description: help.to_owned(),
        data: Some(data),
        ..Default::default()
    }
}
