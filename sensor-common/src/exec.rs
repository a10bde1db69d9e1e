//! What an exec looks like, as keys of one trie: the executable's path, its
//! arguments, the package or script they name, the cgroup they run in.
//!
//! The trie answers with the longest stored prefix. A stored key that ends in
//! NUL matches a whole argument (or several, NUL between them, as they lie in
//! the process's memory); one without is a prefix. Linux: `mm->arg_start`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Longest text of a key; a rule that needs more is refused by the compiler.
pub const KEY_BYTES: usize = 251;
/// Bytes of argv that are looked at; what lies beyond is counted.
pub const ARGV_BYTES: usize = 4096;
/// Entries of the exec trie, both generations.
pub const MAX_EXEC_KEYS: u32 = 131_072;

/// Executable, file name first: `/usr/bin/node` is `node/bin/usr/` and NUL.
/// `node/` alone matches every executable of that name.
pub const KIND_EXE: u8 = 1;
/// One argument or a run of arguments, anywhere after argv\[0\].
pub const KIND_ARG: u8 = 2;
/// A package named to a launcher (npx, uvx, docker).
pub const KIND_PACKAGE: u8 = 3;
/// File name of the script an interpreter runs.
pub const KIND_SCRIPT: u8 = 4;
/// Path of the script an interpreter runs, from below its last `node_modules/`.
pub const KIND_MODULE: u8 = 5;
/// Full path of the script an interpreter runs.
pub const KIND_SCRIPT_PATH: u8 = 6;
/// A launcher's word for "run it": exec, x, run, dlx.
pub const KIND_WORD: u8 = 7;
/// Name of a cgroup on the way to the root (systemd unit, container id).
pub const KIND_CGROUP: u8 = 8;

/// Key of the exec trie.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ExecKey {
    /// 40 (generation and kind) + 8 per byte.
    pub prefix_len: u32,
    /// Network byte order.
    pub generation: u32,
    pub kind: u8,
    pub bytes: [u8; KEY_BYTES],
}

pub const EXEC_SCOPE_BITS: u32 = 40;

#[cfg(any(test, feature = "user"))]
impl ExecKey {
    /// `None`: longer than [`KEY_BYTES`].
    pub fn new(generation: u32, kind: u8, text: &[u8]) -> Option<ExecKey> {
        let mut bytes = [0; KEY_BYTES];
        bytes.get_mut(..text.len())?.copy_from_slice(text);
        let prefix_len = EXEC_SCOPE_BITS + 8 * text.len() as u32;
        Some(ExecKey { prefix_len, generation: generation.to_be(), kind, bytes })
    }
}

/// The executable is a launcher's own, by its full path: keeps the launcher role.
pub const FLAG_LAUNCHER: u16 = 1;
/// A launcher by name: packages among its arguments are looked at.
pub const FLAG_LAUNCHER_LIKE: u16 = 2;
/// Runs the script that its first plain argument names.
pub const FLAG_INTERPRETER: u16 = 4;
/// With [`FLAG_LAUNCHER_LIKE`]: only after a word of [`KIND_WORD`].
pub const FLAG_NEEDS_WORD: u16 = 8;

/// The sensor's own binary: `mcp-sensor exec` has the arguments of what it will
/// launch, which are no evidence about itself.
pub const FLAG_OWN: u16 = 16;

/// The rule names a hash: the executable's file must be a verified one.
pub const FLAG_HASHED: u16 = 32;

/// Value of the exec trie.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ExecRule {
    /// 0: carries flags only.
    pub server: u16,
    pub flags: u16,
    /// For [`KIND_EXE`] with a full path: a number for that path. Else: the
    /// executable that must run as well, 0 for any.
    pub exe: u32,
    /// The lowest wins (order in the policy file).
    pub priority: u32,
}

/// The best match of one exec so far.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Match {
    pub server: u16,
    /// 1: a launcher's own executable or script, by full path.
    pub launcher_file: u8,
    /// Context gathered on the way.
    pub launcher_like: u8,
    pub interpreter: u8,
    pub needs_word: u8,
    /// 1: the sensor itself, never a server.
    pub own: u8,
    /// 1: an interpreter by a launcher's full path: with a launcher's script it is one.
    pub launcher_exe: u8,
    pub exe: u32,
    pub priority: u32,
    /// 1: the server comes from a rule that names a hash.
    pub hashed: u32,
}

impl Match {
    pub const NONE: Match = Match {
        server: 0,
        launcher_file: 0,
        launcher_like: 0,
        interpreter: 0,
        needs_word: 0,
        own: 0,
        launcher_exe: 0,
        exe: 0,
        priority: u32::MAX,
        hashed: 0,
    };

