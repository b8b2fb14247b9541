//! Clients: what brings targets to the engine. One file each.
//!
//! | client | what |
//! |---|---|
//! | [`shim`] | the preloaded library: attach, fork, death |

pub mod shim;
