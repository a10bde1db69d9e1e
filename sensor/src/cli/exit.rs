//! Exit codes: part of the interface, listed in `--help`.

use std::fmt;
use std::process::ExitCode;

/// Why a command ended as it did. Numbers are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Ok = 0,
    Failure = 1,
    Usage = 2,
    PolicyInvalid = 3,
    NoAgent = 4,
    Refused = 5,
    Prerequisite = 6,
    NotFound = 7,
    /// `policy explain`: the answer is "denied".
    Denied = 8,
    /// `status --check`: it does not do its work.
    NotReady = 9,
    /// A defect of this program: it ended itself, with a report.
    Panic = 70,
    CannotExecute = 126,
    CommandNotFound = 127,
}

pub(super) const TABLE: &str = "\
Exit codes:
  0    done (for `policy explain`: allowed)
  1    failed
  2    wrong usage
  3    the policy, or the file of outputs, is not valid
  4    the agent, or the collector's address, cannot be reached
  5    refused: the caller may not do this
  6    this host lacks something that is required
  7    no such server, file or record
  8    `policy explain`: denied
  9    `status --check`: not ready
  70   a defect of this program, which ended itself; the report on stderr is what a maintainer needs
  126  `exec`: the command cannot be executed
  127  `exec`: the command was not found";

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// An error for a person: what happened, what to do next, how to exit.
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    pub message: String,
    /// What to do next; may be empty.
    pub hint: String,
}

impl Failure {
    pub fn new(exit: Exit, message: impl Into<String>) -> Failure {
        Failure { exit, message: message.into(), hint: String::new() }
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.hint = hint.into();
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Prints an error on stderr and gives the code to exit with.
pub(super) fn report(error: &anyhow::Error) -> ExitCode {
    let broken = |e: &std::io::Error| e.kind() == std::io::ErrorKind::BrokenPipe;
    if error.chain().filter_map(|e| e.downcast_ref()).any(broken) {
        // Whoever read the output has seen enough.
        return Exit::Ok.into();
    }
    eprintln!("mcp-sensor: {error:#}");
    match error.downcast_ref::<Failure>() {
        Some(failure) => {
            if !failure.hint.is_empty() {
                eprintln!("  {}", failure.hint);
            }
            failure.exit.into()
        }
        None => Exit::Failure.into(),
    }
}
