//! The agent: `mcp-sensor run`. Loads the programs, keeps the policy in force,
//! ties records to servers, clients and users, and passes events on.

mod adopt;
mod away;
mod bundles;
pub mod canary;
mod containment;
mod content;
mod core;
mod discovery;
mod exchange;
mod gauges;
mod health;
mod http;
pub mod identity;
pub mod instances;
mod listener;
mod live;
mod names;
mod places;
pub mod printed;
mod process;
pub mod program;
mod reader;
mod reload;
mod repeats;
mod reset;
mod service;
mod session;
mod state;
mod stdio;
pub mod translate;
mod watch;
mod wires;

use self::bundles::Bundles;
use self::core::{Core, lock};
use self::identity::Identities;
use self::reload::Reloader;
use self::service::Service;
use self::watch::Watch;
use crate::cli::RunArgs;
use crate::cli::{Exit, Failure};
use crate::control::{self, ControlSocket};
use crate::event::{Body, Bus, Identity, Limits, now, pb};
use crate::kernel::pins::{Pins, PinsError};
use crate::kernel::{self, LoadError, Options};
use crate::mcp::inventory;
use crate::outputs::Outputs;
use crate::policy::load::LoadError as PolicyError;
use crate::supervisor;
use anyhow::Context as _;
use sensor_common::record::Loss;
use sensor_common::socket::Tuple;
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::io::{IsTerminal as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

/// How often the kernel's counters are read.
const COUNTERS: Duration = Duration::from_secs(2);
const HEARTBEAT: Duration = Duration::from_secs(60);
/// How long packet hooks of an earlier version stay for sockets that no
/// descriptor led to when it was taken over from: longer than TCP gives up.
const LINGER: Duration = Duration::from_secs(3600);
/// How often what servers listed is written, if there is anything new.
const INVENTORY: Duration = Duration::from_secs(10);

pub fn run(args: RunArgs) -> anyhow::Result<ExitCode> {
    crate::panics::end_the_process();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(serve(args))
}

/// Where this sensor's maps and links are pinned: bpffs knows no dots, and two
/// sensors with two state directories do not meet.
pub fn pin_directory(state_dir: &Path) -> PathBuf {
    let path = fs::canonicalize(state_dir).unwrap_or_else(|_| state_dir.to_owned());
    let name = hex::encode(&Sha256::digest(path.as_os_str().as_bytes())[..8]);
    kernel::pins::all().join(name)
}

fn label_capacity(wanted: Option<u32>) -> u32 {
    wanted.unwrap_or_else(|| {
        fs::read_to_string("/proc/sys/kernel/pid_max")
            .ok()
            .and_then(|t| t.trim().parse().ok())
            .unwrap_or(sensor_common::kernel::PID_LIMIT)
    })
}

fn sensor_name(wanted: Option<String>) -> String {
    wanted.unwrap_or_else(|| {
        let machine = fs::read_to_string("/etc/machine-id").unwrap_or_default();
        match machine.trim() {
            "" => service::host_name(),
            // The id itself is confidential (machine-id(5)).
            id => hex::encode(&Sha256::digest(format!("mcp-sensor:{id}").as_bytes())[..16]),
        }
    })
}

/// What ids, URIs and secrets are hashed under, so that hashes of two hosts
/// cannot be compared and short values not be guessed; kept over restarts.
fn hash_key(path: &Path) -> anyhow::Result<[u8; 32]> {
    use std::os::unix::fs::OpenOptionsExt as _;
    match fs::read(path) {
        Ok(bytes) => {
            if let Ok(key) = bytes.try_into() {
                return Ok(key);
            }
            warn!(path = %path.display(), "not 32 bytes: hashes from now on differ from those before");
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    }
    let mut key = [0; 32];
    std::io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut key)?;
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(&key).with_context(|| path.display().to_string())?;
    Ok(key)
}

async fn serve(args: RunArgs) -> anyhow::Result<ExitCode> {
    let started = now();
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&args.state_dir)
        .map_err(|e| Failure::new(Exit::Failure, format!("{}: {e}", args.state_dir.display())))?;
    kernel::load::ensure_bpffs().map_err(|e| Failure::new(Exit::Prerequisite, e.to_string()))?;
    let pin_dir = pin_directory(&args.state_dir);
    let pins = Pins::take(&pin_dir).map_err(|e| match e {
        PinsError::Held(_) => Failure::new(
            Exit::Failure,
            format!("a sensor with the state directory {} runs already", args.state_dir.display()),
        )
        .hint("stop it first, or give this one another --state-dir"),
        PinsError::Io { .. } => Failure::new(Exit::Prerequisite, e.to_string()).hint("run as root"),
    })?;
    let ids_file = args.state_dir.join("servers.json");
    let before = pins.current()?.is_some();
    let (mut ids, names) = reload::known_ids(&ids_file, before).map_err(|error| {
        Failure::new(Exit::Failure, format!("{}: {error}", ids_file.display())).hint(format!(
            "it names the servers whose labels are in the kernel; bring it back, or let go of what is enforced: \
             mcp-sensor release --state-dir {}",
            args.state_dir.display()
        ))
    })?;
    let bundles = Bundles::open(&args)?;
    let (loaded, absent) = reload::first(&args.policy, bundles.as_ref(), &mut ids).map_err(|error| {
        let text = match &error {
            PolicyError::Read { .. } => error.to_string(),
            PolicyError::Invalid { .. } => error.render(std::io::stderr().is_terminal()),
        };
        Failure::new(Exit::PolicyInvalid, text)
            .hint("nothing was changed; `mcp-sensor policy check` shows the same")
    })?;
    let cgroup = match &args.cgroup {
        Some(path) => path.clone(),
        None => kernel::cgroup::root().map_err(|e| Failure::new(Exit::Prerequisite, e.to_string()))?,
    };

    let identity =
        Identity { sensor: sensor_name(args.sensor.clone()), boot: format!("{:x}", started / 1_000_000) };
    let bus = Bus::new(identity, Limits::default());
    let (link, offered) = bundles.as_ref().map(Bundles::link).unzip();
    let outputs = Outputs::start(&bus, &args, link)?;

    // The socket before the kernel: a second sensor ends here.
    let socket = ControlSocket::bind(&args.control, args.control_group.as_deref())
        .map_err(|e| Failure::new(Exit::Failure, e.to_string()))?;
    let options = Options {
        cgroup: cgroup.clone(),
        pins,
        label_capacity: label_capacity(args.label_capacity),
        allow_degraded: args.allow_degraded,
        capture: args.capture,
        stdio_ring: args.stdio_ring << 20,
    };
    let loaded_kernel = kernel::load(options).map_err(|e| {
        let exit = if matches!(e, LoadError::Cgroup { .. }) { Exit::Failure } else { Exit::Prerequisite };
        Failure::new(exit, e.to_string()).hint("`mcp-sensor doctor` shows what this host lacks")
    })?;
    let degraded = service::degraded(&loaded_kernel.hooks);
    if args.strict && !degraded.is_empty() {
        let adopted = loaded_kernel.adopted;
        if !adopted {
            loaded_kernel.attached.release().ok();
        }
        return Err(Failure::new(Exit::Prerequisite, format!("--strict: {}", degraded.join("; "))).into());
    }
    for sentence in &degraded {
        warn!("{sentence}");
    }
    let hooks: Vec<pb::Hook> = loaded_kernel.hooks.iter().map(service::hook).collect();
    if let Err(error) = &loaded_kernel.identifier {
        warn!(%error, "no file can be verified: rules with `sha256` hold their servers to `unknown` as well");
    }
    let (identities, jobs) = Identities::new(loaded_kernel.identifier);
    let inventory_file = args.state_dir.join("inventory.json");
    let (inventory, damage) = inventory::load(&inventory_file);
    let (resets, to_reset) = reset::Resets::new();
    let keys = session::Keys::new(&hash_key(&args.state_dir.join("hash.key"))?);
    let reads_stdio = loaded_kernel.capture.is_ok();
    let kernel::maps::Rings { verdicts, telemetry, stdio } = loaded_kernel.rings;
    let rings = reader::Rings { verdicts, telemetry };
    let (stdio, wires) = {
        let linger = Duration::from_secs(args.stdio_linger.into());
        stdio::prepare(stdio, loaded_kernel.wires, loaded_kernel.capture, keys, linger)?
    };
    let core = Arc::new(Core::new(
        bus.clone(),
        loaded_kernel.maps,
        loaded_kernel.labels,
        loaded_kernel.names,
        resets,
        identities,
        stdio,
        inventory,
    ));
    if let Some(damage) = damage {
        warn!(%damage, "what servers listed before is not known: their next lists are taken as the first");
        bus.publish_now(Body::Finding(inventory_lost(&damage)));
    }
    identity::start(core.clone(), jobs)?;
    let reloader =
        Arc::new(Reloader::new(core.clone(), args.policy.clone(), ids_file, ids, names, (bundles, absent)));
    reloader.start(loaded).map_err(|e| Failure::new(Exit::Failure, e))?;
    let adopted = loaded_kernel.adopted;
    if adopted {
        info!("took over from an earlier agent");
        core.recover();
    }
    core.adopt_running();
    let away = {
        let policies = lock(&core.policies);
        let mut maps = lock(&core.maps);
        let told = if adopted { away::told(&maps, &policies) } else { None };
        away::seen(&mut maps, &policies);
        told
    };

    let health: std::cell::OnceCell<crate::health::Health> = std::cell::OnceCell::new();
    let state = |phase: pb::SensorPhase| {
        let current = core.in_force();
        let bundle = current.as_ref().and_then(|p| p.loaded.bundle.clone());
        let mut state = pb::SensorState {
            bundle_version: bundle.as_ref().map_or(0, |b| b.version),
            bundle: bundle.map(|b| b.hash.clone()).unwrap_or_default(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: service::kernel_release(),
            host: service::host_name(),
            hooks: hooks.iter().cloned().chain([service::stdio_hook(&core.stdio.shown())]).collect(),
            degraded: degraded.clone(),
            policy: current.as_ref().map(|p| p.hash.clone()).unwrap_or_default(),
            generation: current.as_ref().map_or(0, |p| p.generation.into()),
            losses: core.lost(),
            ..Default::default()
        };
        (state.enforced, state.audited) = core.modes();
        if let Some(health) = health.get() {
            state.not_ready = health.borrow().reasons().map(str::to_owned).collect();
        }
        let proof = lock(&core.proof);
        (state.proven_unix_ns, state.proven_namespaces) = (proof.proven_unix_ns, proof.namespaces);
        drop(proof);
        if phase == pb::SensorPhase::Started {
            state.away = away.clone();
        }
        state.set_phase(phase);
        Body::SensorState(state)
    };
    let canary = {
        let (core, cgroup) = (core.clone(), cgroup.clone());
        move |round| canary::round(&core, &cgroup, round)
    };
    if args.canary_interval > 0 {
        let canary = canary.clone();
        tokio::task::spawn_blocking(move || canary(0)).await?;
    }
    bus.publish_now(state(pb::SensorPhase::Started));

    let stop = Arc::new(AtomicBool::new(false));
    let reader = {
        let (core, stop, rings) = (core.clone(), stop.clone(), rings);
        std::thread::Builder::new()
            .name("rings".to_owned())
            .spawn(move || reader::run(&core, rings, &stop))?
    };
    core.look_for_candidates(reads_stdio);
    let speakers = {
        let (core, stop) = (core.clone(), stop.clone());
        std::thread::Builder::new().name("stdio".to_owned()).spawn(move || wires.run(&core, &stop))?
    };
    {
        let (core, cgroup) = (core.clone(), cgroup.clone());
        tokio::task::spawn_blocking(move || discovery::find_running(&core, &cgroup)).await?;
    }
    {
        // Ends with the process: it may wait for a socket.
        let core = Arc::downgrade(&core);
        std::thread::Builder::new().name("resets".to_owned()).spawn(move || reset::run(&core, &to_reset))?;
    }
    let checks = health::Checks::new(core.clone(), loaded_kernel.links, &loaded_kernel.hooks);
    let _ = health.set(checks.health());
    let sources = gauges::Sources {
        core: core.clone(),
        reloader: reloader.clone(),
        gauges: loaded_kernel.gauges,
        feed: outputs.feed(),
        health: checks.health(),
        degraded: degraded.len(),
    };
    outputs.told(checks.health(), move || sources.look().families());
    let agent = Arc::new(Service {
        health: checks.health(),
        core: core.clone(),
        reloader: reloader.clone(),
        hooks: hooks.clone(),
        degraded: degraded.clone(),
        cgroup: cgroup.display().to_string(),
        started,
        feed: outputs.feed(),
    });
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let control = tokio::spawn(control::serve(socket, agent, control::Limits::default(), async move {
        let _ = ended.await;
    }));

    println!("ready");
    std::io::stdout().flush()?;
    supervisor::ready(&work(&core));

    let trying = tokio::spawn(async move {
        let interval = Duration::from_secs(args.canary_interval.into());
        let mut rounds = 1;
        while !interval.is_zero() {
            tokio::time::sleep(interval).await;
            let canary = canary.clone();
            let _ = tokio::task::spawn_blocking(move || canary(rounds)).await;
            rounds += 1;
        }
    });
    let heartbeat = || bus.publish_now(state(pb::SensorPhase::Heartbeat));
    events_loop(&core, &reloader, &inventory_file, offered, checks, heartbeat, &loaded_kernel.attached)
        .await?;

    trying.abort();
    supervisor::stopping();
    bus.publish_now(state(pb::SensorPhase::Stopping));
    let _ = end.send(());
    let _ = control.await;
    core.look_for_candidates(false);
    if args.release_on_exit {
        loaded_kernel.attached.release().context("cannot take the programs out of the kernel")?;
    } else {
        info!("what is enforced stays in force; `mcp-sensor release` lets go of it");
    }
    stop.store(true, Ordering::Release);
    let _ = reader.join();
    let _ = speakers.join();
    counters(&core, &mut Default::default());
    save_inventory(&core, &inventory_file);
    bus.close();
    outputs.finish().await;
    Ok(ExitCode::SUCCESS)
}

/// One line for the service manager.
fn work(core: &Core) -> String {
    let hash = core.in_force().map(|policy| policy.hash.clone()).unwrap_or_default();
    format!("policy {hash:.12} is in force")
}

/// Until SIGTERM or SIGINT.
async fn events_loop(
    core: &Arc<Core>,
    reloader: &Arc<Reloader>,
    inventory_file: &Path,
    mut offered: Option<tokio::sync::watch::Receiver<Vec<u8>>>,
    checks: health::Checks,
    heartbeat: impl Fn() -> u64,
    attached: &kernel::Attached,
) -> anyhow::Result<()> {
    let (health, checks) = (checks.health(), Arc::new(checks));
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut files = reloader.files();
    let mut watch = watching(&files);
    let mut counting = tokio::time::interval(COUNTERS);
    let mut saving = tokio::time::interval(INVENTORY);
    let mut beating = tokio::time::interval(HEARTBEAT);
    beating.reset();
    let mut lingering = tokio::time::interval(LINGER);
    lingering.reset();
    let counted = Arc::new(std::sync::Mutex::new(Counted::default()));
    loop {
        let changed = async {
            let seen = match &mut watch {
                Some(watch) => watch.changed().await,
                None => false,
            };
            if !seen {
                std::future::pending::<()>().await;
            }
        };
        let offer = async {
            if let Some(offered) = &mut offered
                && offered.changed().await.is_ok()
            {
                return offered.borrow_and_update().clone();
            }
            std::future::pending().await
        };
        tokio::select! {
            bytes = offer => {
                offered_bundle(core, reloader, bytes).await;
                (files, watch) = watched_again(reloader, files, watch);
            }
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = hangup.recv() => {
                let _reloading = supervisor::reloading();
                reload(core, reloader, "signal").await;
            }
            () = changed => {
                reload(core, reloader, "file").await;
                (files, watch) = watched_again(reloader, files, watch);
            }
            _ = beating.tick() => { heartbeat(); }
            _ = lingering.tick() => match attached.end_lingering() {
                Ok(true) => info!("the packet hooks of the version before are gone"),
                Ok(false) => {}
                Err(error) => warn!(%error, "the packet hooks of the version before stay"),
            },
            _ = counting.tick() => {
                let looking = {
                    let (core, counted, checks) = (core.clone(), counted.clone(), checks.clone());
                    tokio::task::spawn_blocking(move || {
                        counters(&core, &mut lock(&counted));
                        checks.look();
                    })
                };
                let _ = looking.await;
                supervisor::alive(&health.borrow(), &work(core));
            }
            _ = saving.tick() => {
                let (core, file) = (core.clone(), inventory_file.to_owned());
                let _ = tokio::task::spawn_blocking(move || save_inventory(&core, &file)).await;
            }
        }
    }
}

/// Another policy may refer to other files.
fn watched_again(
    reloader: &Reloader,
    files: BTreeSet<PathBuf>,
    watch: Option<Watch>,
) -> (BTreeSet<PathBuf>, Option<Watch>) {
    let now = reloader.files();
    if now == files { (files, watch) } else { (now.clone(), watching(&now)) }
}

fn watching(files: &BTreeSet<PathBuf>) -> Option<Watch> {
    Watch::new(files)
        .inspect_err(|error| warn!(%error, "the policy file is not watched; SIGHUP still reads it again"))
        .ok()
}

async fn reload(core: &Arc<Core>, reloader: &Arc<Reloader>, trigger: &'static str) {
    let (core, reloader) = (core.clone(), reloader.clone());
    let _ = tokio::task::spawn_blocking(move || {
        if reloader.reload(trigger).is_ok_and(|r| r.changed) {
            core.adopt_running();
        }
    })
    .await;
}

async fn offered_bundle(core: &Arc<Core>, reloader: &Arc<Reloader>, bytes: Vec<u8>) {
    let (core, reloader) = (core.clone(), reloader.clone());
    let _ = tokio::task::spawn_blocking(move || {
        if reloader.offer(&bytes) {
            core.adopt_running();
        }
    })
    .await;
}

/// What one look at the kernel's counters leaves for the next.
#[derive(Default)]
struct Counted {
    repeats: repeats::Repeats,
    queued: HashSet<Tuple>,
}

/// Repeats and losses, from the kernel's counters.
fn counters(core: &Core, counted: &mut Counted) {
    let (again, lost) = {
        let policies = lock(&core.policies);
        let mut maps = lock(&core.maps);
        away::seen(&mut maps, &policies);
        (counted.repeats.round(&mut maps), repeats::losses(&mut maps))
    };
    for (key, count) in again {
        core.repeat(&key, count);
    }
    for (reason, count) in lost {
        core.lose("kernel", reason.name(), count);
        if reason == Loss::LabelOverflow {
            core.bus.publish_now(Body::Finding(overflow(count)));
        }
    }
    let missed = core.resets.take_missed();
    if missed > 0 {
        core.lose("agent", "reset", missed);
    }
    core.adopt_sockets(&mut counted.queued);
}

fn save_inventory(core: &Core, file: &Path) {
    let Some(bytes) = lock(&core.inventory).unsaved() else { return };
    if let Err(error) = inventory::write(file, &bytes) {
        warn!(%error, file = %file.display(), "what servers listed is not on disk; the next try is in a moment");
        lock(&core.inventory).not_saved();
    }
}

fn inventory_lost(damage: &inventory::Damage) -> pb::Finding {
    let mut finding = pb::Finding {
        kind: "inventory_lost".to_owned(),
        detail: format!("{damage}; a change since the last session goes unnoticed once"),
        ..Default::default()
    };
    finding.set_severity(pb::Severity::Medium);
    finding
}

fn overflow(count: u64) -> pb::Finding {
    let mut finding = pb::Finding {
        kind: "label_overflow".to_owned(),
        detail: format!(
            "{count} labelled processes have numbers beyond the label map and are denied all IP; restart the sensor \
             with a --label-capacity of at least kernel.pid_max"
        ),
        ..Default::default()
    };
    finding.set_severity(pb::Severity::High);
    finding
}
