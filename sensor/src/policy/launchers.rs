//! Launchers on this host (npx, uvx, docker …) by exact path: only these keep
//! the launcher role, so only files that a server cannot replace belong here.

use super::diagnostic::Diagnostic;
use super::model::LauncherGlob;
use std::collections::BTreeSet;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Launchers of one host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Launchers {
    /// Programs, by real path (the kernel names an executable by that).
    pub programs: BTreeSet<String>,
    /// Interpreters that run a launcher's script, by real path.
    pub interpreters: BTreeSet<String>,
    /// Scripts in every spelling that `argv[1]` may carry.
    pub scripts: BTreeSet<String>,
}

/// Most launchers of one host.
const MAX_LAUNCHERS: usize = 512;

const SYSTEM: [&str; 4] = ["/usr/local/bin", "/usr/bin", "/bin", "/snap/bin"];
/// Not bun or deno: they run the server in their own process. `env` because
/// `#!/usr/bin/env node` goes through it.
const NAMES: [&str; 12] =
    ["env", "npx", "npm", "pnpm", "pnpx", "yarn", "uv", "uvx", "pipx", "docker", "podman", "nerdctl"];
/// Where distributions and NodeSource put npm; its scripts are also called by
/// these paths.
const NPM_SCRIPTS: [&str; 3] =
    ["/usr/lib/node_modules/npm/bin", "/usr/local/lib/node_modules/npm/bin", "/usr/share/nodejs/npm/bin"];

/// Looks at the host: the system's directories, then what the policy names.
pub fn discover(globs: &[LauncherGlob]) -> (Launchers, Vec<Diagnostic>) {
    let mut found = Launchers::default();
    let mut warnings = Vec::new();
    let system = SYSTEM.iter().flat_map(|dir| NAMES.iter().map(move |name| Path::new(dir).join(name)));
    let npm = NPM_SCRIPTS
        .iter()
        .flat_map(|dir| ["npx-cli.js", "npm-cli.js"].iter().map(move |name| Path::new(dir).join(name)));
    for path in system.chain(npm) {
        if replaceable(&path).is_none() {
            found.add(&path);
        }
    }
    for glob in globs {
        let mut any = false;
        for path in expand(&glob.glob) {
            if found.len() >= MAX_LAUNCHERS {
                let message = format!("more than {MAX_LAUNCHERS} launchers; the rest is left out");
                warnings.push(Diagnostic::warning(glob.position, glob.path.clone(), message));
                return (found, warnings);
            }
            if !found.add(&path) {
                continue;
            }
            any = true;
            if let Some(why) = replaceable(&path) {
                let message =
                    format!("{}: {why}; who can replace a launcher keeps its profile", path.display());
                warnings.push(
                    Diagnostic::warning(glob.position, glob.path.clone(), message)
                        .help("install launchers as root, or give the server no `launcher_profile`"),
                );
            }
        }
        if !any {
            let message = format!("`{}` names no launcher on this host", glob.glob);
            warnings.push(Diagnostic::warning(glob.position, glob.path.clone(), message).help(
                "scripts and programs count; not interpreters, which would run the server as a launcher",
            ));
        }
    }
    (found, warnings)
}

fn expand(pattern: &str) -> Vec<PathBuf> {
    let options = glob::MatchOptions {
        case_sensitive: true,
        require_literal_separator: true,
        require_literal_leading_dot: true,
    };
    match glob::glob_with(pattern, options) {
        Ok(paths) => paths.flatten().take(MAX_LAUNCHERS + 1).collect(),
        Err(_) => Vec::new(),
    }
}

impl Launchers {
    fn len(&self) -> usize {
        self.programs.len() + self.scripts.len()
    }

    /// False: neither an executable nor a script.
    fn add(&mut self, path: &Path) -> bool {
        let Some(head) = head(path) else { return false };
        let Ok(real) = path.canonicalize() else { return false };
        let (Some(spelled), Some(real_text)) = (path.to_str(), real.to_str()) else { return false };
        if head.starts_with(b"\x7fELF") {
            if runs_code(&real) {
                return false;
            }
            self.programs.insert(real_text.to_owned());
            return true;
        }
        let Some(interpreter) = shebang(&head) else { return false };
        self.scripts.extend([spelled.to_owned(), real_text.to_owned()]);
        // `env node` takes the first node of the caller's PATH: beside the
        // script (nvm, volta), or the system's.
        let candidates: Vec<PathBuf> = match interpreter {
            Interpreter::Path(path) => vec![path],
            Interpreter::Name(name) => path
                .parent()
                .into_iter()
                .map(Path::to_path_buf)
                .chain(SYSTEM.iter().map(PathBuf::from))
                .map(|dir| dir.join(&name))
                .collect(),
        };
        for candidate in candidates {
            let real = candidate.canonicalize().ok().filter(|real| real.is_file());
            if let Some(real) = real.as_deref().and_then(Path::to_str) {
                self.interpreters.insert(real.to_owned());
            }
        }
        true
    }
}

