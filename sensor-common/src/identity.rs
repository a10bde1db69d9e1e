//! Which file a program was started from, by what the kernel knows of its
//! inode. A file whose content was compared with a hash in the policy is in the
//! kernel's table under this key; one that changes has another key.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Files that two generations of a policy may have verified.
pub const MAX_IDENTITIES: u32 = 16384;

/// A file and the state of it: any change of content moves the change time.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FileId {
    pub ino: u64,
    pub ctime_sec: i64,
    pub size: u64,
    pub ctime_nsec: u32,
    /// `super_block.s_dev`: major << 20 | minor.
    pub dev: u32,
}

impl FileId {
    /// Since Linux 6.13 the top bit of `i_ctime_nsec` says that somebody asked
    /// for the time (linux/fs.h, `I_CTIME_QUERIED`).
    pub const NSEC_MASK: u32 = !(1 << 31);
}

/// Key of the table of verified files.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IdentityKey {
    pub file: FileId,
    pub generation: u32,
    /// The server whose hash it has.
    pub server: u32,
}

const _: () = {
    assert!(size_of::<FileId>() == 32);
    assert!(size_of::<IdentityKey>() == 40);
};
