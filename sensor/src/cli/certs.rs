//! `mcp-sensor certs`: a small CA for a first fleet.

use super::output::{self, Table};
use super::{Exit, Failure, Output, OutputArgs};
use crate::event::json::Time;
use crate::event::text::escape;
use crate::tls::{Authority, AuthorityError, Certificate, Pair, San, Subject, Validity, read_pem};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const CA: &str = "ca.pem";
const CA_KEY: &str = "ca-key.pem";

/// Make certificates for sensors and collectors; show what one says.
///
/// Any CA does instead that issues certificates with one URI name: spiffe://DOMAIN/sensor/NAME
/// for a sensor, for clients; a collector's needs its DNS name or address, for servers.
#[derive(Debug, Subcommand)]
#[command(after_help = "Examples:
  mcp-sensor certs init
  mcp-sensor certs issue collector collector.example 10.0.0.5
  mcp-sensor certs issue sensor web-1
  mcp-sensor certs show certs/sensor-web-1.pem")]
pub enum CertsCommand {
    Init(InitArgs),
    #[command(subcommand)]
    Issue(IssueCommand),
    Show(ShowArgs),
}

#[derive(Args, Debug, Clone)]
pub struct DirArgs {
    /// Folder of the CA (ca.pem, ca-key.pem) and of what it issues.
    #[arg(long, env = "MCP_SENSOR_CERTS_DIR", value_name = "DIR", default_value = "certs")]
    pub dir: PathBuf,
}

/// Make a CA: ca.pem, which every host gets, and ca-key.pem, which none should.
///
/// A CA that is there already is never overwritten.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor certs init --dir /root/mcp-sensor-ca")]
pub struct InitArgs {
    #[command(flatten)]
    pub dir: DirArgs,
    /// How long it is valid.
    #[arg(long, value_name = "N", default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36_500))]
    pub days: u32,
}

/// Issue a certificate and its key: DIR/sensor-NAME.pem and DIR/sensor-NAME-key.pem, or
/// collector-HOST….
#[derive(Debug, Subcommand)]
#[command(after_help = "Examples:
  mcp-sensor certs issue sensor web-1
  mcp-sensor certs issue collector collector.example 10.0.0.5 --days 365
  mcp-sensor certs issue reader siem")]
pub enum IssueCommand {
    Sensor(IssueSensorArgs),
    Collector(IssueCollectorArgs),
    Reader(IssueReaderArgs),
}

/// For the sensor of this name, as `run --sensor` gives it. Again: a new one in its place.
#[derive(Args, Debug, Clone)]
pub struct IssueSensorArgs {
    /// As in `run --sensor NAME`.
    #[arg(value_name = "NAME")]
    pub name: String,
    #[command(flatten)]
    pub dir: DirArgs,
    #[command(flatten)]
    pub days: DaysArgs,
}

/// For whoever reads from a collector what all sensors sent: a SIEM, `events --collector`, `fleet`.
#[derive(Args, Debug, Clone)]
pub struct IssueReaderArgs {
    /// What the collector's log calls it.
    #[arg(value_name = "NAME")]
    pub name: String,
    #[command(flatten)]
    pub dir: DirArgs,
    #[command(flatten)]
    pub days: DaysArgs,
}

/// For a collector, with every name and address that sensors reach it at.
#[derive(Args, Debug, Clone)]
pub struct IssueCollectorArgs {
    /// DNS names and IP addresses, the first of them in the file's name.
    #[arg(value_name = "HOST", required = true)]
    pub hosts: Vec<String>,
    #[command(flatten)]
    pub dir: DirArgs,
    #[command(flatten)]
    pub days: DaysArgs,
}

#[derive(Args, Debug, Clone)]
pub struct DaysArgs {
    /// How long it is valid, at most as long as the CA.
    #[arg(long, value_name = "N", default_value_t = 90, value_parser = clap::value_parser!(u32).range(1..=36_500))]
    pub days: u32,
}

/// What certificates in a file say: whose they are, for which names, until when.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor certs show certs/sensor-web-1.pem
  mcp-sensor certs show certs/ca.pem -o json")]
pub struct ShowArgs {
    /// Certificates, PEM.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    #[command(flatten)]
    pub output: OutputArgs,
}

pub(super) fn run(command: &CertsCommand) -> anyhow::Result<ExitCode> {
    match command {
        CertsCommand::Init(args) => init(&args.dir.dir, args.days),
        CertsCommand::Issue(IssueCommand::Sensor(args)) => {
            let file = format!("sensor-{}", args.name);
            issue(&args.dir.dir, &Subject::Sensor(args.name.clone()), &file, args.days.days)
        }
        CertsCommand::Issue(IssueCommand::Reader(args)) => {
            let file = format!("reader-{}", args.name);
            issue(&args.dir.dir, &Subject::Reader(args.name.clone()), &file, args.days.days)
        }
        CertsCommand::Issue(IssueCommand::Collector(args)) => {
            let file =
                format!("collector-{}", args.hosts.first().map_or("", String::as_str).replace(':', "-"));
            issue(&args.dir.dir, &Subject::Collector(args.hosts.clone()), &file, args.days.days)
        }
        CertsCommand::Show(args) => show(args),
    }
}

