//! The file of outputs (`collect --outputs FILE`): every key known, everything
//! wrong with it found at once, with its place.

use super::secret::Secret;
use super::syslog::{self, Syslog};
use super::webhook::{self, Webhook};
use super::{Output, Place, Ready};
use super::{nats, ndjson, otlp};
use crate::collect::filter::Filter;
use crate::collect::log::Source;
use crate::collect::store::StoreError;
use crate::event::{json, pb};
use crate::format::Format;
use crate::policy::diagnostic::{Diagnostic, Position};
use crate::policy::load::read_regular;
use crate::policy::parse::{Checker, at, document};
use crate::tls::{Client, ClientFiles};
use serde::Deserialize;
use serde_saphyr::Spanned;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Largest file.
const MAX_BYTES: usize = 1 << 20;
pub const MAX_OUTPUTS: usize = 32;
const MAX_NAME: usize = 32;
/// Entries of one list of a filter.
const MAX_LIST: usize = 1024;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    outputs: Spanned<Vec<Spanned<RawOutput>>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawOutput {
    name: Spanned<String>,
    format: Option<Spanned<String>>,
    filter: Option<RawFilter>,
    nats: Option<Spanned<nats::settings::Raw>>,
    ndjson: Option<Spanned<ndjson::Raw>>,
    otlp: Option<Spanned<otlp::settings::Raw>>,
    syslog: Option<Spanned<syslog::Raw>>,
    webhook: Option<Spanned<webhook::Raw>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFilter {
    #[serde(default)]
    types: Vec<Spanned<String>>,
    #[serde(default)]
    servers: Vec<Spanned<String>>,
    #[serde(default)]
    verdicts: Vec<Spanned<String>>,
    #[serde(default)]
    sensors: Vec<Spanned<String>>,
    min_severity: Option<Spanned<String>>,
}

/// One output of the file, checked.
#[derive(Debug)]
pub struct Configured {
    pub name: String,
    pub format: Format,
    pub(in crate::collect) filter: Filter,
    pub kind: Kind,
}

/// Where it goes. `Context` has what each needs to check its part of the file.
#[derive(Debug)]
pub enum Kind {
    Nats(Box<nats::Settings>),
    Ndjson(ndjson::Settings),
    Otlp(Box<otlp::Settings>),
    Syslog(syslog::Settings),
    Webhook(webhook::Settings),
}

impl Kind {
    pub fn name(&self) -> &'static str {
        match self {
            Kind::Nats(_) => nats::KIND,
            Kind::Ndjson(_) => ndjson::KIND,
            Kind::Otlp(_) => otlp::KIND,
            Kind::Syslog(_) => syslog::KIND,
            Kind::Webhook(_) => webhook::KIND,
        }
    }
}

impl Kind {
    /// Of our own, that receivers verify.
    fn certificate(&self) -> Option<PathBuf> {
        let of = |client: &Client| client.certificate().map(Path::to_owned);
        match self {
            Kind::Nats(settings) => settings.cert.clone(),
            Kind::Ndjson(_) => None,
            Kind::Otlp(settings) => settings.tls.as_ref().and_then(|(_, client)| of(client)),
            Kind::Syslog(settings) => settings.tls.as_ref().and_then(of),
            Kind::Webhook(settings) => settings.tls.as_ref().and_then(of),
        }
    }
}

impl Configured {
    /// In the collector's directory; begins where the cursor of an earlier run is.
    pub(in crate::collect) fn open(self, dir: &Path, source: &Source) -> Result<Ready, StoreError> {
        let place = Place::load(dir, &self.name, source)
            .map_err(|source| StoreError::Io { path: dir.join("outputs"), source })?;
        let (name, format, certificate) = (self.name, self.format, self.kind.certificate());
        let starting = |source| StoreError::Io { path: dir.join("outputs").join(&name), source };
        let output: Box<dyn Output> = match self.kind {
            Kind::Nats(settings) => Box::new(nats::Nats::new(&name, *settings, format).map_err(starting)?),
            Kind::Ndjson(settings) => Box::new(ndjson::Ndjson::open(&name, format, settings, &place)?),
            Kind::Otlp(settings) => Box::new(otlp::Otlp::new(&name, *settings).map_err(starting)?),
            Kind::Syslog(settings) => Box::new(Syslog::open(&name, format, settings, &place)),
            Kind::Webhook(settings) => {
                let open = Webhook::open(&name, format, settings);
                Box::new(open.map_err(|source| StoreError::Io { path: dir.join("outputs"), source })?)
            }
        };
        Ok(Ready { place, filter: self.filter, output, certificate })
    }
}

