//! What `cargo xtask bench names` measures: look-ups and HTTPS requests of a
//! server that is held to names, beside the same without a label and beside a
//! proxy that does the same job. `names report` prints a section of
//! docs/figures.md; `names client` is what it starts in between.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use mcp_sensor_tests::{
    cgroup::Subtree,
    dns::{
        message::{A, Message, all_addresses},
        server::DnsServer,
        zone::Zone,
    },
    names::{API, NAMED, RESOLVER, ip},
    network::{Network, enter},
    policy::Policy,
    run::Running,
    sensor::{Sensor, binary},
    tls::{Groups, PORT, TlsServer},
};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore,
    client::Resumption,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Measures everything, prints Markdown
    Report {
        #[arg(long, default_value_t = 7)]
        rounds: usize,
    },
    /// Prints nanoseconds, one line for each call
    Client {
        task: Task,
        #[arg(long)]
        count: usize,
        #[arg(long)]
        ca: PathBuf,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Task {
    LookUp,
    /// Connect and handshake, to an address that is known
    Connect,
    /// Look-up, connect, handshake, request
    First,
    /// Requests over one connection
    Reused,
    /// By the proxy: connect, CONNECT, handshake, request
    FirstProxied,
    ReusedProxied,
}

const PROXY: &str = "127.0.0.1:3128";
const LIMIT: Duration = Duration::from_secs(60);
/// Discarded at the start of each run.
const WARM_UP: usize = 20;

fn main() -> ExitCode {
    let done = match Arguments::parse().role {
        Role::Report { rounds } => report(rounds).map(|text| print!("{text}")),
        Role::Client { task, count, ca } => client(task, count, &ca),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("names: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Client: one task, over and over.
fn client(task: Task, count: usize, ca: &Path) -> Result<()> {
    let tls = tls_config(ca)?;
    let known = look_up()?;
    let mut reused = match task {
        Task::Reused => Some(Session::open(TcpStream::connect(known)?, &tls)?),
        Task::ReusedProxied => Some(Session::open(proxied()?, &tls)?),
        _ => None,
    };
    let mut times = Vec::with_capacity(count);
    for _ in 0..count + WARM_UP {
        let since = Instant::now();
        match task {
            Task::LookUp => drop(look_up()?),
            Task::Connect => drop(Session::open(TcpStream::connect(known)?, &tls)?),
            Task::First => Session::open(TcpStream::connect(look_up()?)?, &tls)?.request()?,
            Task::FirstProxied => Session::open(proxied()?, &tls)?.request()?,
            Task::Reused | Task::ReusedProxied => reused.as_mut().context("no session")?.request()?,
        }
        times.push(since.elapsed().as_nanos());
    }
    let text: String = times[WARM_UP..].iter().map(|t| format!("{t}\n")).collect();
    print!("{text}");
    Ok(())
}

fn tls_config(ca: &Path) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca)?)?;
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    // Every handshake is a full one.
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// A socket for each question, as resolvers in C libraries have.
fn look_up() -> Result<SocketAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(RESOLVER)?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    socket.send(&Message::query(socket.local_addr()?.port(), API, A).to_bytes())?;
    let mut bytes = [0; 1500];
    let n = socket.recv(&mut bytes)?;
    let address = *all_addresses(&bytes[..n]).first().context("no address")?;
    Ok((address, PORT).into())
}

/// RFC 9110, 9.3.6.
fn proxied() -> Result<TcpStream> {
    let mut stream = TcpStream::connect(PROXY)?;
    write!(stream, "CONNECT {API}:{PORT} HTTP/1.1\r\nHost: {API}:{PORT}\r\n\r\n")?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
        ensure!(head.len() < 8192, "the proxy says too much");
    }
    ensure!(head.starts_with(b"HTTP/1.1 200"), "the proxy says {}", String::from_utf8_lossy(&head));
    Ok(stream)
}

struct Session {
    tls: rustls::StreamOwned<ClientConnection, TcpStream>,
}

impl Session {
    fn open(mut stream: TcpStream, config: &Arc<ClientConfig>) -> Result<Session> {
        stream.set_nodelay(true)?;
        let mut connection = ClientConnection::new(config.clone(), ServerName::try_from(API)?)?;
        while connection.is_handshaking() {
            connection.complete_io(&mut stream)?;
        }
        Ok(Session { tls: rustls::StreamOwned::new(connection, stream) })
    }

    fn request(&mut self) -> Result<()> {
        self.tls.write_all(format!("GET / HTTP/1.1\r\nHost: {API}\r\n\r\n").as_bytes())?;
        let mut page = [0; 2048];
        let n = self.tls.read(&mut page)?;
        ensure!(page[..n].starts_with(b"HTTP/1.1 200"), "no page");
        Ok(())
    }
}

