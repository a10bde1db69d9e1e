//! `mcp-sensor events`.

use super::{EventsArgs, Exit, Failure, VerdictArg, client, output};
use crate::collect::{write_event, write_headings};
use crate::event::{Event, now, pb};
use crate::format::write_line;
use std::io::{self, Write};
use std::process::ExitCode;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

pub(super) fn run(args: &EventsArgs) -> anyhow::Result<ExitCode> {
    let request = request(args)?;
    let mut out = io::stdout().lock();
    if let Some(format) = args.format {
        client::block_on(each(&args.control, request, |event| Ok(write_line(format, event, &mut out)?)))?;
        return Ok(ExitCode::SUCCESS);
    }
    let style = output::style(args.output.output);
    write_headings(style, &mut out)?;
    client::block_on(each(&args.control, request, |event| Ok(write_event(style, event, &mut out)?)))?;
    Ok(ExitCode::SUCCESS)
}

fn request(args: &EventsArgs) -> anyhow::Result<pb::EventsRequest> {
    let verdict = |v: &VerdictArg| match v {
        VerdictArg::Allow => pb::Verdict::Allow.into(),
        VerdictArg::Deny => pb::Verdict::Deny.into(),
        VerdictArg::WouldDeny => pb::Verdict::WouldDeny.into(),
    };
    Ok(pb::EventsRequest {
        follow: args.follow,
        server: args.server.clone().unwrap_or_default(),
        verdicts: args.verdict.iter().map(verdict).collect(),
        since_unix_ns: args.since.as_deref().map(since).transpose()?.unwrap_or(0),
        limit: args.limit.unwrap_or(0),
        types: args.types.clone(),
        ..Default::default()
    })
}

/// Every event that the agent answers with.
pub(super) async fn each(
    control: &super::ControlArgs,
    request: pb::EventsRequest,
    mut take: impl FnMut(&Event) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut control = client::connect(control).await?;
    let mut stream = control.events(request).await.map_err(|s| client::failed(&s))?.into_inner();
    while let Some(message) = stream.message().await.map_err(|s| client::failed(&s))? {
        for event in &message.events {
            take(event)?;
        }
        io::stdout().flush()?;
    }
    Ok(())
}

/// "10m" before now, or a time in RFC 3339; as nanoseconds since 1970.
pub(super) fn since(text: &str) -> Result<i64, Failure> {
    if let Ok(time) = OffsetDateTime::parse(text, &Rfc3339) {
        return i64::try_from(time.unix_timestamp_nanos()).map_err(|_| bad_since(text));
    }
    let unit = match text.as_bytes().last() {
        Some(b's') => 1,
        Some(b'm') => 60,
        Some(b'h') => 3600,
        Some(b'd') => 86_400,
        _ => return Err(bad_since(text)),
    };
    let seconds = text[..text.len() - 1].parse::<u32>().ok().and_then(|n| i64::from(n).checked_mul(unit));
    let nanoseconds = seconds.and_then(|s| s.checked_mul(1_000_000_000)).ok_or_else(|| bad_since(text))?;
    Ok(now().saturating_sub(nanoseconds))
}

fn bad_since(text: &str) -> Failure {
    Failure::new(Exit::Usage, format!("--since {text:?} is neither an age nor a time"))
        .hint("an age is a number with s, m, h or d (90s, 10m, 2h, 1d); a time is 2026-11-21T08:00:00Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_and_times_are_read_and_anything_else_is_refused() {
        assert_eq!(since("1970-01-01T00:00:01Z").unwrap(), 1_000_000_000);
        let before = now();
        let minute = since("1m").unwrap();
        assert!((before - 60_000_000_000..=now() - 60_000_000_000).contains(&minute));
        for bad in ["", "m", "5", "-1m", "1w", "é", "99999999999s", "1h ", "2026-01-01"] {
            assert_eq!(since(bad).unwrap_err().exit, Exit::Usage, "{bad:?}");
        }
    }
}
