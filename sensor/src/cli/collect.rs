//! `mcp-sensor collect`.

use super::{DEFAULT_LISTEN, Exit, Failure, Output, TlsArgs, output};
use crate::collect::log::Settings;
use crate::collect::output::Configured;
use crate::collect::output::file::{Invalid, LoadError, load};
use crate::collect::{Archive, Collector, Listen, ListenError, Publisher, StoreError, View, wants_color};
use crate::event::file::Rotation;
use crate::health::Health;
use crate::metrics::{Page, Server};
use crate::policy::diagnostic::render;
use crate::supervisor;
use clap::Args;
use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;

/// Receive events from sensors and keep them.
///
/// Needs no privilege. Every batch is acknowledged only when it is on disk, and
/// stored once however often it is sent.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor collect --dir ./events
  mcp-sensor collect --dir ./events --listen 0.0.0.0:7117 --tls-ca ca.pem \\
    --tls-cert collector-c.example.pem --tls-key collector-c.example-key.pem
  mcp-sensor collect --listen unix:/run/mcp-sensor/collect.sock --dir /var/lib/mcp-sensor/events -o json
  mcp-sensor collect --check --outputs outputs.yaml
  mcp-sensor collect --dir ./events --outputs outputs.yaml --metrics 9465
  mcp-sensor collect --publish bus.yaml --listen 0.0.0.0:7117 --tls-ca ca.pem \\
    --tls-cert collector-c.example.pem --tls-key collector-c.example-key.pem")]
pub struct CollectArgs {
    /// Where to listen: HOST:PORT, or unix:/PATH. Beyond this host only with TLS.
    #[arg(long, env = "MCP_SENSOR_LISTEN", value_name = "ADDR", default_value = DEFAULT_LISTEN)]
    pub listen: String,

    #[command(flatten)]
    pub tls: TlsArgs,

    /// Where the events are kept: a log that `events --collector` and subscribers read, and files of
    /// lines beside it (events.ndjson, events.ndjson.1, …).
    #[arg(long, env = "MCP_SENSOR_DIR", value_name = "DIR", required_unless_present_any = ["check", "publish"])]
    pub dir: Option<PathBuf>,

    /// Give sensors policies: the signed bundles in this directory (`policy sign`), the newest to
    /// each sensor that it is for. Changes are taken up; a file that is no bundle changes nothing.
    #[arg(long, env = "MCP_SENSOR_POLICIES", value_name = "DIR")]
    pub policies: Option<PathBuf>,

    /// What the log may hold; the oldest goes first, also if a subscriber has not read it.
    #[arg(long, env = "MCP_SENSOR_KEEP_BYTES", value_name = "BYTES", default_value_t = 4 << 30,
          value_parser = clap::value_parser!(u64).range(8 << 20..))]
    pub keep_bytes: u64,

    /// How long the log holds events; 0: as long as there is room.
    #[arg(long, env = "MCP_SENSOR_KEEP_DAYS", value_name = "DAYS", default_value_t = 30)]
    pub keep_days: u32,

    /// Where events go beside that: a file (YAML) that says to which receivers, in which format and
    /// which events. Each has a cursor of its own and goes on where it was after a restart.
    #[arg(long, env = "MCP_SENSOR_OUTPUTS", value_name = "FILE")]
    pub outputs: Option<PathBuf>,

    /// Keep nothing here: events go straight into the JetStream stream that this file (YAML, as of
    /// --outputs, with one output of the kind `nats`) names, and sensors hear that they are stored when
    /// the stream has them. Any number of such collectors stand beside each other.
    #[arg(long, env = "MCP_SENSOR_PUBLISH", value_name = "FILE",
          conflicts_with_all = ["dir", "outputs", "keep_bytes", "keep_days", "keep", "max_bytes", "no_ndjson"])]
    pub publish: Option<PathBuf>,

    /// Check the file of outputs, with the certificates and secrets that it names, and start nothing.
    #[arg(long)]
    pub check: bool,

    /// Serve metrics of the collector to Prometheus at http://ADDR/metrics, and /healthz and /readyz
    /// beside them. ADDR is PORT (on 127.0.0.1), IP:PORT or [IPV6]:PORT; whoever reaches it may read the
    /// names of sensors.
    #[arg(long, env = "MCP_SENSOR_METRICS", value_name = "ADDR",
          value_parser = crate::metrics::parse_address)]
    pub metrics: Option<SocketAddr>,

    /// Write no files of lines, only the log.
    #[arg(long, env = "MCP_SENSOR_NO_NDJSON")]
    pub no_ndjson: bool,

    /// Start a new file of lines beyond this size.
    #[arg(long, env = "MCP_SENSOR_MAX_BYTES", value_name = "BYTES", default_value_t = 256 << 20,
          value_parser = clap::value_parser!(u64).range(1 << 20..))]
    pub max_bytes: u64,

    /// Full files of lines kept beside the current one.
    #[arg(long, env = "MCP_SENSOR_KEEP", value_name = "N", default_value_t = 16,
          value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub keep: u32,

    /// Print events as they come.
    #[arg(short, long, env = "MCP_SENSOR_OUTPUT", value_enum, default_value_t = Output::Table)]
    pub output: Output,

    /// Print nothing but errors.
    #[arg(long, env = "MCP_SENSOR_QUIET")]
    pub quiet: bool,
}

/// Where events go.
enum Store {
    Archive(Box<Archive>),
    Publisher(Box<Publisher>),
}

