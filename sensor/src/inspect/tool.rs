//! Poison in what a server says of its tools.