/// An interpreter, or a program of many names (busybox): as a launcher it would
/// keep that role whatever it runs.
fn runs_code(real: &Path) -> bool {
    let name = real.file_name().and_then(|name| name.to_str()).unwrap_or("");
    let multiple = ["busybox", "coreutils", "toybox"];
    multiple.contains(&name) || super::exec::is_interpreter(name)
}

/// The first bytes of a regular file; never blocks on a FIFO put in its place.
fn head(path: &Path) -> Option<Vec<u8>> {
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path).ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut head = vec![0; 256];
    let length = file.read(&mut head).ok()?;
    head.truncate(length);
    Some(head)
}

#[derive(Debug, PartialEq, Eq)]
enum Interpreter {
    Path(PathBuf),
    Name(String),
}

fn shebang(head: &[u8]) -> Option<Interpreter> {
    let line = head.strip_prefix(b"#!")?.split(|b| *b == b'\n').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split_whitespace();
    let first = words.next()?;
    if first.rsplit('/').next() != Some("env") {
        return first.starts_with('/').then(|| Interpreter::Path(PathBuf::from(first)));
    }
    words
        .find(|word| !word.starts_with('-') && !word.contains('='))
        .map(|name| Interpreter::Name(name.to_owned()))
}

/// Why others than root could put another file there.
fn replaceable(path: &Path) -> Option<String> {
    let Ok(real) = path.canonicalize() else { return Some("it does not exist".to_owned()) };
    for (place, writable) in [(Some(real.as_path()), 0o022), (real.parent(), 0o002), (path.parent(), 0o002)] {
        let Some(place) = place else { continue };
        match place.metadata() {
            Ok(meta) if meta.uid() != 0 => {
                return Some(format!("{} belongs to uid {}", place.display(), meta.uid()));
            }
            Ok(meta) if meta.mode() & writable != 0 => {
                return Some(format!("{} can be written by others", place.display()));
            }
            Ok(_) => {}
            Err(e) => return Some(format!("{}: {e}", place.display())),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn glob(text: &str) -> LauncherGlob {
        LauncherGlob { glob: text.to_owned(), path: "launchers[0]".to_owned(), position: None }
    }

    #[test]
    fn a_script_brings_its_interpreter_and_both_its_spellings() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("v1/bin")).unwrap();
        std::fs::create_dir_all(root.join("v1/lib")).unwrap();
        std::fs::write(root.join("v1/bin/node"), b"\x7fELF").unwrap();
        std::fs::write(root.join("v1/lib/npx-cli.js"), "#!/usr/bin/env node\n").unwrap();
        symlink("../lib/npx-cli.js", root.join("v1/bin/npx")).unwrap();
        let (found, _) = discover(&[glob(&format!("{}/*/bin/npx", root.display()))]);
        let text = |p: &str| root.join(p).to_str().unwrap().to_owned();
        assert!(found.scripts.contains(&text("v1/bin/npx")));
        assert!(found.scripts.contains(&text("v1/lib/npx-cli.js")));
        assert!(found.interpreters.contains(&text("v1/bin/node")));
        assert!(!found.programs.contains(&text("v1/bin/node")));
    }

    #[test]
    fn a_launcher_that_others_can_replace_is_warned_about() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let path = root.join("uvx");
        std::fs::write(&path, b"\x7fELF").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
        let (found, warnings) = discover(&[glob(path.to_str().unwrap())]);
        assert!(found.programs.contains(path.to_str().unwrap()));
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].message.contains("who can replace"), "{}", warnings[0].message);
    }

    #[test]
    fn a_fifo_in_place_of_a_launcher_stalls_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("npx");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (found, warnings) = discover(&[glob(path.to_str().unwrap())]);
        assert!(!found.scripts.iter().any(|s| Path::new(s) == path));
        assert!(warnings[0].message.contains("names no launcher"), "{}", warnings[0].message);
    }

    #[test]
    fn an_interpreter_is_no_launcher() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["node", "python3.12", "bun", "deno", "busybox", "bash"] {
            let path = dir.path().join(name);
            std::fs::write(&path, b"\x7fELF").unwrap();
            let (found, warnings) = discover(&[glob(path.to_str().unwrap())]);
            assert!(!found.programs.iter().any(|p| p.ends_with(name)), "{name}");
            assert_eq!(warnings.len(), 1, "{name}");
        }
    }

    #[test]
    fn shebangs() {
        let name = |t: &str| shebang(t.as_bytes());
        assert_eq!(name("#!/usr/bin/env node\n"), Some(Interpreter::Name("node".into())));
        assert_eq!(name("#!/usr/bin/env -S node --x\n"), Some(Interpreter::Name("node".into())));
        assert_eq!(name("#! /usr/bin/python3 -I\n"), Some(Interpreter::Path("/usr/bin/python3".into())));
        assert_eq!(name("#!\n"), None);
        assert_eq!(name("#!node\n"), None);
        assert_eq!(name("#!/usr/bin/env\n"), None);
        assert_eq!(name("echo"), None);
    }
}
