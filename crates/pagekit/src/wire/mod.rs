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

/// Why bytes are no message of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Not of this protocol.
    #[error("the other end does not speak pagekit's protocol")]
    Foreign,
    /// Of another build.
    #[error("the other end speaks version {theirs} of the protocol, this one {ours}: both must come from one installation")]
    Version {
        /// What the message says.
        theirs: u8,
        /// What is understood here.
        ours: u8,
    },
    /// Cut short, too long, or with values that mean nothing.
    #[error("a message of kind {0} is malformed")]
    Body(u8),
}

/// Kind and body of a message of ours, which begins with magic, version and kind.
fn opened(bytes: &[u8], magic: [u8; 4], ours: u8) -> Result<(u8, &[u8]), Malformed> {
    match bytes.strip_prefix(&magic) {
        Some([theirs, ..]) if *theirs != ours => Err(Malformed::Version { theirs: *theirs, ours }),
        Some([_, kind, body @ ..]) => Ok((*kind, body)),
        _ => Err(Malformed::Foreign),
    }
}

/// Exactly `N` numbers, and nothing behind them.
fn numbers<const N: usize>(bytes: &[u8]) -> Option<[u64; N]> {
    if bytes.len() != N * 8 {
        return None;
    }
    let mut numbers = [0; N];
    for (number, chunk) in numbers.iter_mut().zip(bytes.chunks_exact(8)) {
        *number = u64::from_ne_bytes(chunk.try_into().ok()?);
    }
    Some(numbers)
}
