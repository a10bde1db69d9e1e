//! The kernel's mark on a task: which server it belongs to, in which role, and
//! which instance. One word, so that it is read and written without tearing.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `server` in bits 0..16 (0: unlabelled), `role` in 16..24, flags in 24..32,
/// `instance` in 32..64.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Label(pub u64);

/// The part of the tree that a task is.
pub const ROLE_SERVER: u8 = 0;
/// npx, uvx, docker: before the server itself, under `launcher_profile`.
pub const ROLE_LAUNCHER: u8 = 1;

impl Label {
    pub const NONE: Label = Label(0);

    #[inline(always)]
    pub const fn new(server: u16, role: u8, instance: u32) -> Label {
        Label(server as u64 | (role as u64) << 16 | (instance as u64) << 32)
    }

    #[inline(always)]
    pub const fn is_some(self) -> bool {
        self.0 != 0
    }

    #[inline(always)]
    pub const fn server(self) -> u16 {
        self.0 as u16
    }

    #[inline(always)]
    pub const fn role(self) -> u8 {
        (self.0 >> 16) as u8
    }

    #[inline(always)]
    pub const fn instance(self) -> u32 {
        (self.0 >> 32) as u32
    }

    #[inline(always)]
    pub const fn is_launcher(self) -> bool {
        self.role() == ROLE_LAUNCHER
    }

    #[inline(always)]
    pub const fn with_role(self, role: u8) -> Label {
        Label(self.0 & !(0xff << 16) | (role as u64) << 16)
    }
}

/// What an exec does to a label, given what the executable and its arguments
/// look like. The only function that changes a label.
///
/// - unlabelled: takes the label of the rule that matched, if any;
/// - launcher: stays a launcher only on a launcher's own executable or script,
///   anything else becomes the server for good;
/// - server: keeps its label, unless the server may launch the one that
///   matched, which is then a new instance of its own.
#[inline(always)]
pub fn on_exec(current: Label, matched: Label, launcher_file: bool, may_launch: bool) -> Label {
    if !current.is_some() {
        return matched;
    }
    if may_launch && matched.is_some() && matched.server() != current.server() {
        return matched;
    }
    if current.is_launcher() && launcher_file {
        return current;
    }
    current.with_role(ROLE_SERVER)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OTHER: Label = Label::new(9, ROLE_SERVER, 77);

    #[test]
    fn fields_do_not_overlap() {
        let l = Label::new(0xffff, 0xff, 0xffff_ffff);
        assert_eq!((l.server(), l.role(), l.instance()), (0xffff, 0xff, 0xffff_ffff));
        let l = Label::new(1, ROLE_LAUNCHER, 2).with_role(ROLE_SERVER);
        assert_eq!((l.server(), l.role(), l.instance()), (1, ROLE_SERVER, 2));
    }

    #[test]
    fn a_server_that_looks_like_another_keeps_its_label() {
        let server = Label::new(1, ROLE_SERVER, 5);
        assert_eq!(on_exec(server, OTHER, true, false), server);
        assert_eq!(on_exec(server, OTHER, true, true), OTHER);
    }

    #[test]
    fn a_launcher_becomes_the_server_on_anything_but_a_launcher_and_never_back() {
        let launcher = Label::new(1, ROLE_LAUNCHER, 5);
        assert_eq!(on_exec(launcher, Label::NONE, true, false), launcher);
        let server = on_exec(launcher, Label::NONE, false, false);
        assert_eq!(server, Label::new(1, ROLE_SERVER, 5));
        assert_eq!(on_exec(server, Label::new(1, ROLE_LAUNCHER, 6), true, false), server);
    }

    #[test]
    fn an_unlabelled_task_takes_what_matched() {
        assert_eq!(on_exec(Label::NONE, OTHER, false, false), OTHER);
        assert_eq!(on_exec(Label::NONE, Label::NONE, true, false), Label::NONE);
    }
}
