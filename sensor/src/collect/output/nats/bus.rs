//! The way into a stream: a connection, publishes under way, acknowledgements.

use super::settings::Settings;
use super::subject::token;
use crate::collect::output::part::Part;
use crate::collect::output::{Refused, TOO_LARGE};
use crate::event::{Body, Event, json};
use crate::format::{self, Format};
use async_nats::ConnectOptions;
use async_nats::jetstream::context::{
    ContextBuilder, GetStreamErrorKind, PublishAckFuture, PublishErrorKind,
};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::Config;
use async_nats::jetstream::{self, Context, ErrorCode};
use std::collections::VecDeque;
use std::error::Error;
use std::io;
use std::time::Duration;

/// Publishes that wait for their acknowledgement.
const WINDOW: usize = 256;
/// For a connection, and for one acknowledgement.
const PATIENCE: Duration = Duration::from_secs(5);
/// For all of a batch; what of it was acknowledged is not sent again.
const BATCH: Duration = Duration::from_secs(10);
/// How often the client connects again by itself; then this one begins anew, with
/// the files as they are then.
const RECONNECTS: usize = 10;

/// Events to subjects of a stream. Connects when it is needed.
pub struct Bus {
    settings: Settings,
    format: Format,
    context: Option<Context>,
}

/// Under way, or known to be too large without being sent.
enum Sent {
    Waits(PublishAckFuture),
    TooLarge,
}

impl Bus {
    pub fn new(settings: Settings, format: Format) -> Bus {
        Bus { settings, format, context: None }
    }

    /// The next that needs a connection makes another.
    pub fn disconnect(&mut self) {
        self.context = None;
    }

    /// Nobody hears what becomes of it.
    pub async fn send_unwatched(&self, subject: String, text: String) {
        if let Some(context) = &self.context {
            let sent = context.send_publish(subject, PublishMessage::build().payload(text.into())).await;
            if let Err(error) = sent {
                tracing::debug!(%error, "not sent");
            }
        }
    }

    /// What was sent is on its way when this returns, or the time is over.
    pub async fn flush(&self, time: Duration) {
        if let Some(context) = &self.context {
            let _ = tokio::time::timeout(time, context.client().flush()).await;
        }
    }

    /// Returns when each event behind `part.taken` is acknowledged or can never
    /// be; an error leaves in `part` how far it came.
    pub async fn publish(&mut self, events: &[Event], part: &mut Part) -> io::Result<()> {
        let published = tokio::time::timeout(BATCH, self.send(events, part)).await;
        let published = published.unwrap_or_else(|_| Err(failed("not all events were acknowledged in 10 s")));
        if published.is_err() {
            self.context = None;
        }
        published
    }

    async fn send(&mut self, events: &[Event], part: &mut Part) -> io::Result<()> {
        let context = self.context().await?;
        let mut sent: VecDeque<Sent> = VecDeque::new();
        for event in &events[part.taken..] {
            if sent.len() >= WINDOW {
                self.acknowledged(&mut sent, part).await?;
            }
            let subject = self.subject(event);
            let publish = context.send_publish(subject.clone(), self.message(event)?).await;
            sent.push_back(match publish {
                Ok(ack) => Sent::Waits(ack),
                Err(error) if error.kind() == PublishErrorKind::MaxPayloadExceeded => Sent::TooLarge,
                Err(error) => return Err(self.explain(error.kind(), &error)),
            });
        }
        while !sent.is_empty() {
            self.acknowledged(&mut sent, part).await?;
        }
        Ok(())
    }

    /// Waits for the oldest that is under way.
    async fn acknowledged(&self, sent: &mut VecDeque<Sent>, part: &mut Part) -> io::Result<()> {
        let taken = match sent.pop_front() {
            None => return Ok(()),
            Some(Sent::TooLarge) => false,
            Some(Sent::Waits(ack)) => match ack.await {
                // Number 0: it came before, and is not stored yet.
                Ok(ack) if ack.sequence == 0 => {
                    return Err(failed("an event is not stored yet that came twice"));
                }
                Ok(_) => true,
                Err(error) if is_too_large(&error) => false,
                Err(error) => return Err(self.explain(error.kind(), &error)),
            },
        };
        if !taken {
            part.refused.push(Refused { event: part.taken, reason: TOO_LARGE });
        }
        part.taken += 1;
        Ok(())
    }

