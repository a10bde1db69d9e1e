//! `match` entries: what may stand together, and the keys of the kernel's exec
//! trie that each of them becomes (`sensor_common::exec`).

use super::diagnostic::Position;
use super::file::RawMatch;
use super::model::{Matcher, Subject};
use super::parse::{Checker, at};
use sensor_common::exec::{
    ARGV_BYTES, KEY_BYTES, KIND_ARG, KIND_CGROUP, KIND_MODULE, KIND_PACKAGE, KIND_SCRIPT,
};
use serde_saphyr::Spanned;

/// `None`: refused, the checker says why.
pub fn check(
    checker: &mut Checker,
    raw: &RawMatch,
    path: String,
    place: Option<Position>,
) -> Option<Matcher> {
    let mut subjects: Vec<(&str, Subject, Option<Position>)> = Vec::new();
    let mut one = |key: &'static str, value: &Option<Spanned<String>>, make: fn(String) -> Subject| {
        if let Some(text) = value {
            subjects.push((key, make(text.value.clone()), at(text)));
        }
    };
    one("package", &raw.package, Subject::Package);
    one("script", &raw.script, Subject::Script);
    one("unit", &raw.unit, Subject::Unit);
    one("container", &raw.container, Subject::Container);
    one("image", &raw.image, Subject::Image);
    if let Some(argv) = &raw.argv {
        let arguments = argv.value.0.iter().map(|a| a.value.clone()).collect();
        subjects.push(("argv", Subject::Argv(arguments), at(argv)));
    }
    if subjects.len() > 1 {
        let keys: Vec<&str> = subjects.iter().map(|(key, ..)| *key).collect();
        let message = format!("`{}` cannot stand in one entry", keys.join("` and `"));
        checker.error(place, path, message).help = Some(
            "the kernel looks at one of them, with or without `exe`; entries of the list are alternatives"
                .to_owned(),
        );
        return None;
    }
    let exe = match &raw.exe {
        Some(exe) => match exe_path(&exe.value) {
            Ok(()) => Some(exe.value.clone()),
            Err(message) => {
                checker.error(at(exe), format!("{path}.exe"), message);
                return None;
            }
        },
        None => None,
    };
    let sha256 = match &raw.sha256 {
        Some(hash) => match file_hash(hash, exe.is_some(), subjects.first().map(|(key, ..)| *key)) {
            Ok(hash) => Some(hash),
            Err((message, help)) => {
                checker.error(at(hash), format!("{path}.sha256"), message).help = help;
                return None;
            }
        },
        None => None,
    };
    let subject = match subjects.pop() {
        None if exe.is_none() && raw.sha256.is_none() => {
            checker.error(place, path, "an entry that matches nothing").help =
                Some("name a package, script, argv, exe, unit, container or image".to_owned());
            return None;
        }
        None => None,
        Some((key, subject, position)) => {
            if let Err((message, help)) = check_subject(&subject) {
                checker.error(position, format!("{path}.{key}"), message).help = help;
                return None;
            }
            if exe.is_some() && matches!(subject, Subject::Unit(_) | Subject::Container(_)) {
                let message = format!("`exe` cannot be added to `{key}`");
                checker.error(place, path, message).help =
                    Some(format!("a {key} is recognised by its cgroup, whatever runs in it"));
                return None;
            }
            Some(subject)
        }
    };
    Some(Matcher { subject, exe, sha256, last: false, path, position: place })
}

type Complaint = (String, Option<String>);

fn file_hash(hash: &Spanned<String>, exe: bool, beside: Option<&str>) -> Result<[u8; 32], Complaint> {
    if let Some(key) = beside {
        let help = "the kernel compares the file it executes, which of a script is the interpreter";
        return Err((format!("`sha256` cannot be added to `{key}`"), Some(help.to_owned())));
    }
    if !exe {
        let help = "name the file: `{exe: /path, sha256: …}`".to_owned();
        return Err(("`sha256` without `exe`".to_owned(), Some(help)));
    }
    let mut bytes = [0; 32];
    hex::decode_to_slice(hash.value.as_bytes(), &mut bytes).map_err(|_| {
        let help = "64 hexadecimal digits, as `sha256sum FILE` prints them".to_owned();
        (format!("`{}` is no SHA-256", hash.value.escape_debug()), Some(help))
    })?;
    Ok(bytes)
}

