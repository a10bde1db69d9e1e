//! A policy from disk: regular files only, read without blocking, bounded.

use super::compile::{Compiled, Ids, compile};
use super::diagnostic::Diagnostic;
use super::host::Host;
use super::launchers;
use super::model::{Matcher, Policy, Profile};
use super::parse::{self, parse_with};
use super::resolvers;
use super::toolhive;
use std::cell::RefCell;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

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
    let bytes = read_regular(path, parse::MAX_BYTES)
        .map_err(|reason| LoadError::Read { path: path.display().to_string(), reason })?;
    from_bytes(&bytes, path, ids)
}

/// As [`load`] for a text that is at hand; `path` names it in messages, and
/// what it refers to is read from that path's directory.
pub fn from_bytes(bytes: &[u8], path: &Path, ids: &mut Ids) -> Result<Loaded, LoadError> {
    let name = path.display().to_string();
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let files = RefCell::new(vec![path.to_path_buf()]);
    let read = |file: &str| {
        let file = directory.join(file);
        let bytes = read_regular(&file, toolhive::MAX_BYTES);
        files.borrow_mut().push(file);
        bytes
    };
    let invalid = |findings: Vec<Diagnostic>, bytes: &[u8]| LoadError::Invalid {
        path: name.clone(),
        source_text: String::from_utf8_lossy(bytes).into_owned(),
        findings,
    };
    let policy = match parse_with(bytes, &read) {
        Ok(policy) => policy,
        Err(findings) => return Err(invalid(findings, bytes)),
    };
    let (launchers, more) = launchers::discover(&policy.launchers);
    let mut host = Host { launchers, ..Host::default() };
    let names = policy.profiles.iter().any(Profile::has_names);
    // A change of what is not read changes no policy.
    if names && (policy.search.is_none() || policy.resolvers.is_none()) {
        host.dns = resolvers::discover();
    }
    let compiled = match compile(&policy, &host, ids) {
        Ok(compiled) => compiled,
        Err(findings) => return Err(invalid(findings, bytes)),
    };
    let of_compiled = compiled.warnings.iter().cloned();
    let warnings =
        policy.warnings.iter().cloned().chain(of_compiled).chain(more).chain(links(&policy)).collect();
    let mut files = files.into_inner();
    files.extend(host.dns.files.iter().cloned());
    // `parse_with` took it as UTF-8.
    let source = String::from_utf8_lossy(bytes).into_owned();
    Ok(Loaded { policy, compiled, host, warnings, source, files })
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
