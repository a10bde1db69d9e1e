//! Where the events of `mcp-sensor run` go: the file of `--events`, the metrics,
//! and the collector, in another process or in this one.

use crate::cli::RunArgs;
use crate::collect::{Printer, Store, Style, View, spawn_local};
use crate::event::file::{LineFile, Rotation};
use crate::event::ledger::{Ledger, Unsafe};
use crate::event::{Bus, ndjson, now, pb};
use crate::feed::{self, Collectors, Feed, PolicyLink};
use crate::health::Health;
use crate::metrics::gauge::Family;
use crate::metrics::{self, Metrics};
use anyhow::Context;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::watch;

/// The bus's buffer for a file on this host's disk, of each class.
const DISK_BACKLOG: usize = 8192;
/// Of the collector in this process. The current file is read at the start,
/// which must be quick.
const LOCAL: Rotation = Rotation { max_bytes: 16 << 20, keep: 32 };
/// How long the end of the sensor waits for a disk or a terminal.
const END: Duration = Duration::from_secs(3);

/// The bus's buffer for the metrics, of each class.
const METRICS_BACKLOG: usize = 8192;

/// Everything that reads the bus until it is closed.
pub struct Outputs {
    feed: Option<(Feed, tokio::task::JoinHandle<()>)>,
    threads: Vec<JoinHandle<()>>,
    printer: Option<Printer>,
    metrics: Option<Measuring>,
}

/// The tasks behind `--metrics` and `--otlp`.
struct Measuring {
    metrics: Arc<Metrics>,
    following: tokio::task::JoinHandle<()>,
    serving: Option<tokio::task::JoinHandle<()>>,
    exporting: Option<(watch::Sender<bool>, tokio::task::JoinHandle<()>)>,
}

impl Measuring {
    fn start(bus: &Arc<Bus>, args: &RunArgs) -> anyhow::Result<Option<Measuring>> {
        if args.metrics.is_none() && args.otlp.is_none() {
            return Ok(None);
        }
        let metrics = Metrics::new(now());
        let serving = match args.metrics {
            None => None,
            Some(address) => {
                let server = metrics::Server::bind(address, metrics.clone())
                    .with_context(|| format!("--metrics: cannot listen on {address}"))?;
                let address = server.address()?;
                if !address.ip().is_loopback() {
                    tracing::warn!(%address, "whoever reaches the metrics may read names of servers and tools");
                }
                tracing::info!(%address, "metrics are at /metrics");
                Some(tokio::spawn(server.serve()))
            }
        };
        let exporting = args.otlp.clone().map(|endpoint| {
            let (end, ending) = watch::channel(false);
            let identity = bus.identity().clone();
            (end, tokio::spawn(metrics::export(metrics.clone(), identity, endpoint, ending)))
        });
        let subscriber = bus.subscribe("metrics", METRICS_BACKLOG)?;
        let following = tokio::spawn(metrics.clone().follow(subscriber));
        Ok(Some(Measuring { metrics, following, serving, exporting }))
    }

    /// After the bus is closed: the last sums are sent.
    async fn finish(self) {
        let _ = self.following.await;
        if let Some(serving) = self.serving {
            serving.abort();
        }
        if let Some((end, exporting)) = self.exporting {
            let _ = end.send(true);
            let _ = tokio::time::timeout(END, exporting).await;
        }
    }
}