fn check_subject(subject: &Subject) -> Result<(), Complaint> {
    let plain = |text: &str| -> Result<(), Complaint> {
        if text.is_empty() {
            return Err(("empty".to_owned(), None));
        }
        if text.chars().any(char::is_control) {
            return Err((format!("`{}` has a NUL or control character", text.escape_debug()), None));
        }
        Ok(())
    };
    match subject {
        Subject::Package(name) => {
            plain(name)?;
            package(name)
        }
        Subject::Script(name) => {
            plain(name)?;
            if name.contains('/') {
                let help = format!("write the file name alone, or `argv: \"{name}\"` for the whole path");
                return Err((format!("`{name}` is a path"), Some(help)));
            }
            fits(name.len() + 1)
        }
        Subject::Argv(arguments) => {
            if arguments.is_empty() || arguments.iter().all(String::is_empty) {
                return Err(("no argument".to_owned(), None));
            }
            if arguments.iter().any(|a| a.contains('\0')) {
                return Err(("an argument with NUL".to_owned(), None));
            }
            fits(arguments.iter().map(|a| a.len() + 1).sum())
        }
        Subject::Unit(name) => {
            plain(name)?;
            let kinds = [".service", ".scope", ".slice"];
            if name.contains('/') || !kinds.iter().any(|kind| name.ends_with(kind)) {
                let help = "a unit ends in `.service`, `.scope` or `.slice`".to_owned();
                return Err((format!("`{name}` is no unit"), Some(help)));
            }
            fits(name.len() + 1)
        }
        Subject::Container(id) => {
            let hex = id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
            if !hex || !(12..=64).contains(&id.len()) {
                let help = "12 to 64 lower-case hexadecimal digits, as `docker ps --no-trunc` prints them";
                return Err((format!("`{}` is no container id", id.escape_debug()), Some(help.to_owned())));
            }
            Ok(())
        }
        Subject::Image(name) => {
            plain(name)?;
            if name.contains(' ') || name.starts_with('-') {
                return Err((format!("`{name}` is no image"), None));
            }
            fits(name.len() + 1)
        }
    }
}

fn package(name: &str) -> Result<(), Complaint> {
    let (scope, rest) = match name.strip_prefix('@').map(|n| n.split_once('/')) {
        Some(Some((scope, rest))) => (Some(scope), rest),
        Some(None) => {
            return Err((
                format!("`{name}` is no package"),
                Some("a scoped package is `@scope/name`".to_owned()),
            ));
        }
        None => (None, name),
    };
    let good = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.~".contains(&b))
            && !part.starts_with('.')
            && !part.starts_with('-')
    };
    if !good(rest) || !scope.is_none_or(good) {
        let bare = name.char_indices().skip(1).find(|(_, c)| "@=<>[!~".contains(*c)).map(|(i, _)| &name[..i]);
        let help = match bare {
            Some(bare) => format!("write the name without version or extras: `{bare}`"),
            None => "the name as npm or PyPI spells it, without version".to_owned(),
        };
        return Err((format!("`{name}` is no package name"), Some(help)));
    }
    fits("--package=".len() + name.len() + 3)
}

fn fits(length: usize) -> Result<(), Complaint> {
    if length > KEY_BYTES {
        let message = format!("{length} bytes; the kernel compares at most {KEY_BYTES}");
        let help =
            format!("match on something shorter (of a command line, the first {ARGV_BYTES} bytes are seen)");
        return Err((message, Some(help)));
    }
    Ok(())
}

fn exe_path(path: &str) -> Result<(), String> {
    if !path.starts_with('/') || path.len() < 2 || path.ends_with('/') {
        return Err(format!("`{}` is not the absolute path of a file", path.escape_debug()));
    }
    if path.chars().any(char::is_control) || path.contains('*') {
        return Err(format!("`{}` has a NUL, a control character or `*`", path.escape_debug()));
    }
    if path[1..].split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Err(format!("`{path}`: write the path without `.`, `..` and `//`"));
    }
    if path.len() + 1 > KEY_BYTES {
        return Err(format!("longer than {} bytes", KEY_BYTES - 1));
    }
    Ok(())
}