pub(super) fn run(args: &CollectArgs) -> anyhow::Result<ExitCode> {
    crate::panics::end_the_process();
    let file = args.publish.as_ref().or(args.outputs.as_ref());
    if args.check && file.is_none() {
        let failure = Failure::new(Exit::Usage, "--check: there is no file to check".to_owned());
        return Err(failure.hint("give --outputs FILE or --publish FILE").into());
    }
    let outputs = outputs(args, file.map(PathBuf::as_path))?;
    let (publisher, outputs) = match &args.publish {
        None => (None, outputs),
        Some(path) => {
            let refused = |e| Failure::new(Exit::Usage, format!("{}: {e}", path.display()));
            (Some(Publisher::new(outputs).map_err(refused)?), Vec::new())
        }
    };
    if args.check {
        return Ok(ExitCode::SUCCESS);
    }
    let listen: Listen =
        args.listen.parse().map_err(|e: ListenError| Failure::new(Exit::Usage, e.to_string()))?;
    let tls = args.tls.open()?;
    raise_file_limit();
    let store = match publisher {
        Some(publisher) => Store::Publisher(Box::new(publisher)),
        None => Store::Archive(Box::new(archive(args, outputs)?)),
    };
    let printing =
        if args.quiet { None } else { Some(View::spawn(output::style(args.output), std::io::stdout())?) };
    let (view, printer) = printing.unzip();
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(async {
        let collector = match store {
            Store::Archive(archive) => Collector::bind(&listen, *archive, view).await,
            Store::Publisher(publisher) => Collector::publishing(&listen, *publisher, view).await,
        };
        let collector = collector.map_err(|error| {
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
        let metrics = args.metrics.map(|address| serve_metrics(address, collector.page())).transpose()?;
        // On stderr: stdout is for events.
        eprintln!("listening on {}", collector.address()?);
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let ended = async move {
            tokio::select! {
                _ = interrupt.recv() => (),
                _ = terminate.recv() => (),
            }
            supervisor::stopping();
        };
        let supervised = tokio::spawn(supervise(collector.address()?, collector.health()));
        let served = collector.serve(ended).await;
        supervised.abort();
        if let Some(metrics) = metrics {
            metrics.abort();
        }
        served
    })?;
    if let Some(printer) = printer {
        printer.finish(Duration::from_secs(2));
    }
    Ok(ExitCode::SUCCESS)
}

/// How often the service manager hears that the collector is alive.
const BEAT: Duration = Duration::from_secs(2);

async fn supervise(address: String, health: Health) {
    let work = format!("listening on {address}");
    supervisor::ready(&work);
    let mut beat = tokio::time::interval(BEAT);
    loop {
        beat.tick().await;
        supervisor::alive(&health.borrow(), &work);
    }
}

fn archive(args: &CollectArgs, outputs: Vec<Configured>) -> anyhow::Result<Archive> {
    // The parser asks for it otherwise.
    let dir = args.dir.as_deref().unwrap_or(Path::new("."));
    let settings = Settings {
        keep_bytes: args.keep_bytes,
        keep: Duration::from_secs(u64::from(args.keep_days) * 24 * 60 * 60),
    };
    let lines = (!args.no_ndjson).then_some(Rotation { max_bytes: args.max_bytes, keep: args.keep });
    let failed = |error: StoreError| {
        let failure = Failure::new(Exit::Failure, error.to_string());
        match error {
            StoreError::InUse(_) => failure.hint("give each collector a directory of its own with --dir"),
            _ => failure,
        }
    };
    let mut archive = Archive::open(dir, settings, lines).map_err(failed)?;
    for output in outputs {
        archive.add(output).map_err(failed)?;
    }
    Ok(archive)
}

fn serve_metrics(address: SocketAddr, page: Arc<dyn Page>) -> anyhow::Result<JoinHandle<()>> {
    let server = Server::bind(address, page).map_err(|error| {
        Failure::new(Exit::NoAgent, format!("--metrics: cannot listen on {address}: {error}"))
            .hint("choose another address with --metrics")
    })?;
    let address = server.address()?;
    if !address.ip().is_loopback() {
        tracing::warn!(%address, "whoever reaches the metrics may read names of sensors");
    }
    tracing::info!(%address, "metrics are at /metrics");
    Ok(tokio::spawn(server.serve()))
}

/// What the file of outputs says; `--check` prints it.
fn outputs(args: &CollectArgs, path: Option<&Path>) -> anyhow::Result<Vec<Configured>> {
    let Some(path) = path else { return Ok(Vec::new()) };
    let loaded = load(path).map_err(|error| match error {
        LoadError::Read(..) => Failure::new(Exit::NotFound, error.to_string()),
        LoadError::Invalid(invalid) => {
            let Invalid { path, source_text, findings } = &invalid;
            eprint!(
                "{}",
                render(findings, path, source_text, std::io::stderr().is_terminal() && wants_color())
            );
            Failure::new(Exit::PolicyInvalid, format!("{path}: nothing was started"))
                .hint("correct the file; `mcp-sensor collect --check --outputs FILE` only checks it")
        }
    })?;
    for warning in &loaded.warnings {
        tracing::warn!("{}", warning.line(&path.display().to_string()));
    }
    if args.check {
        let mut text = format!("{}: {} outputs\n", path.display(), loaded.outputs.len());
        for output in &loaded.outputs {
            text.push_str(&format!("  {} ({})\n", output.name, output.kind.name()));
        }
        output::text(&text)?;
    }
    Ok(loaded.outputs)
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
