//! A policy from disk: regular files only, read without blocking, bounded.

use super::bundle::Bundle;
use super::combine::combine;
use super::compile::{Compiled, Ids, compile};
use super::diagnostic::Diagnostic;
use super::host::Host;
use super::launchers;
use super::model::{Matcher, Policy, Profile};
use super::parse::{self, parse_with};
use super::resolvers::{self, HostDns};
use super::toolhive;
use std::cell::RefCell;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A policy that can be put in force.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub policy: Policy,
    pub compiled: Compiled,
    pub host: Host,
    /// Of the policy and of the launchers it names.
    pub warnings: Vec<Diagnostic>,
    /// The file as it was read.
    pub source: String,
    /// Every file that was read, the policy first: a change of any of them is
    /// a change of the policy.
    pub files: Vec<PathBuf>,
    /// What the file is combined with.
    pub bundle: Option<Arc<Bundle>>,
}

/// Why there is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// The file itself; nothing was parsed.
    #[error("{path}: {reason}")]
    Read { path: String, reason: String },
    #[error("{}", first(path, findings))]
    Invalid { path: String, source_text: String, findings: Vec<Diagnostic> },
}

fn first(path: &str, findings: &[Diagnostic]) -> String {
    let more = match findings.len() {
        0 | 1 => String::new(),
        n => format!(" (and {} more)", n - 1),
    };
    findings.first().map_or_else(|| path.to_owned(), |f| f.line(path)) + &more
}

impl LoadError {
    /// Everything that is known, with the lines it is about.
    pub fn render(&self, color: bool) -> String {
        match self {
            LoadError::Read { .. } => format!("{self}\n"),
            LoadError::Invalid { path, source_text, findings } => {
                super::diagnostic::render(findings, path, source_text, color)
            }
        }
    }
}

/// Reads, checks and compiles. On an error `ids` is as before.
pub fn load(path: &Path, ids: &mut Ids) -> Result<Loaded, LoadError> {
    from_bytes(&read(path)?, path, ids)
}

/// The bytes of a policy file.
pub fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    read_regular(path, parse::MAX_BYTES)
        .map_err(|reason| LoadError::Read { path: path.display().to_string(), reason })
}

/// As [`load`] for a text that is at hand; `path` names it in messages, and
/// what it refers to is read from that path's directory.
pub fn from_bytes(bytes: &[u8], path: &Path, ids: &mut Ids) -> Result<Loaded, LoadError> {
    let Parsed { policy, files } = parsed(bytes, path)?;
    finish(policy, files, bytes, path, ids, None)
}

/// A bundle together with the policy of this host (`None`: it has none).
pub fn combined(
    bundle: Arc<Bundle>,
    own: Option<&[u8]>,
    path: &Path,
    ids: &mut Ids,
) -> Result<Loaded, LoadError> {
    let Parsed { policy, files } = match own {
        Some(bytes) => parsed(bytes, path)?,
        None => Parsed { policy: Policy::silent(), files: vec![path.to_path_buf()] },
    };
    let (name, text) = bundle.policy();
    let name = format!("{name} of bundle {}", bundle.version);
    let read = |file: &str| bundle.file(file).map(<[u8]>::to_vec).ok_or("not in the bundle".to_owned());
    let from_bundle = parse_with(text, &read).map_err(|findings| invalid(&name, text, findings))?;
    let dns = resolvers::discover();
    let own = own.unwrap_or_default();
    let combined = combine(from_bundle, &policy, bundle.delegate, &dns)
        .map_err(|findings| invalid(&name, own, findings))?;
    finish(combined, files, own, path, ids, Some((bundle, dns)))
}

fn invalid(path: &str, bytes: &[u8], findings: Vec<Diagnostic>) -> LoadError {
    let source_text = String::from_utf8_lossy(bytes).into_owned();
    LoadError::Invalid { path: path.to_owned(), source_text, findings }
}

struct Parsed {
    policy: Policy,
    /// That were read, the policy first.
    files: Vec<PathBuf>,
}

fn parsed(bytes: &[u8], path: &Path) -> Result<Parsed, LoadError> {
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let files = RefCell::new(vec![path.to_path_buf()]);
    let read = |file: &str| {
        let file = directory.join(file);
        let bytes = read_regular(&file, toolhive::MAX_BYTES);
        files.borrow_mut().push(file);
        bytes
    };
    let policy =
        parse_with(bytes, &read).map_err(|findings| invalid(&path.display().to_string(), bytes, findings))?;
    Ok(Parsed { policy, files: files.into_inner() })
}

fn finish(
    policy: Policy,
    mut files: Vec<PathBuf>,
    bytes: &[u8],
    path: &Path,
    ids: &mut Ids,
    bundle: Option<(Arc<Bundle>, HostDns)>,
) -> Result<Loaded, LoadError> {
    let (launchers, more) = launchers::discover(&policy.launchers);
    let mut host = Host { launchers, ..Host::default() };
    let names = policy.profiles.iter().any(Profile::has_names);
    // A change of what is not read changes no policy. Which resolvers the host
    // has is part of what a bundle is combined with.
    let bundle = match bundle {
        Some((bundle, dns)) => {
            host.dns = dns;
            Some(bundle)
        }
        None if names && (policy.search.is_none() || policy.resolvers.is_none()) => {
            host.dns = resolvers::discover();
            None
        }
        None => None,
    };
    let compiled = compile(&policy, &host, ids)
        .map_err(|findings| invalid(&path.display().to_string(), bytes, findings))?;
    let of_compiled = compiled.warnings.iter().cloned();
    let warnings =
        policy.warnings.iter().cloned().chain(of_compiled).chain(more).chain(links(&policy)).collect();
    files.extend(host.dns.files.iter().cloned());
    // The parser took it as UTF-8.
    let source = String::from_utf8_lossy(bytes).into_owned();
    Ok(Loaded { policy, compiled, host, warnings, source, files, bundle })
}

/// The kernel names an executable by its real path, so a rule for a symbolic
/// link never matches.
fn links(policy: &Policy) -> Vec<Diagnostic> {
    let matchers = policy.servers.iter().flat_map(|server| &server.matches);
    let link = |matcher: &Matcher| {
        let exe = matcher.exe.as_deref()?;
        let real = Path::new(exe).canonicalize().ok().filter(|real| real != Path::new(exe))?;
        let message =
            format!("`{exe}` is `{}` on this host and matches under that name only", real.display());
        let path = format!("{}.exe", matcher.path);
        Some(Diagnostic::warning(matcher.position, path, message).help(format!("write `{}`", real.display())))
    };
    matchers.filter_map(link).collect()
}

/// Of a regular file; does not wait for a FIFO's writer.
pub fn read_regular(path: &Path, most: usize) -> Result<Vec<u8>, String> {
    let mut options = std::fs::OpenOptions::new();
    // Opening a FIFO would wait for a writer.
    options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = options.open(path).map_err(|e| e.to_string())?;
    let meta = file.metadata().map_err(|e| e.to_string())?;
    if !meta.is_file() {
        return Err("not a regular file".to_owned());
    }
    if meta.len() > most as u64 {
        return Err(format!("{} bytes; at most {most} are read", meta.len()));
    }
    let mut bytes = Vec::with_capacity(meta.len() as usize);
    // It may grow while it is read.
    file.take(most as u64 + 1).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    if bytes.len() > most {
        return Err(format!("more than {most} bytes"));
    }
    Ok(bytes)
}