    fn subject(&self, event: &Event) -> String {
        let prefix = &self.settings.subject;
        let kind = event.body.as_ref().map_or("unknown", json::type_name);
        if self.settings.by_sensor {
            format!("{prefix}.{}.{kind}", token(&event.sensor))
        } else {
            format!("{prefix}.{kind}")
        }
    }

    fn message(&self, event: &Event) -> io::Result<PublishMessage> {
        let mut line = Vec::new();
        format::write_line(self.format, event, &mut line)?;
        line.truncate(line.len().saturating_sub(1));
        let message = PublishMessage::build().payload(line.into()).message_id(message_id(event));
        Ok(match &self.settings.stream {
            Some(stream) => message.expected_stream(stream),
            None => message,
        })
    }

    /// Connected, with the stream there if it was to be made.
    pub async fn context(&mut self) -> io::Result<Context> {
        if let Some(context) = &self.context {
            return Ok(context.clone());
        }
        let client = self.options()?.connect(self.settings.servers.clone()).await;
        let client = client.map_err(|e| failed(format!("{}: {}", self.settings.listed(), chain(&e))))?;
        let context = ContextBuilder::new()
            .timeout(PATIENCE)
            .ack_timeout(PATIENCE)
            .max_ack_inflight(2 * WINDOW)
            .backpressure_on_inflight(true)
            .build(client);
        if let (Some(create), Some(stream)) = (&self.settings.create, &self.settings.stream) {
            let config = Config {
                subjects: vec![format!("{}.>", self.settings.subject)],
                max_bytes: create.max_bytes.map_or(-1, |bytes| i64::try_from(bytes).unwrap_or(i64::MAX)),
                max_age: create.max_age.unwrap_or_default(),
                duplicate_window: create.duplicate_window,
                ..Default::default()
            };
            self.stream(&context, stream, config).await?;
        }
        Ok(self.context.insert(context).clone())
    }

    fn options(&self) -> io::Result<ConnectOptions> {
        let settings = &self.settings;
        let mut options = ConnectOptions::new()
            .name("mcp-sensor collect")
            .connection_timeout(PATIENCE)
            .request_timeout(Some(PATIENCE))
            .max_reconnects(RECONNECTS)
            .require_tls(settings.tls);
        // Read anew for each connection.
        if let Some(ca) = &settings.ca {
            options = options.add_root_certificates(ca.clone());
        }
        if let (Some(certificate), Some(key)) = (&settings.cert, &settings.key) {
            options = options.add_client_certificate(certificate.clone(), key.clone());
        }
        if let Some(credentials) = &settings.credentials {
            // What a secret ends with is not part of it, but of this file.
            let text = format!("{}\n", credentials.read()?);
            options = options.credentials(&text).map_err(|e| failed(format!("{credentials}: {e}")))?;
        }
        if let Some(token) = &settings.token {
            options = options.token(token.read()?);
        }
        if let (Some(user), Some(password)) = (&settings.user, &settings.password) {
            options = options.user_and_password(user.clone(), password.read()?);
        }
        Ok(options)
    }

