//! How far each boot is stored, in a stream of its own that every collector
//! reads, one message for each boot. It may be behind, never ahead: what is
//! behind it is sent again, and the stream of events drops it.

use super::bus::{Bus, chain, failed};
use super::subject::token;
use crate::collect::positions::Origin;
use async_nats::jetstream::stream::{Config, LastRawMessageErrorKind};
use std::io;
use std::time::Duration;

/// A boot that nothing came from for so long is forgotten.
const FORGET: Duration = Duration::from_secs(30 * 86_400);

/// Beside a stream of events.
pub struct Shared {
    stream: String,
    subject: String,
}

impl Shared {
    pub fn of(stream: &str, subject: &str) -> Shared {
        Shared { stream: format!("{stream}-positions"), subject: format!("{subject}-positions") }
    }

    fn subject(&self, origin: &Origin) -> String {
        format!("{}.{}.{}", self.subject, token(&origin.sensor), token(&origin.boot))
    }

    /// 0: nothing is known.
    pub async fn get(&self, bus: &mut Bus, origin: &Origin) -> io::Result<u64> {
        let got = self.read(bus, origin).await;
        if got.is_err() {
            // The next one begins with another connection.
            bus.disconnect();
        }
        got
    }

    async fn read(&self, bus: &mut Bus, origin: &Origin) -> io::Result<u64> {
        let context = bus.context().await?;
        bus.stream(&context, &self.stream, self.config()).await?;
        let stream = context.get_stream_no_info(&self.stream).await;
        let stream = stream.map_err(|e| failed(format!("stream {}: {}", self.stream, chain(&e))))?;
        match stream.get_last_raw_message_by_subject(&self.subject(origin)).await {
            Ok(message) => {
                Ok(std::str::from_utf8(&message.payload).ok().and_then(|t| t.parse().ok()).unwrap_or(0))
            }
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(0),
            Err(error) => Err(failed(format!("stream {}: {}", self.stream, chain(&error)))),
        }
    }

    /// On its way; nobody waits for it.
    pub async fn put(&self, bus: &Bus, origin: &Origin, seq: u64) {
        bus.send_unwatched(self.subject(origin), seq.to_string()).await;
    }

    fn config(&self) -> Config {
        Config {
            name: self.stream.clone(),
            subjects: vec![format!("{}.>", self.subject)],
            max_messages_per_subject: 1,
            max_age: FORGET,
            ..Default::default()
        }
    }
}
