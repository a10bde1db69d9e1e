//! What a program is called by those who run it: its package, its script, its
//! module, or its executable; and which files it comes from. Evidence, never an
//! identity.

use sha2::{Digest as _, Sha256};
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Longest name, bytes.
const NAME_MAX: usize = 128;

/// The name of a program by its executable and arguments. `resolve` follows one
/// symbolic link of a path, where there is one.
pub fn name(exe: &str, argv: &[String], resolve: impl Fn(&str) -> Option<String>) -> String {
    let mut named = interpreted(exe, argv, &resolve).unwrap_or_else(|| file(exe).to_owned());
    if named.is_empty() {
        named = argv.first().map(|a| file(a).to_owned()).unwrap_or_default();
    }
    // What a server wrote: one word for tables and files.
    named = named.chars().map(|c| if c.is_control() || c.is_whitespace() { '_' } else { c }).collect();
    if named.len() > NAME_MAX {
        let cut = (0..=NAME_MAX).rev().find(|i| named.is_char_boundary(*i)).unwrap_or(0);
        named.truncate(cut);
    }
    if named.is_empty() { "program".to_owned() } else { named }
}

/// Follows one link of the file system, as [`name`] asks for it.
pub fn link(path: &str) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    let target = Path::new(path).parent()?.join(target);
    Some(target.to_string_lossy().into_owned())
}

/// The files a program comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// As its package's metadata says; empty: there is none.
    pub version: String,
    /// SHA-256 of the script, or of the executable.
    pub entry_point: Option<[u8; 32]>,
}

/// Largest entry point that is hashed, bytes.
const ENTRY_MAX: u64 = 64 << 20;
/// Largest package.json that is read, bytes.
const METADATA_MAX: u64 = 1 << 20;

/// Reads what a program comes from. `cwd`: what relative paths begin at. May
/// touch file systems that hang: for a thread that nobody waits for.
pub fn origin(exe: &str, argv: &[String], cwd: &Path) -> Origin {
    let entry = match script(exe, argv) {
        Some(script) => cwd.join(script),
        None => PathBuf::from(exe),
    };
    let Ok(path) = fs::canonicalize(&entry) else { return Origin::default() };
    let version = npm_version(&path).or_else(|| python_version(&entry)).unwrap_or_default();
    Origin { version, entry_point: hash(&path).ok() }
}

/// A regular file and nothing else: no server makes the sensor wait for a FIFO.
fn open(path: &Path, limit: u64) -> io::Result<io::Take<File>> {
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() > limit {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(file.take(limit))
}

fn hash(path: &Path) -> io::Result<[u8; 32]> {
    let mut sha = Sha256::new();
    io::copy(&mut open(path, ENTRY_MAX)?, &mut sha)?;
    Ok(sha.finalize().into())
}

/// Of the package.json above a file, within its own package.
fn npm_version(path: &Path) -> Option<String> {
    const LEVELS: usize = 8;
    for folder in path.ancestors().skip(1).take(LEVELS) {
        if folder.file_name()? == "node_modules" {
            return None;
        }
        let mut text = Vec::new();
        if open(&folder.join("package.json"), METADATA_MAX).and_then(|mut f| f.read_to_end(&mut text)).is_ok()
            && let Ok(package) = serde_json::from_slice::<serde_json::Value>(&text)
            && let Some(version) = package.get("version").and_then(serde_json::Value::as_str)
        {
            return Some(version.to_owned());
        }
    }
    None
}

/// Of the `NAME-VERSION.dist-info` beside a console script's environment (PyPA,
/// recording installed projects).
fn python_version(script: &Path) -> Option<String> {
    let name = script.file_name()?.to_str()?.to_lowercase().replace(['-', '.'], "_");
    let lib = script.parent()?.parent()?.join("lib");
    for python in fs::read_dir(lib).ok()?.flatten().take(16) {
        let Ok(packages) = fs::read_dir(python.path().join("site-packages")) else { continue };
        for package in packages.flatten().take(10_000) {
            let file = package.file_name();
            let Some(stem) = file.to_str().and_then(|f| f.strip_suffix(".dist-info")) else { continue };
            if let Some((project, version)) = stem.rsplit_once('-')
                && project.to_lowercase().replace(['-', '.'], "_") == name
            {
                return Some(version.to_owned());
            }
        }
    }
    None
}

fn file(path: &str) -> &str {
    path.trim_end_matches(" (deleted)").rsplit('/').next().unwrap_or(path)
}

const INTERPRETERS: [&str; 9] = ["node", "nodejs", "bun", "deno", "python", "pypy", "ruby", "perl", "java"];

fn interpreter(exe: &str) -> Option<&str> {
    let stem = file(exe).trim_end_matches(|c: char| c.is_ascii_digit() || c == '.');
    INTERPRETERS.contains(&stem).then_some(stem)
}

/// What an interpreter was told to run.
enum Run<'a> {
    Module(&'a str),
    Script(&'a str),
}

fn run<'a>(interpreter: &str, argv: &'a [String]) -> Option<Run<'a>> {
    let mut arguments = argv.iter().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "-m" if interpreter.starts_with("py") => return arguments.next().map(|m| Run::Module(m)),
            "-c" | "-e" | "--eval" | "-p" => return None,
            "-jar" => {}
            // Options that take a word of their own.
            "-r" | "--require" | "--import" | "--loader" | "-W" | "-X" => {
                arguments.next();
            }
            flag if flag.starts_with('-') => {}
            "" => {}
            script => return Some(Run::Script(script)),
        }
    }
    None
}

fn script<'a>(exe: &str, argv: &'a [String]) -> Option<&'a str> {
    match run(interpreter(exe)?, argv)? {
        Run::Script(script) => Some(script),
        Run::Module(_) => None,
    }
}

