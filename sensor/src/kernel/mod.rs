//! The kernel half as user space sees it: the object, its maps and links, what
//! this kernel allows.

pub mod btf;
pub mod capture;
mod carry;
pub mod cgroup;
pub mod doctor;
pub mod gauges;
mod identify;
pub mod links;
pub mod load;
mod lsm;
pub mod maps;
pub mod object;
pub mod pidfd;
pub mod pins;
pub mod record;
mod sys;
pub mod tables;

pub use identify::Identifier;
pub use load::{Attached, Hook, HookState, LoadError, Loaded, Options, load};
pub use object::OBJECT;

use sensor_common::kernel::Denial;
use sensor_common::record::VerdictKey;
use std::os::fd::AsFd as _;
use zerocopy::IntoBytes as _;

/// Takes a denial's counter out of the kernel's table in one step. `false`: it
/// was not there.
pub fn take_denial(maps: &maps::Maps, key: &VerdictKey, value: &mut Denial) -> bool {
    sys::take(maps.denials_fd.as_fd(), key.as_bytes(), value.as_mut_bytes()).unwrap_or(false)
}
