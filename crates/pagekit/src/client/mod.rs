//! Clients: what brings targets to the engine. One file each.
//!
//! | client | what |
//! |---|---|
//! | [`door`] | the Unix sockets at which they come in |
//! | [`shim`] | the preloaded library: attach, fork, death |
//! | [`mount`] | a file system with the memory as a file, for programs that map it |

pub mod door;
pub mod mount;
pub mod shim;