fn interpreted(exe: &str, argv: &[String], resolve: &impl Fn(&str) -> Option<String>) -> Option<String> {
    let stem = interpreter(exe)?;
    // npx writes what it runs where its arguments were: "npm exec NAME@VERSION".
    if let Some(rest) = argv.first().and_then(|a| a.strip_prefix("npm exec ")) {
        return rest.split_ascii_whitespace().find(|w| !w.starts_with('-')).map(unversioned);
    }
    match run(stem, argv)? {
        Run::Module(module) => Some(module.trim_end_matches(".__main__").to_owned()),
        Run::Script(script) => Some(scripted(script, resolve)),
    }
}

/// `@scope/name@1.2.3` without the version.
fn unversioned(word: &str) -> String {
    match word.char_indices().skip(1).find(|(_, c)| *c == '@') {
        Some((at, _)) => word[..at].to_owned(),
        None => word.to_owned(),
    }
}

fn scripted(script: &str, resolve: &impl Fn(&str) -> Option<String>) -> String {
    if let Some(package) = package(script) {
        return package;
    }
    if script.contains("/.bin/")
        && let Some(package) = resolve(script).as_deref().and_then(package)
    {
        return package;
    }
    let name = file(script);
    let stem = name.split_once('.').map_or(name, |(stem, _)| stem);
    // A directory's name says more than these.
    if matches!(stem, "index" | "main" | "server" | "__main__" | "cli")
        && let Some(folder) = script
            .rsplit('/')
            .skip(1)
            .find(|f| !matches!(*f, "" | "." | ".." | "dist" | "build" | "src" | "lib" | "bin"))
    {
        return folder.to_owned();
    }
    if stem.is_empty() { name.to_owned() } else { stem.to_owned() }
}

/// The innermost package of a path below `node_modules`.
fn package(path: &str) -> Option<String> {
    let (_, inside) = path.rsplit_once("node_modules/")?;
    // As links in `.bin` lead there.
    let inside = inside.strip_prefix(".bin/../").unwrap_or(inside);
    let mut parts = inside.split('/');
    let first = parts.next().filter(|p| !p.is_empty() && !p.starts_with('.'))?;
    if first.starts_with('@') {
        return Some(format!("{first}/{}", parts.next()?));
    }
    Some(first.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn called(exe: &str, argv: &[&str]) -> String {
        let argv: Vec<String> = argv.iter().map(|a| (*a).to_owned()).collect();
        name(exe, &argv, |path| {
            (path == "/x/node_modules/.bin/mcp-server-everything").then(|| {
                "/x/node_modules/.bin/../@modelcontextprotocol/server-everything/dist/index.js".to_owned()
            })
        })
    }

    #[test]
    fn programs_are_called_as_people_know_them() {
        for (exe, argv, name) in [
            (
                "/usr/bin/node",
                &["node", "/x/node_modules/.bin/mcp-server-everything"][..],
                "@modelcontextprotocol/server-everything",
            ),
            ("/usr/bin/node", &["node", "/y/node_modules/.bin/other"], "other"),
            ("/usr/bin/node", &["node", "--no-warnings", "/p/node_modules/a/node_modules/b/x.js"], "b"),
            ("/usr/bin/node", &["npm exec @scope/thing@1.2.3", "", ""], "@scope/thing"),
            ("/v/bin/python3.11", &["python", "-m", "mcp_server_time"], "mcp_server_time"),
            ("/v/bin/python3.11", &["/v/bin/python3", "/v/bin/mcp-server-fetch"], "mcp-server-fetch"),
            ("/v/bin/python3", &["python3", "/srv/weather/src/server.py"], "weather"),
            ("/usr/bin/python3", &["python3", "-c", "print()"], "python3"),
            ("/opt/github-mcp-server (deleted)", &["x"], "github-mcp-server"),
            ("", &["/a/b"], "b"),
            ("", &[], "program"),
        ] {
            assert_eq!(called(exe, argv), name, "{exe} {argv:?}");
        }
    }

    #[test]
    fn a_program_comes_from_its_entry_point_and_its_package() {
        let dir = tempfile::tempdir().expect("dir");
        let at = |path: &str| dir.path().join(path);
        let put = |path: &str, text: &str| {
            fs::create_dir_all(at(path).parent().expect("parent")).expect("folder");
            fs::write(at(path), text).expect("file");
        };
        put("node_modules/a/dist/index.js", "run()");
        put("node_modules/a/package.json", r#"{"version": "1.2.3"}"#);
        put("venv/bin/mcp-server-x", "#!python");
        put("venv/lib/python3.11/site-packages/mcp_server_x-2026.1.2.dist-info/METADATA", "");
        let argv = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let node = origin("/usr/bin/node", &argv(&["node", "node_modules/a/dist/index.js"]), dir.path());
        assert_eq!(node.version, "1.2.3");
        assert_eq!(node.entry_point, Some(Sha256::digest("run()").into()));
        let python = origin("/usr/bin/python3.11", &argv(&["python3", "venv/bin/mcp-server-x"]), dir.path());
        assert_eq!(python.version, "2026.1.2");
        // What is no file is not waited for.
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).expect("fifo");
        let fifo = origin("/usr/bin/node", &argv(&["node", "fifo"]), dir.path());
        assert_eq!(fifo, Origin::default());
    }

    #[test]
    fn what_a_server_wrote_is_one_bounded_word() {
        let long = format!("/x/{}", "ä b".repeat(100));
        let name = called(&long, &[]);
        assert!(name.len() <= NAME_MAX && !name.contains(char::is_whitespace));
    }
}
