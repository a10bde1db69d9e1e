//! The exec trie of a policy: the keys of every `match`, the executables and
//! words that launchers and interpreters are known by, and the launchers of
//! this host by exact path.

use super::diagnostic::Diagnostic;
use super::launchers::Launchers;
use super::matching::{exe_key, keys};
use super::model::{Matcher, Policy};
use sensor_common::exec::{
    ExecRule, FLAG_HASHED, FLAG_INTERPRETER, FLAG_LAUNCHER, FLAG_LAUNCHER_LIKE, FLAG_NEEDS_WORD, KEY_BYTES,
    KIND_EXE, KIND_SCRIPT, KIND_SCRIPT_PATH, KIND_WORD, MAX_EXEC_KEYS,
};
use std::collections::{BTreeMap, HashMap};

/// One key of the exec trie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecEntry {
    pub kind: u8,
    pub text: Vec<u8>,
    pub rule: ExecRule,
}

/// Keys of one generation; the trie holds two.
pub const MAX_ENTRIES: usize = MAX_EXEC_KEYS as usize / 2;

/// By file name, whatever the directory. A name without `/` is a prefix
/// (`python3.12`).
const INTERPRETERS: [&str; 22] = [
    "node/",
    "nodejs/",
    "python",
    "pypy",
    "bun/",
    "deno/",
    "ruby",
    "perl",
    "php",
    "java/",
    "dotnet/",
    "lua",
    "electron/",
    "tclsh",
    "sh/",
    "bash/",
    "dash/",
    "ash/",
    "zsh/",
    "ksh/",
    "fish/",
    "busybox/",
];
const LAUNCHERS: [&str; 4] = ["npx/", "uvx/", "bunx/", "pnpx/"];
const LAUNCHERS_WITH_WORD: [&str; 10] =
    ["uv/", "docker/", "podman/", "nerdctl/", "bun/", "pnpm/", "pipx/", "deno/", "npm/", "yarn/"];
const SCRIPTS: [&str; 6] = ["npx", "npx-cli.js", "pnpx", "pnpx.cjs", "bunx", "uvx"];
const SCRIPTS_WITH_WORD: [&str; 8] =
    ["npm", "npm-cli.js", "pnpm", "pnpm.cjs", "pnpm.js", "yarn", "yarn.js", "pipx"];
const WORDS: [&str; 5] = ["exec", "x", "dlx", "run", "uvx"];

/// Whether a program of this file name runs scripts.
pub fn is_interpreter(name: &str) -> bool {
    INTERPRETERS.iter().any(|known| match known.strip_suffix('/') {
        Some(whole) => name == whole,
        None => name.starts_with(known),
    })
}

struct Entry<'a> {
    rule: ExecRule,
    /// The `match` that the server comes from.
    from: Option<&'a Matcher>,
}

struct Builder<'a> {
    entries: BTreeMap<(u8, Vec<u8>), Entry<'a>>,
    /// Numbers of executables that a rule names.
    exes: HashMap<&'a str, u32>,
    errors: Vec<Diagnostic>,
}

