//! DNS by hand: messages as right and as wrong as a test wants them, and a
//! server that sends them.

pub mod message;
pub mod server;
pub mod zone;
