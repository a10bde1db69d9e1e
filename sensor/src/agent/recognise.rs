//! The exec rules of a policy, applied by the agent: to processes that ran
//! before it, and to say by what an exec was recognised. The same steps as
//! `sensor-ebpf/src/exec.rs`, over the same keys.

use crate::policy::compile::Compiled;
use crate::policy::matching::exe_key;
use sensor_common::exec::{
    ExecRule, KIND_ARG, KIND_CGROUP, KIND_EXE, KIND_MODULE, KIND_PACKAGE, KIND_SCRIPT, KIND_SCRIPT_PATH,
    KIND_WORD, Match, Scan, Step,
};
use std::collections::{BTreeSet, HashMap};

pub struct Recogniser {
    keys: HashMap<(u8, Vec<u8>), ExecRule>,
    /// Lengths in use, per kind.
    lengths: HashMap<u8, BTreeSet<usize>>,
}

/// What was found, and by what.
#[derive(Clone, Debug)]
pub struct Recognised {
    pub found: Match,
    pub evidence: String,
}

impl Recogniser {
    pub fn new(compiled: &Compiled) -> Recogniser {
        let mut keys = HashMap::with_capacity(compiled.exec.len());
        let mut lengths: HashMap<u8, BTreeSet<usize>> = HashMap::new();
        for entry in &compiled.exec {
            lengths.entry(entry.kind).or_default().insert(entry.text.len());
            keys.insert((entry.kind, entry.text.clone()), entry.rule);
        }
        Recogniser { keys, lengths }
    }

    fn lookup(&self, kind: u8, text: &[u8]) -> Option<(&ExecRule, &[u8])> {
        let lengths = self.lengths.get(&kind)?;
        lengths.range(..=text.len()).rev().find_map(|len| {
            let ((_, key), rule) = self.keys.get_key_value(&(kind, text[..*len].to_vec()))?;
            Some((rule, key.as_slice()))
        })
    }

    /// `argv` holds a NUL after each argument, `cgroups` names from the
    /// innermost out.
    pub fn recognise(&self, exe: &str, argv: &[u8], cgroups: &[String]) -> Recognised {
        let mut found = Match::NONE;
        let mut evidence = String::new();
        let mut word_seen = false;
        let mut note = |before: u16, after: &Match, kind: &str, key: &[u8]| {
            if after.server != before {
                let text = String::from_utf8_lossy(key).replace('\0', " ");
                evidence = format!("{kind}: {}", text.trim_end_matches([' ', '@', '=', '/']));
            }
        };
        if let Some((rule, key)) = self.lookup(KIND_EXE, &exe_key(exe)) {
            found.exe(rule);
            let text = crate::kernel::record::path_from_leaf(key.strip_suffix(&[0]).unwrap_or(key));
            note(0, &found, "exe", text.as_bytes());
        }
        let mut scan = Scan::default();
        for (at, byte) in argv.iter().enumerate() {
            let Step::Argument { start, base, module, script } = scan.step(at as u32, *byte) else {
                continue;
            };
            let (start, base, module) = (&argv[start as usize..], &argv[base as usize..], module as usize);
            let before = found.server;
            if let Some((rule, key)) = self.lookup(KIND_ARG, start) {
                found.other(rule);
                note(before, &found, "argv", key);
            }
            let before = found.server;
            if found.interpreter != 0 && script {
                if let Some((rule, key)) = self.lookup(KIND_SCRIPT, base) {
                    found.script(rule);
                    note(before, &found, "script", key);
                }
                if let Some((rule, _)) = self.lookup(KIND_SCRIPT_PATH, start) {
                    found.script_path(rule);
                }
                let before = found.server;
                if module != 0
                    && let Some((rule, key)) = self.lookup(KIND_MODULE, &argv[module..])
                {
                    found.other(rule);
                    note(before, &found, "package", key);
                }
            } else if found.launcher_like != 0 {
                if found.needs_word != 0 && !word_seen {
                    word_seen = self.lookup(KIND_WORD, start).is_some();
                } else if let Some((rule, key)) = self.lookup(KIND_PACKAGE, start) {
                    found.other(rule);
                    note(before, &found, "package", key);
                }
            }
        }
        if found.server == 0 {
            for name in cgroups {
                let mut text = name.clone().into_bytes();
                text.push(0);
                if let Some((rule, key)) = self.lookup(KIND_CGROUP, &text) {
                    found.other(rule);
                    note(0, &found, "cgroup", key);
                    break;
                }
            }
        }
        Recognised { found, evidence }
    }
}

/// Names of the cgroups of /proc/PID/cgroup, innermost first.
pub fn cgroup_names(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    for line in text.lines() {
        let Some(path) = line.splitn(3, ':').nth(2) else { continue };
        names.extend(path.rsplit('/').filter(|n| !n.is_empty()).map(str::to_owned));
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::compile::Ids;
    use crate::policy::load::from_bytes;
    use std::path::Path;

    fn recogniser(yaml: &str) -> (Recogniser, Ids) {
        let mut ids = Ids::default();
        let loaded = from_bytes(yaml.as_bytes(), Path::new("/p.yaml"), &mut ids).expect("policy");
        (Recogniser::new(&loaded.compiled), ids)
    }

    const POLICY: &str = "version: 1
servers:
  - {name: github, profile: none, match: [{package: '@modelcontextprotocol/server-github'}]}
  - {name: fetch, profile: none, match: [{package: mcp-server-fetch}]}
  - {name: time, profile: none, match: [{argv: [-m, mcp_server_time]}]}
  - {name: unit, profile: none, match: [{unit: foo.service}]}
";

    #[test]
    fn real_command_lines_are_recognised() {
        let (r, ids) = recogniser(POLICY);
        let server = |exe: &str, argv: &[u8]| r.recognise(exe, argv, &[]).found.server;
        let id = |name: &str| ids.get(name).expect("id");
        let node = "/usr/bin/node";
        assert_eq!(
            server(node, b"node\0/usr/bin/npx\0-y\0@modelcontextprotocol/server-github@1.2\0"),
            id("github")
        );
        assert_eq!(
            server(node, b"npm exec @modelcontextprotocol/server-github\0\0"),
            0,
            "a rewritten title is no exec"
        );
        assert_eq!(
            server(node, b"node\0/x/node_modules/@modelcontextprotocol/server-github/dist/index.js\0"),
            id("github")
        );
        assert_eq!(server("/root/.local/bin/uvx", b"uvx\0mcp-server-fetch==1.0\0"), id("fetch"));
        assert_eq!(server("/v/bin/python3", b"/v/bin/python3\0/v/bin/mcp-server-fetch\0"), id("fetch"));
        assert_eq!(server("/usr/bin/python3", b"python3\0-m\0mcp_server_time\0--x\0"), id("time"));
        assert_eq!(server("/usr/bin/grep", b"grep\0mcp-server-fetch\0f\0"), 0, "an argument is not a server");
        assert_eq!(
            server("/usr/bin/uv", b"uv\0pip\0install\0mcp-server-fetch\0"),
            0,
            "installing is not running"
        );
        let unit = r.recognise("/x", b"x\0", &["foo.service".into()]);
        assert_eq!((unit.found.server, unit.evidence.as_str()), (id("unit"), "cgroup: foo.service"));
    }

    #[test]
    fn cgroups_from_the_inside_out() {
        assert_eq!(cgroup_names("0::/a/b\n8:pids:/c\n"), ["b", "a", "c"]);
    }
}