/// `ids` are the server ids, in the order of the policy.
pub fn compile(
    policy: &Policy,
    ids: &[u16],
    launchers: &Launchers,
) -> Result<Vec<ExecEntry>, Vec<Diagnostic>> {
    let mut builder = Builder { entries: BTreeMap::new(), exes: HashMap::new(), errors: Vec::new() };
    builder.known_names();
    builder.launchers(launchers);
    for (priority, (server, matcher)) in (0..).zip(policy.matchers()) {
        builder.matcher(matcher, ids[server], priority);
    }
    builder.inherit();
    if builder.entries.len() > MAX_ENTRIES {
        let message = format!(
            "the `match` entries need {} keys, the kernel holds {MAX_ENTRIES}; a package takes up to 60, \
             `argv` and `exe` one each",
            builder.entries.len()
        );
        builder.errors.push(Diagnostic::error(None, "servers", message));
    }
    if !builder.errors.is_empty() {
        return Err(builder.errors);
    }
    let entry =
        |((kind, text), entry): ((u8, Vec<u8>), Entry<'_>)| ExecEntry { kind, text, rule: entry.rule };
    Ok(builder.entries.into_iter().map(entry).collect())
}

impl<'a> Builder<'a> {
    fn flags(&mut self, kind: u8, text: Vec<u8>, flags: u16) {
        if text.len() > KEY_BYTES {
            return;
        }
        let none = Entry { rule: ExecRule { priority: u32::MAX, ..ExecRule::default() }, from: None };
        self.entries.entry((kind, text)).or_insert(none).rule.flags |= flags;
    }

    fn known_names(&mut self) {
        let whole = |text: &str| [text.as_bytes(), b"\0"].concat();
        for name in INTERPRETERS {
            self.flags(KIND_EXE, name.as_bytes().to_vec(), FLAG_INTERPRETER);
        }
        for name in LAUNCHERS {
            self.flags(KIND_EXE, name.as_bytes().to_vec(), FLAG_LAUNCHER_LIKE);
        }
        for name in LAUNCHERS_WITH_WORD {
            self.flags(KIND_EXE, name.as_bytes().to_vec(), FLAG_LAUNCHER_LIKE | FLAG_NEEDS_WORD);
        }
        for name in SCRIPTS {
            self.flags(KIND_SCRIPT, whole(name), FLAG_LAUNCHER_LIKE);
        }
        for name in SCRIPTS_WITH_WORD {
            self.flags(KIND_SCRIPT, whole(name), FLAG_LAUNCHER_LIKE | FLAG_NEEDS_WORD);
        }
        for word in WORDS {
            self.flags(KIND_WORD, whole(word), 0);
        }
    }

    fn launchers(&mut self, launchers: &Launchers) {
        for path in &launchers.programs {
            self.flags(KIND_EXE, exe_key(path), FLAG_LAUNCHER);
        }
        for path in &launchers.interpreters {
            self.flags(KIND_EXE, exe_key(path), FLAG_LAUNCHER | FLAG_INTERPRETER);
        }
        for path in &launchers.scripts {
            self.flags(KIND_SCRIPT_PATH, [path.as_bytes(), b"\0"].concat(), FLAG_LAUNCHER);
        }
    }

    fn matcher(&mut self, matcher: &'a Matcher, server: u16, priority: u32) {
        let exe = matcher.exe.as_deref().map_or(0, |path| {
            let next = self.exes.len() as u32 + 1;
            let number = *self.exes.entry(path).or_insert(next);
            let key = exe_key(path);
            self.flags(KIND_EXE, key.clone(), 0);
            if let Some(entry) = self.entries.get_mut(&(KIND_EXE, key)) {
                entry.rule.exe = number;
            }
            number
        });
        match (&matcher.subject, &matcher.exe) {
            (None, Some(path)) => {
                let key = exe_key(path);
                self.server(KIND_EXE, &key, server, exe, priority, matcher);
                if matcher.sha256.is_some() {
                    self.flags(KIND_EXE, key, FLAG_HASHED);
                }
            }
            (None, None) => {}
            (Some(subject), _) => {
                for (kind, text) in keys(subject) {
                    self.server(kind, &text, server, exe, priority, matcher);
                }
            }
        }
    }

    /// In [`KIND_EXE`] `exe` is the number of the key itself, elsewhere a
    /// condition.
    fn server(&mut self, kind: u8, text: &[u8], server: u16, exe: u32, priority: u32, from: &'a Matcher) {
        self.flags(kind, text.to_vec(), 0);
        let Some(entry) = self.entries.get_mut(&(kind, text.to_vec())) else {
            let message = format!("longer than the {KEY_BYTES} bytes that the kernel compares");
            self.errors.push(Diagnostic::error(from.position, from.path.clone(), message));
            return;
        };
        let rule = &mut entry.rule;
        if rule.server == 0 {
            (rule.server, rule.exe, rule.priority) = (server, exe, priority);
            entry.from = Some(from);
            return;
        }
        if let Some(other) = entry.from.filter(|other| {
            kind == KIND_EXE && rule.server == server && other.sha256.is_some() != from.sha256.is_some()
        }) {
            let message = format!(
                "{} matches the same ({}), one of them whatever the file holds",
                other.path,
                show(kind, text)
            );
            self.errors.push(
                Diagnostic::error(from.position, from.path.clone(), message)
                    .help("give each a `sha256`, or none"),
            );
            return;
        }
        if rule.server == server && (rule.exe == exe || rule.exe == 0) {
            return;
        }
        if rule.server == server && exe == 0 {
            rule.exe = 0;
            return;
        }
        let other = entry.from.map_or("", |m| m.path.as_str());
        let shown = show(kind, text);
        let (message, help) = if rule.exe == exe {
            (
                format!("{other} matches the same ({shown})"),
                "tell them apart: `argv` takes several arguments that follow each other, such as the \
                 package and the directory behind it",
            )
        } else {
            (
                format!("{other} matches the same ({shown}) with another `exe`"),
                "the kernel keeps one executable for each; use `argv` with the script's whole path",
            )
        };
        // One complaint for each pair, not for each of a package's keys.
        if self.errors.last().is_none_or(|e| e.path != from.path) {
            self.errors.push(Diagnostic::error(from.position, from.path.clone(), message).help(help));
        }
    }

    /// The trie answers with the longest key only, so a longer key carries
    /// what a shorter one says, and the order of the file is kept.
    fn inherit(&mut self) {
        let mut around: Vec<(u8, Vec<u8>, ExecRule, Option<&'a Matcher>)> = Vec::new();
        for ((kind, text), entry) in &mut self.entries {
            while around.last().is_some_and(|(k, t, ..)| k != kind || !text.starts_with(t)) {
                around.pop();
            }
            if let Some((_, _, outer, outer_from)) = around.last() {
                entry.rule.flags |= outer.flags;
                if *kind != KIND_EXE && outer.server != 0 {
                    match shadow(outer, &entry.rule) {
                        Shadow::Keep => {}
                        Shadow::Replace => {
                            let flags = entry.rule.flags;
                            entry.rule = ExecRule { flags, ..*outer };
                            entry.from = *outer_from;
                        }
                        Shadow::Impossible => {
                            let from = entry.from.or(*outer_from);
                            let other = outer_from.map_or("", |m| m.path.as_str());
                            let message = format!(
                                "matches part of what {other} matches ({}), with another `exe`",
                                show(*kind, text)
                            );
                            let path = from.map_or(String::new(), |m| m.path.clone());
                            if self.errors.last().is_none_or(|e| e.path != path) {
                                self.errors.push(
                                    Diagnostic::error(from.and_then(|m| m.position), path, message)
                                        .help("give both the same `exe`, or none"),
                                );
                            }
                        }
                    }
                }
            }
            around.push((*kind, text.clone(), entry.rule, entry.from));
        }
    }
}

enum Shadow {
    /// The longer key's own rule is what the file means.
    Keep,
    /// The shorter key's rule decides here too.
    Replace,
    /// Which of them decides depends on the executable: two look-ups.
    Impossible,
}

fn shadow(outer: &ExecRule, inner: &ExecRule) -> Shadow {
    let outer_first = outer.priority < inner.priority;
    if inner.server == 0 {
        return Shadow::Replace;
    }
    match (outer.exe, inner.exe) {
        (0, _) if outer_first || outer.server == inner.server => Shadow::Replace,
        (0, 0) => Shadow::Keep,
        (o, i) if o == i => {
            if outer_first {
                Shadow::Replace
            } else {
                Shadow::Keep
            }
        }
        (_, 0) if !outer_first || outer.server == inner.server => Shadow::Keep,
        _ => Shadow::Impossible,
    }
}

fn show(kind: u8, text: &[u8]) -> String {
    if kind == KIND_EXE {
        let text = String::from_utf8_lossy(text);
        let parts: Vec<&str> = text.split('/').rev().skip(1).collect();
        return format!("`/{}`", parts.join("/"));
    }
    let whole = text.ends_with(b"\0");
    let text = String::from_utf8_lossy(text.strip_suffix(b"\0").unwrap_or(text)).replace('\0', " ");
    if whole { format!("`{text}`") } else { format!("`{text}…`") }
}