impl Outputs {
    /// Start before the first event is published, or it is missed. Needs a
    /// tokio runtime around it.
    pub fn start(bus: &Arc<Bus>, args: &RunArgs, policy: Option<PolicyLink>) -> anyhow::Result<Outputs> {
        let mut outputs =
            Outputs { feed: None, threads: Vec::new(), printer: None, metrics: Measuring::start(bus, args)? };
        if let Some(path) = &args.events {
            let rotation = Rotation { max_bytes: args.events_max_bytes, keep: args.events_keep };
            let file = LineFile::open(path, rotation)
                .with_context(|| format!("--events: cannot write to {}", path.display()))?;
            let subscriber = bus.subscribe("file", DISK_BACKLOG)?;
            outputs.threads.push(ndjson::spawn(subscriber, file, Handle::current())?);
        }
        let subscriber = bus.subscribe("collector", feed::BACKLOG)?;
        let left = keep_ledger(bus, &args.state_dir)?;
        if !args.collector.is_empty() {
            let spool = feed::SpoolSettings {
                dir: args.spool.clone().unwrap_or_else(|| args.state_dir.join("spool")),
                limits: feed::spool::Limits { bytes: args.spool_bytes },
            };
            let settings = feed::Settings::default();
            let tls = args.tls.open()?;
            let target =
                |address: &String| feed::Target::new(address, tls.clone(), args.tls.insecure_plaintext);
            let targets = args.collector.iter().map(target).collect::<Result<Vec<_>, _>>()?;
            let used = targets.iter().find_map(feed::Target::tls);
            if let (Some(measuring), Some(tls)) = (&outputs.metrics, used) {
                measuring.metrics.certificate(tls.clone());
            }
            let collectors = Collectors { targets, policy };
            outputs.feed =
                Some(feed::spawn(bus.clone(), subscriber, collectors, &spool, settings, left.as_ref())?);
            return Ok(outputs);
        }
        let dir = args.state_dir.join("events");
        let store = Store::open(&dir, LOCAL)?;
        let view = match Style::of_terminal() {
            None => None,
            Some(style) => {
                let (view, printer) = View::spawn(style, std::io::stdout())?;
                outputs.printer = Some(printer);
                Some(view)
            }
        };
        outputs.threads.push(spawn_local(
            bus.clone(),
            subscriber,
            store,
            view,
            left.as_ref(),
            Handle::current(),
        )?);
        Ok(outputs)
    }

    /// Answers `/healthz` and `/readyz` beside the metrics, and shows these with
    /// them.
    pub fn told(&self, health: Health, present: impl Fn() -> Vec<Family> + Send + Sync + 'static) {
        if let Some(measuring) = &self.metrics {
            measuring.metrics.healthy(health);
            measuring.metrics.present(present);
        }
    }

    /// For `status`; `None`: the collector is in this process.
    pub fn feed_state(&self) -> Option<pb::FeedState> {
        self.feed.as_ref().map(|(feed, _)| feed.state())
    }

    /// The part that answers [`Outputs::feed_state`], for whoever outlives this.
    pub fn feed(&self) -> Option<Feed> {
        self.feed.as_ref().map(|(feed, _)| feed.clone())
    }

    /// After [`Bus::close`]: until everything is written and acknowledged, or
    /// the time for it is over.
    pub async fn finish(self) {
        if let Some((_, task)) = self.feed {
            let _ = task.await;
        }
        if let Some(metrics) = self.metrics {
            metrics.finish().await;
        }
        let mut written = joined(self.threads, END).await;
        if let Some(printer) = &self.printer {
            written &= printer.finish(END);
        }
        if !written {
            tracing::error!("events were not written: the disk or the terminal does not take them");
        }
    }
}

/// From here on a `kill -9` leaves behind how many events went with it. What the
/// last run left.
fn keep_ledger(bus: &Arc<Bus>, state_dir: &Path) -> anyhow::Result<Option<Unsafe>> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(state_dir)?;
    let path = state_dir.join("ledger");
    let (ledger, left) =
        Ledger::begin(&path, bus.identity()).with_context(|| format!("cannot write {}", path.display()))?;
    bus.keep(Arc::new(ledger));
    if let Some(left) = &left {
        let events = left.last_seq - left.first_seq + 1;
        tracing::warn!(boot = %left.identity.boot, events, "the last run was killed before these were on disk");
    }
    Ok(left)
}

/// Waits for threads that end by themselves; true: all of them have. No task of
/// the runtime waits, or its own end would wait for a stalled disk too.
pub(crate) async fn joined(threads: Vec<JoinHandle<()>>, wait: Duration) -> bool {
    let (ended, end) = tokio::sync::oneshot::channel::<()>();
    let waiter = std::thread::Builder::new().name("end".to_owned()).spawn(move || {
        for thread in threads {
            let _ = thread.join();
        }
        drop(ended);
    });
    waiter.is_ok() && tokio::time::timeout(wait, end).await.is_ok()
}