/// What is wrong with a file of outputs.
#[derive(Debug, thiserror::Error)]
#[error("{}", .findings.iter().map(|f| f.line(path)).collect::<Vec<_>>().join("\n"))]
pub struct Invalid {
    pub path: String,
    pub source_text: String,
    pub findings: Vec<Diagnostic>,
}

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{0}: {1}")]
    Read(PathBuf, String),
    #[error(transparent)]
    Invalid(#[from] Invalid),
}

/// What a file says.
#[derive(Debug)]
pub struct Loaded {
    pub outputs: Vec<Configured>,
    pub warnings: Vec<Diagnostic>,
}

/// Reads and checks the file; certificates and secrets that it names are read as
/// well.
pub fn load(path: &Path) -> Result<Loaded, LoadError> {
    let bytes = read_regular(path, MAX_BYTES).map_err(|why| LoadError::Read(path.to_owned(), why))?;
    let base = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    parse(&bytes, base).map_err(|findings| {
        let source_text = String::from_utf8_lossy(&bytes).into_owned();
        Invalid { path: path.display().to_string(), source_text, findings }.into()
    })
}

/// `base`: what paths are relative to.
pub fn parse(bytes: &[u8], base: &Path) -> Result<Loaded, Vec<Diagnostic>> {
    let nothing = |line: &[u8]| line.trim_ascii().is_empty() || line.trim_ascii().starts_with(b"#");
    if bytes.split(|b| *b == b'\n').all(nothing) {
        let finding = Diagnostic::error(None, "", "the file is empty");
        return Err(vec![finding.help("begin with `outputs:`")]);
    }
    let file: File = document(bytes, MAX_BYTES)?;
    let mut checker = Checker::default();
    if file.outputs.value.len() > MAX_OUTPUTS {
        checker.error(at(&file.outputs), "outputs", format!("more than {MAX_OUTPUTS}"));
    }
    let (mut outputs, mut names, mut files) = (Vec::new(), HashSet::new(), HashSet::new());
    for (index, raw) in file.outputs.value.iter().enumerate().take(MAX_OUTPUTS) {
        let mut context = Context { checker: &mut checker, base, path: format!("outputs[{index}]") };
        let Some(output) = output(&mut context, raw) else { continue };
        if !names.insert(output.name.clone()) {
            context.error(at(&raw.value.name), "name", format!("a second output `{}`", output.name));
        }
        if let Kind::Ndjson(settings) = &output.kind
            && !files.insert(settings.dir.clone())
        {
            context.error(at(raw), "ndjson.path", "another output writes there").help =
                Some("give each a directory of its own".to_owned());
        }
        outputs.push(output);
    }
    let (warnings, errors) = checker.finish();
    if errors.is_empty() { Ok(Loaded { outputs, warnings }) } else { Err(errors) }
}

