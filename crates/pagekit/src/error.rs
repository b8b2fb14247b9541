//! Errors of the engine. Each variant is one class of `pagekit.errors` in Python; the map is in
//! `crates/pagekit-py`.

use std::io;

/// What a call can fail with. The text says what failed, on what, and why; [`Error::hint`] says what
/// to do next.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An impossible stack, a wrong option or argument.
    #[error("{message}")]
    Usage {
        /// What is wrong.
        message: String,
        /// What to do.
        hint: String,
    },
    /// This system or kernel cannot do it, whoever asks.
    #[error("{message}")]
    Unsupported {
        /// What is missing.
        message: String,
        /// What to do.
        hint: String,
    },
    /// It could be done, but not by this user.
    #[error("{message}")]
    Permission {
        /// What was refused.
        message: String,
        /// The knob to turn.
        hint: String,
    },
    /// The kernel refused a call that should have worked.
    #[error("{what}: {error}")]
    Kernel {
        /// What was being done.
        what: String,
        /// The kernel's answer.
        error: io::Error,
    },
    /// There is nothing at the place the pages should come from.
    #[error("{what}: {error}")]
    Missing {
        /// What was looked for.
        what: String,
        /// Why it is not there.
        error: io::Error,
    },
    /// The source exists, but could not be read now; another try may succeed.
    #[error("{what}: {error}")]
    Unavailable {
        /// What was being read.
        what: String,
        /// Why it failed.
        error: io::Error,
    },
    /// A callback of the user's raised, or gave something else than pages; it would do so again.
    #[error("{message}")]
    Callback {
        /// Which one, for which pages, and what it did.
        message: String,
        /// What Python printed about it where it ran; empty if nothing was raised.
        traceback: String,
        /// The exception, as Python pickled it; empty if it could not.
        pickled: Vec<u8>,
    },
    /// The source did not answer in the time it has; it would be as slow again.
    #[error("{message}")]
    Timeout {
        /// What was asked for, and the time.
        message: String,
        /// What to do.
        hint: String,
    },
    /// Bytes are not what they must be; no other try can succeed.
    #[error("{message}")]
    Integrity {
        /// What is wrong, and where.
        message: String,
    },
    /// Another server answers on the socket.
    #[error("{message}")]
    AddressInUse {
        /// Which socket.
        message: String,
        /// What to do.
        hint: String,
    },
}

impl Error {
    /// What to do next, if there is something.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Error::Usage { hint, .. }
            | Error::Unsupported { hint, .. }
            | Error::Permission { hint, .. }
            | Error::Timeout { hint, .. }
            | Error::AddressInUse { hint, .. } => {
                Some(hint).filter(|h| !h.is_empty()).map(|h| &**h)
            }
            _ => None,
        }
    }

    /// Whether the same call may succeed later.
    pub fn retryable(&self) -> bool {
        matches!(self, Error::Unavailable { .. })
    }

    /// Whether the one that fetched stopped in the middle; anybody else may go on.
    pub(crate) fn given_up(&self) -> bool {
        matches!(self, Error::Unavailable { error, .. } if error.kind() == io::ErrorKind::Interrupted)
    }

    /// The exit status of a program that ends with this error; the same as in `pagekit.errors`.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage { .. } => 2,
            Error::Unsupported { .. } | Error::Kernel { .. } => 3,
            Error::Permission { .. } => 4,
            Error::Missing { .. } | Error::Unavailable { .. } => 6,
            Error::Callback { .. } | Error::Timeout { .. } => 6,
            Error::Integrity { .. } => 7,
            Error::AddressInUse { .. } => 8,
        }
    }

    pub(crate) fn kernel(what: impl Into<String>, error: impl Into<io::Error>) -> Error {
        Error::Kernel { what: what.into(), error: error.into() }
    }

    pub(crate) fn usage(message: impl Into<String>, hint: impl Into<String>) -> Error {
        Error::Usage { message: message.into(), hint: hint.into() }
    }
}

/// Result of the engine's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;
