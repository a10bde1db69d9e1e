//! Whether what was attached still is: a link outlives what it was attached to,
//! and somebody may detach it.

use super::sys;
use std::os::fd::{AsFd as _, OwnedFd};

/// The links of a start.
pub struct Links(pub(super) Vec<Link>);

pub(super) struct Link {
    pub name: &'static str,
    pub link: OwnedFd,
    /// Of the program that it held then.
    pub program: u32,
}

impl Link {
    pub(super) fn new(name: &'static str, link: OwnedFd) -> Link {
        let program = sys::link_info(link.as_fd()).map_or(0, |info| info.program);
        Link { name, link, program }
    }

    fn holds(&self) -> bool {
        sys::link_info(self.link.as_fd()).is_ok_and(|info| info.program == self.program && info.is_attached())
    }
}

impl Links {
    /// Hooks that judge nothing any more.
    pub fn detached(&self) -> impl Iterator<Item = &'static str> {
        self.0.iter().filter(|link| !link.holds()).map(|link| link.name)
    }
}
