//! Clients: what brings targets to the engine. One file each.
//!
//! | client | what |
//! |---|---|
//! | [`door`] | the Unix sockets at which they come in |
//! | [`firecracker`] | VMMs that send their userfaultfd: handshake, death |
//! | [`shim`] | the preloaded library: attach, fork, death |

pub mod door;
pub mod firecracker;
pub mod shim;
