//! Prometheus: the OpenMetrics text of everything, over HTTP.

use super::series::{BOUNDS, BYTES, present};
use super::{Metrics, Sums};
use crate::health::State;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Connections at one time; more wait.
const CONNECTIONS: usize = 16;
/// For a request's headers, and for one answer as a whole.
const PATIENCE: Duration = Duration::from_secs(10);
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// `PORT` and `:PORT` are of the loopback address; another stands there in full.
pub fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let port = text.strip_prefix(':').unwrap_or(text);
    if let Ok(port) = port.parse::<u16>() {
        return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
    }
    let text = text.strip_prefix("localhost:").map_or(text.to_owned(), |port| format!("127.0.0.1:{port}"));
    text.parse().map_err(|_| "write PORT (on 127.0.0.1), IP:PORT or [IPV6]:PORT".to_owned())
}

impl Metrics {
    /// OpenMetrics text, version 1.0.0.
    pub fn text(self: &Arc<Metrics>) -> String {
        open_metrics(Box::new(Scrape(self.clone())))
    }
}

/// OpenMetrics text of what `collector` gives.
pub fn open_metrics(collector: Box<dyn Collector>) -> String {
    let mut registry = Registry::default();
    registry.register_collector(collector);
    let mut out = String::new();
    match text::encode(&mut out, &registry) {
        Ok(()) => out,
        // A String takes everything.
        Err(error) => format!("# {error}\n# EOF\n"),
    }
}

#[derive(Debug)]
struct Scrape(Arc<Metrics>);

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        if let Some(end) = self.0.certificate_end() {
            let (key, help) = super::CERTIFICATE;
            encoder
                .encode_descriptor(&name(key), help, Some(&Unit::Seconds), MetricType::Gauge)?
                .encode_gauge(&end)?;
        }
        for family in self.0.present.get().map(|present| present()).unwrap_or_default() {
            family.encode(&mut encoder)?;
        }
        encode(&self.0.sums(), encoder)
    }
}

/// Dots are no part of a name in Prometheus.
fn name(text: &str) -> String {
    text.replace('.', "_")
}

fn labels(keys: &'static [&'static str], values: &[String]) -> Vec<(String, String)> {
    present(keys, values).map(|(key, value)| (name(key), value.to_owned())).collect()
}

fn encode(sums: &Sums, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    for counter in sums.counters() {
        let unit = (counter.unit == BYTES).then_some(Unit::Bytes);
        let name = name(counter.name);
        let mut family =
            encoder.encode_descriptor(&name, counter.help, unit.as_ref(), MetricType::Counter)?;
        for (values, sum) in &counter.series {
            let labels = labels(counter.labels, values);
            family.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(sum, None)?;
        }
    }
    let histogram = &sums.duration;
    let name = name(histogram.name);
    let mut family =
        encoder.encode_descriptor(&name, histogram.help, Some(&Unit::Seconds), MetricType::Histogram)?;
    for (values, distribution) in &histogram.series {
        let labels = labels(histogram.labels, values);
        let bounds = BOUNDS.iter().copied().chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(distribution.counts).collect();
        let (seconds, count) = (distribution.seconds, distribution.count());
        family.encode_family(&labels)?.encode_histogram::<NoLabelSet>(seconds, count, &buckets, None)?;
    }
    Ok(())
}

/// What is served.
pub trait Page: Send + Sync + 'static {
    /// OpenMetrics text.
    fn scrape(self: Arc<Self>) -> String;

    fn health(&self) -> State;
}

impl Page for Metrics {
    fn scrape(self: Arc<Self>) -> String {
        self.text()
    }

    fn health(&self) -> State {
        let starting = || State { not_ready: vec!["it is starting".to_owned()], ..State::default() };
        self.health.get().map_or_else(starting, |health| health.borrow().clone())
    }
}

/// Answers `GET` of `/metrics`, `/healthz` and `/readyz`.
pub struct Server {
    listener: TcpListener,
    page: Arc<dyn Page>,
}

impl Server {
    /// Needs a tokio runtime around it.
    pub fn bind(address: SocketAddr, page: Arc<dyn Page>) -> io::Result<Server> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(Server { listener: TcpListener::from_std(listener)?, page })
    }

    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Until it is dropped.
    pub async fn serve(self) {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        let mut connections = tokio::task::JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            // It is never closed.
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors or memory: both pass.
                    tracing::warn!(%error, "a connection for metrics could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let page = self.page.clone();
            connections.spawn(async move {
                let _place = place;
                let answering = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(PATIENCE)
                    .max_buf_size(16 << 10)
                    // One that reads slowly gives its place back in the end.
                    .keep_alive(false)
                    .serve_connection(
                        TokioIo::new(stream),
                        service_fn(|request| answer(page.clone(), request)),
                    );
                let _ = tokio::time::timeout(3 * PATIENCE, answering).await;
            });
        }
    }
}

fn answer_health(good: bool, state: &State) -> (StatusCode, &'static str, String) {
    let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let lines: String = state.reasons().map(|reason| format!("{reason}\n")).collect();
    (status, "text/plain", if lines.is_empty() { "ok\n".to_owned() } else { lines })
}

async fn answer(
    page: Arc<dyn Page>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, hyper::http::Error> {
    let (status, kind, body) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => {
            let text = tokio::task::spawn_blocking(move || page.scrape()).await;
            match text {
                Ok(text) => (StatusCode::OK, CONTENT_TYPE, text),
                Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, "text/plain", format!("{error}\n")),
            }
        }
        (&Method::GET | &Method::HEAD, "/healthz") => answer_health(page.health().is_live(), &page.health()),
        (&Method::GET | &Method::HEAD, "/readyz") => answer_health(page.health().is_ready(), &page.health()),
        (_, "/metrics" | "/healthz" | "/readyz") => {
            (StatusCode::METHOD_NOT_ALLOWED, "text/plain", "GET only\n".to_owned())
        }
        _ => (StatusCode::NOT_FOUND, "text/plain", "there are /metrics, /healthz and /readyz\n".to_owned()),
    };
    Response::builder().status(status).header(header::CONTENT_TYPE, kind).body(Full::from(body))
}