fn output(context: &mut Context<'_>, raw: &Spanned<RawOutput>) -> Option<Configured> {
    let RawOutput { name, format, filter, nats, ndjson, otlp, syslog, webhook } = &raw.value;
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let named = !name.value.is_empty() && name.value.len() <= MAX_NAME && name.value.chars().all(good);
    if !named {
        let message = format!("`{}` is no name of an output", name.value.escape_debug());
        context.error(at(name), "name", message).help =
            Some(format!("a to z, 0 to 9 and `-`, at most {MAX_NAME}"));
    } else if name.value == ndjson::NAME {
        context.error(at(name), "name", "`ndjson` is built in").help =
            Some("choose another; --no-ndjson leaves out the one that is built in".to_owned());
    }
    let written = format.as_ref();
    let format = format.as_ref().map_or(Some(Format::Ndjson), |format| match format.value.as_str() {
        "native" => Some(Format::Ndjson),
        "ocsf" => Some(Format::Ocsf),
        "ecs" => Some(Format::Ecs),
        other => {
            context.unknown(at(format), "format", other, &["native", "ocsf", "ecs"]);
            None
        }
    });
    let filter = filter.as_ref().map_or_else(
        || Some(Filter::default()),
        |raw| context.within("filter", |context| self::filter(context, raw)),
    );
    let mut kinds: Vec<Option<Kind>> = Vec::new();
    if let Some(raw) = nats {
        let settings = context.within(nats::KIND, |c| nats::settings::check(c, &raw.value));
        kinds.push(settings.map(Box::new).map(Kind::Nats));
    }
    if let Some(raw) = ndjson {
        kinds.push(context.within(ndjson::KIND, |c| ndjson::check(c, &raw.value)).map(Kind::Ndjson));
    }
    if let Some(raw) = otlp {
        let settings = context.within(otlp::KIND, |c| otlp::settings::check(c, &raw.value));
        kinds.push(settings.map(Box::new).map(Kind::Otlp));
        if let Some(format) = written {
            context.error(at(format), "format", "OTLP has a form of its own").help =
                Some("leave out `format`".to_owned());
        }
    }
    if let Some(raw) = syslog {
        kinds.push(context.within(syslog::KIND, |c| syslog::check(c, &raw.value)).map(Kind::Syslog));
    }
    if let Some(raw) = webhook {
        kinds.push(context.within(webhook::KIND, |c| webhook::check(c, &raw.value)).map(Kind::Webhook));
    }
    if kinds.len() != 1 {
        let message = if kinds.is_empty() { "it says not where to" } else { "it says more than one place" };
        context.error(at(raw), "", message).help = Some(format!("one of {}", KINDS.join(", ")));
    }
    let kind = kinds.pop().flatten();
    Some(Configured { name: name.value.clone(), format: format?, filter: filter?, kind: kind? })
}

const KINDS: &[&str] = &[nats::KIND, ndjson::KIND, otlp::KIND, syslog::KIND, webhook::KIND];

fn filter(context: &mut Context<'_>, raw: &RawFilter) -> Option<Filter> {
    let verdicts = [pb::Verdict::Allow, pb::Verdict::Deny, pb::Verdict::WouldDeny];
    let severities = [
        pb::Severity::Info,
        pb::Severity::Low,
        pb::Severity::Medium,
        pb::Severity::High,
        pb::Severity::Critical,
    ];
    let lists = [
        ("types", &raw.types),
        ("servers", &raw.servers),
        ("verdicts", &raw.verdicts),
        ("sensors", &raw.sensors),
    ];
    for (key, list) in lists {
        if list.len() > MAX_LIST {
            context.error(list.first().and_then(at), key, format!("more than {MAX_LIST} entries"));
            return None;
        }
    }
    let strings = |list: &[Spanned<String>]| list.iter().map(|s| s.value.clone()).collect();
    for name in raw.types.iter().filter(|t| !json::TYPES.contains(&t.value.as_str())) {
        context.unknown(at(name), "types", &name.value, &json::TYPES);
    }
    let mut wanted = pb::EventFilter {
        types: strings(&raw.types),
        servers: strings(&raw.servers),
        sensors: strings(&raw.sensors),
        ..Default::default()
    };
    for name in &raw.verdicts {
        match verdicts.iter().find(|v| json::verdict_name(**v) == name.value) {
            Some(verdict) => wanted.verdicts.push((*verdict).into()),
            None => context.unknown(at(name), "verdicts", &name.value, &verdicts.map(json::verdict_name)),
        }
    }
    if let Some(name) = &raw.min_severity {
        match severities.iter().find(|s| json::severity_name(**s) == name.value) {
            Some(severity) => wanted.min_severity = (*severity).into(),
            None => {
                context.unknown(at(name), "min_severity", &name.value, &severities.map(json::severity_name));
            }
        }
    }
    // What is wrong was said with its place.
    Filter::new(wanted).ok()
}

/// Where in the file something is checked, and what it is checked with.
pub struct Context<'a> {
    checker: &'a mut Checker,
    base: &'a Path,
    path: String,
}

