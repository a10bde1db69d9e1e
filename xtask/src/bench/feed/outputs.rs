//! How fast each output hands on a log that is there.

use std::{
    fmt::Write as _,
    fs::{self, File},
    net::TcpListener,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::{Folder, Process, cpu_seconds, fleet_program};
use crate::{
    bench::{flood::memory, report},
    setup,
    step::{self, Step},
};

const EVENTS: u64 = 200_000;
const ROUNDS: usize = 3;
/// For one output to hand on all of it.
const PATIENCE: Duration = Duration::from_secs(120);

pub(super) fn table() -> Result<String> {
    let step = Step::start("outputs");
    let folder = Folder::on_disk("outputs")?;
    let log = folder.join("log");
    fill(&folder, &log)?;
    let receivers = Receivers::start(&folder)?;
    let mut kinds = receivers.kinds();
    let mut figures: Vec<Vec<[f64; 3]>> = vec![Vec::new(); kinds.len()];
    for round in 0..ROUNDS {
        for (kind, figures) in kinds.iter_mut().zip(&mut figures) {
            step.detail(format!("round {}: {}", round + 1, kind.what));
            figures.push(hand_on(&folder, &log, kind, round).with_context(|| kind.what.clone())?);
        }
    }
    step.done();
    let mut text = format!(
        "\n### Outputs\n\nA log of {EVENTS} connections, handed on by one output alone, on loopback, to a receiver that \
         throws it away; medians of {ROUNDS} interleaved rounds. The collector's CPU, not the receiver's.\n\n\
         | output | events/s | CPU of the collector, an event | its memory |\n|---|---|---|---|\n"
    );
    for (kind, figures) in kinds.iter().zip(&figures) {
        let of =
            |n: usize| report::median(&figures.iter().map(|f| f[n]).collect::<Vec<_>>()).unwrap_or(f64::NAN);
        writeln!(text, "| {} | {:.0} | {:.1} µs | {:.0} MiB |", kind.what, of(0), of(1) * 1e6, of(2))?;
    }
    for missing in &receivers.missing {
        writeln!(text, "\n{missing}")?;
    }
    Ok(text)
}

struct Kind {
    what: String,
    /// The output in the file of outputs, without its name.
    yaml: String,
}

struct Receivers {
    otlp: Process,
    webhook: Process,
    tcp: Process,
    nats: Option<(Process, String)>,
    missing: Vec<String>,
    lines: String,
}

impl Receivers {
    fn start(folder: &Folder) -> Result<Receivers> {
        let (nats, missing) = match nats(folder) {
            Ok(nats) => (Some(nats), Vec::new()),
            Err(error) => (None, vec![format!("NATS was not measured: {error:#}.")]),
        };
        Ok(Receivers {
            otlp: Process::receiver(&folder.0, "otlp")?,
            webhook: Process::receiver(&folder.0, "webhook")?,
            tcp: Process::receiver(&folder.0, "tcp")?,
            nats,
            missing,
            lines: folder.join("lines").display().to_string(),
        })
    }

    fn kinds(&self) -> Vec<Kind> {
        let kind = |what: &str, yaml: String| Kind { what: what.to_owned(), yaml };
        let mut kinds = Vec::new();
        for format in ["native", "ocsf", "ecs"] {
            kinds.push(kind(
                &format!("files of lines, {format}"),
                format!("format: {format}, ndjson: {{path: {}-{format}-ROUND}}", self.lines),
            ));
        }
        kinds.push(kind(
            "syslog over TCP, ocsf",
            format!("format: ocsf, syslog: {{address: 'tcp://{}'}}", self.tcp.address),
        ));
        kinds.push(kind(
            "webhook, ocsf",
            format!("format: ocsf, webhook: {{url: 'http://{}/'}}", self.webhook.address),
        ));
        kinds.push(kind("OTLP, gzip", format!("otlp: {{endpoint: 'http://{}'}}", self.otlp.address)));
        kinds.push(kind(
            "OTLP, no compression",
            format!("otlp: {{endpoint: 'http://{}', compression: none}}", self.otlp.address),
        ));
        if let Some((_, address)) = &self.nats {
            // A window of its own for each round: what is sent again is stored once.
            kinds.push(kind(
                "NATS JetStream, native",
                format!(
                    "nats: {{servers: ['nats://{address}'], stream: ROUND, subject: bench.ROUND, create: {{}}}}"
                ),
            ));
        }
        kinds
    }
}

/// A log as a small fleet leaves it.
fn fill(folder: &Folder, log: &Path) -> Result<()> {
    let socket = format!("unix:{}", folder.join("c.sock").display());
    let collector = Process::collector(log, &["--no-ndjson", "--listen", &socket])?;
    let sensors = Folder::in_memory()?;
    let rate = EVENTS / 10;
    step::output(
        Command::new(fleet_program())
            .args(["feed", "--collector", &collector.address, "--dir"])
            .arg(&sensors.0)
            .args(["--sensors", "10", "--per-second", &rate.to_string(), "--seconds", "10"]),
    )?;
    Ok(())
}

/// Events a second, CPU seconds an event, MiB.
fn hand_on(folder: &Folder, log: &Path, kind: &Kind, round: usize) -> Result<[f64; 3]> {
    let name: String = kind.what.chars().filter(char::is_ascii_lowercase).take(20).collect();
    let name = format!("{name}-{round}");
    let file = folder.join("outputs.yaml");
    let yaml = kind.yaml.replace("ROUND", &name);
    fs::write(&file, format!("outputs:\n  - {{name: {name}, {yaml}}}\n"))?;
    let socket = format!("unix:{}", folder.join("c.sock").display());
    let file = file.to_str().context("a path of ours")?;
    let from = Instant::now();
    let collector = Process::collector(log, &["--no-ndjson", "--listen", &socket, "--outputs", file])?;
    loop {
        let fleet = collector.fleet(&[])?;
        let output = fleet["outputs"]
            .as_array()
            .and_then(|all| all.iter().find(|o| o["name"] == name.as_str()))
            .context("the output is not there")?;
        let (delivered, lag) = (output["delivered"].as_u64().unwrap_or(0), output["lag"].as_u64());
        if lag == Some(0) && delivered > 0 {
            let took = from.elapsed().as_secs_f64();
            if output["lost"] != 0 {
                bail!("the output lost events: {output}");
            }
            let cpu = cpu_seconds(collector.pid())?;
            let memory = memory(collector.pid(), "VmHWM")?;
            return Ok([delivered as f64 / took, cpu / delivered as f64, memory]);
        }
        if from.elapsed() > PATIENCE {
            bail!("not handed on: {output}");
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// With its stream on disk, as it comes.
fn nats(folder: &Folder) -> Result<(Process, String)> {
    let program =
        ["/usr/sbin/nats-server", "/usr/bin/nats-server"].into_iter().find(|p| Path::new(p).is_file());
    let program = program.with_context(|| {
        if setup::on_path("apt-get") { "apt-get install nats-server" } else { "nats-server is not installed" }
    })?;
    let free = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let log = folder.join("nats.said");
    let mut command = Command::new(program);
    command.args(["--addr", "127.0.0.1", "--port", &free.port().to_string(), "--jetstream", "--store_dir"]);
    command.arg(folder.join("nats")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?);
    let child = command.spawn()?;
    let process = Process { child, address: free.to_string() };
    let end = Instant::now() + Duration::from_secs(10);
    while std::net::TcpStream::connect(free).is_err() {
        if Instant::now() > end {
            bail!("nats-server does not listen: {}", fs::read_to_string(&log)?);
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok((process, free.to_string()))
}