    /// Made if it is not there and may be made; where it is there, it stays as it
    /// is. Another collector may make it at the same moment, and the same.
    pub async fn stream(&self, context: &Context, name: &str, config: Config) -> io::Result<()> {
        let error = match context.get_stream(name).await {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        let absent = matches!(error.kind(), GetStreamErrorKind::JetStream(why) if why.error_code() == ErrorCode::STREAM_NOT_FOUND);
        let Some(create) = self.settings.create.as_ref().filter(|_| absent) else {
            let hint = if absent { "; make it, or give `create`" } else { "" };
            return Err(failed(format!("stream {name}: {}{hint}", chain(&error))));
        };
        let config = Config { name: name.to_owned(), num_replicas: create.replicas, ..config };
        let made = context.create_stream(config).await;
        made.map_err(|e| failed(format!("stream {name} cannot be made: {}", chain(&e))))?;
        tracing::info!(stream = name, "the stream was not there: it is made");
        Ok(())
    }

    fn explain(&self, kind: PublishErrorKind, error: &(dyn Error + 'static)) -> io::Error {
        let (subject, stream) = (&self.settings.subject, self.settings.stream.as_deref());
        match (kind, stream) {
            (PublishErrorKind::StreamNotFound, None) => failed(format!(
                "no stream takes {subject}.>: make one with this subject, or give `stream` and `create`"
            )),
            (PublishErrorKind::StreamNotFound, Some(stream)) => failed(format!(
                "no stream takes {subject}.>: make {stream} with this subject, or give `create`"
            )),
            (PublishErrorKind::TimedOut, _) => {
                failed(format!("{}: no acknowledgement in 5 s", self.settings.listed()))
            }
            (_, Some(stream)) => failed(format!("stream {stream}: {}", chain(error))),
            (_, None) => failed(chain(error)),
        }
    }
}

/// By which the stream drops what comes twice, and consumers what comes again
/// after its window. What a collector itself tells is known by when it was told.
pub fn message_id(event: &Event) -> String {
    match &event.body {
        Some(Body::Loss(loss)) if event.seq == 0 => {
            format!("{}/{}/{}", loss.r#where, loss.reason, event.time_unix_ns)
        }
        _ => format::unique_id(event),
    }
}

/// The stream's own limit.
fn is_too_large(error: &(dyn Error + 'static)) -> bool {
    let why = error.source().and_then(|e| e.downcast_ref::<jetstream::Error>());
    why.is_some_and(|e| {
        let code = e.error_code();
        code == ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM || code == ErrorCode::STREAM_HEADER_EXCEEDS_MAXIMUM
    })
}

pub fn failed(why: impl Into<String>) -> io::Error {
    io::Error::other(why.into())
}

/// An error with its causes.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::pb;

    fn bus(by_sensor: bool) -> Bus {
        let settings = Settings {
            servers: Vec::new(),
            subject: "x.events".to_owned(),
            by_sensor,
            tls: false,
            stream: None,
            ca: None,
            cert: None,
            key: None,
            credentials: None,
            token: None,
            user: None,
            password: None,
            create: None,
        };
        Bus::new(settings, Format::Ndjson)
    }

    #[test]
    fn an_event_has_the_subject_of_its_type_and_where_asked_for_of_its_sensor() {
        let exec = Some(Body::Exec(pb::Exec::default()));
        let event = Event { sensor: "web.1 *".to_owned(), seq: 7, body: exec, ..Default::default() };
        assert_eq!(bus(false).subject(&event), "x.events.exec");
        assert_eq!(bus(true).subject(&event), "x.events.web=2e1=20=2a.exec");
        assert_eq!(bus(false).subject(&Event::default()), "x.events.unknown");
        assert_eq!(bus(true).subject(&Event::default()), "x.events.=.unknown");
    }

    #[test]
    fn what_has_no_number_has_an_id_of_its_own() {
        let loss = |reason: &str, time_unix_ns| {
            let loss =
                pb::Loss { r#where: "output:a".to_owned(), reason: reason.to_owned(), ..Default::default() };
            message_id(&Event { time_unix_ns, body: Some(Body::Loss(loss)), ..Default::default() })
        };
        assert_eq!(loss("refused", 5), "output:a/refused/5");
        assert_ne!(loss("refused", 5), loss("too_large", 5));
        let event = Event { sensor: "s".to_owned(), boot: "b".to_owned(), seq: 7, ..Default::default() };
        assert_eq!(message_id(&event), "s/b/7");
    }
}