impl Context<'_> {
    /// `key`: below where this is; may be empty.
    pub fn error(
        &mut self,
        position: Option<Position>,
        key: &str,
        message: impl Into<String>,
    ) -> &mut Diagnostic {
        self.checker.error(position, self.key(key), message)
    }

    pub fn warning(
        &mut self,
        position: Option<Position>,
        key: &str,
        message: impl Into<String>,
    ) -> &mut Diagnostic {
        self.checker.warning(position, self.key(key), message)
    }

    pub fn unknown(&mut self, position: Option<Position>, key: &str, value: &str, known: &[&str]) {
        let message = format!("`{}` is not known", value.escape_debug());
        self.error(position, key, message).help = Some(format!("one of {}", known.join(", ")));
    }

    fn key(&self, key: &str) -> String {
        if key.is_empty() { self.path.clone() } else { format!("{}.{key}", self.path) }
    }

    pub fn within<T>(&mut self, key: &str, check: impl FnOnce(&mut Context<'_>) -> T) -> T {
        let path = self.key(key);
        check(&mut Context { checker: self.checker, base: self.base, path })
    }

    /// As written, relative to the file.
    pub fn path(&self, path: &str) -> PathBuf {
        self.base.join(path)
    }

    /// `10s`, `500ms` or `2m`, within the limits.
    pub fn duration(
        &mut self,
        raw: Option<&Spanned<String>>,
        key: &str,
        (least, otherwise, most): (Duration, Duration, Duration),
    ) -> Duration {
        let Some(raw) = raw else { return otherwise };
        match duration(&raw.value) {
            Some(time) if (least..=most).contains(&time) => time,
            _ => {
                let message = format!("`{}` is no such time", raw.value.escape_debug());
                self.error(at(raw), key, message).help =
                    Some(format!("write a time from {least:?} to {most:?} like `10s`, `500ms` or `2m`"));
                otherwise
            }
        }
    }

    pub fn number(
        &mut self,
        raw: Option<&Spanned<u64>>,
        key: &str,
        (least, otherwise, most): (u64, u64, u64),
    ) -> u64 {
        let Some(raw) = raw else { return otherwise };
        if (least..=most).contains(&raw.value) {
            return raw.value;
        }
        self.error(at(raw), key, format!("{} is not from {least} to {most}", raw.value));
        otherwise
    }

    /// `file:PATH` or `env:NAME`, and it can be read.
    pub fn secret(&mut self, raw: &Spanned<String>, key: &str) -> Option<Secret> {
        let Some(secret) = Secret::parse(&raw.value, self.base) else {
            // It may be the secret itself: it is not printed.
            self.error(at(raw), key, "a secret does not stand in this file").help =
                Some("write `file:PATH` or `env:NAME`".to_owned());
            return None;
        };
        if let Err(error) = secret.read() {
            self.error(at(raw), key, error.to_string());
            return None;
        }
        Some(secret)
    }

    /// Keys `ca`, `cert` and `key` of an output that speaks TLS.
    pub fn tls(&mut self, raw: &RawTls<'_>, alpn: &[&[u8]]) -> Option<Client> {
        let pair = match (raw.cert, raw.key) {
            (Some(cert), Some(key)) => Some((self.path(&cert.value), self.path(&key.value))),
            (None, None) => None,
            (Some(lone), None) | (None, Some(lone)) => {
                self.error(at(lone), "", "`cert` and `key` come together");
                return None;
            }
        };
        let files = ClientFiles { ca: raw.ca.map(|ca| self.path(&ca.value)), pair };
        match Client::open(files, alpn) {
            Ok(client) => Some(client),
            Err(error) => {
                let position = [raw.ca, raw.cert, raw.key].into_iter().flatten().find_map(at);
                self.error(position, "", error.to_string());
                None
            }
        }
    }
}

/// As written.
pub struct RawTls<'a> {
    pub ca: Option<&'a Spanned<String>>,
    pub cert: Option<&'a Spanned<String>>,
    pub key: Option<&'a Spanned<String>>,
}

fn duration(text: &str) -> Option<Duration> {
    let end = text.find(|c: char| !c.is_ascii_digit())?;
    let number: u64 = text[..end].parse().ok()?;
    match &text[end..] {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        "h" => number.checked_mul(3600).map(Duration::from_secs),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
