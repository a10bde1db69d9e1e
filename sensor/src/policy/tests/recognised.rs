//! What the exec trie recognises, walked as the kernel walks it.

use super::*;
use crate::policy::recognise::Recogniser;
use proptest::prelude::*;
use sensor_common::exec::Match;

struct Trie<'a>(Recogniser<'a>);

impl Trie<'_> {
    fn of(compiled: &Compiled) -> Trie<'_> {
        Trie(Recogniser::new(compiled))
    }

    fn exec(&self, exe: &str, argv: &[&str], cgroups: &[&str]) -> Match {
        let bytes: Vec<u8> = argv.iter().flat_map(|a| a.bytes().chain([0])).collect();
        self.0.recognise(exe, &bytes, cgroups.iter().copied())
    }

    fn server(&self, exe: &str, argv: &[&str]) -> u16 {
        self.exec(exe, argv, &[]).server
    }
}

/// One server per entry, ids from 2.
fn servers(matches: &[&str]) -> Result<Compiled, Vec<Diagnostic>> {
    let entry = |(i, m): (usize, &&str)| format!("  - {{name: s{i}, profile: none, match: [{m}]}}\n");
    let text: String = matches.iter().enumerate().map(entry).collect();
    try_compiled(&format!("version: 1\nservers:\n{text}"))
}