    /// The executable itself, first of all.
    #[inline(always)]
    pub fn exe(&mut self, rule: &ExecRule) {
        self.exe = rule.exe;
        self.own = (rule.flags & FLAG_OWN != 0) as u8;
        self.context(rule.flags);
        if rule.flags & FLAG_LAUNCHER != 0 {
            if rule.flags & FLAG_INTERPRETER == 0 {
                self.launcher_file = 1;
            } else {
                self.launcher_exe = 1;
            }
        }
        self.take(rule);
    }

    /// An argument, package, script or cgroup.
    #[inline(always)]
    pub fn other(&mut self, rule: &ExecRule) {
        if rule.exe == 0 || rule.exe == self.exe {
            self.take(rule);
        }
    }

    /// The script an interpreter runs, by its file name.
    #[inline(always)]
    pub fn script(&mut self, rule: &ExecRule) {
        self.context(rule.flags);
        self.other(rule);
    }

    /// The script an interpreter runs, by its full path.
    #[inline(always)]
    pub fn script_path(&mut self, rule: &ExecRule) {
        if rule.flags & FLAG_LAUNCHER != 0 && self.launcher_exe != 0 {
            self.launcher_file = 1;
        }
    }

    #[inline(always)]
    fn context(&mut self, flags: u16) {
        if flags & FLAG_LAUNCHER_LIKE != 0 {
            self.launcher_like = 1;
            self.needs_word = (flags & FLAG_NEEDS_WORD != 0) as u8;
        }
        if flags & FLAG_INTERPRETER != 0 {
            self.interpreter = 1;
        }
    }

    #[inline(always)]
    fn take(&mut self, rule: &ExecRule) {
        if rule.server != 0 && self.own == 0 && rule.priority < self.priority {
            self.server = rule.server;
            self.priority = rule.priority;
            self.hashed = (rule.flags & FLAG_HASHED != 0) as u32;
        }
    }
}

/// What [`Scan::step`] asks its caller to look up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing ends here.
    Within,
    /// An argument ended; its text starts at `start`, `base` is after its last
    /// `/`, `module` after its last `node_modules/` (0: none).
    Argument { start: u32, base: u32, module: u32, script: bool },
}

const NODE_MODULES: [u8; 16] = *b"/node_modules/\0\0";
const NODE_MODULES_LEN: u32 = 14;

/// State of one walk over argv, byte by byte, so that the kernel's verifier
/// needs to look at one step only.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Scan {
    pub start: u32,
    pub base: u32,
    pub module: u32,
    pub progress: u32,
    pub index: u32,
    /// 1: the script has been seen, or an option that takes its place.
    pub script_seen: u32,
    /// First byte of the current argument.
    pub first: u32,
    pub second: u32,
}

impl Scan {
    /// `at` is the offset of `byte` in argv.
    #[inline(always)]
    pub fn step(&mut self, at: u32, byte: u8) -> Step {
        if byte == 0 {
            let done = Step::Argument {
                start: self.start,
                base: self.base,
                module: self.module,
                script: self.is_script(),
            };
            if let Step::Argument { script: true, .. } = done {
                self.script_seen = 1;
            }
            // `python -m module` and `node -e code` run no script.
            if self.index > 0 && self.first == b'-' as u32 {
                let c = self.second as u8;
                if at - self.start == 2 && (c == b'm' || c == b'c' || c == b'e' || c == b'p') {
                    self.script_seen = 1;
                }
            }
            let argument = self.index > 0;
            self.index += 1;
            self.start = at + 1;
            self.base = at + 1;
            self.module = 0;
            self.progress = 0;
            self.first = 0;
            self.second = 0;
            return if argument { done } else { Step::Within };
        }
        if at == self.start {
            self.first = byte as u32;
            self.second = 0;
        } else if at == self.start + 1 {
            self.second = byte as u32;
        }
        let expected = NODE_MODULES[(self.progress & 15) as usize];
        if byte == expected {
            self.progress += 1;
            if self.progress == NODE_MODULES_LEN {
                self.module = at + 1;
                self.progress = 1;
            }
        } else {
            self.progress = (byte == b'/') as u32;
        }
        if byte == b'/' {
            self.base = at + 1;
        }
        Step::Within
    }

    /// The first argument that is no option, of an interpreter, is its script.
    #[inline(always)]
    fn is_script(&self) -> bool {
        self.index > 0 && self.script_seen == 0 && self.first != b'-' as u32
    }
}

