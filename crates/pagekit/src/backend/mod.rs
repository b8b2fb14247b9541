//! Backends: the mechanism that puts bytes into a target. One file each.
//!
//! | backend | a present page is resolved by | private memory for a page read |
//! |---|---|---|
//! | [`copy`] | `UFFDIO_COPY` from the template's file | one page |
//! | [`share`] | `UFFDIO_WAKE`: the target maps the template's file itself | none until written |
//!
//! A backend sees pages that are present in the template, in one piece, and a range of the target in
//! one region; it never waits and never retries.

use uffd::{Errno, Userfaultfd};

use crate::page::Run;
use crate::template::cache_file::CacheFile;

pub mod copy;
pub mod share;

/// How a resolve ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// The first page is there and its waiters were woken.
    Copied,
    /// The page is in the shared file, and its waiters were woken.
    Shared,
    /// Somebody was first: the page was there, and its waiters were woken.
    Woken,
    /// The zero page is there and its waiters were woken.
    Zeroed,
    /// An event of the target is pending: try again after reading, or a little later.
    Blocked,
    /// The range is not registered, or lies in more than one mapping.
    NotCovered,
    /// The target's address space is gone.
    Gone,
    /// The kernel refused for another reason.
    Refused(Errno),
}

/// The mechanism that puts bytes into a target.
pub trait Backend: Send + Sync + std::fmt::Debug {
    /// Its one name, as in specs and statistics.
    fn name(&self) -> &'static str;

    /// Resolves the pages at `address`, which are those of `run`: all present in `cache`. Only the
    /// first has to be there afterwards.
    fn resolve(&self, uffd: &Userfaultfd, cache: &CacheFile, address: u64, run: Run) -> Resolution;
}

/// Maps the zero page at `len` bytes from `address`; only the first page has to be there afterwards.
pub fn zero(uffd: &Userfaultfd, address: u64, len: u64) -> Resolution {
    settle(uffd, address, uffd.zeropage(address, len), Resolution::Zeroed)
}

/// What a fill's progress means for the first page.
fn settle(
    uffd: &Userfaultfd,
    address: u64,
    progress: uffd::Progress,
    done: Resolution,
) -> Resolution {
    match progress.errno {
        None => done,
        // Stopped by a page that is there already, or by an event: the first page is done.
        Some(_) if progress.done > 0 => done,
        // EEXIST does not wake.
        Some(Errno::EXIST) => match uffd.wake(address, crate::page::PAGE) {
            Ok(()) => Resolution::Woken,
            Err(_) => Resolution::NotCovered,
        },
        Some(Errno::AGAIN) => Resolution::Blocked,
        Some(Errno::NOENT) => Resolution::NotCovered,
        Some(Errno::SRCH) => Resolution::Gone,
        Some(errno) => Resolution::Refused(errno),
    }
}
