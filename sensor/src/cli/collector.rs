//! The way to a collector, and `mcp-sensor events --collector`.

use super::events::{since, verdicts};
use super::{EventsArgs, Exit, Failure, TlsArgs};
use crate::event::{Event, pb};
use crate::feed::Target;
use pb::events_client::EventsClient;
use std::fs;
use std::io::{self, Write as _};
use std::path::Path;
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Of one response; a fleet of 20,000 fits.
const MAX_ANSWER: usize = 64 << 20;

pub(super) async fn connect(address: &str, tls: &TlsArgs) -> anyhow::Result<EventsClient<Channel>> {
    let target = Target::new(address, tls.open()?, tls.insecure_plaintext)
        .map_err(|error| Failure::new(Exit::Usage, error.to_string()))?;
    let channel = target.open(Duration::from_secs(5)).await.map_err(|cause| {
        Failure::new(Exit::NoAgent, format!("no collector answers on {address}: {cause}"))
            .hint("start it (`mcp-sensor collect`), or give its address with --collector")
    })?;
    Ok(EventsClient::new(channel).max_decoding_message_size(MAX_ANSWER))
}

/// A status as an error for a person.
pub(super) fn failed(status: &Status) -> Failure {
    let (exit, hint) = match status.code() {
        Code::InvalidArgument | Code::FailedPrecondition => (Exit::Usage, ""),
        Code::Unavailable => (Exit::NoAgent, "the connection to the collector broke; try again"),
        Code::PermissionDenied => {
            (Exit::Failure, "`mcp-sensor certs issue reader NAME` makes a certificate for readers")
        }
        Code::Unimplemented => (Exit::Failure, "the collector is older than this program"),
        _ => (Exit::Failure, ""),
    };
    Failure::new(exit, crate::event::text::escape_lines(status.message())).hint(hint)
}

fn filter(args: &EventsArgs) -> anyhow::Result<pb::EventFilter> {
    Ok(pb::EventFilter {
        types: args.types.clone(),
        servers: args.server.iter().cloned().collect(),
        verdicts: verdicts(args),
        sensors: args.sensor.clone(),
        since_unix_ns: args.since.as_deref().map(since).transpose()?.unwrap_or(0),
        ..Default::default()
    })
}

fn tell(missed: Option<pb::Missed>) {
    if let Some(missed) = missed {
        tracing::warn!(count = missed.count, reason = %missed.reason, "the collector cannot give these events any more");
    }
}

/// Every event that the collector answers with.
pub(super) async fn each(
    address: &str,
    args: &EventsArgs,
    mut take: impl FnMut(&Event) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let filter = filter(args)?;
    let mut request = start(args)?;
    let mut client = connect(address, &args.tls).await?;
    if args.from.is_none() && args.cursor_file.is_none() {
        let query = pb::QueryRequest { filter: Some(filter.clone()), limit: args.limit.unwrap_or(0) };
        let mut stream = client.query(query).await.map_err(|s| failed(&s))?.into_inner();
        while let Some(response) = stream.message().await.map_err(|s| failed(&s))? {
            tell(response.missed);
            response.events.iter().try_for_each(&mut take)?;
            io::stdout().flush()?;
            request.cursor = response.cursor;
        }
    }
    if !args.follow {
        return Ok(());
    }
    request.filter = Some(filter);
    let mut stream = client.subscribe(request).await.map_err(|s| failed(&s))?.into_inner();
    while let Some(response) = stream.message().await.map_err(|s| failed(&s))? {
        tell(response.missed);
        response.events.iter().try_for_each(&mut take)?;
        io::stdout().flush()?;
        if let Some(path) = &args.cursor_file {
            keep(path, &response.cursor)?;
        }
    }
    Ok(())
}

/// Where a subscription begins that no query goes before.
fn start(args: &EventsArgs) -> anyhow::Result<pb::SubscribeRequest> {
    let bad = |text: &str| {
        Failure::new(Exit::Usage, format!("{text:?} is no cursor"))
            .hint("give begin, now, or a cursor in hex")
    };
    let kept = match &args.cursor_file {
        None => None,
        Some(path) => match fs::read_to_string(path) {
            Ok(text) => Some(text.trim().to_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some("begin".to_owned()),
            Err(error) => {
                return Err(Failure::new(Exit::Failure, format!("{}: {error}", path.display())).into());
            }
        },
    };
    let mut request = pb::SubscribeRequest::default();
    match kept.as_deref().or(args.from.as_deref()) {
        None | Some("now") => request.start = pb::Start::New.into(),
        Some("begin") => request.start = pb::Start::Beginning.into(),
        Some(text) => {
            request.cursor = hex::decode(text).ok().filter(|c| !c.is_empty()).ok_or_else(|| bad(text))?;
        }
    }
    Ok(request)
}

/// The old cursor or the new one, whatever happens.
fn keep(path: &Path, cursor: &[u8]) -> anyhow::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let write = || {
        let mut file = fs::File::create(&temporary)?;
        writeln!(file, "{}", hex::encode(cursor))?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|error: io::Error| {
        Failure::new(Exit::Failure, format!("the cursor cannot be kept in {}: {error}", path.display()))
            .into()
    })
}
