//! Messages between clients and the server: bytes ↔ values, no sockets, no threads.
//!
//! | protocol | between |
//! |---|---|
//! | [`firecracker`] | Firecracker and us: one JSON array, from it to us |
//! | [`relay`] | a second handler in another process, and us |
//! | [`shim`] | the shim and us, both from one build |

pub mod firecracker;
pub mod relay;
pub mod shim;