#[test]
fn an_npm_package_is_known_however_it_is_started() {
    let c = servers(&[r#"{package: "@modelcontextprotocol/server-github"}"#]).unwrap();
    let trie = Trie::of(&c);
    let node = "/usr/bin/node";
    for argv in [
        &["node", "/usr/local/bin/npx", "-y", "@modelcontextprotocol/server-github"][..],
        &["node", "/usr/bin/npx", "@modelcontextprotocol/server-github@2026.8.31", "--x"],
        &["node", "/usr/lib/node_modules/npm/bin/npm-cli.js", "exec", "@modelcontextprotocol/server-github"],
        &["node", "/usr/bin/npx", "--package=@modelcontextprotocol/server-github@1", "mcp-server-github"],
        &["node", "/srv/node_modules/@modelcontextprotocol/server-github/dist/index.js"],
        &["node", "--no-warnings", "/a/node_modules/b/node_modules/@modelcontextprotocol/server-github/i.js"],
    ] {
        assert_eq!(trie.server(node, argv), 2, "{argv:?}");
    }
    assert_eq!(trie.server("/opt/bun/bin/bun", &["bun", "x", "@modelcontextprotocol/server-github"]), 2);
    assert_eq!(trie.server("/usr/bin/deno", &["deno", "run", "npm:@modelcontextprotocol/server-github"]), 2);
    for argv in [
        &["node", "/usr/bin/npm", "install", "@modelcontextprotocol/server-github"][..],
        &["node", "/usr/bin/npx", "@modelcontextprotocol/server-github-evil"],
        &["node", "/srv/node_modules/@modelcontextprotocol/server-github-evil/index.js"],
        &["node", "/srv/app.js", "@modelcontextprotocol/server-github"],
    ] {
        assert_eq!(trie.server(node, argv), 0, "{argv:?}");
    }
    assert_eq!(trie.server("/usr/bin/cat", &["cat", "@modelcontextprotocol/server-github"]), 0);
}

#[test]
fn a_pypi_package_is_known_however_it_is_started() {
    let c = servers(&["{package: mcp-server-fetch}"]).unwrap();
    let trie = Trie::of(&c);
    for (exe, argv) in [
        ("/usr/local/bin/uvx", &["uvx", "mcp-server-fetch"][..]),
        ("/usr/local/bin/uv", &["uv", "tool", "uvx", "mcp-server-fetch@latest"]),
        ("/home/u/.local/bin/uvx", &["uvx", "--from=mcp-server-fetch==1.0", "mcp-server-fetch"]),
        ("/usr/bin/uvx", &["uvx", "--from", "mcp_server_fetch[extra]>=1", "x"]),
        ("/usr/bin/python3.11", &["python", "/home/u/.cache/uv/archive-v0/x/bin/mcp-server-fetch", "--flag"]),
        ("/usr/bin/python3.11", &["/v/bin/python3", "/v/bin/mcp-server-fetch"]),
        ("/usr/bin/python3.11", &["python", "-m", "mcp_server_fetch", "--x"]),
        ("/usr/bin/python3.11", &["python3", "/usr/bin/pipx", "run", "mcp-server-fetch"]),
    ] {
        assert_eq!(trie.server(exe, argv), 2, "{argv:?}");
    }
    for (exe, argv) in [
        ("/usr/bin/uv", &["uv", "tool", "install", "mcp-server-fetch"][..]),
        ("/usr/bin/python3.11", &["python", "/srv/other.py", "/v/bin/mcp-server-fetch"]),
        ("/usr/bin/uvx", &["uvx", "mcp-server-fetcher"]),
    ] {
        assert_eq!(trie.server(exe, argv), 0, "{argv:?}");
    }
}

#[test]
fn images_containers_units_scripts_and_arguments() {
    let c = servers(&[
        "{image: mcp/time}",
        "{container: 0123456789ab}",
        "{unit: notes.service}",
        "{script: server.py}",
        "{argv: [--root, /data/a]}",
        "{exe: /usr/bin/notes-mcp}",
        "{image: \"mcp/pinned:2\"}",
    ])
    .unwrap();
    let trie = Trie::of(&c);
    let docker = |image| trie.server("/usr/bin/docker", &["docker", "run", "-i", "--rm", image]);
    assert_eq!((docker("mcp/time"), docker("mcp/time:1.2"), docker("mcp/timer")), (2, 2, 0));
    assert_eq!((docker("mcp/pinned:2"), docker("mcp/pinned:3"), docker("mcp/pinned")), (8, 0, 0));
    assert_eq!(trie.server("/usr/bin/docker", &["docker", "pull", "mcp/time"]), 0);
    let cgroup = |name: &str| trie.exec("/app", &["app"], &[name]).server;
    let id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    assert_eq!(cgroup(&format!("docker-{id}.scope")), 3);
    assert_eq!(cgroup(&format!("cri-containerd-{id}.scope")), 3);
    assert_eq!(cgroup(id), 3);
    assert_eq!((cgroup("notes.service"), cgroup("notes.service.d"), cgroup("xnotes.service")), (4, 0, 0));
    assert_eq!(trie.server("/usr/bin/python3", &["python3", "-u", "/srv/server.py"]), 5);
    assert_eq!(trie.server("/usr/bin/vi", &["vi", "/srv/server.py"]), 0);
    assert_eq!(trie.server("/srv/x", &["x", "-v", "--root", "/data/a"]), 6);
    assert_eq!(trie.server("/srv/x", &["x", "--root", "/data/ab"]), 0);
    assert_eq!(trie.server("/srv/x", &["--root", "/data/a"]), 0, "argv[0] is not looked at");
    assert_eq!((trie.server("/usr/bin/notes-mcp", &["n"]), trie.server("/bin/notes-mcp", &["n"])), (7, 0));
}

#[test]
fn an_exe_condition_holds_and_keeps_what_the_name_says() {
    let c = servers(&[
        "{exe: /opt/py/bin/python3, script: server.py}",
        "{exe: /opt/node/bin/node, package: pkg}",
    ])
    .unwrap();
    let trie = Trie::of(&c);
    assert_eq!(trie.server("/opt/py/bin/python3", &["python3", "/srv/server.py"]), 2);
    assert_eq!(trie.server("/usr/bin/python3", &["python3", "/srv/server.py"]), 0);
    // An interpreter by name stays one when its path is named, too.
    assert_eq!(trie.server("/opt/node/bin/node", &["node", "/usr/bin/npx", "pkg"]), 3);
    assert_eq!(trie.server("/opt/node/bin/node", &["node", "/x.js"]), 0);
}

#[test]
fn the_first_in_the_file_wins_over_a_longer_key() {
    let first = r#"{argv: [serve]}"#;
    let longer = r#"{argv: [serve, --root, /data]}"#;
    let argv = ["x", "serve", "--root", "/data"];
    let of = |matches: &[&str]| Trie::of(&servers(matches).unwrap()).server("/x", &argv);
    assert_eq!(of(&[first, longer]), 2);
    assert_eq!(of(&[longer, first]), 2);
    let c = servers(&[longer, first]).unwrap();
    assert_eq!(Trie::of(&c).server("/x", &["x", "serve", "--root", "/other"]), 3);
}

#[test]
fn what_the_kernel_cannot_tell_apart_is_refused_with_both_places() {
    for (matches, message) in [
        (["{package: pkg}", "{package: pkg}"], "servers[0].match[0] matches the same (`pkg"),
        (["{package: pkg}", "{script: pkg}"], "servers[0].match[0] matches the same (`pkg`)"),
        (["{exe: /a, script: s}", "{exe: /b, script: s}"], "matches the same (`s`) with another `exe`"),
        (["{exe: /a, script: s}", "{script: s}"], "matches the same (`s`) with another `exe`"),
        (["{argv: [a]}", "{argv: [a, b], exe: /x}"], ""),
        (["{argv: [a, b], exe: /x}", "{argv: [a]}"], "matches part of what servers[1].match[0]"),
        (["{argv: [a], exe: /x}", "{argv: [a, b]}"], "matches part of what servers[0].match[0]"),
        (["{exe: /a}", "{exe: /a}"], "servers[0].match[0] matches the same (`/a`)"),
    ] {
        let result = servers(&matches);
        if message.is_empty() {
            assert!(result.is_ok(), "{matches:?}");
            continue;
        }
        let found = result.expect_err(message);
        assert!(found.iter().any(|f| f.message.contains(message)), "{matches:?} {found:?}");
        assert!(found.iter().all(|f| f.position.is_some() && f.help.is_some()), "{found:?}");
    }
}

#[test]
fn one_server_may_say_the_same_twice() {
    let c = servers(&["{package: pkg}, {script: pkg}, {exe: /a, script: pkg}, {package: pkg}"]).unwrap();
    assert_eq!(Trie::of(&c).server("/usr/bin/python3", &["python3", "/v/bin/pkg"]), 2);
}

#[test]
fn bad_matches_are_refused() {
    for entry in [
        "{package: a, script: b}",
        "{package: \"a@1.0\"}",
        "{package: \"@scope\"}",
        "{package: \"a b\"}",
        "{package: \"\"}",
        "{script: /srv/server.py}",
        "{argv: []}",
        "{argv: [\"\"]}",
        "{argv: \"a\\0b\"}",
        "{exe: node}",
        "{exe: /usr/../bin/node}",
        "{exe: /usr/bin/}",
        "{exe: \"/usr/bin/*\"}",
        "{unit: notes}",
        "{unit: /a/notes.service}",
        "{container: abc}",
        "{container: 0123456789AB}",
        "{container: notes-container}",
        "{image: \"a b\"}",
        "{sha256: abc}",
        "{unit: a.service, container: 0123456789ab}",
    ] {
        assert!(servers(&[entry]).is_err(), "{entry}");
    }
    let long = format!("{{argv: [{}]}}", vec!["abcdefghij"; 23].join(", "));
    assert!(servers(&[long.as_str()]).unwrap_err()[0].message.contains("at most 251"));
}

#[test]
fn only_launchers_of_the_host_keep_the_launcher_role() {
    let launchers = crate::policy::launchers::Launchers {
        programs: ["/usr/bin/uvx".to_owned()].into(),
        interpreters: ["/usr/bin/node".to_owned()].into(),
        scripts: ["/usr/bin/npx".to_owned()].into(),
    };
    let policy =
        parse_bytes(b"version: 1\nservers: [{name: a, profile: none, match: [{package: p}]}]").unwrap();
    let c = compile(&policy, &Host { launchers, ..Host::default() }, &mut Ids::default()).unwrap();
    let trie = Trie::of(&c);
    let file = |exe: &str, argv: &[&str]| trie.exec(exe, argv, &[]).launcher_file;
    assert_eq!(file("/usr/bin/uvx", &["uvx", "p"]), 1);
    assert_eq!(file("/tmp/uvx", &["uvx", "p"]), 0);
    assert_eq!(file("/usr/bin/node", &["node", "/usr/bin/npx", "p"]), 1);
    assert_eq!(file("/usr/bin/node", &["node", "/tmp/npx", "p"]), 0);
    assert_eq!(file("/usr/bin/node", &["node", "/srv/server.js"]), 0);
    assert_eq!(
        c.matchers[trie.exec("/usr/bin/uvx", &["uvx", "p"], &[]).priority as usize].evidence,
        "package: p"
    );
    // Recognised all the same.
    assert_eq!(trie.server("/tmp/uvx", &["uvx", "p"]), 2);
    assert_eq!(trie.server("/usr/bin/uvx", &["uvx", "p"]), 2);
}

/// (executable, arguments that follow each other) of one server.
type Rule = (Option<&'static str>, Vec<&'static str>);

fn any_rule() -> impl Strategy<Value = Rule> {
    let exe = prop::sample::select(vec![None, None, Some("/x"), Some("/y")]);
    (exe, prop::collection::vec(prop::sample::select(vec!["a", "b", "ab"]), 1..4))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// Longest match in the trie or not: the first rule of the file that holds
    /// decides. What the trie cannot hold is refused, never half taken.
    #[test]
    fn the_first_rule_that_holds_decides(
        rules in prop::collection::vec(any_rule(), 1..5),
        execs in prop::collection::vec(
            (
                prop::sample::select(vec!["/x", "/y", "/z"]),
                prop::collection::vec(prop::sample::select(vec!["a", "b", "ab", "abc"]), 0..6),
            ),
            1..20,
        ),
    ) {
        let entry = |(exe, argv): &Rule| {
            let exe = exe.map(|e| format!("exe: {e}, ")).unwrap_or_default();
            format!("{{{exe}argv: [{}]}}", argv.join(", "))
        };
        let entries: Vec<String> = rules.iter().map(entry).collect();
        let entries: Vec<&str> = entries.iter().map(String::as_str).collect();
        let Ok(c) = servers(&entries) else { return Ok(()) };
        let trie = Trie::of(&c);
        for (exe, arguments) in &execs {
            let holds = |(wanted, argv): &Rule| {
                wanted.is_none_or(|w| w == *exe) && arguments.windows(argv.len()).any(|w| w == argv.as_slice())
            };
            let expected = rules.iter().position(holds).map_or(0, |index| index as u16 + 2);
            let argv: Vec<&str> = std::iter::once("argv0").chain(arguments.iter().copied()).collect();
            prop_assert_eq!(trie.server(exe, &argv), expected, "{:?} {:?} {:?}", rules, exe, argv);
        }
    }
}

fn one_server(matches: &str) -> String {
    format!("version: 1\nservers:\n  - name: a\n    profile: none\n    match: [{matches}]\n")
}

const HASH: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

#[test]
fn a_hash_stands_beside_an_executable_alone() {
    for (entry, message) in [
        (format!("{{sha256: {HASH}}}"), "without `exe`"),
        (format!("{{sha256: {HASH}, package: x}}"), "cannot be added to `package`"),
        (format!("{{sha256: {HASH}, exe: /usr/bin/node, script: server.js}}"), "cannot be added to `script`"),
        (format!("{{sha256: {HASH}, unit: x.service}}"), "cannot be added to `unit`"),
        ("{sha256: abc, exe: /usr/bin/node}".to_owned(), "`abc` is no SHA-256"),
        (format!("{{sha256: {HASH}00, exe: /usr/bin/node}}"), "is no SHA-256"),
        (format!("{{sha256: {}, exe: /usr/bin/node}}", HASH.replace('e', "g")), "is no SHA-256"),
    ] {
        let found = errors(&one_server(&entry));
        assert_eq!(found.len(), 1, "{entry}: {found:?}");
        assert!(found[0].message.contains(message), "{entry}: {found:?}");
        assert_eq!(found[0].path, "servers[0].match[0].sha256");
        let position = found[0].position.expect("a position");
        let column = "    match: [".len() + entry.find("sha256: ").expect("a hash") + "sha256: ".len() + 1;
        assert_eq!((position.line, position.column), (5, column as u32), "{entry}");
    }
}

#[test]
fn versions_of_a_file_are_hashes_of_one_rule() {
    use sensor_common::policy::{SERVER_HASHED, Server};
    let other = "F".repeat(64);
    let c = compiled(&one_server(&format!(
        "{{exe: /opt/a, sha256: {HASH}}}, {{exe: /opt/a, sha256: {other}}}, {{exe: /opt/b}}, {{argv: mcp-a}}"
    )));
    assert_eq!(c.hashes.len(), 1);
    assert_eq!((c.hashes[0].exe.as_str(), c.hashes[0].name.as_str()), ("/opt/a", "a"));
    assert_eq!(c.hashes[0].sha256.iter().map(hex::encode).collect::<Vec<_>>(), [HASH, &"f".repeat(64)]);
    let (_, _, Server { flags, .. }) = c.servers[1];
    assert_eq!(flags, SERVER_HASHED);
    let trie = Trie::of(&c);
    let hashed = |exe: &str, argv: &[&str]| {
        let m = trie.exec(exe, argv, &[]);
        (m.server, m.hashed, c.matchers.get(m.priority as usize).map(|m| m.hashed))
    };
    assert_eq!(hashed("/opt/a", &["a"]), (2, 1, Some(true)));
    assert_eq!(hashed("/opt/a", &["a", "mcp-a"]), (2, 1, Some(true)), "the first in the file decides");
    assert_eq!(hashed("/opt/b", &["b"]), (2, 0, Some(false)));
    assert_eq!(hashed("/bin/x", &["x", "mcp-a"]), (2, 0, Some(false)));
    assert_eq!(c.matchers[0].evidence, "exe: /opt/a, sha256");
}

#[test]
fn one_file_with_and_without_a_hash_is_refused() {
    for (first, second) in [
        (format!("{{exe: /opt/a, sha256: {HASH}}}"), "{exe: /opt/a}".to_owned()),
        ("{exe: /opt/a}".to_owned(), format!("{{exe: /opt/a, sha256: {HASH}}}")),
    ] {
        let found = errors(&one_server(&format!("{first}, {second}")));
        assert!(found[0].message.contains("whatever the file holds"), "{found:?}");
        assert_eq!((found.len(), found[0].path.as_str()), (1, "servers[0].match[1]"));
    }
    let entry = |name: &str| {
        format!("  - {{name: {name}, profile: none, match: [{{exe: /opt/a, sha256: {HASH}}}]}}\n")
    };
    let found = errors(&format!("version: 1\nservers:\n{}{}", entry("a"), entry("b")));
    assert!(found[0].message.contains("matches the same"), "{found:?}");
}
