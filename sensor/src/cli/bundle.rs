//! `mcp-sensor policy keygen`, `sign` and `verify`.

use super::output::{self, Table};
use super::{Exit, Failure, Output, OutputArgs};
use crate::event::json::Time;
use crate::event::now;
use crate::event::text::escape;
use crate::policy::bundle::{Bundle, BundleError, Draft, MAX_BYTES, PublicKeys, SigningKey};
use crate::policy::compile::{Ids, compile};
use crate::policy::host::Host;
use crate::policy::parse::parse_with;
use crate::policy::{diagnostic, resolvers::HostDns};
use clap::Args;
use serde_json::json;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Make a key that signs policies: FILE, which stays where policies are signed, and FILE.pub, which
/// every sensor gets.
///
/// A file that is there already is never overwritten.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor policy keygen -o policy-key.pem
  mcp-sensor run --policy-key policy-key.pem.pub …")]
pub struct KeygenArgs {
    /// The private key (PEM, mode 0600); the public one is beside it, with `.pub` behind.
    #[arg(short, long, value_name = "FILE", default_value = "policy-key.pem")]
    pub output: PathBuf,
}

/// Sign a policy for sensors, with the files that it refers to.
///
/// It must be valid. Sensors take a version that is higher than the one they have.
#[derive(Args, Debug, Clone)]
#[command(
    disable_version_flag = true,
    after_help = "Examples:
  mcp-sensor policy sign --key policy-key.pem --version 12 policy.yaml -o policies/fleet.bundle
  mcp-sensor policy sign --key policy-key.pem --version 13 --group web policy.yaml github.json -o policies/web.bundle
Put it into the directory of `collect --policies`, under a name that ends in `.new` until it is whole."
)]
pub struct SignArgs {
    /// The private key (PEM).
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,
    /// Version of the policy; one sequence for all groups.
    #[arg(long = "version", value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub number: u64,
    /// Only for sensors of this group (`run --group`).
    #[arg(long, value_name = "NAME")]
    pub group: Option<String>,
    /// It may take the place of a higher version.
    #[arg(long)]
    pub allow_rollback: bool,
    /// Servers that a host's own policy declares are as that one says.
    #[arg(long)]
    pub delegate: bool,
    /// The policy, then files that it refers to, in its directory or below.
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
    /// Where the bundle goes.
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
}

/// What a signed policy says, and whether one of these keys signed it.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor policy verify --key policy-key.pem.pub policies/fleet.bundle")]
pub struct VerifyArgs {
    /// Public keys (PEM); again for another file.
    #[arg(long, value_name = "FILE", required = true)]
    pub key: Vec<PathBuf>,
    /// The bundle.
    #[arg(value_name = "BUNDLE")]
    pub file: PathBuf,
    #[command(flatten)]
    pub output: OutputArgs,
}

fn failed(path: &Path) -> impl Fn(io::Error) -> Failure {
    move |error| {
        let exit = if error.kind() == io::ErrorKind::NotFound { Exit::NotFound } else { Exit::Failure };
        Failure::new(exit, format!("{}: {error}", path.display()))
    }
}

fn create(path: &Path, mode: u32, bytes: &[u8]) -> Result<(), Failure> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(failed(path))
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed(path))?;
    file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(failed(path))?;
    if bytes.len() > MAX_BYTES {
        return Err(Failure::new(Exit::Failure, format!("{}: more than {MAX_BYTES} bytes", path.display())));
    }
    Ok(bytes)
}

