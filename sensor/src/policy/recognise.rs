//! The exec trie walked in user space, as the kernel walks it: for programs
//! that ran before the sensor did, and for tests.

use super::compile::Compiled;
use super::matching::exe_key;
use sensor_common::exec::{
    ARGV_BYTES, ExecRule, KIND_ARG, KIND_CGROUP, KIND_EXE, KIND_MODULE, KIND_PACKAGE, KIND_SCRIPT,
    KIND_SCRIPT_PATH, KIND_WORD, Match, Scan, Step,
};
use std::collections::{BTreeSet, HashMap};

/// Keys by kind and text; the lengths that occur, longest first.
pub struct Recogniser<'a> {
    keys: HashMap<(u8, &'a [u8]), ExecRule>,
    lengths: HashMap<u8, Vec<usize>>,
}

impl<'a> Recogniser<'a> {
    pub fn new(compiled: &'a Compiled) -> Recogniser<'a> {
        let mut lengths: HashMap<u8, BTreeSet<usize>> = HashMap::new();
        for entry in &compiled.exec {
            lengths.entry(entry.kind).or_default().insert(entry.text.len());
        }
        Recogniser {
            keys: compiled.exec.iter().map(|e| ((e.kind, e.text.as_slice()), e.rule)).collect(),
            lengths: lengths.into_iter().map(|(kind, of)| (kind, of.into_iter().rev().collect())).collect(),
        }
    }

    fn longest(&self, kind: u8, text: &[u8]) -> Option<ExecRule> {
        let lengths = self.lengths.get(&kind)?;
        lengths.iter().find_map(|length| self.keys.get(&(kind, text.get(..*length)?)).copied())
    }

    /// `argv` as in `/proc/PID/cmdline`: each argument with a NUL behind it.
    /// `cgroups` are the names on the way to the root. [`Match::server`] is 0
    /// if nothing matched; [`Match::priority`] indexes [`Compiled::matchers`].
    pub fn recognise<'c>(&self, exe: &str, argv: &[u8], cgroups: impl IntoIterator<Item = &'c str>) -> Match {
        let mut found = Match::NONE;
        if let Some(rule) = self.longest(KIND_EXE, &exe_key(exe)) {
            found.exe(&rule);
        }
        self.arguments(&mut found, &argv[..argv.len().min(ARGV_BYTES)]);
        for name in cgroups {
            if let Some(rule) = self.longest(KIND_CGROUP, &[name.as_bytes(), b"\0"].concat()) {
                found.other(&rule);
            }
        }
        found
    }

    fn arguments(&self, found: &mut Match, argv: &[u8]) {
        let from = |at: u32| argv.get(at as usize..).unwrap_or_default();
        let mut scan = Scan::default();
        for (at, byte) in argv.iter().enumerate() {
            let Step::Argument { start, base, module, script } = scan.step(at as u32, *byte) else {
                continue;
            };
            if script && found.interpreter == 1 {
                if let Some(rule) = self.longest(KIND_SCRIPT_PATH, from(start)) {
                    found.script_path(&rule);
                }
                if let Some(rule) = self.longest(KIND_SCRIPT, from(base)) {
                    found.script(&rule);
                }
                if module != 0
                    && let Some(rule) = self.longest(KIND_MODULE, from(module))
                {
                    found.other(&rule);
                }
            }
            if let Some(rule) = self.longest(KIND_ARG, from(start)) {
                found.other(&rule);
            }
            if found.launcher_like == 0 {
                continue;
            }
            if found.needs_word == 1 {
                if self.longest(KIND_WORD, from(start)).is_some() {
                    found.needs_word = 0;
                }
            } else if let Some(rule) = self.longest(KIND_PACKAGE, from(start)) {
                found.other(&rule);
            }
        }
    }
}