/// Who runs the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Setting {
    /// Below the sensor's cgroup, without a label.
    Unlabelled,
    Labelled,
    /// Outside the sensor's cgroup.
    Apart,
}

struct Bed {
    sensor: Sensor,
    ca: PathBuf,
    _https: TlsServer,
    _resolver: DnsServer,
    cgroup: Subtree,
    network: Network,
    folder: tempfile::TempDir,
}

impl Bed {
    /// `more`: names that the profile has beside the one.
    fn new(more: usize) -> Result<Bed> {
        let network = Network::with_public_addresses(&[])?;
        let folder = tempfile::Builder::new().prefix("mcp-sensor-names-").tempdir()?;
        let zone = Zone::new().host(API, &[ip("198.51.100.7")]);
        let resolver = DnsServer::start(&network, &[RESOLVER.ip()], zone)?;
        let https = TlsServer::start(&network, folder.path(), &[API], PORT, Groups::Usual)?;
        let cgroup = Subtree::new()?;
        let names: String = (0..more).map(|n| format!("h{n}.many.example.test, ")).collect::<String>() + API;
        let policy = Policy::default()
            .top(&format!("resolvers: [{}]", RESOLVER.ip()))
            .profile(NAMED, &format!("egress: [{{to: [{names}], ports: [{PORT}]}}]"))
            .server(NAMED, NAMED, "enforce", "");
        let sensor = Sensor::start_on(cgroup.path(), &policy, &[])?;
        let ca = https.ca.clone();
        Ok(Bed { sensor, ca, _https: https, _resolver: resolver, cgroup, network, folder })
    }

    /// Nanoseconds of each call.
    fn run(&self, task: Task, setting: Setting, count: usize) -> Result<Vec<f64>> {
        let this = std::env::current_exe()?;
        let mut command = if setting == Setting::Labelled {
            let mut command = Command::new(binary()?);
            command.arg("exec").arg("--control").arg(self.sensor.control_path());
            command.args(["--server", NAMED, "--"]).arg(this);
            command
        } else {
            Command::new(this)
        };
        let name = task.to_possible_value().context("a task without a name")?;
        command.args(["client", name.get_name(), "--count", &count.to_string(), "--ca"]).arg(&self.ca);
        let cgroup = if setting == Setting::Apart { None } else { Some(self.cgroup.entrance()?) };
        enter(&mut command, self.network.server.try_clone()?, cgroup);
        let done = Running::start(command)?.finish(LIMIT)?;
        let mut times: Vec<f64> = done.lines.iter().filter_map(|l| l.parse().ok()).collect();
        ensure!(times.len() == count, "{task:?}, {setting:?}: {}", done.stderr);
        times.sort_by(f64::total_cmp);
        Ok(times)
    }