/// Keys (kind, text) that recognise a subject. A text that ends in NUL is a
/// whole argument or name, any other a prefix.
pub fn keys(subject: &Subject) -> Vec<(u8, Vec<u8>)> {
    match subject {
        Subject::Package(name) => package_keys(name),
        Subject::Script(name) => vec![(KIND_SCRIPT, whole(name))],
        Subject::Argv(arguments) => {
            vec![(KIND_ARG, arguments.iter().flat_map(|a| whole(a)).collect())]
        }
        Subject::Unit(name) => vec![(KIND_CGROUP, whole(name))],
        Subject::Container(id) => ["", "docker-", "libpod-", "nerdctl-", "cri-containerd-", "crio-"]
            .into_iter()
            .map(|prefix| (KIND_CGROUP, format!("{prefix}{id}").into_bytes()))
            .collect(),
        Subject::Image(name) => {
            let mut keys = vec![(KIND_PACKAGE, whole(name))];
            // An image that says its tag or digest says all.
            let last = name.rsplit('/').next().unwrap_or(name);
            if !last.contains([':', '@']) {
                keys.push((KIND_PACKAGE, format!("{name}:").into_bytes()));
                keys.push((KIND_PACKAGE, format!("{name}@").into_bytes()));
            }
            keys
        }
    }
}

fn whole(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// What may follow a package's name: nothing, an npm version, a PEP 508 one.
const NPM: [&str; 2] = ["\0", "@"];
const PYPI: [&str; 9] = ["\0", "@", "==", "[", ">", "<", "~", "!", " "];
/// The spellings that one meets (PEP 503 makes `-`, `_` and `.` the same).
const PYPI_COMMON: [&str; 4] = ["\0", "@", "==", "["];

/// A package as npx, bunx, uvx, pipx, deno name it; its files below
/// `node_modules`; and for a name without scope what Python makes of it: the
/// console script of that name, which is all that uvx's child shows, and
/// `-m module`.
fn package_keys(name: &str) -> Vec<(u8, Vec<u8>)> {
    let mut keys = vec![(KIND_MODULE, format!("{name}/").into_bytes())];
    let mut add = |prefix: &str, name: &str, suffixes: &[&str]| {
        keys.extend(suffixes.iter().map(|s| (KIND_PACKAGE, format!("{prefix}{name}{s}").into_bytes())));
    };
    for prefix in ["--package=", "-p=", "npm:"] {
        add(prefix, name, &NPM);
    }
    if name.starts_with('@') {
        add("", name, &NPM);
        return keys;
    }
    for prefix in ["", "--from=", "--spec="] {
        add(prefix, name, &PYPI);
    }
    let mut spellings = vec![name.to_owned()];
    for separator in ["-", "_", "."] {
        for case in [name.to_owned(), name.to_ascii_lowercase()] {
            let spelling = case.replace(['-', '_', '.'], separator);
            if !spellings.contains(&spelling) {
                add("", &spelling, &PYPI_COMMON);
                spellings.push(spelling);
            }
        }
    }
    keys.extend(spellings.iter().map(|s| (KIND_SCRIPT, whole(s))));
    let module = name.to_ascii_lowercase().replace(['-', '.'], "_");
    keys.push((KIND_ARG, [whole("-m"), whole(&module)].concat()));
    keys
}

/// An executable's path as the kernel walks it: file name first, then each
/// directory up to the root (`/usr/bin/node` is `node/bin/usr/`), and NUL.
pub fn exe_key(path: &str) -> Vec<u8> {
    let mut key = Vec::with_capacity(path.len() + 1);
    for part in path.split('/').rev().filter(|part| !part.is_empty()) {
        key.extend_from_slice(part.as_bytes());
        key.push(b'/');
    }
    key.push(0);
    key
}
