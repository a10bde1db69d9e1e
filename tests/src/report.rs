//! What an attempt says about itself, one JSON line on its standard output.

use serde::{Deserialize, Serialize};

/// First line of an attempt that is ready and waits for `go` on its stdin.
pub const READY: &str = "attempt-ready";
/// What every attempt sends.
pub const PAYLOAD: &[u8] = b"mcp-sensor-attempt";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "outcome")]
pub enum Report {
    /// Every call of the attempt succeeded; `answered`: the peer's echo came back.
    Done { answered: bool },
    /// `step` failed with `errno`.
    Stopped { step: String, errno: i32 },
}

/// Errors that say "this kernel has no such thing", never "you may not".
const LACKING: [i32; 7] = [
    libc::EPROTONOSUPPORT,
    libc::EAFNOSUPPORT,
    libc::ESOCKTNOSUPPORT,
    libc::ENOPROTOOPT,
    libc::ENOSYS,
    libc::EOPNOTSUPP,
    libc::ENODEV,
];

impl Report {
    pub fn is_lacking(&self) -> bool {
        matches!(self, Report::Stopped { errno, .. } if LACKING.contains(errno))
    }

    pub fn errno(&self) -> Option<i32> {
        match self {
            Report::Done { .. } => None,
            Report::Stopped { errno, .. } => Some(*errno),
        }
    }

    pub fn answered(&self) -> bool {
        matches!(self, Report::Done { answered: true })
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Report::Done { answered: true } => write!(f, "sent and answered"),
            Report::Done { answered: false } => write!(f, "sent"),
            Report::Stopped { step, errno } => {
                write!(f, "{step}: {}", nix::errno::Errno::from_raw(*errno))
            }
        }
    }
}
