//! Clients: what brings targets to the engine. One file each.
//!
//! | client | what |
//! |---|---|
//! | [`firecracker`] | VMMs that send their userfaultfd: handshake, death |
//! | [`shim`] | the preloaded library: attach, fork, death |

pub mod firecracker;
pub mod shim;
