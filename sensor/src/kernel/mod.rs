//! The kernel half: the object, its maps and links.

pub mod doctor;
pub mod object;

pub use object::OBJECT;
