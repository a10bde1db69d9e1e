//! The kernel half as user space sees it: the object, its maps and links, what
//! this kernel allows.

pub mod btf;
pub mod cgroup;
pub mod load;
pub mod maps;
pub mod object;
mod sys;

pub use load::{Hook, HookState, LoadError, Loaded, Options, load};
pub use object::OBJECT;
