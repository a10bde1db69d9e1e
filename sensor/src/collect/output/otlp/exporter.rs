//! The way to a receiver of OTLP: its connection, and logs in requests of a
//! bounded size.

use super::answer::{self, Answer};
use super::settings::Settings;
use crate::collect::output::part::Part;
use crate::collect::output::{Later, REFUSED, Refused, SOME};
use crate::event::{Event, now};
use crate::format::otel;
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::collector::logs::v1::logs_service_client::LogsServiceClient;
use prost::Message as _;
use std::io;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::Status;
use tonic::codec::CompressionEncoding;
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Endpoint};

/// Of one request before compression, with one event more. Receivers usually take
/// 4 MiB.
const BYTES: usize = 1 << 20;
const EVENTS: usize = 512;
/// For a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// For all of a batch, but for its last request; what of it was taken is not sent
/// again.
const BATCH: Duration = Duration::from_secs(10);

pub struct Exporter {
    settings: Settings,
    channel: Channel,
    gzip: bool,
}

impl Exporter {
    /// Connects when it is used, and again when the connection broke. Needs a
    /// runtime around it.
    pub fn new(settings: Settings) -> io::Result<Exporter> {
        let channel = channel(&settings)?;
        Ok(Exporter { gzip: settings.gzip, settings, channel })
    }

    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Returns when each event behind `part.taken` is taken or never will be; an
    /// error leaves in `part` how far it came.
    pub async fn export(&mut self, events: &[Event], part: &mut Part) -> io::Result<()> {
        let began = Instant::now();
        let headers = headers(&self.settings)?;
        let mut most = EVENTS;
        while part.taken < events.len() {
            if began.elapsed() > BATCH {
                return Err(io::Error::other("not all events were taken in 10 s"));
            }
            let chunk = chunk(&events[part.taken..], most);
            let rejected = match self.send(chunk, &headers).await {
                Ok(rejected) => rejected.min(chunk.len()),
                Err(status) => match answer::of(&status) {
                    Answer::Plain if self.gzip => {
                        tracing::warn!(receiver = self.settings.authority, "it takes no gzip: it gets none");
                        self.gzip = false;
                        continue;
                    }
                    Answer::Plain => return Err(self.error(&status, Duration::ZERO)),
                    Answer::Again(after) => return Err(self.error(&status, after)),
                    Answer::Never(_) if chunk.len() > 1 => {
                        most = chunk.len() / 2;
                        continue;
                    }
                    Answer::Never(reason) => {
                        tracing::warn!(receiver = self.settings.authority, why = %described(&status), "an event was refused");
                        part.refused.push(Refused { event: part.taken, reason });
                        part.taken += 1;
                        continue;
                    }
                },
            };
            // Which ones of more than one is not said.
            let whole = rejected == chunk.len();
            let refused = |n| Refused { event: if whole { part.taken + n } else { SOME }, reason: REFUSED };
            part.refused.extend((0..rejected).map(refused));
            part.taken += chunk.len();
            most = (most * 2).min(EVENTS);
        }
        Ok(())
    }

    /// How many log records were rejected.
    async fn send(&self, events: &[Event], headers: &MetadataMap) -> Result<usize, Status> {
        let mut request = tonic::Request::new(ExportLogsServiceRequest {
            resource_logs: otel::resource_logs(events, now()),
        });
        *request.metadata_mut() = headers.clone();
        request.set_timeout(self.settings.timeout);
        let mut client =
            LogsServiceClient::new(self.channel.clone()).accept_compressed(CompressionEncoding::Gzip);
        if self.gzip {
            client = client.send_compressed(CompressionEncoding::Gzip);
        }
        let sent = tokio::time::timeout(self.settings.timeout, client.export(request)).await;
        let response = sent.map_err(|_| Status::deadline_exceeded("no answer"))??.into_inner();
        let Some(partial) = response.partial_success else { return Ok(0) };
        let rejected = usize::try_from(partial.rejected_log_records).unwrap_or(0);
        if rejected > 0 || !partial.error_message.is_empty() {
            let why = crate::event::text::escape_lines(&partial.error_message);
            tracing::warn!(receiver = self.settings.authority, rejected, why, "log records were rejected");
        }
        Ok(rejected)
    }

    fn error(&self, status: &Status, after: Duration) -> io::Error {
        let why = format!("{}: {}", self.settings.authority, described(status));
        if after.is_zero() { io::Error::other(why) } else { Later { why, after }.into() }
    }
}

/// The first events, as many as one request holds.
fn chunk(events: &[Event], most: usize) -> &[Event] {
    let mut bytes = 0;
    let fits = |event: &&Event| {
        let room = bytes < BYTES;
        // Names of attributes take about as much as what they name.
        bytes += 2 * event.encoded_len();
        room
    };
    &events[..events.iter().take(most).take_while(fits).count()]
}

/// As the secrets are now.
pub fn headers(settings: &Settings) -> io::Result<MetadataMap> {
    let mut headers = MetadataMap::new();
    for (name, secret) in &settings.headers {
        let mut value: tonic::metadata::AsciiMetadataValue = secret
            .read()?
            .parse()
            .map_err(|_| io::Error::other(format!("{secret}: not what a header may hold")))?;
        value.set_sensitive(true);
        headers.insert(name.clone(), value);
    }
    Ok(headers)
}

pub fn described(status: &Status) -> String {
    let mut text = format!("{:?}: {}", status.code(), crate::event::text::escape_lines(status.message()));
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

fn channel(settings: &Settings) -> io::Result<Channel> {
    let uri = |scheme: &str| format!("{scheme}://{}", settings.authority);
    let mut endpoint = Endpoint::from_shared(uri("http"))
        .map_err(io::Error::other)?
        .connect_timeout(CONNECT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(false);
    if settings.tls.is_some() {
        endpoint = endpoint.origin(uri("https").parse().map_err(io::Error::other)?);
    }
    let (authority, secured) = (settings.authority.clone(), settings.tls.clone());
    let dial = tower::service_fn(move |_| {
        let (authority, secured) = (authority.clone(), secured.clone());
        async move {
            let stream = TcpStream::connect(&authority).await?;
            stream.set_nodelay(true)?;
            let stream: Box<dyn Stream> = match secured {
                None => Box::new(stream),
                // The files as they are now.
                Some((name, client)) => {
                    Box::new(TlsConnector::from(client.current()).connect(name, stream).await?)
                }
            };
            Ok::<_, io::Error>(TokioIo::new(stream))
        }
    });
    Ok(endpoint.connect_with_connector_lazy(dial))
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}
