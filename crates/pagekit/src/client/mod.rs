//! Clients: what brings targets to the engine. One file each.
//!
//! | client | what |
//! |---|---|
//! | [`firecracker`] | VMMs that send their userfaultfd: handshake, death |
//! | [`shim`] | the preloaded library: attach, fork, death |
//! | [`mount`] | a file system with the memory as a file, for programs that map it |

pub mod firecracker;
pub mod mount;
pub mod shim;
