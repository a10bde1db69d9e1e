//! What the file of outputs says of NATS.

use super::subject::check_prefix;
use crate::collect::output::Secret;
use crate::collect::output::file::{Context, RawTls};
use crate::policy::parse::at;
use async_nats::ServerAddr;
use serde::Deserialize;
use serde_saphyr::Spanned;
use std::path::PathBuf;
use std::time::Duration;

/// Where none is given.
const SUBJECT: &str = "mcp-sensor.events";
const MAX_SERVERS: usize = 16;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    servers: Spanned<Vec<Spanned<String>>>,
    subject: Option<Spanned<String>>,
    #[serde(default)]
    by_sensor: bool,
    stream: Option<Spanned<String>>,
    ca: Option<Spanned<String>>,
    cert: Option<Spanned<String>>,
    key: Option<Spanned<String>>,
    credentials: Option<Spanned<String>>,
    token: Option<Spanned<String>>,
    user: Option<Spanned<String>>,
    password: Option<Spanned<String>>,
    create: Option<Spanned<RawCreate>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCreate {
    replicas: Option<Spanned<u64>>,
    max_bytes: Option<Spanned<u64>>,
    max_age: Option<Spanned<String>>,
    duplicate_window: Option<Spanned<String>>,
}

#[derive(Clone, Debug)]
pub struct Settings {
    pub servers: Vec<ServerAddr>,
    /// An event goes to a subject below this.
    pub subject: String,
    /// With a token for the sensor in between.
    pub by_sensor: bool,
    /// Also with servers that the first one tells of.
    pub tls: bool,
    /// Where it must arrive; `None`: whichever stream takes the subject.
    pub stream: Option<String>,
    pub ca: Option<PathBuf>,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub credentials: Option<Secret>,
    pub token: Option<Secret>,
    pub user: Option<String>,
    pub password: Option<Secret>,
    /// Make the stream if it is not there.
    pub create: Option<Create>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Create {
    pub replicas: usize,
    /// Then the oldest go; `None`: as much as the server allows.
    pub max_bytes: Option<u64>,
    pub max_age: Option<Duration>,
    pub duplicate_window: Duration,
}

impl Settings {
    /// The servers, for people; without what stands before `@`.
    pub fn listed(&self) -> String {
        let one = |s: &ServerAddr| format!("{}:{}", s.host(), s.port());
        self.servers.iter().map(one).collect::<Vec<_>>().join(", ")
    }
}

pub fn check(context: &mut Context<'_>, raw: &Raw) -> Option<Settings> {
    let servers = servers(context, raw)?;
    let subject = raw.subject.as_ref().map_or(SUBJECT, |s| &s.value).to_owned();
    if let Err(why) = check_prefix(&subject) {
        context.error(raw.subject.as_ref().and_then(at), "subject", why);
    }
    let stream = raw.stream.as_ref().map(|s| s.value.clone());
    let good = |c: char| c.is_ascii_graphic() && !"*>./\\".contains(c);
    if stream.as_ref().is_some_and(|s| s.is_empty() || s.len() > 255 || !s.chars().all(good)) {
        let position = raw.stream.as_ref().and_then(at);
        context.error(position, "stream", "a stream's name has no spaces, no dots and none of * > / \\");
    }
    let tls = RawTls { ca: raw.ca.as_ref(), cert: raw.cert.as_ref(), key: raw.key.as_ref() };
    // The client reads them itself; what is wrong with them is said here.
    context.tls(&tls, &[])?;
    let secured = servers.iter().any(|s| s.scheme() == "tls") || raw.ca.is_some() || raw.cert.is_some();
    if secured && let Some(plain) = raw.servers.value.iter().find(|s| !s.value.starts_with("tls://")) {
        context.error(at(plain), "servers", "some servers have TLS and this has not").help =
            Some("write `tls://` for each, or for none".to_owned());
    }
    let path =
        |raw: &Option<Spanned<String>>, context: &Context<'_>| raw.as_ref().map(|p| context.path(&p.value));
    let settings = Settings {
        servers,
        subject,
        by_sensor: raw.by_sensor,
        tls: secured,
        ca: path(&raw.ca, context),
        cert: path(&raw.cert, context),
        key: path(&raw.key, context),
        credentials: secret(context, raw.credentials.as_ref(), "credentials"),
        token: secret(context, raw.token.as_ref(), "token"),
        user: raw.user.as_ref().map(|u| u.value.clone()),
        password: secret(context, raw.password.as_ref(), "password"),
        create: raw
            .create
            .as_ref()
            .map(|create| context.within("create", |c| self::create(c, &create.value))),
        stream,
    };
    if let (Some(create), None) = (&raw.create, &settings.stream) {
        context.error(at(create), "create", "a stream that is to be made needs a name").help =
            Some("give `stream` as well".to_owned());
    }
    let ways = [raw.credentials.as_ref(), raw.token.as_ref(), raw.user.as_ref()];
    if let Some(second) = ways.into_iter().flatten().nth(1) {
        context.error(at(second), "", "more than one of `credentials`, `token` and `user`");
    }
    match (&raw.user, &raw.password) {
        (Some(lone), None) | (None, Some(lone)) => {
            context.error(at(lone), "", "`user` and `password` come together");
        }
        _ => (),
    }
    Some(settings)
}

fn servers(context: &mut Context<'_>, raw: &Raw) -> Option<Vec<ServerAddr>> {
    let list = &raw.servers.value;
    if list.is_empty() || list.len() > MAX_SERVERS {
        context.error(at(&raw.servers), "servers", format!("give 1 to {MAX_SERVERS} servers"));
        return None;
    }
    let help = "write `tls://HOST:PORT`, or `nats://HOST:PORT` for a server without TLS";
    let mut servers = Vec::new();
    for one in list {
        let scheme = one.value.split_once("://").map(|(scheme, _)| scheme);
        match one.value.parse::<ServerAddr>() {
            Ok(server) if matches!(scheme, Some("tls" | "nats")) => {
                if server.has_user_pass() {
                    context.error(at(one), "servers", "a secret does not stand in this file").help =
                        Some("give `user` and `password`, or `token`".to_owned());
                }
                servers.push(server);
            }
            _ => {
                let message = format!("`{}` is no address of a server", one.value.escape_debug());
                context.error(at(one), "servers", message).help = Some(help.to_owned());
            }
        }
    }
    (servers.len() == list.len()).then_some(servers)
}

fn secret(context: &mut Context<'_>, raw: Option<&Spanned<String>>, key: &str) -> Option<Secret> {
    context.secret(raw?, key)
}

fn create(context: &mut Context<'_>, raw: &RawCreate) -> Create {
    let replicas = context.number(raw.replicas.as_ref(), "replicas", (1, 1, 5));
    let max_bytes = raw.max_bytes.as_ref();
    let window = (Duration::from_millis(100), Duration::from_secs(120), Duration::from_secs(86_400));
    let age = (Duration::from_secs(1), Duration::ZERO, Duration::from_secs(86_400 * 3650));
    let max_age = context.duration(raw.max_age.as_ref(), "max_age", age);
    let duplicate_window = context.duration(raw.duplicate_window.as_ref(), "duplicate_window", window);
    if !max_age.is_zero() && max_age < duplicate_window {
        let position = raw.max_age.as_ref().and_then(at);
        context.error(position, "max_age", "shorter than `duplicate_window`");
    }
    Create {
        replicas: usize::try_from(replicas).unwrap_or(1),
        max_bytes: max_bytes.map(|_| context.number(max_bytes, "max_bytes", (1 << 20, 0, i64::MAX as u64))),
        max_age: (!max_age.is_zero()).then_some(max_age),
        duplicate_window,
    }
}
