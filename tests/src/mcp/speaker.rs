//! `speak`, as a server that one policy alone knows: rules hold on the whole
//! host, and other tests run the same program.

use crate::bed::Bed;
use crate::policy::Policy;
use crate::run::built;
use anyhow::Result;
use std::path::{Path, PathBuf};
use std::process::Command;

pub struct Speaker {
    /// Its name in the policy.
    pub name: &'static str,
    exe: PathBuf,
}

impl Speaker {
    /// A copy of the program, known by its path.
    pub fn new(bed: &Bed, name: &'static str) -> Result<Speaker> {
        let exe = bed.folder.path().join(name);
        std::fs::copy(built("speak")?, &exe)?;
        Ok(Speaker { name, exe })
    }

    pub fn path(&self) -> &Path {
        &self.exe
    }

    /// Recorded, never denied.
    pub fn declared(&self, policy: Policy) -> Policy {
        let rule = format!("match: [{{exe: {}}}]", self.exe.display());
        policy.server(self.name, "unrestricted", "audit", &rule)
    }

    pub fn command(&self, bed: &Bed, how: &[&str]) -> Result<Command> {
        let mut command = bed.command(&self.exe)?;
        command.args(how);
        Ok(command)
    }
}
