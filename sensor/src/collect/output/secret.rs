//! Secrets that the file of outputs names and does not hold.

use crate::policy::load::read_regular;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Of one secret.
const MAX_BYTES: usize = 64 << 10;

/// Where a secret is. What it is, is read when it is needed and never printed.
#[derive(Clone, PartialEq, Eq)]
pub enum Secret {
    File(PathBuf),
    Env(String),
}

impl Secret {
    /// `file:PATH` (relative to `base`) or `env:NAME`; `None`: it is neither.
    pub fn parse(text: &str, base: &Path) -> Option<Secret> {
        if let Some(path) = text.strip_prefix("file:") {
            return (!path.is_empty()).then(|| Secret::File(base.join(path)));
        }
        let name = text.strip_prefix("env:")?;
        let good = |c: char| c.is_ascii_alphanumeric() || c == '_';
        (!name.is_empty() && name.chars().all(good)).then(|| Secret::Env(name.to_owned()))
    }

    /// As it is now, without the line's end.
    pub fn read(&self) -> io::Result<String> {
        let failed = |why: &dyn fmt::Display| io::Error::other(format!("{self}: {why}"));
        let text = match self {
            Secret::Env(name) => std::env::var(name).map_err(|e| failed(&e))?,
            Secret::File(path) => {
                let bytes = read_regular(path, MAX_BYTES).map_err(|e| failed(&e))?;
                String::from_utf8(bytes).map_err(|_| failed(&"not UTF-8"))?
            }
        };
        if text.len() > MAX_BYTES {
            return Err(failed(&format_args!("more than {MAX_BYTES} bytes")));
        }
        let text = text.trim_end_matches(['\r', '\n']);
        if text.is_empty() {
            return Err(failed(&"it is empty"));
        }
        Ok(text.to_owned())
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Secret::File(path) => write!(f, "file:{}", path.display()),
            Secret::Env(name) => write!(f, "env:{name}"),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_read_from_where_it_is_without_the_end_of_its_line() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "Bearer x\n").unwrap();
        let secret = Secret::parse("file:token", dir.path()).unwrap();
        assert_eq!(secret.read().unwrap(), "Bearer x");
        assert!(!format!("{secret:?}").contains("Bearer"));
        std::fs::write(dir.path().join("token"), "\n").unwrap();
        assert!(secret.read().unwrap_err().to_string().ends_with("token: it is empty"));
        let absent = Secret::parse("env:MCP_SENSOR_TEST_NOT_SET", dir.path()).unwrap();
        assert!(absent.read().unwrap_err().to_string().starts_with("env:MCP_SENSOR_TEST_NOT_SET: "));
        for bad in ["Bearer x", "file:", "env:", "env:A B", ""] {
            assert_eq!(Secret::parse(bad, dir.path()), None, "{bad}");
        }
    }
}