    /// On the host's side of the wire, as container tools place it.
    fn proxy(&self) -> Result<Running> {
        // Squid gives up root by itself, and then must still write here.
        let folder = self.folder.path();
        let settings = format!(
            "http_port {PROXY}\nacl names dstdomain {API}\nacl tls port {PORT}\nacl CONNECT method CONNECT\n\
             http_access allow CONNECT names tls\nhttp_access deny all\ndns_nameservers {}\n\
             cache deny all\naccess_log none\ncache_log /dev/null\ncache_store_log none\npid_filename none\n\
             shutdown_lifetime 0 seconds\ncoredump_dir {}\nnetdb_filename none\n",
            RESOLVER.ip(),
            folder.display()
        );
        let file = folder.join("squid.conf");
        fs::write(&file, settings)?;
        fs::set_permissions(folder, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let mut command = Command::new("squid");
        command.arg("-N").arg("-f").arg(&file);
        enter(&mut command, self.network.server.try_clone()?, None);
        let mut running = Running::start(command)?;
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.network.server.within(|| Ok(TcpStream::connect(PROXY)?)).is_err() {
            if running.is_over()? || Instant::now() > deadline {
                bail!("squid does not start: {:#}", running.line(Duration::from_secs(1)).unwrap_err());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(running)
    }
}

/// Of one run: requests in a second, and nanoseconds.
#[derive(Clone, Copy)]
struct Figure {
    rate: f64,
    p50: f64,
    p99: f64,
}

impl Figure {
    fn of(sorted: &[f64]) -> Figure {
        let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share) as usize];
        Figure { rate: sorted.len() as f64 * 1e9 / sorted.iter().sum::<f64>(), p50: at(0.5), p99: at(0.99) }
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Names of a large profile.
const MANY: usize = 10_000;

/// Calls of one run.
const fn count(task: Task) -> usize {
    match task {
        Task::LookUp | Task::Reused | Task::ReusedProxied => 2000,
        _ => 300,
    }
}

const RUNS: [(Task, Setting); 8] = [
    (Task::LookUp, Setting::Unlabelled),
    (Task::LookUp, Setting::Labelled),
    (Task::Connect, Setting::Unlabelled),
    (Task::Connect, Setting::Labelled),
    (Task::First, Setting::Labelled),
    (Task::FirstProxied, Setting::Apart),
    (Task::Reused, Setting::Labelled),
    (Task::ReusedProxied, Setting::Apart),
];

fn report(rounds: usize) -> Result<String> {
    let bed = Bed::new(0)?;
    let many = Bed::new(MANY)?;
    let proxy = bed.proxy();
    let mut with_many = Vec::new();
    let mut figures: Vec<Vec<Figure>> = vec![Vec::new(); RUNS.len()];
    for round in 0..rounds {
        // There and back again: a drift of the machine falls on all alike.
        let order: Vec<usize> =
            if round % 2 == 0 { (0..RUNS.len()).collect() } else { (0..RUNS.len()).rev().collect() };
        with_many.push(Figure::of(&many.run(Task::LookUp, Setting::Labelled, count(Task::LookUp))?));
        for at in order {
            let (task, setting) = RUNS[at];
            if setting == Setting::Apart && proxy.is_err() {
                continue;
            }
            figures[at].push(Figure::of(&bed.run(task, setting, count(task))?));
        }
    }
    let mut text = budgets(&figures, &with_many, rounds);
    match &proxy {
        Ok(_) => text += &comparison(&figures),
        Err(error) => text += &format!("\nNot compared with a proxy: {error:#}.\n"),
    }
    Ok(text)
}

/// Of the same round: `of` the figure of one run and that of another.
fn paired(figures: &[Vec<Figure>], a: usize, b: usize, of: impl Fn(Figure, Figure) -> f64) -> f64 {
    median(figures[a].iter().zip(&figures[b]).map(|(a, b)| of(*a, *b)))
}

fn budgets(figures: &[Vec<Figure>], with_many: &[Figure], rounds: usize) -> String {
    let added = paired(figures, 1, 0, |a, b| (a.p50 - b.p50) / 1000.0);
    let more = paired(figures, 3, 2, |a, b| a.p50 / b.p50 - 1.0) * 100.0;
    let flat = median(with_many.iter().zip(&figures[1]).map(|(a, b)| (a.p50 - b.p50) / 1000.0));
    let said = |ok: bool| if ok { "ok" } else { "**missed**" };
    format!(
        "Medians of {rounds} interleaved rounds; look-up and TLS connect at p50, over a pair of \
         namespaces on this machine.\n\n\
         | what | budget | measured | |\n|---|---|---|---|\n\
         | look-up, labelled, over unlabelled | ≤ +10 µs | {added:+.1} µs | {} |\n\
         | look-up, labelled, with 10,000 name rules over one | flat: ≤ +1 µs | {flat:+.1} µs | {} |\n\
         | TLS connect, labelled, over unlabelled | ≤ +5 % | {more:+.1} % | {} |\n",
        said(added <= 10.0),
        said(flat <= 1.0),
        said(more <= 5.0)
    )
}

/// A row of the comparison: its unit, a run's figure, and how it is written.
type Row = (&'static str, fn(&Figure) -> f64, fn(f64) -> String);

/// The proxy's figures beside those of a labelled server without one.
fn comparison(figures: &[Vec<Figure>]) -> String {
    const ROWS: [Row; 3] = [
        ("requests/s", |f| f.rate, |v| format!("{v:.0}")),
        ("p50", |f| f.p50, |v| format!("{:.0} µs", v / 1000.0)),
        ("p99", |f| f.p99, |v| format!("{:.0} µs", v / 1000.0)),
    ];
    let mut text = String::from(
        "\n| HTTPS requests | sensor, labelled | Squid, CONNECT | Squid to sensor |\n|---|---|---|---|\n",
    );
    for (what, direct, proxied) in [("first of a connection", 4, 5), ("of a connection in use", 6, 7)] {
        for (unit, of, shown) in ROWS {
            let middle = |at: usize| shown(median(figures[at].iter().map(of)));
            let ratio = paired(figures, proxied, direct, |a, b| of(&a) / of(&b));
            text += &format!("| {what}, {unit} | {} | {} | {ratio:.2} |\n", middle(direct), middle(proxied));
        }
    }
    text + "\nOne client, short pages. The first request without a proxy includes the look-up; Squid asks \
            the same resolver and keeps the answer.\n"
}