pub(super) fn keygen(args: &KeygenArgs) -> anyhow::Result<ExitCode> {
    let private = &args.output;
    let mut public = private.clone().into_os_string();
    public.push(".pub");
    let public = PathBuf::from(public);
    if let Some(there) = [private, &public].into_iter().find(|path| path.exists()) {
        let message = format!("{}: there is a file already; it stays as it is", there.display());
        return Err(Failure::new(Exit::Failure, message).hint("give another name with -o").into());
    }
    let key = SigningKey::generate()?;
    create(private, 0o600, key.to_pem().as_bytes())?;
    create(&public, 0o644, key.public_pem().as_bytes())?;
    output::text(&format!(
        "{}: signs policies (policy sign --key); keep it off the hosts\n{}: for every sensor (run --policy-key), key {}\n",
        private.display(),
        public.display(),
        hex::encode(key.public()?.id())
    ))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn sign(args: &SignArgs) -> anyhow::Result<ExitCode> {
    let pem = String::from_utf8(read(&args.key)?).unwrap_or_default();
    let key = SigningKey::read_pem(&pem).map_err(|error| {
        Failure::new(Exit::Failure, format!("{}: {error}", args.key.display()))
            .hint("`mcp-sensor policy keygen` makes one")
    })?;
    let directory = args.files[0].parent().unwrap_or(Path::new("")).to_owned();
    let mut files = Vec::with_capacity(args.files.len());
    for path in &args.files {
        let name = path.strip_prefix(&directory).ok().and_then(Path::to_str).ok_or_else(|| {
            Failure::new(Exit::Usage, format!("{}: not below the directory of the policy", path.display()))
                .hint("a policy refers to files by their path from its own directory")
        })?;
        files.push((name.to_owned(), read(path)?));
    }
    let draft = Draft {
        version: args.number,
        created_unix_ns: now(),
        group: args.group.clone().unwrap_or_default(),
        allow_rollback: args.allow_rollback,
        delegate: args.delegate,
        files,
    };
    let bundle = draft.sign(&key).map_err(|error| Failure::new(Exit::Failure, error.to_string()))?;
    valid(&bundle, &args.files[0])?;
    let new = args.output.with_extension("bundle.new");
    let _ = fs::remove_file(&new);
    create(&new, 0o644, &bundle.signed)?;
    fs::rename(&new, &args.output).map_err(failed(&args.output))?;
    output::text(&format!(
        "{}: version {}, {}, {} bytes\n",
        args.output.display(),
        bundle.version,
        bundle.hash,
        bundle.signed.len()
    ))?;
    Ok(ExitCode::SUCCESS)
}

/// As a sensor without a policy of its own would take it.
fn valid(bundle: &Bundle, path: &Path) -> Result<(), Failure> {
    let (_, text) = bundle.policy();
    let read = |name: &str| {
        bundle
            .file(name)
            .map(<[u8]>::to_vec)
            .ok_or_else(|| "not in the bundle; name it behind the policy".to_owned())
    };
    // Which resolvers a host has is not known here.
    let dns = HostDns { resolvers: vec![IpAddr::from(Ipv4Addr::LOCALHOST)], ..HostDns::default() };
    let checked = parse_with(text, &read)
        .and_then(|policy| compile(&policy, &Host { dns, ..Host::default() }, &mut Ids::default()));
    checked.map(drop).map_err(|findings| {
        let source = String::from_utf8_lossy(text);
        let color = io::stderr().is_terminal();
        let shown = diagnostic::render(&findings, &path.display().to_string(), &source, color);
        Failure::new(Exit::PolicyInvalid, shown).hint("nothing was signed")
    })
}

pub(super) fn verify(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let mut keys = PublicKeys::default();
    for path in &args.key {
        let read = PublicKeys::read_pem(&read(path)?);
        keys.extend(
            read.map_err(|error| Failure::new(Exit::Failure, format!("{}: {error}", path.display())))?,
        );
    }
    let refused = |error: BundleError| {
        Failure::new(Exit::Failure, format!("{}: {error}", args.file.display()))
            .hint("do not give it to sensors: they refuse it")
    };
    let bundle = Bundle::parse(&read(&args.file)?).map_err(refused)?;
    bundle.verify(&keys).map_err(refused)?;
    valid(&bundle, &args.file)?;
    match args.output.output {
        Output::Json => output::json(&json!({
            "version": bundle.version, "hash": bundle.hash, "group": bundle.group, "key": bundle.key_id(),
            "created": Time(bundle.created_unix_ns).to_string(),
            "allow_rollback": bundle.allow_rollback, "delegate": bundle.delegate,
            "files": bundle.files().map(|(name, bytes)| json!({"name": name, "bytes": bytes})).collect::<Vec<_>>(),
        }))?,
        Output::Table => {
            let mut table = Table::default();
            let mut line = |name: &str, text: String| table.row([name.to_owned(), text]);
            line("version", bundle.version.to_string());
            line("hash", bundle.hash.clone());
            line(
                "for",
                if bundle.group.is_empty() { "every sensor".to_owned() } else { escape(&bundle.group) },
            );
            line("created", Time(bundle.created_unix_ns).to_string());
            line("signed with", bundle.key_id());
            if bundle.allow_rollback {
                line("", "may take the place of a higher version".to_owned());
            }
            if bundle.delegate {
                line("", "leaves to a host what its own policy declares".to_owned());
            }
            for (name, bytes) in bundle.files() {
                line("file", format!("{} ({bytes} bytes)", escape(name)));
            }
            table.print()?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
