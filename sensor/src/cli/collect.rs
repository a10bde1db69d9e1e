//! `mcp-sensor collect`.

use super::{CollectArgs, Exit, Failure, output};
use crate::collect::log::Settings;
use crate::collect::{Archive, Collector, Listen, ListenError, StoreError, View};
use crate::event::file::Rotation;
use crate::metrics;
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

pub(super) fn run(args: &CollectArgs) -> anyhow::Result<ExitCode> {
    let listen: Listen =
        args.listen.parse().map_err(|e: ListenError| Failure::new(Exit::Usage, e.to_string()))?;
    let tls = args.tls.open()?;
    raise_file_limit();
    let settings = Settings {
        keep_bytes: args.keep_bytes,
        keep: Duration::from_secs(u64::from(args.keep_days) * 24 * 60 * 60),
    };
    let lines = (!args.no_ndjson).then_some(Rotation { max_bytes: args.max_bytes, keep: args.keep });
    let archive = Archive::open(&args.dir, settings, lines).map_err(|error| {
        let failure = Failure::new(Exit::Failure, error.to_string());
        match error {
            StoreError::InUse(_) => failure.hint("give each collector a directory of its own with --dir"),
            _ => failure,
        }
    })?;
    let printing =
        if args.quiet { None } else { Some(View::spawn(output::style(args.output), std::io::stdout())?) };
    let (view, printer) = printing.unzip();
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(async {
        let collector = Collector::bind(&listen, archive, view).await.map_err(|error| {
            Failure::new(Exit::NoAgent, format!("{error:#}")).hint("choose another address with --listen")
        })?;
        let collector = match tls {
            Some(tls) => collector.secured(tls),
            None => collector,
        };
        let collector = match &args.policies {
            Some(dir) => collector.with_policies(dir).map_err(|error| {
                Failure::new(Exit::Failure, format!("--policies {}: {error}", dir.display()))
                    .hint("give a directory with bundles that `mcp-sensor policy sign` made; it may be empty")
            })?,
            None => collector,
        };
        if collector.is_exposed() {
            if !args.tls.insecure_plaintext {
                let message = format!("{}: without TLS only this host may send events", args.listen);
                return Err(Failure::new(Exit::Usage, message)
                    .hint("give --tls-ca, --tls-cert and --tls-key, or, where the network is trusted, --insecure-plaintext")
                    .into());
            }
            tracing::warn!("there is no TLS: whoever reaches this address can send events as any sensor, and read what others send");
        }
        if let Some(address) = args.metrics {
            let server = metrics::Server::bind(address, collector.page()).map_err(|error| {
                Failure::new(Exit::Failure, format!("--metrics: cannot listen on {address}: {error}"))
            })?;
            tracing::info!(address = %server.address()?, "metrics are at /metrics");
            tokio::spawn(server.serve());
        }
        // On stderr: stdout is for events.
        eprintln!("listening on {}", collector.address()?);
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let ended = async move {
            tokio::select! {
                _ = interrupt.recv() => (),
                _ = terminate.recv() => (),
            }
        };
        collector.serve(ended).await
    })?;
    if let Some(printer) = printer {
        printer.finish(Duration::from_secs(2));
    }
    Ok(ExitCode::SUCCESS)
}

/// A descriptor for each sensor: the usual soft limit of 1024 is for programs
/// that use select(2).
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(soft, hard)| setrlimit(Resource::RLIMIT_NOFILE, soft.max(hard.min(1 << 16)), hard));
    if let Err(error) = raised {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}