const _: () = {
    assert!(size_of::<ExecKey>() == 260);
    assert!(size_of::<ExecRule>() == 12);
    assert!(size_of::<Match>() == 20);
    assert!(size_of::<Scan>() == 32);
};

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(argv: &[u8]) -> Vec<(String, String, Option<String>, bool)> {
        let text = |at: u32| {
            let rest = &argv[at as usize..];
            let end = rest.iter().position(|b| *b == 0).unwrap();
            String::from_utf8_lossy(&rest[..end]).into_owned()
        };
        let mut scan = Scan::default();
        let mut seen = Vec::new();
        for (at, byte) in argv.iter().enumerate() {
            if let Step::Argument { start, base, module, script } = scan.step(at as u32, *byte) {
                seen.push((text(start), text(base), (module != 0).then(|| text(module)), script));
            }
        }
        seen
    }

    #[test]
    fn node_runs_the_script_below_node_modules() {
        let seen = arguments(b"node\0--no-warnings\0/a/node_modules/x/node_modules/@s/y/dist/i.js\0stdio\0");
        assert_eq!(seen[0], ("--no-warnings".into(), "--no-warnings".into(), None, false));
        assert_eq!(seen[1].1, "i.js");
        assert_eq!(seen[1].2.as_deref(), Some("@s/y/dist/i.js"));
        assert!(seen[1].3);
        assert!(!seen[2].3, "only the first plain argument is the script");
    }

    #[test]
    fn a_module_or_code_argument_is_no_script() {
        assert!(arguments(b"python3\0-m\0mcp_server_time\0x\0").iter().all(|a| !a.3));
        assert!(arguments(b"sh\0-c\0mcp-server-x\0").iter().all(|a| !a.3));
    }

    #[test]
    fn an_empty_argument_leaves_nothing_to_the_next() {
        let seen = arguments(b"node\0-x\0\0/a/b.js\0");
        assert!(!seen[0].3 && seen[1].3, "an empty argument is the first that is no option");
        assert!(!seen[2].3);
    }

    #[test]
    fn near_misses_of_node_modules_do_not_confuse_the_walk() {
        let seen = arguments(b"node\0/node_module/node_modules//node_modules/z/q\0");
        assert_eq!(seen[0].2.as_deref(), Some("z/q"));
        assert_eq!(arguments(b"node\0/a/node_modulesx/b\0")[0].2, None);
    }

    #[test]
    fn the_first_in_the_file_wins_and_an_exe_condition_holds() {
        let mut m = Match::NONE;
        m.exe(&ExecRule { server: 0, flags: FLAG_INTERPRETER, exe: 4, priority: 0 });
        m.other(&ExecRule { server: 7, flags: 0, exe: 5, priority: 1 });
        assert_eq!(m.server, 0, "another executable");
        m.other(&ExecRule { server: 8, flags: 0, exe: 4, priority: 3 });
        m.other(&ExecRule { server: 9, flags: 0, exe: 0, priority: 2 });
        m.other(&ExecRule { server: 10, flags: 0, exe: 0, priority: 5 });
        assert_eq!((m.server, m.interpreter), (9, 1));
    }

    #[test]
    fn only_the_rule_that_wins_asks_for_a_hash() {
        let hashed = ExecRule { server: 7, flags: FLAG_HASHED, exe: 4, priority: 2 };
        let mut m = Match::NONE;
        m.exe(&hashed);
        assert_eq!((m.server, m.hashed), (7, 1));
        m.other(&ExecRule { server: 8, flags: 0, exe: 0, priority: 3 });
        assert_eq!((m.server, m.hashed), (7, 1), "a later rule");
        m.other(&ExecRule { server: 8, flags: 0, exe: 0, priority: 1 });
        assert_eq!((m.server, m.hashed), (8, 0), "an earlier rule");
    }

    #[test]
    fn a_launcher_s_script_under_another_node_is_no_launcher() {
        let script = ExecRule { server: 0, flags: FLAG_LAUNCHER, exe: 0, priority: 0 };
        for (flags, launcher) in [(FLAG_INTERPRETER, 0), (FLAG_INTERPRETER | FLAG_LAUNCHER, 1)] {
            let mut m = Match::NONE;
            m.exe(&ExecRule { server: 0, flags, exe: 0, priority: 0 });
            m.script_path(&script);
            assert_eq!(m.launcher_file, launcher);
        }
    }

    #[test]
    fn the_sensor_itself_is_never_a_server() {
        let mut m = Match::NONE;
        m.exe(&ExecRule { server: 0, flags: FLAG_OWN, exe: 0, priority: 0 });
        m.other(&ExecRule { server: 7, flags: 0, exe: 0, priority: 1 });
        assert_eq!(m.server, 0);
    }

    #[test]
    fn a_key_that_is_too_long_is_refused() {
        assert!(ExecKey::new(1, KIND_ARG, &[b'a'; KEY_BYTES]).is_some());
        assert!(ExecKey::new(1, KIND_ARG, &[b'a'; KEY_BYTES + 1]).is_none());
    }
}