fn failed(path: &Path) -> impl Fn(io::Error) -> Failure {
    move |error| {
        let exit = if error.kind() == io::ErrorKind::NotFound { Exit::NotFound } else { Exit::Failure };
        Failure::new(exit, format!("{}: {error}", path.display()))
    }
}

fn init(dir: &Path, days: u32) -> anyhow::Result<ExitCode> {
    let (certificate, key) = (dir.join(CA), dir.join(CA_KEY));
    if let Some(there) = [&certificate, &key].into_iter().find(|p| p.exists()) {
        let message = format!("{}: there is a CA already; it stays as it is", there.display());
        return Err(Failure::new(Exit::Failure, message).hint("give another folder with --dir").into());
    }
    let pair = Authority::create(Validity::days(days)?)?.pair();
    fs::create_dir_all(dir).map_err(failed(dir))?;
    // Another `init` at the same time finds one of the two, and stops.
    create(&key, 0o600, &pair.key)?;
    create(&certificate, 0o644, &pair.certificate)?;
    output::text(&format!(
        "{}: every sensor and collector needs it (--tls-ca)\n{}: issues certificates; keep it off the hosts\n",
        certificate.display(),
        key.display()
    ))?;
    Ok(ExitCode::SUCCESS)
}

fn issue(dir: &Path, subject: &Subject, file: &str, days: u32) -> anyhow::Result<ExitCode> {
    let (ca, ca_key) = (dir.join(CA), dir.join(CA_KEY));
    let read = |path: &Path| {
        fs::read_to_string(path).map_err(|error| {
            failed(path)(error).hint("`mcp-sensor certs init` makes a CA; --dir says where it is")
        })
    };
    let usage = |error: AuthorityError| match error {
        AuthorityError::Name(..)
        | AuthorityError::Host(_)
        | AuthorityError::NoHost
        | AuthorityError::Validity => Failure::new(Exit::Usage, error.to_string()),
        _ => Failure::new(Exit::Failure, format!("{}: {error}", ca.display())),
    };
    let authority = Authority::open(&read(&ca)?, &read(&ca_key)?).map_err(usage)?;
    let Pair { certificate, key } =
        authority.issue(subject, Validity::days(days).map_err(usage)?).map_err(usage)?;
    let (path, key_path) = (dir.join(format!("{file}.pem")), dir.join(format!("{file}-key.pem")));
    replace(&key_path, 0o600, &key)?;
    replace(&path, 0o644, &certificate)?;
    let until = read_pem(certificate.as_bytes())?.first().map_or(0, |c| c.not_after);
    let role = match subject {
        Subject::Sensor(_) => "the sensor",
        Subject::Collector(_) => "the collector",
        Subject::Reader(_) => "the reader",
    };
    output::text(&format!(
        "{} (--tls-cert) and {} (--tls-key): for {role}, with {} (--tls-ca); valid until {}\n",
        path.display(),
        key_path.display(),
        ca.display(),
        time(until)
    ))?;
    Ok(ExitCode::SUCCESS)
}

fn create(path: &Path, mode: u32, text: &str) -> Result<(), Failure> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(failed(path))
}

/// In one step: who reads it finds the old or the new one.
fn replace(path: &Path, mode: u32, text: &str) -> Result<(), Failure> {
    let new = path.with_extension("pem.new");
    let _ = fs::remove_file(&new);
    create(&new, mode, text)?;
    fs::rename(&new, path).map_err(failed(path))
}

fn time(seconds: i64) -> Time {
    Time(seconds.saturating_mul(1_000_000_000))
}

fn show(args: &ShowArgs) -> anyhow::Result<ExitCode> {
    let pem = fs::read(&args.file).map_err(failed(&args.file))?;
    let certificates = read_pem(&pem)
        .map_err(|error| Failure::new(Exit::Failure, format!("{}: {error}", args.file.display())))?;
    match args.output.output {
        Output::Json => output::json(&certificates.iter().map(to_json).collect())?,
        Output::Table => certificates.iter().try_for_each(|c| table(c).print())?,
    }
    Ok(ExitCode::SUCCESS)
}

fn days_left(certificate: &Certificate) -> i64 {
    (certificate.not_after - crate::event::now() / 1_000_000_000).div_euclid(86_400)
}

fn to_json(c: &Certificate) -> Value {
    json!({
        "subject": c.subject, "issuer": c.issuer, "serial": c.serial, "ca": c.is_ca,
        "sans": c.sans.iter().map(San::to_string).collect::<Vec<_>>(),
        "not_before": time(c.not_before).to_string(), "not_after": time(c.not_after).to_string(),
        "days_left": days_left(c),
    })
}

fn table(c: &Certificate) -> Table {
    let mut table = Table::default();
    let mut line = |name: &str, text: String| table.row([name.to_owned(), text]);
    line("subject", format!("{}{}", escape(&c.subject), if c.is_ca { " (CA)" } else { "" }));
    line("issuer", escape(&c.issuer));
    for (n, san) in c.sans.iter().enumerate() {
        line(if n == 0 { "for" } else { "" }, escape(&san.to_string()));
    }
    line("valid from", time(c.not_before).to_string());
    let left = match days_left(c) {
        days @ 0.. => format!("{days} days left"),
        _ => "EXPIRED".to_owned(),
    };
    line("until", format!("{} ({left})", time(c.not_after)));
    line("serial", c.serial.clone());
    table
}
