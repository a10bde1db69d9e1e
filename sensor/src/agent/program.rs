//! What a program is called by those who run it: its package, its script, its
//! module, or its executable. Evidence, never an identity.

use std::fs;
use std::path::Path;

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

fn file(path: &str) -> &str {
    path.trim_end_matches(" (deleted)").rsplit('/').next().unwrap_or(path)
}

const INTERPRETERS: [&str; 9] = ["node", "nodejs", "bun", "deno", "python", "pypy", "ruby", "perl", "java"];

fn interpreted(exe: &str, argv: &[String], resolve: &impl Fn(&str) -> Option<String>) -> Option<String> {
    let own = file(exe);
    let stem = own.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.');
    if !INTERPRETERS.contains(&stem) {
        return None;
    }
    // npx writes what it runs where its arguments were: "npm exec NAME@VERSION".
    if let Some(rest) = argv.first().and_then(|a| a.strip_prefix("npm exec ")) {
        return rest.split_ascii_whitespace().find(|w| !w.starts_with('-')).map(unversioned);
    }
    let mut arguments = argv.iter().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "-m" if stem.starts_with("py") => {
                return arguments.next().map(|m| m.trim_end_matches(".__main__").to_owned());
            }
            "-c" | "-e" | "--eval" | "-p" => return None,
            "-jar" => continue,
            // Options that take a word of their own.
            "-r" | "--require" | "--import" | "--loader" | "-W" | "-X" => {
                arguments.next();
            }
            flag if flag.starts_with('-') => {}
            "" => {}
            script => return Some(scripted(script, resolve)),
        }
    }
    None
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
    fn what_a_server_wrote_is_one_bounded_word() {
        let long = format!("/x/{}", "ä b".repeat(100));
        let name = called(&long, &[]);
        assert!(name.len() <= NAME_MAX && !name.contains(char::is_whitespace));
    }
}
