//! Sources: where bytes come from. One file each.
//!
//! A source answers questions ([`Capabilities`]) and reads. It never sees the engine, a backend or
//! another source. A *layer* ([`crate::layer`]) is a source that wraps the `next` one, so both share
//! this trait and one conformance suite ([`conformance`]).
//!
//! | piece | what |
//! |---|---|
//! | [`zero`] | nothing but zeros: the do-nothing example |
//! | [`file`] | a file of raw memory; holes are zeros |
//! | [`python`] | pages that a Python function makes, in a process of its own |

use std::os::fd::BorrowedFd;

use crate::error::Result;
use crate::page::Run;

#[cfg(test)]
pub(crate) mod conformance;
pub mod file;
pub mod python;
pub mod zero;

/// What a read brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// The buffer was filled, all of it.
    Bytes,
    /// All of it is zero; the buffer was not touched.
    Zero,
}

/// What a source can do. A stack has the most restrictive of its pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Bytes; a multiple of [`crate::page::PAGE`], never 0.
    pub size: u64,
    /// Reads that may usefully be under way at once.
    pub concurrency: usize,
    /// Whether [`Source::try_read`] ever answers with content: then the event loop asks it first.
    pub immediate: bool,
}

/// What a source says it is: the same for the same content, wherever it lies. It tells which template
/// a working set belongs to; pages are never taken for right because of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity(pub [u8; 32]);

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({self})")
    }
}

/// Where bytes come from. Shared by threads; every method may be called from any of them.
pub trait Source: Send + Sync + std::fmt::Debug {
    /// The spec string that makes this piece, for messages: `file:mem`, `delay=2ms`.
    fn name(&self) -> String;

    /// What it can do; constant for the life of the source.
    fn capabilities(&self) -> Capabilities;

    /// What it is. A layer that changes no content says what its `next` one says.
    fn identity(&self) -> Result<Identity>;

    /// Runs known to be zero without reading, rising and not overlapping.
    fn zero_runs(&self) -> Result<Vec<Run>>;

    /// Reads `buffer.len()` bytes at `offset`, both multiples of the page size and inside `size`.
    /// May block. Short content is an error, never padded.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Content>;

    /// [`Self::read`] if it can be done without waiting for anything; `None` if not.
    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> Result<Option<Content>>;

    /// A descriptor of the very file that a reader could as well map, if the source is nothing else.
    fn mappable(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Names and values that this piece counts, for people; a layer adds its `next` one's.
    fn statistics(&self) -> Vec<(String, u64)> {
        Vec::new()
    }
}
